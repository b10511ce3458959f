"use strict";
// Curves: each is drawn when it comes into sight, and takes new points in place.

const curves = (() => {
  const HEIGHT = 190;
  const COLOURS = 6;
  let charts = [];
  let plots = new Map(); // index of the chart -> its plot
  let watcher = null;

  const number = (value, unit) => {
    if (value == null) return "–";
    if (unit === "bytes") return `${(value / 2 ** 30).toPrecision(4)} GiB`;
    const size = Math.abs(value);
    if (size && (size < 1e-3 || size >= 1e5)) return value.toExponential(1).replace("e+", "e");
    return String(Number(value.toPrecision(4)));
  };

  const lastOf = values => values.findLast(value => value != null);

  // A running mean over a thirtieth of the points, so that a trend shows through the noise of single steps.
  function smoothed(values) {
    const count = values.filter(value => value != null).length;
    const keep = 1 - 1 / Math.max(1, count / 30);
    let mean = null;
    return values.map(value => {
      if (value == null) return null;
      mean = mean == null ? value : keep * mean + (1 - keep) * value;
      return mean;
    });
  }

  const averaged = chart => chart.noisy && chart.x.length > 40;
  const compared = chart => new Set(chart.runs).size > 1;

  // Where two runs or many modules are drawn, the raw values would only cover each other.
  const raw = chart => averaged(chart) && !compared(chart) && chart.series.length < 3;

  function columnsOf(chart) {
    const columns = [chart.x];
    for (const values of chart.series) {
      if (raw(chart)) columns.push(values);
      columns.push(averaged(chart) ? smoothed(values) : values);
    }
    return columns;
  }

  function seriesOf(chart, colour) {
    // Without a pointer on the chart uPlot asks for the value of no point: show the last one.
    const value = (plot, own, k, at) => number(at == null ? lastOf(plot.data[k]) : own, chart.unit);
    const step = (plot, own, k, at) => String(Math.round(at == null ? plot.data[0].at(-1) : own));
    const series = [{ label: "Step", value: step }];
    const names = [...new Set(chart.names)];
    chart.labels.forEach((label, k) => {
      const own = chart.labels.length <= COLOURS ? k : names.indexOf(chart.names[k]);
      const stroke = colour(`--series-${own % COLOURS + 1}`);
      const shared = { value, spanGaps: true, stroke, points: { show: chart.x.length < 30, size: 6 } };
      if (raw(chart)) series.push({ ...shared, label, stroke: stroke + "55", width: 1, points: { show: false } });
      series.push({ ...shared, label: raw(chart) ? "mean" : label, width: 2, dash: chart.runs[k] ? [7, 5] : [] });
    });
    return series;
  }

  function draw(index) {
    plots.get(index)?.destroy();
    const box = document.querySelector(`[data-chart="${index}"]`);
    const chart = charts[index];
    const style = getComputedStyle(document.documentElement);
    const colour = name => style.getPropertyValue(name).trim();
    const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false },
      font: "12px system-ui, sans-serif" };
    plots.set(index, new uPlot({
      width: box.clientWidth, height: HEIGHT, series: seriesOf(chart, colour),
      legend: { markers: { dash: (plot, k) => (plot.series[k].dash?.length ? "dashed" : "solid") } },
      cursor: { sync: { key: "step", scales: ["x", null] }, y: false },
      scales: { x: { time: false } },
      axes: [{ ...axis, size: 32 }, { ...axis, size: chart.unit ? 74 : 62, values: (_, ticks) => ticks.map(tick => number(tick, chart.unit)) }],
    }, columnsOf(chart), box));
  }

  function start(found) {
    watcher?.disconnect();
    plots.forEach(plot => plot.destroy());
    plots = new Map();
    charts = found;
    watcher = new IntersectionObserver(entries => {
      for (const { target, isIntersecting } of entries) {
        if (!isIntersecting) continue;
        watcher.unobserve(target);
        draw(Number(target.dataset.chart));
      }
    }, { rootMargin: "300px" });
    document.querySelectorAll("[data-chart]").forEach(box => watcher.observe(box));
  }

  // Whether the same curves are there, so that only their points have to be replaced.
  const alike = found => found.length === charts.length && found.every((chart, index) =>
    chart.title === charts[index].title && chart.labels.join() === charts[index].labels.join() &&
    raw(chart) === raw(charts[index]));

  function refresh(found) {
    charts = found;
    plots.forEach((plot, index) => plot.setData(columnsOf(charts[index])));
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => [...plots.keys()].forEach(draw));
  addEventListener("resize", () => plots.forEach(plot => {
    plot.setSize({ width: plot.root.parentElement.clientWidth, height: HEIGHT });
  }));
  return { start, refresh, alike };
})();
