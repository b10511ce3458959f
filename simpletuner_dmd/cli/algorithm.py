"""The algorithm of a run from its roles, with the heads that move beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from simpletuner_dmd.config import UserError
from simpletuner_dmd.config.methods import MatchingOptions
from simpletuner_dmd.distill import builder
from simpletuner_dmd.distill.discriminator import VideoHead, default_blocks
from simpletuner_dmd.distill.feature_adversary import FeatureHeads
from simpletuner_dmd.distill.method import Ingredients, Method
from simpletuner_dmd.flow import Denoiser
from simpletuner_dmd.wan.denoiser import WanDenoiser
from simpletuner_dmd.wan.roles import Roles

if TYPE_CHECKING:
    from simpletuner_dmd.cli.assemble import Assembly


def method_of(assembly: Assembly, roles: Roles, target: Denoiser | None) -> Method:
    """target: the student under its running average. Raises UserError where a noise window is empty."""
    config = assembly.config
    build = builder(config.distillation_method)
    parts = Ingredients(
        teacher=roles.teacher,
        student=roles.student,
        schedule=assembly.schedule,
        options=config.distillation_config or config,
        device=assembly.device,
        caption_dropout_probability=config.caption_dropout_probability,
        critic=roles.critic,
        target=target,
        weak=_weak_critic(assembly, roles),
        discriminator=_discriminator(assembly, roles),
        detail=roles.denoisers.get("detail"),
        known=assembly.known_noise,
    )
    try:
        return build(parts)
    except ValueError as error:  # a noise window that is empty for one of the ladder's rungs
        raise UserError(
            str(error),
            file=str(assembly.loaded.path),
            key="distillation_config",
            fix="widen min_timestep_ratio … max_timestep_ratio, or set ts_schedule to false",
        ) from error


def _weak_critic(assembly: Assembly, roles: Roles) -> WanDenoiser | None:
    """The critic's adapter at a strength that the method sets, for weak-to-strong matching."""
    settings, critic = assembly.config.distillation_config, roles.critic
    if not isinstance(settings, MatchingOptions) or not settings.weak_critic:
        return None
    assert critic is not None and critic.switch is not None, "a critic of its own weights has no fraction"
    return WanDenoiser(critic.transformer, critic.switch, critic.adapter, critic.autocast)


def _discriminator(assembly: Assembly, roles: Roles) -> nn.Module | None:
    """What judges features: of the critic, whose role it moves with, or of the teacher, in a role of its own."""
    settings, critic, seed = assembly.config.distillation_config, roles.critic, assembly.config.seed
    if settings is not None and settings.has_discriminator:
        teacher = roles.teacher
        hidden = min(1024, 4 * teacher.width)
        heads = FeatureHeads(teacher.width, settings.feature_blocks(teacher.depth), hidden, seed)
        roles.add_head("discriminator", heads.to(assembly.device))
        return heads
    if not isinstance(settings, MatchingOptions) or not settings.gan_weight:
        return None
    assert critic is not None, "the head reads the critic"
    blocks = default_blocks(critic.depth) if settings.gan_blocks == "auto" else settings.gan_blocks
    head = VideoHead(critic.width, blocks, seed=seed).to(assembly.device)
    roles.add_head("critic", head, "discriminator.")
    return head
