"""The report page: what is on it, that it asks nothing of the network, and that odd input does not break it."""

import json
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from simpletuner_dmd.validation import report_charts
from simpletuner_dmd.validation.report import build_report
from simpletuner_dmd.validation.report_charts import charts
from simpletuner_dmd.validation.report_data import read_run, state

from .fake_run import write_run


class Page(HTMLParser):
    """Tags with attributes, the visible text, and which elements were left open."""

    VOID = {"meta", "link", "input", "br", "img"}

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.open, self.data = [], "", [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.data += data
        else:
            self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "demo", prompts=2, steps=60, interval=20)


@pytest.fixture(scope="module")
def page(run_folder):
    return Page(build_report(run_folder))


def test_every_reference_is_a_file_beside_the_page(run_folder, page):
    names = [attrs[key] for _, attrs in page.tags for key in ("src", "href", "poster") if attrs.get(key)]
    local = [name for name in names if not name.startswith(("#", "data:,"))]
    assert len(local) > 8
    for name in local:
        assert (run_folder / "report" / unquote(name)).resolve().is_file(), name
    clips = [
        clip for line in json.loads(page.data)["videos"]["prompts"] for by in line.values() for clip in by.values()
    ]
    assert len(clips) == 2 * (1 + 1 + 4)
    for clip in clips:
        assert (run_folder / "report" / unquote(clip["src"])).resolve().is_file()


def test_nothing_is_asked_of_the_network(run_folder):
    for path in (run_folder / "report").iterdir():
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".html", ".css"):
            assert not re.search(r"(src|href|poster|action)\s*=\s*[\"']?(https?:)?//", text)
            assert not re.search(r"url\(|@import", text)
        assert not re.search(r"\bfetch\(|XMLHttpRequest|WebSocket|sendBeacon|import\(", text)


def test_rows_show_teacher_undistilled_and_student(page):
    videos = page.all("video")
    assert len(videos) == 2 * 3
    for attrs in videos:
        assert {"muted", "playsinline", "controls", "poster", "aria-label"} <= attrs.keys()
        assert (attrs["class"], attrs["preload"]) == ("pixelated", "none")
    assert [a["data-kind"] for a in page.all("figure") if "data-kind" in a][:3] == ["teacher", "undistilled", "student"]
    assert "step-000060" in videos[2]["src"]
    slider = next(attrs for attrs in page.all("input") if attrs["id"] == "step")
    assert (slider["max"], slider["value"]) == ("3", "3")
    assert json.loads(page.data)["videos"]["steps"] == [0, 20, 40, 60]
    assert json.loads(page.data)["videos"]["columns"]["student"]["at"] == [0, 20, 40, 60]


def test_facts_of_the_run_are_on_the_page(page):
    for words in ("finished at step 60", "DMD from", "1000", "757", "522", "DMD loss", "learning_rate",
                  "load_lora_weights", "2.13.0", "1 options at their defaults"):  # fmt: skip
        assert words in page.text
    assert "SECRET" not in page.text


def test_curves_hold_the_logged_numbers(run_folder, page):
    drawn = {chart["title"]: chart for chart in json.loads(page.data)["charts"]}
    assert list(drawn) == [
        "Fake score loss", "DMD loss", "Gradient norm", "Critic gradient norm by module",
        "Student gradient norm by module", "Student over teacher", "Distance from the teacher (score)",
        "Critic loss by noise, q1 the cleanest", "Critic loss over the teacher's, by noise",
        "Way of the critic to the student", "Evaluation loss by noise, q1 the cleanest", "Evaluation loss",
        "Learning rate", "Seconds per step", "Peak memory", "Score gap rms",
    ]  # fmt: skip
    assert drawn["Learning rate"]["labels"] == ["Critic learning rate", "Student learning rate"]
    assert drawn["Student gradient norm by module"]["labels"] == ["Attention", "Feed forward"]
    assert drawn["Critic loss by noise, q1 the cleanest"]["labels"] == ["Q1", "Q2", "Q3", "Q4"]
    assert drawn["Student over teacher"]["x"] == [20, 40, 60]
    logged = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["dmd_loss"] for row in logged if "dmd_loss" in row]
    assert drawn["DMD loss"]["series"] == [losses]
    assert drawn["DMD loss"]["x"] == list(range(3, 61, 3))
    main = page.text.index("Peak memory", page.text.index("Curves")), page.text.index("Score gap rms")
    assert main[0] < main[1]  # what no group names is behind "more"


