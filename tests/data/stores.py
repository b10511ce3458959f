"""Servers on loopback for datasets from elsewhere: files over HTTP, and the part of the Hub that is asked."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 39 + "1"


class FileServer:
    """Serves `files` (path -> bytes); counts requests.

    truncate: paths of which half arrives. broken: path -> status.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.asked: Counter[str] = Counter()
        self.sent = 0
        self.truncate: set[str] = set()
        self.broken: dict[str, int] = {}
        self.url = ""

    def answer(self, handler: BaseHTTPRequestHandler, path: str) -> bool:
        """Sends what `path` is; False where there is no such file."""
        content = self.files.get(path)
        if content is None:
            return False
        start, end = 0, len(content)
        status = 200
        if wanted := handler.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end, status = int(first), min(end, int(last) + 1 if last else end), 206
        body = content[start:end]
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.send_header("ETag", f'"{sha1(content).hexdigest()}"')
        handler.send_header("X-Repo-Commit", COMMIT)
        handler.send_header("Accept-Ranges", "bytes")
        if status == 206:
            handler.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        handler.end_headers()
        if handler.command == "HEAD":
            return True
        self.sent += len(body)
        handler.wfile.write(body[: len(body) // 2] if path in self.truncate else body)
        return True

    def send_json(self, handler: BaseHTTPRequestHandler, content: Any) -> None:
        body = json.dumps(content).encode()
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)


Route = Callable[[FileServer, BaseHTTPRequestHandler, str], bool]


@contextmanager
def serving(files: dict[str, bytes], route: Route | None = None) -> Iterator[FileServer]:
    server = FileServer(files)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802 - the name the library calls
            path = unquote(urlsplit(self.path).path)
            server.asked[path] += 1
            if path in server.broken:
                self.send_error(server.broken[path])
            elif not (route and route(server, self, path)) and not server.answer(self, path):
                self.send_error(404)

        do_HEAD = do_GET  # noqa: N815 - the name the library calls
        do_POST = do_GET  # noqa: N815 - the name the library calls

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()


def hub_route(name: str, folder: Path) -> Route:
    """The Hub's answers about one dataset, whose files are those below `folder`."""

    def blob(path: Path) -> dict[str, Any]:
        content = path.read_bytes()
        return {"type": "file", "path": path.relative_to(folder).as_posix(), "size": len(content),
                "oid": sha1(content).hexdigest()}  # fmt: skip

    def route(server: FileServer, handler: BaseHTTPRequestHandler, path: str) -> bool:
        api = f"/api/datasets/{name}"
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        if path.startswith(f"{api}/tree/"):
            server.send_json(handler, [blob(file) for file in files])
            return True
        if path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": blob(file)["path"]} for file in files]
            server.send_json(handler, {"id": name, "sha": COMMIT, "siblings": siblings, "private": False,
                                       "disabled": False, "gated": False, "downloads": 0, "likes": 0,
                                       "tags": []})  # fmt: skip
            return True
        prefix = f"/datasets/{name}/resolve/"
        if path.startswith(prefix):
            file = folder / path.removeprefix(prefix).split("/", 1)[1]
            if file.is_file():
                server.files[path] = file.read_bytes()
        return False

    return route
