"""The tutorial of the panel in a real JupyterLab: as it is opened, and run from top to bottom."""

import re
import shutil

import nbformat
import pytest

pytestmark = pytest.mark.browser

from lab import ROOT, Lab  # noqa: E402  (needs playwright)
from playwright.sync_api import expect  # noqa: E402

PICTURES = ROOT / "results" / "browser"  # kept, for a person to look at
NAME = "92_tutorial.panel.ipynb"


@pytest.fixture(scope="module")
def lab(tmp_path_factory, chromium):
    PICTURES.mkdir(parents=True, exist_ok=True)
    with Lab(tmp_path_factory.mktemp("tutorial"), chromium) as lab:
        yield lab


def test_a_person_opens_the_tutorial_and_runs_it(lab):
    shutil.copy(ROOT / "nbs" / NAME, lab.work)
    page = lab.context.pages[0] if lab.context.pages else lab.context.new_page()
    page.goto(f"http://127.0.0.1:{lab.port}/lab/tree/{NAME}?reset")
    lab.ready(page)
    still = page.locator(".jp-OutputArea-output img").first
    still.wait_for(timeout=30_000)
    assert page.get_by_text(re.compile("Error displaying widget|model not found")).count() == 0, "what is stored can be looked at"
    page.screenshot(path=PICTURES / "tutorial-opened.png")

    lab.command(page, "notebook:run-all-cells")
    last = [c for c in nbformat.read(lab.work / NAME, 4).cells if c.cell_type == "code"]
    page.wait_for_function(
        "n => window.jupyterapp.shell.currentWidget.content.widgets.filter(w => w.model.type == 'code')[n - 1].model.executionCount",
        arg=len(last), timeout=120_000)
    outputs = lab.saved_outputs(page, NAME)
    assert not [o for o in outputs if o["output_type"] == "error"]
    page.evaluate("() => window.jupyterapp.shell.currentWidget.content.scrollToItem(1)")
    expect(page.locator(".tractkit-chip").first).to_have_text("finished", timeout=30_000)
    page.screenshot(path=PICTURES / "tutorial-finished.png")
