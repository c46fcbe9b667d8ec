async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea"); // a page over plain http from another machine has no clipboard
  area.value = text;
  document.body.appendChild(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

function render({ model, el }) {
  const button = document.createElement("button");
  const code = document.createElement("pre");
  button.type = "button";
  button.className = "tractkit-copy";
  code.className = "tractkit-code";
  code.tabIndex = 0;
  const root = document.createElement("div"); // `el` has the style of its layout
  root.append(button, code);
  el.append(root);
  const show = () => {
    const text = model.get("text");
    root.hidden = !text;
    button.textContent = "Copy";
    code.textContent = text;
  };
  button.onclick = async () => {
    await copy(model.get("text"));
    button.textContent = "Copied";
    setTimeout(show, 2000);
  };
  model.on("change:text", show);
  show();
  return () => model.off("change:text", show);
}
export default { render };
