"""Adapters that share one network: gradients under role switches, and a switch that is always put back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simpletuner_dmd.flow import add_noise, x0_from_velocity
from simpletuner_dmd.wan.adapters import AdapterSpec, AdapterSwitch, adapter_of
from simpletuner_dmd.wan.roles import Roles, build_roles

from .tiny import LORA, latents, prompts, tiny_wan, wake


def two_adapters(gradient_checkpointing: bool) -> Roles:
    roles = build_roles(
        tiny_wan(), adapters={"student": LORA, "critic": LORA}, gradient_checkpointing=gradient_checkpointing
    )
    wake(roles)
    return roles


def chain(roles: Roles, during_backward: str | None) -> tuple[float, dict[str, Tensor]]:
    """Student -> x0 -> critic, teacher beside them -> one loss; backward while `during_backward` is selected."""
    assert roles.critic is not None
    switch = roles.student.switch
    assert switch is not None
    x_t, text = latents(), prompts()
    sigma_B, score_sigma_B = torch.tensor([0.9, 0.6]), torch.tensor([0.3, 0.8])
    x0 = x0_from_velocity(x_t, roles.student.velocity(x_t, sigma_B, text), sigma_B)
    noised = add_noise(x0, latents(seed=7), score_sigma_B)
    critic = roles.critic.velocity(noised, score_sigma_B, text)
    with switch.use("critic", 0.5):  # a second scale of the same adapter in one graph
        half = roles.critic.transformer(noised, 1000 * score_sigma_B, text.rows_BLD, return_dict=False)[0]
    with torch.no_grad():
        teacher = roles.teacher.velocity(noised, score_sigma_B, text)
    loss = (critic - teacher).pow(2).mean() + (critic - half).pow(2).mean()
    with switch.use(during_backward):
        loss.backward()
    gradients = {
        f"{role}: {name}": parameter.grad
        for role, parameters in roles.parameters.items()
        for name, parameter in parameters
        if parameter.grad is not None
    }
    assert len(gradients) == sum(len(parameters) for parameters in roles.parameters.values())
    return float(loss.detach()), gradients


def greatest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest error of any tensor, relative to its own size."""
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).norm() / right[name].norm()) for name in left)


@pytest.mark.parametrize("during_backward", ["student", "critic", None])
def test_gradients_under_checkpointing_and_role_switches_are_exact(during_backward: str | None) -> None:
    loss, gradients = chain(two_adapters(gradient_checkpointing=True), during_backward)
    expected_loss, expected = chain(two_adapters(gradient_checkpointing=False), None)
    assert loss == expected_loss
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert all(bool(gradient.any()) for gradient in expected.values())


def test_plain_checkpointing_is_wrong_here_without_a_word() -> None:
    """What the runner is for, and proof that the test above can see it."""
    roles = two_adapters(gradient_checkpointing=False)

    def plain(block: Callable[..., Tensor], *arguments: Any) -> Tensor:
        return checkpoint(block, *arguments, use_reentrant=False)

    network: Any = roles.student.transformer
    network.enable_gradient_checkpointing(gradient_checkpointing_func=plain)
    loss, gradients = chain(roles, "critic")
    expected_loss, expected = chain(two_adapters(gradient_checkpointing=False), None)
    assert loss == expected_loss
    assert greatest_difference(gradients, expected) > 0.1


def test_checkpointing_does_recompute() -> None:
    """Otherwise the exactness above would be that of two equal runs."""
    runs = []
    for on in (False, True):
        roles, count = two_adapters(gradient_checkpointing=on), [0]

        def counted(module: nn.Module, arguments: Any, count: list[int] = count) -> None:
            count[0] += 1

        network: Any = roles.student.transformer
        network.blocks[0].register_forward_pre_hook(counted)
        chain(roles, None)
        runs.append(count[0])
    assert runs == [4, 7]  # student, critic, critic at half scale are recomputed; the teacher has no graph


def test_the_selection_is_put_back_even_after_an_error() -> None:
    switch = two_adapters(gradient_checkpointing=False).student.switch
    assert switch is not None
    with pytest.raises(RuntimeError, match="inside"), switch.use("student"), switch.use("critic", 0.25):
        assert switch.state == ("critic", 0.25)
        raise RuntimeError("inside")
    assert switch.state == (None, 1.0)
    assert all(layer.disable_adapters for layer in switch.layers)
    with switch.use("student"):
        with pytest.raises(RuntimeError, match="inside"), switch.use(None):
            raise RuntimeError("inside")
        assert switch.state == ("student", 1.0)
        assert all(layer.active_adapters == ["student"] and not layer.disable_adapters for layer in switch.layers)


