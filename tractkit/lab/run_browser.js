function make(parent, tag, text) {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  parent.append(e);
  return e;
}

function makeParts(el, refresh) {
  const root = make(el, "div");
  const head = make(root, "div");
  const below = make(head, "span");
  const again = make(head, "button", "refresh");
  const scroll = make(root, "div");
  const image = make(root, "img");
  root.className = "tractkit-runs";
  head.className = "tractkit-runs-head";
  scroll.className = "tractkit-runs-scroll";
  again.title = "Read the folder again; while a run is at work this happens by itself";
  again.className = "tractkit-runs-button";
  again.onclick = refresh;
  return { root, below, scroll, image };
}

function sorted(rows, [key, down]) {
  // what is not known comes last
  if (!key) return rows;
  const side = down ? -1 : 1;
  return [...rows].sort((a, b) => {
    const [x, y] = [a.sort[key], b.sort[key]];
    if (x === null || y === null) return (x === null) - (y === null);
    return (
      side *
      (typeof x === "number" && typeof y === "number"
        ? x - y
        : String(x).localeCompare(String(y), undefined, { numeric: true }))
    );
  });
}

function addHeadings(model, line, columns) {
  const [key, down] = model.get("order");
  make(line, "th").setAttribute("aria-label", "shown in the picture");
  for (const [name, label, right] of columns) {
    const cell = make(line, "th");
    const button = make(cell, "button", label + (key === name ? (down ? " ▾" : " ▴") : ""));
    if (right) cell.className = "right";
    button.dataset.id = `sort ${name}`;
    button.title = `sort by ${label}`;
    cell.setAttribute("aria-sort", key !== name ? "none" : down ? "descending" : "ascending");
    button.onclick = () => {
      model.set("order", [name, key === name && !down]);
      model.save_changes();
    };
  }
  make(line, "th", "loss");
  make(line, "th").className = "last";
}

function addCheckbox(model, cell, row) {
  const chosen = model.get("chosen");
  const at = chosen.indexOf(row.name);
  const box = make(cell, "input");
  box.type = "checkbox";
  box.checked = at >= 0;
  box.dataset.id = `show ${row.name}`;
  box.setAttribute("aria-label", `show the curves of ${row.name}`);
  if (at >= 0) box.style.accentColor = model.get("colors")[at % 8];
  box.onchange = () => {
    model.set("chosen", box.checked ? [...chosen, row.name] : chosen.filter((n) => n !== row.name));
    model.save_changes();
  };
}

function addStatus(cell, row) {
  const chip = make(cell, "span", row.status);
  chip.className = "tractkit-runs-chip";
  chip.style.background = row.color;
  if (row.note) make(cell, "div", row.note).className = "tractkit-runs-note";
}

function addRow(model, body, row, columns) {
  const tr = make(body, "tr");
  const first = make(tr, "td");
  tr.dataset.name = row.name;
  tr.dataset.status = row.status;
  if (row.drawable) addCheckbox(model, first, row);
  columns.forEach(([name, , right], i) => {
    const cell = make(tr, "td");
    if (right) cell.className = "right";
    if (name === "status") addStatus(cell, row);
    else cell.textContent = row.cells[i];
  });
  make(tr, "td").innerHTML = row.curve; // drawn by the kernel, of numbers only
  const last = make(tr, "td");
  last.className = "last";
  if (!["no run", "damaged"].includes(row.status)) {
    const open = make(last, "button", "open");
    open.className = "tractkit-runs-button";
    open.dataset.id = `open ${row.name}`;
    open.title = `Show the panel of ${row.name}`;
    open.onclick = () => model.send({ verb: "open", name: row.name });
  }
}

function showTable(model, { root, scroll, below }) {
  // anew; what had the focus has it again
  const { columns, rows, below: line } = model.get("table");
  const focused =
    document.activeElement && root.contains(document.activeElement) ? document.activeElement.dataset.id : null;
  const whole = document.createElement("table");
  addHeadings(model, make(make(whole, "thead"), "tr"), columns);
  const body = make(whole, "tbody");
  for (const row of sorted(rows, model.get("order"))) addRow(model, body, row, columns);
  scroll.replaceChildren(whole);
  below.textContent = line;
  if (focused) {
    const e = [...root.querySelectorAll("[data-id]")].find((x) => x.dataset.id === focused);
    if (e) e.focus();
  }
}

function showTheme(model, root) {
  // the kernel draws the picture for a light or a dark page
  const rgb = getComputedStyle(root)
    .backgroundColor.match(/[\d.]+/g)
    .map(Number);
  const dark = 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] < 128;
  root.dataset.dark = dark;
  if (model.get("dark") !== dark) {
    model.set("dark", dark);
    model.save_changes();
  }
}

function render({ model, el }) {
  const parts = makeParts(el, () => model.send({ verb: "refresh" }));
  const { image, root } = parts;
  let url = null;
  const table = () => showTable(model, parts);
  const picture = () => {
    const bytes = model.get("picture");
    if (url) URL.revokeObjectURL(url);
    url = bytes?.byteLength ? URL.createObjectURL(new Blob([bytes], { type: "image/png" })) : null;
    image.style.display = url ? "block" : "none";
    if (url) image.src = url;
    image.alt = `losses of ${model.get("chosen").join(", ")}`;
  };
  const theme = () => showTheme(model, root);
  for (const name of ["table", "chosen", "order"]) model.on(`change:${name}`, table);
  model.on("change:picture", picture);
  const watch = new MutationObserver(theme);
  watch.observe(document.body, { attributes: true });
  table();
  picture();
  requestAnimationFrame(theme);
  return () => {
    for (const name of ["table", "chosen", "order"]) model.off(`change:${name}`, table);
    model.off("change:picture", picture);
    watch.disconnect();
    if (url) URL.revokeObjectURL(url);
  };
}
export default { render };
