"""Recomputing, swapping, offloading, kernels per pass, compiling: each acts, and no gradient changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.config.lycoris import LycorisOptions
from simpletuner_dmd.flow import Routing
from simpletuner_dmd.randomness import RandomStream
from simpletuner_dmd.wan import runner as runner_module
from simpletuner_dmd.wan.attention import choose_attention
from simpletuner_dmd.wan.compiling import compile_blocks, why_not_compiled
from simpletuner_dmd.wan.lycoris import LycorisSpec
from simpletuner_dmd.wan.offload import offload_in_groups
from simpletuner_dmd.wan.quantisation import quantise
from simpletuner_dmd.wan.roles import Roles, build_roles, self_test
from simpletuner_dmd.wan.runner import Recompute
from simpletuner_dmd.wan.swap import BlockSwap, swapped_indices
from simpletuner_dmd.wan.tread import Route

from .tiny import LORA, latents, prompts, tiny_wan, wake

LAYERS = 5
CPU = torch.device("cpu")
LOKR = LycorisSpec(LycorisOptions(algo="lokr", linear_dim=4, linear_alpha=4, factor=4))
SIGMA = torch.tensor([0.3, 0.8])


def base(precision: str = "no_change") -> nn.Module:
    network = tiny_wan(layers=LAYERS, dtype=torch.float32 if precision == "no_change" else torch.bfloat16)
    quantise(network, precision)
    return network.requires_grad_(False)


def roles_on(network: nn.Module, adapter: Any = LORA, **options: Any) -> Roles:
    options = {"gradient_checkpointing": True, **options}
    roles = build_roles(network, adapters={"student": adapter, "critic": adapter}, **options)
    wake(roles)
    if adapter is not LORA:
        with torch.no_grad():
            for role in roles.adapters:
                for number, (_, parameter) in enumerate(roles.parameters[role]):
                    generator = torch.Generator().manual_seed(number + len(role))
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return roles


def chain(roles: Roles, device: torch.device = CPU) -> dict[str, Tensor]:
    """The gradients of a loss through student and critic, with a pass of the teacher between: the hardest turn."""
    x, sigma, text = latents().to(device), SIGMA.to(device), prompts().to(device)
    x0 = roles.student.velocity(x, sigma, text)
    with torch.no_grad():
        taught = roles.teacher.velocity(x0, sigma, text)
    assert roles.critic is not None
    (roles.critic.velocity(x0, sigma, text) - taught).square().mean().backward()
    found = {}
    for role in ("student", "critic"):
        for name, parameter in roles.parameters[role]:
            assert parameter.grad is not None
            found[f"{role}/{name}"] = parameter.grad.cpu().clone()
            parameter.grad = None
    return found


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert any(bool(gradient.any()) for gradient in one.values())
    for name in one:
        assert torch.equal(one[name], two[name]), name


def count_calls(network: Any) -> list[int]:
    """Forwards of each block from now on, recomputations included."""
    calls = [0] * len(network.blocks)
    for index, block in enumerate(network.blocks):

        def count(module: nn.Module, arguments: Any, index: int = index) -> None:
            calls[index] += 1

        block.register_forward_pre_hook(count)
    return calls


# --- recomputing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "recomputed"), [(1, [1, 1, 1, 1, 1]), (2, [1, 0, 1, 0, 1]), (3, [1, 0, 0, 1, 0]), (9, [1, 0, 0, 0, 0])]
)
def test_the_interval_says_which_blocks_run_again(interval: int, recomputed: list[int]) -> None:
    expected = chain(roles_on(base(), gradient_checkpointing=False))
    roles = roles_on(base(), recompute=Recompute(interval))
    calls = count_calls(roles.teacher.transformer)
    assert_same(chain(roles), expected)
    assert calls == [3 + 2 * again for again in recomputed]  # student, teacher, critic; student and critic once more


def test_full_networks_have_the_interval_too() -> None:
    network = tiny_wan(layers=LAYERS)
    roles = build_roles(
        base(), adapters={}, full={"student": network}, gradient_checkpointing=True, recompute=Recompute(2)
    )
    calls = count_calls(network)
    roles.student.velocity(latents(), SIGMA, prompts()).square().mean().backward()
    assert calls == [2, 1, 2, 1, 2]


@pytest.mark.parametrize("interval", [1, 2])
def test_offloaded_inputs_are_the_tokens_of_recomputed_blocks_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, interval: int
) -> None:
    expected = chain(roles_on(base(), gradient_checkpointing=False))
    moved: list[tuple[int, ...]] = []
    fetched: list[tuple[int, ...]] = []

    class Watched(torch.autograd.graph.saved_tensors_hooks):
        """As save_on_cpu, which this machine's tensors never leave."""

        def __init__(self, pin_memory: bool) -> None:
            assert not pin_memory  # nothing to pin for where there is no GPU

            def pack(tensor: Tensor) -> Tensor:
                moved.append(tuple(tensor.shape))
                return tensor.clone()

            def unpack(tensor: Tensor) -> Tensor:
                fetched.append(tuple(tensor.shape))
                return tensor

            super().__init__(pack, unpack)

    monkeypatch.setattr(runner_module, "save_on_cpu", Watched)
    roles = roles_on(base(), recompute=Recompute(interval, offloaded=True))
    assert_same(chain(roles), expected)
    tokens = [shape for shape in moved if len(shape) == 3]
    blocks = len(range(0, LAYERS, interval))
    width = roles.teacher.width
    assert tokens == [(2, 12, width)] * blocks * 2  # the student's pass and the critic's
    assert all(0 in shape for shape in moved if len(shape) != 3)  # checkpoint's own empty mark
    assert len([shape for shape in fetched if len(shape) == 3]) == blocks * 2


