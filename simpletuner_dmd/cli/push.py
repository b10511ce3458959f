"""`simpletuner push`: uploads a run's export to the Hub, and what an earlier upload left."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

PATIENCE = 24 * 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the output folder of a run, for example output/demo")
    parser.add_argument("--to", metavar="REPOSITORY", help="`name` or `owner/name`; default: as in the run's settings")
    parser.add_argument("--public", action="store_true", help="a new repository is public; default: as in the settings")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when the Hub has everything, 1 when something is left; raises UserError where it cannot begin."""
    import logging

    from simpletuner_dmd.config import UserError
    from simpletuner_dmd.publish.hub import HubUploader, check_access, point_at_hub

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    folder = Path(args.run)
    options = _options(folder)
    export = folder / "export"
    if not (export / "distill.json").is_file():
        raise UserError(f"{folder} holds no export", fix=f"finish the run, or: simpletuner export {folder}")
    name = args.to or options.get("hub_model_id") or options["tracker_run_name"]
    private = bool(options.get("model_card_private", True)) and not args.public
    access = check_access(name, private=private)
    if not access.usable:
        raise UserError(f"nothing was uploaded: {access.problem}", fix="put that right; the same command then goes on")
    if access.problem:
        print(access.problem)
    uploader = HubUploader(access.repo_id, folder, private=private)
    point_at_hub(export, access.repo_id)
    uploader.resume(besides=[""])
    uploader.upload(export)
    uploader.close(PATIENCE, patient=True)
    for done in uploader.uploaded:
        print(f"uploaded {done} to {access.repo_id}")
    return 1 if uploader.queue.waiting() else 0


def _options(folder: Path) -> dict[str, Any]:
    """The run's options; without torch, which takes seconds to import."""
    import json

    from simpletuner_dmd.cli.common import RESOLVED
    from simpletuner_dmd.config import UserError

    try:
        document = json.loads((folder / RESOLVED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} is not the output folder of a run: it has no {RESOLVED}",
            fix="name the `output_dir` of a run that was started with `simpletuner train`",
        ) from None
    return {key: entry["value"] for key, entry in document.items() if isinstance(entry, dict)}
