"""Hub and webhook: against real sockets on loopback; a failure is a warning and nothing else."""

import inspect
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from simpletuner_dmd.publish.hub import HubUploader, check_access, push_command
from simpletuner_dmd.publish.webhook import Webhook


@pytest.fixture
def server():
    """Answers every request with `status`; keeps (path, headers, body)."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.server.requests.append((self.path, dict(self.headers), body))
            self.send_response(self.server.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST = do_PUT = answer  # noqa: N815 - the names http.server looks for

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.requests, httpd.status = [], 200
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def test_raw_webhook(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hook = Webhook.from_config({"callback_url": f"{server.url}/hook", "webhook_type": "raw"}, "run")
    hook.send("saved with hf_secret", event="checkpoint", step=200, note="hf_secret")
    assert hook.close()
    path, headers, body = server.requests[0]
    assert path == "/hook"
    assert headers["Content-Type"] == "application/json"
    assert json.loads(body) == {"event": "checkpoint", "run": "run", "message": "saved with ***", "step": 200,
                                "note": "***"}  # fmt: skip


def test_discord_webhook_from_a_file(server, tmp_path):
    config = tmp_path / "webhook.json"
    config.write_text(json.dumps({"webhook_url": f"{server.url}/api", "message_prefix": "me"}))
    hook = Webhook.from_config(str(config), "run")
    hook.send("step 1 @everyone " + "x" * 3000)
    assert hook.close()
    payload = json.loads(server.requests[0][2])
    assert payload["content"].startswith("`(me)` step 1")
    assert len(payload["content"]) == 2000
    assert payload["allowed_mentions"] == {"parse": []}


@pytest.mark.parametrize(
    ("content", "word"),
    [(None, "does not exist"), ("{", "cannot be used"), ("[1]", "cannot be used"), ("{}", "http or https"),
     ('{"webhook_url": "ftp://secret-token@host"}', "http or https")],
)  # fmt: skip
def test_an_unusable_config_is_one_warning(tmp_path, caplog, content, word):
    path = tmp_path / "webhook.json"
    if content is not None:
        path.write_text(content)
    hook = Webhook.from_config(str(path), "run")
    hook.send("nothing happens")
    assert hook.close()
    assert len(caplog.records) == 1
    assert word in caplog.text
    assert "secret" not in caplog.text


def test_no_config_is_silent(caplog):
    Webhook.from_config(None, "run").send("nothing happens")
    assert not caplog.records


@pytest.mark.parametrize("case", ["status", "refused"])
def test_a_failing_webhook_warns_without_its_address(server, caplog, case):
    server.status = 500
    url = f"{server.url}/secret-path" if case == "status" else "http://127.0.0.1:1/secret-path"
    hook = Webhook.from_config({"webhook_url": url}, "run")
    hook.send("hello")
    assert hook.close()
    assert hook.failures and "127.0.0.1" in hook.failures[0]
    assert "secret-path" not in caplog.text


@pytest.fixture
def no_offline(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_offline")
@pytest.mark.parametrize("case", ["status", "refused"])
def test_a_failing_hub_warns_with_the_command(server, tmp_path, caplog, case):
    server.status = 401
    (tmp_path / "README.md").write_text("hello")
    uploader = HubUploader(
        "me/it", token="hf_secret", endpoint=server.url if case == "status" else "http://127.0.0.1:1"
    )
    with caplog.at_level(logging.WARNING):
        uploader.upload(tmp_path)
        assert uploader.close(60)
    assert not uploader.uploaded
    assert push_command("me/it", tmp_path) in uploader.failures[0]
    assert "hf_secret" not in caplog.text


def test_offline_is_respected(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    uploader = HubUploader("me/it", token="x", endpoint=server.url)
    uploader.upload(tmp_path)
    assert uploader.close(5)
    assert "HF_HUB_OFFLINE" in uploader.failures[0]
    assert not server.requests


@pytest.mark.usefixtures("no_offline")
def test_access_is_judged_at_start(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "hub_model_id" in check_access(None, "export")
    assert "hf upload me/it 'my export'" in check_access("me/it", "my export")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    assert check_access("me/it", "export") is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in check_access("me/it", "export")


@pytest.mark.usefixtures("no_offline")
def test_a_hub_that_hangs_does_not_hold_the_run(tmp_path):
    import socket

    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        uploader = HubUploader("me/it", token="x", endpoint=f"http://127.0.0.1:{deaf.getsockname()[1]}")
        uploader.upload(tmp_path)
        assert uploader.close(0.2) is False


@pytest.mark.usefixtures("no_offline")
def test_uploads_run_in_order_with_calls_the_library_knows(tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    calls = []

    def recorder(name):
        signature = inspect.signature(getattr(HfApi, name))
        return lambda self, *args, **words: calls.append((name, signature.bind(self, *args, **words).arguments))

    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(HfApi, name, recorder(name))
    uploader = HubUploader("me/it", token="x")
    uploader.upload(tmp_path, path_in_repo="first")
    uploader.upload(tmp_path, path_in_repo="second")
    assert uploader.close(30)
    assert [name for name, _ in calls] == ["create_repo", "upload_folder"] * 2
    assert calls[0][1]["private"] is True
    assert [words["path_in_repo"] for name, words in calls if name == "upload_folder"] == ["first", "second"]
    assert uploader.uploaded == [tmp_path] * 2
    assert not uploader.failures
