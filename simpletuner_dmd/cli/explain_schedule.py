"""`simpletuner explain schedule`: the noise levels of a run, by the functions that training draws them with.

Everything is on the timestep scale, 1000 = pure noise, drawn from noise (left) to clean (right).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner_dmd.config import TrainConfig
    from simpletuner_dmd.flow import Denoiser, NoiseRange, Schedule, SigmaWindow

COLUMNS = 60
DRAWS = 4096
BLOCKS, ASCII = " ▁▂▃▄▅▆▇█", " .:-=+*%#"
LABEL = 18
SHORT = {"shift": "flow_schedule_shift"}


@dataclass(frozen=True)
class Levels:
    """A distribution of timesteps: `low` and `high` bound it, `shares` are those of equal bins from 1000 down to 0."""

    name: str
    low: float
    median: float
    high: float
    shares: tuple[float, ...]


@dataclass(frozen=True)
class View:
    """What is drawn: windows are where the score is compared after leaving at each rung, training is every loss."""

    method: str
    shift: float | None
    ladder: tuple[float, ...]
    windows: tuple[Levels, ...]
    training: tuple[Levels, ...]


def run_schedule(args: argparse.Namespace) -> int:
    """Prints the schedule, and draws it into a file if asked. Raises UserError with the mistakes of the options."""
    from simpletuner_dmd.config import UserError

    config = read_config(args)
    try:
        view = look(config)
    except ValueError as error:  # a noise window that is empty for one of the ladder's rungs
        raise UserError(str(error), key="distillation_config", fix="change the ladder or the noise window") from error
    if args.json:
        print(json.dumps(asdict(view), indent=2))
    else:
        print(text(view, BLOCKS if can_print(BLOCKS) else ASCII))
    if args.png:
        try:
            picture(view).save(args.png)
        except (OSError, ValueError) as error:  # Pillow's ValueError: a name whose ending it does not know
            raise UserError(f"cannot write {args.png}: {error}", key="--png", fix="name a .png file") from error
    return 0


def read_config(args: argparse.Namespace) -> TrainConfig:
    """The chosen configuration; without one, DMD on its defaults. Overrides may leave `distillation_config.` out."""
    from simpletuner_dmd.config import load
    from simpletuner_dmd.config.layers import find_config, take_selectors

    overrides = [full_name(token) for token in args.overrides]
    chosen = args.config or args.env or args.example or take_selectors(overrides)[1]
    if chosen or find_config(None, None, None, Path.cwd())[0]:
        return load(overrides, config=args.config, env=args.env, example=args.example).config
    with tempfile.TemporaryDirectory() as folder:
        # No file is opened: the entry is there because a configuration names its data.
        data = [{"id": "videos", "dataset_type": "video", "instance_data_dir": "videos"}]
        (Path(folder) / "data.json").write_text(json.dumps(data), encoding="utf-8")
        path = Path(folder) / "config.json"
        path.write_text(
            json.dumps({"distillation_method": "dmd", "data_backend_config": "data.json"}), encoding="utf-8"
        )
        return load(overrides, config=str(path)).config


def full_name(token: str) -> str:
    """shift=3 -> flow_schedule_shift=3, student_steps=4 -> distillation_config.student_steps=4."""
    from simpletuner_dmd.config.layers import NESTED, option_field

    match = re.fullmatch(r"((?:--)?)([\w\-]+)(.*)", token, re.DOTALL)
    if match is None:
        return token
    dashes, written, rest = match.groups()
    key = written.replace("-", "_")
    key = SHORT.get(key, key)
    if not dashes and not rest:
        return token  # a value
    if option_field(key) is None and option_field(f"{NESTED}.{key}") is not None:
        key = f"{NESTED}.{key}"
    return f"{dashes}{key}{rest}"


# --- the numbers ------------------------------------------------------------------------------------------------------


def look(config: TrainConfig) -> View:
    """The run's noise levels. Raises ValueError where a window is empty."""
    from simpletuner_dmd.flow import TIMESTEPS, Schedule
    from simpletuner_dmd.wan.experts import known_noise

    shift = config.flow_schedule_shift
    schedule = Schedule(shift or 1.0, tuple(timestep / TIMESTEPS for timestep in config.student_timesteps()))
    method = config.distillation_method or "fine-tuning"
    windows: list[Levels] = []
    training: list[Levels] = []
    if config.critic is not None:
        windows, training = matching_levels(config.critic, schedule, known_noise(config.flavour))
    training += [levels_of(name, sigma) for name, sigma in plain_levels(config, schedule)]
    return View(method, shift, schedule.timesteps, tuple(windows), tuple(training))


