import { number, openCanvas, roundStep, ticks } from "./canvas.js";

// Curves on a canvas. Of each: "name" has its points, "name mean" the means of a noisy one; NaN is a gap.
const INK = {
  light: { training: "#2f6fb5", validation: "#c4521d", other: "#2f7d4f" },
  dark: { training: "#6fb0f0", validation: "#f39a5f", other: "#62bd84" },
};
const SETTINGS = ["learning rate"]; // drawn in steps, as they were set
const NEAR = 6; // pixels from a mark to the mouse
const ROW = 15; // pixels from one line of text to the next
const DOTS = 60; // validations that are drawn as a dot each; of more, a line
const count = (v) => v.toLocaleString("en", { maximumSignificantDigits: 9 });

export function unpack(view) {
  // float32 bytes: all x, then all y
  const all = new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
  return [all.subarray(0, all.length / 2), all.subarray(all.length / 2)];
}

function runningMean(y, share) {
  // over so much of the curve to each side, of what is finite
  const reach = Math.round(y.length * share);
  const out = new Float32Array(y.length);
  for (let i = 0; i < y.length; i++) {
    const b = Math.min(y.length, i + reach + 1);
    let sum = 0;
    let n = 0;
    for (let k = Math.max(0, i - reach); k < b; k++) {
      if (Number.isFinite(y[k])) {
        sum += y[k];
        n += 1;
      }
    }
    out[i] = Number.isFinite(y[i]) ? sum / n : Number.NaN;
  }
  return out;
}

function withGaps([x, y], gaps) {
  // means, broken off where the values had a gap; whole where gaps are nearly everywhere
  if (4 * gaps.length > x.length) return [x, y];
  const points = [...x].map((v, i) => [v, y[i]]).concat(gaps.map((v) => [v, Number.NaN]));
  points.sort((a, b) => a[0] - b[0]);
  return [points.map((p) => p[0]), points.map((p) => p[1])];
}

function along([steps, values], unit) {
  // a function from steps to what they are worth: interpolated from (0, 0) on, and beyond the last by the last slope
  const at = [0, ...steps].filter((_, i) => i === 0 || Number.isFinite(values[i - 1]));
  const worth = [0, ...[...values].filter(Number.isFinite)].map((v) => v / unit);
  return (step) => {
    let b = at.findIndex((v) => v >= step);
    if (b < 0) b = at.length - 1;
    const a = Math.max(b - 1, 0);
    return worth[a] + ((worth[b] - worth[a]) * (step - at[a])) / (at[b] - at[a] || 1);
  };
}

function axisOf(curves, wanted) {
  // what x is: its name, and the function from steps to it
  const known = { epoch: curves.epoch, time: curves.seconds }[wanted];
  if (!known?.[0].length) return { word: "step", of: (v) => v, stepAt: (v) => v };
  const long = known[1][known[1].length - 1] >= 7200;
  const [word, unit] = wanted === "epoch" ? ["epoch", 1] : long ? ["hours", 3600] : ["minutes", 60];
  const kept = known.map((side) => [...side].filter((_, i) => Number.isFinite(known[1][i])));
  return { word, of: along(known, unit), stepAt: along([kept[1].map((v) => v / unit), kept[0]], 1) };
}

function refine(curves, detail) {
  // curves with the finer points that the kernel sent of a stretch of steps, in place of those that are there
  const fine = { ...curves };
  for (const [name, [x, y]] of Object.entries(detail.curves)) {
    const [rough, worth] = curves[name] || [[], []];
    const outside = [...rough.keys()].filter((i) => rough[i] < detail.from || rough[i] > detail.to);
    const points = [...[...x].map((v, i) => [v, y[i]]), ...outside.map((i) => [rough[i], worth[i]])];
    points.sort((a, b) => a[0] - b[0]);
    fine[name] = [points.map((p) => p[0]), points.map((p) => p[1])];
    delete fine[`${name} mean`];
  }
  return fine;
}

function lineOf(name, curves, smoothing) {
  // what is drawn of a curve: its points, and the smooth line through them where it is noisy
  const [x, y] = curves[name];
  const setting = SETTINGS.includes(name);
  const gaps = [...x].filter((_, i) => !Number.isFinite(y[i]));
  const mean = curves[`${name} mean`] && curves[`${name} mean`][0].length ? curves[`${name} mean`] : [x, y];
  const noisy = !setting && name !== "validation" && x.length > 30 && smoothing > 0;
  const smooth = noisy ? withGaps([mean[0], runningMean(mean[1], smoothing)], mean[0] === x ? [] : gaps) : [x, y];
  return { name, x, y, smooth, noisy, setting };
}

