import logging

import pytest
import torch
from torch.nn import Parameter

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.training.adamw_bf16 import AdamWBF16, join_master, split_master
from simpletuner_dmd.training.optimizers import OPTIMIZERS, build_optimizer
from simpletuner_dmd.training.packing import pack, unpack

OPTIMI = [name for name in OPTIMIZERS if name.startswith("optimi")]
BF16 = ["adamw_bf16", *OPTIMI]
CASES = [(name, torch.float32) for name in OPTIMIZERS] + [(name, torch.bfloat16) for name in BF16]


@pytest.fixture(autouse=True)
def _needs_optimi(request):
    if "optimi" in request.node.name:
        pytest.importorskip("optimi", reason="torch-optimi is an extra")


def weights(dtype, count=512, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Parameter((torch.randn(count, generator=generator) * 0.02).bfloat16().to(dtype))


def gradients(count=512):
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randn(count, generator=generator) + 0.5


def steps(optimizer, parameter, number, source, scale=1.0):
    for _ in range(number):
        parameter.grad = (next(source) * scale).to(parameter.dtype)
        optimizer.step()


def test_the_two_halves_of_a_master_are_the_master():
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    master = bits.view(torch.float32)
    master = master[master.isfinite() & (master.abs() < 3e38)]
    weight, remainder = split_master(master)
    assert torch.equal(join_master(weight, remainder).view(torch.int32), master.view(torch.int32))
    # The weight is the rounded master and not the truncated one (ties may go either way).
    assert ((weight.double() - master.double()).abs() <= (master.bfloat16().double() - master.double()).abs()).all()


@pytest.mark.parametrize("lr", [1e-6, 1e-5])
@pytest.mark.parametrize("name", ["adamw_bf16", "optimi-adamw"])
def test_bf16_weights_move_as_fp32_does(name, lr):
    reference, low = weights(torch.float32), weights(torch.bfloat16)
    start = reference.detach().clone()
    fp32 = torch.optim.AdamW([reference], lr=lr, betas=(0.9, 0.99), weight_decay=0.01, eps=1e-8)
    bf16 = build_optimizer(name, [("w", low)], lr=lr, betas=(0.9, 0.99))
    steps(fp32, reference, 300, gradients())
    steps(bf16, low, 300, gradients())
    moved, wanted = (low.detach().float() - start).mean(), (reference.detach() - start).mean()
    assert abs(wanted) > 100 * lr
    assert abs(moved / wanted - 1) < 0.1


def test_plain_adamw_on_bf16_hardly_moves():
    """The trap that the test above would not see if its numbers were too easy."""
    low = weights(torch.bfloat16)
    start = low.detach().float().clone()
    steps(torch.optim.AdamW([low], lr=1e-6, weight_decay=0), low, 300, gradients())
    assert (low.detach().float() - start).mean().abs() < 0.1 * 300 * 1e-6


def test_adamw_bf16_holds_a_master_that_is_fp32_adamw():
    """Large weights and a small rate, where a bf16 compensation would stall; given the same gradients."""
    reference, low = Parameter(torch.ones(64)), Parameter(torch.ones(64, dtype=torch.bfloat16))
    fp32 = torch.optim.AdamW([reference], lr=1e-6, betas=(0.0, 0.999), weight_decay=0.01)
    bf16 = build_optimizer("adamw_bf16", [("w", low)], lr=1e-6, betas=(0.0, 0.999))
    for gradient, _ in zip(gradients(64), range(400), strict=False):
        reference.grad, low.grad = gradient.bfloat16().float(), gradient.bfloat16()
        fp32.step()
        bf16.step()
    master = join_master(low.detach(), bf16.state[low]["remainder"])
    travelled = (reference.detach() - 1).abs().mean()
    assert travelled > 1e-4
    assert (master - reference.detach()).abs().max() < 0.01 * travelled


def test_adamw_bf16_second_moment_falls_when_gradients_shrink():
    reference, low = weights(torch.float32), weights(torch.bfloat16)
    fp32 = torch.optim.AdamW([reference], lr=1e-5, betas=(0.9, 0.999), weight_decay=0)
    bf16 = build_optimizer("adamw_bf16", [("w", low)], lr=1e-5, betas=(0.9, 0.999), weight_decay=0)
    for optimizer, parameter in ((fp32, reference), (bf16, low)):
        source = gradients()
        steps(optimizer, parameter, 200, source)
        steps(optimizer, parameter, 400, source, scale=0.1)
    ratio = bf16.state[low]["exp_avg_sq"].mean() / fp32.state[reference]["exp_avg_sq"].mean()
    assert abs(ratio - 1) < 0.01


def test_mixed_dtypes_and_missing_gradients():
    low, wide, idle = weights(torch.bfloat16), weights(torch.float32), weights(torch.bfloat16)
    reference = weights(torch.float32)
    optimizer = build_optimizer("adamw_bf16", [("a", low), ("b", wide), ("c", idle)], lr=1e-3)
    assert isinstance(optimizer, AdamWBF16)
    steps(optimizer, wide, 5, gradients())
    steps(torch.optim.AdamW([reference], lr=1e-3), reference, 5, gradients())
    assert torch.allclose(wide, reference, atol=1e-7)
    assert torch.equal(idle, weights(torch.bfloat16)) and torch.equal(low, weights(torch.bfloat16))
    assert idle not in optimizer.state


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_lowers_a_quadratic(name, dtype):
    parameter = Parameter(torch.linspace(0.5, 1.0, 32).to(dtype))
    optimizer = build_optimizer(name, [("w", parameter)], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    losses = []
    for _ in range(60):  # ranger's rectified rate takes the first dozens slowly
        loss = parameter.float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_state_round_trip_goes_on_with_the_same_bits(name, dtype):
    """Through what a checkpoint stores, with several parameters, into an optimizer that was just built."""

    def build():
        pairs = [(f"w{index}", weights(dtype, 64, index)) for index in range(3)]
        return dict(pairs), build_optimizer(name, pairs, lr=1e-3, betas=(0.9, 0.99))

    def advance(params, optimizer, source, number):
        for _ in range(number):
            for parameter in params.values():
                parameter.grad = next(source).to(dtype)
            optimizer.step()

    straight, optimizer = build()
    source = gradients(64)
    advance(straight, optimizer, source, 7)
    document, tensors = pack(optimizer.state_dict())
    saved = unpack(document, {key: value.clone() for key, value in tensors.items()})
    values = {key: value.detach().clone() for key, value in straight.items()}
    advance(straight, optimizer, source, 7)

    resumed, again = build()
    with torch.no_grad():
        for key, value in values.items():
            resumed[key].copy_(value)
    again.load_state_dict(saved)
    source = gradients(64)
    for _ in range(7 * 3):
        next(source)
    advance(resumed, again, source, 7)
    for key in straight:
        assert torch.equal(straight[key], resumed[key])
    before, after = pack(optimizer.state_dict())[1], pack(again.state_dict())[1]
    assert before.keys() == after.keys() and before
    for key in before:
        assert before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]), key


