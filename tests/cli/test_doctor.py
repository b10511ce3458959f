"""`simpletuner doctor`: one line for each thing a run needs, and what stands in its way."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from simpletuner_dmd.cli import doctor
from simpletuner_dmd.cli.doctor import BAD, NOTE, OK
from simpletuner_dmd.cli.main import main


def test_every_check_answers_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--offline"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ok"]
    found = {finding["name"]: finding for finding in document["findings"]}
    assert list(found) == [
        "python",
        "libraries",
        "device",
        "bf16",
        "int8",
        "attention",
        "memory",
        "disk",
        "video",
        "hub",
    ]
    assert all("\n" not in finding["text"] and finding["text"] for finding in found.values())
    assert found["bf16"]["state"] == found["int8"]["state"] == found["video"]["state"] == OK


def test_what_stands_in_the_way_of_every_run_is_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.version_info", (3, 9, 1))
    assert doctor.python().state == BAD
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "LIBRARIES", ("no-such-library",))
    monkeypatch.setattr(doctor, "examine", lambda offline: iter([doctor.libraries()]))
    assert main(["doctor"]) == 2
    printed = capsys.readouterr().out
    assert "BAD" in printed and "no-such-library" in printed and "pip install" in printed


def test_little_disk_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "LITTLE_DISK", 1e18)
    assert doctor.disk().state == NOTE


class FakeHub(BaseHTTPRequestHandler):
    role = "write"

    def do_GET(self) -> None:
        body = json.dumps({"name": "ann", "type": "user", "auth": {"accessToken": {"role": self.role}}}).encode()
        self.send_response(200 if self.headers["Authorization"] == "Bearer hf_good" else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    from huggingface_hub import constants, hf_api

    server = HTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    for module in (constants, hf_api):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE" if module is constants else "ENDPOINT",
                            False if module is constants else endpoint, raising=False)  # fmt: skip
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    yield FakeHub
    server.shutdown()


@pytest.mark.parametrize(("role", "state"), [("write", OK), ("read", NOTE), ("fineGrained", OK)])
def test_the_token_is_asked_for_what_it_may_do(
    hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch, role: str, state: str
) -> None:
    monkeypatch.setattr(hub, "role", role)
    found = doctor.hub()
    assert found.state == state and found.text.startswith("ann at http://127.0.0.1")


def test_a_token_that_is_refused_and_a_hub_that_is_away(hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, hf_api

    monkeypatch.setenv("HF_TOKEN", "hf_old")
    assert "refuses the token" in doctor.hub().text
    for module in (constants, hf_api):
        monkeypatch.setattr(module, "ENDPOINT", "http://127.0.0.1:9", raising=False)
    assert "cannot be reached" in doctor.hub().text
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "no token" in doctor.hub().text
