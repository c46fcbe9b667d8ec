import { drawCurves, explore, unpack } from "./curves.js";

const GRAPHS = {
  losses: ["training", "validation"],
  "gradient norm": ["gradient norm"],
  "learning rate": ["learning rate"],
  speed: ["batches/s"],
};
const ALONG = ["step", "epoch", "time"];
const IN_LINE = ["start", "resume", "pause"]; // of these the first that makes sense is a button of the compact form

function make(parent, tag, name, role) {
  const e = document.createElement(tag);
  e.className = `tractkit-${name}`;
  if (role) e.setAttribute("role", role);
  parent.appendChild(e);
  return e;
}

function radios(model, bar, key, names, label) {
  // buttons of which one is chosen: a value of the model; returns what shows it
  const choice = make(bar, "div", "choice", "radiogroup");
  choice.setAttribute("aria-label", label);
  const buttons = names.map((name) => {
    const b = make(choice, "button", "graph", "radio");
    b.type = "button";
    b.textContent = name;
    b.onclick = () => {
      model.set(key, name);
      model.save_changes();
    };
    return b;
  });
  return () => {
    for (const b of buttons) b.setAttribute("aria-checked", b.textContent === model.get(key));
  };
}

function field(bar, text, name, options) {
  // a labelled input
  const label = make(bar, "label", name);
  const input = document.createElement("input");
  label.append(`${text} `);
  label.appendChild(input);
  return Object.assign(input, options);
}

function toolbar(model, root, soon) {
  const bar = make(root, "div", "toolbar");
  const shown = [
    radios(model, bar, "graph", Object.keys(GRAPHS), "what is drawn"),
    radios(model, bar, "x", ALONG, "over step, epoch or time"),
  ];
  const group = make(bar, "div", "group");
  const log = field(group, "log", "smoothing", {
    type: "checkbox",
    title: "Logarithmic, where all values are positive",
  });
  log.onchange = () => {
    model.set("log", log.checked);
    model.save_changes();
  };
  const slider = field(group, "smoothing", "smoothing", {
    type: "range",
    min: 0,
    max: 0.1,
    step: 0.005,
    title: "Width of the running mean",
  });
  slider.oninput = () => {
    model.set("smoothing", +slider.value);
    soon();
  };
  slider.onchange = () => model.save_changes();
  return () => {
    for (const show of shown) show();
    log.checked = model.get("log");
    slider.value = model.get("smoothing");
    soon();
  };
}

function makeParts(root, toolbarOf) {
  const head = make(root, "div", "head");
  const parts = {};
  for (const name of ["chip", "where", "left", "name"]) parts[name] = make(head, "span", name);
  parts.bar = make(root, "div", "bar", "progressbar");
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

function makeLine(root, press) {
  // the compact form: one line above the curve; what it has no room for is kept, and not shown
  const line = make(root, "div", "line");
  const hidden = document.createElement("div");
  const parts = { buttons: [] };
  for (const title of ["Pause", "Stop"]) {
    const b = make(line, "button", "press");
    b.type = "button";
    make(b, "span", "icon");
    b.title = title;
    b.onclick = () => press(b.dataset.command);
    parts.buttons.push(b);
  }
  const more = make(line, "button", "press");
  more.type = "button";
  more.textContent = "···";
  more.title = "Show the whole panel";
  more.setAttribute("aria-label", more.title);
  more.onclick = () => press("whole");
  for (const name of ["chip", "where", "losses", "measures", "left"]) parts[name] = make(line, "span", name);
  parts.bar = make(line, "div", "bar", "progressbar");
  parts.whole = make(parts.bar, "div", "whole");
  parts.canvas = make(root, "canvas", "canvas", "img");
  parts.message = make(root, "div", "message", "status");
  for (const name of ["name", "part", "earlier", "list"]) parts[name] = make(hidden, "div", name);
  return parts;
}

function showButtons(buttons, enabled) {
  const commands = [IN_LINE.find((c) => enabled.includes(c)) || "pause", "stop"];
  commands.forEach((command, k) => {
    buttons[k].dataset.command = command;
    buttons[k].title = command[0].toUpperCase() + command.slice(1);
    buttons[k].setAttribute("aria-label", buttons[k].title);
    buttons[k].disabled = !enabled.includes(command);
  });
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
  parts.message.dataset.safe = r.safe || ""; // read by kernel_watch.js
  parts.chip.title = r.name;
  if (parts.buttons) showButtons(parts.buttons, r.enabled || []);
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

function drawGraph(model, root, canvas, view) {
  const look = lookOf(root);
  root.dataset.dark = look.dark;
  const shown = GRAPHS[model.get("graph")] || GRAPHS.losses;
  const curves = Object.fromEntries(Object.entries(model.get("curves")).map(([k, v]) => [k, unpack(v)]));
  if (view.x !== model.get("x")) view.zoom = null;
  const detail = model.get("detail");
  view.detail = detail?.curves && {
    ...detail,
    curves: Object.fromEntries(Object.entries(detail.curves).map(([k, v]) => [k, unpack(v)])),
  };
  Object.assign(view, {
    x: model.get("x"),
    log: model.get("log"),
    smoothing: model.get("smoothing"),
    marks: model.get("changes"),
  });
  view.shown = drawCurves(canvas, shown, curves, look, view);
  const what = `${shown.join(" and ")} over ${view.x}`;
  const words = document.activeElement === canvas && view.shown.words;
  canvas.setAttribute("aria-label", words || `${what}: arrow keys read values, + zooms, Escape shows all`);
}

function render({ model, el }) {
  const root = make(el, "div", "readout");
  const compact = model.get("compact");
  root.classList.toggle("tractkit-compact", compact);
  const view = { hover: null, drag: null, zoom: null };
  let waiting = false;
  const soon = () => {
    if (!waiting) {
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        drawGraph(model, root, parts.canvas, view);
      });
    }
  };
  const press = (command) => model.send({ press: command });
  const parts = compact ? makeLine(root, press) : makeParts(root, (parent) => toolbar(model, parent, soon));
  const words = () => showWords(parts, model.get("readout"));
  const chosen = parts.chosen || soon;
  parts.bar.setAttribute("aria-label", "progress of the training");
  parts.canvas.tabIndex = 0;
  parts.canvas.title = "Drag to zoom, double click to show all";
  view.zoomed = () =>
    requestAnimationFrame(() => {
      // after the drawing that finds out which steps are shown; asked once for each stretch
      const asked = JSON.stringify(view.steps);
      if (view.steps && asked !== view.asked) model.send({ zoom: view.steps });
      view.asked = asked;
    });
  explore(parts.canvas, view, soon);
  const handlers = {
    "change:readout": words,
    "change:curves change:changes change:detail": soon,
    "change:graph change:smoothing change:x change:log": chosen,
  };
  for (const [event, act] of Object.entries(handlers)) model.on(event, act);
  const size = new ResizeObserver(soon);
  const theme = new MutationObserver(soon);
  size.observe(root);
  theme.observe(document.body, { attributes: true });
  words();
  chosen();
  return () => {
    for (const [event, act] of Object.entries(handlers)) model.off(event, act);
    size.disconnect();
    theme.disconnect();
  };
}
export default { render };
