"""`tread_config`: how it may be written, every mistake named by its key, and what a model's depth makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from simpletuner_dmd.config import LoadedConfig, TrainConfig, UserError, load
from simpletuner_dmd.config.methods import DistillationOptions, DmdConfig
from simpletuner_dmd.config.tread import TreadConfig, TreadRoute, depth_of, routed_roles, tread_notices

GUIDE = Path(__file__).parents[1] / "e2e" / "data" / "wan-lora"


class StudentRoutes(DistillationOptions):
    """A method with a denoising loss of the student's own, on two experts."""

    student_routes = True
    has_detail_expert = True


def route(ratio: float = 0.25, start: int = 2, end: int = -2) -> dict[str, Any]:
    return {"selection_ratio": ratio, "start_layer_idx": start, "end_layer_idx": end}


def loaded(home: Path, content: dict[str, Any], argv: list[str] | None = None, **environ: str) -> LoadedConfig:
    entry = {"id": "clips", "dataset_type": "video", "instance_data_dir": "videos"}
    (home / "multidatabackend.json").write_text(json.dumps([entry]))
    (home / "config.json").write_text(json.dumps(content))
    return load(argv, environ=environ, cwd=home)


def problems(home: Path, written: Any) -> dict[str, str]:
    """key -> "message | fix" of every problem."""
    with pytest.raises(UserError) as caught:
        loaded(home, {"tread_config": written})
    assert all(problem.file == "config.json" for problem in caught.value.problems)
    return {problem.key: f"{problem.message} | {problem.fix}" for problem in caught.value.problems}


@pytest.mark.parametrize("how", ["object", "wrapped", "file", "text", "argument", "variable"])
def test_every_way_to_write_it(tmp_path: Path, how: str) -> None:
    settings, argv, environ = {"routes": [route()]}, [], {}
    content: dict[str, Any] = {"tread_config": settings}
    if how == "wrapped":
        content = {"tread_config": {"tread_config": settings}}
    elif how == "file":
        (tmp_path / "tread.json").write_text(json.dumps({"tread_config": settings}))
        content = {"tread_config": "tread.json"}
    elif how == "text":
        content = {"tread_config": json.dumps(settings)}
    elif how == "argument":
        content, argv = {}, [f"tread_config={json.dumps(settings)}"]
    elif how == "variable":
        content, environ = {}, {"SIMPLETUNER_TREAD_CONFIG": json.dumps(settings)}
    run = loaded(tmp_path, content, argv, **environ)
    assert run.config.tread_config == TreadConfig(routes=[TreadRoute(**route())])
    assert run.resolved_json()["options"]["tread_config"]["value"] == settings


def test_a_later_layer_takes_it_off(tmp_path: Path) -> None:
    assert loaded(tmp_path, {"tread_config": {"routes": [route()]}}, ["tread_config=none"]).config.tread_config is None
    assert TrainConfig().tread_config is None


@pytest.mark.parametrize(
    ("written", "key", "expected"),
    [
        ([route()], "tread_config", "must be an object of routes"),
        (True, "tread_config", "must be an object of routes"),
        ({"route": []}, "tread_config.route", "did you mean tread_config.routes?"),
        ({"routes": route()}, "tread_config.routes", "must be a list"),
        ({"routes": ["2-8"]}, "tread_config.routes[0]", "must be an object {...}"),
        ({"routes": [route(), {"selection_ratio": 0.1}]}, "tread_config.routes[1]",
         "lacks start_layer_idx, end_layer_idx"),
        ({"routes": [route() | {"selection_rate": 0.1}]}, "tread_config.routes[0].selection_rate",
         "did you mean tread_config.routes[0].selection_ratio?"),
        ({"routes": [route(ratio=0.8)]}, "tread_config.routes[0].selection_ratio", "found 0.8, must be at most 0.75"),
        ({"routes": [route(ratio=-0.1)]}, "tread_config.routes[0].selection_ratio", "must be at least 0"),
        ({"routes": [route() | {"end_layer_idx": 2.5}]}, "tread_config.routes[0].end_layer_idx", "a whole number"),
        ({"routes": [route() | {"start_layer_idx": "x"}]}, "tread_config.routes[0].start_layer_idx", "a whole number"),
        ({"routes": [route() | {"start_layer_idx": True}]}, "tread_config.routes[0].start_layer_idx", "a number"),
    ],
)  # fmt: skip
def test_one_mistake(tmp_path: Path, written: Any, key: str, expected: str) -> None:
    found = problems(tmp_path, written)
    assert set(found) == {key}
    assert expected in found[key]


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    found = problems(tmp_path, {"routes": [route(ratio=2), route() | {"strat": 1}, {}], "on": True})
    assert set(found) == {
        "tread_config.on", "tread_config.routes[0].selection_ratio", "tread_config.routes[1].strat",
        "tread_config.routes[2]",
    }  # fmt: skip


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "found no file tread.json" in problems(tmp_path, "tread.json")["tread_config"]


