"""After the questions: what was decided, what it costs, and what to do next."""

from __future__ import annotations

from simpletuner_dmd.cli.wizard import advanced, ask
from simpletuner_dmd.cli.wizard.cost import cost_of, make_fit
from simpletuner_dmd.cli.wizard.data import reset_shape
from simpletuner_dmd.cli.wizard.draft import Draft
from simpletuner_dmd.cli.wizard.short import FIRST, QUESTIONS, Session, answers
from simpletuner_dmd.config.mistakes import shown

WRITE, CHANGE, EVERY, LEAVE, FIT = "write", "change", "every", "leave", "fit"
MOST = 6


def review(draft: Draft, session: Session) -> bool:
    """Shows the draft until the person writes it (True) or leaves it (False)."""
    while True:
        _show(draft)
        ask.say("Planning ...", "  ")
        cost = cost_of(draft, session)
        for line in cost.lines:
            ask.say(line, "  ")
        fit = [(f"Make it fit: {', '.join(map(str, cost.changes))}", FIT)] if cost.changes else []
        choices = [
            *fit,
            ("Write the files and check them", WRITE),
            ("Change an answer", CHANGE),
            ("Advanced: every option, by section", EVERY),
            ("Leave without writing", LEAVE),
        ]
        chosen = ask.select("And now?", "", choices, FIT if fit else WRITE)
        if chosen in (WRITE, LEAVE):
            return bool(chosen == WRITE)
        if chosen == EVERY:
            advanced.browse(draft)
        elif chosen == FIT:
            make_fit(draft, session, cost.changes)
        else:
            _change(draft, session)


def _show(draft: Draft) -> None:
    ask.say()
    rows = answers(draft)
    width = max(map(len, rows))
    for name, answer in rows.items():
        ask.say(f"{name:<{width}}  {answer}", "  ")
    own = {key: value for key, value in draft.raw.items() if key != "recipe" and draft.former[0].get(key) != value}
    gone = [key for key in draft.former[0] if key not in draft.raw]
    if own or gone:
        ask.say()
        what = "To be written" if draft.is_new else "Changed"
        over = f" over recipe {draft.recipe}" if draft.recipe else ""
        settings = [*(f"{key} {_short(value)}" for key, value in own.items()), *(f"{key} taken out" for key in gone)]
        more = f", and {len(settings) - MOST} more" if len(settings) > MOST else ""
        ask.say(f"{what}{over}: {', '.join(settings[:MOST])}{more}", "  ")
    for problem in draft.merged().problems:
        ask.say(f"Problem: {problem.key}: {problem.message}. {problem.fix}", "  ")


def _short(value: object) -> str:
    text = shown(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _change(draft: Draft, session: Session) -> None:
    rows = answers(draft)
    choices = [(f"{name:<14} {answer}", name) for name, answer in rows.items()]
    name = ask.select("Which answer?", "", choices)
    QUESTIONS[name](draft, session)
    if name in FIRST and draft.is_new:
        if name != "GPU":
            QUESTIONS["GPU"](draft, session)
        reset_shape(draft)