def matching_levels(options: Any, schedule: Schedule, known: NoiseRange) -> tuple[list[Levels], list[Levels]]:
    """The score window of each exit rung; what student and critic see over a whole run."""
    import torch

    from simpletuner_dmd.distill.dmd import DMD, DMDSettings
    from simpletuner_dmd.distill.rollout import RolloutSettings
    from simpletuner_dmd.flow import SigmaWindow

    nobody = cast("Denoiser", None)  # a window asks no network
    shared = {item.name: getattr(options, item.name) for item in fields(DMDSettings) if hasattr(options, item.name)}
    source = "data_latent" if known.high < 1.0 else "simulate"  # a window does not ask where a rollout begins
    settings = DMDSettings(**shared | {"rollout": RolloutSettings(schedule, source=source, known=known)})
    dmd = DMD(nobody, nobody, nobody, settings, torch.device("cpu"))
    rungs = settings.rollout.rungs
    drawn = [(window, even(window)) for window in map(dmd.score_window, rungs)]
    windows = [
        levels_of(f"exit at {schedule.timesteps[rung]:.0f}", sigma, window)
        for rung, (window, sigma) in zip(rungs, drawn, strict=True)
    ]
    exits = drawn[-1:] if options.last_step_only else drawn  # every rung is as likely as the others
    student = levels_of("student: score", torch.cat([sigma for _, sigma in exits]))
    seen = [dmd.critic_window(rung) for rung in (rungs[-1:] if options.last_step_only else rungs)]
    bounds = SigmaWindow(min(window.low for window in seen), max(window.high for window in seen))
    return windows, [student, levels_of("critic", torch.cat([even(window) for window in seen]), bounds)]


def plain_levels(config: TrainConfig, schedule: Schedule) -> list[tuple[str, Tensor]]:
    """(loss, draws of sigma) of the losses that are no score matching."""
    import torch

    from simpletuner_dmd.distill.noise_levels import Listed, LogitNormal
    from simpletuner_dmd.distill.phases import phase_grid
    from simpletuner_dmd.distill.supervised import noise_levels
    from simpletuner_dmd.flow import SigmaWindow
    from simpletuner_dmd.randomness import RandomStream
    from simpletuner_dmd.wan.experts import known_noise

    method, options = config.distillation_method, cast(Any, config.distillation_config)
    stream = RandomStream(config.seed, 0, tuple(range(DRAWS)))
    uniform = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    makers: dict[str | None, Callable[[], list[tuple[str, Tensor]]]] = {
        None: lambda: [("student", noise_levels(config, known_noise(config.flavour)).sigma(stream, one_frame(config)))],
        "lcm": lambda: [
            ("student: starts", phase_grid(options.num_ddim_timesteps, schedule.shift).jumps(uniform).start_B)
        ],
        "pcm": lambda: [(
            "student: starts",
            phase_grid(options.num_ddim_timesteps, schedule.shift, schedule.ladder[1:]).jumps(uniform).start_B,
        )],
        "dcm": lambda: dcm_levels(options, uniform),
        "diffusion_forcing": lambda: [(
            "student: a block",
            even(SigmaWindow(options.min_timestep_ratio, options.max_timestep_ratio, schedule.shift)),
        )],
        "ode_init": lambda: [("student: rungs", Listed(schedule.ladder).levels(stream, "sigma"))],
        "rcm": lambda: [
            ("consistency", LogitNormal(options.scm_logit_mean, options.scm_logit_std).levels(stream, "sigma"))
        ],
    }  # fmt: skip
    return makers[method]() if method in makers else []


def dcm_levels(options: Any, uniform: Tensor) -> list[tuple[str, Tensor]]:
    """The two experts start on either side of the split."""
    from simpletuner_dmd.distill.phases import phase_grid

    grid = phase_grid(options.euler_timesteps, options.dcm_shift, options.inner_edges)
    split = grid.index_of(options.split)
    return [
        ("student: starts", grid.jumps(uniform, split + 1).start_B),
        ("detail: starts", grid.jumps(uniform, 1, split).start_B),
    ]


