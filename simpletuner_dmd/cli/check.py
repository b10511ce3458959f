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

if TYPE_CHECKING:
    from simpletuner_dmd.config import LoadedConfig, Problem
    from simpletuner_dmd.data.plan import DataPlan

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document: ok, problems, data, cache, notices"
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if the run could start, with warnings or without; 2 if it could not."""
    from simpletuner_dmd.config import UserError

    if not args.json:
        loaded = load_config(args)
        problems, scans = examine(loaded)
        _print_report(loaded, scans)
        if problems:
            raise UserError(problems)
        print("\nReady to train.")
        return 0

    document: dict[str, Any] = {"ok": False, "problems": [], "data": [], "cache": {}, "notices": []}
    with redirect_stdout(sys.stderr):  # nothing but the document goes to stdout
        try:
            loaded = load_config(args)
            document["notices"] = loaded.notices
            problems, scans = examine(loaded)
            if scans:
                plan, same, cost = _data_facts(loaded, scans)
                document["data"], document["cache"] = as_json(scans, plan, same), cost
                document["notices"] = [*loaded.notices, *plan.notices()]
            document["problems"] = [problem.as_dict() for problem in problems]
            document["ok"] = not problems
        except UserError as error:
            document["problems"] = [problem.as_dict() for problem in error.problems]
    print(json.dumps(document, indent=2, ensure_ascii=False))
    return 0 if document["ok"] else 2


def examine(loaded: LoadedConfig) -> tuple[list[Problem], list[Any]]:
    """What stands in the way of this run, and the scan of every dataset that can be reached."""
    from simpletuner_dmd.config import UserError
    from simpletuner_dmd.data.prepare import look_at_dataset
    from simpletuner_dmd.wan.sources import borrowed

    loaded.notices += borrowed(loaded.config)
    problems = [*model_problems(loaded), *output_problems(loaded)]
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


def _data_facts(loaded: LoadedConfig, scans: list[Any]) -> tuple[DataPlan, list[list[str]], dict[str, Any]]:
    from simpletuner_dmd.data.plan import DataPlan

    return DataPlan.of(scans, loaded.config), duplicates(scans), cache_estimate(loaded, scans)


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
    return problems


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
    from simpletuner_dmd.config.read import read_json
    from simpletuner_dmd.config.tread import depth_of

    config, file = loaded.config, folder / "config.json"
    found: list[Problem] = []
    if not file.is_file():
        return found
    depth = depth_of(read_json(file, str(file)))
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


def _print_report(loaded: LoadedConfig, scans: list[Any]) -> None:
    print(f"Configuration: {loaded.path}")
    for line in loaded.differences_from_defaults():
        print(f"  {line}")
    if scans:
        print_data(scans, *_data_facts(loaded, scans))
    if loaded.notices:
        print("\nGood to know:")
        for notice in loaded.notices:
            print(f"  - {notice}")
