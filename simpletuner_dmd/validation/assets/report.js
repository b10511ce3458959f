"use strict";
// The page is complete without this script except for the curves; it adds common playback and the step slider.
let data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);

// --- videos: those of a line play together, and start again when the last of them has ended ------------------------
const FRAME = 0.04; // seconds that videos of a line may drift apart
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
let lines = [];
let watcher = null;
const visible = new Set();

const videosOf = line => [...line.querySelectorAll("video")].filter(video => !video.hidden);
const lengthOf = line => Math.max(0, ...videosOf(line).map(video => video.duration || 0));
const firstVisible = () => lines.find(line => visible.has(line) && lengthOf(line) > 0);

function seekLine(line, seconds) {
  for (const video of videosOf(line)) {
    video.currentTime = Math.min(seconds, video.duration || seconds);
    video.playbackRate = Number(byId("speed").value);
    if (playing && visible.has(line)) video.play().catch(() => {});
    else video.pause();
  }
}

function showTime(share, seconds) {
  const words = `${seconds.toFixed(1)} s`;
  byId("seek").value = Math.round(share * 1000);
  byId("seek").setAttribute("aria-valuetext", `${seconds.toFixed(1)} seconds`);
  byId("seek-value").textContent = words;
}

// The longest video of a line leads; the others are put beside it where they have drifted.
function keepTogether() {
  for (const line of visible) {
    const videos = videosOf(line).filter(video => video.readyState > 1 && !video.seeking);
    if (videos.length === 0) continue;
    const leader = videos.reduce((one, other) => (other.duration > one.duration ? other : one));
    for (const video of videos) {
      const wanted = Math.min(leader.currentTime, video.duration);
      if (playing && Math.abs(video.currentTime - wanted) > FRAME && !video.ended) video.currentTime = wanted;
    }
    if (line === firstVisible()) showTime(leader.currentTime / leader.duration, leader.currentTime);
  }
}

function setPlaying(now) {
  playing = now;
  byId("play").textContent = playing ? "Pause" : "Play";
  for (const line of lines) {
    if (!playing || !visible.has(line)) videosOf(line).forEach(video => video.pause());
    else if (videosOf(line).every(video => video.ended)) seekLine(line, 0);
    else seekLine(line, Math.max(0, ...videosOf(line).map(video => video.currentTime)));
  }
}

// All lines at the same share of their length.
function seekAll(share) {
  for (const line of lines) {
    const seconds = share * lengthOf(line);
    for (const video of videosOf(line)) video.currentTime = Math.min(seconds, video.duration || seconds);
    if (line === firstVisible()) showTime(share, seconds);
  }
}

function showStep(index) {
  const { steps, columns, prompts, texts } = data.videos;
  byId("step").value = index;
  byId("step-value").textContent = steps[index];
  byId("step").setAttribute("aria-valuetext", `step ${steps[index]} of ${steps.at(-1)}`);
  byId("earlier").disabled = index === 0;
  byId("later").disabled = index === steps.length - 1;
  for (const line of lines) {
    const number = Number(line.dataset.prompt);
    const at = Math.max(0, ...videosOf(line).map(video => video.currentTime));
    let changed = false;
    for (const figure of line.querySelectorAll("figure")) {
      const column = columns[figure.dataset.column];
      const clip = prompts[number][figure.dataset.column][column.moves ? column.at[index] : "any"];
      const video = figure.querySelector("video");
      video.hidden = !clip;
      figure.querySelector(".missing").hidden = Boolean(clip);
      figure.querySelector(".about").textContent = clip ? clip.about : "";
      if (!clip) { video.pause(); continue; }
      video.setAttribute("aria-label", `${column.title}, ${clip.about}: ${texts[number]}`);
      if (video.getAttribute("src") === clip.src) continue;
      changed = true;
      if (clip.poster) video.poster = clip.poster; else video.removeAttribute("poster");
      video.src = clip.src;
    }
    // The same moment of the other step's video, so that the eye compares like with like.
    if (changed && visible.has(line)) { load(line); seekLine(line, at); }
  }
}

