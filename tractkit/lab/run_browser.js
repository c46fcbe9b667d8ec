import { number } from "./canvas.js";
import { colorOf, make, makePlot } from "./run_curves.js";

const AT_ONCE = 40; // rows that are drawn at first, and each time when a person scrolls near their end
const SHOWS_CURVES = "show the curves of";

function button(parent, text, title, onclick) {
  const b = make(parent, "button", text, "tractkit-runs-button");
  b.type = "button";
  b.title = title;
  b.onclick = onclick;
  return b;
}

function set(model, values) {
  for (const [name, value] of Object.entries(values)) model.set(name, value);
  model.save_changes();
}

function addFilter(model, head) {
  // words such as lr < 1e-3, sent to the kernel as they are written; what is wrong with them stands beside
  const field = make(head, "input");
  const problem = make(head, "span", undefined, "tractkit-runs-problem");
  field.type = "search";
  field.placeholder = "filter: lr < 1e-3 and model == TTO";
  field.setAttribute("aria-label", "filter runs");
  field.title = "Conditions on settings and columns with and, or, not; or words that are searched for";
  field.value = model.get("where");
  problem.setAttribute("role", "status");
  let waiting;
  const send = () => {
    clearTimeout(waiting);
    if (field.value !== model.get("where")) set(model, { where: field.value });
  };
  field.oninput = () => {
    clearTimeout(waiting);
    waiting = setTimeout(send, 250);
  };
  field.onchange = send;
  return () => {
    if (document.activeElement !== field) field.value = model.get("where");
    problem.textContent = model.get("shown").problem || "";
    field.setAttribute("aria-invalid", !!problem.textContent);
  };
}

function shownColumns(model) {
  // those that were chosen, else those that are shown at first
  const all = model.get("table").columns;
  const chosen = model.get("columns");
  return all
    .map((c, i) => [...c.slice(0, 3), i])
    .filter(([key], i) => (chosen.length ? chosen.includes(key) : all[i][3]));
}

function addChoices(model, head) {
  // which columns are shown, and by which the rows are grouped
  const label = make(head, "label", "group by ");
  const group = make(label, "select");
  const fold = make(head, "details", undefined, "tractkit-runs-columns");
  make(fold, "summary", "columns");
  const list = make(fold, "div");
  group.onchange = () => set(model, { group: group.value });
  return () => {
    const all = model.get("table").columns;
    const differ = all.filter((column) => column.length === 4);
    const keys = differ.filter(([key]) => !["name", "curve", "best", "hours", "step", "notes"].includes(key));
    const options = [["", "nothing"], ["tags", "tag"], ...keys];
    group.replaceChildren(...options.map(([key, text]) => new Option(text, key)));
    group.value = model.get("group");
    const now = shownColumns(model).map(([key]) => key);
    list.replaceChildren();
    for (const [i, [key, text]] of all.entries()) {
      if (i === 0) continue;
      if (i === differ.length) make(list, "div", "the same in all runs", "tractkit-runs-same");
      const line = make(list, "label");
      const box = make(line, "input");
      box.type = "checkbox";
      box.checked = now.includes(key);
      line.append(` ${text}`);
      box.onchange = () => {
        const chosen = all.map(([k]) => k).filter((k) => (k === key ? box.checked : now.includes(k)));
        set(model, { columns: chosen });
      };
    }
    button(list, "as at first", "Show the columns that were there at first", () => set(model, { columns: [] }));
  };
}

function makeParts(model, el) {
  const root = make(el, "div", undefined, "tractkit-runs");
  const head = make(root, "div", undefined, "tractkit-runs-head");
  const filter = addFilter(model, head);
  const choices = addChoices(model, head);
  button(head, "refresh", "Read the folder again; every few seconds this happens by itself", () =>
    model.send({ verb: "refresh" }),
  );
  const scroll = make(root, "div", undefined, "tractkit-runs-scroll");
  const below = make(root, "div", undefined, "tractkit-runs-below");
  return { root, filter, choices, scroll, below };
}

function compare(a, b) {
  // what is not known comes last, whichever way the column is sorted
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), undefined, { numeric: true });
}

