"""The table of runs: in a page of its own, with a model that only keeps what it is told, and in a real JupyterLab."""

import base64
import json

import numpy as np
import pytest
import yaml
from helpers_waiting import until
from lab import PICTURES

from tractkit.lab.run_browser import _Table
from tractkit.runs.checkpoint import Checkpoints
from tractkit.runs.lock import folder_lock
from tractkit.runs.log import RunLog
from tractkit.runs.notes import read_notes

pytestmark = pytest.mark.browser

PAGE = """<!DOCTYPE html><html><head><style>%s body { margin: 0; %s }</style></head><body>
<div id="here"></div><script type="module">
%s
const listeners = {}, state = %s;
for (const curve of state.curves)
  curve.data = new DataView(Uint8Array.from(atob(curve.data), (c) => c.charCodeAt(0)).buffer);
window.sent = [];
window.model = { get: (k) => state[k], send: (m) => window.sent.push(m), save_changes: () => {}, off: () => {},
  set: (k, v) => { state[k] = v; (listeners[k] || []).forEach((f) => f()); },
  on: (name, f) => (listeners[name.slice(7)] ||= []).push(f) };
const el = document.createElement("div");
window.end = render({ model: window.model, el });  // as JupyterLab does: it is put into the page afterwards
document.getElementById("here").append(el);
</script></body></html>"""
LIGHT = "--jp-layout-color0: white; --jp-layout-color1: white; --jp-ui-font-color1: #222"
DARK = "background: #111; --jp-layout-color0: #111; --jp-layout-color1: #222; --jp-ui-font-color1: #ddd"
COLUMNS = [["name", "run", False, True], ["status", "status", False, True], ["curve", "loss", False, True],
           ["best", "best", True, True], ["rate", "learning_rate", True, True], ["step", "step", True, False],
           ["batch_size", "batch_size", True, False, "5000"]]  # the same in all runs


def row(name, status, best, rate, **more):
    """A run as `page_row` makes it."""
    values = [name, status, best, best, rate, 7]
    curve = "<svg width='84' height='22'><circle r='3' cx='9' cy='9' fill='currentColor'/></svg>"
    return {"name": name, "status": status, "color": "#2f7d4f", "note": "", "nan": "", "tags": [], "notes": "",
            "curve": curve, "cells": ["" if v is None else f"{v}" for v in values], "sort": values,
            "drawable": status != "no run", "configured": status != "no run"} | more


ROWS = [row("run-10", "finished", 0.25, 0.01, tags=["<b>base</b>"], notes="the one of the paper"),
        row("run-9", "failed", 0.5, 0.001, note="OSError: <b>disk</b> full", nan="the loss is no number in epoch 3"),
        row("<i>x</i>", "running", 0.125, 0.01), row("void", "no run", None, 0, note="empty")]


def curve(name, status, n, per_epoch, nan=()):
    """Losses of `n` epochs at 1, 2, 3, ... epochs, one a half of the one before."""
    epoch = np.arange(1.0, n + 1)
    values = 0.5 ** epoch
    values[list(nan)] = np.nan
    data = np.concatenate([values, epoch * per_epoch, epoch, epoch / 10, 1.8e9 + 360 * epoch])
    return {"name": name, "status": status, "lines": [["validation", n]],
            "data": base64.b64encode(data.tobytes()).decode()}


STATE = {
    "table": {"columns": COLUMNS, "rows": ROWS, "below": "4 runs."}, "changed": {}, "columns": [], "group": "",
    "where": "", "shown": {"names": None, "problem": ""}, "chosen": ["run-10", "run-9"], "order": ["", False],
    "slots": {"run-10": 0, "run-9": 1},
    "curves": [curve("run-10", "finished", 12, 10), curve("run-9", "failed", 5, 900, [2])],
    "axes": {"x": "epoch", "logy": True, "logx": False, "batches": False}}


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1200, "height": 760})
    page.set_default_timeout(5_000)
    script = _Table._esm.replace("export default { render };", "")
    page.set_content(PAGE % (_Table._css, LIGHT, script, json.dumps(STATE)))
    yield page
    page.close()


def names(page):
    return page.locator("tbody tr[data-name]").evaluate_all("rows => rows.map((r) => r.dataset.name)")


def told(page, name, value):
    """The kernel says something."""
    page.evaluate("([k, v]) => model.set(k, v)", [name, value])


