// Draws the charts of the page from the JSON in it, in the page's own colors; again when these change, and for paper.
"use strict";

const charts = JSON.parse(document.getElementById("charts").textContent);
const places = [...document.querySelectorAll(".chart")];
const chosen = new Map(); // by place: {x, log}
const drawn = new Map(); // by place: the chart

const COLORS = 11; // --c0 and so on of the style
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const short = (value) => {
  if (value === null || value === undefined) return "-";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e9)) return value.toExponential(2);
  return value.toLocaleString("en", { maximumSignificantDigits: 5 });
};
const escaped = (text) => String(text).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);

function base() {
  const text = { color: color("ink") };
  return {
    animation: false,
    color: [...Array(COLORS).keys()].map((i) => color(`c${i}`)),
    textStyle: { fontFamily: "system-ui, sans-serif", ...text },
    tooltip: { confine: true, backgroundColor: color("raised"), borderColor: color("line"), textStyle: text },
    legend: { type: "plain", top: 0, left: 0, textStyle: text, inactiveColor: color("faint") },
  };
}

function axis(name, type, more = {}) {
  return {
    name, type, nameLocation: "middle", nameGap: 28, nameTextStyle: { color: color("faint") },
    axisLabel: { color: color("faint"), formatter: type === "category" ? undefined : short, hideOverlap: true },
    axisLine: { lineStyle: { color: color("line") } }, splitLine: { lineStyle: { color: color("line"), opacity: 0.5 } },
    ...more,
  };
}

function lines(chart, place) {
  const { x = 0, log = chart.log } = chosen.get(place) ?? {};
  const names = [...new Set(chart.lines.map((line) => line.name.split(": ")[0]))];
  const grouped = chart.lines.some((line) => line.name.includes(": ")); // of several runs: one color a run
  const owner = (line) => names.indexOf(line.name.split(": ")[0]);
  const single = (line, i) => (line.look === "points" ? 1 : chart.lines[0].look === "pale" ? 0 : i); // raw and mean alike
  const series = chart.lines.map((line, i) => ({
    name: line.name, type: line.look === "points" ? "scatter" : "line", showSymbol: false,
    symbolSize: 8, symbol: ["circle", "diamond", "triangle", "rect"][grouped ? owner(line) % 4 : 0],
    color: color(`c${(grouped ? owner(line) : single(line, i)) % COLORS}`),
    lineStyle: { width: line.look === "pale" ? 0.8 : 2, opacity: line.look === "pale" ? 0.45 : 1 },
    itemStyle: line.look === "points" ? { borderColor: color("ground"), borderWidth: 1 } : { opacity: line.look === "pale" ? 0.45 : 1 },
    z: line.look === "points" ? 4 : 2,
    data: line.x[x].map((at, j) => [at, line.y[j]]).filter(([, y]) => y !== null && (!log || y > 0)),
  }));
  return {
    ...base(),
    tooltip: {
      ...base().tooltip, trigger: "axis",
      formatter: (items) => [`${escaped(chart.x_names[x])} ${short(items[0].axisValue)}`,
        ...items.map((item) => `${item.marker}${escaped(item.seriesName)}: <b>${short(item.value[1])}</b>`)].join("<br>"),
    },
    grid: { left: 72, right: 16, top: 16 + 24 * legendRows(chart.lines.map((line) => line.name), place), bottom: 84 },
    xAxis: axis(chart.x_names[x], "value", { min: "dataMin", max: "dataMax" }),
    yAxis: axis(chart.y_name, log ? "log" : "value", { scale: true, nameGap: 54 }),
    dataZoom: [{ type: "slider", show: !matchMedia("print").matches, bottom: 8, height: 20, borderColor: color("line"), textStyle: { color: color("faint") },
      fillerColor: `${color("c0")}33`, labelFormatter: (value) => short(Math.round(value)) },
      { type: "inside", zoomOnMouseWheel: "ctrl", moveOnMouseWheel: false, moveOnMouseMove: false }],
    series,
  };
}

function legendRows(names, place) {
  let rows = 1, width = 0;
  for (const name of names) {
    const needed = 50 + 7 * name.length;
    if (width + needed > place.clientWidth && width > 0) { rows += 1; width = 0; }
    width += needed;
  }
  return rows;
}

