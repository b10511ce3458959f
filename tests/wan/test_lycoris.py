"""LyCORIS networks of two roles on one network: lycoris' own formulas, the switch, gradients, files and starts."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import lycoris
import pytest
import torch
from lycoris import LycorisNetwork
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simpletuner_dmd.cli.starting import TeacherMerge, start_student
from simpletuner_dmd.config import UserError
from simpletuner_dmd.config.lycoris import LycorisOptions
from simpletuner_dmd.flow import add_noise, x0_from_velocity
from simpletuner_dmd.publish import dialects
from simpletuner_dmd.publish.lycoris import folded, to_comfyui
from simpletuner_dmd.wan.adapters import CONDITIONING_TARGETS, AdapterSpec
from simpletuner_dmd.wan.lycoris import LycorisSpec, LycorisSwitch, with_layers
from simpletuner_dmd.wan.quantisation import quantise
from simpletuner_dmd.wan.roles import Roles, SelfTestError, build_roles, self_test

from .tiny import LORA, latents, prompts, tiny_wan, wake

SIGMA_B = torch.tensor([0.9, 0.4])
WHOLE_LOKR = {"algo": "lokr", "factor": 4, "full_matrix": True}
NETWORKS: dict[str, dict[str, Any]] = {
    "locon": {"algo": "locon", "linear_dim": 4, "linear_alpha": 2},
    "loha": {"algo": "loha", "linear_dim": 4, "linear_alpha": 2},
    "lokr": {"algo": "lokr", "linear_dim": 2, "linear_alpha": 1, "factor": 4},
    "lokr, both low": {"algo": "lokr", "linear_dim": 1, "linear_alpha": 0.5, "factor": 4, "decompose_both": True},
    "lokr, whole": WHOLE_LOKR,
    "full": {"algo": "full"},
    "diag-oft": {"algo": "diag-oft", "linear_dim": 4},
    "diag-oft, constrained": {"algo": "diag-oft", "linear_dim": 4, "constraint": 0.01},
    "boft": {"algo": "boft", "linear_dim": 8},
    "glora": {"algo": "glora", "linear_dim": 4, "linear_alpha": 2},
}  # fmt: skip
ON_QUANTISED = [name for name in NETWORKS if name.startswith(("lo",))]


def spec_of(name: str, **more: Any) -> LycorisSpec:
    return LycorisSpec(LycorisOptions.model_validate({**NETWORKS[name], **more}))


def two_networks(name: str, base: nn.Module | None = None, checkpointing: bool = False, std: float = 0.2) -> Roles:
    spec = spec_of(name)
    roles = build_roles(
        base or tiny_wan(), adapters={"student": spec, "critic": spec}, gradient_checkpointing=checkpointing
    )
    awake(roles, std)
    return roles


@torch.no_grad()
def awake(roles: Roles, std: float) -> None:
    """Every factor gets noise of its own: the roles differ from the teacher and from each other."""
    for number, role in enumerate(sorted(roles.parameters)):
        seeded = torch.Generator().manual_seed(100 + number)
        for _, parameter in roles.parameters[role]:
            parameter.add_(std * torch.randn(parameter.shape, generator=seeded))


def student_switch(roles: Roles) -> LycorisSwitch:
    switch = roles.student.switch
    assert isinstance(switch, LycorisSwitch)
    return switch


@torch.no_grad()
def velocity(network: Any, x_t: Tensor | None = None) -> Tensor:
    """Of a plain transformer."""
    x_t = latents() if x_t is None else x_t
    dtype = network.get_parameter("patch_embedding.weight").dtype
    text = prompts().rows_BLD.to(dtype)
    return network(x_t.to(dtype), 1000 * SIGMA_B, text, return_dict=False)[0].float()


@torch.no_grad()
def of_role(roles: Roles, role: str) -> Tensor:
    return getattr(roles, role).velocity(latents(), SIGMA_B, prompts())


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def file_of(roles: Roles, path: Path, multiplier: float = 1.0) -> Path:
    save_file(folded(roles.tensors("student"), student_switch(roles).constants("student"), multiplier), path)
    return path


def digest(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()


# --- the switch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_each_role_is_its_own_network_and_the_teacher_is_the_stock_one(name: str) -> None:
    expected = velocity(tiny_wan())
    roles = two_networks(name)
    assert torch.equal(of_role(roles, "teacher"), expected)
    student, critic = of_role(roles, "student"), of_role(roles, "critic")
    assert relative(student, expected) > 0.01
    assert relative(critic, student) > 0.01
    assert torch.equal(of_role(roles, "teacher"), expected), "the teacher changed after the others were used"
    stock = tiny_wan().state_dict()
    base = roles.teacher.transformer.state_dict()
    assert all(torch.equal(base[key], tensor) for key, tensor in stock.items())
    for module in roles.teacher.transformer.modules():
        assert "forward" not in vars(module), "a method of a layer was replaced"


@pytest.mark.parametrize("name", NETWORKS)
def test_fresh_networks_pass_the_self_test(name: str) -> None:
    spec = spec_of(name)
    roles = build_roles(tiny_wan(), adapters={"student": spec, "critic": spec}, gradient_checkpointing=True)
    lines = self_test(roles, latents(), prompts(), fresh=True)
    assert [line.split(": ", 1)[1] for line in lines] == [
        "the student equals the teacher bit for bit",
        "the critic equals the teacher bit for bit",
        "gradients reach exactly the moving role",
    ]


def test_a_network_that_does_not_start_as_the_teacher_is_seen_unless_it_is_meant() -> None:
    roles = two_networks("lokr")
    with pytest.raises(SelfTestError, match="student does not start as the teacher"):
        self_test(roles, latents(), prompts(), fresh=True)
    roles = build_roles(tiny_wan(), adapters={"student": spec_of("lokr"), "critic": spec_of("lokr")})
    with torch.no_grad():
        for _, parameter in roles.parameters["student"]:
            parameter.add_(0.1)
    lines = self_test(roles, latents(), prompts(), fresh=True, started_elsewhere={"student"})
    assert "the student starts" in lines[0] and "away from the teacher" in lines[0]
    assert lines[1].endswith("the critic equals the teacher bit for bit")


@pytest.mark.parametrize("scale", [0.25, 0.5])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_part_of_the_scale_is_that_part_of_the_change_where_it_is_said_so(name: str, scale: float) -> None:
    roles = two_networks(name)
    layer: Any = roles.teacher.transformer.get_submodule("blocks.0.attn1.to_q")
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        base = layer(x)
        with student_switch(roles).use("student"):
            whole = layer(x) - base
        with student_switch(roles).use("student", scale):
            part = layer(x) - base
    assert float(whole.abs().max()) > 0.001
    assert (relative(part, scale * whole) < 1e-4) == spec_of(name).options.linear_in_scale


# --- gradients --------------------------------------------------------------------------------------------------------


def chain(roles: Roles, during_backward: str | None) -> tuple[float, dict[str, Tensor]]:
    """Student -> x0 -> critic at two scales, teacher beside them -> one loss; backward under another selection."""
    switch, x_t, text = roles.student.switch, latents(), prompts()
    assert roles.critic is not None and switch is not None
    x0 = x0_from_velocity(x_t, roles.student.velocity(x_t, SIGMA_B, text), SIGMA_B)
    score_sigma_B = torch.tensor([0.3, 0.8])
    noised = add_noise(x0, latents(seed=7), score_sigma_B)
    critic = roles.critic.velocity(noised, score_sigma_B, text)
    with switch.use("critic", 0.5):
        half = roles.critic.transformer(noised, 1000 * score_sigma_B, text.rows_BLD, return_dict=False)[0]
    with torch.no_grad():
        teacher = roles.teacher.velocity(noised, score_sigma_B, text)
    loss = (critic - teacher).pow(2).mean() + (critic - half).pow(2).mean()
    with switch.use(during_backward):
        loss.backward()
    gradients = {f"{role}: {name}": p.grad for role in roles.parameters for name, p in roles.parameters[role]}
    assert all(gradient is not None for gradient in gradients.values())
    return float(loss.detach()), {name: gradient for name, gradient in gradients.items() if gradient is not None}


@pytest.mark.parametrize("during_backward", ["student", "critic", None])
@pytest.mark.parametrize("name", ["lokr", "locon", "full", "diag-oft"])
def test_gradients_under_checkpointing_and_role_switches_are_exact(name: str, during_backward: str | None) -> None:
    loss, gradients = chain(two_networks(name, checkpointing=True), during_backward)
    expected_loss, expected = chain(two_networks(name), None)
    assert loss == expected_loss
    assert all(torch.equal(gradients[key], expected[key]) for key in expected)
    assert all(bool(gradient.any()) for gradient in expected.values())


def test_gradients_of_dora_under_checkpointing_and_role_switches_are_exact() -> None:
    def two(checkpointing: bool) -> Roles:
        spec = AdapterSpec(rank=4, alpha=8.0, dora=True)
        roles = build_roles(
            tiny_wan(), adapters={"student": spec, "critic": spec}, gradient_checkpointing=checkpointing
        )
        assert len(self_test(roles, latents(), prompts(), fresh=True)) == 3
        awake(roles, 0.1)
        return roles

    loss, gradients = chain(two(True), "critic")
    expected_loss, expected = chain(two(False), None)
    assert loss == expected_loss
    assert all(torch.equal(gradients[key], expected[key]) for key in expected)
    assert sum("lora_magnitude_vector" in key for key in expected) == 2 * 20
    assert torch.equal(of_role(two(False), "teacher"), velocity(tiny_wan()))


@pytest.mark.parametrize("quantised", [False, True], ids=["fp32", "int8"])
@pytest.mark.parametrize("name", ["lokr", "locon"])
def test_a_turn_moves_its_role_and_nothing_else(name: str, quantised: bool) -> None:
    base = tiny_wan(dtype=torch.bfloat16) if quantised else tiny_wan()
    if quantised:
        quantise(base, "int8-quanto")
    roles = two_networks(name, base, checkpointing=True, std=0.02)
    teacher = of_role(roles, "teacher")
    for moving, resting in (("student", "critic"), ("critic", "student")):
        before = {role: digest(roles.tensors(role)) for role in roles.parameters}
        parameters = [parameter for _, parameter in roles.parameters[moving]]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        loss = getattr(roles, moving).velocity(latents(), SIGMA_B, prompts()).pow(2).mean()
        loss.backward(inputs=parameters)
        optimizer.step()
        assert digest(roles.tensors(resting)) == before[resting]
        assert digest(roles.tensors(moving)) != before[moving]
        assert torch.equal(of_role(roles, "teacher"), teacher)
        assert {parameter.dtype for parameter in parameters} == {torch.float32}


@pytest.mark.parametrize("name", ON_QUANTISED)
def test_on_a_quantised_base_the_change_is_the_one_on_the_plain_base(name: str) -> None:
    plain = two_networks(name)
    base = tiny_wan()
    quantise(base, "int8-quanto")
    quantised = two_networks(name, base)
    with torch.no_grad():
        layers: list[Any] = [
            roles.teacher.transformer.get_submodule("blocks.1.ffn.net.2") for roles in (plain, quantised)
        ]
        x = torch.randn(3, layers[0].in_features, generator=torch.Generator().manual_seed(0))
        changes = []
        for roles, layer in zip((plain, quantised), layers, strict=True):
            without = layer(x)
            with student_switch(roles).use("student"):
                changes.append(layer(x) - without)
    assert type(layers[1]).__name__ == "QLinear"
    assert torch.allclose(changes[0], changes[1], atol=1e-5)


# --- making a network -------------------------------------------------------------------------------------------------


def test_the_preset_chooses_layers_and_their_algorithms_and_leaves_lycoris_as_it_was() -> None:
    before = {name: getattr(LycorisNetwork, name) for name in ("TARGET_REPLACE_MODULE", "MODULE_ALGO_MAP")}
    preset = {"target_module": ["Attention"], "module_algo_map": {"FeedForward": {"algo": "locon", "linear_dim": 2}}}
    options = LycorisOptions.model_validate({"algo": "lokr", "factor": 4, "full_matrix": True, "apply_preset": preset})
    roles = build_roles(tiny_wan(), adapters={"student": LycorisSpec(options)})
    shapes = {name: tuple(parameter.shape) for name, parameter in roles.parameters["student"]}
    assert shapes["lycoris_blocks_0_attn1_to_q.lokr_w1"] == (4, 4)
    assert shapes["lycoris_blocks_1_ffn_net_2.lora_down.weight"] == (2, 64)
    assert len({name.partition(".")[0] for name in shapes}) == 2 * (8 + 2)
    assert {name: getattr(LycorisNetwork, name) for name in before} == before


def test_layers_that_are_not_there_are_a_sentence_with_the_classes_of_the_model() -> None:
    options = LycorisOptions.model_validate({"apply_preset": {"target_module": ["Transformer2DModel"]}})
    with pytest.raises(UserError, match=r"no layer.*Transformer2DModel(.|\n)*FeedForward.*WanAttention"):
        build_roles(tiny_wan(), adapters={"student": LycorisSpec(options)})


def test_boft_says_where_it_cannot_cut_a_layer() -> None:
    with pytest.raises(UserError, match=r"lycoris cannot make boft.*48(.|\n)*lokr"):
        spec = LycorisSpec(LycorisOptions(algo="boft", linear_dim=4))
        build_roles(tiny_wan(), adapters={"student": spec})


def test_a_lokr_may_start_as_noise_of_a_given_norm() -> None:
    spec = LycorisSpec(LycorisOptions.model_validate(WHOLE_LOKR), init_norm=0.01)
    roles = build_roles(tiny_wan(), adapters={"student": spec})
    layer: Any = roles.teacher.transformer.get_submodule("blocks.0.attn1.to_q")
    own = dict(roles.parameters["student"])
    w1, w2 = (own[f"lycoris_blocks_0_attn1_to_q.lokr_w{number}"] for number in (1, 2))
    assert float(torch.kron(w1, w2).detach().norm() / layer.weight.norm()) == pytest.approx(0.01, rel=1e-4)
    with pytest.raises(UserError, match=r"init_lokr_norm.*whole factors"):
        build_roles(tiny_wan(), adapters={"student": LycorisSpec(spec_of("lokr").options, 0.01)})  # fmt: skip


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_lycoris_loads_the_file_on_a_stock_transformer(name: str, tmp_path: Path) -> None:
    roles = two_networks(name)
    file, stock = file_of(roles, tmp_path / "a.safetensors"), tiny_wan()
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(file), stock)
    assert len(network.loras) == 20
    network.apply_to()
    assert relative(velocity(stock), of_role(roles, "student")) < 1e-5


def test_lycoris_loads_the_file_in_a_process_of_its_own(tmp_path: Path) -> None:
    roles = two_networks("lokr")
    file_of(roles, tmp_path / "a.safetensors")
    stock: Any = tiny_wan()
    stock.save_pretrained(tmp_path / "base")
    save_file({"x": latents(), "text": prompts().rows_BLD, "t": 1000 * SIGMA_B}, tmp_path / "in.safetensors")
    program = (
        "import torch, sys\n"
        "from diffusers import WanTransformer3DModel\n"
        "from lycoris import create_lycoris_from_weights\n"
        "from safetensors.torch import load_file, save_file\n"
        "model, given = WanTransformer3DModel.from_pretrained('base'), load_file('in.safetensors')\n"
        "network, _ = create_lycoris_from_weights(1.0, 'a.safetensors', model)\n"
        "network.apply_to()\n"
        "with torch.no_grad():\n"
        "    out = model(given['x'], given['t'], given['text'], return_dict=False)[0]\n"
        "assert not any(name.startswith('simpletuner_dmd') for name in sys.modules)\n"
        "save_file({'out': out}, 'out.safetensors')\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=120)
    assert relative(load_file(tmp_path / "out.safetensors")["out"], of_role(roles, "student")) < 1e-5


@pytest.mark.parametrize("name", ["locon", "loha", "lokr", "lokr, both low", "lokr, whole", "glora"])
def test_merged_by_lycoris_the_file_has_its_whole_effect(name: str, tmp_path: Path) -> None:
    """`merge_to` applies alpha / rank twice to LoHa and LoKr; with alpha = rank that is no harm."""
    roles = two_networks(name)
    expected, bare = of_role(roles, "student"), of_role(roles, "teacher")
    network, _ = lycoris.create_lycoris_from_weights(
        1.0, str(file_of(roles, tmp_path / "a.safetensors")), stock := tiny_wan()
    )
    network.merge_to(1.0)
    assert relative(velocity(stock) - bare, expected - bare) < 1e-4


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_the_same_file_with_the_trained_alpha_would_lose_part_of_its_effect(name: str, tmp_path: Path) -> None:
    """Why alpha is folded, and proof that the test above can see it."""
    roles = two_networks(name)
    expected, bare = of_role(roles, "student"), of_role(roles, "teacher")
    alphas = {f"{key}.alpha": torch.tensor(alpha) for key, alpha in student_switch(roles).constants("student").items()}
    save_file({**roles.tensors("student"), **alphas}, tmp_path / "a.safetensors")
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "a.safetensors"), stock := tiny_wan())
    network.merge_to(1.0)
    assert relative(velocity(stock) - bare, expected - bare) > 0.2


@pytest.mark.parametrize("name", ["locon", "loha", "lokr", "full", "glora"])
def test_a_fractional_multiplier_is_in_the_file(name: str, tmp_path: Path) -> None:
    spec = spec_of(name, multiplier=0.3)
    roles = build_roles(tiny_wan(), adapters={"student": spec})
    awake(roles, 0.3)
    file, stock = file_of(roles, tmp_path / "a.safetensors", multiplier=0.3), tiny_wan()
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(file), stock)
    network.apply_to()
    assert relative(velocity(stock), of_role(roles, "student")) < 1e-5
    assert relative(of_role(roles, "teacher"), of_role(roles, "student")) > 1e-3


def test_comfyuis_names_are_wans_own_and_carry_no_alpha() -> None:
    roles = two_networks("lokr")
    tensors = folded(roles.tensors("student"), student_switch(roles).constants("student"), 1.0)
    renamed = to_comfyui(tensors)
    assert renamed is not None
    assert torch.equal(renamed["diffusion_model.blocks.1.cross_attn.o.lokr_w1"],
                       tensors["lycoris_blocks_1_attn2_to_out_0.lokr_w1"])  # fmt: skip
    assert torch.equal(renamed["diffusion_model.blocks.0.ffn.0.lokr_w2_a"],
                       tensors["lycoris_blocks_0_ffn_net_0_proj.lokr_w2_a"])  # fmt: skip
    assert len(renamed) == len(tensors) - 20
    assert not any(name.endswith("alpha") for name in renamed)
    rotations = two_networks("diag-oft")
    assert to_comfyui(folded(rotations.tensors("student"), {}, 1.0)) is None


# --- starts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["locon", "loha", "lokr", "lokr, whole", "full", "diag-oft", "glora"])
def test_a_student_starts_from_a_file_whatever_its_own_strength(name: str, tmp_path: Path) -> None:
    first = two_networks(name)
    file = file_of(first, tmp_path / "a.safetensors")
    more = {} if name == "diag-oft" else {"multiplier": 0.7, "linear_alpha": 3.0}
    spec = spec_of(name, **more)
    second = build_roles(tiny_wan(), adapters={"student": spec, "critic": spec}, seed=9)
    start_student(second, file)
    assert relative(of_role(second, "student"), of_role(first, "student")) < 1e-5
    assert torch.equal(of_role(second, "critic"), of_role(second, "teacher"))


def lora_file(path: Path, names: str) -> tuple[Path, Roles]:
    """A trained LoRA of rank 4, alpha 8, under other people's names."""
    roles = build_roles(tiny_wan(), adapters={"student": LORA})
    wake(roles)
    tensors = roles.tensors("student")
    if names == "peft":
        written = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
        written |= {f"base_model.model.{name.rsplit('.lora_', 1)[0]}.alpha": torch.tensor(8.0) for name in tensors}
    else:
        write = dialects.to_diffusers if names == "diffusers" else dialects.to_comfyui
        written = write(tensors, rank=4, alpha=8.0)
        if names == "kohya":
            written = {_kohya(name): tensor for name, tensor in written.items()}
    save_file(written, path)
    return path, roles