def test_numbers_in_quotes_are_numbers(tmp_path: Path) -> None:
    quoted = {"selection_ratio": "0.25", "start_layer_idx": "2", "end_layer_idx": "-2"}
    tread = loaded(tmp_path, {"tread_config": {"routes": [quoted]}}).config.tread_config
    assert tread is not None and tread.spans(30) == [(0.25, 2, 28)]


# --- a model's depth --------------------------------------------------------------------------------------------------


def at_depth(depth: int, *routes: dict[str, Any]) -> dict[str, str]:
    tread = TreadConfig.model_validate({"routes": list(routes)})
    return {problem.key: f"{problem.message} | {problem.fix}" for problem in tread.depth_problems(depth, "config.json")}


def test_negative_blocks_count_from_the_end() -> None:
    tread = TreadConfig(routes=[TreadRoute(**route(0.1, -30, -29)), TreadRoute(**route(0.2, 2, -1))])
    assert tread.depth_problems(30, "") == []
    assert tread.spans(30) == [(0.1, 0, 1), (0.2, 2, 29)]


def test_the_guides_routes_fit_wan() -> None:
    for name, count, last in (("simple", 1, (0.1, 2, 28)), ("progressive", 5, (0.1, 24, 28))):
        content = json.loads((GUIDE / f"tread-{name}.json").read_text())["tread_config"]
        tread = TreadConfig.model_validate(content)
        assert tread.depth_problems(30, "") == [] and tread.depth_problems(40, "") == []
        assert len(tread.spans(30)) == count and tread.spans(30)[-1] == last


def test_blocks_the_model_does_not_have() -> None:
    found = at_depth(4, route(start=2, end=4), route(start=-5, end=1))
    assert set(found) == {"tread_config.routes[0].end_layer_idx", "tread_config.routes[1].start_layer_idx"}
    assert "found 4, but this model has 4 blocks, 0 to 3" in found["tread_config.routes[0].end_layer_idx"]
    assert "from -4 to -1" in found["tread_config.routes[1].start_layer_idx"]


def test_a_route_that_goes_backwards() -> None:
    (message,) = at_depth(2, route(start=1, end=-2)).values()
    assert "block 0 of 2, before the start at block 1" in message


def test_routes_that_overlap() -> None:
    found = at_depth(10, route(start=1, end=4), route(start=5, end=-2), route(start=8, end=8))
    assert list(found) == ["tread_config.routes[2].start_layer_idx"]
    assert "routes[1] and routes[2] both cover block 8 of 10" in found["tread_config.routes[2].start_layer_idx"]
    assert at_depth(10, route(start=1, end=4), route(start=4, end=5))


def test_the_depth_of_a_config_file_that_does_not_say_is_the_stock_one() -> None:
    from inspect import signature

    from diffusers import WanTransformer3DModel

    assert depth_of({"num_layers": 30}) == 30
    assert depth_of({}) == signature(WanTransformer3DModel.__init__).parameters["num_layers"].default


# --- notices ----------------------------------------------------------------------------------------------------------


def test_where_it_acts_is_said() -> None:
    tread = TreadConfig(routes=[TreadRoute(**route())])
    assert tread_notices(tread, None) == []
    assert "critic's turn only" in tread_notices(tread, DmdConfig())[0]
    assert "no effect: this distillation_method has no plain" in tread_notices(tread, DistillationOptions())[0]
    assert tread_notices(tread, StudentRoutes()) == []
    nothing = TreadConfig(routes=[TreadRoute(**route(ratio=0))])
    assert "every selection_ratio is 0" in tread_notices(nothing, None)[0]
    assert tread_notices(None, DmdConfig()) == tread_notices(TreadConfig(), DmdConfig()) == []


def test_the_roles_that_are_routed() -> None:
    assert routed_roles(None) == ["student"]
    assert routed_roles(DmdConfig()) == ["critic"]
    assert routed_roles(DistillationOptions()) == []
    assert routed_roles(StudentRoutes()) == ["student", "detail"]


def test_the_notice_is_part_of_the_start(tmp_path: Path) -> None:
    run = loaded(tmp_path, {"distillation_method": "dmd", "tread_config": {"routes": [route()]}})
    assert any("tread_config acts on the critic's turn only" in notice for notice in run.notices)
