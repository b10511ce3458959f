"""The ten questions. Each has a default, so that Enter ten times is a configuration."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from simpletuner_dmd.cli.wizard import ask, data, gpu
from simpletuner_dmd.cli.wizard.draft import Draft
from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.config.recipes import recipe, recipes_for
from simpletuner_dmd.config.run_options import TRACKERS

NESTED = "distillation_config."
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
MODELS = (
    ("Wan 2.1 1.3B        480p, 81 frames; from 12 GB", "t2v-480p-1.3b-2.1"),
    ("Wan 2.1 14B         480p, 81 frames; from 48 GB", "t2v-480p-14b-2.1"),
    ("Wan 2.2 TI2V 5B     720p, 121 frames; from 24 GB", "ti2v-5b-2.2"),
    ("Wan 2.2 A14B high   the expert of the noisy half; from 48 GB", "t2v-14b-2.2-high"),
    ("Wan 2.2 A14B low    the expert of the clean half; from 48 GB", "t2v-14b-2.2-low"),
    ("the tiny demo Wan   64x64, runs on a CPU in minutes", "demo"),
)
METHODS = (
    ("dmd                 few steps, sharp; prompts are enough", "dmd"),
    ("pcm                 few steps by phases; needs videos, one network", "pcm"),
    ("lcm                 few steps by one jump; needs videos, one network", "lcm"),
    ("dcm                 two experts, layout and detail; needs videos", "dcm"),
    ("rcm                 dmd with consistency, keeps variety; needs videos", "rcm"),
    ("self_forcing        dmd for a student that streams block by block", "self_forcing"),
    ("ode_init            warm start for self_forcing, from prompts", "ode_init"),
    ("diffusion_forcing   warm start for self_forcing, from videos", "diffusion_forcing"),
    ("fine-tuning         no fewer steps: your own videos, as any LoRA", None),
)
STEP_KEYS = ("student_steps", "phases")


@dataclass
class Session:
    """What is asked for and is no option. named: the card, where the machine's own is not the one to train on."""

    card: float | None = None
    found: data.Found | None = None
    asked: list[str] = field(default_factory=list)


def model(draft: Draft, session: Session) -> None:
    options = draft.options
    now = "demo" if draft.is_demo else options.model_flavour
    flavour = ask.select(
        "Which model?", "The student starts as a copy of this teacher and keeps its size.", MODELS, now
    )
    demo = flavour == "demo"
    usual = "dmd" if draft.is_new and options.distillation_method is None else options.distillation_method
    draft.take_kind("t2v-480p-1.3b-2.1" if demo else flavour, usual, options.model_type, demo, session.card)


def method(draft: Draft, session: Session) -> None:
    options = draft.options
    flavour, demo = options.model_flavour, draft.is_demo
    choices = [
        one for one in METHODS
        if one[1] == options.distillation_method
        or any(recipes_for(flavour, one[1], kind, demo) for kind in ("lora", "full"))
    ]  # fmt: skip
    chosen = ask.select(
        "Which method?", "How the student learns to need fewer steps. dmd is the usual choice.", choices,
        options.distillation_method,
    )  # fmt: skip
    draft.take_kind(flavour, chosen, options.model_type, demo, session.card)


def kind(draft: Draft, session: Session) -> None:
    options = draft.options
    chosen = ask.select(
        "LoRA or full?", "A LoRA shares one frozen base among all roles: far less memory.",
        (("lora   small adapters, for diffusers and ComfyUI", "lora"), ("full   every weight of the student", "full")),
        options.model_type,
    )  # fmt: skip
    draft.take_kind(options.model_flavour, options.distillation_method, chosen, draft.is_demo, session.card)


def card(draft: Draft, session: Session) -> None:
    """Chooses among the recipes of the kind, which differ by memory."""
    found = gpu.find()
    choices: list[tuple[str, float]] = [(f"{size} GB", float(size)) for size in gpu.CARDS]
    if found is not None:
        choices.insert(0, (f"{found.name}, {found.memory:g} GB (in this machine)", found.memory))
    else:
        choices.append(("none: a CPU", 0.0))
    options = draft.options
    written = recipe(options.recipe).card if options.recipe else None
    default = session.card or (found.memory if found else None) or (float(written) if written else 24.0)
    if draft.is_demo and found is None:
        default = 0.0
    about = "None was found here. " if found is None else ""
    session.card = ask.select(
        "Which GPU will train?", about + "Its memory decides precision, frames and batch.", choices, default
    )  # fmt: skip
    name = draft.take_kind(
        options.model_flavour, options.distillation_method, options.model_type, draft.is_demo, session.card
    )
    for line in about_recipe(draft, name, session.card):
        ask.say(line, "  ")


def about_recipe(draft: Draft, name: str | None, card: float | None) -> list[str]:
    """What to say of the recipe that a draft was given, or was not."""
    if name is None:
        return ["There is no recipe for this; the defaults apply."] if draft.is_new else []
    lines, meant = [f"Recipe {name}: {recipe(name).about}."], recipe(name).card or 0
    if card and meant > card:
        lines.append(f"It is meant for {meant} GB, and there is none for less: it may not fit.")
    return lines


