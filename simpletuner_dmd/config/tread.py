"""`tread_config`: the routes of TREAD, as SimpleTuner's users write them, and what they mean at a model's depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError

from simpletuner_dmd.config.coerce import Options
from simpletuner_dmd.config.errors import Problem
from simpletuner_dmd.config.methods.base import DistillationOptions
from simpletuner_dmd.config.mistakes import refusals, shown, unknown_key

KEY = "tread_config"
LIKE_THIS = (
    'for example "tread_config": {"routes": [{"selection_ratio": 0.25, "start_layer_idx": 2, "end_layer_idx": -2}]}'
)
STOCK_DEPTH = 40  # of a WanTransformer3DModel whose config file does not say


class TreadRoute(Options):
    """A span of blocks that part of the video tokens goes around."""

    selection_ratio: float = Field(
        ge=0, le=0.75, description="Fraction of the video tokens that bypasses the span: 0.1 drops a tenth."
    )
    start_layer_idx: int = Field(description="First block of the span, from 0; negative counts from the end.")
    end_layer_idx: int = Field(description="Last block of the span, inclusive; negative counts from the end.")

    def blocks(self, depth: int) -> tuple[int, int]:
        """(first, last) counted from 0; may lie outside the model."""
        start, end = (index + depth if index < 0 else index for index in (self.start_layer_idx, self.end_layer_idx))
        return start, end


class TreadConfig(Options):
    """TREAD's routes; they must not share a block."""

    routes: list[TreadRoute] = Field(
        default_factory=list, description="Spans of blocks and the fraction of tokens that bypasses each; no overlap."
    )

    def depth_problems(self, depth: int, place: str) -> list[Problem]:
        """Routes that a model of `depth` blocks does not have, go backwards, or share a block with an earlier one."""
        problems = []
        owner: dict[int, int] = {}
        for number, route in enumerate(self.routes):
            where = f"{KEY}.routes[{number}]"
            start, end = route.blocks(depth)
            bounds = (("start_layer_idx", start), ("end_layer_idx", end))
            beyond = [name for name, block in bounds if not 0 <= block < depth]
            for name in beyond:
                problems.append(
                    Problem(place, f"{where}.{name}",
                            f"found {getattr(route, name)}, but this model has {depth} blocks, 0 to {depth - 1}",
                            f"choose from 0 to {depth - 1}, or from -{depth} to -1, which count from the end")
                )  # fmt: skip
            if beyond:
                continue
            if start > end:
                problems.append(
                    Problem(place, f"{where}.end_layer_idx",
                            f"found {route.end_layer_idx}, block {end} of {depth}, before the start at block {start}",
                            "exchange the two, or correct one")
                )  # fmt: skip
                continue
            shared = [block for block in range(start, end + 1) if block in owner]
            if shared:
                earlier = owner[shared[0]]
                problems.append(
                    Problem(place, f"{where}.start_layer_idx",
                            f"routes[{earlier}] and routes[{number}] both cover block {shared[0]} of {depth}: "
                            "routes must not overlap",
                            f"end routes[{earlier}] before block {start}, or start routes[{number}] later")
                )  # fmt: skip
            owner.update(dict.fromkeys(range(start, end + 1), number))
        return problems

    def spans(self, depth: int) -> list[tuple[float, int, int]]:
        """(fraction that bypasses, first block, last block) of every route, for a model without `depth_problems`."""
        return [(route.selection_ratio, *route.blocks(depth)) for route in self.routes]


def depth_of(network: Mapping[str, Any]) -> int:
    """Blocks of a transformer, from its config.json."""
    return int(network.get("num_layers", STOCK_DEPTH))


def read_tread(written: Any, place: str) -> tuple[TreadConfig | None, list[Problem]]:
    """What a person wrote as `tread_config`, or every mistake in it with the key it is at."""
    if not isinstance(written, dict):
        return None, [Problem(place, KEY, f"found {shown(written)}, must be an object of routes, or the path of a "
                              "JSON file that holds one", LIKE_THIS)]  # fmt: skip
    problems = _unknown(written, TreadConfig, place, f"{KEY}.")
    routes = written.get("routes", [])
    if not isinstance(routes, list):
        problems.append(Problem(place, f"{KEY}.routes", f"found {shown(routes)}, must be a list", LIKE_THIS))
        return None, problems
    read = []
    for number, route in enumerate(routes):
        parsed, mistakes = _read_route(route, place, f"{KEY}.routes[{number}]")
        problems += mistakes
        read += [parsed] if parsed else []
    return (None if problems else TreadConfig(routes=read)), problems


def _read_route(route: Any, place: str, where: str) -> tuple[TreadRoute | None, list[Problem]]:
    if not isinstance(route, dict):
        return None, [Problem(place, where, f"found {shown(route)}, must be an object {{...}}", LIKE_THIS)]
    problems = _unknown(route, TreadRoute, place, where + ".")
    missing = [name for name in TreadRoute.model_fields if route.get(name) is None]
    if missing:
        problems.append(Problem(place, where, f"found {shown(route)}, lacks {', '.join(missing)}", LIKE_THIS))
    if problems:
        return None, problems
    try:
        return TreadRoute.model_validate(route), []
    except ValidationError as error:
        return None, [
            Problem(place, f"{where}.{path[0]}", message, "correct it")
            for path, message, _ in refusals(error, TreadRoute)
        ]


def _unknown(written: dict[Any, Any], model: type[Options], place: str, prefix: str) -> list[Problem]:
    found = [
        unknown_key(place, str(key), value, model.model_fields, {}, prefix)[0]
        for key, value in written.items()
        if key not in model.model_fields
    ]
    return [problem for problem in found if problem]


def routed_roles(settings: DistillationOptions | None) -> list[str]:
    """The roles whose own losses are routed: plain denoising losses alone. None is fine-tuning."""
    if settings is None:
        return ["student"]
    student = ["student", *(["detail"] if settings.has_detail_expert else [])] if settings.student_routes else []
    return [*student, *(["critic"] if settings.has_critic else [])]


def tread_notices(tread: TreadConfig | None, settings: DistillationOptions | None) -> list[str]:
    """Where routing acts, or that it does not. One sentence each."""
    if tread is None or not tread.routes:
        return []
    roles = routed_roles(settings)
    if not roles:
        return [f"{KEY} has no effect: this distillation_method has no plain denoising loss, the only kind routed."]
    if not any(route.selection_ratio for route in tread.routes):
        return [f"{KEY} has no effect: every selection_ratio is 0."]
    if "student" not in roles:
        return [f"{KEY} acts on the critic's turn only: the student's turn and the scores it compares see all tokens."]
    return []
