"""The curves of a panel in a browser, on a page of their own: what they read, zoom, keys, steps and gaps."""

import base64
import json
import re

import numpy as np
import pytest
from lab import PICTURES

from tractkit.lab.live_curves import pack_curves, pack_detail
from tractkit.lab.readout import Readout, marks_of
from tractkit.lab.status_text import describe_status
from tractkit.runs.status import Status

pytestmark = pytest.mark.browser

PAGE = """<!doctype html><style>%s body{margin:0;width:860px}</style><div id="root"></div><script type="module">
const values = %s, on = {};
for (const [k, v] of Object.entries(values.curves))
  values.curves[k] = new DataView(Uint8Array.from(atob(v), (c) => c.charCodeAt(0)).buffer);
const model = {get: (k) => values[k], save_changes() {}, send(m) { window.sent = m; }, off() {},
  on(e, f) { on[e] = f; }, set(k, v) {
  values[k] = v; for (const [e, f] of Object.entries(on)) if (e.split(" ").includes("change:" + k)) f(); }};
window.model = model;
const url = URL.createObjectURL(new Blob([%s], {type: "text/javascript"}));
(await import(url)).default.render({model, el: document.getElementById("root")}); window.ready = true;</script>"""
RED = """c => { const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data; let n = 0;
  for (let i = 0; i < d.length; i += 4)
    n += d[i + 3] > 200 && Math.abs(d[i] - 179) < 12 && Math.abs(d[i + 1] - 54) < 12 && Math.abs(d[i + 2] - 44) < 12;
  return n; }"""


def test_curves_are_read_zoomed_and_walked_along(browser):
    steps = np.arange(1, 20_001)
    loss, valid = 0.1 + np.exp(-steps / 4_000), np.arange(300, 20_001, 300)
    loss[12_000], loss[7_000:7_600] = 1.3, np.nan
    curves = {
        "training": (steps, loss), "validation": (valid, 0.1 + np.exp(-valid / 4_000)), "best": ([19_800], [0.107]),
        "learning rate": (steps, np.where(steps < 5_000, 0.01, np.where(steps < 5_500, 1_000, 0.001))),
        "epoch": (valid, valid / 300), "seconds": (steps, steps * 0.06),
    }
    packed = {k: base64.b64encode(v).decode() for k, v in pack_curves(curves).items()}
    readout = Readout(readout={**describe_status(Status("training", 3, 67, 5, 300))})
    values = {k: getattr(readout, k) for k in ("readout", "graph", "x", "log", "smoothing")}
    page, wrong = browser.new_page(viewport={"width": 900, "height": 500}), []
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.set_content(PAGE % (readout._css, json.dumps(values | {"curves": packed}), json.dumps(readout._esm)))
    page.wait_for_function("window.ready")
    canvas = page.locator("canvas")
    box = canvas.bounding_box()

    def read(x):
        """What is under a pixel."""
        page.mouse.move(box["x"] + x, box["y"] + 100)
        page.wait_for_timeout(80)
        return canvas.get_attribute("aria-label")

    def step(x):
        return int(re.search(r"at step ([\d,]+)", read(x))[1].replace(",", ""))

    assert "losses" not in read(300) and "training and validation over step" in read(300)
    canvas.focus()
    assert step(56) < 100 and 9_000 < step(400) < 11_500
    spike = 54 + 12_001 / 20_000 * (box["width"] - 152)
    assert "training 1.3 at step 12,001" in read(spike)  # as high as it was
    assert canvas.evaluate(RED) > 10  # the cross where numbers end
    read(350)
    page.mouse.down()
    read(500)
    page.mouse.up()
    assert 8_000 < step(56) < 9_500 and 11_000 < step(box["width"] - 100) < 13_500  # the range that was dragged over
    first, last = page.evaluate("() => window.sent.zoom")  # the kernel is asked for more of these steps
    assert 8_000 < first < 9_500 and 11_000 < last < 13_500
    rough = {step(x) for x in range(200, 220)}
    records = [{"kind": "batch", "step": k, "loss": loss[k - 1]} for k in range(first, last + 1)]
    detail = pack_detail(records, first, last)
    detail["curves"] = {k: base64.b64encode(v).decode() for k, v in detail["curves"].items()}
    page.evaluate("""detail => {
        for (const [k, v] of Object.entries(detail.curves))
            detail.curves[k] = new DataView(Uint8Array.from(atob(v), (c) => c.charCodeAt(0)).buffer);
        window.model.set("detail", detail);
    }""", detail)
    fine = {step(x) for x in range(200, 220)}
    assert len(fine) > 2 * len(rough)
    page.mouse.dblclick(box["x"] + 300, box["y"] + 100)
    assert step(56) < 100
    page.get_by_role("radio", name="learning rate").click()
    canvas.focus()
    between = 54 + 5_250 / 20_000 * (box["width"] - 152)
    assert "learning rate 1000 at step 5," in read(between)
    before = step(400)
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.wait_for_timeout(80)
    assert f"at step {before:,}" not in canvas.get_attribute("aria-label")
    page.get_by_role("radio", name="time").click()
    page.get_by_role("checkbox").uncheck()
    page.wait_for_timeout(80)
    assert "learning rate over time" in canvas.get_attribute("aria-label")
    assert page.evaluate("[model.get('x'), model.get('log')]") == ["time", False] and wrong == []
    readout.close()
    page.close()


def test_changes_at_one_step_are_written_one_below_the_other(browser):
    steps = np.arange(1, 101)
    packed = {k: base64.b64encode(v).decode() for k, v in pack_curves({"training": (steps, 1 / steps)}).items()}
    readout = Readout(readout={**describe_status(Status("training", 3, 67, 5, 300))}, changes=marks_of(
        [{"step": 40, "name": "learning_rate", "from": old, "to": new} for old, new in ((0.01, 0.1), (0.1, 0.01))]
        + [{"step": 40, "name": "clip_grad", "from": None, "to": 1}]
        + [{"step": 90, "name": "max_epochs", "from": n, "to": n + 1} for n in range(40)]))
    values = {k: getattr(readout, k) for k in ("readout", "graph", "x", "log", "smoothing", "changes", "compact")}
    page = browser.new_page(viewport={"width": 900, "height": 500})
    page.add_init_script("""window.written = []; const draw = CanvasRenderingContext2D.prototype.fillText;
        CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
            window.written.push([text, y]); draw.call(this, text, x, y); };""")
    page.goto("about:blank")
    page.set_content(PAGE % (readout._css, json.dumps(values | {"curves": packed}), json.dumps(readout._esm)))
    page.wait_for_function("window.ready")
    box = page.locator("canvas").bounding_box()

    def written(step):
        page.evaluate("() => { window.written = []; }")
        page.mouse.move(box["x"] + 54 + step / 100 * (box["width"] - 152), box["y"] + 100)
        page.wait_for_timeout(80)
        return [(text, y) for text, y in page.evaluate("() => window.written") if re.search(r"→|at step|changes", text)]

    few, many = written(40), written(90)
    for lines in (few, many):
        rows = sorted(y for _, y in lines)
        assert min(np.diff(rows)) >= 12 and rows[0] > 0, lines
    assert [text for text, _ in sorted(few, key=lambda line: line[1]) if "→" in text] == [
        "learning_rate 0.01 → 0.1", "learning_rate 0.1 → 0.01", "clip_grad None → 1"]
    assert "changes before" in str(many) and "max_epochs 39 → 40" in dict(many)
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.locator("canvas").screenshot(path=PICTURES / "curves-many-changes.png")
    readout.close()
    page.close()
