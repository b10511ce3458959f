"""What a person is told when something they wrote cannot work: every problem at once, each with its fix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Problem:
    """One mistake: its file ("command line" and "environment" count as files), its key, what is wrong, the fix."""

    file: str
    key: str
    message: str
    fix: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.file, self.key) if part)
        lines = [f"{where}: {self.message}" if where else self.message]
        if self.fix:
            lines.append(f"Fix: {self.fix}")
        return "\n".join(lines)


class UserError(ValueError):
    """A person's mistake, not a bug: printed without a traceback, exit code 2.

    Raise it with the problems found, or with one sentence and, where they are known, its file, key and fix.
    """

    def __init__(self, problems: str | Problem | Iterable[Problem], *, file: str = "", key: str = "", fix: str = ""):
        if isinstance(problems, str):
            self.problems = [Problem(file, key, problems, fix)]
        elif isinstance(problems, Problem):
            self.problems = [problems]
        else:
            self.problems = list(problems)
        super().__init__(str(self))

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        lines = [f"{len(self.problems)} problems:"]
        for number, problem in enumerate(self.problems, 1):
            head, *rest = str(problem).splitlines()
            lines += ["", f"{number:3d}. {head}", *(f"     {line}" for line in rest)]
        return "\n".join(lines)