function map(chart) {
  const scale = (value) => (chart.log ? Math.log10(Math.max(value, 1e-12)) : value);
  const data = chart.values.flatMap((row, y) => row.map((value, x) => [x, y, value === null ? "-" : scale(value), value]));
  const known = data.map((cell) => cell[2]).filter((value) => value !== "-");
  return {
    ...base(), legend: undefined,
    tooltip: {
      ...base().tooltip,
      formatter: ({ value: [x, y, , value] }) =>
        `${escaped(chart.y[y])}, ${escaped(chart.x_name)} ${escaped(chart.x[x])}: <b>${short(value)}</b>`,
    },
    grid: { left: 96, right: 16, top: 8, bottom: 100 },
    xAxis: axis(chart.x_name, "category", { data: chart.x }),
    yAxis: axis("", "category", { data: chart.y }),
    visualMap: {
      dimension: 2, // as it is colored; the last one is as it is told
      min: Math.min(...known), max: Math.max(...known), calculable: true, orient: "horizontal", left: "center", bottom: 0,
      text: [chart.value_name, ""], textStyle: { color: color("ink") }, itemWidth: 14, itemHeight: 110, precision: 2,
      formatter: (value) => short(chart.log ? 10 ** value : value),
      inRange: { color: [color("low"), color("middle"), color("high")] },
    },
    series: [{ type: "heatmap", data, progressive: 0 }],
  };
}

function bars(chart, place) {
  const whole = chart.series.reduce((sum, [, values]) => sum + values[0], 0);
  return {
    ...base(),
    tooltip: {
      ...base().tooltip,
      formatter: (item) => `${item.marker}${escaped(item.seriesName)} ${escaped(item.name)}: <b>${short(item.value)} ${escaped(chart.unit)}</b>`
        + (chart.stacked ? ` (${((100 * item.value) / whole).toFixed(1)} %)` : ""),
    },
    grid: { left: 8, right: 24, top: 16 + 24 * legendRows(chart.series.map(([name]) => name), place), bottom: 44, containLabel: true },
    xAxis: axis(chart.unit, "value", chart.stacked ? { max: whole } : {}),
    yAxis: axis("", "category", { data: chart.categories, inverse: true,
      axisLabel: { color: color("ink"), width: Math.min(320, place.clientWidth / 2.5), overflow: "truncate", interval: 0 } }),
    series: chart.series.map(([name, values], i) => ({
      name, type: "bar", data: values, stack: chart.stacked ? "all" : undefined, color: color(`c${i % COLORS}`), barGap: "0%",
      itemStyle: { borderColor: color("ground"), borderWidth: chart.stacked ? 1 : 0 },
    })),
  };
}

function draw(place) {
  const chart = charts[place.dataset.chart];
  if (chart.kind === "bars") place.style.height = `${100 + 24 * legendRows(chart.series.map(([name]) => name), place) + 30 * chart.categories.length}px`;
  if (chart.kind === "heatmap") place.style.height = `${Math.min(900, 126 + 18 * Math.max(chart.y.length, 4))}px`;
  if (!drawn.has(place)) {
    const made = echarts.init(place, null, { renderer: "svg" });
    if (chart.kind === "lines") made.group = `over ${chart.x_names[0]}`; // zoomed together
    drawn.set(place, made);
  }
  const made = drawn.get(place);
  made.resize();
  made.setOption({ lines, heatmap: map, bars }[chart.kind](chart, place), true);
}

function offer(place, label, options, choose) {
  const box = document.createElement("label");
  box.className = "choice";
  box.textContent = label;
  const select = document.createElement("select");
  select.append(...options.map((text, i) => new Option(text, i)));
  select.addEventListener("change", () => {
    chosen.set(place, { ...chosen.get(place), ...choose(Number(select.value)) });
    draw(place);
  });
  box.append(select);
  place.before(box);
}

for (const place of places) {
  const chart = charts[place.dataset.chart];
  if (chart.kind !== "lines") continue;
  if (chart.x_names.length > 1) offer(place, "over", chart.x_names, (x) => ({ x }));
  const scales = chart.log ? ["logarithmic", "linear"] : ["linear", "logarithmic"];
  offer(place, "scale", scales, (i) => ({ log: scales[i] === "logarithmic" }));
}
const drawAll = () => places.forEach(draw);
drawAll();
echarts.connect("over step");
let waiting;
new ResizeObserver(() => { clearTimeout(waiting); waiting = setTimeout(drawAll, 100); }).observe(document.querySelector("main"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
matchMedia("print").addEventListener("change", drawAll);
addEventListener("beforeprint", () => { document.querySelectorAll("details").forEach((d) => (d.open = d.querySelector("tr"))); drawAll(); });
