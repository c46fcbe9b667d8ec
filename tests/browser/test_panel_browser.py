"""The panel as a person has it: a real JupyterLab, a real trainer, a mouse."""

import re
import time

import pytest

pytestmark = pytest.mark.browser
pytest.importorskip("playwright.sync_api")
pytest.importorskip("jupyterlab")

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
    page = lab.open("panel.ipynb", [SETUP, "trainer", "6 * 7", "import time; time.sleep(3); print('awake')"])
    chip, where = page.locator(".tractkit-chip"), page.locator(".tractkit-where")

    def press(verb):
        page.locator(f".jupyter-button:has-text('{verb}')").click()

    def batches() -> int:
        """Batches done, from the words on the page."""
        epoch, batch = map(int, re.match(r"epoch (\d+) of 200(?:, batch (\d+))?", where.inner_text()).groups(default="0"))
        return epoch * 8 + batch

    for cell in (0, 1):
        lab.run_cell(page, cell)
    page.wait_for_selector(".tractkit-readout", timeout=60_000)
    assert chip.inner_text() == "ready"

    press("Start")
    until(lambda: chip.inner_text() == "training" and batches() > 12)
    lab.run_cell(page, 2)  # the kernel is free
    page.locator(".jp-OutputArea-output", has_text="42").wait_for(timeout=5_000)

    press("Pause")
    until(lambda: chip.inner_text() == "paused")
    rested = batches()
    page.wait_for_timeout(700)
    assert batches() == rested
    painted = page.locator(".tractkit-canvas").evaluate(
        "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 == 3 && v > 0).length")
    assert painted > 2_000  # curves, axes, labels
    page.locator(".tractkit-readout").screenshot(path=PICTURES / "panel-light.png")

    until(lambda: any("TrainerPanel(paused" in str(o) for o in lab.saved_outputs(page, "panel.ipynb")))  # the still follows
    assert (lab.work / "panel.ipynb").stat().st_size < 200_000

    press("Resume")
    until(lambda: batches() > rested + 4)
    lab.run_cell(page, 3)  # a cell that blocks: the training goes on, and so does what the page says of it
    until(lambda: page.locator(".jp-Notebook .jp-Cell").nth(3).locator(".jp-InputPrompt").inner_text() == "[*]:")
    before = batches()
    until(lambda: batches() > before + 8, 2.8)
    assert page.get_by_text("awake", exact=True).count() == 0
    page.get_by_text("awake", exact=True).wait_for(timeout=10_000)

    lab.saved_outputs(page, "panel.ipynb")
    page.reload()
    lab.ready(page)
    page.wait_for_selector(".tractkit-readout", timeout=30_000)
    reloaded = batches()
    until(lambda: batches() > reloaded + 8)  # still live

    press("Stop")
    until(lambda: chip.inner_text() == "stopped")
    assert "saved in" in page.locator(".tractkit-message").inner_text()
    assert page.locator(".jupyter-button:not([disabled])").all_inner_texts() == ["Start"]
    page.screenshot(path=PICTURES / "panel-in-lab.png")
    page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', { theme: 'JupyterLab Dark' })")
    until(lambda: page.locator(".tractkit-readout").get_attribute("data-dark") == "true")
    page.screenshot(path=PICTURES / "panel-in-lab-dark.png")

    still, = page.locator(".tractkit-still").all()
    assert not still.is_visible()  # while the panel lives
