"""`simpletuner check`: says what would go wrong before any weight is loaded."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner_dmd.cli.check_data import (
    as_json,
    cache_estimate,
    duplicates,
    folder_problem,
    geometry_of,
    print_data,
)
from simpletuner_dmd.cli.common import add_config_arguments, load_config
from simpletuner_dmd.cli.machine import machine_problems

if TYPE_CHECKING:
    from simpletuner_dmd.config import LoadedConfig, Problem
    from simpletuner_dmd.data.plan import DataPlan
    from simpletuner_dmd.wan.plan import Plan

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "--json", action="store_true",
        help="print one JSON document: ok, problems, data, cache, memory, disk, time, notices",
    )  # fmt: skip
    parser.add_argument(
        "--card", metavar="NAME", help="plan for a GPU of this name (rtx-4090, h100, ...) or of so many GB; a run that "
        "does not fit on it is then a mistake, exit code 2",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if the run could start, with warnings or without; 2 if it could not."""
    from simpletuner_dmd.config import UserError

    if not args.json:
        report(load_config(args), card=args.card)
        return 0

    document: dict[str, Any] = {"ok": False, "problems": [], "data": [], "cache": {}, "memory": {}, "disk": {},
                                "time": {}, "notices": []}  # fmt: skip
    with redirect_stdout(sys.stderr):  # nothing but the document goes to stdout
        try:
            loaded = load_config(args)
            document["notices"] = loaded.notices
            problems, scans = examine(loaded)
            cost = cache_estimate(loaded, scans) if scans else {}
            if scans:
                data_plan, same = _data_facts(loaded, scans)
                document["data"], document["cache"] = as_json(scans, data_plan, same), cost
                document["notices"] = [*loaded.notices, *data_plan.notices()]
            if not _about_the_model(problems):
                plan, limit, named = plan_of(loaded, scans, cost, args.card)
                document |= plan.as_dict(limit)
                verdict = plan.verdict(limit)
                problems += [_too_large(args.card, verdict)] if verdict and named else []
                document["notices"] = [*document["notices"], *([verdict] if verdict else [])]
            document["problems"] = [problem.as_dict() for problem in problems]
            document["ok"] = not problems
        except UserError as error:
            document["problems"] = [problem.as_dict() for problem in error.problems]
    print(json.dumps(document, indent=2, ensure_ascii=False))
    return 0 if document["ok"] else 2


def report(loaded: LoadedConfig, card: str | None = None, differences: bool = True) -> None:
    """Prints what `check` finds, the plan, and how the run differs from the defaults.

    Raises UserError if the run could not start, or does not fit on `card`.
    """
    from simpletuner_dmd.config import UserError

    problems, scans = examine(loaded)
    cost = cache_estimate(loaded, scans) if scans else {}
    _print_report(loaded, scans, cost, differences)
    problems += _print_plan(loaded, scans, cost, card) if not _about_the_model(problems) else []
    if problems:
        raise UserError(problems)
    print("\nReady to train.")


def examine(loaded: LoadedConfig) -> tuple[list[Problem], list[Any]]:
    """What stands in the way of this run, and the scan of every dataset that can be reached."""
    from simpletuner_dmd.config import UserError
    from simpletuner_dmd.data.prepare import look_at_dataset
    from simpletuner_dmd.wan.sources import borrowed

    loaded.notices += borrowed(loaded.config)
    problems = [*machine_problems(loaded), *model_problems(loaded), *output_problems(loaded)]
    scans: list[Any] = []
    for entry in loaded.datasets:
        missing = folder_problem(entry, loaded.config)
        if missing:
            problems.append(missing)
            continue
        try:
            scans.append(look_at_dataset(entry, loaded.config, geometry_of(loaded)))
        except UserError as error:
            problems += error.problems
    return problems + [problem for scan in scans if (problem := nothing_usable(scan))], scans


def _data_facts(loaded: LoadedConfig, scans: list[Any]) -> tuple[DataPlan, list[list[str]]]:
    from simpletuner_dmd.data.plan import DataPlan

    return DataPlan.of(scans, loaded.config), duplicates(scans)


