"""The tutorial of the panel in a real JupyterLab: clicked through as a person does, then run from top to bottom.

One notebook, one story: each test goes on where the one before it left the page."""

import io
import json
import os
import re
import shutil
import signal

import nbformat
import numpy as np
import pytest
from helpers_waiting import until
from lab import PICTURES, ROOT, Kernel, Panel
from PIL import Image

from tractkit.cli.commands import copy_tutorials

pytestmark = pytest.mark.browser

NAME = "92_panel.ipynb"
DEAD = re.compile("Error displaying widget|model not found|Loading widget")


@pytest.fixture(scope="module")
def page(lab):
    shutil.copy(ROOT / "nbs" / "tutorials" / NAME, lab.work)
    return lab.visit(NAME)


@pytest.fixture(scope="module")
def panel(page):
    return Panel(page)


def batch_records(lab) -> list[dict]:
    """What the first run's log has of each batch, as another program reads it."""
    lines = (lab.work / "results" / "panel" / "run-1" / "log.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == "batch"]


def test_what_is_stored_can_be_looked_at(page):
    page.locator(".jp-OutputArea-output img").first.wait_for(timeout=30_000)
    assert page.get_by_text(DEAD).count() == 0
    page.screenshot(path=PICTURES / "tutorial-opened.png")


def test_a_person_clicks_through_it(lab, page, panel):
    lab.trust(page)
    lab.run_cell_with(page, "panel = tk.TrainerPanel(trainer, preview=preview)")
    page.wait_for_selector(".tractkit-readout", timeout=60_000)
    assert panel.chip.inner_text() == "ready"

    panel.press("Start")
    until(lambda: panel.chip.inner_text() == "training" and panel.batches() > 12)
    asked = page.evaluate("() => Date.now() / 1000")
    assert lab.run_cell_with(page, "6 * 7") == ["42"]
    answered = page.evaluate("() => Date.now() / 1000")
    until(lambda: batch_records(lab)[-1]["time"]["at"] > answered)  # it was trained before, meanwhile and after
    at = np.array([r["time"]["at"] for r in batch_records(lab)])
    meanwhile = int(((at > asked) & (at < answered)).sum())
    note = (f"another cell: answered after {answered - asked:.2f} s, while {meanwhile} batches of "
            f"{np.diff(at).mean():.3f} s were trained")
    (PICTURES / "another-cell.txt").write_text(note + "\n")
    print(note)
    assert meanwhile < 300  # of 12,000: it did not wait for the training, however busy the machine
    panel.readout.scroll_into_view_if_needed()
    page.screenshot(path=PICTURES / "tutorial-training.png")

    panel.press("Pause")
    until(lambda: panel.chip.inner_text() == "paused")
    rested = panel.batches()
    page.wait_for_timeout(700)
    assert panel.batches() == rested == len(batch_records(lab))
    assert re.match(r"Paused after batch \d+ of epoch \d+; saved.", panel.message.inner_text())

    panel.tab("Settings")
    page.get_by_label("learning rate").first.focus()  # from here on by the keyboard
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("0.002")
    page.keyboard.press("Enter")
    told = "learning_rate: 0.005 -> 0.002, from the next batch."
    page.get_by_text(told).locator("visible=true").first.wait_for(timeout=10_000)
    page.screenshot(path=PICTURES / "tutorial-settings.png")
    panel.tab("Progress")
    until(lambda: panel.message.inner_text() == told)

    panel.press("Resume")
    until(lambda: panel.batches() > rested + 12)
    lab.saved_outputs(page, NAME)
    page.reload()
    lab.ready(page)
    page.wait_for_selector(".tractkit-readout", timeout=30_000)
    reloaded = panel.batches()
    assert reloaded > rested
    until(lambda: panel.batches() > reloaded + 12)  # still live
    panel.readout.scroll_into_view_if_needed()
    page.screenshot(path=PICTURES / "tutorial-reloaded.png")

    panel.press("Stop")
    until(lambda: panel.chip.inner_text() == "stopped")
    assert "saved in" in panel.message.inner_text()
    shown = panel.batches()
    assert lab.run_cell_with(page, "kept = tk.TrainerState.load(trainer.folder)") == [
        f"on disk: step {shown}; in the panel: step {shown}\n"
    ]
    rates = [r["learning_rate"] for r in batch_records(lab)]
    assert rates == [0.005] * rested + [0.002] * (
        shown - rested
    )  # every batch once, and the change where the page said it


def test_after_a_restart_it_runs_from_top_to_bottom(lab, page, panel):
    lab.restart_and_run_all(page)
    outputs = lab.saved_outputs(page, NAME)
    assert not [o for o in outputs if o["output_type"] == "error"]
    widgets = sum("application/vnd.jupyter.widget-view+json" in o.get("data", {}) for o in outputs)
    page.evaluate("() => window.jupyterapp.shell.currentWidget.content.scrollToItem(1)")
    until(lambda: panel.chip.inner_text() == "finished", 30)
    panel.readout.scroll_into_view_if_needed()
    page.screenshot(path=PICTURES / "tutorial-finished.png")
    assert page.get_by_text(DEAD).count() == 0
    readouts = page.locator(".tractkit-readout")
    assert widgets == 2 and readouts.count() == 3  # of the run, its branch, and the folder at the end
    for k in range(readouts.count()):
        readouts.nth(k).scroll_into_view_if_needed()
        until(lambda k=k: readouts.nth(k).locator(".tractkit-chip").inner_text() == "finished")
        until(lambda k=k: Panel(page, k).painted() > 2_000)  # curves, axes, labels


def test_the_preview_turns(page, panel):
    page.evaluate("() => window.jupyterapp.shell.currentWidget.content.scrollToItem(1)")
    panel.tab("Preview")
    note, right = page.locator(".tractkit-note").first, page.locator(".tractkit-lines").nth(1)
    until(lambda: "density in common" in note.inner_text(), 60)
    right.scroll_into_view_if_needed()

    def look() -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(right.screenshot())).convert("RGB")).astype(int)

    page.wait_for_timeout(500)
    before, box = look(), right.bounding_box()
    assert (before.max(axis=-1) > 120).mean() > .01  # streamlines
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 160, box["y"] + 130, steps=3)
    page.mouse.up()
    page.wait_for_timeout(200)
    assert (np.abs(look() - before).max(axis=-1) > 24).mean() > .01  # turned
    page.screenshot(path=PICTURES / "panel-preview.png")


