// What a view does in the page alone: the button for the full screen, names for the handles of its sliders, and a
// canvas of NiiVue that stays drawn.

function nameHandles(view) {
  for (const slider of view.querySelectorAll(".widget-slider")) {
    const name = slider.querySelector(".widget-label")?.textContent ?? "";
    const handles = slider.querySelectorAll(".noUi-handle");
    handles.forEach((handle, k) => {
      handle.setAttribute("aria-label", handles.length < 2 ? name : `${name}, ${k ? "upper" : "lower"} end`);
    });
  }
}

function makeButton(el) {
  const button = document.createElement("button");
  button.className = "lm-Widget jupyter-widgets jupyter-button widget-button";
  button.textContent = "Full screen";
  button.title = "The view and its controls on the whole screen; Escape leaves it";
  button.style.width = "112px";
  button.onclick = () => {
    if (document.fullscreenElement) document.exitFullscreen();
    else el.closest(".tractkit-view")?.requestFullscreen();
  };
  return button;
}

// While JupyterLab exchanges the styles of its theme, nothing has a size; NiiVue then makes its canvas one of no
// pixels, and looks at its size again when the window has another one.
function redrawEmpty(view) {
  const empty = [...(view?.querySelectorAll("canvas") ?? [])].some((c) => c.clientWidth && !c.width);
  if (empty) window.dispatchEvent(new Event("resize"));
}

export default {
  render({ el }) {
    el.appendChild(makeButton(el));
    const themes = new MutationObserver(() => {
      for (const wait of [50, 300, 1500]) window.setTimeout(() => redrawEmpty(el.closest(".tractkit-view")), wait);
    });
    themes.observe(document.body, { attributeFilter: ["data-jp-theme-name", "data-jp-theme-light"] });
    const observer = new MutationObserver(() => start());
    const start = () => {
      const view = el.closest(".tractkit-view");
      if (view) nameHandles(view);
      observer.disconnect(); // its own changes are none
      observer.observe(view ?? document.body, { childList: true, subtree: true });
    };
    start();
    return () => {
      observer.disconnect();
      themes.disconnect();
    };
  },
};
