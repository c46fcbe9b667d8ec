const INK = {
  light: { training: "#2f6fb5", validation: "#d9622b", other: "#3a7f55" },
  dark: { training: "#6fb0f0", validation: "#f39a5f", other: "#62bd84" },
};
const number = (v) =>
  v === 0 ? "0" : Math.abs(v) >= 1e4 || Math.abs(v) < 1e-3 ? v.toExponential(1) : String(+v.toPrecision(4));

function unpack(view) {
  // float32 bytes: all x, then all y
  const all = new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
  return [all.subarray(0, all.length / 2), all.subarray(all.length / 2)];
}

function runningMean(y, share) {
  // over so much of the curve to each side
  const reach = Math.round(y.length * share);
  const out = new Float32Array(y.length);
  for (let i = 0; i < y.length; i++) {
    const a = Math.max(0, i - reach);
    const b = Math.min(y.length, i + reach + 1);
    let sum = 0;
    for (let k = a; k < b; k++) sum += y[k];
    out[i] = sum / (b - a);
  }
  return out;
}

function ticks(low, high, log) {
  const out = [];
  const keep = (v) => {
    if (v >= low && v <= high) out.push(v);
  };
  if (log) {
    for (const steps of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 5, 7]]) {
      out.length = 0;
      for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) for (const s of steps) keep(s * 10 ** e);
      if (out.length >= 3) return out;
    }
  }
  out.length = 0;
  const raw = (high - low) / 4 || 1;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = unit * ([1, 2, 5, 10].find((s) => s * unit >= raw) || 10);
  for (let v = Math.ceil(low / step) * step; v <= high; v += step) keep(+v.toPrecision(12));
  return out;
}

function openCanvas(canvas, font) {
  // a clean canvas, drawn in CSS pixels
  const ratio = window.devicePixelRatio || 1;
  const W = canvas.clientWidth;
  const H = canvas.clientHeight;
  canvas.width = W * ratio;
  canvas.height = H * ratio;
  const c = canvas.getContext("2d");
  c.scale(ratio, ratio);
  c.clearRect(0, 0, W, H);
  c.font = `12px ${font}`;
  c.lineJoin = "round";
  return { c, W, H };
}

function scales(lines, { L, R, T, B }) {
  // from steps and values to pixels; values are logarithmic if all are positive
  let low = Infinity;
  let high = -Infinity;
  let last = 1;
  for (const [, [x, y]] of lines) {
    for (const v of y) {
      low = Math.min(low, v);
      high = Math.max(high, v);
    }
    last = Math.max(last, x[x.length - 1]);
  }
  const log = low > 0;
  const f = log ? Math.log : (v) => v;
  [low, high] = log ? [low / 1.15, high * 1.1] : [low - (high - low || 1) * 0.05, high + (high - low || 1) * 0.05];
  const X = (v) => L + (v / last) * (R - L);
  const Y = (v) => B - ((f(v) - f(low)) / (f(high) - f(low))) * (B - T);
  return { X, Y, low, high, last, log };
}

function drawAxes(c, look, { L, R, B }, { X, Y, low, high, last, log }) {
  c.strokeStyle = look.line;
  c.fillStyle = look.faint;
  c.lineWidth = 1;
  c.textBaseline = "middle";
  c.textAlign = "right";
  for (const v of ticks(low, high, log)) {
    c.beginPath();
    c.moveTo(L, Math.round(Y(v)) + 0.5);
    c.lineTo(R, Math.round(Y(v)) + 0.5);
    c.stroke();
    c.fillText(number(v), L - 8, Y(v));
  }
  c.textAlign = "center";
  for (const v of ticks(0, last, false)) c.fillText(number(v), X(v), B + 14);
  c.textAlign = "left";
  c.fillText("step", R + 8, B + 14);
}

function drawLine(c, x, y, { X, Y }, color, width, alpha) {
  c.beginPath();
  c.strokeStyle = color;
  c.lineWidth = width;
  c.globalAlpha = alpha;
  for (let i = 0; i < x.length; i++) i ? c.lineTo(X(x[i]), Y(y[i])) : c.moveTo(X(x[i]), Y(y[i]));
  c.stroke();
  c.globalAlpha = 1;
}

