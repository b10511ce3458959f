"""The report in headless Chromium: the script runs, videos load and walk with the slider, nothing overflows a phone."""

import html
import json
import re
import shutil
import subprocess

import pytest

from simpletuner_dmd.validation.report import build_report

from .fake_run import write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium to open the page (apt-get install chromium)")

# Opens the page in a frame of the given width, drives it and prints what it finds.
PROBE = """<!doctype html><body><iframe src="run/report/index.html" style="width:WIDTHpx;height:900px"></iframe>
<pre id="found"></pre><script>
const wait = ms => new Promise(done => setTimeout(done, ms));
document.querySelector("iframe").addEventListener("load", async event => {
  const view = event.target.contentWindow, page = view.document, found = {errors: []};
  const videos = () => [...page.querySelectorAll("video")];
  found.plots = page.querySelectorAll(".uplot canvas").length;
  found.legend = page.querySelector(".u-legend").textContent;
  found.overflow = page.documentElement.scrollWidth - page.documentElement.clientWidth;
  for (let k = 0; k < 50 && videos().some(v => v.readyState < 2); k++) await wait(100);
  found.loaded = videos().map(v => v.readyState >= 2 && v.videoWidth === 64);
  found.apart = Math.max(...videos().slice(0, 3).map(v => v.currentTime)) -
                Math.min(...videos().slice(0, 3).map(v => v.currentTime));
  const slider = page.getElementById("step");
  slider.value = 0;
  slider.dispatchEvent(new view.Event("input"));
  found.src = videos().map(v => v.getAttribute("src"));
  found.step = page.getElementById("step-value").textContent;
  page.getElementById("play").click();
  found.paused = videos().every(v => v.paused);
  found.requests = view.performance.getEntriesByType("resource").map(r => r.name);
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""


@pytest.mark.parametrize("width", [390, 1400])
def test_page_in_a_browser(tmp_path, width):
    build_report(write_run(tmp_path / "run", prompts=2, steps=60, interval=20))
    (tmp_path / "probe.html").write_text(PROBE.replace("WIDTH", str(width)))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files",
               "--autoplay-policy=no-user-gesture-required", f"--window-size={width + 100},1000",
               "--virtual-time-budget=20000", "--enable-logging=stderr", "--dump-dom",
               (tmp_path / "probe.html").as_uri()]  # fmt: skip
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in answer.stderr
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', answer.stdout, re.DOTALL)[1]))
    assert found["plots"] == 6
    assert "Step60" in found["legend"]
    assert found["overflow"] <= 0
    assert all(found["loaded"])
    assert found["apart"] < 0.1
    assert found["step"] == "0"
    assert [("step-000000" in src) for src in found["src"]] == [False, False, True] * 2
    assert found["paused"]
    assert all(name.startswith("file:") for name in found["requests"])
