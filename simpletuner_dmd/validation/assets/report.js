"use strict";
// The page is complete without this script except for the curves; it adds common playback and the step slider.
const data = JSON.parse(document.getElementById("data").textContent);

// --- playback: the videos of a prompt start together, and start again when the last of them has ended --------------
const playButton = document.getElementById("play");
const speed = document.getElementById("speed");
const slider = document.getElementById("step");
const rows = [...document.querySelectorAll(".prompt")];
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
const visible = new Set();

const videosOf = row => [...row.querySelectorAll("video")].filter(video => !video.hidden);

function startTogether(row) {
  for (const video of videosOf(row)) {
    video.currentTime = 0;
    video.playbackRate = Number(speed.value);
    if (playing && visible.has(row)) video.play().catch(() => {});
  }
}

function setPlaying(now) {
  playing = now;
  playButton.textContent = playing ? "Pause" : "Play";
  playButton.setAttribute("aria-pressed", String(playing));
  for (const row of rows) {
    if (playing && visible.has(row)) startTogether(row);
    else videosOf(row).forEach(video => video.pause());
  }
}

if (playButton) {
  for (const row of rows) {
    for (const video of row.querySelectorAll("video")) {
      video.loop = false;
      video.autoplay = false;
      video.addEventListener("ended", () => {
        if (videosOf(row).every(other => other.ended || other.error)) startTogether(row);
      });
    }
  }
  // Only what is on the screen plays: a report may hold hundreds of videos.
  const watcher = new IntersectionObserver(entries => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) { visible.add(target); startTogether(target); }
      else { visible.delete(target); videosOf(target).forEach(video => video.pause()); }
    }
  });
  rows.forEach(row => watcher.observe(row));
  playButton.addEventListener("click", () => setPlaying(!playing));
  speed.addEventListener("change", () => rows.forEach(row => videosOf(row).forEach(video => {
    video.playbackRate = Number(speed.value);
  })));
  setPlaying(playing);
}

// --- the step slider ------------------------------------------------------------------------------------------------
function showStep(index) {
  const step = data.steps[index];
  document.getElementById("step-value").textContent = step;
  slider.setAttribute("aria-valuetext", `step ${step}`);
  for (const row of rows) {
    const clips = data.prompts[Number(row.dataset.prompt)][index];
    for (const figure of row.querySelectorAll("figure")) {
      const clip = clips[figure.dataset.kind];
      const video = figure.querySelector("video");
      video.hidden = !clip;
      figure.querySelector(".missing").hidden = Boolean(clip);
      figure.querySelector(".steps").textContent = clip ? clip.steps : "";
      if (clip && video.getAttribute("src") !== clip.src) {
        if (clip.poster) video.poster = clip.poster; else video.removeAttribute("poster");
        video.src = clip.src;
      }
    }
    startTogether(row);
  }
}
if (slider) slider.addEventListener("input", () => showStep(Number(slider.value)));

// --- curves ---------------------------------------------------------------------------------------------------------
const number = (value, unit) => {
  if (value == null) return "–";
  if (unit === "bytes") return `${(value / 2 ** 30).toPrecision(3)} GiB`;
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e5)) return value.toExponential(1).replace("e+", "e");
  return String(Number(value.toPrecision(4)));
};

// A running mean over a thirtieth of the run, so that a trend shows through the noise of single steps.
function smoothed(values) {
  const keep = 1 - 1 / Math.max(1, values.length / 30);
  let mean = null;
  return values.map(value => {
    if (value == null) return mean;
    mean = mean == null ? value : keep * mean + (1 - keep) * value;
    return mean;
  });
}

let plots = [];
function drawCharts() {
  plots.forEach(plot => plot.destroy());
  const style = getComputedStyle(document.documentElement);
  const colour = name => style.getPropertyValue(name).trim();
  const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false },
    font: "12px system-ui, sans-serif" };
  plots = data.charts.map((chart, index) => {
    const box = document.querySelector(`[data-chart="${index}"]`);
    const noisy = chart.x.length > 40 && chart.title !== "Learning rate" && chart.unit !== "bytes";
    // Without a pointer on the chart uPlot asks for the value of no point: show the last one.
    const value = (plot, raw, k, at) => number(at == null ? plot.data[k].at(-1) : raw, chart.unit);
    const step = (plot, raw, k, at) => String(Math.round(at == null ? plot.data[0].at(-1) : raw));
    const series = [{ label: "Step", value: step }];
    const columns = [chart.x];
    chart.series.forEach((values, k) => {
      const stroke = colour(`--series-${k % 4 + 1}`);
      const dots = { show: chart.x.length < 2 };
      if (noisy) {
        series.push({ label: chart.labels[k], stroke: stroke + "55", width: 1, value, points: dots });
        columns.push(values);
      }
      const label = noisy ? "mean" : chart.labels[k];
      series.push({ label, stroke, width: 2, value, points: dots });
      columns.push(noisy ? smoothed(values) : values);
    });
    return new uPlot({
      width: box.clientWidth, height: 190, series,
      cursor: { sync: { key: "step" }, y: false },
      scales: { x: { time: false } },
      axes: [{ ...axis, size: 32 }, { ...axis, size: 62, values: (_, ticks) => ticks.map(tick => number(tick, chart.unit)) }],
    }, columns, box);
  });
}
drawCharts();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
addEventListener("resize", () => plots.forEach(plot => {
  plot.setSize({ width: plot.root.parentElement.clientWidth, height: 190 });
}));

// --- copying the snippet --------------------------------------------------------------------------------------------
for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const text = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(text); // no clipboard from file:// in some browsers: select it instead
      button.textContent = "Selected";
    }
  });
}