function valuesBetween({ x, y }, from, to) {
  // the finite values in a range, and those beside it, to which lines lead
  const inside = (k) => x[k] >= from && x[k] <= to;
  return [...y].filter((v, i) => Number.isFinite(v) && (inside(i) || inside(i - 1) || inside(i + 1)));
}

function scales(lines, { L, R, T, B }, view) {
  // from x and values to pixels; logarithmic if it is wanted and all are positive
  const last = Math.max(1e-9, ...lines.map(({ x }) => x[x.length - 1]));
  const [from, to] = view.zoom || [0, last];
  const values = lines.flatMap((line) => valuesBetween(line, from, to));
  let low = values.length ? Math.min(...values) : 0;
  let high = values.length ? Math.max(...values) : 1;
  const log = low > 0 && view.log;
  const f = log ? Math.log : (v) => v;
  const pad = (high - low || Math.abs(high) || 1) * 0.05;
  [low, high] = log ? [low / 1.15, high * 1.1] : [low - pad, high + pad];
  const X = (v) => L + ((v - from) / (to - from)) * (R - L);
  const back = (pixel) => from + ((Math.min(Math.max(pixel, L), R) - L) / (R - L)) * (to - from);
  const Y = (v) => B - ((f(v) - f(low)) / (f(high) - f(low))) * (B - T);
  return { X, Y, back, low, high, from, to, log };
}

function drawAxes(c, look, { L, R, B }, { X, Y, low, high, from, to, log }, word) {
  c.strokeStyle = look.line;
  c.fillStyle = look.faint;
  c.lineWidth = 1;
  c.textBaseline = "middle";
  c.textAlign = "right";
  for (const v of ticks(low, high, log, roundStep(low, high, 4))) {
    c.beginPath();
    c.moveTo(L, Math.round(Y(v)) + 0.5);
    c.lineTo(R, Math.round(Y(v)) + 0.5);
    c.stroke();
    c.fillText(number(v), L - 8, Y(v));
  }
  c.textAlign = "center";
  const marks = ticks(from, to, false, roundStep(from, to, 4));
  for (const v of marks) c.fillText(count(v), X(v), B + 14);
  const ends = marks.map((v) => X(v) + c.measureText(count(v)).width / 2);
  c.textAlign = "left";
  c.fillText(word, Math.max(R, ...ends) + 8, B + 14); // after the last number
}

function drawLine(c, [x, y], { X, Y }, { color, width, alpha = 1, setting = false }) {
  c.beginPath();
  c.strokeStyle = color;
  c.lineWidth = width;
  c.globalAlpha = alpha;
  let before = null;
  for (let i = 0; i < x.length; i++) {
    if (!Number.isFinite(y[i])) {
      before = null;
      continue;
    }
    const [u, v] = [X(x[i]), Y(y[i])];
    if (before === null) {
      c.moveTo(u, v);
      c.lineTo(u + 0.01, v); // a point alone is a dot
    } else {
      if (setting) c.lineTo(u, before);
      c.lineTo(u, v);
    }
    before = v;
  }
  c.stroke();
  c.globalAlpha = 1;
}

function markGaps(c, x, y, { X, Y }, look, bottom) {
  // a cross where numbers end, at the height of the last one
  c.strokeStyle = look.dark ? "#ff8a80" : "#b3362c";
  c.lineWidth = 2;
  let height = bottom - 6;
  for (let i = 0; i < x.length; i++) {
    if (Number.isFinite(y[i])) height = Y(y[i]);
    else if (i === 0 || Number.isFinite(y[i - 1])) {
      const u = X(x[i]);
      c.beginPath();
      for (const s of [-4, 4]) {
        c.moveTo(u - 4, height - s);
        c.lineTo(u + 4, height + s);
      }
      c.stroke();
    }
  }
}

function drawDots(c, x, y, { X, Y }, color) {
  c.fillStyle = color;
  for (let i = 0; i < x.length; i++) {
    c.beginPath();
    c.arc(X(x[i]), Y(y[i]), 2.4, 0, 7);
    c.fill();
  }
}