def test_rows_are_sorted_filtered_grouped_and_columns_chosen(page):
    assert names(page) == ["run-10", "run-9", "<i>x</i>", "void"]
    heading = page.locator("[data-id='sort best']")
    heading.click()
    assert names(page) == ["<i>x</i>", "run-10", "run-9", "void"]
    heading.press("Enter")  # it has the focus still
    assert names(page) == ["run-9", "run-10", "<i>x</i>", "void"]  # what is missing stays last
    page.locator("[data-id='sort name']").click()
    assert names(page)[1:3] == ["run-9", "run-10"]  # as people count
    page.get_by_label("group by").select_option("rate")
    groups = page.locator(".tractkit-runs-group").all_inner_texts()
    assert [g.replace("\n", " ") for g in groups] == [
        "▾ learning_rate: 0 1 run", "▾ learning_rate: 0.001 1 run, best 0.5 of run-9",
        "▾ learning_rate: 0.01 2 runs, best 0.125 of <i>x</i>"]
    page.get_by_role("button", name="learning_rate: 0.01", exact=False).click()
    assert names(page) == ["void", "run-9"]
    page.get_by_label("group by").select_option("tags")
    assert page.locator(".tractkit-runs-group button").all_inner_texts() == ["▾ tag: <b>base</b>", "▾ tag: –"]
    assert names(page)[0] == "run-10" and len(names(page)) == 4
    page.get_by_text("columns", exact=True).click()
    page.get_by_label("step", exact=True).check()
    page.get_by_label("learning_rate", exact=True).uncheck()
    assert page.evaluate("model.get('columns')") == ["name", "status", "curve", "best", "step"]
    assert "learning_rate" not in page.locator("th").all_inner_texts()
    page.get_by_label("batch_size", exact=True).check()  # a setting that is the same in all runs
    page.locator("[data-id='sort batch_size']").press("Enter")
    assert page.locator("tr[data-name] td:nth-child(7)").all_inner_texts() == ["5000", "5000", "5000", ""]
    assert "batch_size" not in page.get_by_label("group by").locator("option").all_inner_texts()
    page.get_by_label("filter runs").fill("lr < 2e-3")
    page.wait_for_function("model.get('where') === 'lr < 2e-3'")
    told(page, "shown", {"names": ["run-9"], "problem": ""})
    assert names(page) == ["run-9"] and "1 of 4 runs shown" in page.locator(".tractkit-runs-below").inner_text()
    drawn = page.locator(".tractkit-plot-legend > span")
    assert drawn.all_inner_texts() == ["● run-9 (failed)"]  # a curve that the filter hides is not drawn
    page.wait_for_function("document.querySelector('canvas').ariaLabel.startsWith('losses of run-9 over')")
    told(page, "shown", {"names": ["void"], "problem": ""})
    assert drawn.count() == 0 and page.evaluate("model.get('chosen')") == ["run-10", "run-9"]  # they stay ticked
    told(page, "shown", {"names": None, "problem": ""})
    assert drawn.all_inner_texts() == ["● run-10", "● run-9 (failed)"]
    told(page, "shown", {"names": ["run-9"], "problem": "no run has lrr; did you mean lr?"})
    assert page.get_by_text("did you mean lr?").is_visible()


def test_names_are_text_and_buttons_send_what_they_say(page):
    assert page.locator("tbody i, tbody b").count() == 0 and page.get_by_text("OSError: <b>disk</b> full").is_visible()
    assert page.locator("tr[data-name=run-9] .tractkit-runs-nan").inner_text() == "NaN"
    page.get_by_role("button", name="open").nth(2).click()
    page.get_by_role("button", name="refresh").click()
    page.get_by_label("Write a note or tags on run-9").click()
    page.get_by_label("note on run-9").fill("flipped b-vectors")
    told(page, "changed", {"rows": {"0": ROWS[0] | {"status": "running"}}, "below": "now 4 runs."})
    page.get_by_label("tags of run-9").fill("wrong, to repeat")  # what is being written was not taken away
    page.get_by_role("button", name="save").click()
    assert page.evaluate("sent") == [
        {"verb": "open", "name": "<i>x</i>"}, {"verb": "refresh"},
        {"verb": "annotate", "name": "run-9", "note": "flipped b-vectors", "tags": "wrong, to repeat"}]
    assert page.locator("tr[data-name=run-10]").get_attribute("data-status") == "running"
    assert "now 4 runs." in page.locator(".tractkit-runs-below").inner_text()
    assert page.locator("tr[data-name=void]").get_by_role("button").count() == 0
    page.get_by_label("show the curves of <i>x</i>").check()
    page.get_by_label("show the curves of run-10").uncheck()
    assert page.evaluate("model.get('chosen')") == ["run-9", "<i>x</i>"]
    assert page.evaluate("model.get('slots')['<i>x</i>']") == 2  # the colors of others stay


