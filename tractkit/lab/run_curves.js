import { number, openCanvas, roundStep, ticks } from "./canvas.js";

const PALETTES = {
  light: ["#2f6fb5", "#d9622b", "#3a8f5c", "#8a5fb0", "#b0862a", "#c2497b", "#4a9aa5", "#6b6f76"],
  dark: ["#6ca6e8", "#f0884f", "#62bd84", "#b58be0", "#d9b14a", "#e87bab", "#70c4d0", "#9aa1ab"],
};
const PLACES = { step: "step", epoch: "epoch", hours: "hours of training", time: "clock" };
const CHOICES = { step: "step", epoch: "epoch", hours: "training time", time: "clock" };
const MINUTE = 60;
const DAY = 86400;
const CLOCK = [1, 5, 15, 30, 60, 180, 360, 720, 1440, 2880, 10080, 43200].map((m) => m * MINUTE);

export function make(parent, tag, text, className) {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (className) e.className = className;
  parent.append(e);
  return e;
}

export function colorOf(slot, dark) {
  return PALETTES[dark ? "dark" : "light"][slot % 8];
}

function clockText(seconds, span) {
  const at = new Date(1000 * seconds);
  const pad = (n) => String(n).padStart(2, "0");
  const day = `${pad(at.getMonth() + 1)}-${pad(at.getDate())}`;
  const hour = `${pad(at.getHours())}:${pad(at.getMinutes())}`;
  return span > 20 * DAY ? day : span > DAY / 2 ? `${day} ${hour}` : hour;
}

function unpack(curve) {
  // for each line: its values, then their places by step, epoch, hours and time
  const bytes = curve.data;
  const all = new Float64Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
  let at = 0;
  return curve.lines.map(([kind, n]) => {
    const part = (k) => all.subarray(at + k * n, at + (k + 1) * n);
    const line = { kind, y: part(0), step: part(1), epoch: part(2), hours: part(3), time: part(4) };
    at += 5 * n;
    return line;
  });
}

function marksOf({ range: [low, high], log }, place, nb) {
  // the places of an axis that are named; of time, whole hours and days of this place of the world
  if (place !== "time") return ticks(low, high, log, roundStep(low, high, nb));
  const step = CLOCK.find((s) => s * nb >= high - low) || CLOCK[CLOCK.length - 1];
  return ticks(low, high, log, step, 60 * new Date(1000 * low).getTimezoneOffset());
}

export function readLines(curves, axes, slots) {
  // what is drawn: of a run with epochs its batches only when they are asked for
  const lines = [];
  const without = [];
  for (const curve of curves) {
    const all = unpack(curve);
    const some = all.filter((l) => l.kind !== "batches" || axes.batches || all.length === 1);
    const placed = some.filter((l) => l[axes.x].some(Number.isFinite));
    if (!placed.length && all.length) without.push(curve.name);
    placed.forEach((l, i) => {
      const main = i === 0;
      lines.push({ ...l, x: l[axes.x], main, name: curve.name, status: curve.status, slot: slots[curve.name] || 0 });
    });
  }
  return { lines, without };
}

function extent(lines, pick, positive) {
  let low = Infinity;
  let high = -Infinity;
  for (const line of lines) {
    for (const v of pick(line)) {
      if (!Number.isFinite(v) || (positive && v <= 0)) continue;
      low = Math.min(low, v);
      high = Math.max(high, v);
    }
  }
  return low <= high ? [low, high] : [positive ? 1 : 0, 1];
}

function axis(range, log, from, to) {
  // to pixels and back
  const f = log ? Math.log10 : (v) => v;
  const back = log ? (v) => 10 ** v : (v) => v;
  const [a, b] = [f(range[0]), f(range[1])];
  const width = b - a || 1;
  return {
    log,
    range,
    at: (v) => from + ((f(v) - a) / width) * (to - from),
    value: (p) => back(a + ((p - from) / (to - from)) * width),
  };
}

function padded([low, high], log, share) {
  if (log) return [low * (low / high) ** share, high * (high / low) ** share || high];
  const more = (high - low || Math.abs(high) || 1) * share;
  return [low - more, high + more];
}