function sorted(rows, at, down) {
  if (at < 0) return rows;
  const side = down ? -1 : 1;
  return [...rows].sort((p, q) => {
    const [a, b] = [p.sort[at], q.sort[at]];
    return a === null || b === null ? (a === null) - (b === null) : side * compare(a, b);
  });
}

function addHeadings(model, line, columns) {
  const [key, down] = model.get("order");
  make(line, "th").setAttribute("aria-label", "shown in the picture");
  for (const [name, label, right] of columns) {
    const cell = make(line, "th");
    const b = make(cell, "button");
    for (const part of label.split(/(?<=[_.])/)) b.append(part, document.createElement("wbr")); // where it may break
    if (key === name) b.append(down ? " ▾" : " ▴");
    if (right) cell.className = "right";
    b.dataset.id = `sort ${name}`;
    b.title = `sort by ${label}`;
    cell.setAttribute("aria-sort", key !== name ? "none" : down ? "descending" : "ascending");
    b.onclick = () => set(model, { order: [name, key === name && !down] });
  }
  make(line, "th").className = "last";
}

function freeSlot(slots, chosen) {
  // the first color that no other run in the picture has
  const taken = chosen.map((name) => slots[name]);
  let k = 0;
  while (taken.includes(k)) k++;
  return k;
}

function addCheckbox(model, cell, row, dark) {
  const chosen = model.get("chosen");
  const slots = model.get("slots");
  const box = make(cell, "input");
  box.type = "checkbox";
  box.checked = chosen.includes(row.name);
  box.dataset.id = `show ${row.name}`;
  box.setAttribute("aria-label", `${SHOWS_CURVES} ${row.name}`);
  if (box.checked) box.style.accentColor = colorOf(slots[row.name] || 0, dark);
  box.onchange = () => {
    const now = model.get("chosen").filter((n) => n !== row.name);
    if (!box.checked) return set(model, { chosen: now });
    return set(model, { slots: { ...slots, [row.name]: freeSlot(slots, now) }, chosen: [...now, row.name] });
  };
}

function addStatus(cell, row) {
  const chip = make(cell, "span", row.status, "tractkit-runs-chip");
  chip.style.background = row.color;
  if (row.nan) {
    const nan = make(cell, "span", "NaN", "tractkit-runs-chip tractkit-runs-nan");
    nan.title = row.nan;
  }
  const text = [row.note, row.nan].filter(Boolean).join("; ");
  if (text) make(cell, "div", text, "tractkit-runs-note").title = text;
}

function editNotes(model, cell, row, done) {
  // in the place of the name: a note and tags, kept in the folder of the run
  const form = make(cell, "form", undefined, "tractkit-runs-edit");
  const note = make(form, "textarea");
  const tags = make(form, "input");
  note.value = row.notes;
  note.rows = 3;
  note.placeholder = "note";
  note.setAttribute("aria-label", `note on ${row.name}`);
  tags.value = row.tags.join(", ");
  tags.placeholder = "tags, with commas";
  tags.setAttribute("aria-label", `tags of ${row.name}`);
  const line = make(form, "div");
  const save = button(line, "save", "Keep them in the folder of the run (Ctrl-Enter)", null);
  save.type = "submit";
  button(line, "cancel", "Leave them as they were (Escape)", done);
  form.onsubmit = (e) => {
    e.preventDefault();
    model.send({ verb: "annotate", name: row.name, note: note.value, tags: tags.value });
    done();
  };
  form.onkeydown = (e) => {
    e.stopPropagation(); // keys of the notebook
    if (e.key === "Escape") done();
    if (e.key === "Enter" && e.ctrlKey) form.requestSubmit();
  };
  note.focus();
}

function addName(cell, row, view, noted) {
  // noted: the notes have a column of their own
  cell.className = "name";
  make(cell, "span", row.name);
  if (row.status !== "no run") {
    const edit = make(cell, "button", "✎", "tractkit-runs-pen");
    edit.type = "button";
    edit.dataset.id = `note ${row.name}`;
    edit.title = `Write a note or tags on ${row.name}`;
    edit.setAttribute("aria-label", edit.title);
    edit.onclick = () => view.edit(row.name);
  }
  if (row.tags.length) {
    const line = make(cell, "div");
    for (const tag of row.tags) make(line, "span", tag, "tractkit-runs-tag");
  }
  if (row.notes && !noted) make(cell, "div", row.notes, "tractkit-runs-note").title = row.notes;
}