def test_a_forward_that_fails_leaves_the_roles_as_they_were() -> None:
    roles = two_adapters(gradient_checkpointing=True)
    x_t, text, sigma_B = latents(), prompts(), torch.full((2,), 0.5)
    before = roles.teacher.velocity(x_t, sigma_B, text)
    with pytest.raises(RuntimeError):
        roles.student.velocity(x_t[:, :2], sigma_B, text)  # too few channels
    assert torch.equal(roles.teacher.velocity(x_t, sigma_B, text), before)


def test_scale_is_relative_to_the_adapters_own_alpha_over_rank() -> None:
    """An adapter at scale c is the base with c * alpha / rank * B A added."""
    roles = two_adapters(gradient_checkpointing=False)
    switch = roles.student.switch
    assert switch is not None
    tensors, x_t, text = roles.tensors("student"), latents(), prompts()
    for scale in (0.5, 1.0):
        merged: Any = tiny_wan()
        with torch.no_grad():
            for name in [name for name in tensors if "lora_A" in name]:
                module = merged.get_submodule(name.removesuffix(".lora_A.weight"))
                module.weight += scale * 2.0 * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
            expected = merged(x_t, torch.full((2,), 500.0), text.rows_BLD, return_dict=False)[0]
            with switch.use("student", scale):
                actual = roles.student.transformer(x_t, torch.full((2,), 500.0), text.rows_BLD, return_dict=False)[0]
        assert torch.allclose(actual, expected, atol=1e-5)
    assert float((roles.teacher.velocity(x_t, torch.full((2,), 0.5), text) - expected).abs().max()) > 1e-3


def test_initialisation_depends_on_the_seed_alone() -> None:
    def factors(seed: int, drawn_before: int) -> dict[str, dict[str, Tensor]]:
        torch.manual_seed(drawn_before)
        roles = build_roles(tiny_wan(), adapters={"student": LORA, "critic": LORA}, seed=seed)
        return {role: roles.tensors(role) for role in ("student", "critic")}

    first, again, other = factors(1, 0), factors(1, 99), factors(2, 0)
    name = "blocks.0.attn1.to_q.lora_A.weight"
    for role in first:
        assert all(torch.equal(first[role][key], again[role][key]) for key in first[role])
        assert not torch.equal(first[role][name], other[role][name])
        assert all(bool(first[role][key].any()) == ("lora_A" in key) for key in first[role])
    assert not torch.equal(first["student"][name], first["critic"][name])


def test_building_adapters_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    base = tiny_wan()
    torch.manual_seed(3)
    AdapterSwitch(base, {"student": LORA}, seed=0)
    assert torch.equal(torch.rand(1), expected)


def test_names_say_whose_a_parameter_is() -> None:
    adapters = ("student", "critic")
    assert adapter_of("blocks.0.attn1.to_q.lora_A.critic.weight", adapters) == "critic"
    assert adapter_of("blocks.0.attn1.to_q.lora_B.student.weight", adapters) == "student"
    assert adapter_of("blocks.0.attn1.to_q.base_layer.weight", adapters) is None
    assert adapter_of("student.weight", adapters) is None


def test_targets_are_attention_and_feed_forward_of_the_blocks_unless_told() -> None:
    roles = two_adapters(gradient_checkpointing=False)
    trained = {name.rsplit(".lora_", 1)[0] for name, _ in roles.parameters["student"]}
    assert len(trained) == 2 * 10
    assert all(name.startswith("blocks.") for name in trained)
    told = AdapterSpec(rank=2, alpha=2.0, targets=("to_q",))
    roles = build_roles(tiny_wan(), adapters={"student": told})
    assert {name.rsplit(".lora_", 1)[0] for name, _ in roles.parameters["student"]} == {
        f"blocks.{block}.{attention}.to_q" for block in (0, 1) for attention in ("attn1", "attn2")
    }
    assert set(roles.parameters) == {"student"}


@pytest.mark.parametrize("gradients", [True, False])
def test_without_adapters_at_work_the_network_is_the_stock_one(gradients: bool) -> None:
    roles, stock = two_adapters(gradient_checkpointing=True), tiny_wan()
    x_t, text, sigma_B = latents(), prompts(), torch.tensor([0.25, 1.0])
    with nullcontext() if gradients else torch.no_grad():
        expected = stock(x_t, 1000 * sigma_B, text.rows_BLD, return_dict=False)[0]
        assert torch.equal(roles.teacher.velocity(x_t, sigma_B, text), expected)