// Nothing is read before it is on the screen: a report may hold hundreds of videos.
function load(line) {
  for (const video of videosOf(line)) if (video.readyState === 0) video.preload = "auto";
}

function startVideos() {
  watcher?.disconnect();
  visible.clear();
  lines = [...document.querySelectorAll(".prompt")];
  if (!byId("play")) return;
  document.querySelector(".bar").hidden = false;
  for (const line of lines) {
    for (const video of line.querySelectorAll("video")) {
      video.controls = false;
      video.addEventListener("ended", () => {
        if (playing && videosOf(line).every(other => other.ended || other.error)) seekLine(line, 0);
      });
    }
  }
  watcher = new IntersectionObserver(entries => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) { visible.add(target); load(target); seekLine(target, 0); }
      else { visible.delete(target); videosOf(target).forEach(video => video.pause()); }
    }
  });
  lines.forEach(line => watcher.observe(line));
  byId("play").addEventListener("click", () => setPlaying(!playing));
  byId("seek").addEventListener("input", event => { setPlaying(false); seekAll(event.target.value / 1000); });
  byId("speed").addEventListener("change", () => lines.forEach(line => videosOf(line).forEach(video => {
    video.playbackRate = Number(byId("speed").value);
  })));
  const slider = byId("step");
  slider?.addEventListener("input", () => showStep(Number(slider.value)));
  for (const [id, way] of [["earlier", -1], ["later", 1]]) {
    byId(id)?.addEventListener("click", () => showStep(Number(slider.value) + way));
  }
  if (slider) showStep(Number(slider.value));
  setPlaying(playing);
}
setInterval(keepTogether, 100);

// --- a newer page of the same run, as `simpletuner report --serve` hands it out -------------------------------------
function replace(id, newer) {
  const [here, there] = [document, newer].map(page => page.querySelector(`#${id} > .body, #${id} > details > .body`) ??
    page.getElementById(id));
  const open = [...here.querySelectorAll("details[open]")].map(details => details.id);
  here.innerHTML = there.innerHTML;
  open.forEach(name => byId(name)?.setAttribute("open", ""));
}

// older: the page before it, as it was served; null at the first time.
function refresh(newer, older) {
  const changed = id => !older || newer.getElementById(id).innerHTML !== older.getElementById(id).innerHTML;
  const before = data;
  data = JSON.parse(newer.getElementById("data").textContent);
  for (const id of ["heading", "ladder", "facts", "health", "export", "settings", "environment", "events", "written"]) {
    if (changed(id)) replace(id, newer);
  }
  if (changed("videos")) {
    const [slider, speed] = [byId("step"), byId("speed")?.value];
    const focused = document.activeElement?.id;
    const step = slider && before.videos.steps[slider.value];
    const following = !slider || Number(slider.value) === before.videos.steps.length - 1;
    replace("videos", newer);
    if (speed) byId("speed").value = speed;
    const index = following ? -1 : data.videos.steps.indexOf(step);
    if (byId("step")) byId("step").value = index < 0 ? data.videos.steps.length - 1 : index;
    startVideos();
    if (focused) byId(focused)?.focus({ preventScroll: true });
    byId("live").textContent = `New videos at step ${data.videos.steps.at(-1) ?? 0}.`;
  }
  if (curves.alike(data.charts)) {
    for (const box of document.querySelectorAll("[data-chart]")) {
      const label = newer.querySelector(`[data-chart="${box.dataset.chart}"]`).getAttribute("aria-label");
      box.setAttribute("aria-label", label);
    }
    curves.refresh(data.charts);
  } else {
    replace("curves", newer);
    curves.start(data.charts);
  }
}

// --- copying the snippet --------------------------------------------------------------------------------------------
document.addEventListener("click", async event => {
  if (!event.target.matches("[data-copy]")) return;
  const text = event.target.parentElement.querySelector("pre");
  try {
    await navigator.clipboard.writeText(text.textContent);
    event.target.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(text); // no clipboard from file:// in some browsers: select it instead
    event.target.textContent = "Selected";
  }
});

startVideos();
curves.start(data.charts);