def test_notes_fit_their_place_and_lines_say_what_they_are(page):
    def box(part):
        return part.bounding_box()

    page.get_by_label("Write a note or tags on run-9").click()
    form = box(page.locator(".tractkit-runs-edit textarea"))
    chip = box(page.locator("tr[data-name=run-9] .tractkit-runs-chip").first)
    assert form["x"] + form["width"] < chip["x"]
    page.get_by_role("button", name="cancel").click()
    field = page.get_by_label("filter runs")
    field.evaluate("e => { e.value = e.placeholder; }")
    assert field.evaluate("e => e.scrollWidth <= e.clientWidth")
    long = "a much too slow rate of learning, to be repeated " * 9
    columns = [*COLUMNS[:6], ["notes", "notes", False, True]]
    rows = [r | {"notes": long * (r["name"] == "run-9"), "cells": [*r["cells"], long]} for r in ROWS]
    assert page.get_by_text("the one of the paper").count() == 1  # below the name
    told(page, "table", {"columns": columns, "rows": rows, "below": ""})
    cell, last = page.locator("tr[data-name=run-9] td.notes"), box(page.locator("tr[data-name=run-9] td.last"))
    assert box(cell)["x"] + box(cell)["width"] <= last["x"] and box(cell)["width"] > 90
    assert cell.evaluate("e => getComputedStyle(e).textOverflow") == "ellipsis" and page.get_by_text(long).count() == 4
    key = page.locator(".tractkit-plot-key span")
    assert key.all_inner_texts() == ["validation"]
    both, alone = curve("run-10", "finished", 2, 10), curve("run-9", "failed", 2, 10)
    both["lines"], alone["lines"] = [["validation", 1], ["training", 1]], [["training", 2]]
    page.evaluate("""curves => { for (const c of curves)
        c.data = new DataView(Uint8Array.from(atob(c.data), (x) => x.charCodeAt(0)).buffer);
        model.set("curves", curves); }""", [both, alone])
    assert key.all_inner_texts() == ["validation or else training", "training"]
    styles = key.evaluate_all("all => all.map((e) => getComputedStyle(e, '::before').borderTopStyle)")
    assert styles == ["solid", "dashed"]


def test_curves_have_values_under_the_pointer_and_are_enlarged(page):
    canvas, tip = page.locator("canvas"), page.locator(".tractkit-plot-tip")
    box = canvas.bounding_box()

    def at(share):
        page.mouse.move(box["x"] + 62 + share * (box["width"] - 78), box["y"] + 100)
        page.wait_for_timeout(60)
        return [line.strip("● ") for line in tip.inner_text().split("\n")] if tip.is_visible() else []

    page.wait_for_function("document.querySelector('canvas').width > 300")
    assert sorted(at(0.0)) == ["run-10: 0.5 at epoch 1", "run-9: 0.5 at epoch 1"]
    assert "run-9: no number at epoch 3" in at(2 / 11)
    assert at(1.0) == ["run-10: 2.4e-4 at epoch 12"]  # the other one has ended
    for place, words in (("step", "run-9: 0.03125 at step 4500"), ("training time", "run-10: 2.4e-4 at 1.2 h"),
                         ("clock", "run-10: 2.4e-4 at")):
        page.get_by_role("radio", name=place).click()
        assert words in at(1.0)[0]
    page.get_by_role("radio", name="epoch").click()
    at(5 / 11)
    page.mouse.down()
    at(9 / 11)
    page.mouse.up()
    whole = page.get_by_role("button", name="whole curves")
    assert at(0.5) == ["run-10: 0.003906 at epoch 8"] and whole.is_enabled()
    canvas.press("ArrowLeft")
    canvas.press("0")
    page.wait_for_function("document.querySelector('.tractkit-plot-bar .tractkit-runs-button').disabled")
    assert sorted(at(0.0))[0] == "run-10: 0.5 at epoch 1"