def test_offloading_through_torch_itself_changes_no_bit() -> None:
    expected = chain(roles_on(base(), gradient_checkpointing=False))
    assert_same(chain(roles_on(base(), recompute=Recompute(offloaded=True))), expected)


# --- swapped blocks ---------------------------------------------------------------------------------------------------


def test_swapped_blocks_are_spread_evenly() -> None:
    assert swapped_indices(40, 4) == [5, 15, 25, 35]
    assert swapped_indices(5, 5) == [0, 1, 2, 3, 4] and swapped_indices(5, 1) == [2]
    for count in range(1, 31):
        assert len(set(swapped_indices(30, count))) == count


class Watch:
    """Where the first swapped weight of each swapped block is while the block works, and in between."""

    def __init__(self, network: Any, swap: BlockSwap) -> None:
        self.network, self.swap, self.away, self.most = network, swap, 0, 0
        for number, index in enumerate(swap.indices):
            network.blocks[index].attn1.register_forward_pre_hook(self.look(number))

    def look(self, number: int) -> Any:
        def inside(module: nn.Module, arguments: Any) -> None:
            for place, host in self.swap.blocks[number].weights:
                here = place.table[place.name]
                assert here is not host and not isinstance(here, nn.Parameter)
            others = [block for at, block in enumerate(self.swap.blocks) if at != number]
            assert all(place.table[place.name] is host for block in others for place, host in block.weights)
            ready = 0 if self.swap._ready is None else 1
            self.most = max(self.most, len(self.swap._turn) + ready)
            self.away += 1

        return inside

    def all_home(self) -> bool:
        return all(place.table[place.name] is host for block in self.swap.blocks for place, host in block.weights)


@pytest.mark.parametrize("adapter", [LORA, LOKR], ids=["lora", "lokr"])
@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
def test_swapped_blocks_are_on_the_device_for_their_turn_alone(precision: str, adapter: Any) -> None:
    expected = chain(roles_on(base(precision), adapter))
    network = base(precision)
    swap = BlockSwap(network, 3, CPU)
    before = [tensor.detach().clone() for block in swap.blocks for _, tensor in block.weights]
    roles = roles_on(network, adapter)
    watch = Watch(network, swap)
    assert_same(chain(roles), expected)
    assert watch.away == 3 * 3 + 2 * 3  # recomputations too
    assert watch.all_home() and watch.most <= 2
    assert swap.copied <= watch.away + 1  # each turn is one copy; a guess at the end of a pass may be wrong
    after = [tensor.detach() for block in swap.blocks for _, tensor in block.weights]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


def test_a_copy_is_under_way_before_the_turn_of_its_block() -> None:
    network: Any = base()
    swap = BlockSwap(network, 3, CPU)
    roles = roles_on(network)
    ready: list[tuple[int, int | None]] = []
    for number, index in enumerate(swap.indices):
        network.blocks[index].attn1.register_forward_pre_hook(
            lambda module, arguments, number=number: ready.append((number, swap._ready and swap._ready[0]))
        )
    roles.student.velocity(latents(), SIGMA, prompts()).sum().backward()
    assert ready == [(0, 1), (1, 2), (2, None), (2, 1), (1, 0), (0, 1)]  # the last one stays from forward to backward


@pytest.mark.parametrize("checkpointing", [True, False])
def test_without_recomputing_swapped_weights_are_still_right(checkpointing: bool) -> None:
    expected = chain(roles_on(base(), gradient_checkpointing=checkpointing))
    network = base()
    BlockSwap(network, 4, CPU)
    assert_same(chain(roles_on(network, gradient_checkpointing=checkpointing)), expected)


def test_swapped_blocks_are_recomputed_whatever_the_interval() -> None:
    network = base()
    swap = BlockSwap(network, 2, CPU)
    roles = roles_on(network, recompute=Recompute(9))
    calls = count_calls(network)
    chain(roles)
    assert swap.indices == [1, 3] and calls == [5, 5, 3, 5, 3]