export function scalesOf(lines, axes, zoom, box) {
  const values = extent(lines, (l) => l.y, false);
  const logY = axes.logy && extent(lines, (l) => l.y, true)[0] > 0 && values[0] > 0;
  const logX = axes.logx && axes.x !== "time";
  const seenX = zoom?.x || extent(lines, (l) => l.x, logX);
  const inX = (l) => l.y.filter((_, i) => l.x[i] >= seenX[0] && l.x[i] <= seenX[1]);
  const seenY =
    zoom?.y ||
    padded(
      extent(zoom ? lines.map((l) => ({ y: inX(l) })) : lines, (l) => l.y, logY),
      logY,
      0.06,
    );
  const wide = seenX[0] === seenX[1] ? [seenX[0] - 1, seenX[1] + 1] : seenX;
  return { x: axis(wide, logX, box.L, box.R), y: axis(seenY, logY, box.B, box.T) };
}

function drawAxes(c, look, box, scale, place) {
  const { L, R, T, B } = box;
  c.strokeStyle = look.grid;
  c.fillStyle = look.faint;
  c.lineWidth = 1;
  c.textBaseline = "middle";
  c.textAlign = "right";
  for (const v of marksOf(scale.y, "", 5)) {
    const y = Math.round(scale.y.at(v)) + 0.5;
    c.beginPath();
    c.moveTo(L, y);
    c.lineTo(R, y);
    c.stroke();
    c.fillText(number(v), L - 8, y);
  }
  const span = scale.x.range[1] - scale.x.range[0];
  c.textAlign = "center";
  const marks = marksOf(scale.x, place, Math.max(3, Math.floor((R - L) / 110)));
  for (const v of marks) c.fillText(place === "time" ? clockText(v, span) : number(v), scale.x.at(v), B + 14);
  c.fillText(PLACES[place], (L + R) / 2, B + 32);
  c.textAlign = "left";
  c.fillText("loss", L - 46, T - 10);
}

function strokeLine(c, line, scale) {
  // a gap where there is no number
  let down = false;
  c.beginPath();
  for (let i = 0; i < line.y.length; i++) {
    const ok = Number.isFinite(line.y[i]) && Number.isFinite(line.x[i]) && (!scale.y.log || line.y[i] > 0);
    if (ok) c[down ? "lineTo" : "moveTo"](scale.x.at(line.x[i]), scale.y.at(line.y[i]));
    down = ok;
  }
  c.stroke();
}

function cross(c, x, y, r) {
  c.beginPath();
  c.moveTo(x - r, y - r);
  c.lineTo(x + r, y + r);
  c.moveTo(x + r, y - r);
  c.lineTo(x - r, y + r);
  c.stroke();
}

function drawMarks(c, line, scale, box, back) {
  // a cross at the upper edge for each loss that is no number, a ring at the best, the end by its status
  c.lineWidth = 2;
  c.setLineDash([]);
  let best = -1;
  let last = -1;
  for (let i = 0; i < line.y.length; i++) {
    if (Number.isFinite(line.y[i])) {
      last = i;
      if (best < 0 || line.y[i] < line.y[best]) best = i;
    } else if (Number.isFinite(line.x[i])) cross(c, scale.x.at(line.x[i]), box.T + 5, 3.5);
  }
  if (!line.main || best < 0) return;
  const at = (i) => [scale.x.at(line.x[i]), scale.y.at(line.y[i])];
  if (["dead", "failed"].includes(line.status)) cross(c, ...at(last), 5);
  if (line.status === "running" || line.y.length === 1) {
    c.beginPath();
    c.arc(...at(last), 4, 0, 7);
    c.fill();
  }
  if (line.kind === "batches" || line.y.length < 2) return;
  c.beginPath();
  c.arc(...at(best), 4.5, 0, 7);
  c.fillStyle = back;
  c.fill();
  c.stroke();
}

