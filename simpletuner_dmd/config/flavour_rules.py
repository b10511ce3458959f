"""What follows from the flavour: the steps that one of two experts makes, and what a host or an expert cannot do."""

from __future__ import annotations

from simpletuner_dmd.config.errors import Problem
from simpletuner_dmd.config.flavours import Flavour
from simpletuner_dmd.config.methods import DmdConfig
from simpletuner_dmd.config.methods.base import TIMESTEPS, WHERE
from simpletuner_dmd.config.schema import TrainConfig

NOISE = {"high": "high-noise", "low": "low-noise"}


def steps_by_expert(flavour: Flavour, ladder: tuple[float, ...]) -> dict[str, tuple[float, ...]]:
    """ "high" and "low" -> the steps of the ladder (timesteps) that this one of the flavour's experts makes."""
    assert flavour.boundary is not None, f"{flavour.name} is one network"
    boundary = TIMESTEPS * flavour.boundary
    return {
        "high": tuple(step for step in ladder if step >= boundary),
        "low": tuple(step for step in ladder if step < boundary),
    }


def flavour_problems(config: TrainConfig) -> list[Problem]:
    """Combinations that the flavour rules out."""
    flavour = config.flavour
    if flavour.image_channels:
        return _host_problems(config, flavour)
    if flavour.expert is None:
        found = []
        if config.other_expert_run is not None:
            found.append(
                Problem("", "other_expert_run", f"{flavour.name} is one network: there is no other expert",
                        "leave it out")
            )  # fmt: skip
        settings = config.distillation_config
        if isinstance(settings, DmdConfig) and settings.rollout == "handover":
            found.append(
                Problem("", WHERE + "rollout", f"found handover, but {flavour.name} is one network: nobody hands over "
                        "to it", 'write "simulate" or "data_latent"')
            )  # fmt: skip
        return found
    return _expert_problems(config, flavour)


def _host_problems(config: TrainConfig, flavour: Flavour) -> list[Problem]:
    found = []
    if config.model_type == "full":
        found.append(
            Problem("", "model_type", f"found full, but {flavour.name} is here a host for text-to-video adapters: "
                    "trained without pictures, its picture layers would not follow the rest",
                    'set "model_type": "lora", or choose a t2v flavour')
        )  # fmt: skip
    if config.distillation_config is not None and config.distillation_config.blockwise:
        found.append(
            Problem("", "distillation_method", f"{config.distillation_method} makes a student that works block by "
                    f"block, which {flavour.name} cannot host", "choose a t2v flavour, or dmd")
        )  # fmt: skip
    return found


def _expert_problems(config: TrainConfig, flavour: Flavour) -> list[Problem]:
    settings, me = config.distillation_config, NOISE[str(flavour.expert)]
    if settings is None:
        return []
    if not isinstance(settings, DmdConfig):
        return [
            Problem("", "distillation_method", f"found {config.distillation_method}, but one of two experts is trained "
                    "by dmd or fine-tuning: it knows a part of the noise levels only",
                    'set "distillation_method": "dmd", or choose another flavour')
        ]  # fmt: skip
    found = []
    try:
        ladder = config.student_timesteps()
    except ValueError:
        return []  # a ladder that cannot be walked is reported as such
    if not steps_by_expert(flavour, ladder)[str(flavour.expert)]:
        side = "at or above" if flavour.expert == "high" else "below"
        found.append(
            Problem("", WHERE + settings.ladder_key,
                    f"no step of {_steps(ladder)} is {side} {TIMESTEPS * (flavour.boundary or 0):g}, where the {me} "
                    "expert works: there is nothing to train",
                    f"give the ladder such a step, or train the other expert ({flavour.partner})")
        )  # fmt: skip
    if flavour.expert == "low" and settings.rollout == "simulate":
        found.append(
            Problem("", WHERE + "rollout", "found simulate, but the low-noise expert does not begin at pure noise",
                    'write "handover" (from latents that the high-noise expert made, or from videos) or "data_latent"')
        )  # fmt: skip
    if flavour.expert == "high" and settings.rollout == "handover":
        found.append(
            Problem("", WHERE + "rollout", "found handover, but nobody hands over to the high-noise expert: it begins "
                    "at pure noise", 'write "simulate" or "data_latent"')
        )  # fmt: skip
    if settings.regression_steps:
        found.append(
            Problem("", WHERE + "regression_steps", f"found {settings.regression_steps}: the teacher's trajectories "
                    "run through both experts, and one is loaded", 'set "regression_steps": 0')
        )  # fmt: skip
    return found


def flavour_notices(config: TrainConfig) -> list[str]:
    """Which steps a run of one expert trains, and what a host leaves out."""
    flavour = config.flavour
    if flavour.image_channels:
        return [
            f"{flavour.name} hosts a text-to-video adapter: its {flavour.image_channels} picture channels get zeros "
            "and there is no picture embedding, so nothing about following a first picture is learned or kept."
        ]
    if flavour.expert is None or flavour.boundary is None:
        return []
    me, other = NOISE[flavour.expert], NOISE["low" if flavour.expert == "high" else "high"]
    side = f"{TIMESTEPS * flavour.boundary:g} and above" if flavour.expert == "high" else \
        f"below {TIMESTEPS * flavour.boundary:g}"  # fmt: skip
    if config.distillation_config is None:
        return [f"{flavour.name}: the {me} expert alone is trained, on noise levels {side}."]
    try:
        steps = steps_by_expert(flavour, config.student_timesteps())
    except ValueError:
        return []
    own, others = steps[flavour.expert], steps["low" if flavour.expert == "high" else "high"]
    if not own:
        return []
    if not others:
        return [f"{flavour.name}: every step of the ladder {_steps(own)} is the {me} expert's ({side}); the {other} "
                "expert makes none, and the student never uses it."]  # fmt: skip
    found = [
        f"{flavour.name}: this run trains the {me} expert, which makes the steps {_steps(own)} ({side}); the {other} "
        f"expert makes {_steps(others)}. One hands over to the other at {steps['low'][0]:g}."
    ]
    settings = config.distillation_config
    if isinstance(settings, DmdConfig) and settings.rollout == "handover" and settings.renoise == "ode":
        found.append(
            "rollout handover with renoise ode: the handed-over latents get fresh noise, where sampling goes on with "
            "the noise that the high-noise expert saw; renoise sde has no such difference."
        )
    return found


def _steps(timesteps: tuple[float, ...]) -> str:
    return ", ".join(f"{step:g}" for step in timesteps)
