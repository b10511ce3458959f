"""`simpletuner report`: the page of a run made anew, of two runs compared, or kept up to date while one trains."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simpletuner_dmd.validation.report_server import ReportServer

PORT = 8321


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="the output folder of a run, for example output/demo")
    parser.add_argument("--compare", metavar="RUN2", type=Path, help="a second run, shown beside the first")
    parser.add_argument(
        "--serve", action="store_true", help="serve the page to this machine and update it while the run trains"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address of --serve; one of this machine's own")
    parser.add_argument("--port", type=int, default=PORT, help=f"port of --serve; 0: any; default {PORT}")


def run(args: argparse.Namespace) -> int:
    """Exit code 0, also after Ctrl-C has ended `--serve`."""
    from simpletuner_dmd.validation.report import build_report

    for folder in filter(None, (args.run, args.compare)):
        _check(folder)
    if not args.serve:
        print(build_report(args.run, args.compare))
        return 0

    from simpletuner_dmd.validation.report_server import ReportServer

    with ReportServer(args.run, args.compare, args.host, args.port) as server:
        _serve(server)
    return 0


def _serve(server: ReportServer) -> None:
    try:
        print(f"{server.url} (Ctrl-C ends)", flush=True)
        server.serve_forever()
    except KeyboardInterrupt:
        print("\nNo longer served.")


def _check(folder: Path) -> None:
    from simpletuner_dmd.config.errors import UserError

    if not any((folder / name).is_file() for name in ("metrics.jsonl", "config.resolved.json")):
        raise UserError(
            "this is not the folder of a run: it has neither metrics.jsonl nor config.resolved.json",
            file=str(folder),
            fix="give the output_dir of a run, for example output/demo",
        )
