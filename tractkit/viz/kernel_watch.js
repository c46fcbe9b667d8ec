const TICK = 350; // milliseconds
const AGAIN = 20; // ticks after which a question is asked once more: an answer is lost with its connection
const ENDS = ["restarting", "autorestarting", "terminating", "dead"];

function listen(kernel) {
  // One question at a time for each kernel, however many widgets ask: is it there? It goes to the control channel,
  // which the kernel serves while a cell runs, and JupyterLab counts it neither as work nor as activity.
  window.tractkitKernels ??= new WeakMap();
  const known = window.tractkitKernels.get(kernel) || { asked: false, ticks: 0, at: 0 };
  window.tractkitKernels.set(kernel, known);
  if (performance.now() - known.at < 0.8 * TICK) return known; // another widget was here
  known.at = performance.now();
  known.ticks += 1;
  const due = known.asked ? known.ticks % AGAIN === 0 : known.ticks >= 2;
  if (!due || kernel.connectionStatus !== "connected") return known;
  const over = () => {
    known.asked = false;
    known.ticks = 0;
  };
  try {
    const future = kernel.requestDebug({ type: "request", seq: 0, command: "debugInfo" });
    if (!known.asked) known.ticks = 0;
    known.asked = true;
    future.onReply = over;
    future.done.catch(over); // restarted: who waited for this answer waits for none now
  } catch {
    over(); // a kernel without this question
  }
  return known;
}

function stateOf(model, el, first) {
  // "", "silent", "offline" or "gone"
  if (el.classList.contains("jupyter-widgets-disconnected")) return "gone"; // its model in the kernel is no more
  const kernel = model.widget_manager?.kernel;
  if (kernel === undefined) return ""; // a page that does not show us its kernel
  if (kernel === null || ENDS.includes(kernel.status) || (first && kernel.id !== first)) return "gone";
  if (typeof kernel.requestDebug !== "function") return "";
  if (kernel.connectionStatus !== "connected") return "offline";
  const known = listen(kernel);
  return known.asked && known.ticks >= 4 ? "silent" : "";
}

function words(state, safe) {
  const run = safe && ` ${safe}.`;
  if (state === "offline") return "No connection to the kernel; the page tries again.";
  if (state === "silent") return `The kernel is gone or does not answer.${run} If this stays, run the cell again.`;
  return `The kernel is gone.${run} Run the cell again.`;
}

function render({ model, el }) {
  const note = document.createElement("div");
  note.className = "tractkit-watch";
  note.setAttribute("role", "alert");
  el.appendChild(note);
  const first = model.widget_manager?.kernel?.id;
  let state = "";
  const show = () => {
    if (state !== "gone") state = stateOf(model, el, first); // from there nothing leads back
    el.style.display = state ? "" : "none";
    const beside = el.parentElement?.querySelector("[data-safe]")?.dataset.safe; // of a panel, which follows a run
    const text = state ? words(state, beside || model.get("safe")) : "";
    if (note.textContent !== text) note.textContent = text;
    for (const part of el.parentElement?.children || []) {
      if (part === el || part.querySelector(".tractkit-watch")) continue; // that one watches for itself
      part.classList.toggle("tractkit-gone", state !== "");
      part.inert = state !== "";
    }
  };
  const changed = (_, status) => {
    if (ENDS.includes(status)) state = "gone";
    show();
  };
  const signal = model.widget_manager?.kernel?.statusChanged;
  const timer = setInterval(show, TICK);
  signal?.connect(changed);
  show();
  return () => {
    clearInterval(timer);
    signal?.disconnect(changed);
  };
}
export default { render };