function drawLine(c, line, scale, box, look, strength) {
  c.strokeStyle = colorOf(line.slot, look.dark);
  c.fillStyle = c.strokeStyle;
  c.globalAlpha = strength * (line.main ? 1 : line.kind === "batches" ? 0.35 : 0.75);
  c.lineWidth = line.main ? 2 : 1;
  c.setLineDash(line.kind === "training" && !line.main ? [5, 3] : []);
  strokeLine(c, line, scale);
  drawMarks(c, line, scale, box, look.back);
  c.setLineDash([]);
  c.globalAlpha = 1;
}

function placeAt(line, value) {
  // the point whose place is nearest
  let best = -1;
  for (let i = 0; i < line.x.length; i++) {
    if (!Number.isFinite(line.x[i])) continue;
    if (best < 0 || Math.abs(line.x[i] - value) < Math.abs(line.x[best] - value)) best = i;
  }
  return best;
}

export function under(lines, scale, pointer) {
  // of each run the point at this place, nearest to the pointer first; none where a run has ended before
  const at = scale.x.value(pointer.x);
  const found = [];
  for (const line of lines) {
    if (!line.main) continue;
    const i = placeAt(line, at);
    const dx = i < 0 ? Infinity : Math.abs(scale.x.at(line.x[i]) - pointer.x);
    const inside = at >= line.x[0] && at <= line.x[line.x.length - 1];
    if (i < 0 || (!inside && dx > 14)) continue;
    const dy = Number.isFinite(line.y[i]) ? Math.abs(scale.y.at(line.y[i]) - pointer.y) : 1e4;
    found.push({ line, i, far: Math.hypot(Math.min(dx, 30), dy) });
  }
  return found.sort((a, b) => a.far - b.far);
}

export function drawPlot(canvas, state, look) {
  // returns the scales, for the pointer
  const { c, W, H } = openCanvas(canvas, look.font);
  const box = { L: 62, R: W - 16, T: 24, B: H - 46 };
  const { lines, axes, zoom, focus, drag, cursor } = state;
  if (!lines.length) {
    c.fillStyle = look.faint;
    c.textAlign = "center";
    const words = state.hidden ? "no run that is ticked fits the filter" : "tick runs in the table to see their curves";
    c.fillText(words, W / 2, H / 2);
    return null;
  }
  const scale = scalesOf(lines, axes, zoom, box);
  drawAxes(c, look, box, scale, axes.x);
  c.save();
  c.beginPath();
  c.rect(box.L, box.T, box.R - box.L, box.B - box.T);
  c.clip();
  const order = [...lines].sort((a, b) => (a.name === focus) - (b.name === focus) || a.main - b.main);
  for (const line of order) drawLine(c, line, scale, box, look, focus && line.name !== focus ? 0.25 : 1);
  c.restore();
  if (drag) {
    c.fillStyle = "rgba(80, 140, 210, 0.2)";
    c.fillRect(Math.min(drag.from, drag.to), box.T, Math.abs(drag.to - drag.from), box.B - box.T);
  } else if (cursor) {
    c.strokeStyle = look.faint;
    c.lineWidth = 1;
    c.beginPath();
    c.moveTo(cursor.x, box.T);
    c.lineTo(cursor.x, box.B);
    c.stroke();
    for (const { line, i } of under(lines, scale, cursor)) {
      if (!Number.isFinite(line.y[i])) continue;
      c.fillStyle = colorOf(line.slot, look.dark);
      c.beginPath();
      c.arc(scale.x.at(line.x[i]), scale.y.at(line.y[i]), 3.5, 0, 7);
      c.fill();
    }
  }
  return { ...scale, box };
}

function placeText(place, v) {
  if (place === "time") return clockText(v, DAY);
  return place === "hours" ? `${number(v)} h` : `${place} ${number(v)}`;
}