def test_a_teacher_alone_is_swapped_under_no_grad_and_its_state_dict_is_whole() -> None:
    network, twin = base(), base()
    swap = BlockSwap(network, 3, CPU)
    roles = build_roles(network, adapters={}, full={"student": tiny_wan(layers=LAYERS)})
    plain = build_roles(twin, adapters={}, full={"student": tiny_wan(layers=LAYERS)})
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(
                roles.teacher.velocity(latents(), SIGMA, prompts()), plain.teacher.velocity(latents(), SIGMA, prompts())
            )
    assert swap.copied == 7  # three each pass, and the first of a third
    assert network.state_dict().keys() == twin.state_dict().keys()
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in twin.state_dict().items())


def test_an_error_in_a_block_leaves_the_weights_at_home() -> None:
    network: Any = base()
    swap = BlockSwap(network, 3, CPU)
    watch = Watch(network, swap)

    def fail(module: nn.Module, arguments: Any) -> None:
        raise RuntimeError("out of memory")

    handle = network.blocks[2].ffn.register_forward_pre_hook(fail)
    roles = roles_on(network)
    with pytest.raises(RuntimeError, match="out of memory"), torch.no_grad():
        roles.teacher.velocity(latents(), SIGMA, prompts())
    assert watch.all_home()
    handle.remove()
    assert_same(chain(roles), chain(roles_on(base())))


def test_the_self_test_holds_on_swapped_blocks() -> None:
    network = base("int8-quanto")
    BlockSwap(network, 3, CPU)
    roles = build_roles(network, adapters={"student": LORA, "critic": LORA}, gradient_checkpointing=True)
    assert "gradients reach exactly the moving role" in self_test(roles, latents(), prompts(), fresh=True)[-1]