function drawEpochs(c, x, y, { X, Y }, color, back) {
  // a dot for each epoch, a ring for the best one
  c.fillStyle = color;
  for (let i = 0; i < x.length; i++) {
    c.beginPath();
    c.arc(X(x[i]), Y(y[i]), 2.4, 0, 7);
    c.fill();
  }
  const best = y.indexOf(Math.min(...y));
  c.beginPath();
  c.arc(X(x[best]), Y(y[best]), 5.5, 0, 7);
  c.fillStyle = back;
  c.fill();
  c.lineWidth = 2.2;
  c.strokeStyle = color;
  c.stroke();
}

function drawNames(c, ends, left) {
  // beside the ends of the curves, one below the other
  ends.sort((a, b) => a.y - b.y);
  for (let i = 1; i < ends.length; i++) ends[i].y = Math.max(ends[i].y, ends[i - 1].y + 15);
  c.textAlign = "left";
  for (const e of ends) {
    c.fillStyle = e.color;
    c.fillText(e.name, left, e.y);
  }
}

function drawCurves(canvas, curves, look, hover, smoothing) {
  const { c, W, H } = openCanvas(canvas, look.font);
  const box = { L: 54, R: W - 98, T: 10, B: H - 26 };
  const { L, R, T, B } = box;
  const lines = Object.entries(curves).filter(([, [x]]) => x.length);
  if (!lines.length) {
    c.fillStyle = look.faint;
    c.textAlign = "center";
    c.fillText("the curves appear here", (L + R) / 2, (T + B) / 2);
    return;
  }
  const inks = INK[look.dark ? "dark" : "light"];
  const ink = (name) => inks[name] || inks.other;
  const scale = scales(lines, box);
  drawAxes(c, look, box, scale);
  const ends = lines.map(([name, [x, y]]) => {
    const color = ink(name);
    const noisy = name !== "validation" && name !== "learning rate" && x.length > 30 && smoothing > 0;
    const smooth = noisy ? runningMean(y, smoothing) : y;
    if (noisy) drawLine(c, x, y, scale, color, 1, 0.3);
    drawLine(c, x, smooth, scale, color, 2, 1);
    if (name === "validation") drawEpochs(c, x, y, scale, color, look.back);
    return { name, color, y: scale.Y(smooth[smooth.length - 1]) };
  });
  drawNames(c, ends, R + 8);
  if (hover !== null && hover >= L && hover <= R) drawHover(c, lines, ink, look, hover, { X: scale.X, T, B, R });
}

function drawHover(c, lines, ink, look, at, { X, T, B, R }) {
  c.strokeStyle = look.faint;
  c.lineWidth = 1;
  c.beginPath();
  c.moveTo(at, T);
  c.lineTo(at, B);
  c.stroke();
  let row = T + 8;
  for (const [name, [x, y]] of lines) {
    let k = 0;
    for (let i = 1; i < x.length; i++) if (Math.abs(X(x[i]) - at) < Math.abs(X(x[k]) - at)) k = i;
    c.fillStyle = ink(name);
    c.textAlign = at > (X(0) + R) / 2 ? "right" : "left";
    c.fillText(`${number(y[k])} at ${Math.round(x[k])}`, at + (c.textAlign === "left" ? 8 : -8), row);
    row += 15;
  }
}

const GRAPHS = {
  losses: ["training", "validation"],
  "gradient norm": ["gradient norm"],
  "learning rate": ["learning rate"],
  speed: ["batches/s"],
};

function make(parent, tag, name, role) {
  const e = document.createElement(tag);
  e.className = `tractkit-${name}`;
  if (role) e.setAttribute("role", role);
  parent.appendChild(e);
  return e;
}

function toolbar(model, root, soon) {
  const bar = make(root, "div", "toolbar");
  const choice = make(bar, "div", "choice", "radiogroup");
  const buttons = {};
  choice.setAttribute("aria-label", "what is drawn");
  for (const name of Object.keys(GRAPHS)) {
    const b = make(choice, "button", "graph", "radio");
    buttons[name] = b;
    b.type = "button";
    b.textContent = name;
    b.onclick = () => {
      model.set("graph", name);
      model.save_changes();
    };
  }
  const label = make(bar, "label", "smoothing");
  const slider = document.createElement("input");
  label.append("smoothing ");
  label.appendChild(slider);
  Object.assign(slider, { type: "range", min: 0, max: 0.1, step: 0.005, title: "Width of the running mean" });
  slider.oninput = () => {
    model.set("smoothing", +slider.value);
    soon();
  };
  slider.onchange = () => model.save_changes();
  return () => {
    for (const [name, b] of Object.entries(buttons)) b.setAttribute("aria-checked", name === model.get("graph"));
    slider.value = model.get("smoothing");
    soon();
  };
}