function showTip(tip, state, scale, look) {
  // the values of all runs under the pointer, the nearest in bold
  const found = scale && state.cursor && !state.drag ? under(state.lines, scale, state.cursor) : [];
  tip.hidden = !found.length;
  tip.replaceChildren();
  for (const [k, { line, i }] of found.slice(0, 9).entries()) {
    const row = make(tip, "div", undefined, k ? "" : "nearest");
    make(row, "span", "●").style.color = colorOf(line.slot, look.dark);
    const value = Number.isFinite(line.y[i]) ? number(line.y[i]) : "no number";
    make(row, "span", ` ${line.name}: ${value} at ${placeText(state.axes.x, line.x[i])}`);
  }
  if (!found.length) return;
  const left = state.cursor.x > (scale.box.L + scale.box.R) / 2;
  tip.style.left = left ? "" : `${state.cursor.x + 14}px`;
  tip.style.right = left ? `${tip.parentElement.clientWidth - state.cursor.x + 14}px` : "";
}

function zoomAbout(scale, x, factor) {
  // around a pixel
  const { L, R } = scale.box;
  return { x: [scale.x.value(x - (x - L) * factor), scale.x.value(x + (R - x) * factor)] };
}

function addKeys(canvas, state, scaleNow, redraw) {
  canvas.tabIndex = 0;
  canvas.onkeydown = (e) => {
    const scale = scaleNow();
    if (!scale) return;
    const { L, R, T } = scale.box;
    const at = state.cursor || { x: (L + R) / 2, y: T };
    const move = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
    if (move) state.cursor = { ...at, x: Math.min(R, Math.max(L, at.x + (move * (R - L)) / 60)) };
    else if (e.key === "+" || e.key === "=") state.zoom = zoomAbout(scale, at.x, 0.5);
    else if (e.key === "-") state.zoom = zoomAbout(scale, at.x, 2);
    else if (e.key === "0" || e.key === "Escape") state.zoom = null;
    else return;
    e.preventDefault();
    redraw();
  };
}

function addPointer(canvas, state, scaleNow, redraw) {
  const inBox = (e, { L, R }) => Math.min(R, Math.max(L, e.offsetX));
  canvas.onpointerdown = (e) => {
    const scale = scaleNow();
    if (!scale || e.button) return;
    canvas.setPointerCapture(e.pointerId);
    state.drag = { from: inBox(e, scale.box), to: inBox(e, scale.box) };
  };
  canvas.onpointermove = (e) => {
    const scale = scaleNow();
    if (!scale) return;
    state.cursor = { x: inBox(e, scale.box), y: e.offsetY };
    if (state.drag) state.drag.to = state.cursor.x;
    redraw();
  };
  canvas.onpointerup = () => {
    const [scale, drag] = [scaleNow(), state.drag];
    state.drag = null;
    if (scale && drag && Math.abs(drag.to - drag.from) > 6)
      state.zoom = { x: [drag.from, drag.to].sort((a, b) => a - b).map(scale.x.value) };
    redraw();
  };
  canvas.onpointercancel = () => {
    state.drag = null;
    redraw();
  };
  canvas.onpointerleave = () => {
    state.cursor = null;
    redraw();
  };
  canvas.ondblclick = () => {
    state.zoom = null;
    redraw();
  };
  canvas.onwheel = (e) => {
    // only where the plot was clicked before: else the page is scrolled
    const scale = scaleNow();
    if (!scale || document.activeElement !== canvas) return;
    e.preventDefault();
    state.zoom = zoomAbout(scale, inBox(e, scale.box), e.deltaY > 0 ? 1.25 : 0.8);
    redraw();
  };
}

