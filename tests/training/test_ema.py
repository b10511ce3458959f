import pytest
import torch
from torch.nn import Parameter

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.training.ema import Ema
from simpletuner_dmd.training.packing import pack, unpack


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [(name, Parameter(torch.randn(3, 2, generator=generator).to(dtype))) for name in ("a", "b")]


@torch.no_grad()
def fill(named, value):
    for _, parameter in named:
        parameter.fill_(value)


def test_closed_form():
    named = parameters()
    fill(named, 1.0)
    ema = Ema(named, 0.9)
    for count in range(1, 6):
        fill(named, 1.0 + count)
        ema.update(count)
    expected = 0.9**5 + sum(0.1 * 0.9 ** (5 - count) * (1 + count) for count in range(1, 6))
    assert torch.allclose(ema.shadow["a"], torch.full((3, 2), expected), atol=1e-6)


def test_the_interval_changes_the_cost_and_not_the_memory():
    named = parameters()
    fill(named, 0.0)
    often, seldom = Ema(named, 0.9), Ema(named, 0.9, update_interval=4)
    fill(named, 1.0)
    for count in range(1, 9):
        often.update(count)
        seldom.update(count)
        if count == 3:
            assert seldom.shadow["a"].abs().max() == 0
    assert torch.allclose(often.shadow["a"], torch.full((3, 2), 1 - 0.9**8), atol=1e-6)
    assert torch.allclose(often.shadow["a"], seldom.shadow["a"], atol=1e-6)


def test_the_shadow_follows_until_the_start_and_counts_from_there():
    named = parameters()
    ema = Ema(named, 0.9, update_interval=4, start_step=6)
    for count in range(1, 7):
        fill(named, float(count))
        ema.update(count)
    assert (ema.shadow["b"] == 6).all()
    fill(named, 7.0)
    ema.update(7)
    assert (ema.shadow["b"] == 6).all()
    ema.update(8)  # two updates after the start, although the interval is four
    assert torch.allclose(ema.shadow["b"], torch.full((3, 2), 6 * 0.81 + 7 * 0.19))


def test_a_bf16_model_has_an_fp32_shadow_that_moves():
    named = parameters(torch.bfloat16)
    fill(named, 1.0)
    ema = Ema(named, 0.9999)
    fill(named, 1.5)
    for count in range(1, 11):
        ema.update(count)
    assert ema.shadow["a"].dtype == torch.float32
    assert torch.allclose(ema.shadow["a"], torch.full((3, 2), 1 + 0.5 * (1 - 0.9999**10)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swap_restores_every_bit(dtype):
    named = parameters(dtype)
    named[0][1].data[0, 0] = float("nan")
    named[0][1].data[0, 1] = -0.0
    before = [parameter.detach().clone() for _, parameter in named]
    ema = Ema(named, 0.5)
    ema.shadow["a"].fill_(3.0)
    ema.shadow["b"].fill_(4.0)
    with ema.swap():
        assert (named[0][1] == 3).all() and (named[1][1] == 4).all()
        with pytest.raises(AssertionError):
            ema.update(1)
        with pytest.raises(AssertionError), ema.swap():
            pass
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    for old, (_, parameter) in zip(before, named, strict=True):
        assert torch.equal(parameter.detach().view(integer), old.view(integer))
    ema.update(1)


def test_swap_restores_after_an_exception_inside_and_while_putting_in():
    named = parameters()
    before = [parameter.detach().clone() for _, parameter in named]
    ema = Ema(named, 0.5)
    ema.shadow["a"].fill_(3.0)
    with pytest.raises(KeyboardInterrupt), ema.swap():
        raise KeyboardInterrupt
    ema.shadow["b"] = torch.zeros(7)  # does not fit: fails after "a" is in
    with pytest.raises(RuntimeError), ema.swap():
        pass
    assert all(torch.equal(old, parameter) for old, (_, parameter) in zip(before, named, strict=True))


def test_a_resumed_average_is_the_same():
    named = parameters()
    straight = Ema(named, 0.9, update_interval=3)
    generator = torch.Generator().manual_seed(5)
    values = [torch.randn(3, 2, generator=generator) for _ in range(12)]

    def advance(ema, counts):
        for count in counts:
            for _, parameter in named:
                parameter.data.copy_(values[count - 1])
            ema.update(count)

    advance(straight, range(1, 8))
    document, tensors = pack(straight.state_dict())
    saved = unpack(document, {key: value.clone() for key, value in tensors.items()})
    advance(straight, range(8, 13))
    resumed = Ema(named, 0.9, update_interval=3)
    resumed.load_state_dict(saved)
    advance(resumed, range(8, 13))
    assert all(torch.equal(straight.shadow[name], resumed.shadow[name]) for name in ("a", "b"))


def test_an_average_of_other_weights_is_refused():
    ema = Ema(parameters(), 0.9)
    state = ema.state_dict()
    with pytest.raises(UserError, match="1 differ, for example c"):
        ema.load_state_dict({"updates": 1, "shadow": state["shadow"] | {"c": torch.zeros(1)}})
    with pytest.raises(UserError, match="1 differ, for example a"):
        ema.load_state_dict({"updates": 1, "shadow": state["shadow"] | {"a": torch.zeros(1)}})
    with pytest.raises(UserError, match="ema_decay"):
        Ema(parameters(), 1.0)