function drawBest(c, [x, y], { X, Y }, color, back) {
  // a ring
  c.beginPath();
  c.arc(X(x[0]), Y(y[0]), 5.5, 0, 7);
  c.fillStyle = back;
  c.fill();
  c.lineWidth = 2.2;
  c.strokeStyle = color;
  c.stroke();
}

function drawNames(c, ends, left) {
  // beside the ends of the curves, one below the other
  ends.sort((a, b) => a.y - b.y);
  for (let i = 1; i < ends.length; i++) ends[i].y = Math.max(ends[i].y, ends[i - 1].y + ROW);
  c.textAlign = "left";
  for (const e of ends) {
    c.fillStyle = e.color;
    c.fillText(e.name, left, e.y);
  }
}

export function drawCurves(canvas, names, rough, look, view) {
  // view: hover, drag (pixels or null), zoom (a range of x, or null), detail (finer points of a stretch of steps),
  // smoothing, log, x; returns what pixels mean
  const { c, W, H } = openCanvas(canvas, look.font);
  const box = { L: 54, R: W - 98, T: 10, B: H - 26 };
  const { L, R, T, B } = box;
  const axis = axisOf(rough, view.x);
  view.steps = view.zoom?.map((x) => Math.round(axis.stepAt(x))) || null;
  const has = view.detail;
  const fits = view.steps && has && has.from <= view.steps[0] + 1 && has.end >= view.steps[1] - 1;
  const curves = fits ? refine(rough, has) : rough;
  const made = names.filter((k) => curves[k]?.[0].length).map((k) => lineOf(k, curves, view.smoothing));
  const place = (x) => Array.from(x, axis.of);
  const lines = made.map((line) => ({
    ...line,
    steps: line.x,
    x: place(line.x),
    smooth: [place(line.smooth[0]), line.smooth[1]],
  }));
  if (!lines.length) {
    c.fillStyle = look.faint;
    c.textAlign = "center";
    c.fillText("the curves appear here", (L + R) / 2, (T + B) / 2);
    return { box, back: null, words: "no curves yet" };
  }
  const inks = INK[look.dark ? "dark" : "light"];
  const ink = (name) => inks[name] || inks.other;
  const scale = scales(lines, box, view);
  drawAxes(c, look, box, scale, axis.word);
  c.save();
  c.beginPath();
  c.rect(L - 6, 0, R - L + 12, B + 1);
  c.clip();
  const ends = lines.map((line) => drawOne(c, line, scale, look, ink(line.name), box));
  const best = curves.best;
  if (names.includes("training") && best?.[0].length) {
    drawBest(c, [place(best[0]), best[1]], scale, ink(lines[lines.length - 1].name), look.back);
  }
  const marks = (view.marks || []).map((m) => ({ text: m.text, at: scale.X(axis.of(m.step)) }));
  drawMarks(c, marks, look, box, view.hover, lines.length);
  if (view.drag) {
    const [a, b] = view.drag.map((v) => Math.min(Math.max(v, L), R));
    c.fillStyle = look.dark ? "rgba(111, 176, 240, 0.25)" : "rgba(47, 111, 181, 0.18)";
    c.fillRect(Math.min(a, b), T, Math.abs(b - a), B - T);
  }
  c.restore();
  drawNames(c, ends, R + 8);
  const at = view.hover;
  const words = at !== null && at >= L && at <= R ? drawHover(c, lines, ink, look, at, { ...scale, T, B, L, R }) : "";
  const near = marks.filter((m) => Math.abs(m.at - at) < NEAR).map((m) => m.text);
  return { box, back: scale.back, words: [words, ...near].filter(Boolean).join(", ") };
}

function drawMarks(c, marks, look, { L, R, T, B }, hover, taken) {
  // changes of settings: a line and a triangle, and what was changed where the mouse is near, one below the other
  c.strokeStyle = look.faint;
  c.fillStyle = look.faint;
  c.lineWidth = 1;
  for (const { at } of marks) {
    c.setLineDash([3, 3]);
    c.beginPath();
    c.moveTo(at, T);
    c.lineTo(at, B);
    c.stroke();
    c.setLineDash([]);
    c.beginPath();
    c.moveTo(at, B - 7);
    c.lineTo(at - 5, B);
    c.lineTo(at + 5, B);
    c.fill();
  }
  const near = marks.filter(({ at }) => hover !== null && Math.abs(at - hover) < NEAR);
  if (!near.length) return;
  const room = Math.max(2, Math.floor((B - T - 20) / ROW) - taken + 1); // below what the curves have at this place
  const lines = near.map(({ text }) => text);
  if (lines.length > room) lines.splice(0, lines.length - room + 1, `${lines.length - room + 1} changes before`);
  c.textAlign = near[0].at > (L + R) / 2 ? "right" : "left";
  const places = near.map(({ at }) => at);
  const x = c.textAlign === "left" ? Math.max(...places) + 10 : Math.min(...places) - 10;
  for (const [row, text] of lines.reverse().entries()) c.fillText(text, x, B - 12 - ROW * row);
}