def _kohya(name: str) -> str:
    module, _, factor = name.removeprefix("diffusion_model.").partition(".lora_")
    return f"lora_unet_{module.replace('.', '_')}.lora_{'down' if factor.startswith('A') else 'up'}.weight"


@pytest.mark.parametrize("names", ["diffusers", "comfyui", "peft", "kohya"])
def test_a_lora_student_starts_from_a_file_under_any_names(names: str, tmp_path: Path) -> None:
    file, first = lora_file(tmp_path / "a.safetensors", names)
    second = build_roles(tiny_wan(), adapters={"student": AdapterSpec(rank=4, alpha=3.0), "critic": LORA}, seed=9)
    start_student(second, file)
    assert relative(of_role(second, "student"), of_role(first, "student")) < 1e-5


def test_a_file_that_does_not_fit_is_a_sentence(tmp_path: Path) -> None:
    file, _ = lora_file(tmp_path / "a.safetensors", "diffusers")
    ranked = build_roles(tiny_wan(), adapters={"student": AdapterSpec(8, 8.0)})
    with pytest.raises(UserError, match=r"init_lora:.*\(4, 48\).*\(8, 48\)(.|\n)*lora_rank"):
        start_student(ranked, file)
    fewer = AdapterSpec(4, 4.0, targets=("to_q",))
    targeted = build_roles(tiny_wan(), adapters={"student": fewer})
    with pytest.raises(UserError, match=r"to_k.*does not have(.|\n)*target layers"):
        start_student(targeted, file)
    network = build_roles(tiny_wan(), adapters={"student": spec_of("lokr")})
    with pytest.raises(UserError, match=r'it is a LoRA(.|\n)*"lora_type": "standard"'):
        start_student(network, file)
    with pytest.raises(UserError, match="found no adapter"):
        start_student(network, tmp_path / "nothing")