def steps(draft: Draft, session: Session) -> None:
    settings = draft.options.distillation_config
    if settings is None or not draft.options.student_timesteps():
        return  # it samples as the teacher does
    key = next(NESTED + one for one in STEP_KEYS if one in type(settings).model_fields)
    now = len(draft.options.student_timesteps())

    def check(written: str) -> str:
        if not written.isdigit():
            return "write a whole number"
        if int(written) == now:
            return ""
        trial = _without_ladder(draft, key)
        return trial.problem(key, int(written))

    chosen = int(ask.text(
        "How many steps?", "Published students take 3 or 4; fewer is harder, more is slower.",
        str(now), check,
    ))  # fmt: skip
    if chosen != now:
        draft.raw = _without_ladder(draft, key).raw
        draft.set(key, chosen)


def _without_ladder(draft: Draft, key: str) -> Draft:
    """The draft without its other descriptions of the ladder, which one number replaces."""
    import copy

    trial = copy.copy(draft)
    trial.raw = copy.deepcopy(draft.raw)
    for other in ("dmd_denoising_steps", "warp_denoising_steps", "denoising_steps", "phase_edges"):
        if trial.has(NESTED + other):
            trial.set(NESTED + other, None)
    return trial


def size(draft: Draft, session: Session) -> None:
    now = "{}x{}".format(*data.shape(draft))
    chosen = ask.text(
        "Which size, WIDTHxHEIGHTxFRAMES?", "Training and validation videos. Memory and time grow with the product.",
        now, lambda written: data.shape_problem(draft, written),
    )  # fmt: skip
    data.set_shape(draft, *data.split_shape(chosen))


def place(draft: Draft, session: Session) -> None:
    """Prompts or videos: looked into before the answer is taken."""
    needs = data.learns_from_videos(draft.options)
    why = (
        "This method learns from videos: a folder of them, a .txt caption beside each."
        if needs
        else "A file of prompts, a folder of videos, or builtin: the tool's own prompts."
    )
    default = data.default_place(draft)
    while True:
        chosen = ask.path(
            "Prompts or videos?", why, default, lambda written: "" if written else "name a file or a folder"
        )
        ask.say("Looking ...", "  ")
        try:
            session.found = data.set_data(draft, chosen)
        except UserError as error:
            ask.say(
                "\n".join(f"{problem.message}. {problem.fix}".rstrip(" .") + "." for problem in error.problems), "  "
            )
            default, why = chosen, "Another place?"
            continue
        for line in session.found.lines:
            ask.say(line, "  ")
        return


def output(draft: Draft, session: Session) -> None:
    now = draft.options.output_dir
    if draft.is_new and not draft.has("output_dir"):
        now = f"output/{draft.recipe or 'run'}"
    chosen = ask.text("Where does the run write?", "Checkpoints, videos, report and export, in one folder.", now,
                      lambda written: draft.problem("output_dir", written) if written else "name a folder")  # fmt: skip
    draft.set("output_dir", chosen)


def hub(draft: Draft, session: Session) -> None:
    options = draft.options
    now = (options.hub_model_id or "") if options.push_to_hub else ""

    def check(written: str) -> str:
        return "" if not written or HUB_ID.fullmatch(written) else "write owner/name, or nothing"

    chosen = ask.text(
        "Upload to the Hub as? (empty: no)", "owner/name; private, uploaded at the end; needs a token (hf auth login).",
        now, check,
    )  # fmt: skip
    if chosen:
        draft.set("push_to_hub", True)
        draft.set("hub_model_id", chosen)
    elif options.push_to_hub:
        draft.set("push_to_hub", False)


def trackers(draft: Draft, session: Session) -> None:
    now = draft.options.report_to
    chosen = ask.checkbox(
        "Trackers?", "None is needed: curves and videos are in the report in any case.", TRACKERS, now
    )
    if chosen != now:
        draft.set("report_to", chosen or "none")


Question = Callable[[Draft, Session], None]
QUESTIONS: dict[str, Question] = {
    "model": model,
    "method": method,
    "LoRA or full": kind,
    "GPU": card,
    "steps": steps,
    "size": size,
    "data": place,
    "output folder": output,
    "Hub": hub,
    "trackers": trackers,
}
FIRST = ("model", "method", "LoRA or full", "GPU")
"""After one of these the recipe may be another."""


def answers(draft: Draft) -> dict[str, str]:
    """What each question stands at, in a few words."""
    options = draft.options
    entry: dict[str, Any] = data.entry_of(draft) or {}
    ladder = ", ".join(f"{step:g}" for step in options.student_timesteps())
    return {
        "model": "the tiny demo Wan" if draft.is_demo else options.model_flavour,
        "method": options.distillation_method or "fine-tuning",
        "LoRA or full": options.model_type,
        "GPU": f"recipe {options.recipe}" if options.recipe else "no recipe",
        "steps": f"{len(options.student_timesteps())} ({ladder})" if ladder else "the teacher's",
        "size": "{}x{}".format(*data.shape(draft)),
        "data": str(entry.get("instance_data_dir") or entry.get("dataset_name") or "not named yet"),
        "output folder": options.output_dir,
        "Hub": (options.hub_model_id or "the run's name") if options.push_to_hub else "no",
        "trackers": ", ".join(options.report_to) or "none",
    }
