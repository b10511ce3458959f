"""The adversarial term: what the head computes, whom its losses move, and where they lead."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, softplus

from simpletuner_dmd.distill.discriminator import (
    WIDTH_PER_HEAD,
    Adversary,
    AdversarySettings,
    QueryPool,
    VideoHead,
    default_blocks,
)
from simpletuner_dmd.distill.dmd import DMD, DMDSettings
from simpletuner_dmd.distill.losses import adversarial_loss, discriminator_loss
from simpletuner_dmd.distill.rollout import RolloutSettings, exit_rung
from simpletuner_dmd.distill.weak_to_strong import WeakToStrong
from simpletuner_dmd.flow import Batch, Schedule, SigmaWindow, TextEmbedding, add_noise
from simpletuner_dmd.randomness import RandomStream
from simpletuner_dmd.wan.denoiser import WanDenoiser
from simpletuner_dmd.wan.roles import Roles, build_roles
from tests.wan.tiny import LORA, batch_of, tiny_wan, wake

from .oracles import (
    CPU,
    AffineStudent,
    FastStream,
    GaussianTeacher,
    OracleCritic,
    make_batch,
    number_said,
)

SHAPE = (2, 3, 2, 4)
WINDOW = SigmaWindow(0.001, 0.999, 3.0)
BLOCKS = (0, 2)


class TokenCritic(nn.Module):
    """A critic with an inside: every position is a token, two linear maps of it are its "blocks"."""

    def __init__(self, channels: int = 2, width: int = 6, seed: int = 0) -> None:
        super().__init__()
        seeded = torch.Generator().manual_seed(seed)
        self.inside = nn.Parameter(torch.randn(3, channels, width, generator=seeded))
        self.outside = nn.Parameter(torch.randn(3, generator=seeded))
        self.asked: list[dict[str, Any]] = []

    def velocity(self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: object = None) -> Tensor:
        said = number_said(text).reshape(-1, 1, 1, 1, 1)
        return self.outside[0] * x_t_BCFHW + self.outside[1] + self.outside[2] * said

    def features(self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, blocks: Sequence[int]) -> list[Tensor]:
        self.asked.append(
            {"sigma": sigma, "said": number_said(text).tolist(), "x_t": x_t_BCFHW, "graph": torch.is_grad_enabled()}
        )
        tokens_BNC = x_t_BCFHW.flatten(2).transpose(1, 2)
        return [torch.tanh(tokens_BNC @ self.inside[block]) for block in blocks]


def awake(width: int = 6, blocks: Sequence[int] = BLOCKS) -> VideoHead:
    """A head that has learned something."""
    head = VideoHead(width, blocks)
    nn.init.normal_(head.logit.weight, std=3.0, generator=torch.Generator().manual_seed(7))
    return head


def adversary(head: nn.Module | None = None, critic: Any = None, **changes: Any) -> Adversary:
    settings = AdversarySettings(**{"weight": 0.5, **changes})
    return Adversary(critic or TokenCritic(), head or awake(), BLOCKS, settings, CPU)


def video_batch(count: int = 4, seed: int = 9) -> Batch:
    return make_batch(count, SHAPE, torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed)))


def draw(seed: int, count: int = 4) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


# --- the head ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [1, 3])
def test_a_pool_is_cross_attention_of_its_queries_over_all_tokens(queries: int) -> None:
    """Against the stock attention with every key and value written out."""
    heads, width = 2, 10
    pool = QueryPool(width, heads, queries).double()
    tokens = torch.randn(3, 17, width, generator=torch.Generator().manual_seed(0))
    seen = pool.norm(tokens.double())

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, WIDTH_PER_HEAD)).transpose(-2, -3)

    expected = scaled_dot_product_attention(
        split(pool.query.expand(3, -1, -1)), split(pool.key(seen)), split(pool.value(seen))
    )
    expected = pool.norm_out(expected.transpose(1, 2).flatten(2)).flatten(1)
    single = pool.float()(tokens)
    assert single.shape == (3, queries * heads * WIDTH_PER_HEAD)
    assert torch.allclose(single.double(), expected, atol=2e-5)


def test_a_fresh_head_says_nothing_and_moves_nothing() -> None:
    """The first logits are 0, and what reaches the features is exactly 0; but the head itself can learn."""
    head, features = VideoHead(6, BLOCKS), [torch.randn(4, 24, 6, requires_grad=True) for _ in BLOCKS]
    logit_B = head(features, torch.rand(4))
    assert torch.equal(logit_B, torch.zeros(4))
    adversarial_loss(logit_B).backward()
    assert all(torch.equal(feature.grad, torch.zeros_like(feature)) for feature in features)  # type: ignore[arg-type]
    assert head.logit.weight.grad is not None and bool(head.logit.weight.grad.any())


def test_the_logit_depends_on_every_token_the_noise_level_and_no_other_video() -> None:
    head, sigma_B = awake(), torch.tensor([0.2, 0.5, 0.9])
    features = [torch.randn(3, 24, 6, requires_grad=True) for _ in BLOCKS]
    logit_B = head(features, sigma_B)
    assert logit_B.shape == (3,)
    logit_B[1].backward()
    for feature in features:
        assert feature.grad is not None
        reached = feature.grad.abs().sum(dim=-1) > 0
        assert reached[1].all() and not reached[[0, 2]].any()
    again = head([feature.detach() for feature in features], torch.tensor([0.2, 0.6, 0.9]))
    assert torch.equal(again[[0, 2]], logit_B[[0, 2]])
    assert float((again[1] - logit_B[1]).detach().abs()) > 1e-3


def test_the_head_computes_in_fp32_and_starts_from_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first, second, other = VideoHead(6, BLOCKS, seed=1), VideoHead(6, BLOCKS, seed=1), VideoHead(6, BLOCKS, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(first.mix.weight, other.mix.weight)
    features = [torch.randn(2, 24, 6).bfloat16() for _ in BLOCKS]
    logit_B = awake()(features, torch.rand(2))
    assert logit_B.dtype == torch.float32


@pytest.mark.parametrize(("depth", "blocks"), [(30, (15, 22, 29)), (40, (20, 30, 39)), (2, (1,)), (1, (0,))])
def test_default_blocks(depth: int, blocks: tuple[int, ...]) -> None:
    assert default_blocks(depth) == blocks


def test_losses_are_those_of_logistic_regression() -> None:
    logit_B = torch.tensor([-40.0, 0.0, 2.0])
    probability = logit_B.double().sigmoid()
    assert float(discriminator_loss(logit_B, real=True)) == pytest.approx(float(-probability.log().mean()), rel=1e-6)
    assert float(discriminator_loss(logit_B, real=False)) == pytest.approx(
        float(-(1 - probability).log().mean()), rel=1e-6
    )
    assert float(adversarial_loss(logit_B)) == pytest.approx(float(-probability.log().mean()), rel=1e-6)


# --- the critic's turn ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detached", [False, True])
def test_the_discriminators_loss_moves_the_head_and_the_critic_under_it(detached: bool) -> None:
    critic, head = TokenCritic(), awake()
    student_x0 = draw(0).requires_grad_()
    batch = video_batch()
    stream = RandomStream(0, 3, batch.positions)
    losses = list(adversary(head, critic, detach_backbone=detached).critic_losses(student_x0, batch, stream, WINDOW))
    assert [loss.name for loss in losses] == ["gan_critic_loss"] * 2
    for loss in losses:
        loss.value.backward()
    assert student_x0.grad is None, "the student's samples are only looked at"
    assert (critic.inside.grad is None) == detached
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in head.parameters())
    fake, real = critic.asked
    assert torch.equal(fake["sigma"], real["sigma"]) and fake["said"] == real["said"] == [1.0] * 4
    assert len(fake["sigma"].unique()) == 4, "each sample draws its own noise level"
    assert fake["graph"] == real["graph"] == (not detached)
    sigma_B = WINDOW.sigma(stream.uniform("gan/sigma"))
    for asked, x0, kind in ((fake, student_x0.detach(), "student"), (real, batch.latents_BCFHW, "videos")):
        expected = add_noise(x0, stream.normal(SHAPE, f"gan/noise of the {kind}"), sigma_B)
        assert torch.equal(asked["x_t"], expected), kind


def test_the_discriminators_loss_by_hand() -> None:
    critic, head, batch = TokenCritic(), awake(), video_batch()
    gan = adversary(head, critic, critic_weight=0.25, r1_weight=30.0, r1_sigma=0.2)
    stream, x0 = RandomStream(0, 3, batch.positions), draw(0)
    fake, real = list(gan.critic_losses(x0, batch, stream, WINDOW))
    fake_x, real_x, nudged_x = (asked["x_t"] for asked in critic.asked)
    sigma_B = critic.asked[0]["sigma"]
    assert torch.allclose(nudged_x - real_x, 0.2 * stream.normal(SHAPE, "gan/r1"), atol=1e-6)

    @torch.no_grad()
    def logit(x_t: Tensor) -> Tensor:
        return head(critic.features(x_t, sigma_B, batch.text, BLOCKS), sigma_B)

    expected_fake = softplus(logit(fake_x)).mean()
    steepness = (logit(real_x) - logit(nudged_x)).pow(2).mean()
    expected_real = softplus(-logit(real_x)).mean() + 30 * steepness
    assert float(fake.value.detach()) == pytest.approx(0.25 * float(expected_fake.detach()), rel=1e-5)
    assert float(real.value.detach()) == pytest.approx(0.25 * float(expected_real), rel=1e-5)
    assert fake.reported == pytest.approx(float(expected_fake.detach()), rel=1e-5)
    assert fake.metrics == {"gan_logit_student": pytest.approx(float(logit(fake_x).mean()), rel=1e-4)}
    assert real.metrics == {
        "gan_logit_videos": pytest.approx(float(logit(real_x).mean()), rel=1e-4),
        "gan_r1": pytest.approx(float(steepness), rel=1e-4),
    }


class QuadraticHead(nn.Module):
    """a x^2 + b x + c of a single number: the family in which log N / N lies."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, features: Sequence[Tensor], sigma_B: Tensor) -> Tensor:
        x = features[0][:, 0, 0]
        return torch.stack([x**2, x, torch.ones_like(x)], dim=1) @ self.weight


