"""What a draft would take: memory, time and disk of its plan, and the smallest change that fits. Loads torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simpletuner_dmd.cli.wizard import data
from simpletuner_dmd.cli.wizard.draft import Draft
from simpletuner_dmd.cli.wizard.short import Session
from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.wan.plan import Change, size

SHOWN = ("Time: ", "Disk: ")
"""Of the plan's lines; its tables are for `simpletuner check`."""


@dataclass(frozen=True)
class Cost:
    """lines: to be shown. changes: settings with which it fits, where it does not as it is."""

    lines: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()


def cost_of(draft: Draft, session: Session) -> Cost:
    """The plan for the card that was named, else for this machine. A draft with mistakes has none."""
    from simpletuner_dmd.cli.capacity import named_card, this_machine
    from simpletuner_dmd.cli.planning import make_plan

    try:
        run = data.loaded(draft)
        machine = named_card(f"{session.card:g}") if session.card else this_machine(run.config.mixed_precision)
        plan = make_plan(run, machine)
    except UserError:
        return Cost()  # the mistakes themselves are shown
    limit, where = machine.memory, "host memory" if plan.device == "cpu" else "GPU memory"
    lines = [f"Memory: {size(plan.peak)} of {size(limit)} of {where}"]
    lines += [line for line in plan.lines() if line.startswith(SHOWN)]
    if plan.fits(limit):
        return Cost(("", *lines))
    changes = tuple(plan.smallest_change(limit))
    small_enough = bool(changes) and changes[-1].peak <= limit
    lines.append("This will not fit." if small_enough else "This will not fit, and no setting is known that is enough.")
    return Cost(("", *lines), changes if small_enough else ())


def make_fit(draft: Draft, session: Session, changes: Sequence[Change]) -> None:
    """Puts the changes of a plan into the draft."""
    options = draft.options
    for change in changes:
        if change.key == "num_frames":
            data.set_shape(draft, data.shape(draft)[0], int(change.value))
        elif change.key == "model_type":
            draft.take_kind(
                options.model_flavour, options.distillation_method, change.value, draft.is_demo, session.card
            )
        else:
            draft.set(change.key, change.value)
