"""Teacher, student and critic on one base: what they share, what moves, and what the self-test sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.demo.path import model_path
from simpletuner_dmd.distill.dmd import DMD, DMDSettings
from simpletuner_dmd.distill.rollout import RolloutSettings
from simpletuner_dmd.flow import Schedule
from simpletuner_dmd.randomness import RandomStream
from simpletuner_dmd.wan.adapters import AdapterSpec
from simpletuner_dmd.wan.loading import Storage, load_transformer
from simpletuner_dmd.wan.quantisation import quantise
from simpletuner_dmd.wan.roles import Roles, SelfTestError, build_roles, self_test
from simpletuner_dmd.wan.sources import ModelSource

from .tiny import LORA, batch_of, latents, prompts, snapshot, tiny_wan, wake

SETTINGS = DMDSettings(
    RolloutSettings(Schedule(ladder=(1.0, 0.75, 0.5))), generator_update_interval=2, real_score_guidance_scale=3.0
)


BOTH = {"student": LORA, "critic": LORA}


def lora_roles(base: nn.Module | None = None, **changes: Any) -> Roles:
    return build_roles(tiny_wan() if base is None else base, adapters=BOTH, **changes)


def full_roles() -> Roles:
    return build_roles(tiny_wan(), adapters={}, full={"student": tiny_wan(), "critic": tiny_wan()})


def quantised_wan(precision: str) -> nn.Module:
    network = tiny_wan(dtype=torch.bfloat16)
    assert quantise(network, precision) == 2 * 10
    return network


def checked(roles: Roles, fresh: bool = True, **changes: Any) -> list[str]:
    return self_test(roles, latents(), prompts(), fresh=fresh, **changes)


def train(roles: Roles, steps: int, after_turn: Callable[[str], None] = lambda role: None) -> None:
    """The production turns with one AdamW per role."""
    assert roles.critic is not None
    method = DMD(roles.teacher, roles.student, roles.critic, SETTINGS, torch.device("cpu"))
    optimizers = {
        role: torch.optim.AdamW([parameter for _, parameter in parameters], lr=1e-2)
        for role, parameters in roles.parameters.items()
    }
    batch = batch_of()
    for step in range(steps):
        for turn in method.turns(step):
            for loss in turn.losses(batch, RandomStream(0, step, batch.positions)):
                loss.value.backward()
            optimizers[turn.role].step()
            optimizers[turn.role].zero_grad()
            after_turn(turn.role)
        method.end_step()


# --- one base, three roles --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient_checkpointing", [True, False])
def test_each_turn_moves_its_own_adapter_and_nothing_else(gradient_checkpointing: bool) -> None:
    roles = lora_roles(gradient_checkpointing=gradient_checkpointing)
    wake(roles)
    base = roles.teacher.transformer
    x_t, sigma_B, text = latents(), torch.tensor([0.25, 0.9]), prompts()
    before, moved = snapshot(base), {"student": 0, "critic": 0}
    with torch.no_grad():
        taught = roles.teacher.velocity(x_t, sigma_B, text)

    def look(role: str) -> None:
        nonlocal before
        after = snapshot(base)
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert changed == {name for name in after if f".{role}." in name}
        assert all(parameter.grad is None for parameter in base.parameters())
        with torch.no_grad():
            assert torch.equal(roles.teacher.velocity(x_t, sigma_B, text), taught)
        before, moved[role] = after, moved[role] + 1

    train(roles, 4, look)
    assert moved == {"student": 2, "critic": 4}


def test_full_networks_move_alone_too() -> None:
    roles = full_roles()
    networks = {"teacher": roles.teacher.transformer, "student": roles.student.transformer}
    assert roles.critic is not None
    networks["critic"] = roles.critic.transformer
    before = {name: snapshot(network) for name, network in networks.items()}

    def look(role: str) -> None:
        for name, network in networks.items():
            after = snapshot(network)
            same = all(torch.equal(after[key], before[name][key]) for key in after)
            assert same == (name != role)
            before[name] = after

    train(roles, 2, look)
    assert len(roles.transformers()) == 3
    assert len(lora_roles().transformers()) == 1


def test_checkpointing_changes_no_bit_of_training() -> None:
    trained = []
    for gradient_checkpointing in (True, False):
        roles = lora_roles(gradient_checkpointing=gradient_checkpointing)
        train(roles, 3)
        trained.append({role: roles.tensors(role) for role in roles.parameters})
    for role in trained[0]:
        assert all(torch.equal(trained[0][role][name], trained[1][role][name]) for name in trained[0][role])


# --- what reaches the network -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timesteps_arrive_as_unrounded_fp32(dtype: torch.dtype) -> None:
    """981 would be 980 in bf16, and an integer would be another noise level than the latents'."""
    roles = lora_roles(tiny_wan(dtype=dtype))
    assert roles.critic is not None
    seen: list[Tensor] = []
    embedder = roles.teacher.transformer.get_submodule("condition_embedder")
    embedder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    sigma_B = torch.tensor([0.98137, 1.0])
    for role in (roles.teacher, roles.student, roles.critic):
        velocity = role.velocity(latents(), sigma_B, prompts())
        assert velocity.dtype == torch.float32
    assert len(seen) == 3
    for timestep in seen:
        assert timestep.dtype == torch.float32
        assert timestep.tolist() == [pytest.approx(981.37, abs=1e-3), 1000.0]