@pytest.mark.parametrize("kind", ["lora", "locon", "loha", "lokr", "full", "diag-oft"])
def test_a_fine_tune_merged_into_the_base_is_that_fine_tune(kind: str, tmp_path: Path) -> None:
    if kind == "lora":
        file, roles = lora_file(tmp_path / "a.safetensors", "comfyui")
    else:
        roles = two_networks(kind)
        file = file_of(roles, tmp_path / "a.safetensors")
    switch = roles.student.switch
    assert switch is not None
    with switch.use("student", 0.8), torch.no_grad():
        expected = velocity(roles.student.transformer)
    base = tiny_wan()
    merge = TeacherMerge(f"{file}:0.8")
    merge.start(base)
    for layer, module in base.named_modules():
        if isinstance(module, nn.Linear):
            merge(layer, module)
    assert relative(velocity(base), expected) < 1e-5
    assert relative(velocity(tiny_wan()), expected) > 0.01


def layers_of(roles: Roles, role: str) -> set[str]:
    return {name.partition(".")[0] for name in roles.tensors(role)}


@pytest.mark.parametrize("algo", ["lora", "loha", "lokr", "full", "glora", "diag-oft", "boft"])
def test_a_second_expert_reaches_the_conditioning_layers_but_with_rotations(algo: str) -> None:
    """Its own network on them passes the self-test of the roles."""
    preset = {"target_module": ["WanAttention"]} if algo == "boft" else {}
    options = LycorisOptions.model_validate(
        {"algo": algo, "linear_dim": 8 if algo == "boft" else 4, "apply_preset": preset}
    )
    specs = {"student": LycorisSpec(options), "detail": LycorisSpec(with_layers(options, CONDITIONING_TARGETS))}
    roles = build_roles(tiny_wan(), adapters=specs)
    more = layers_of(roles, "detail") - layers_of(roles, "student")
    rotation = algo in ("diag-oft", "boft")
    assert more == (set() if rotation else {"lycoris_" + name.replace(".", "_") for name in CONDITIONING_TARGETS})
    self_test(roles, latents(1), prompts(1), fresh=True)


@pytest.mark.parametrize(("fnmatch", "excluded"), [(True, "*.time_proj"), (False, ".*time_proj")])
def test_layers_that_a_preset_excludes_stay_out_of_a_second_expert(fnmatch: bool, excluded: str) -> None:
    preset = {"use_fnmatch": fnmatch, "exclude_name": [excluded], "target_name": ["proj_out"]}
    options = LycorisOptions.model_validate({"linear_dim": 4, "apply_preset": preset})
    roles = build_roles(tiny_wan(), adapters={
        "student": LycorisSpec(options), "detail": LycorisSpec(with_layers(options, CONDITIONING_TARGETS)),
    })  # fmt: skip
    more = layers_of(roles, "detail") - layers_of(roles, "student")
    assert more == {"lycoris_" + name.replace(".", "_") for name in CONDITIONING_TARGETS
                    if name not in ("proj_out", "condition_embedder.time_proj")}  # fmt: skip
    assert options.apply_preset.target_name == ["proj_out"]