def test_loading_does_not_alias_the_saved_state():
    parameter = weights(torch.bfloat16)
    optimizer = build_optimizer("adamw_bf16", [("w", parameter)], lr=1e-3)
    steps(optimizer, parameter, 1, gradients())
    saved = optimizer.state_dict()
    before = saved["state"][0]["exp_avg_sq"].clone()
    other = weights(torch.bfloat16)
    again = build_optimizer("adamw_bf16", [("w", other)], lr=1e-3)
    again.load_state_dict(saved)
    steps(again, other, 1, gradients(), scale=3)
    assert torch.equal(saved["state"][0]["exp_avg_sq"], before)


def test_parameters_are_ordered_by_name():
    a, b = weights(torch.float32), weights(torch.float32)
    one = build_optimizer("torch-adamw", [("b", b), ("a", a)], lr=1e-3).param_groups[0]["params"]
    assert one[0] is a and one[1] is b


def test_options_reach_the_library():
    pytest.importorskip("optimi", reason="torch-optimi is an extra")
    group = build_optimizer("optimi-adan", [("w", weights(torch.float32))], lr=1e-3, betas=(0.9, 0.95), eps=1e-5,
                            weight_decay=0.2).param_groups[0]  # fmt: skip
    assert (group["beta1"], group["beta2"], group["beta3"]) == (0.9, 0.92, 0.95)
    assert (group["eps"], group["weight_decay"], group["lr"]) == (1e-5, 0.2, 1e-3)


def test_refusals_say_what_to_use(monkeypatch):
    pairs = [("w", weights(torch.bfloat16))]
    with pytest.raises(UserError, match="adamw_bf16"):
        build_optimizer("torch-adamw", pairs, lr=1e-6)
    with pytest.raises(UserError, match='did you mean "optimi-lion"'):
        build_optimizer("optimi-loin", pairs, lr=1e-6)
    with pytest.raises(UserError, match="float16"):
        build_optimizer("adamw_bf16", [("w", weights(torch.float16))], lr=1e-6)
    monkeypatch.setitem(__import__("sys").modules, "optimi", None)
    with pytest.raises(UserError, match="pip install torch-optimi"):
        build_optimizer("optimi-adamw", pairs, lr=1e-6)


def test_optimi_warns_of_a_second_moment_that_cannot_fall(caplog):
    pytest.importorskip("optimi", reason="torch-optimi is an extra")
    with caplog.at_level(logging.WARNING):
        build_optimizer("optimi-adamw", [("w", weights(torch.float32))], lr=1e-6, betas=(0.9, 0.999))
        assert not caplog.records
        build_optimizer("optimi-adamw", [("w", weights(torch.bfloat16))], lr=1e-6, betas=(0.9, 0.999))
    assert "adamw_bf16" in caplog.text
