"""The report in headless Chromium: the script runs, videos play together and walk with the sliders, keys work, nothing
overflows a phone, colours can be read, and a served page follows its run."""

import json
import random
import threading

import pytest

from simpletuner_dmd.validation import report_server
from simpletuner_dmd.validation.report import build_report
from simpletuner_dmd.validation.report_server import ReportServer

from .browser import CHROMIUM, DRIVER, Browser
from .fake_run import step_row, write_gallery, write_run

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs Chromium to open the page (apt-get install chromium-driver)"
)

ARROW_LEFT = "\ue012"
HELP = """
  const by = id => document.getElementById(id);
  const videos = () => [...document.querySelectorAll("video")];
  const move = (id, value) => { by(id).value = value; by(id).dispatchEvent(new Event("input")); };
"""

LOOK = (
    HELP
    + """
  const found = {};
  const line = videos().slice(0, COLUMNS);
  const wide = () => document.documentElement.scrollWidth - document.documentElement.clientWidth;
  found.overflow = wide();
  found.early = videos().filter(v => v.readyState > 0).length;
  by("videos").scrollIntoView();
  await until(() => line.every(v => v.readyState >= 2));
  found.loaded = line.map(v => v.readyState >= 2 && v.videoWidth === 64);
  await until(() => line.some(v => v.currentTime > 0.05));
  found.played = line.some(v => v.currentTime > 0);
  by("play").click();
  found.paused = videos().every(v => v.paused);
  move("seek", 500);
  await until(() => line.every(v => !v.seeking));
  found.sought = line.map(v => v.currentTime / v.duration);
  found.time = by("seek").getAttribute("aria-valuetext");
  move("step", 0);
  await until(() => line.every(v => v.readyState >= 2 && !v.seeking));
  found.src = videos().map(v => v.getAttribute("src"));
  found.step = by("step-value").textContent;
  found.label = videos()[2].getAttribute("aria-label");
  found.kept = line.map(v => v.currentTime / v.duration);
  by("later").click();
  found.later = by("step-value").textContent;
  by("curves").scrollIntoView();
  await until(() => document.querySelectorAll(".uplot canvas").length > 1);
  found.legend = document.querySelector(".u-legend").textContent;
  found.hidden = document.querySelectorAll("#more-curves canvas").length;
  by("more-curves").open = true;
  by("more-curves").scrollIntoView();
  await until(() => document.querySelectorAll("#more-curves canvas").length);
  found.more = document.querySelectorAll("#more-curves canvas").length;
  found.overflow = Math.max(found.overflow, wide());
  const named = e => e.getAttribute("aria-label") || e.labels?.length || e.textContent.trim();
  const all = document.querySelectorAll("input, button, select, video, [role=img], [role=region]");
  found.unnamed = [...all].filter(e => !named(e)).map(e => e.outerHTML);
  found.small = [...document.querySelectorAll("button, select, input")].filter(e => e.offsetHeight < 24).length;
  found.requests = performance.getEntriesByType("resource").map(r => r.name);
  return found;
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of two runs and a page of each kind."""
    top = tmp_path_factory.mktemp("runs")
    write_run(top / "run", prompts=2, steps=60, interval=20)
    write_run(top / "other", prompts=2, steps=40, interval=20, export=False)
    build_report(top / "run")
    build_report(top / "run", top / "other")
    return top / "run" / "report"


@pytest.mark.parametrize(("width", "page"), [(390, "index"), (1280, "index"), (390, "compare-other")])
def test_page_in_a_browser(folder, width, page):
    columns = 4 if page == "compare-other" else 3
    with Browser(width, 700) as browser:
        browser.open((folder / f"{page}.html").as_uri())
        found = browser.run(LOOK.replace("COLUMNS", str(columns)))
        assert not browser.complaints()
    assert found["overflow"] <= 0
    assert found["early"] == 0  # no video is read before it is on the screen
    assert all(found["loaded"])
    assert found["played"]
    assert found["paused"]
    assert found["sought"] == pytest.approx([0.5] * columns, abs=0.05)
    assert found["time"] == "0.3 seconds"
    assert found["kept"] == pytest.approx([0.5] * columns, abs=0.05)
    assert (found["step"], found["later"]) == ("0", "20")
    assert [("step-000000" in src) for src in found["src"]] == ([False, False] + [True] * (columns - 2)) * 2
    assert ", at 0 " in found["label"]
    assert "Step60" in found["legend"]
    assert (found["hidden"], found["more"]) == (0, 1)
    assert not found["unnamed"]
    assert not found["small"]
    assert all(name.startswith("file:") for name in found["requests"])


CONTRAST = """
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(v => linear(v / 255))
    .reduce((sum, v, k) => sum + v * [.2126, .7152, .0722][k], 0);
  const behind = e => { for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c;
  } };
  const poor = [];
  for (const e of document.querySelectorAll("body *")) {
    const text = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!text || !e.offsetParent || e.matches("option, :disabled, script")) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) poor.push([e.outerHTML.slice(0, 90), (a + .05) / (b + .05)]);
  }
  return poor;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_and_keys_work(folder, scheme):
    with Browser(1280, scheme=scheme, reduced_motion=True) as browser:
        browser.open((folder / "index.html").as_uri())
        assert browser.run(CONTRAST) == []
        # Who wants less motion has to start it.
        shown = browser.run(f"{HELP} await wait(300); return [by('play').textContent, videos().every(v => v.paused)]")
        assert shown == ["Play", True]
        browser.run("document.getElementById('step').focus()")
        browser.keys(ARROW_LEFT * 2)
        assert browser.run("return document.getElementById('step-value').textContent") == "20"
        browser.run("document.getElementById('play').focus()")
        browser.keys(" ")
        shown = browser.run(f"{HELP} await until(() => videos()[0].currentTime > 0); return by('play').textContent")
        assert shown == "Pause"
        browser.run("document.activeElement.blur(); document.querySelector('.skip').focus()")
        assert browser.run("return document.querySelector('.skip').getBoundingClientRect().left >= 0")


def test_fifty_videos_load_within_a_second(tmp_path):
    """Of 832x480 with posters. `pytest tests/validation/test_report_browser.py -k fifty -s` prints the figures."""
    page = build_report(write_gallery(tmp_path / "run", 17))
    with Browser(1280) as browser:
        found = []
        for _ in range(5):
            browser.open(page.as_uri())
            found.append(browser.run("""await until(() => performance.getEntriesByType("navigation")[0].loadEventEnd);
                const videos = [...document.querySelectorAll("video")];
                return [performance.getEntriesByType("navigation")[0].loadEventEnd, videos.length,
                    videos.filter(v => v.readyState > 0).length];"""))  # fmt: skip
        print("milliseconds to the end of the load event:", [round(load) for load, *_ in found])
    assert [count for _, count, _ in found] == [51] * 5
    assert max(started for *_, started in found) <= 12  # those on the screen
    assert min(load for load, *_ in found) < 1000


def test_a_served_page_follows_the_run_and_keeps_the_slider(tmp_path, monkeypatch):
    monkeypatch.setattr(report_server._Answer, "protocol_version", "HTTP/1.0")  # no connection outlives the server
    run = write_run(tmp_path / "run", prompts=1, steps=60, interval=20, export=False)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    news = [step_row(61, random.Random(0)), next(row for row in rows if row.get("kind") == "student") | {"step": 61}]
    legend = "document.querySelector('#curves .u-value').textContent"
    with ReportServer(run) as server, Browser(1000) as browser:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.open(server.url)
        browser.run(f"{HELP} move('step', 1); by('step').focus(); by('curves').scrollIntoView();"
                    " await until(() => document.querySelector('.uplot canvas')); window.here = 1")  # fmt: skip
        assert browser.run(f"return {legend}") == "60"
        with (run / "metrics.jsonl").open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in news))
        found = browser.run(f"""{HELP} await until(() => by('step').max === '4' && {legend} === '61');
            const found = [by('step-value').textContent, by('step').max, {legend}, by('live').textContent,
                document.querySelector('.state').textContent, document.activeElement.id, window.here];
            move('step', 4);
            return [...found, videos()[2].getAttribute('src').includes('step-000000')];""")
        assert found == ["20", "4", "61", "New videos at step 61.", "at step 61", "step", 1, True]
        server.shutdown()
        server.server_close()
        said = browser.run(f"{HELP} await until(() => by('live').textContent.includes('No longer')); "
                           "return by('live').textContent")  # fmt: skip
        assert said == "No longer updated: the server has stopped."