function addToolbar(root, change, reset) {
  const bar = make(root, "div", undefined, "tractkit-plot-bar");
  const choice = make(bar, "span", undefined, "tractkit-plot-choice");
  choice.setAttribute("role", "radiogroup");
  choice.setAttribute("aria-label", "curves by");
  const buttons = Object.keys(PLACES).map((place) => {
    const b = make(choice, "button", CHOICES[place]);
    b.setAttribute("role", "radio");
    b.title = place === "hours" ? "curves by the time spent in training and validation: pauses do not count" : "";
    b.title ||= `curves by ${PLACES[place]}`;
    b.onclick = () => change({ x: place });
    return [place, b];
  });
  const boxes = [
    ["logy", "log loss"],
    ["logx", "log x"],
    ["batches", "batches"],
  ].map(([key, text]) => {
    const label = make(bar, "label");
    const box = make(label, "input");
    box.type = "checkbox";
    label.append(` ${text}`);
    box.onchange = () => change({ [key]: box.checked });
    return [key, box];
  });
  const whole = make(bar, "button", "whole curves", "tractkit-runs-button");
  whole.title = "Show all again (double-click, or 0)";
  whole.onclick = reset;
  make(bar, "span", "drag over a stretch to enlarge it", "tractkit-plot-hint");
  return (axes, zoom) => {
    for (const [place, b] of buttons) b.setAttribute("aria-checked", place === axes.x);
    for (const [key, box] of boxes) box.checked = !!axes[key];
    boxes[1][1].disabled = axes.x === "time";
    whole.disabled = !zoom;
  };
}

function showKey(legend, lines) {
  // what the kinds of lines are: the first one of each run is solid, its training is dashed beside a validation
  const thin = new Set(lines.filter((l) => !l.main).map((l) => l.kind));
  const solid = new Set(lines.filter((l) => l.main).map((l) => l.kind));
  const key = make(legend, "div", undefined, "tractkit-plot-key");
  if (solid.size) make(key, "span", [...solid].join(" or else "), "solid");
  for (const kind of thin) make(key, "span", kind, kind);
}

function showLegend(legend, lines, look, focus) {
  legend.replaceChildren();
  for (const { name, status, slot } of lines.filter((l) => l.main)) {
    const item = make(legend, "span");
    make(item, "span", "●").style.color = colorOf(slot, look.dark);
    item.append(` ${name}${["dead", "failed", "running"].includes(status) ? ` (${status})` : ""}`);
    item.onpointerenter = () => focus(name);
    item.onpointerleave = () => focus(null);
  }
  showKey(legend, lines);
}

export function makePlot(parent, model, lookNow) {
  // the curves of the runs that are ticked
  const root = make(parent, "div", undefined, "tractkit-plot");
  const state = { lines: [], hidden: 0, axes: {}, zoom: null, focus: null, drag: null, cursor: null };
  const change = (some) => {
    if ("x" in some || "logx" in some) state.zoom = null;
    model.set("axes", { ...model.get("axes"), ...some });
    model.save_changes();
  };
  let scale = null;
  let waiting = false;
  const redraw = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      draw();
    });
  };
  const shown = addToolbar(root, change, () => {
    state.zoom = null;
    redraw();
  });
  const frame = make(root, "div", undefined, "tractkit-plot-frame");
  const canvas = make(frame, "canvas");
  const tip = make(frame, "div", undefined, "tractkit-plot-tip");
  const legend = make(root, "div", undefined, "tractkit-plot-legend");
  const note = make(root, "div", undefined, "tractkit-plot-note");
  function draw() {
    const look = lookNow();
    scale = drawPlot(canvas, state, look);
    showTip(tip, state, scale, look);
    shown(state.axes, state.zoom);
    const names = state.lines.filter((l) => l.main).map((l) => l.name);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `losses of ${names.join(", ") || "no run"} over ${PLACES[state.axes.x]}`);
  }
  function focus(name) {
    if (state.focus === name) return;
    state.focus = name;
    redraw();
  }
  function read() {
    state.axes = model.get("axes");
    const { names } = model.get("shown"); // a run that the filter hides stays ticked, but is not drawn
    const curves = model.get("curves").filter((curve) => !names || names.includes(curve.name));
    const { lines, without } = readLines(curves, state.axes, model.get("slots"));
    state.lines = lines;
    state.hidden = model.get("curves").length - curves.length;
    showLegend(legend, lines, lookNow(), focus);
    note.textContent = without.length ? `${PLACES[state.axes.x]} is not in the log of ${without.join(", ")}` : "";
    redraw();
  }
  addPointer(canvas, state, () => scale, redraw);
  addKeys(canvas, state, () => scale, redraw);
  return { read, redraw, focus, root };
}