def test_a_question_that_a_restart_cut_off_greys_no_new_panel(lab, page, panel):
    kernel = Kernel(lab)
    pid = kernel.ask("__import__('os').getpid()")
    kernel.close()
    os.kill(pid, signal.SIGSTOP)  # the page's question waits for its answer
    page.get_by_role("alert").filter(has_text="does not answer").first.wait_for(timeout=20_000)
    lab.restart_and_run_all(page)
    page.evaluate("() => window.jupyterapp.shell.currentWidget.content.scrollToItem(1)")
    until(lambda: panel.chip.inner_text() == "finished", 30)
    page.wait_for_timeout(3_000)  # as long as it takes to hold a kernel for silent
    assert page.locator(".tractkit-gone").count() == page.get_by_role("alert").count() == 0
    assert not panel.readout.evaluate("e => e.closest('[inert]') !== null")


# --- as they are opened in a window of 900 pixels

OPENED = """async path => {
    for (const shown of [...window.jupyterapp.shell.widgets('main')]) shown.close();
    const panel = await window.jupyterapp.commands.execute('docmanager:open', { path });
    window.jupyterapp.shell.collapseLeft();
    await panel.context.ready; await panel.sessionContext.ready; await panel.revealed;
    await panel.sessionContext.session.kernel.info;
    const found = [], all = () => [...panel.node.querySelectorAll('.jp-Notebook .jp-Cell')];
    for (let k = 0; k < 200 && all().length < panel.content.widgets.length; k++) {
        all().at(-1)?.scrollIntoView();
        await new Promise(done => setTimeout(done, 50));
    }
    if (all().length < panel.content.widgets.length) found.push(`only ${all().length} cells`);
    for (const [k, cell] of all().entries()) {
        cell.scrollIntoView({ block: 'center' });
        await new Promise(done => setTimeout(done, 60));
        const holders = '.cm-scroller, .jp-MarkdownOutput, .jp-OutputArea-output, table';
        for (const part of cell.querySelectorAll(`${holders}, .jp-OutputArea-output *`)) {
            const style = getComputedStyle(part), text = (part.textContent || '').trim();
            if (style.display === 'inline' || !text || !part.clientWidth) continue;
            if ((part.matches(holders) || style.overflowX !== 'visible') && part.scrollWidth > part.clientWidth + 1)
                found.push(`cell ${k}, ${part.className || part.tagName}: ${text.slice(0, 60)}`);
        }
        if (/^#\\|/m.test(cell.querySelector('.cm-content')?.innerText || '')) found.push(`cell ${k}: a directive`);
    }
    if (panel.context.model.dirty) found.push('changed by being opened');
    return found;
}"""


def opened(lab, names) -> dict[str, list[str]]:
    """What is cut, or should not be there, in tutorials that are opened one after the other."""
    lab.page.set_viewport_size({"width": 900, "height": 900})
    lab.page.goto(f"http://127.0.0.1:{lab.server.port}/lab?reset")
    lab.page.wait_for_selector(".jp-Launcher", timeout=60_000)
    found = {name: lab.page.evaluate(OPENED, f"tutorials/{name}") for name in names}
    lab.end_kernels()
    return found


def test_at_900_pixels_nothing_is_cut_and_nothing_is_changed(lab):
    """Of 90 and 93, and of what is wrong in each way; of all of them with FULL=1."""
    first = copy_tutorials(lab.work / "tutorials")
    names = sorted(path.name for path in first.parent.glob("9*.ipynb"))
    assert len(names) == 8
    wrong = nbformat.read(first, as_version=4)
    wrong.cells[2].source = "#| slow\nx = '" + 110 * "x" + "'"
    table = "<table><tr>" + 40 * "<td>number</td>" + "</tr></table>"
    wide = nbformat.v4.new_output("display_data", {"text/html": table})
    wrong.cells[2].outputs = [wide]
    wrong.metadata.pop("language_info")
    nbformat.write(wrong, first.parent / "wrong.ipynb")
    if os.environ.get("FULL") != "1":
        names = [names[0], names[3]]
    found = opened(lab, [*names, "wrong.ipynb"])
    *others, seen = found.values()
    assert not any(others), str({name: what for name, what in found.items() if what and name != "wrong.ipynb"})
    for what in ("cm-scroller", "jp-OutputArea-output", "a directive", "changed by being opened"):
        assert any(what in line for line in seen), (what, seen)
