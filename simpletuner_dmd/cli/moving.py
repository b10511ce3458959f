"""What moves in a run: an optimizer and a schedule per role, from the options that name them."""

from __future__ import annotations

import math
from typing import Any

from torch.nn import Parameter

from simpletuner_dmd.config import TrainConfig
from simpletuner_dmd.distill.method import Method
from simpletuner_dmd.training.ema import Ema
from simpletuner_dmd.training.optimizers import build_optimizer
from simpletuner_dmd.training.schedules import build_schedule
from simpletuner_dmd.training.trainer import RoleOptimizer
from simpletuner_dmd.wan.roles import Roles

STUDENT_ROLES = ("student", "detail")
"""What is sampled, averaged and exported; the other roles serve the training alone."""


def role_optimizers(config: TrainConfig, roles: Roles, method: Method, steps: int) -> dict[str, RoleOptimizer]:
    """One for each role that moves. A schedule is as long as its role has updates."""
    make = {"critic": _critic, "discriminator": _discriminator}
    return {role: make.get(role, _student)(config, roles, method, steps, role) for role in roles.parameters}


def student_average(config: TrainConfig, roles: Roles) -> Ema | None:
    """The running average of the student's weights (of both experts), where one is asked for."""
    if not config.use_ema:
        return None
    return Ema(student_parameters(roles), config.ema_decay, config.ema_update_interval, config.ema_start_step)


def student_parameters(roles: Roles) -> list[tuple[str, Parameter]]:
    """What is averaged: the student's parameters; those of a second expert under its name."""
    return [
        (name if role == "student" else f"{role}/{name}", parameter)
        for role in STUDENT_ROLES
        for name, parameter in roles.parameters.get(role, [])
    ]


def _student(config: TrainConfig, roles: Roles, method: Method, steps: int, role: str) -> RoleOptimizer:
    interval = config.distillation.student_interval if config.distillation_method else 1
    optimizer = build_optimizer(
        config.optimizer,
        roles.parameters[role],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        settings=config.optimizer_settings,
    )
    schedule = build_schedule(
        config.lr_scheduler,
        optimizer,
        updates=max(1, method.updates(role, steps)),
        warmup=math.ceil(config.lr_warmup_steps / interval),  # lengths in the configuration are trainer steps
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
        lr_end=config.lr_end,
    )
    return RoleOptimizer(roles.parameters[role], optimizer, schedule, config.max_grad_norm, config.grad_clip_method)


def _critic(config: TrainConfig, roles: Roles, method: Method, steps: int, role: str) -> RoleOptimizer:
    critic = config.critic
    assert critic is not None, "a critic without settings"
    optimizer = build_optimizer(
        config.optimizer,
        roles.parameters["critic"],
        lr=critic.fake_score_lr,
        betas=critic.fake_score_betas,
        weight_decay=critic.fake_score_weight_decay,
        eps=critic.fake_score_eps,
        settings=config.optimizer_settings,
    )
    schedule = build_schedule(
        critic.fake_score_lr_scheduler,
        optimizer,
        updates=max(1, method.updates("critic", steps)),
        warmup=critic.fake_score_lr_warmup_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
        lr_end=config.lr_end,
    )
    return RoleOptimizer(roles.parameters["critic"], optimizer, schedule, critic.fake_score_grad_clip)


def _discriminator(config: TrainConfig, roles: Roles, method: Method, steps: int, role: str) -> RoleOptimizer:
    """A constant rate and no momentum, as adversarial losses want it."""
    settings: Any = config.distillation_config
    optimizer = build_optimizer(
        "torch-adamw", roles.parameters[role], lr=settings.discriminator_lr, betas=(0.0, 0.999), weight_decay=0.0,
        eps=config.adam_epsilon,
    )  # fmt: skip
    schedule = build_schedule(
        "constant_with_warmup", optimizer, updates=max(1, method.updates(role, steps)), warmup=0, num_cycles=1,
        power=1.0, lr_end=0.0,
    )  # fmt: skip
    return RoleOptimizer(roles.parameters[role], optimizer, schedule, clip=1.0)