def test_weights_that_cannot_be_taken_apart_are_refused() -> None:
    class Odd(torch.Tensor):
        pass

    network: Any = base()
    weight = network.blocks[2].attn1.to_q.weight
    network.blocks[2].attn1.to_q._parameters["weight"] = weight.detach().as_subclass(Odd)
    with pytest.raises(UserError, match="weights of the kind Odd"):
        BlockSwap(network, 1, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
@pytest.mark.parametrize("offloaded", [False, True])
def test_on_a_gpu_swapping_and_offloading_change_no_bit(precision: str, offloaded: bool) -> None:
    device = torch.device("cuda")
    expected = chain(roles_on(base(precision).to(device)), device)
    network = base(precision)
    swap = BlockSwap(network, 4, device)
    roles = roles_on(network, recompute=Recompute(offloaded=offloaded))
    for _ in range(3):
        assert_same(chain(roles, device), expected)
    hosts = [host for block in swap.blocks for _, host in block.weights]
    assert all(host.device.type == "cpu" for host in hosts)
    assert all(parameter.is_cuda for _, parameter in roles.parameters["student"])


# --- group offload ----------------------------------------------------------------------------------------------------


def test_group_offload_brings_each_layer_to_the_device_and_takes_it_away() -> None:
    network, twin = base(), base()
    offload_in_groups(network, CPU)
    with torch.no_grad():
        arguments = (latents(), 1000 * SIGMA, prompts().rows_BLD)
        assert torch.equal(network(*arguments, return_dict=False)[0], twin(*arguments, return_dict=False)[0])
    with pytest.raises(AssertionError, match="what trains"):
        offload_in_groups(tiny_wan(), CPU)


@pytest.mark.gpu
def test_on_a_gpu_group_offload_keeps_the_weights_on_the_host() -> None:
    device = torch.device("cuda")
    network, twin = base(), base().to(device)
    offload_in_groups(network, device)
    arguments = [part.to(device) for part in (latents(), 1000 * SIGMA, prompts().rows_BLD)]
    with torch.no_grad():
        assert torch.equal(network(*arguments, return_dict=False)[0], twin(*arguments, return_dict=False)[0])
    assert not any(parameter.is_cuda for parameter in network.parameters())


# --- attention kernels ------------------------------------------------------------------------------------------------


@pytest.fixture
def sage(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """A kernel under Sage's name: PyTorch's own, a trifle off, which notes whether a gradient would have to flow."""
    asked: list[bool] = []
    registry = _AttentionBackendRegistry

    def kernel(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
        asked.append(torch.is_grad_enabled() and query.requires_grad)
        attended = nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
        return attended.transpose(1, 2) * 1.01

    name = AttentionBackendName.SAGE
    monkeypatch.setitem(registry._backends, name, kernel)
    monkeypatch.setitem(registry._constraints, name, [])
    monkeypatch.setitem(registry._supported_arg_names, name, {"query", "key", "value"})
    monkeypatch.setattr("diffusers.models.attention_dispatch._CAN_USE_SAGE_ATTN", True)
    before = registry._active_backend
    yield asked
    assert registry._active_backend == before


def test_sage_serves_training_passes_without_gradients_and_no_others(sage: list[bool]) -> None:
    network = base()
    assert choose_attention(network, "sageattention", CPU) is None
    roles, plain = roles_on(network), roles_on(base())
    sage.clear()

    def passes(roles: Roles) -> Tensor:
        return roles.teacher.velocity(latents(), SIGMA, prompts())

    with torch.no_grad():
        assert not torch.equal(passes(roles), passes(plain))
    assert sage == [False] * 2 * LAYERS  # self- and cross-attention
    sage.clear()
    # Gradients, and their recomputation, see PyTorch's own; a feature pass without a graph sees Sage again.
    assert_same(gradients(roles), gradients(plain))
    assert not sage
    with torch.no_grad():
        roles.teacher.features(latents(), SIGMA, prompts(), [1])
    assert sage == [False] * 2 * 2
    sage.clear()
    with torch.no_grad(), roles.evaluating(), plain.evaluating():
        assert torch.equal(passes(roles), passes(plain))
    assert not sage


def gradients(roles: Roles) -> dict[str, Tensor]:
    roles.student.velocity(latents(), SIGMA, prompts()).square().mean().backward()
    return {
        name: parameter.grad.clone() for name, parameter in roles.parameters["student"] if parameter.grad is not None
    }


def test_kernels_that_cannot_run_here_are_named_and_leave_nothing_behind() -> None:
    network: Any = base()
    before = _AttentionBackendRegistry._active_backend
    for mechanism in ("flash-attn-3", "cudnn", "flex", "sageattention-int8-fp8-cuda"):
        notice = choose_attention(network, mechanism, CPU)
        assert notice is not None and notice.startswith(f"attention_mechanism {mechanism} cannot run here (")
    assert choose_attention(network, "native", CPU) is None
    assert _AttentionBackendRegistry._active_backend == before
    assert network.blocks[0].attn1.processor._attention_backend is None
    assert not hasattr(network, "_kernel_without_gradients")


def test_a_kernel_with_a_backward_pass_is_set_on_this_transformer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from simpletuner_dmd.wan import attention

    monkeypatch.setitem(attention.KERNELS, "cudnn", "_native_math")  # one that runs here
    network: Any = base()
    before = _AttentionBackendRegistry._active_backend
    assert choose_attention(network, "cudnn", CPU) is None
    assert network.blocks[0].attn1.processor._attention_backend == "_native_math"
    assert _AttentionBackendRegistry._active_backend == before
    chain(roles_on(network))


# --- compiling --------------------------------------------------------------------------------------------------------


def routed_chain(roles: Roles) -> dict[str, Tensor]:
    """A pass under TREAD, then the chain: every state that a block can be in."""
    roles.student.routes = (Route(0.5, 1, 3),)
    routing = Routing(RandomStream(0, 0, (0, 1)), "student")
    roles.student.velocity(latents(), SIGMA, prompts(), routed=routing).square().mean().backward()
    routed = {
        f"routed/{name}": parameter.grad.clone()
        for name, parameter in roles.parameters["student"]
        if parameter.grad is not None
    }
    for _, parameter in roles.parameters["student"]:
        parameter.grad = None
    return routed | chain(roles)


def compiled_against_eager(adapter: Any, backend: str) -> int:
    expected = routed_chain(roles_on(base(), adapter))
    torch.compiler.reset()
    network = base()
    roles = roles_on(network, adapter)
    compile_blocks(network, backend)
    found = routed_chain(roles)
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) < 1e-5 * largest, name
    counters = torch._dynamo.utils.counters
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    "adapter", [pytest.param(LORA, id="lora"), pytest.param(LOKR, id="lokr", marks=pytest.mark.slow)]
)
def test_compiled_blocks_give_the_same_gradients(adapter: Any) -> None:
    """Through dynamo's tracing and guards; the code generator is the slow test's."""
    torch._dynamo.utils.counters.clear()
    assert compiled_against_eager(adapter, "aot_eager") >= 4  # student, critic, teacher without gradients, TREAD
    torch.compiler.reset()


@pytest.mark.slow
def test_compiled_blocks_through_inductor() -> None:
    if reason := why_not_compiled(CPU):
        pytest.skip(f"nothing can be compiled here: {reason}")
    compiled_against_eager(LORA, "inductor")
    torch.compiler.reset()


def test_where_nothing_can_be_compiled_the_reason_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any) -> Any:
        raise RuntimeError("no working compiler\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    assert why_not_compiled(CPU) == "RuntimeError: no working compiler"