def even(window: SigmaWindow) -> Tensor:
    """The window's own draws at evenly spaced uniform numbers."""
    import torch

    return window.sigma((torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS)


def one_frame(config: TrainConfig) -> tuple[int, int, int, int]:
    """A latent of the flavour's own size; only its height and width count, where the shift follows the size."""
    flavour = config.flavour
    width, height = flavour.native_size
    cell = flavour.size_multiple // 2  # a token is 2 x 2 cells
    return (1, 1, height // cell, width // cell)


def levels_of(name: str, sigma: Tensor, window: SigmaWindow | None = None) -> Levels:
    """Statistics of draws; the bounds are the window's, where there is one."""
    import torch

    timesteps = 1000 * sigma.double()
    counts = torch.histc(1000 - timesteps, COLUMNS, 0, 1000) / len(timesteps)
    low, high = (1000 * window.low, 1000 * window.high) if window else (float(timesteps.min()), float(timesteps.max()))
    return Levels(name, low, float(timesteps.median()), high, tuple(counts.tolist()))


# --- drawing ----------------------------------------------------------------------------------------------------------


def can_print(marks: str) -> bool:
    try:
        marks.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def text(view: View, marks: str = BLOCKS) -> str:
    """At most 80 columns. Heights are relative to the fullest bin of a row."""
    lines = [f"{view.method}, shift {'none' if view.shift is None else f'{view.shift:g}'}", ""]
    axis = f"{'timestep':<{LABEL}} 1000{'500':^{COLUMNS - 5}}0"
    lines.append(axis)
    if view.ladder:
        cells = [" "] * COLUMNS
        for timestep in view.ladder:
            cells[column(timestep)] = "|"
        lines += [f"{'student ladder':<{LABEL}} {''.join(cells)}".rstrip()]
        lines += wrapped_numbers(view.ladder)
    for title, rows in (("score noise by exit rung", view.windows), ("training noise", view.training)):
        if rows:
            lines += ["", title]
        for row in rows:
            lines += [f"{row.name:<{LABEL}} {bars(row.shares, marks)}".rstrip(),
                      f"{'':<{LABEL}} {row.low:.0f} to {row.high:.0f}, median {row.median:.0f}"]  # fmt: skip
    return "\n".join(lines)


def wrapped_numbers(ladder: tuple[float, ...]) -> list[str]:
    import textwrap

    indent = " " * (LABEL + 1)
    numbers = ", ".join(f"{timestep:.0f}" for timestep in ladder)
    return textwrap.wrap(numbers, LABEL + 1 + COLUMNS, initial_indent=indent, subsequent_indent=indent)


def column(timestep: float) -> int:
    return min(COLUMNS - 1, int((1000 - timestep) / 1000 * COLUMNS))


def bars(shares: tuple[float, ...], marks: str) -> str:
    """One mark per bin; a bin that is not empty is never drawn as one that is."""
    top = max(shares)
    return "".join(marks[max(1, round(share / top * (len(marks) - 1)))] if share else marks[0] for share in shares)


def picture(view: View) -> Any:
    """The same as a Pillow image, one row of bars under another."""
    from PIL import Image, ImageDraw

    left, wide, high, gap = 160, 600, 48, 26
    rows = [*view.windows, *view.training]
    image = Image.new("RGB", (left + wide + 30, 70 + (high + gap) * (len(rows) + bool(view.ladder))), "white")
    draw = ImageDraw.Draw(image)
    draw.text((10, 10), text(view).splitlines()[0], fill="black")
    draw.text((left, 30), "1000 (noise)", fill="gray")
    draw.text((left + wide - 50, 30), "0 (clean)", fill="gray")
    y = 50
    if view.ladder:
        draw.text((10, y + high // 2), "student ladder", fill="black")
        for timestep in view.ladder:
            x = left + (1000 - timestep) / 1000 * wide
            draw.line((x, y, x, y + high), fill="black", width=2)
            draw.text((x, y + high + 2), f"{timestep:.0f}", fill="black")
        y += high + gap
    for row in rows:
        draw.text((10, y + high // 2), row.name, fill="black")
        for number, share in enumerate(row.shares):
            x = left + number * wide / COLUMNS
            if share:
                top = y + high * (1 - share / max(row.shares))
                draw.rectangle((x, min(top, y + high - 1), x + wide / COLUMNS - 1, y + high), fill="steelblue")
        draw.line((left, y + high, left + wide, y + high), fill="gray")
        draw.text((left, y + high + 4), f"{row.low:.0f} to {row.high:.0f}, median {row.median:.0f}", fill="black")
        y += high + gap
    return image