function cellOf(row, column, i) {
  // settings that are the same in all runs come once, with their column
  return row.cells[i] ?? (row.configured ? column[4] : "");
}

function addRow(model, body, row, columns, view) {
  const tr = make(body, "tr");
  const first = make(tr, "td");
  const all = model.get("table").columns;
  const noted = columns.some(([key]) => key === "notes");
  tr.dataset.name = row.name;
  tr.dataset.status = row.status;
  tr.onpointerenter = () => view.focus(model.get("chosen").includes(row.name) ? row.name : null);
  tr.onpointerleave = () => view.focus(null);
  if (row.drawable) addCheckbox(model, first, row, view.dark());
  for (const [key, , right, i] of columns) {
    const cell = make(tr, "td");
    if (right) cell.className = "right";
    if (key === "notes") cell.className = "notes";
    if (key === "status") addStatus(cell, row);
    else if (key === "curve")
      cell.innerHTML = row.curve; // drawn by the kernel, of numbers only
    else if (key !== "name") {
      cell.textContent = cellOf(row, all[i], i);
      if (cell.textContent.length > 9) cell.title = cell.textContent; // it may be cut
    } else if (view.edited === row.name) editNotes(model, cell, row, () => view.edit(null));
    else addName(cell, row, view, noted);
  }
  const last = make(tr, "td", undefined, "last");
  if (["no run", "damaged", "gone"].includes(row.status)) return;
  const open = button(last, "open", `Show the panel of ${row.name}`, () =>
    model.send({ verb: "open", name: row.name }),
  );
  open.dataset.id = `open ${row.name}`;
}

function grouped(rows, key, at) {
  // [value, rows] for each value of a column, in its order; a run is in the group of each of its tags
  const groups = new Map();
  const add = (value, row) => groups.set(value, [...(groups.get(value) || []), row]);
  for (const row of key === "tags" ? rows : sorted(rows, at, false))
    for (const value of key !== "tags" ? [row.cells[at]] : row.tags.length ? row.tags : [""]) add(value, row);
  if (key !== "tags") return [...groups];
  return [...groups].sort(([a], [b]) => (a === "") - (b === "") || compare(a, b));
}

function addGroup(body, [value, rows], heading, width, bestAt, view) {
  const key = `${heading} ${value}`;
  const cell = make(make(body, "tr", undefined, "tractkit-runs-group"), "td");
  cell.colSpan = width;
  const known = rows.filter((r) => r.sort[bestAt] !== null).sort((a, b) => a.sort[bestAt] - b.sort[bestAt]);
  const best = known.length ? `, best ${number(known[0].sort[bestAt])} of ${known[0].name}` : "";
  const middle = known.length > 2 ? `, median ${number(known[known.length >> 1].sort[bestAt])}` : "";
  const closed = view.closed.has(key);
  const b = make(cell, "button", `${closed ? "▸" : "▾"} ${heading}: ${value || "–"}`);
  b.dataset.id = `group ${key}`;
  b.setAttribute("aria-expanded", !closed);
  make(cell, "span", ` ${rows.length} run${rows.length > 1 ? "s" : ""}${best}${middle}`);
  b.onclick = () => view.toggle(key);
}

function rowMakers(model, body, rows, columns, view) {
  // what is to be drawn, one after the other: functions that each add a row to the table, or the name of a group
  const all = model.get("table").columns;
  const key = model.get("group");
  const at = all.findIndex(([name]) => name === key);
  const bestAt = all.findIndex(([name]) => name === "best");
  const maker = (row) => () => addRow(model, body, row, columns, view);
  if (at < 0 && key !== "tags") return rows.map(maker);
  const heading = key === "tags" ? "tag" : all[at][1];
  const places = new Map(rows.map((row, i) => [row, i])); // in a group they are sorted as in the table
  return grouped(rows, key, at).flatMap(([value, some]) => {
    const head = () => addGroup(body, [value, some], heading, columns.length + 2, bestAt, view);
    if (view.closed.has(`${heading} ${value}`)) return [head];
    return [head, ...[...some].sort((a, b) => places.get(a) - places.get(b)).map(maker)];
  });
}