function makeParts(root, toolbarOf) {
  const head = make(root, "div", "head");
  const parts = {};
  for (const name of ["chip", "where", "left", "name"]) parts[name] = make(head, "span", name);
  parts.bar = make(root, "div", "bar", "progressbar");
  parts.bar.setAttribute("aria-label", "progress of the training");
  parts.whole = make(parts.bar, "div", "whole");
  parts.part = make(make(root, "div", "bar tractkit-thin"), "div", "part");
  parts.losses = make(root, "div", "losses");
  parts.measures = make(root, "div", "measures");
  parts.chosen = toolbarOf(root);
  parts.canvas = make(root, "canvas", "canvas", "img");
  parts.message = make(root, "div", "message", "status");
  parts.earlier = make(root, "details", "earlier");
  make(parts.earlier, "summary", "summary").textContent = "earlier messages";
  parts.list = make(parts.earlier, "ul", "list");
  return parts;
}

function showPairs(parent, values, kind) {
  parent.replaceChildren();
  for (const [key, value] of Object.entries(values)) {
    const item = make(parent, "span", kind);
    item.dataset.name = key;
    item.append(`${key} `);
    make(item, "b", "value").textContent = value;
  }
}

function showWords(parts, r) {
  parts.chip.textContent = r.label;
  parts.chip.style.background = r.color;
  parts.where.textContent = r.where;
  parts.left.textContent = r.left;
  parts.name.textContent = r.name;
  parts.message.textContent = r.message;
  parts.message.dataset.phase = r.phase;
  parts.whole.style.width = `${100 * r.done}%`;
  parts.part.style.width = `${100 * r.batches}%`;
  parts.bar.setAttribute("aria-valuenow", Math.round(100 * r.done));
  showPairs(parts.losses, r.losses, "loss");
  showPairs(parts.measures, r.measures || {}, "measure");
  const before = (r.messages || []).filter((m) => m !== r.message).reverse();
  parts.earlier.hidden = !before.length;
  parts.list.replaceChildren(
    ...before.map((m) => {
      const li = document.createElement("li");
      li.textContent = m;
      return li;
    }),
  );
}

function lookOf(root) {
  // colors and font that fit the page around
  const style = getComputedStyle(root);
  const rgb = style
    .getPropertyValue("background-color")
    .match(/[\d.]+/g)
    .map(Number);
  const dark = 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] < 128;
  return {
    dark,
    text: style.color,
    back: style.backgroundColor,
    font: style.fontFamily,
    faint: dark ? "#a5adb8" : "#6b727c",
    line: dark ? "#363c44" : "#e6e9ee",
  };
}

function drawGraph(model, root, canvas, hover) {
  const look = lookOf(root);
  root.dataset.dark = look.dark;
  const shown = GRAPHS[model.get("graph")] || GRAPHS.losses;
  const all = model.get("curves");
  const curves = Object.fromEntries(shown.filter((k) => all[k]).map((k) => [k, unpack(all[k])]));
  canvas.setAttribute("aria-label", `${shown.join(" and ")} over steps`);
  drawCurves(canvas, curves, look, hover, model.get("smoothing"));
}

function render({ model, el }) {
  const root = make(el, "div", "readout");
  let hover = null;
  let waiting = false;
  const soon = () => {
    if (!waiting) {
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        drawGraph(model, root, parts.canvas, hover);
      });
    }
  };
  const parts = makeParts(root, (parent) => toolbar(model, parent, soon));
  const words = () => showWords(parts, model.get("readout"));
  const point = (at) => {
    hover = at;
    soon();
  };
  parts.canvas.onpointermove = (e) => point(e.offsetX);
  parts.canvas.onpointerleave = () => point(null);
  const handlers = { "change:readout": words, "change:curves": soon, "change:graph change:smoothing": parts.chosen };
  for (const [event, act] of Object.entries(handlers)) model.on(event, act);
  const size = new ResizeObserver(soon);
  const theme = new MutationObserver(soon);
  size.observe(root);
  theme.observe(document.body, { attributes: true });
  words();
  parts.chosen();
  return () => {
    for (const [event, act] of Object.entries(handlers)) model.off(event, act);
    size.disconnect();
    theme.disconnect();
  };
}
export default { render };
