"""The picture in documentation/ARCHITECTURE.md, held true: who imports whom, and how long a file may get."""

import ast
from pathlib import Path

import pytest

from simpletuner_dmd.cli.main import VERBS

PACKAGE = Path(__file__).parents[1] / "simpletuner_dmd"
MOST_LINES = 520

# A room may import rooms of the floors below, never of its own floor or above.
FLOORS = [
    {"flow", "randomness", "config"},
    {"durable"},
    {"data", "wan", "distill"},
    {"validation"},
    {"publish"},
    {"training"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
# The one thing a whole-package import may be for.
ROOT = "__init__"
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "av"}

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def imported_modules(path: Path) -> set[str]:
    """Dotted names of everything a file imports, wherever in the file; relative imports are made absolute."""
    found: set[str] = set()
    package = ("simpletuner_dmd", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def imported_rooms(path: Path) -> set[str]:
    rooms = {name.split(".")[1] for name in imported_modules(path) if name.startswith("simpletuner_dmd.")}
    return {room for room in rooms if any(room in floor for floor in FLOORS)} - {room_of(path)}


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(PACKAGE)) for path in paths]


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_imports_go_down(path: Path) -> None:
    room = room_of(path)
    if room == ROOT:
        assert not imported_rooms(path)
        return
    wrong = {other for other in imported_rooms(path) if floor_of(other) >= floor_of(room)}
    assert not wrong, f"{room} may not import {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_files_hold_one_idea(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_config_is_free_of_heavy_libraries() -> None:
    for path in (PACKAGE / "config").rglob("*.py"):
        assert not {name.split(".")[0] for name in imported_modules(path)} & HEAVY, path


def test_algorithms_see_denoisers_and_tensors_only() -> None:
    for path in (PACKAGE / "distill").rglob("*.py"):
        assert imported_rooms(path) <= {"flow", "randomness"}, path
        outside = {name.split(".")[0] for name in imported_modules(path)}
        assert not outside & (HEAVY - {"torch"}), path


def test_verbs_load_heavy_libraries_only_when_they_run() -> None:
    for name in ("main", "common", *VERBS):
        path = PACKAGE / "cli" / f"{name.replace('-', '_')}.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = {
            name.split(".")[0]
            for node in tree.body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        }
        assert not top & HEAVY, path


def test_the_trainer_names_no_formula_and_no_wan() -> None:
    trainer = PACKAGE / "training" / "trainer.py"
    if trainer.exists():
        assert "wan" not in trainer.read_text(encoding="utf-8").lower().replace("want", "")


def test_every_room_is_on_a_floor() -> None:
    rooms = {room_of(path) for path in FILES} - {ROOT}
    assert rooms <= set().union(*FLOORS)