function shownRows(model) {
  const { columns, rows } = model.get("table");
  const names = model.get("shown").names;
  const kept = names ? new Set(names) : null;
  const some = kept ? rows.filter((row) => kept.has(row.name)) : rows;
  const [key, down] = model.get("order");
  return sorted(
    some,
    columns.findIndex(([name]) => name === key),
    down,
  );
}

function showTable(model, { root, scroll, below }, view) {
  // anew; what had the focus has it again
  const { rows: all, below: line } = model.get("table");
  const focused = root.contains(document.activeElement) ? document.activeElement.dataset.id : null;
  const columns = shownColumns(model);
  const rows = shownRows(model);
  const whole = document.createElement("table");
  addHeadings(model, make(make(whole, "thead"), "tr"), columns);
  const makers = rowMakers(model, make(whole, "tbody"), rows, columns, view);
  let drawn = 0;
  view.fill = () => {
    while (drawn < Math.min(view.most, makers.length)) makers[drawn++]();
    return drawn < makers.length;
  };
  view.fill();
  scroll.replaceChildren(whole);
  below.textContent = `${rows.length < all.length ? `${rows.length} of ${all.length} runs shown. ` : ""}${line} `;
  const again = focused && [...scroll.querySelectorAll("[data-id]")].find((x) => x.dataset.id === focused);
  if (again) again.focus();
}

function lookOf(root) {
  const style = getComputedStyle(root);
  // before it is in a page it has no color
  const rgb = (style.backgroundColor.match(/[\d.]+/g) || [255, 255, 255]).map(Number);
  const dark = 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] < 128;
  return {
    dark,
    back: style.backgroundColor,
    font: style.fontFamily,
    faint: dark ? "#a5adb8" : "#6b727c",
    grid: dark ? "#363c44" : "#e6e9ee",
  };
}

function mergeRows(model) {
  // rows that have changed; the kernel has put them into its table, too
  const { rows, below } = model.get("changed");
  const table = model.get("table");
  if (below === undefined) return;
  for (const [i, row] of Object.entries(rows)) table.rows[i] = row;
  table.below = below;
}

function makeView(parts, draw) {
  // what is of this page alone: which form is open, which groups are closed, how many rows are drawn
  const view = { edited: null, closed: new Set(), most: AT_ONCE, focus: () => {}, fill: () => false };
  view.dark = () => lookOf(parts.root).dark;
  view.edit = (name) => {
    view.edited = name;
    draw();
  };
  view.toggle = (key) => {
    if (!view.closed.delete(key)) view.closed.add(key);
    draw();
  };
  parts.scroll.onscroll = () => {
    const { scrollTop, clientHeight, scrollHeight } = parts.scroll;
    if (scrollTop + 2 * clientHeight < scrollHeight) return;
    view.most += AT_ONCE;
    if (!view.fill()) view.most -= AT_ONCE; // all are drawn
  };
  return view;
}

function render({ model, el }) {
  const parts = makeParts(model, el);
  const draw = () => showTable(model, parts, view);
  const view = makeView(parts, draw);
  const plot = makePlot(parts.root, model, () => lookOf(parts.root));
  view.focus = plot.focus;
  const table = () => {
    parts.filter();
    parts.choices();
    // what is being written is not taken away
    if (!view.edited) draw();
  };
  const merge = () => {
    mergeRows(model);
    if (!view.edited) draw();
  };
  const theme = () => {
    const before = parts.root.dataset.dark;
    parts.root.dataset.dark = view.dark();
    if (before !== parts.root.dataset.dark && !view.edited) draw();
    plot.read();
  };
  const handlers = { changed: merge, curves: plot.read, axes: plot.read, slots: plot.read };
  for (const name of ["table", "chosen", "order", "columns", "group", "where"]) handlers[name] = table;
  handlers.shown = () => {
    table();
    plot.read();
  };
  for (const [name, act] of Object.entries(handlers)) model.on(`change:${name}`, act);
  const watch = new MutationObserver(theme);
  const size = new ResizeObserver(theme);
  watch.observe(document.body, { attributes: true });
  size.observe(plot.root);
  table();
  requestAnimationFrame(theme);
  return () => {
    for (const [name, act] of Object.entries(handlers)) model.off(`change:${name}`, act);
    watch.disconnect();
    size.disconnect();
  };
}
export default { render };