def plan_of(loaded: LoadedConfig, scans: list[Any], cost: dict[str, Any], card: str | None) -> tuple[Plan, int, bool]:
    """The plan, the bytes that limit it, and whether a person named that limit."""
    from simpletuner_dmd.cli.capacity import named_card, this_machine
    from simpletuner_dmd.cli.planning import make_plan

    machine = named_card(card) if card else this_machine(loaded.config.mixed_precision)
    caches = int(cost.get("text_bytes", 0) + cost.get("latent_bytes", 0))
    return make_plan(loaded, machine, scans=scans, caches=caches), machine.memory, machine.named


def _print_plan(loaded: LoadedConfig, scans: list[Any], cost: dict[str, Any], card: str | None) -> list[Problem]:
    """Prints it. What does not fit on a card that was named is a problem; on this machine, a warning: the run may be
    meant for another one, and the plan is an estimate."""
    plan, limit, named = plan_of(loaded, scans, cost, card)
    print("\n" + "\n".join(plan.lines()))
    verdict = plan.verdict(limit)
    if verdict is None:
        return []
    if named:
        return [_too_large(card, verdict)]
    print(f"\nWarning: {verdict}")
    return []


def _too_large(card: str | None, verdict: str) -> Problem:
    from simpletuner_dmd.config import Problem

    return Problem("command line", "--card", f"{card}: {verdict}", "change the settings, or choose a larger card")


def _about_the_model(problems: list[Problem]) -> bool:
    """Without a model that can be read there is nothing to plan."""
    return any(problem.key.startswith(("pretrained", "distillation_config", "tread")) for problem in problems)


def nothing_usable(scan: Any) -> Problem | None:
    """A dataset of which no sample can be used."""
    from simpletuner_dmd.config import Problem

    if scan.usable:
        return None
    reasons = "; ".join(f"{Path(bad.path).name}: {bad.reason}" for bad in scan.rejected[:5])
    more = f"; and {len(scan.rejected) - 5} more" if len(scan.rejected) > 5 else ""
    found = f"{scan.settings.folder} has no usable sample"
    return Problem(
        f'dataset "{scan.entry.id}"', "instance_data_dir", found + (f" ({reasons}{more})" if reasons else ""),
        "check the files, and minimum_image_size, video.num_frames and video.min_frames of this dataset",
    )  # fmt: skip


def model_problems(loaded: LoadedConfig) -> list[Problem]:
    """Local models that lack a part or do not fit a setting, and precisions that cannot be had on this machine.

    Hub ids are not looked up.
    """
    from simpletuner_dmd.config import Problem
    from simpletuner_dmd.config.run_options import is_weight_file
    from simpletuner_dmd.wan.sources import BASE_KEY, KEYS, ModelSource

    config, source = loaded.config, ModelSource.of(loaded.config)
    problems = precision_problems(loaded)
    for part in PARTS:
        key = KEYS.get("text_encoder" if part == "tokenizer" else part, BASE_KEY)
        key = key if key != BASE_KEY and getattr(config, key) is not None else BASE_KEY
        if part in KEYS and is_weight_file(getattr(source, part)):
            continue  # what is in it is looked at when it is loaded
        folder = source.folder(part)
        if folder is not None and not any(folder.glob("*.json")):
            problems.append(
                Problem(loaded.origins.get(key, ""), key, f"{folder.parent} has no {folder.name}: "
                        f"a diffusers pipeline folder has {', '.join(PARTS)}",
                        "name a whole pipeline folder or a Hub id")
            )  # fmt: skip
        elif folder is not None and part == "transformer":
            problems += depth_problems(loaded, folder)
    return problems + ([] if _about_the_model(problems) else fit_problems(loaded))


