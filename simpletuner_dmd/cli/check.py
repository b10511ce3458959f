"""`simpletuner check`: says what would go wrong before any weight is loaded."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner_dmd.cli.common import add_config_arguments, load_config

if TYPE_CHECKING:
    from simpletuner_dmd.config import LoadedConfig, Problem

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
SHOWN_REJECTIONS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document: ok, problems, data, notices")


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

    document: dict[str, Any] = {"ok": False, "problems": [], "data": [], "notices": []}
    with redirect_stdout(sys.stderr):  # nothing but the document goes to stdout
        try:
            loaded = load_config(args)
            document["notices"] = loaded.notices
            problems, scans = examine(loaded)
            document["data"] = [scan_as_dict(scan) for scan in scans]
            document["problems"] = [problem.as_dict() for problem in problems]
            document["ok"] = not problems
        except UserError as error:
            document["problems"] = [problem.as_dict() for problem in error.problems]
    print(json.dumps(document, indent=2, ensure_ascii=False))
    return 0 if document["ok"] else 2


def examine(loaded: LoadedConfig) -> tuple[list[Problem], list[Any]]:
    """What stands in the way of this run, and the scan of every dataset whose folder is there."""
    from simpletuner_dmd.config import UserError
    from simpletuner_dmd.data.prepare import scan_datasets

    problems = [*model_problems(loaded), *output_problems(loaded)]
    present = []
    for entry in loaded.datasets:
        missing = folder_problem(entry, loaded.config)
        if missing:
            problems.append(missing)
        else:
            present.append(entry)
    scans: list[Any] = []
    try:
        scans = scan_datasets(present, loaded.config)
        problems += [problem for scan in scans if (problem := nothing_usable(scan))]
    except UserError as error:
        problems += error.problems
    return problems, scans


def folder_problem(entry: Any, config: Any) -> Problem | None:
    """A dataset whose folder is missing or empty, and that has no cache to stand in for it."""
    from simpletuner_dmd.config import Problem
    from simpletuner_dmd.data.manifest import stands_in

    folder = Path(entry.instance_data_dir)
    where = f'dataset "{entry.id}"'
    if stands_in(entry, config) is not None:
        return None
    if not folder.exists():
        return Problem(where, "instance_data_dir", f"there is no {folder}", "correct the path, or put the files there")
    if folder.is_file():
        if entry.dataset_type == "prompts":
            return None
        return Problem(where, "instance_data_dir", f"{folder} is a file, not a folder", "name the folder it is in")
    if not any(folder.iterdir()):
        return Problem(where, "instance_data_dir", f"{folder} is empty", "put the files there")
    return None


def nothing_usable(scan: Any) -> Problem | None:
    """A dataset of which no sample can be used."""
    from simpletuner_dmd.config import Problem

    if scan.usable:
        return None
    reasons = "; ".join(f"{Path(bad.path).name}: {bad.reason}" for bad in scan.rejected[:5])
    more = f"; and {len(scan.rejected) - 5} more" if len(scan.rejected) > 5 else ""
    found = f"{scan.entry.instance_data_dir} has no usable sample"
    return Problem(
        f'dataset "{scan.entry.id}"', "instance_data_dir", found + (f" ({reasons}{more})" if reasons else ""),
        "check the files, and minimum_image_size, video.num_frames and video.min_frames of this dataset",
    )  # fmt: skip


def model_problems(loaded: LoadedConfig) -> list[Problem]:
    """Local model folders that lack a part. Reads file names only; Hub ids are not looked up."""
    from simpletuner_dmd.config import Problem

    config, problems = loaded.config, []
    overrides = {
        "transformer": ("pretrained_transformer_model_name_or_path", config.pretrained_transformer_model_name_or_path),
        "vae": ("pretrained_vae_model_name_or_path", config.pretrained_vae_model_name_or_path),
        "text_encoder": ("pretrained_t5_model_name_or_path", config.pretrained_t5_model_name_or_path),
        "tokenizer": ("pretrained_t5_model_name_or_path", config.pretrained_t5_model_name_or_path),
    }
    for part in PARTS:
        key, value = "pretrained_model_name_or_path", config.pretrained_model_name_or_path
        if part in overrides and overrides[part][1] is not None:
            key, value = overrides[part][0], str(overrides[part][1])
        folder = Path(value)
        if not folder.is_dir():
            continue
        subfolder = "transformer_2" if part == "transformer" and config.model_flavour.endswith("-low") else part
        # A part named on its own may be that part's folder itself.
        own_folder = key != "pretrained_model_name_or_path" and (folder / "config.json").is_file()
        if not own_folder and not any((folder / subfolder).glob("*.json")):
            problems.append(
                Problem(loaded.origins.get(key, ""), key, f"{folder} has no {subfolder}: "
                        f"a diffusers pipeline folder has {', '.join(PARTS)}",
                        "name a whole pipeline folder or a Hub id")
            )  # fmt: skip
    return problems


def output_problems(loaded: LoadedConfig) -> list[Problem]:
    """Folders the run must write to and cannot. Probes with a temporary folder, because permissions alone can lie."""
    from simpletuner_dmd.config import Problem

    config, problems = loaded.config, []
    places = [("output_dir", config.output_dir), ("cache_dir_text", str(loaded.text_cache_dir))]
    places += [
        ("cache_dir_vae", str(entry.cache_dir_vae)) for entry in loaded.datasets if entry.dataset_type == "video"
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


def scan_as_dict(scan: Any) -> dict[str, Any]:
    return {
        "id": scan.entry.id,
        "dataset_type": scan.entry.dataset_type,
        "folder": scan.entry.instance_data_dir,
        "usable": len(scan.usable),
        "rejected": [{"path": str(bad.path), "reason": bad.reason} for bad in scan.rejected],
        "buckets": {str(name): count for name, count in scan.buckets.items()},
    }


def _print_report(loaded: LoadedConfig, scans: Iterable[Any]) -> None:
    print(f"Configuration: {loaded.path}")
    for line in loaded.differences_from_defaults():
        print(f"  {line}")
    rows = [("dataset", "usable", "left out", "shapes")]
    rejected: list[Any] = []
    for scan in scans:
        shapes = ", ".join(f"{name}: {count}" for name, count in scan.buckets.items())
        rows.append((scan.entry.id, str(len(scan.usable)), str(len(scan.rejected)), shapes))
        rejected += scan.rejected
    if len(rows) > 1:
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        print("\nData:")
        for name, usable, left_out, shapes in rows:
            print(f"  {name:<{widths[0]}}  {usable:>{widths[1]}}  {left_out:>{widths[2]}}  {shapes}".rstrip())
    if rejected:
        print("\nLeft out:")
        for bad in rejected[:SHOWN_REJECTIONS]:
            print(f"  {bad.path}: {bad.reason}")
        if len(rejected) > SHOWN_REJECTIONS:
            print(f"  and {len(rejected) - SHOWN_REJECTIONS} more; --json lists all")
    if loaded.notices:
        print("\nGood to know:")
        for notice in loaded.notices:
            print(f"  - {notice}")
