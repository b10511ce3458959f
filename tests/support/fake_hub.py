"""The part of the Hugging Face Hub's API that uploads and downloads speak, on loopback: a real server, real sockets.

What it keeps is in memory: repositories with their files and commits, and the LFS objects that have arrived. `fail`
makes requests go wrong on purpose.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LFS = (".safetensors", ".mp4", ".bin")
WRITE, READ = "hf_write", "hf_read"
USER = "someone"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class Failure:
    """times: how many more requests to a path with this in it go wrong; how: an HTTP status, or "drop"."""

    pattern: str
    how: int | str
    times: int
    method: str


class FakeHub(ThreadingHTTPServer):
    """tokens: `WRITE` may do everything to repositories of `USER`, `READ` may only look."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.failures: list[Failure] = []
        self.on_put: Callable[[], None] | None = None
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is killed, or whose connection was dropped on purpose, is no news."""

    def fail(self, pattern: str, how: int | str, times: int = 1, method: str = "") -> None:
        self.failures.append(Failure(pattern, how, times, method))

    def count(self, method: str, pattern: str) -> int:
        return sum(found == method and re.search(pattern, path) is not None for found, path in self.requests)

    def failure(self, method: str, path: str) -> int | str | None:
        with self.lock:
            for failure in self.failures:
                if failure.times > 0 and re.search(failure.pattern, path) and failure.method in ("", method):
                    failure.times -= 1
                    return failure.how
        return None


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    server = FakeHub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def _any(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append((self.command, path))
        length, how = int(self.headers.get("Content-Length") or 0), self.server.failure(self.command, path)
        if how == "drop":  # in the middle of what the client sends
            self.rfile.read(min(length, 1000))
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        if isinstance(how, int):
            self._json(how, {"error": "planted"})
            return
        for pattern, method in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method[0] == self.command:
                method[1](self, body, *found.groups())
                return
        self._json(404, {"error": f"no such thing: {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = _any  # noqa: N815 - the names http.server looks for

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _json(self, status: int, document: Any) -> None:
        self._bytes(status, json.dumps(document).encode(), "application/json")

    def _bytes(self, status: int, content: bytes, kind: str, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _may_write(self, name: str) -> bool:
        if self.token == WRITE and name.startswith(f"{USER}/"):
            return True
        self._json(401 if self.token not in (WRITE, READ) else 403, {"error": "forbidden"})
        return False

    # --- the answers --------------------------------------------------------------------------------------------------

    def whoami(self, body: bytes) -> None:
        if self.token not in (WRITE, READ):
            self._json(401, {"error": "Invalid credentials"})
            return
        role = "write" if self.token == WRITE else "read"
        self._json(200, {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if not self._may_write(name):
            return
        if name in self.server.repositories:
            self._json(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"})
            return
        self.server.repositories[name] = Repository(
            wanted.get("visibility") == "private" or bool(wanted.get("private"))
        )
        self._json(200, {"url": f"{self.server.url}/{name}", "name": name})

    def auth_write(self, body: bytes, name: str) -> None:
        if self._may_write(name):
            self._json(200, {})

    def info(self, body: bytes, name: str, *_: str) -> None:
        repository = self.server.repositories.get(name)
        if repository is None:
            self._json(404, {"error": "Repository not found"})
            return
        siblings = [{"rfilename": file} for file in repository.files]
        self._json(200, {"id": name, "private": repository.private, "sha": "0" * 40, "siblings": siblings,
                         "tags": [], "downloads": 0, "likes": 0})  # fmt: skip

    def validate(self, body: bytes) -> None:
        self._json(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str) -> None:
        if not self._may_write(name):
            return
        files = [{"path": file["path"], "shouldIgnore": False,
                  "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular"}
                 for file in json.loads(body)["files"]]  # fmt: skip
        self._json(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        if not self._may_write(name):
            return
        objects: list[dict[str, Any]] = []
        for wanted in json.loads(body)["objects"]:
            found = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.objects:  # what is there needs no upload
                found["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}", "header": {}},
                                    "verify": {"href": f"{self.server.url}/verify"}}  # fmt: skip
            objects.append(found)
        self._json(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._json(400, {"error": "not the bytes that were announced"})
            return
        self.server.objects[oid] = body
        self._json(200, {})
        if self.server.on_put is not None:
            self.server.on_put()

    def verify(self, body: bytes) -> None:
        wanted = json.loads(body)
        there = len(self.server.objects.get(wanted["oid"], b"")) == wanted["size"]
        self._json(200 if there else 404, {})

    def commit(self, body: bytes, name: str) -> None:
        if not self._may_write(name):
            return
        rows = [json.loads(line) for line in body.splitlines() if line.strip()]
        repository, changes = self.server.repositories[name], {}
        for row in rows:
            value = row["value"]
            if row["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                changes[value["path"]] = self.server.objects[value["oid"]]
        repository.files |= changes
        repository.commits.append(rows[0]["value"]["summary"])
        url = f"{self.server.url}/{name}/commit/{len(repository.commits):040d}"
        self._json(200, {"commitUrl": url, "commitOid": f"{len(repository.commits):040d}", "success": True})

    def tree(self, body: bytes, name: str) -> None:
        files = self.server.repositories[name].files
        self._json(200, [{"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
                         for path, content in sorted(files.items())])  # fmt: skip

    def resolve(self, body: bytes, name: str, path: str) -> None:
        repository = self.server.repositories.get(name)
        if repository is None or path not in repository.files:
            self._bytes(404, b"", "text/plain", X_Error_Code="EntryNotFound")
            return
        content = repository.files[path]
        self._bytes(200, content, "application/octet-stream", X_Repo_Commit="0" * 40,
                    ETag=hashlib.sha256(content).hexdigest())  # fmt: skip


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, tuple[str, Callable[..., None]]]] = [
    (r"/api/whoami-v2", ("GET", _Handler.whoami)),
    (r"/api/repos/create", ("POST", _Handler.create)),
    (rf"/api/models/{_NAME}/auth-check/write", ("GET", _Handler.auth_write)),
    (rf"/api/models/{_NAME}/preupload/main", ("POST", _Handler.preupload)),
    (rf"/api/models/{_NAME}/commit/main", ("POST", _Handler.commit)),
    (rf"/api/models/{_NAME}/tree/\w+", ("GET", _Handler.tree)),
    (rf"/api/models/{_NAME}(/revision/\w+)?", ("GET", _Handler.info)),
    (r"/api/validate-yaml", ("POST", _Handler.validate)),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", ("POST", _Handler.batch)),
    (r"/lfs/(\w+)", ("PUT", _Handler.put)),
    (r"/verify", ("POST", _Handler.verify)),
    (rf"/{_NAME}/resolve/\w+/(.+)", ("GET", _Handler.resolve)),
    (rf"/{_NAME}/resolve/\w+/(.+)", ("HEAD", _Handler.resolve)),
]
