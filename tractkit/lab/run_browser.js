function render({ model, el }) {
  const root = document.createElement("div");
  const head = document.createElement("div");
  const said = document.createElement("span");
  const again = document.createElement("button");
  const scroll = document.createElement("div");
  const image = document.createElement("img");
  root.className = "tractkit-runs";
  head.className = "tractkit-runs-head";
  scroll.className = "tractkit-runs-scroll";
  again.textContent = "refresh";
  again.title = "Read the folder again; while a run is at work this happens by itself";
  again.className = "tractkit-runs-button";
  again.onclick = () => model.send({ verb: "refresh" });
  head.append(said, again);
  root.append(head, scroll, image);
  el.append(root);
  const make = (parent, tag, text) => {
    const e = document.createElement(tag);
    if (text !== undefined) e.textContent = text;
    parent.append(e);
    return e;
  };

  const sorted = (rows) => {
    const [key, down] = model.get("order");
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
  };
  const table = () => {
    const { columns, rows, below } = model.get("table");
    const chosen = model.get("chosen");
    const [key, down] = model.get("order");
    const focused =
      document.activeElement && root.contains(document.activeElement) ? document.activeElement.dataset.id : null;
    const whole = document.createElement("table");
    const line = make(make(whole, "thead"), "tr");
    const body = make(whole, "tbody");
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
    for (const row of sorted(rows)) {
      const tr = make(body, "tr");
      const first = make(tr, "td");
      const at = chosen.indexOf(row.name);
      tr.dataset.name = row.name;
      tr.dataset.status = row.status;
      if (row.drawable) {
        const box = make(first, "input");
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
      columns.forEach(([name, , right], i) => {
        const cell = make(tr, "td");
        if (right) cell.className = "right";
        if (name !== "status") {
          cell.textContent = row.cells[i];
          return;
        }
        const chip = make(cell, "span", row.status);
        chip.className = "tractkit-runs-chip";
        chip.style.background = row.color;
        if (row.note) make(cell, "div", row.note).className = "tractkit-runs-note";
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
    scroll.replaceChildren(whole);
    said.textContent = below;
    if (focused) {
      const e = [...root.querySelectorAll("[data-id]")].find((x) => x.dataset.id === focused);
      if (e) e.focus();
    }
  };
  let url = null;
  const picture = () => {
    const bytes = model.get("picture");
    if (url) URL.revokeObjectURL(url);
    url = bytes?.byteLength ? URL.createObjectURL(new Blob([bytes], { type: "image/png" })) : null;
    image.style.display = url ? "block" : "none";
    if (url) image.src = url;
    image.alt = `losses of ${model.get("chosen").join(", ")}`;
  };
  const theme = () => {
    const rgb = getComputedStyle(root)
      .backgroundColor.match(/[\d.]+/g)
      .map(Number);
    const dark = 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] < 128;
    root.dataset.dark = dark;
    if (model.get("dark") !== dark) {
      model.set("dark", dark);
      model.save_changes();
    }
  };
  model.on("change:table", table);
  model.on("change:chosen", table);
  model.on("change:order", table);
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