def test_lights_say_what_is_wrong_worst_first(page):
    lights = [attrs["class"] for attrs in page.all("li") if "light" in attrs.get("class", "")]
    assert lights == ["light red", "light yellow", "light green"]
    assert "Motion is 40% of the teacher's: stop earlier or lower guidance" in page.text
    assert "Value 0.4; green is 0.6 to 1.7." in page.text
    assert "Best checkpoint: step 20." in page.text
    assert any(attrs.get("aria-label") == "step 20 green; step 40 yellow; step 60 yellow" for attrs in page.all("span"))
    assert "health red" in page.text


def test_accessible_names(page):
    assert page.all("html")[0]["lang"] == "en"
    assert all("aria-label" in attrs for attrs in page.all("div") if "data-chart" in attrs)
    assert page.all("meta")[1]["name"] == "viewport"


def write_rows(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_markup_in_prompts_stays_text(tmp_path):
    evil = '</script><script>alert(1)</script><img src=x onerror="alert(2)">$title'
    name = "a\"b'&<i>.mp4"
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / name).write_bytes(b"")
    write_rows(tmp_path, [
        {"event": "validation", "step": 1, "kind": "student", "name": evil, "prompt": evil, "seed": 1, "steps": 3,
         "width": 64, "height": 64, "frames": 9, "file": f"validation/{name}"},
        {"event": "error", "step": 1, "message": evil},
        {"event": "health", "step": 1, "lights": [{"name": evil, "colour": "red", "value": 1, "sentence": evil}]},
    ])  # fmt: skip
    (tmp_path / "config.resolved.json").write_text(json.dumps({evil: {"value": evil, "origin": evil}}))
    page = Page(build_report(tmp_path))
    assert len(page.all("script")) == 4
    assert not page.all("img")
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert "alert(1)" in page.text
    assert page.all("video")[0]["src"] == "../validation/a%22b%27%26%3Ci%3E.mp4"


def test_videos_outside_the_run_are_not_linked(tmp_path):
    (tmp_path / "secret.mp4").write_bytes(b"")
    folder = tmp_path / "run"
    files = ("../secret.mp4", str(tmp_path / "secret.mp4"), "missing.mp4", None, "http://host/x.mp4")
    rows = [{"event": "validation", "step": 1, "kind": "student", "name": "x", "file": file} for file in files]
    write_rows(folder, rows)
    assert "No videos yet" in Page(build_report(folder)).text


@pytest.mark.parametrize("rows", [
    [], [{"event": "start"}], [{"event": "step", "step": 1, "dmd_loss": float("nan")}], [{"step": 3, "loss": 1.0}],
    [{"event": "step", "step": "two"}], [["list"], 3, None], [{"event": "validation"}],
    [{"event": "health", "step": 1}], [{"event": "health", "step": 1, "lights": [3, {"colour": "pink"}, {}]}],
    [{"event": "measures", "step": 1, "kind": "student", "of_teacher": {"motion": None}}],
    [{"event": "critic", "step": 1}],
    [{"event": "step", "step": 1, "lr": None, "note": "text", "grad_norm": float("inf"), "loss": 2}],
])  # fmt: skip
def test_partial_and_odd_runs_make_a_page(tmp_path, rows):
    write_rows(tmp_path, rows)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "st')  # cut off by a crash
    page = Page(build_report(tmp_path))
    assert not page.open
    json.loads(page.data)