def test_light_and_dark_at_1200_pixels(page):
    def brightness():
        page.wait_for_timeout(100)
        return page.locator("canvas").evaluate("""c => {
            const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
            let sum = 0, n = 0;
            for (let i = 0; i < d.length; i += 4) if (d[i + 3] > 200) { sum += d[i] + d[i + 1] + d[i + 2]; n++; }
            return sum / n / 3; }""")

    light = brightness()
    page.screenshot(path=PICTURES / "runs-light.png")
    page.evaluate(f"document.body.style.cssText = {DARK!r}")
    page.wait_for_function("document.querySelector('.tractkit-runs').dataset.dark === 'true'")
    assert light > 180 > 140 > brightness() - 40  # grid and letters fit the page
    page.screenshot(path=PICTURES / "runs-dark.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1200
    visible = page.locator("th").evaluate_all(
        "all => all.filter((e) => e.getBoundingClientRect().right <= 1200).length")
    assert visible == 7


def leave_runs(top, nb_runs):
    """What trainings of two epochs leave in their folders."""
    for k in range(nb_runs):
        log, epochs = RunLog(top / f"run-{k}"), []
        for e in range(2):
            epochs.append({"epoch": e, "step": 5 * (e + 1), "train_loss": 0.5, "valid_loss": 1 / (k + e + 1), "n": 9})
            spent = {"training": 60.0 * (e + 1), "validation": 6.0, "at": 1.8e9 + 600 * k + 90 * e}
            log.append("epoch", **epochs[-1], time=spent)
        log.close()
        tree = {"format": 1, "epochs": epochs, "time": {"training": 120.0, "validation": 6.0}, "global_step": 10,
                "finished": {"why": "max_epochs", "message": ""}, "curve": {"points": [(5.0, 0.5)]}}
        Checkpoints(top / f"run-{k}/checkpoints").save(10, tree)
        config = {"format": 1, "trainer": {"max_epochs": 2, "learning_rate": 0.001 * (1 + k % 3)}}
        (top / f"run-{k}/config.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture
def study(lab):
    """A browser of 90 runs in JupyterLab, at 1200 pixels with the list of files open."""
    leave_runs(lab.work / "study", 90)
    size = lab.page.viewport_size
    lab.page.set_viewport_size({"width": 1200, "height": 900})
    page = lab.open("runs.ipynb", [
        "from tractkit.lab.run_browser import RunBrowser", "runs = RunBrowser('study', interval=.5)\nruns",
        "import time; time.sleep(8); print('awake')"])
    lab.run_cell(page, 0)
    lab.run_cell(page, 1)
    until(lambda: page.locator(".tractkit-runs-below").count() and
          "90 finished" in page.locator(".tractkit-runs-below").inner_text(), 90)
    yield page
    lab.page.set_viewport_size(size)


def test_a_browser_in_jupyterlab_is_live_and_works_while_a_cell_runs(lab, study):
    page, below = study, study.locator(".tractkit-runs-below")
    rows, scroll = page.locator("tr[data-name]"), page.locator(".tractkit-runs-scroll")
    assert rows.count() == 40  # the others when they are looked at
    for drawn in (80, 90):
        scroll.evaluate("e => e.scrollTo(0, e.scrollHeight)")
        until(lambda drawn=drawn: rows.count() == drawn)
    page.locator("[data-id='sort best']").click()
    until(lambda: names(page)[0] == "run-89")
    page.locator(".tractkit-runs").screenshot(path=PICTURES / "runs-in-lab.png")

    lab.run_cell(page, 2)
    prompt = page.locator(".jp-Notebook .jp-Cell").nth(2).locator(".jp-InputPrompt")
    until(lambda: prompt.inner_text() == "[*]:")
    page.get_by_label("filter runs").fill("lr < 2e-3 and best < 0.02")
    until(lambda: "13 of 90 runs shown" in below.inner_text())
    page.get_by_label("Write a note or tags on run-87").click()
    page.get_by_label("tags of run-87").fill("good, again")
    page.get_by_role("button", name="save", exact=True).click()
    until(lambda: read_notes(lab.work / "study/run-87").tags == ("good", "again"))
    page.get_by_label("group by").select_option("tags")
    until(lambda: page.locator(".tractkit-runs-group button").all_inner_texts() == [
        "▾ tag: again", "▾ tag: good", "▾ tag: –"])
    assert prompt.inner_text() == "[*]:"  # all of this while a cell ran
    page.get_by_text("awake", exact=True).wait_for(timeout=20_000)

    run = page.locator("tr[data-name=run-87]").first
    with folder_lock(lab.work / "study/run-87"):
        page.get_by_role("button", name="refresh", exact=True).click()
        until(lambda: run.get_attribute("data-status") == "running")
        log = RunLog(lab.work / "study/run-87")
        log.append("epoch", epoch=2, step=15, train_loss=0.5, valid_loss=0.001, n=9, time={"training": 180.0})
        log.close()
        until(lambda: "0.001" in run.inner_text())  # nobody has pressed anything
    run.get_by_role("button", name="open", exact=True).click()
    page.locator(".tractkit-runs-opened .tractkit-readout").wait_for(timeout=30_000)

    def stays(name):  # in the notebook, of a run
        return [str(o) for o in lab.saved_outputs(page, "runs.ipynb") if name in str(o)]

    assert stays("run-87") and not stays("run-89")  # the rows that the filter shows
    page.get_by_label("filter runs").fill("")
    until(lambda: "image/png;base64" in "".join(stays("run-89")))  # with the curves of those that are ticked
