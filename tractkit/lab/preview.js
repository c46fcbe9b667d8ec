import { openCanvas } from "./canvas.js";

function unpack(view, n) {
  const a = view?.byteLength ? new Int8Array(view.buffer, view.byteOffset, view.byteLength) : new Int8Array(0);
  return { a, n, lines: a.length / (3 * n) };
}

function drawLines(canvas, { a, n, lines }, turn, look, words) {
  const { c, W, H } = openCanvas(canvas, look.font);
  const s = (0.46 * Math.min(W, H)) / 127;
  c.fillStyle = "#0e1116";
  c.fillRect(0, 0, W, H);
  const cy = Math.cos(turn.yaw);
  const sy = Math.sin(turn.yaw);
  const cp = Math.cos(turn.pitch);
  const sp = Math.sin(turn.pitch);
  const X = (i) => W / 2 + s * (a[i] * cy - a[i + 1] * sy);
  const Y = (i) => H / 2 - s * (a[i + 2] * cp + (a[i] * sy + a[i + 1] * cy) * sp);
  c.lineWidth = 1.1;
  c.globalAlpha = 0.85;
  c.lineCap = "round";
  for (let l = 0; l < lines; l++) {
    for (let k = 0; k < n - 1; k++) {
      const i = 3 * (l * n + k);
      const d = [0, 1, 2].map((j) => Math.abs(a[i + 3 + j] - a[i + j]));
      const m = Math.max(...d, 1);
      c.strokeStyle = `rgb(${d.map((v) => Math.round((255 * v) / m)).join(",")})`;
      c.beginPath();
      c.moveTo(X(i), Y(i));
      c.lineTo(X(i + 3), Y(i + 3));
      c.stroke();
    }
  }
  c.globalAlpha = 1;
  c.fillStyle = "#e8ecf1";
  c.textAlign = "left";
  c.textBaseline = "top";
  c.fillText(words, 9, 8);
}

function drawScores(canvas, scores, look, name) {
  const { c, W, H } = openCanvas(canvas, look.font);
  const [L, R, T, B] = [46, W - 14, 18, H - 22];
  c.fillStyle = look.faint;
  c.textBaseline = "middle";
  c.textAlign = "left";
  c.fillText(name, L, 7);
  c.textAlign = "right";
  c.fillText("epoch", R, H - 8);
  const last = Math.max(1, ...scores.map((p) => p[0]));
  const top = Math.max(1e-6, ...scores.map((p) => p[1])) * 1.1;
  const x = (v) => L + (v / last) * (R - L);
  const y = (v) => B - (v / top) * (B - T);
  c.strokeStyle = look.line;
  for (const v of [0, top / 2.2, top / 1.1]) {
    c.beginPath();
    c.moveTo(L, Math.round(y(v)) + 0.5);
    c.lineTo(R, Math.round(y(v)) + 0.5);
    c.stroke();
    c.fillText(String(+v.toPrecision(2)), L - 7, y(v));
  }
  c.strokeStyle = c.fillStyle = look.dark ? "#62bd84" : "#3a7f55";
  c.lineWidth = 2;
  c.beginPath();
  for (const p of scores) c.lineTo(x(p[0]), y(p[1])); // the first one moves there
  c.stroke();
  for (const p of scores) {
    c.beginPath();
    c.arc(x(p[0]), y(p[1]), 3, 0, 7);
    c.fill();
  }
}

function makeParts(root) {
  const add = (name, label) => {
    const e = document.createElement("canvas");
    e.className = name;
    e.setAttribute("role", "img");
    e.setAttribute("aria-label", label);
    e.tabIndex = 0;
    root.appendChild(e);
    return e;
  };
  const left = add("tractkit-lines", "reference streamlines; arrow keys turn them");
  const right = add("tractkit-lines", "streamlines of the model");
  const score = add("tractkit-score", "score over epochs");
  const note = document.createElement("div");
  note.className = "tractkit-note";
  note.setAttribute("role", "status");
  root.appendChild(note);
  return { left, right, score, note };
}

function lookOf(root) {
  // Colors and font that fit the page around. readout.js has some of these lines, too: each file reaches the browser
  // as a text of its own, from which no file beside it can be imported.
  const style = getComputedStyle(root);
  const rgb = style
    .getPropertyValue("background-color")
    .match(/[\d.]+/g)
    .map(Number);
  const dark = 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] < 128;
  return {
    dark,
    font: style.fontFamily,
    faint: dark ? "#a5adb8" : "#6b727c",
    line: dark ? "#363c44" : "#e6e9ee",
  };
}

const ARROWS = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1] };

function turnBy(canvases, turn, soon) {
  // by the pointer and by the arrow keys
  let from = null;
  const add = (yaw, pitch) => {
    turn.yaw += yaw;
    turn.pitch += pitch;
    soon();
  };
  for (const c of canvases) {
    c.onpointerdown = (e) => {
      from = [e.clientX, e.clientY];
      c.setPointerCapture(e.pointerId);
    };
    c.onpointermove = (e) => {
      if (!from) return;
      add((e.clientX - from[0]) / 120, (e.clientY - from[1]) / 120);
      from = [e.clientX, e.clientY];
    };
    c.onpointerup = () => {
      from = null;
    };
    c.onkeydown = (e) => {
      if (!ARROWS[e.key]) return;
      add(...ARROWS[e.key]);
      e.preventDefault();
      e.stopPropagation();
    };
  }
}

function render({ model, el }) {
  const root = document.createElement("div");
  root.className = "tractkit-preview";
  el.appendChild(root);
  const { left, right, score, note } = makeParts(root);
  const turn = { yaw: -0.5, pitch: 0.45 };
  let waiting = false;
  const draw = () => {
    waiting = false;
    const look = lookOf(root);
    const n = model.get("nb_points");
    drawLines(left, unpack(model.get("reference"), n), turn, look, "reference");
    drawLines(right, unpack(model.get("latest"), n), turn, look, model.get("title"));
    drawScores(score, model.get("scores"), look, model.get("measure"));
    note.textContent = model.get("note");
  };
  const soon = () => {
    if (!waiting) {
      waiting = true;
      requestAnimationFrame(draw);
    }
  };
  turnBy([left, right], turn, soon);
  const events = "change:reference change:latest change:scores change:note change:title";
  model.on(events, soon);
  const size = new ResizeObserver(soon);
  for (const seen of [root, left, score]) size.observe(seen);
  const theme = new MutationObserver(soon);
  theme.observe(document.body, { attributes: true });
  soon();
  return () => {
    model.off(events, soon);
    size.disconnect();
    theme.disconnect();
  };
}
export default { render };
