import json
import logging
import shutil
from contextlib import nullcontext

import pytest
import torch
from torch.nn import Parameter

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.config.optimizer_options import SETTINGS, OptimizerName
from simpletuner_dmd.config.schema import TrainConfig
from simpletuner_dmd.training.adamw_bf16 import AdamWBF16, join_master, split_master
from simpletuner_dmd.training.muon import MuonWithAdamW
from simpletuner_dmd.training.optimizers import BUILDERS, LIBRARIES, OPTIMIZERS, build_optimizer, check_runs_here
from simpletuner_dmd.training.packing import pack, unpack
from simpletuner_dmd.training.schedules import build_schedule

OPTIMI = [name for name in OPTIMIZERS if name.startswith("optimi")]
BF16 = ["adamw_bf16", *OPTIMI]
CASES = [(name, torch.float32) for name in OPTIMIZERS] + [(name, torch.bfloat16) for name in BF16]


MATRIX = "blocks.0.attn1.to_q.lora_A.weight"


def needs(name):
    """Skips where the library of an optimizer is not installed."""
    for beginning, (module, package) in LIBRARIES.items():
        if name.startswith(beginning):
            pytest.importorskip(module, reason=f"{package} is an extra")


@pytest.fixture
def uncompiled():
    """torchao's own update without the half minute that compiling it takes."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


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


def rate_of(name, lr):
    """prodigy's is a factor of the rate that it finds, which starts at 1e-6 and needs some steps to grow."""
    return 1.0 if name == "prodigy" else lr


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_lowers_a_quadratic(name, dtype, uncompiled):
    needs(name)
    parameter = Parameter(torch.linspace(0.5, 1.0, 32).view(4, 8).to(dtype))
    lr = rate_of(name, 1e-2)
    optimizer = build_optimizer(name, [(MATRIX, parameter)], lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    losses = []
    # ranger's rectified rate takes the first dozens slowly; muon's step is 0.2 of AdamW's on a matrix of equal signs
    for _ in range(200 if name in ("prodigy", "torch-muon") else 60):
        loss = parameter.float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_state_round_trip_goes_on_with_the_same_bits(name, dtype, uncompiled):
    """Through what a checkpoint stores, with several parameters, into an optimizer that was just built; the schedule
    as well, which sets the rates that the loaded state brings."""
    needs(name)
    size = 4096  # from here on 8- and 4-bit state is quantised

    def build():
        pairs = [(f"blocks.{index}.to_q.lora_A.weight", weights(dtype, size, index)) for index in range(2)]
        pairs = [(key, Parameter(value.detach().view(64, 64))) for key, value in pairs]
        pairs.append(("proj_out.bias", weights(dtype, size, 9)))
        optimizer = build_optimizer(name, pairs, lr=rate_of(name, 1e-3), betas=(0.9, 0.99))
        return dict(pairs), optimizer, build_schedule("cosine", optimizer, updates=20, warmup=3)

    def advance(params, optimizer, schedule, source, number):
        for _ in range(number):
            for parameter in params.values():
                parameter.grad = next(source).view(parameter.shape).to(dtype)
            optimizer.step()
            schedule.step()

    straight, optimizer, schedule = build()
    source = gradients(size)
    advance(straight, optimizer, schedule, source, 7)
    document, tensors = pack([optimizer.state_dict(), schedule.state_dict()])
    document = json.loads(json.dumps(document, allow_nan=False))
    saved = unpack(document, {key: value.clone() for key, value in tensors.items()})
    values = {key: value.detach().clone() for key, value in straight.items()}
    advance(straight, optimizer, schedule, source, 7)

    resumed, again, its_schedule = build()
    with torch.no_grad():
        for key, value in values.items():
            resumed[key].copy_(value)
    again.load_state_dict(saved[0])
    its_schedule.load_state_dict(saved[1])
    source = gradients(size)
    for _ in range(7 * 3):
        next(source)
    advance(resumed, again, its_schedule, source, 7)
    assert all(not torch.equal(straight[key], values[key]) for key in straight)
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
    with pytest.raises(UserError, match="nothing that trains here is one"):
        build_optimizer("torch-muon", [("blocks.0.norm", weights(torch.float32))], lr=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_library_that_is_missing_is_named(name, monkeypatch):
    """Without an import, so that `check` can say it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    package = next((package for beginning, (_, package) in LIBRARIES.items() if name.startswith(beginning)), None)
    expected = nullcontext() if package is None else pytest.raises(UserError, match=f"pip install {package}, or use")
    with expected:
        check_runs_here(name, torch.device("cpu"))


def test_torchao_needs_a_compiler(monkeypatch):
    needs("ao-")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda command: None)
    with pytest.raises(UserError, match="no C\\+\\+ compiler(.|\n)*bnb-adamw8bit"):
        check_runs_here("ao-adamw8bit", torch.device("cpu"))


def test_the_schema_names_what_can_be_built():
    assert set(OptimizerName.__args__) == set(BUILDERS) and SETTINGS.keys() <= BUILDERS.keys()


# --- settings of their own --------------------------------------------------------------------------------------------

EXAMPLES = {
    "torch-adamw": ("amsgrad=true", {"amsgrad": True}),
    "torch-muon": ("momentum=0.8,nesterov=no,ns_steps=3", {"momentum": 0.8, "nesterov": False, "ns_steps": 3}),
    "optimi-ranger": ("k=3, alpha=0.25", {"k": 3, "alpha": 0.25}),
    "prodigy": ("d0=1e-5,d_coef=2,safeguard_warmup=true", {"d0": 1e-5, "d_coef": 2.0, "safeguard_warmup": True}),
    "adafactor": ("beta1=0.9,scale_parameter=true", {"beta1": 0.9, "scale_parameter": True}),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_settings_reach_the_library(name):
    needs(name)
    written, expected = EXAMPLES[name]
    config = TrainConfig(optimizer=name, optimizer_config=written)
    assert config.optimizer_settings == expected
    pair = (MATRIX, Parameter(torch.ones(4, 4)))
    group = build_optimizer(name, [pair], lr=1e-3, settings=config.optimizer_settings).param_groups[0]
    assert {key: group[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "setting"), [("bnb-adamw8bit", "min_8bit_size=100"), ("ao-adamw8bit", "block_size=64")]
)
def test_sizes_of_quantised_state_reach_the_library(name, setting, uncompiled):
    needs(name)
    settings = TrainConfig(optimizer=name, optimizer_config=setting).optimizer_settings
    count = 256 if name.startswith("bnb") else 4096
    parameter = Parameter(torch.ones(count))
    optimizer = build_optimizer(name, [("w", parameter)], lr=1e-3, settings=settings)
    steps(optimizer, parameter, 1, gradients(count))
    state = optimizer.state[parameter]
    if name.startswith("bnb"):
        assert state["state1"].dtype == torch.uint8
    else:
        assert state["exp_avg"].block_size == 64


@pytest.mark.parametrize("setting", [(name, key) for name, kinds in SETTINGS.items() for key in kinds], ids="-".join)
def test_every_setting_is_an_argument_of_its_library(setting):
    name, key = setting
    needs(name)
    value = {bool: True, int: 64, float: 0.5}[SETTINGS[name][key]]
    build_optimizer(name, [(MATRIX, Parameter(torch.ones(4, 4)))], lr=1e-3, settings={key: value})


# --- what is special about one of them --------------------------------------------------------------------------------


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    shapes = {
        "blocks.0.attn1.to_q.lora_A.weight": (4, 48), "blocks.0.attn1.to_q.lora_B.weight": (48, 4),
        "lycoris_blocks_0_attn1_to_q.lokr_w2": (4, 4), "blocks.1.ffn.net.0.proj.weight": (64, 48),
        "blocks.0.norm2.weight": (48,), "blocks.0.scale_shift_table": (1, 6, 48), "proj_out.weight": (16, 48),
        "condition_embedder.time_proj.lora_A.weight": (4, 48), "patch_embedding.weight": (48, 4, 1, 2, 2),
        "discriminator.head.weight": (4, 4),
    }  # fmt: skip
    pairs = [(name, Parameter(torch.randn(shape))) for name, shape in shapes.items()]
    optimizer = build_optimizer("torch-muon", pairs, lr=1e-3)
    assert isinstance(optimizer, MuonWithAdamW)
    names = {id(parameter): name for name, parameter in pairs}
    muon, adamw = ({names[id(p)] for group in part.param_groups for p in group["params"]} for part in optimizer.parts)
    assert muon == set(list(shapes)[:4]) and adamw == set(list(shapes)[4:])


def test_muon_orthogonalises_and_steps_as_far_as_adamw():
    matrix = Parameter(torch.zeros(64, 48))
    optimizer = build_optimizer("torch-muon", [(MATRIX, matrix)], lr=1e-2, weight_decay=0.0)
    noise = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    matrix.grad = noise @ torch.diag(torch.logspace(-0.3, 0.3, 48))
    optimizer.step()
    before, after = torch.linalg.svdvals(matrix.grad), torch.linalg.svdvals(matrix.detach())
    assert before.max() / before.min() > 15 and after.max() / after.min() < 4
    assert 0.1 * 1e-2 < matrix.detach().square().mean().sqrt() < 0.4 * 1e-2


def test_a_schedule_moves_both_parts_of_muon():
    pairs = [(MATRIX, Parameter(torch.ones(4, 4))), ("proj_out.bias", Parameter(torch.ones(4)))]
    optimizer = build_optimizer("torch-muon", pairs, lr=1e-3)
    schedule = build_schedule("linear", optimizer, updates=10)
    for _ in range(5):
        for _, parameter in pairs:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        schedule.step()
    rates = [group["lr"] for part in optimizer.parts for group in part.param_groups]
    assert rates == pytest.approx([5e-4, 5e-4])


@pytest.mark.parametrize("name", ["bnb-adamw8bit", "ao-adamw8bit", "ao-adamw4bit"])
def test_quantised_state_is_small_and_goes_where_adamw_goes(name, uncompiled):
    needs(name)
    reference, parameter = weights(torch.float32, 8192), weights(torch.float32, 8192)
    start = reference.detach().clone()
    steps(torch.optim.AdamW([reference], lr=1e-4, weight_decay=0.01), reference, 20, gradients(8192))
    optimizer = build_optimizer(name, [("w", parameter)], lr=1e-4)
    steps(optimizer, parameter, 20, gradients(8192))
    moved, wanted = parameter.detach() - start, reference.detach() - start
    assert torch.cosine_similarity(moved, wanted, dim=0) > 0.98
    tensors = pack(optimizer.state_dict())[1]
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) < 8192 * 2.5 + 4096


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_document_says_what_state_takes(name, uncompiled):
    """Bytes per parameter of a matrix, against the table of documentation/MEMORY.md."""
    needs(name)
    documented = {
        "adamw_bf16": 8, "torch-adamw": 8, "torch-muon": 4, "optimi-adamw": 8, "optimi-stableadamw": 8,
        "optimi-lion": 4, "optimi-adan": 16, "optimi-ranger": 12, "bnb-adamw": 8, "bnb-lion": 4, "bnb-adamw8bit": 2,
        "bnb-lion8bit": 1, "ao-adamw8bit": 2, "ao-adamw4bit": 1, "prodigy": 16, "adafactor": 0.03,
    }  # fmt: skip
    matrix = Parameter(torch.ones(256, 256))
    optimizer = build_optimizer(name, [(MATRIX, matrix)], lr=1e-3)
    matrix.grad = torch.ones_like(matrix)
    optimizer.step()
    tensors = pack(optimizer.state_dict())[1].values()
    taken = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / matrix.numel()
    assert taken == pytest.approx(documented[name.removesuffix("-paged")], abs=0.13)


def test_a_new_lora_moves_under_adafactor():
    """By itself it scales the rate by each weight's size, and a LoRA's second factor starts at 0."""
    zeros = Parameter(torch.zeros(48, 4))
    optimizer = build_optimizer("adafactor", [("w", zeros)], lr=1e-3)
    for gradient, _ in zip(gradients(192), range(10), strict=False):
        zeros.grad = gradient.view(48, 4)
        optimizer.step()
    assert zeros.detach().abs().mean() > 3e-3


def test_paged_state_needs_a_gpu(recwarn):
    needs("bnb-")
    parameter = weights(torch.float32, 4096)
    optimizer = build_optimizer("bnb-adamw-paged", [("w", parameter)], lr=1e-3)
    steps(optimizer, parameter, 1, gradients(4096))
    assert not [warning for warning in recwarn if "paged" in str(warning.message).lower()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ao-adamw8bit", "ao-adamw4bit"])
def test_torchao_compiles_here(name):
    needs(name)
    compiled, plain = weights(torch.float32, 4096), weights(torch.float32, 4096)
    optimizer = build_optimizer(name, [("w", compiled)], lr=1e-3)
    steps(optimizer, compiled, 3, gradients(4096))
    torch.compiler.set_stance("force_eager")
    try:
        steps(build_optimizer(name, [("w", plain)], lr=1e-3), plain, 3, gradients(4096))
    finally:
        torch.compiler.set_stance("default")
    assert torch.allclose(compiled, plain, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bnb-adamw8bit-paged", "bnb-lion8bit-paged", "bnb-adamw-paged", "ao-adamw8bit"])
def test_on_a_gpu(name):
    needs(name)
    parameter = Parameter(weights(torch.float32, 8192).detach().cuda())
    optimizer = build_optimizer(name, [("w", parameter)], lr=1e-3)
    before = parameter.detach().clone()
    source = gradients(8192)
    for _ in range(3):
        parameter.grad = next(source).cuda()
        optimizer.step()
    saved = unpack(*pack(optimizer.state_dict()))
    again = build_optimizer(name, [("w", Parameter(parameter.detach().clone()))], lr=1e-3)
    again.load_state_dict(saved)
    twin = again.param_groups[0]["params"][0]
    twin.grad = parameter.grad = next(source).cuda()
    optimizer.step()
    again.step()
    assert torch.equal(twin, parameter) and not torch.equal(parameter, before)


def test_optimi_warns_of_a_second_moment_that_cannot_fall(caplog):
    pytest.importorskip("optimi", reason="torch-optimi is an extra")
    with caplog.at_level(logging.WARNING):
        build_optimizer("optimi-adamw", [("w", weights(torch.float32))], lr=1e-6, betas=(0.9, 0.999))
        assert not caplog.records
        build_optimizer("optimi-adamw", [("w", weights(torch.bfloat16))], lr=1e-6, betas=(0.9, 0.999))
    assert "adamw_bf16" in caplog.text