def test_the_first_rung_of_a_rollout_is_timestep_1000() -> None:
    roles = lora_roles()
    assert roles.critic is not None
    seen: list[float] = []
    embedder = roles.teacher.transformer.get_submodule("condition_embedder")
    embedder.register_forward_pre_hook(lambda module, arguments: seen.append(float(arguments[0][0])))
    method = DMD(roles.teacher, roles.student, roles.critic, SETTINGS, torch.device("cpu"))
    batch = batch_of()
    list(method.critic_losses(batch, RandomStream(0, 0, batch.positions)))
    assert seen[0] == 1000.0


def test_one_negative_prompt_serves_a_batch() -> None:
    roles = lora_roles()
    one, sigma_B = prompts(1), torch.full((2,), 0.5)
    assert torch.equal(
        roles.teacher.velocity(latents(), sigma_B, one), roles.teacher.velocity(latents(), sigma_B, one.expand(2))
    )


# --- precision --------------------------------------------------------------------------------------------------------


# quanto compiles a kernel the first time a machine unpacks int4, for a minute.
@pytest.mark.parametrize(
    "precision", ["int8-quanto", "fp8-quanto", pytest.param("int4-quanto", marks=pytest.mark.slow)]
)
def test_on_a_quantised_base_the_roles_start_equal_bit_for_bit(precision: str) -> None:
    roles = lora_roles(quantised_wan(precision), gradient_checkpointing=True)
    x_t, sigma_B, text = latents(), torch.full((2,), 0.7), prompts()
    assert roles.critic is not None
    with torch.no_grad():
        expected = roles.teacher.velocity(x_t, sigma_B, text)
        assert torch.equal(roles.student.velocity(x_t, sigma_B, text), expected)
        assert torch.equal(roles.critic.velocity(x_t, sigma_B, text), expected)
        unquantised = lora_roles(tiny_wan(dtype=torch.bfloat16)).teacher.velocity(x_t, sigma_B, text)
    assert float((expected - unquantised).norm() / unquantised.norm()) > 1e-3, "nothing was quantised"
    assert len(checked(roles)) == 3
    train(roles, 2)
    with torch.no_grad():
        assert torch.equal(roles.teacher.velocity(x_t, sigma_B, text), expected)
        assert not torch.equal(roles.student.velocity(x_t, sigma_B, text), expected)