def test_an_empty_folder_makes_a_page(tmp_path):
    page = Page(build_report(tmp_path))
    assert "nothing logged yet" in page.text
    (tmp_path / "config.resolved.json").write_text("{")
    assert "config.resolved.json is not there" in Page(build_report(tmp_path)).text


def test_state_follows_the_last_start(tmp_path):
    write_rows(tmp_path, [{"event": "start"}, {"event": "error", "message": "disk full"}])
    assert state(read_run(tmp_path)) == ("failed", "failed at step 0: disk full")
    write_rows(tmp_path, [{"event": "stopped", "step": 4, "reason": "motion is low"}])
    assert state(read_run(tmp_path)) == ("failed", "stopped at step 0: motion is low")
    write_rows(tmp_path, [{"event": "error"}, {"event": "start"}, {"event": "step", "step": 7}])
    assert state(read_run(tmp_path)) == ("open", "at step 7")


def test_a_resumed_run_counts_each_step_once(tmp_path):
    write_rows(tmp_path, [{"event": "step", "step": s, "loss": v} for s, v in ((1, 1.0), (2, 9.0), (2, 2.0), (3, 3.0))])
    chart = charts([read_run(tmp_path)])[0]
    assert (chart.x, chart.curves[0].values) == ([1, 2, 3], [1.0, 2.0, 3.0])


def test_long_runs_are_averaged(tmp_path, monkeypatch):
    monkeypatch.setattr(report_charts, "MAX_POINTS", 10)
    write_rows(tmp_path, [{"event": "step", "step": s, "loss": float(s)} for s in range(40)])
    chart = charts([read_run(tmp_path)])[0]
    assert chart.x == [1.5 + 4 * k for k in range(10)] == chart.curves[0].values


# --- two runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_folder(run_folder):
    folder = write_run(run_folder.parent / "other run", prompts=1, steps=50, interval=25, export=False)
    config = json.loads((folder / "config.resolved.json").read_text())
    config["learning_rate"]["value"] = 1e-3
    config["webhook_config"]["value"] = {"webhook_url": "https://host/SECRET2"}
    (folder / "config.resolved.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def comparison(run_folder, other_folder):
    path = build_report(run_folder, other_folder)
    assert path == run_folder / "report" / "compare-other-run.html"
    return Page(path)


def test_a_comparison_shows_the_prompts_of_both(run_folder, comparison):
    shown = [(attrs["data-column"], attrs["data-kind"]) for attrs in comparison.all("figure") if "data-kind" in attrs]
    assert shown == [("teacher", "teacher"), ("undistilled", "undistilled"), ("student", "student"),
                     ("student1", "student")]  # fmt: skip
    for attrs in comparison.all("video"):
        assert (run_folder / "report" / unquote(attrs["src"])).resolve().is_file()
    assert "other%20run/validation/step-000050" in comparison.all("video")[3]["src"]
    found = json.loads(comparison.data)["videos"]
    assert found["steps"] == [0, 20, 25, 40, 50, 60]
    assert found["columns"]["student"]["at"] == [0, 20, 20, 40, 40, 60]
    assert found["columns"]["student1"]["at"] == [0, 0, 25, 25, 50, 50]


def test_a_comparison_overlays_curves_and_lists_what_differs(comparison):
    chart = next(chart for chart in json.loads(comparison.data)["charts"] if chart["title"] == "DMD loss")
    assert chart["labels"] == ["DMD loss A", "DMD loss B"]
    assert chart["x"] == list(range(3, 61, 3))
    assert chart["series"][0][-1] is not None
    assert chart["series"][1][-4:] == [None] * 4
    settings = comparison.text.split("Settings that differ")[1].split("Environment")[0]
    assert "learning_rate" in settings
    assert "0.001" in settings
    assert "lora_rank" not in settings
    assert "SECRET" not in comparison.text
    assert "5 options are the same" in settings or "4 options are the same" in settings
