"""The panel as a person has it: a real JupyterLab, a real trainer, a mouse."""

import io
import os
import re
import time

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.browser

from lab import ROOT, Lab  # noqa: E402  (needs playwright)

PICTURES = ROOT / "results" / "browser"  # kept, for a person to look at
SETUP = f"""import sys; sys.path.insert(0, {str(ROOT / "tests")!r})
from tempfile import mkdtemp
from test_panel import fit
import tractkit.panel
trainer = fit(mkdtemp(), pause=0.01, max_epochs=200)"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory, chromium):
    PICTURES.mkdir(parents=True, exist_ok=True)
    with Lab(tmp_path_factory.mktemp("lab"), chromium) as lab:
        yield lab


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)


def test_a_person_trains_with_the_panel(lab):
    page = lab.open("panel.ipynb", [SETUP, "trainer", "6 * 7", "import time; time.sleep(5); print('awake')",
                                    "print('now', trainer.state.global_step, trainer.learning_rate.value)",
                                    "from tractkit.state import TrainerState\n"
                                    "kept = TrainerState.load(trainer.folder, model=fit(mkdtemp()).model)\n"
                                    "print('kept', kept.epoch, kept.batch, kept.global_step)"])
    chip, step = page.locator(".tractkit-chip"), page.locator(".tractkit-measure[data-name=step] b")
    message = page.locator(".tractkit-message")

    def press(verb):
        page.locator(f".jupyter-button:has-text('{verb}')").first.click()

    def batches() -> int:
        """Batches done, from the words on the page."""
        return int(step.inner_text().replace(",", "")) if step.count() else 0

    def printed(text: str) -> str:
        output = page.locator(".jp-OutputArea-output pre", has_text=text).first
        output.wait_for(timeout=15_000)
        return output.inner_text()

    for cell in (0, 1):
        lab.run_cell(page, cell)
    page.wait_for_selector(".tractkit-readout", timeout=60_000)
    assert chip.inner_text() == "ready"

    press("Start")
    until(lambda: chip.inner_text() == "training" and batches() > 12)
    began = time.monotonic()
    lab.run_cell(page, 2)  # the kernel is free
    page.locator(".jp-OutputArea-output", has_text="42").wait_for(timeout=5_000)
    assert time.monotonic() - began < 1 or os.getloadavg()[0] > os.cpu_count()  # on a machine that is not busy with other things
    assert {"gradient norm", "batches/s", "waiting for data", "memory"} <= set(page.locator(".tractkit-measure").evaluate_all("es => es.map(e => e.dataset.name)"))

    press("Pause")
    until(lambda: chip.inner_text() == "paused")
    rested = batches()
    page.wait_for_timeout(700)
    assert batches() == rested and re.match(r"Paused after batch \d+ of epoch \d+; saved.", message.inner_text())
    painted = page.locator(".tractkit-canvas").evaluate(
        "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 == 3 && v > 0).length")
    assert painted > 2_000  # curves, axes, labels
    page.locator(".tractkit-readout").screenshot(path=PICTURES / "panel-light.png")
    lab.run_cell(page, 4)
    assert printed("now ").split() == ["now", str(rested), "0.01"]  # the state is where the page says

    page.get_by_role("tab", name="Settings", exact=True).click()  # change the rate, by the keyboard
    field = page.get_by_label("learning rate")
    field.fill("0.002")
    field.press("Enter")
    page.screenshot(path=PICTURES / "panel-settings.png")
    page.get_by_role("tab", name="Progress", exact=True).click()
    until(lambda: message.inner_text() == "learning_rate: 0.01 -> 0.002, from the next batch.")
    until(lambda: any("TrainerPanel(paused" in str(o) for o in lab.saved_outputs(page, "panel.ipynb")))  # the still follows
    assert (lab.work / "panel.ipynb").stat().st_size < 200_000

    page.locator(".jupyter-button:has-text('1 batch')").focus()
    page.keyboard.press("Enter")
    until(lambda: batches() == rested + 1 and "One batch done" in message.inner_text())
    press("Resume")
    until(lambda: batches() > rested + 4)
    page.get_by_role("radio", name="learning rate").click()
    page.locator(".tractkit-smoothing input").press("ArrowRight")
    page.locator(".tractkit-readout").screenshot(path=PICTURES / "panel-learning-rate.png")
    page.get_by_role("radio", name="losses").click()

    lab.run_cell(page, 3)  # a cell that blocks: the training goes on, and so does what the page says of it
    until(lambda: page.locator(".jp-Notebook .jp-Cell").nth(3).locator(".jp-InputPrompt").inner_text() == "[*]:")
    before = batches()
    until(lambda: batches() > before + 8, 4.5)
    assert page.get_by_text("awake", exact=True).count() == 0
    page.get_by_text("awake", exact=True).wait_for(timeout=15_000)
    after = batches()
    until(lambda: batches() > after + 2)

    lab.saved_outputs(page, "panel.ipynb")
    page.reload()
    lab.ready(page)
    page.wait_for_selector(".tractkit-readout", timeout=30_000)
    reloaded = batches()
    until(lambda: batches() > reloaded + 8)  # still live

    press("Stop")
    until(lambda: chip.inner_text() == "stopped")
    assert "saved in" in message.inner_text()
    until(lambda: set(page.locator(".jupyter-button:not([disabled])").all_inner_texts()) >= {"Start", "1 batch", "1 epoch", "Go back", "Branch"})
    until(lambda: "step" in page.locator(".widget-dropdown select").evaluate("s => s.selectedOptions.length ? s.selectedOptions[0].textContent : ''"))
    assert not page.get_by_role("button", name="Pause").is_enabled()
    shown = batches()
    lab.run_cell(page, 5)
    assert int(printed("kept ").split()[-1]) == shown  # the state on disk is the one shown
    page.locator(".tractkit-earlier").scroll_into_view_if_needed()
    page.locator(".jupyter-button:has-text('Start')").scroll_into_view_if_needed()
    page.screenshot(path=PICTURES / "panel-in-lab.png")
    page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', { theme: 'JupyterLab Dark' })")
    until(lambda: page.locator(".tractkit-readout").get_attribute("data-dark") == "true")
    page.screenshot(path=PICTURES / "panel-in-lab-dark.png")

    still, = page.locator(".tractkit-still").all()
    assert not still.is_visible()  # while the panel lives
    page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', { theme: 'JupyterLab Light' })")


PREVIEW = f"""import sys; sys.path.insert(0, {str(ROOT / "tests")!r})
from tempfile import mkdtemp
from test_panel import preview_and_trainer
from tractkit.panel import TrainerPanel
preview, trainer = preview_and_trainer(mkdtemp())
TrainerPanel(trainer, preview=preview)"""


def test_a_person_looks_at_the_preview(lab):
    page = lab.open("preview.ipynb", [PREVIEW, "trainer.train_and_validate(); preview.wait(60)"])
    lab.run_cell(page, 0)
    page.wait_for_selector(".tractkit-readout", timeout=60_000)
    page.get_by_role("tab", name="Preview", exact=True).click()
    lab.run_cell(page, 1)
    note, right = page.locator(".tractkit-note"), page.locator(".tractkit-lines").nth(1)
    until(lambda: "density in common" in note.inner_text(), 60)

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