def test_quantisation_leaves_the_sensitive_parts_alone() -> None:
    network = quantised_wan("int8-quanto")
    kinds = {name: type(module).__name__ for name, module in network.named_modules()}
    assert kinds["blocks.0.attn1.to_q"] == "QLinear"
    assert kinds["proj_out"] == "Linear"
    assert all(kind != "QLinear" for name, kind in kinds.items() if not name.startswith("blocks."))
    assert quantise(tiny_wan(), "no_change") == 0


def test_int4_without_a_compiler_is_a_sentence_and_not_a_crash_in_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from optimum.quanto.library.extensions.extension import Extension

    def missing(self: Extension) -> None:
        raise RuntimeError("Ninja is required to load C++ extensions (pip install ninja to get it)")

    monkeypatch.setattr(Extension, "lib", property(missing))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"base_model_precision: int4-quanto.*Ninja(.|\n)*int8-quanto"):
        load_transformer(ModelSource(*[str(model_path())] * 4), torch.bfloat16, Storage("int4-quanto"))


def test_on_a_bf16_base_what_trains_is_fp32_and_stays_so() -> None:
    roles = lora_roles(tiny_wan(dtype=torch.bfloat16))
    assert len(checked(roles)) == 3
    before = {role: {name: t.clone() for name, t in roles.tensors(role).items()} for role in roles.parameters}
    train(roles, 3)
    for role, parameters in roles.parameters.items():
        assert {parameter.dtype for _, parameter in parameters} == {torch.float32}
        assert all(not torch.equal(before[role][name], tensor) for name, tensor in roles.tensors(role).items())
    assert roles.teacher.weight.dtype == torch.bfloat16


def test_full_fp32_masters_compute_in_the_autocast_dtype() -> None:
    roles = build_roles(
        tiny_wan(dtype=torch.bfloat16),
        adapters={"critic": LORA},
        full={"student": tiny_wan()},
        autocast=torch.bfloat16,
    )
    seen: list[torch.dtype] = []
    linear = roles.student.transformer.get_submodule("blocks.0.attn1.to_q")
    linear.register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
    lines = checked(roles)
    assert set(seen) == {torch.bfloat16}
    assert "the student starts" in lines[0], "a difference of rounding is said, not hidden"
    assert "the critic equals the teacher bit for bit" in lines[1]
    assert {parameter.dtype for _, parameter in roles.parameters["student"]} == {torch.float32}


# --- the self-test ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lora_roles, full_roles], ids=["lora", "full"])
def test_fresh_roles_pass_and_are_left_as_they_were(make: Callable[[], Roles]) -> None:
    roles = make()
    before = [snapshot(network) for network in roles.transformers()]
    lines = checked(roles)
    assert [line.split(": ", 1)[1] for line in lines] == [
        "the student equals the teacher bit for bit",
        "the critic equals the teacher bit for bit",
        "gradients reach exactly the moving role",
    ]
    for network, saved in zip(roles.transformers(), before, strict=True):
        assert all(torch.equal(tensor, saved[name]) for name, tensor in network.state_dict().items())
        assert all(parameter.grad is None for parameter in network.parameters())


def test_a_student_that_is_not_the_teacher_is_seen_at_the_start_but_not_on_resume() -> None:
    roles = lora_roles()
    wake(roles, std=1e-3)
    with pytest.raises(SelfTestError, match="student does not start as the teacher"):
        checked(roles)
    assert checked(roles, fresh=False) == ["self-test: gradients reach exactly the moving role"]


def test_a_full_student_beside_a_quantised_base_is_told_its_distance() -> None:
    roles = build_roles(quantised_wan("int8-quanto"), adapters={"critic": LORA}, full={"student": tiny_wan()})
    assert "relative) away from the teacher" in checked(roles, shared_numerics=False)[0]
    with pytest.raises(SelfTestError, match="student does not start"):
        checked(roles)


