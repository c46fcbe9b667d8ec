// What all drawings on a canvas share: a clean canvas, and the places of an axis that are named.
export function openCanvas(canvas, font) {
  // drawn in CSS pixels
  const ratio = window.devicePixelRatio || 1;
  const W = canvas.clientWidth;
  const H = canvas.clientHeight;
  canvas.width = W * ratio;
  canvas.height = H * ratio;
  const c = canvas.getContext("2d");
  c.scale(ratio, ratio);
  c.font = `12px ${font}`;
  c.lineJoin = "round";
  c.lineCap = "round";
  return { c, W, H };
}

export function roundStep(low, high, nb) {
  // 1, 2 or 5 times a power of ten: about `nb` of them from low to high
  const raw = (high - low) / nb || 1;
  const unit = 10 ** Math.floor(Math.log10(raw));
  return unit * ([1, 2, 5, 10].find((s) => s * unit >= raw) || 10);
}

export function ticks(low, high, log, step, first = 0) {
  // multiples of a step after `first`; of a logarithmic axis round numbers, where there are three of them
  const out = [];
  const keep = (v) => {
    if (v >= low && v <= high) out.push(v);
  };
  for (const marks of log ? [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 5, 7]] : []) {
    out.length = 0;
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) for (const s of marks) keep(s * 10 ** e);
    if (out.length >= 3) return out;
  }
  out.length = 0;
  for (let v = Math.ceil((low - first) / step) * step + first; v <= high; v += step) keep(+v.toPrecision(12));
  return out;
}

export function number(v) {
  // in a few characters: 0.05, 1200, 1e11
  if (v === 0) return "0";
  const short = Math.abs(v) < 1e5 && Math.abs(v) >= 1e-3;
  return short ? String(+v.toPrecision(4)) : v.toExponential(1).replace(".0e", "e").replace("e+", "e");
}
