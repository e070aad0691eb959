"""The page that make_report.py fills: one HTML file with its style and script, nothing else to load.

Not a program: `PAGE` has {{TITLE}}, {{BODY}} and {{DATA}}. The script draws the player from DATA: `sheets` (data URIs of all
frames of a kind, one behind the other), `runs` (each with its three sheets, its colour and its PSNR by frame) and `tick`.
"""

PAGE = r"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{{TITLE}}</title>
<style>
:root { --ink: #1a1a1a; --soft: #5a5a5a; --line: #d9d9d9; --wash: #f6f7f8; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: white; color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK TC", sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 2.5rem 1.5rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.4rem; margin: 3rem 0 .6rem; padding-bottom: .3rem; border-bottom: 2px solid var(--ink); }
h3 { font-size: 1.08rem; margin: 2.2rem 0 .5rem; }
p { margin: .6rem 0; max-width: 46rem; }
.small, figcaption { font-size: .87rem; color: var(--soft); }
code, pre { font: .87em/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { white-space: nowrap; }
pre { background: var(--wash); border: 1px solid var(--line); border-radius: 4px; padding: .8rem 1rem; overflow-x: auto; font-size: .8rem; }
details { margin: .35rem 0; }
summary { cursor: pointer; font-size: .93rem; }
figure { margin: 1.4rem 0; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { margin-top: .4rem; max-width: 46rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .89rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .65rem; text-align: right; vertical-align: bottom; border-bottom: 1px solid var(--line); }
th { border-bottom: 2px solid var(--ink); font-weight: 600; line-height: 1.25; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.pairs { columns: 3 15rem; column-gap: 2rem; font-size: .86rem; margin: 1rem 0; }
.pairs div { display: flex; justify-content: space-between; gap: .8rem; border-bottom: 1px solid var(--line); break-inside: avoid; padding: .08rem 0; }
.pairs span:last-child { text-align: right; overflow-wrap: anywhere; }
.analysis { margin: 1.2rem 0; padding: .8rem 1rem; min-height: 6rem; border: 1px dashed #8a8a8a; border-left: 4px solid var(--accent); border-radius: 4px; white-space: pre-wrap; }
.analysis:focus { outline: 2px solid var(--accent); outline-offset: 1px; }
.analysis:empty::before { content: attr(data-placeholder); color: #767676; }
#bar { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; margin: 1rem 0 0; }
button { font: inherit; font-size: .93rem; padding: .3rem .9rem; border: 1px solid #8a8a8a; border-radius: 4px; background: white; color: var(--ink); cursor: pointer; }
button:hover { background: var(--wash); }
#player { margin: 1.6rem 0; padding: 1rem; border: 1px solid var(--line); border-radius: 6px; background: var(--wash); }
#player .runs { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin-bottom: .8rem; font-size: .93rem; }
#player .runs label { cursor: pointer; white-space: nowrap; }
#player .runs label:has(input:checked) { font-weight: 600; }
#player .swatch { display: inline-block; width: 1.1em; height: .32em; margin: 0 .4em .22em .2em; vertical-align: baseline; }
#player .runs output { display: inline-block; min-width: 5em; font-variant-numeric: tabular-nums; color: var(--soft); padding-left: .5em; }
#player .pictures { display: grid; grid-template-columns: repeat(3, 1fr); gap: .7rem; }
#player .pictures div { font-size: .87rem; color: var(--soft); }
#player canvas { display: block; width: 100%; image-rendering: pixelated; background: #ddd; }
#player .controls { display: flex; gap: .8rem; align-items: center; margin: .9rem 0 .4rem; }
#player .controls button { min-width: 5em; }
#player input[type=range] { flex: 1; min-width: 6rem; accent-color: var(--ink); }
#player .where { min-width: 13em; text-align: right; font-variant-numeric: tabular-nums; font-size: .93rem; }
#player svg { display: block; width: 100%; height: auto; background: white; border: 1px solid var(--line); cursor: crosshair; touch-action: none; }
#player svg text { font-size: 12px; fill: var(--soft); }
@media print {
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  #bar, #note, #player .controls button, #player input, #player .hint { display: none !important; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  #player { background: white; }
  h2, h3 { break-after: avoid; break-inside: avoid; }
  figure, tr, #player, .pairs div { break-inside: avoid; }
  figure img { width: auto; max-height: 19cm; margin: 0 auto; }
  .scroll { overflow: visible; }
  table { font-size: .8em; }
  th, td { padding: .2rem .4rem; }
  pre { white-space: pre-wrap; }
  .analysis { border: none; padding: 0; min-height: 0; }
  .analysis:empty { display: none; }
}
</style>
</head>
<body>
<main>
<h1>{{TITLE}}</h1>
<p class="small" id="note">Numbers and figures come from the runs' own files. The framed areas are yours: click and write. What you write is printed;
to keep it in this file, use &ldquo;Save a copy&rdquo;.</p>
<div id="bar"><button id="save" type="button">Save a copy</button><button id="print" type="button">Print</button></div>
{{BODY}}
</main>
<script type="application/json" id="data">{{DATA}}</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

// ---------------------------------------------------------------- the writer's text
let unsaved = false;
for (const area of document.querySelectorAll(".analysis")) {
  area.addEventListener("input", () => {
    if (area.textContent.trim() === "") area.replaceChildren();  // a lone <br> would hide the placeholder
    document.documentElement.dataset.edited = "1";               // make_report.py does not replace a file that says so
    unsaved = true;
  });
  area.addEventListener("paste", event => {                      // words only: no fonts or links of another page
    event.preventDefault();
    document.execCommand("insertText", false, event.clipboardData.getData("text/plain"));
  });
}
addEventListener("beforeunload", event => { if (unsaved) event.preventDefault(); });
document.getElementById("print").onclick = () => print();
document.getElementById("save").onclick = () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(["<!DOCTYPE html>\n" + document.documentElement.outerHTML], { type: "text/html" }));
  link.download = "report.html";
  link.click();
  unsaved = false;
};

// ---------------------------------------------------------------- the player
const player = document.getElementById("player");
if (player) start();

function make(name, attributes = {}, ...children) {
  const svg = ["svg", "line", "path", "circle", "text", "g"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

async function start() {
  const sheets = await Promise.all(data.sheets.map(async source => {
    const image = new Image();
    image.src = source;
    await image.decode();
    return image;
  }));
  const first = Math.min(...data.runs.map(r => r.first));
  const last = Math.max(...data.runs.map(r => r.first + r.ticks - 1));
  let frame = Math.max(1, first), shown = 0, timer = null;

  // choice of run, which is the legend of the plot too
  const readouts = data.runs.map(() => make("output"));
  const runs = make("div", { class: "runs", role: "radiogroup", "aria-label": "Run shown" }, ...data.runs.map((r, i) => {
    const radio = make("input", { type: "radio", name: "run", value: i });
    radio.checked = i === 0;
    radio.onchange = () => { shown = i; draw(); };
    return make("label", {}, radio, make("span", { class: "swatch", style: "background:" + r.colour }), r.name, readouts[i]);
  }));

  const canvases = ["Pose", "Prediction", "Ground truth"].map(name => make("canvas", { "aria-label": name }));
  const pictures = make("div", { class: "pictures" },
    ...canvases.map((canvas, i) => make("div", {}, canvas, ["Pose", "Prediction", "Ground truth"][i])));

  const play = make("button", { type: "button", id: "play" }, "Play");
  const slider = make("input", { type: "range", id: "frame", min: first, max: last, step: 1, "aria-label": "Frame" });
  const where = make("span", { class: "where", id: "where" });

  // the plot: PSNR by frame of every run, the one shown drawn over the others
  const W = 960, H = 240, left = 46, right = 12, top = 24, bottom = 34;
  const values = data.runs.flatMap(r => r.psnr ? Object.values(r.psnr) : []);
  const low = Math.floor(Math.min(...values) - 0.5), high = Math.ceil(Math.max(...values) + 0.5);
  const x = f => left + (W - left - right) * (last === first ? 0.5 : (f - first) / (last - first));
  const y = p => top + (H - top - bottom) * (1 - (p - low) / (high - low));
  const step = (range, count) => {
    const rough = range / count, unit = 10 ** Math.floor(Math.log10(rough));
    return unit * [1, 2, 5, 10].find(m => m * unit >= rough);
  };
  const plot = make("svg", { id: "plot", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "PSNR per frame" });
  const cursor = make("line", { id: "cursor", y1: top, y2: H - bottom, stroke: "#1a1a1a", "stroke-width": 1.5 });
  const dots = data.runs.map(r => make("circle", { r: 4, fill: r.colour, stroke: "white" }));
  const curves = data.runs.map(r => {
    let path = "", pen = "M";
    for (let f = first; f <= last; f++) {
      if (r.psnr && f in r.psnr) { path += `${pen}${x(f).toFixed(1)} ${y(r.psnr[f]).toFixed(1)}`; pen = "L"; } else pen = "M";
    }
    return make("path", { d: path, fill: "none", stroke: r.colour, "stroke-linejoin": "round" });
  });
  if (values.length) {
    for (let p = Math.ceil(low / step(high - low, 5)) * step(high - low, 5); p <= high; p += step(high - low, 5)) {
      plot.append(make("line", { x1: left, x2: W - right, y1: y(p), y2: y(p), stroke: "#e4e4e4" }),
        make("text", { x: left - 7, y: y(p) + 4, "text-anchor": "end" }, String(+p.toFixed(2))));
    }
    const hop = Math.max(1, step(Math.max(1, last - first), 8));
    for (let f = Math.ceil(first / hop) * hop; f <= last; f += hop) {
      plot.append(make("line", { x1: x(f), x2: x(f), y1: H - bottom, y2: H - bottom + 4, stroke: "#5a5a5a" }),
        make("text", { x: x(f), y: H - bottom + 17, "text-anchor": "middle" }, String(f)));
    }
    plot.append(make("text", { x: 8, y: 14 }, "PSNR (dB)"), make("text", { x: W - right, y: H - 4, "text-anchor": "end" }, "frame"),
      ...curves, cursor, ...dots);
  }

  function draw() {
    const r = data.runs[shown], t = frame - r.first;
    canvases.forEach((canvas, i) => {
      if (canvas.width !== r.width || canvas.height !== r.height) { canvas.width = r.width; canvas.height = r.height; }
      const context = canvas.getContext("2d");
      context.clearRect(0, 0, r.width, r.height);
      if (t < 0 || t >= r.ticks) return;
      context.drawImage(sheets[r.sheets[i]], t % r.columns * r.width, Math.floor(t / r.columns) * r.height, r.width, r.height,
        0, 0, r.width, r.height);
    });
    pictures.dataset.frame = frame;
    slider.value = frame;
    where.textContent = `frame ${frame} of ${last}, ${(frame * data.tick / 1000).toFixed(2)} s`;
    cursor.setAttribute("x1", x(frame));
    cursor.setAttribute("x2", x(frame));
    data.runs.forEach((run, i) => {
      const p = run.psnr && run.psnr[frame];
      readouts[i].textContent = p === undefined || p === null ? "\u2013" : p.toFixed(2) + " dB";
      dots[i].style.display = p === undefined || p === null ? "none" : "";
      if (p !== undefined && p !== null) { dots[i].setAttribute("cx", x(frame)); dots[i].setAttribute("cy", y(p)); }
      curves[i].setAttribute("stroke-width", i === shown ? 1.8 : 1);
      curves[i].setAttribute("opacity", i === shown ? 1 : 0.4);
    });
    if (values.length) plot.append(curves[shown], cursor, ...dots);  // the last one drawn lies on top
  }

  function go(to) { frame = Math.min(last, Math.max(first, Math.round(to))); draw(); }
  function stop() { clearInterval(timer); timer = null; play.textContent = "Play"; }
  function toggle() {
    if (timer) return stop();
    timer = setInterval(() => go(frame === last ? first : frame + 1), data.tick);
    play.textContent = "Pause";
  }

  play.onclick = toggle;
  slider.oninput = () => { stop(); go(+slider.value); };
  const seek = event => {
    const box = plot.getBoundingClientRect();
    stop();
    go(first + ((event.clientX - box.left) / box.width * W - left) / (W - left - right) * (last - first));
  };
  plot.onpointerdown = event => { plot.setPointerCapture(event.pointerId); seek(event); };
  plot.onpointermove = event => { if (event.buttons) seek(event); };
  document.addEventListener("keydown", event => {
    const keys = { ArrowLeft: -1, ArrowRight: 1 };
    // the slider moves by itself, a text area and the choice of run need their arrows
    if (!(event.key in keys) || event.altKey || event.ctrlKey || event.metaKey || event.target.closest("input, .analysis")) return;
    event.preventDefault();
    stop();
    go(frame + keys[event.key] * (event.shiftKey ? 10 : 1));
  });

  player.replaceChildren(runs, pictures, make("div", { class: "controls" }, play, slider, where));
  if (values.length) player.append(plot);
  player.append(make("p", { class: "small hint" }, "Slider, plot and arrow keys (with Shift: ten frames) move pictures and cursor together."));
  draw();
  player.dataset.ready = "1";
}
</script>
</body>
</html>
"""