def fit_problems(loaded: LoadedConfig) -> list[Problem]:
    """Whether the model's own configs are what model_flavour says; where it is a custom Wan, that is a notice."""
    from simpletuner_dmd.config import UserError
    from simpletuner_dmd.config.read import read_json
    from simpletuner_dmd.wan.fit import ModelConfigs, check_fit
    from simpletuner_dmd.wan.sources import ModelSource

    source = ModelSource.of(loaded.config)
    folders = {part: source.folder(part) for part in ("transformer", "vae", "text_encoder")}
    files = {part: folder / "config.json" for part, folder in folders.items() if folder is not None}
    files["index"] = Path(source.base) / "model_index.json"
    found = {part: read_json(file, str(file)) for part, file in files.items() if file.is_file()}
    if "transformer" not in found:
        return []  # on the Hub: looked at when the run starts
    names = {part: str(files[part]) if part in files else source.config_file(part) for part in (*folders, "index")}
    try:
        line = check_fit(
            loaded.config.flavour,
            ModelConfigs(
                transformer=found["transformer"],
                vae=found.get("vae", {}),
                text_encoder=found.get("text_encoder", {}),
                index=found.get("index", {}),
                names=names,
            ),
        )
    except UserError as error:
        return error.problems
    loaded.notices += [line] if line else []
    return []


def precision_problems(loaded: LoadedConfig) -> list[Problem]:
    """Quantised precisions whose library is absent, or cannot run on this machine."""
    config = loaded.config
    chosen = {key: getattr(config, key) for key in ("base_model_precision", "text_encoder_1_precision")}
    if set(chosen.values()) == {"no_change"}:
        return []
    import torch

    from simpletuner_dmd.wan.schemes import scheme_problem

    device = torch.device("cuda" if torch.cuda.is_available() and config.quantize_via == "accelerator" else "cpu")
    found = [scheme_problem(precision, device, key) for key, precision in chosen.items()]
    return [replace(problem, file=loaded.origins.get(problem.key, "")) for problem in found if problem is not None]


def depth_problems(loaded: LoadedConfig, folder: Path) -> list[Problem]:
    """Blocks in `tread_config` and in the method's settings that the transformer in this folder does not have."""
    from simpletuner_dmd.config.memory_rules import depth_problems as swap_problems
    from simpletuner_dmd.config.read import read_json
    from simpletuner_dmd.config.tread import depth_of

    config, file = loaded.config, folder / "config.json"
    found: list[Problem] = []
    if not file.is_file():
        return found
    depth = depth_of(read_json(file, str(file)))
    found += [replace(problem, file=loaded.origins.get(problem.key, "")) for problem in swap_problems(config, depth)]
    if config.tread_config is not None:
        found += config.tread_config.depth_problems(depth, loaded.origins.get("tread_config", ""))
    if config.distillation_config is not None:
        place = loaded.origins.get("distillation_config.gan_blocks", "")
        found += config.distillation_config.depth_problems(depth, place)
    return found


def output_problems(loaded: LoadedConfig) -> list[Problem]:
    """Folders the run must write to and cannot. Probes with a temporary folder, because permissions alone can lie."""
    from simpletuner_dmd.config import Problem

    config, problems = loaded.config, []
    places = [("output_dir", config.output_dir), ("cache_dir_text", str(loaded.text_cache_dir))]
    quantised = {config.base_model_precision, config.text_encoder_1_precision} != {"no_change"}
    if quantised and config.cache_dir_models.lower() != "none":
        places.append(("cache_dir_models", config.cache_dir_models))
    places += [
        ("cache_dir_vae", str(entry.cache_dir_vae))
        for entry in loaded.datasets
        if entry.dataset_type in ("video", "image")
    ]
    for key, written in places:
        folder = Path(written).expanduser().absolute()
        above = next(path for path in (folder, *folder.parents) if path.exists())
        try:
            with tempfile.TemporaryDirectory(dir=above, prefix=".writable-"):
                pass
        except OSError as error:
            reason = "it is a file" if above.is_file() else (error.strerror or str(error)).lower()
            problems.append(
                Problem(loaded.origins.get(key, ""), key, f"cannot write to {folder}: {above}: {reason}",
                        "name a folder you may write to")
            )  # fmt: skip
    return problems


def _print_report(loaded: LoadedConfig, scans: list[Any], cost: dict[str, Any], differences: bool) -> None:
    print(f"Configuration: {loaded.path}")
    for line in loaded.differences_from_defaults() if differences else []:
        print(f"  {line}")
    if scans:
        print_data(scans, *_data_facts(loaded, scans), cost)
    if loaded.notices:
        print("\nGood to know:")
        for notice in loaded.notices:
            print(f"  - {notice}")
