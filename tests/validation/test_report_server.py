"""`simpletuner report`: what the server of a report hands out, to whom, and how the command ends."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from simpletuner_dmd.cli.main import main
from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.validation.report_server import ReportServer

from .fake_run import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("served") / "a run", prompts=1, steps=6, interval=3)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "state.mp4").write_bytes(b"weights")
    (folder / "validation" / "out.mp4").symlink_to(folder / "checkpoints" / "state.mp4")
    return folder


@pytest.fixture(scope="module")
def server(run):
    with ReportServer(run) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(server, path, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer, answer.read()


def test_the_page_is_made_again_when_the_run_has_gone_on(server, run):
    answer, text = ask(server, "/report/")
    assert answer.status == 200
    assert b"live.js" in text
    tag = answer.headers["ETag"]
    assert ask(server, "/report/", If_None_Match=tag)[0].status == 304
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "start"}) + "\n" + json.dumps({"event": "step", "step": 77}) + "\n")
    answer, text = ask(server, "/report/", If_None_Match=tag)
    assert answer.status == 200
    assert b"at step 77" in text
    assert not (run / "report").exists()  # watching writes nothing


def test_assets_and_videos_are_handed_out_whole_and_in_parts(server, run):
    assert ask(server, "/")[0].headers["Location"] == "/report/"
    for name in ("report.css", "report.js", "curves.js", "live.js", "uPlot.iife.min.js"):
        assert ask(server, f"/report/{name}")[0].status == 200
    video = next((run / "validation" / "step-000003").glob("*.mp4"))
    content, path = video.read_bytes(), "/" + video.relative_to(run).as_posix()
    answer, found = ask(server, path)
    assert (answer.headers["Content-Type"], answer.headers["Accept-Ranges"], found) == ("video/mp4", "bytes", content)
    for wanted, expected in {"bytes=0-": content, "bytes=10-19": content[10:20], "bytes=-5": content[-5:],
                             "bytes=10-99999999": content[10:]}.items():  # fmt: skip
        answer, found = ask(server, path, Range=wanted)
        assert (answer.status, found) == (206, expected)
    assert answer.headers["Content-Range"] == f"bytes 10-{len(content) - 1}/{len(content)}"
    assert ask(server, path, Range=f"bytes={len(content)}-")[0].status == 416
    answer, found = ask(server, path, "HEAD")
    assert (answer.headers["Content-Length"], found) == (str(len(content)), b"")


@pytest.mark.parametrize(
    "path",
    ["/metrics.jsonl", "/config.resolved.json", "/checkpoints/state.mp4", "/validation/out.mp4",
     "/validation/../checkpoints/state.mp4", "/validation/%2e%2e/checkpoints/state.mp4", "//etc/passwd",
     "/report/../metrics.jsonl", "/validation/", "/validation/missing.mp4"],
)  # fmt: skip
def test_nothing_else_of_the_machine_is_handed_out(server, path):
    assert ask(server, path)[0].status == 404


def test_a_name_of_the_web_that_points_here_gets_nothing(server):
    assert ask(server, "/report/", Host="evil.example")[0].status == 403
    assert ask(server, "/report/", Host=f"localhost:{server.server_port}")[0].status == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "example.org", ""])
def test_only_this_machine_is_served(run, host, capsys):
    assert main(["report", str(run), "--serve", "--host", host, "--port", "0"]) == 2
    said = capsys.readouterr().err
    assert "--host" in said
    assert "ssh -L" in said


def test_a_port_that_is_taken_is_a_sentence(server, run):
    with pytest.raises(UserError, match="--port"):
        ReportServer(run, port=server.server_port)


def test_two_runs_are_served_from_where_they_are(run, tmp_path):
    other = write_run(tmp_path / "other", prompts=1, steps=6, interval=3, export=False)
    with ReportServer(run, other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert ask(server, server.place)[0].status == 200
        video = next((other / "validation" / "step-000003").glob("*.mp4"))
        path = "/" + video.relative_to(server.top).as_posix()
        assert ask(server, path)[1] == video.read_bytes()
        server.shutdown()


def test_ctrl_c_ends_it_cleanly(run):
    command = [sys.executable, "-m", "simpletuner_dmd", "report", str(run), "--serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert "http://127.0.0.1:" in process.stdout.readline()
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "No longer served" in out


def test_the_command_writes_the_page_and_knows_what_is_no_run(tmp_path, capsys):
    run = write_run(tmp_path / "run", prompts=1, steps=6, interval=3)
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report" / "index.html")
    assert main(["report", str(run), "--compare", str(tmp_path)]) == 2
    assert "not the folder of a run" in capsys.readouterr().err