function drawOne(c, { name, x, y, smooth, noisy, setting }, scale, look, color, { T, B }) {
  // a curve with its dots and crosses; returns its name and where it ends
  if (noisy) drawLine(c, [x, y], scale, { color, width: 1, alpha: 0.35 });
  drawLine(c, smooth, scale, { color, width: 2, setting });
  if (name === "validation" && x.length <= DOTS) drawDots(c, x, y, scale, color);
  markGaps(c, x, y, scale, look, B);
  const seen = [...smooth[1]].filter((v, i) => Number.isFinite(v) && smooth[0][i] <= scale.to);
  const end = seen.length ? scale.Y(seen[seen.length - 1]) : B - 6;
  return { name, color, y: Math.min(Math.max(end, T), B) };
}

function drawHover(c, lines, ink, look, at, { X, T, B, L, R }) {
  // a line at a place, and what the curves have nearest to it; returns the words
  c.strokeStyle = look.faint;
  c.lineWidth = 1;
  c.beginPath();
  c.moveTo(at, T);
  c.lineTo(at, B);
  c.stroke();
  let row = T + 8;
  const words = lines.map(({ name, steps, x, y }) => {
    let k = 0;
    for (let i = 1; i < x.length; i++) if (Math.abs(X(x[i]) - at) < Math.abs(X(x[k]) - at)) k = i;
    c.fillStyle = ink(name);
    c.textAlign = at > (L + R) / 2 ? "right" : "left";
    const text = `${Number.isFinite(y[k]) ? number(y[k]) : "not finite"} at step ${count(steps[k])}`;
    c.fillText(text, at + (c.textAlign === "left" ? 8 : -8), row);
    row += ROW;
    return `${name} ${text}`;
  });
  return words.join(", ");
}

export function explore(canvas, view, draw) {
  // hover, zoom and keys; `draw` draws again soon, and keeps in `view.shown` what `drawCurves` returns
  let begun = null;
  const zoomTo = (a, b) => {
    const back = view.shown?.back;
    if (back && Math.abs(b - a) > 4) view.zoom = [back(Math.min(a, b)), back(Math.max(a, b))];
  };
  const reset = () => {
    view.zoom = null;
    draw();
    view.zoomed?.();
  };
  canvas.onpointerdown = (e) => {
    begun = e.offsetX;
    canvas.setPointerCapture(e.pointerId);
  };
  canvas.onpointermove = (e) => {
    view.hover = e.offsetX;
    view.drag = begun !== null && Math.abs(e.offsetX - begun) > 4 ? [begun, e.offsetX] : null;
    draw();
  };
  canvas.onpointerup = (e) => {
    if (begun !== null) zoomTo(begun, e.offsetX);
    begun = null;
    view.drag = null;
    draw();
    view.zoomed?.();
  };
  canvas.onpointercancel = canvas.onpointerup;
  canvas.onpointerleave = () => {
    view.hover = null;
    draw();
  };
  canvas.ondblclick = reset;
  canvas.onkeydown = (e) => {
    const { L, R } = view.shown?.box || { L: 0, R: 0 };
    const at = view.hover ?? (L + R) / 2;
    const half = (R - L) / 4;
    const acts = {
      ArrowLeft: () => {
        view.hover = Math.max(L, at - 5);
      },
      ArrowRight: () => {
        view.hover = Math.min(R, at + 5);
      },
      "+": () => zoomTo(Math.max(L, at - half), Math.min(R, at + half)),
      "-": reset,
      Escape: reset,
    };
    if (!acts[e.key] || e.ctrlKey || e.metaKey || e.altKey) return;
    e.preventDefault();
    e.stopPropagation();
    acts[e.key]();
    draw();
    if (e.key === "+") view.zoomed?.();
  };
}