class Bare:
    """Features that are the input itself."""

    def features(self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, blocks: Sequence[int]) -> list[Tensor]:
        return [x_t_BCFHW.flatten(2).transpose(1, 2) for _ in blocks]


class FixedLevel(FastStream):
    """Every draw of sigma is the middle of its window."""

    def uniform(self, purpose: str) -> Tensor:
        return torch.full((len(self.positions),), 0.5, dtype=torch.float64)


def test_the_best_logit_is_the_log_ratio_of_the_noised_densities() -> None:
    """Real N(1, 0.5), student N(-0.5, 0.2), both at sigma 0.5: the log ratio is a known parabola."""
    head, count, shape = QuadraticHead(), 40_000, (1, 1, 1, 1)
    gan = Adversary(Bare(), head, (0,), AdversarySettings(weight=1.0), CPU)
    seeded = torch.Generator().manual_seed(0)
    real = 1.0 + 0.5**0.5 * torch.randn(count, *shape, generator=seeded)
    student = -0.5 + 0.2**0.5 * torch.randn(count, *shape, generator=seeded)
    batch = make_batch(count, shape, real)
    optimizer = torch.optim.LBFGS(head.parameters(), lr=1.0, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = list(gan.critic_losses(student, batch, FixedLevel(0, 0, batch.positions), SigmaWindow(0.0, 1.0)))
        for loss in losses:
            (loss.value / gan.settings.critic_weight).backward()
        return torch.tensor(sum(loss.reported or 0.0 for loss in losses))

    optimizer.step(closure)  # type: ignore[arg-type]
    mean_r, var_r, mean_f, var_f = 0.5, 0.25 * 0.5 + 0.25, -0.25, 0.25 * 0.2 + 0.25
    expected = torch.tensor([
        1 / (2 * var_f) - 1 / (2 * var_r),
        mean_r / var_r - mean_f / var_f,
        mean_f**2 / (2 * var_f) - mean_r**2 / (2 * var_r) + 0.5 * torch.tensor(var_f / var_r).log().item(),
    ])  # fmt: skip
    assert torch.allclose(head.weight.detach(), expected, atol=0.06)


# --- the student's turn -----------------------------------------------------------------------------------------------


def test_the_students_term_reaches_x0_and_no_parameter() -> None:
    critic, head, batch = TokenCritic(), awake(), video_batch()
    gan = adversary(head, critic)
    before = [parameter.clone() for parameter in (*critic.parameters(), *head.parameters())]
    x0, stream = draw(0), RandomStream(0, 3, batch.positions)
    with torch.no_grad():  # whatever is around it, the path to the input is kept
        push = gan.push(x0, torch.ones_like(x0), batch, stream, WINDOW)
    assert float(push.gradient.abs().min()) > 0
    assert not push.loss.requires_grad and not push.gradient.requires_grad
    after = [*critic.parameters(), *head.parameters()]
    assert all(torch.equal(old, new) and new.grad is None for old, new in zip(before, after, strict=True))

    def value(x0: Tensor) -> Tensor:
        sigma_B = WINDOW.sigma(stream.uniform("gan/student sigma")).double()
        x_t = add_noise(x0, stream.normal(SHAPE, "gan/student noise").double(), sigma_B)
        features = critic.double().features(x_t, sigma_B, batch.text, BLOCKS)
        return 0.5 * softplus(-head(features, sigma_B)).mean()

    assert float(push.loss) == pytest.approx(float(value(x0.double())), rel=1e-5)
    along = draw(5).double()
    along /= along.norm()
    slope = float((value(x0.double() + 0.02 * along) - value(x0.double() - 0.02 * along)) / 0.04)
    assert float((push.gradient.double() * along).sum()) == pytest.approx(slope, rel=2e-2)


def test_in_ratio_mode_the_weight_is_the_ratio_of_gradients_for_each_sample() -> None:
    batch, x0, matching = (
        video_batch(),
        draw(0),
        draw(1) * torch.tensor([1.0, 5.0, 0.1, 0.0])[:, None, None, None, None],
    )
    gan = adversary(weight=0.2, weight_mode="ratio")
    stream = RandomStream(0, 3, batch.positions)
    push = gan.push(x0, matching, batch, stream, WINDOW)
    norms = push.gradient.flatten(1).norm(dim=1)
    assert torch.allclose(norms, 0.2 * matching.flatten(1).norm(dim=1), rtol=1e-5)
    assert push.metrics["gan_gradient_ratio"] == pytest.approx(0.2, rel=1e-5)
    # Half a batch gives half of the gradient rows, whoever else is there: 1/B is in both gradients.
    half = replace(batch, positions=(0, 1), text=TextEmbedding(batch.text.rows_BLD[:2]))
    part = gan.push(x0[:2], 2 * matching[:2], half, RandomStream(0, 3, (0, 1)), WINDOW)
    assert torch.allclose(part.gradient, 2 * push.gradient[:2], rtol=1e-4, atol=1e-9)


def test_a_fresh_head_gives_the_student_exactly_nothing_in_either_mode() -> None:
    batch, x0 = video_batch(), draw(0)
    for mode in ("absolute", "ratio"):
        gan = adversary(VideoHead(6, BLOCKS), weight_mode=mode)
        push = gan.push(x0, draw(1), batch, RandomStream(0, 3, batch.positions), WINDOW)
        assert torch.equal(push.gradient, torch.zeros_like(x0))
        assert push.metrics["gan_gradient_ratio"] == 0.0


# --- inside DMD -------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """v = a x + b."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(2, generator=torch.Generator().manual_seed(seed)))

    def velocity(self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: object = None) -> Tensor:
        return self.weights[0] * x_t_BCFHW + self.weights[1]


def dmd(head: nn.Module | None = None, **gan: Any) -> tuple[DMD, nn.Module, nn.Module, TokenCritic, nn.Module]:
    teacher, student, critic, head = Linear(0), Linear(1), TokenCritic(), head or awake()
    term = AdversarySettings(**{"weight": 0.5, **gan}) if gan is not None else None
    settings = DMDSettings(RolloutSettings(Schedule(ladder=(1.0, 0.5))), timestep_shift=3.0, adversary=term)
    return DMD(teacher, student, critic, settings, CPU, head=head, blocks=BLOCKS), teacher, student, critic, head


def gradients(*modules: nn.Module) -> list[bool]:
    return [any(p.grad is not None for p in module.parameters()) for module in modules]


def test_the_students_turn_with_the_term_moves_the_student_alone() -> None:
    method, teacher, student, critic, head = dmd()
    batch = video_batch()
    (loss,) = method.student_losses(batch, RandomStream(0, 3, batch.positions))
    loss.value.backward()
    assert gradients(teacher, student, critic, head) == [False, True, False, False]


def test_the_critics_turn_with_the_term_moves_critic_and_head() -> None:
    method, teacher, student, critic, head = dmd()
    batch = video_batch()
    names = []
    for loss in method.critic_losses(batch, RandomStream(0, 3, batch.positions)):
        names.append(loss.name)
        loss.value.backward()
    assert names == ["fake_score_loss", "gan_critic_loss", "gan_critic_loss"]
    assert gradients(teacher, student, critic, head) == [False, False, True, True]
    assert critic.inside.grad is not None and critic.outside.grad is not None


def test_the_terms_gradients_add_at_x0() -> None:
    """With and without the term, from the same draws: the difference is the term's own, through the student."""
    with_term, _, student, critic, head = dmd(weight=0.5)
    batch = video_batch()
    stream = RandomStream(0, 3, batch.positions)
    (loss,) = with_term.student_losses(batch, stream)
    loss.value.backward()
    total = student.weights.grad.clone()  # type: ignore[union-attr]
    student.weights.grad = None

    with_term.adversary = None
    (plain,) = with_term.student_losses(batch, stream)
    plain.value.backward()
    assert loss.reported == pytest.approx(float(plain.value.detach()), rel=1e-6), "logged is the matching alone"
    x0 = with_term._roll_out(batch, stream, with_grad=True).x0
    sigma_B = with_term.critic_window(0).sigma(stream.uniform("gan/student sigma"))
    x_t = add_noise(x0, stream.normal(SHAPE, "gan/student noise"), sigma_B)
    term = 0.5 * softplus(-head(critic.features(x_t, sigma_B, batch.text, BLOCKS), sigma_B)).mean()
    (own,) = torch.autograd.grad(term, student.weights)
    assert float(own.norm()) > 1e-4
    assert torch.allclose(total - student.weights.grad, own, rtol=1e-3, atol=1e-6)


def test_the_terms_graph_is_gone_before_the_student_goes_backward() -> None:
    method, _, _, critic, _ = dmd()
    seen: list[weakref.ref[Tensor]] = []
    features = critic.features

    def watched(*args: Any) -> list[Tensor]:
        found = features(*args)
        seen.extend(weakref.ref(feature) for feature in found)
        return found

    critic.features = watched  # type: ignore[method-assign]
    batch = video_batch()
    critic.asked.clear()
    (loss,) = method.student_losses(batch, RandomStream(0, 3, batch.positions))
    gc.collect()
    assert len(seen) == len(BLOCKS)
    assert all(reference() is None for reference in seen)
    assert loss.value.requires_grad


def test_the_head_learns_before_the_student_hears_it() -> None:
    method, *_ = dmd(start_step=6, discriminator_warmup=2)
    batch = video_batch()
    learns, acts = [], []
    for step in range(8):
        stream = RandomStream(0, step, batch.positions)
        (loss,) = method.student_losses(batch, stream)
        acts.append("gan_generator_loss" in loss.metrics)
        learns.append(any(loss.name == "gan_critic_loss" for loss in method.critic_losses(batch, stream)))
        method.end_step()
    assert learns == [False] * 4 + [True] * 4
    assert acts == [False] * 6 + [True] * 2


def test_the_term_needs_latents_and_says_so() -> None:
    assert dmd()[0].needs_latents
    plain = DMD(Linear(0), Linear(1), TokenCritic(), DMDSettings(RolloutSettings(Schedule(ladder=(1.0,)))), CPU)
    assert not plain.needs_latents


class OracleWithFeatures(OracleCritic, Bare):
    """Knows its student's score, and shows its input."""


class MeanHead(nn.Module):
    """The best logit between two Gaussians of one covariance, linear in the mean of all tokens, per noise level."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(()))

    def forward(self, features: Sequence[Tensor], sigma_B: Tensor) -> Tensor:
        return features[0].mean(dim=1) @ self.weight + self.offset


def trained_offset(weight: float) -> Tensor:
    """Where a student of a teacher around (1, -0.5) ends whose data is around (2, 0.5)."""
    teacher_mean, data_mean = torch.tensor([1.0, -0.5]), torch.tensor([2.0, 0.5])
    covariance, shape, count = 0.25 * torch.eye(2), (2, 1, 1, 2), 64
    student, head = AffineStudent((1.0,), channels=2), MeanHead(2)
    settings = DMDSettings(
        RolloutSettings(Schedule(ladder=(1.0,))), real_score_guidance_scale=1.0, ts_schedule=False,
        adversary=AdversarySettings(weight=weight, critic_weight=1.0),
    )  # fmt: skip
    method = DMD(GaussianTeacher(teacher_mean, covariance), student, OracleWithFeatures(student), settings, CPU,
                 head=head, blocks=(0,))  # fmt: skip
    optimizers = {
        "student": torch.optim.Adam(student.parameters(), lr=0.02),
        "critic": torch.optim.Adam(head.parameters(), lr=0.1),
    }
    for step in range(400):
        noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(step))
        batch = make_batch(count, shape, data_mean[:, None, None, None] + 0.5 * noise)
        for turn in method.turns(step):
            for loss in turn.losses(batch, FastStream(0, step, batch.positions)):
                if loss.value.requires_grad:  # the oracle's own loss has nothing to move
                    inputs = [p for group in optimizers[turn.role].param_groups for p in group["params"]]
                    loss.value.backward(inputs=inputs)
            optimizers[turn.role].step()
            optimizers[turn.role].zero_grad()
        method.end_step()
    return student.offset[0].detach()


def test_real_videos_draw_the_student_past_its_teacher() -> None:
    """What the term is for. Without weight the student ends at the teacher, with it towards the data."""
    assert float((trained_offset(1e-9) - torch.tensor([1.0, -0.5])).abs().max()) < 0.05
    drawn = trained_offset(1.5) - torch.tensor([1.0, -0.5])
    assert float(drawn.min()) > 0.2
    assert float(drawn.max()) < 1.1


# --- on a real Wan ----------------------------------------------------------------------------------------------------


def wan_turns(checkpointing: bool) -> tuple[Roles, VideoHead, DMD]:
    roles = build_roles(tiny_wan(), adapters={"student": LORA, "critic": LORA}, gradient_checkpointing=checkpointing)
    wake(roles)
    assert roles.critic is not None
    head = awake(roles.critic.width, (0, 1))
    roles.add_head("critic", head, "discriminator.")
    settings = DMDSettings(
        RolloutSettings(Schedule(ladder=(1.0, 0.5))), weak_to_strong=WeakToStrong(0.25, "exact-both"),
        adversary=AdversarySettings(weight=0.3, weight_mode="ratio", r1_weight=10.0),
    )  # fmt: skip
    weak = WanDenoiser(roles.teacher.transformer, roles.critic.switch, "critic")
    method = DMD(roles.teacher, roles.student, roles.critic, settings, CPU, weak=weak, head=head, blocks=(0, 1))
    return roles, head, method


def turn_gradients(roles: Roles, method: DMD, role: str) -> dict[str, Tensor]:
    """What one turn leaves, as the trainer goes about it; anything outside the role is an error."""
    batch = batch_of()
    losses = method.student_losses if role == "student" else method.critic_losses
    own = dict(roles.parameters[role])
    for loss in losses(batch, RandomStream(0, 3, batch.positions)):
        loss.value.backward(inputs=list(own.values()))
    found = {name: parameter.grad for name, parameter in own.items()}
    assert all(gradient is not None and gradient.any() for gradient in found.values())
    others = [p for name, items in roles.parameters.items() if name != role for _, p in items]
    assert all(parameter.grad is None for parameter in [*others, *frozen(roles)])
    for parameter in own.values():
        parameter.grad = None
    return found  # type: ignore[return-value]


def frozen(roles: Roles) -> list[nn.Parameter]:
    return [p for name, p in roles.teacher.transformer.named_parameters() if "lora_" not in name]


@pytest.mark.parametrize("role", ["student", "critic"])
def test_recomputing_blocks_changes_no_gradient_of_a_turn_that_spans_roles(role: str) -> None:
    """The student's turn passes through the critic's adapter and back; the critic's, from the head to its adapter."""
    plain, recomputed = (
        turn_gradients(roles, method, role) for roles, _, method in (wan_turns(False), wan_turns(True))
    )
    for name, gradient in plain.items():
        assert torch.allclose(gradient, recomputed[name], rtol=1e-4, atol=1e-9), name


def test_a_students_update_leaves_teacher_critic_and_head_bit_for_bit() -> None:
    roles, head, method = wan_turns(False)
    optimizers = {role: torch.optim.AdamW([p for _, p in items], lr=0.01) for role, items in roles.parameters.items()}
    batch = batch_of()
    x_t, sigma_B = batch.latents_BCFHW, torch.tensor([0.3, 0.8])
    assert x_t is not None

    def state() -> dict[str, list[Tensor]]:
        found = {role: [p.detach().clone() for _, p in items] for role, items in roles.parameters.items()}
        with torch.no_grad():
            said = roles.teacher.velocity(x_t, sigma_B, batch.text)
        return {**found, "base": [p.clone() for p in frozen(roles)], "teacher": [said]}

    for step in range(3):
        for turn in method.turns(step):
            before = state()
            for loss in turn.losses(batch, RandomStream(0, step, batch.positions)):
                loss.value.backward(inputs=[p for _, p in roles.parameters[turn.role]])
            optimizers[turn.role].step()
            optimizers[turn.role].zero_grad()
            moved = {
                name for name, tensors in state().items()
                if not all(torch.equal(old, new) for old, new in zip(before[name], tensors, strict=True))
            }  # fmt: skip
            assert moved == {turn.role}
        method.end_step()


@pytest.mark.parametrize("last_step_only", [False, True])
def test_it_may_look_at_the_last_steps_samples_alone(last_step_only: bool) -> None:
    """Exits are drawn per step: head and student's term act exactly where the rollout went to the ladder's end."""
    method, batch, seen = dmd(last_step_only=last_step_only)[0], video_batch(), set()
    for step in range(12):
        stream = RandomStream(0, step, batch.positions)
        at_the_end = exit_rung(method.settings.rollout, stream, "rollout") == 1
        for turns in (("student", "critic"), ("critic",)):  # the critic's own rollout leaves at the same rung
            pushed = any("gan_generator_loss" in loss.metrics for loss in method.student_losses(batch, stream)) \
                if "student" in turns else None  # fmt: skip
            judged = "gan_critic_loss" in [loss.name for loss in method.critic_losses(batch, stream)]
            assert judged == (at_the_end or not last_step_only) and pushed in (None, judged)
            method.end_step()
        seen.add(at_the_end)
    assert seen == {False, True}
