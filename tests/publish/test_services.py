"""The webhook, against real sockets on loopback; a failure is a warning and nothing else."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from simpletuner_dmd.publish.webhook import Endpoint, Webhook


@pytest.fixture
def server():
    """Answers every request with `status`; keeps (path, headers, body)."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.server.requests.append((self.path, dict(self.headers), body))
            following = self.server.statuses.pop(0) if self.server.statuses else self.server.status
            self.send_response(following)
            if following == 429:
                self.send_header("Retry-After", "0.05")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST = do_PUT = answer  # noqa: N815 - the names http.server looks for

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.requests, httpd.status, httpd.statuses = [], 200, []
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
     ('{"webhook_url": "ftp://secret-token@host"}', "http or https"),
     ('{"webhook_url": "http://host", "colour": 1}', "unknown: colour"),
     ('{"webhook_url": "http://host", "log_level": "loud"}', "log_level")],
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


def test_what_fails_for_a_moment_is_sent_again_in_order(server):
    server.statuses = [500, 429, 502]
    hook = Webhook([Endpoint(f"{server.url}/hook", "raw", "run")], waits=(0.01, 0.01, 0.01))
    hook.send("first", step=1)
    hook.send("second", step=2)
    while len(server.requests) < 5:
        time.sleep(0.01)
    assert hook.close() and not hook.failures
    assert [json.loads(body)["step"] for _, _, body in server.requests] == [1, 1, 1, 1, 2]


def test_what_is_refused_is_not_sent_again(server):
    server.status = 404
    hook = Webhook([Endpoint(f"{server.url}/hook", "raw", "run")], waits=(0.01,))
    hook.send("hello")
    assert hook.close()
    assert len(server.requests) == len(hook.failures) == 1


def test_one_dead_endpoint_does_not_hold_up_the_others_nor_the_end(server):
    server.statuses = [500]
    dead = Endpoint("http://127.0.0.1:1/secret", "raw", "run")
    hook = Webhook([dead, Endpoint(f"{server.url}/hook", "raw", "run")], waits=(60.0,))
    server.statuses = []
    began = time.monotonic()
    hook.send("hello")
    while not server.requests:
        time.sleep(0.01)
    assert hook.close()
    assert time.monotonic() - began < 10
    assert len(hook.failures) == 1


def test_log_level_error_hears_of_errors_only(server):
    hook = Webhook.from_config({"callback_url": f"{server.url}/hook", "log_level": "error", "auth_token": "k"}, "run")
    hook.send("a checkpoint", event="checkpoint")
    hook.send("it broke", event="error")
    assert hook.close()
    assert [json.loads(body)["message"] for _, _, body in server.requests] == ["it broke"]
    assert server.requests[0][1]["X-Api-Key"] == "k" or server.requests[0][1].get("X-API-Key") == "k"
