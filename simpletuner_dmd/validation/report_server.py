"""The report of a run that is still training, on this machine's own address: `simpletuner report RUN --serve`.

It writes nothing. A page is made when the files of the run have changed since the last one, and asks again every two
seconds; besides pages, only what lies in the runs' `validation` folders is handed out.
"""

from __future__ import annotations

import os
import re
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.validation.report import ASSETS, FOLDER, asset, page

SOURCES = ("metrics.jsonl", "config.resolved.json", "export/distill.json")
LIVE = "live.js"
CHUNK = 2**18
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".mp4": "video/mp4",
    ".png": "image/png",
}
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class ReportServer(ThreadingHTTPServer):
    """Serves the report of `run`, against `compare` where given. `url` is the address of the page.

    host must be this machine's own (127.0.0.1): settings, prompts and videos are for who sits at it. Raises UserError
    where it is another, or where the port is taken.
    """

    daemon_threads = True

    def __init__(self, run: Path, compare: Path | None = None, host: str = "127.0.0.1", port: int = 0) -> None:
        if not is_loopback(host):
            raise UserError(
                f"the report is served to this machine alone, and {host} is not its own address",
                key="--host",
                fix=f"leave --host out; from another machine: ssh -L {port}:127.0.0.1:{port} this-machine",
            )
        self.run, self.compare = run.resolve(), None if compare is None else compare.resolve()
        self.runs = [self.run] if self.compare is None else [self.run, self.compare]
        self.top = Path(os.path.commonpath(self.runs))
        self.place = "/" + quote((self.run / FOLDER).relative_to(self.top).as_posix()) + "/"
        self._lock = threading.Lock()
        self._made: tuple[str, bytes] = ("", b"")
        try:
            super().__init__((host, port), _Answer)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"{host}:{port} cannot be used: {error}",
                key="--port",
                fix="choose another, or 0 for any that is free",
            ) from None
        self.url = f"http://{host}:{self.server_port}{self.place}"

    def page(self) -> tuple[str, bytes]:
        """(tag, HTML) of the runs as they are now."""
        with self._lock:
            tag = self._tag()
            if self._made[0] != tag:
                script = f'<script src="{LIVE}" data-tag="{tag}"></script>\n</body>'
                self._made = (tag, page(self.run, self.compare).replace("</body>", script).encode())
            return self._made

    def _tag(self) -> str:
        marks = []
        for path in (run / name for run in self.runs for name in SOURCES):
            found = path.stat() if path.is_file() else None
            marks.append("0" if found is None else f"{found.st_size:x}.{found.st_mtime_ns:x}")
        return "-".join(marks)

    def video(self, path: str) -> Path | None:
        """The file that a path of the address means, if it is a picture or video of a validation."""
        file = (self.top / unquote(path).lstrip("/")).resolve()
        inside = any(file.is_relative_to(run / "validation") for run in self.runs)
        return file if inside and file.suffix in (".mp4", ".png") and file.is_file() else None


class _Answer(BaseHTTPRequestHandler):
    server: ReportServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        try:
            self._answer()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # a browser drops a video that it no longer shows

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """A line per request would bury what the terminal is for."""

    def _answer(self) -> None:
        # A page of the web may point a name of its own at 127.0.0.1 and read what it finds there.
        if not is_loopback(urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""):
            self._say(HTTPStatus.FORBIDDEN)
            return
        path = urlsplit(self.path).path
        name = path.removeprefix(self.server.place)
        if path in ("/", self.server.place.rstrip("/")):
            self._say(HTTPStatus.FOUND, Location=self.server.place)
        elif path in (self.server.place, self.server.place + "index.html"):
            self._page()
        elif name in (*ASSETS, LIVE):
            self._send(asset(name).encode(), TYPES[Path(name).suffix])
        elif (file := self.server.video(path)) is not None:
            self._file(file)
        else:
            self._say(HTTPStatus.NOT_FOUND)

    def _page(self) -> None:
        tag, text = self.server.page()
        if self.headers.get("If-None-Match") == f'"{tag}"':
            self._say(HTTPStatus.NOT_MODIFIED)
        else:
            self._send(text, TYPES[".html"], ETag=f'"{tag}"')

    def _say(self, status: HTTPStatus, **headers: str) -> None:
        self._send(b"", TYPES[".txt"], status, **headers)

    def _send(self, content: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK, **headers: str) -> None:
        self._head(status, kind, len(content), **headers)
        if self.command == "GET":
            self.wfile.write(content)

    def _head(self, status: HTTPStatus, kind: str, length: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": kind, "Content-Length": str(length), "Cache-Control": "no-cache",
                             "X-Content-Type-Options": "nosniff"} | headers).items():  # fmt: skip
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def _file(self, path: Path) -> None:
        """Whole, or the part that is asked for: browsers seek in videos by ranges."""
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            span = _span(self.headers.get("Range"), size)
            if span is None:
                self._head(HTTPStatus.OK, TYPES[path.suffix], size, Accept_Ranges="bytes")
                start, length = 0, size
            else:
                start, length = span
                if length <= 0:
                    self._say(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, Content_Range=f"bytes */{size}")
                    return
                self._head(HTTPStatus.PARTIAL_CONTENT, TYPES[path.suffix], length, Accept_Ranges="bytes",
                           Content_Range=f"bytes {start}-{start + length - 1}/{size}")  # fmt: skip
            if self.command == "GET":
                file.seek(start)
                _copy(file, self.wfile, length)


def _span(wanted: str | None, size: int) -> tuple[int, int] | None:
    """(first byte, number of bytes) of a header `Range`; None where there is none that is understood."""
    match = _RANGE.fullmatch(wanted or "")
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match[1], match[2]
    if not first:
        start = max(0, size - int(last))
        return start, size - start
    end = min(int(last), size - 1) if last else size - 1
    return int(first), end - int(first) + 1


def _copy(source: BufferedIOBase, target: BufferedIOBase, length: int) -> None:
    while length > 0 and (chunk := source.read(min(length, CHUNK))):
        target.write(chunk)
        length -= len(chunk)