@pytest.mark.parametrize("role", ["student", "critic"])
@pytest.mark.parametrize("how_many", ["one", "all"])
def test_frozen_parameters_are_seen(role: str, how_many: str) -> None:
    roles = lora_roles()
    for _, parameter in roles.parameters[role][: 1 if how_many == "one" else None]:
        parameter.requires_grad_(False)
    with pytest.raises(SelfTestError, match=f"a {role} update misses"):
        checked(roles)


def test_a_base_that_trains_is_seen() -> None:
    roles = lora_roles()
    roles.teacher.transformer.get_parameter("proj_out.weight").requires_grad_(True)
    with pytest.raises(SelfTestError, match=r"a student update reaches proj_out\.weight"):
        checked(roles)


def test_a_role_that_moves_the_other_adapter_is_seen() -> None:
    roles = lora_roles()
    roles.student.adapter = "critic"
    with pytest.raises(SelfTestError, match="a student update"):
        checked(roles)


def test_an_adapter_without_effect_is_seen() -> None:
    roles = lora_roles()
    with torch.no_grad():
        for name, parameter in roles.parameters["critic"]:
            if name == "blocks.1.attn1.to_q.lora_A.weight":
                parameter.zero_()
    with pytest.raises(SelfTestError, match=r"blocks\.1\.attn1\.to_q\.lora_B.*would never move"):
        checked(roles)


# --- saving, modes, layouts -------------------------------------------------------------------------------------------


def test_tensors_go_out_and_come_back() -> None:
    roles, others = lora_roles(), lora_roles(seed=5)
    wake(roles)
    for role in roles.parameters:
        saved = {name: tensor.clone() for name, tensor in roles.tensors(role).items()}
        assert not any(role in name or tensor.requires_grad for name, tensor in saved.items())
        others.load_tensors(role, saved)
        assert all(torch.equal(tensor, saved[name]) for name, tensor in others.tensors(role).items())
    x_t, sigma_B, text = latents(), torch.full((2,), 0.5), prompts()
    assert torch.equal(others.student.velocity(x_t, sigma_B, text), roles.student.velocity(x_t, sigma_B, text))
    assert roles.critic is not None
    assert others.critic is not None
    assert torch.equal(others.critic.velocity(x_t, sigma_B, text), roles.critic.velocity(x_t, sigma_B, text))


def test_tensors_that_do_not_fit_are_refused_by_name() -> None:
    roles = lora_roles()
    tensors = roles.tensors("student")
    tensors["blocks.9.attn1.to_q.lora_A.weight"] = tensors.pop("blocks.0.attn1.to_q.lora_A.weight")
    with pytest.raises(ValueError, match=r"student.*missing.*blocks\.0\.attn1.*unknown.*blocks\.9\.attn1"):
        roles.load_tensors("student", tensors)


def test_evaluating_puts_the_mode_back_even_after_an_error() -> None:
    roles = full_roles()
    roles.teacher.transformer.eval()
    with pytest.raises(RuntimeError, match="inside"), roles.evaluating():
        assert not any(network.training for network in roles.transformers())
        raise RuntimeError("inside")
    assert [network.training for network in roles.transformers()] == [False, True, True]


def test_a_run_without_a_critic_has_none() -> None:
    roles = build_roles(tiny_wan(), adapters={"student": LORA})
    assert roles.critic is None
    assert set(roles.parameters) == {"student"}
    assert len(checked(roles)) == 2


def test_a_full_critic_may_watch_a_lora_student() -> None:
    roles = build_roles(tiny_wan(), adapters={"student": LORA}, full={"critic": tiny_wan()})
    assert len(checked(roles)) == 3
    assert len(roles.transformers()) == 2
    train(roles, 2)


def test_ranks_and_targets_may_differ_between_roles() -> None:
    roles = build_roles(
        tiny_wan(), adapters={"student": LORA, "critic": AdapterSpec(rank=2, alpha=2.0, targets=("to_q", "to_v"))}
    )
    assert len(checked(roles)) == 3
    assert len(roles.parameters["critic"]) < len(roles.parameters["student"])
    train(roles, 2)
