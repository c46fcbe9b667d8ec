"""The panel of a small trainer in a real JupyterLab, with a mouse and a keyboard; the tutorial's is in
test_tutorial_browser.py.

One notebook, one story: the second test goes on where the first left the page; the third has a panel of its own."""

import os
import re
import signal
import time

import psutil
import pytest
from helpers_waiting import until
from lab import CONTRASTS, PICTURES, ROOT, Kernel, Panel, Wire

pytestmark = pytest.mark.browser

FILLED = 400  # batches after which the curves have as many points as they will ever have
CELLS = [
    f"""import sys; sys.path[:0] = {[str(ROOT / "tests" / "lab"), str(ROOT / "tests")]!r}
from tempfile import mkdtemp
from test_panel import fit
import tractkit.lab.panel
trainer = fit(mkdtemp(), pause=0.01, max_epochs=200)""",
    "trainer",
    "import time; time.sleep(5); print('awake')",
    "step = trainer.log.batches()['step'].tolist(); print(step == list(range(1, len(step) + 1)), len(step), "
    "trainer.learning_rate.value)",
    "in_cell = fit(mkdtemp(), pause=.01, max_epochs=500)\nin_cell",
    "in_cell.train_and_validate().global_step > 0",
    "line = tractkit.lab.panel.TrainerPanel(fit(mkdtemp(), pause=.01, max_epochs=900), compact=True)\nline",
    """from tractkit.lab.preview import PreviewPicture
zigzag = bytes(k * 37 % 256 for k in range(3 * 16 * 40))
PreviewPicture(reference=zigzag, latest=zigzag, scores=[[1., .2], [2., .4]], title="the model", note="drawn")""",
    *(
        f"long = fit(mkdtemp(), pause=.004, max_epochs={(FILLED + batches) // 8}, tensorboard=False)\nlong"
        for batches in (1_000, 10_000)
    ),
]


INKS = """canvases => canvases.map(c => c.width && c.height
    ? c.getContext("2d").getImageData(0, 0, c.width, c.height).data
      .filter((v, k) => k % 4 === 3 && v > 0).length : 0)"""


@pytest.fixture(scope="module")
def wire(lab):
    return Wire(lab.page)


@pytest.fixture(scope="module")
def page(lab, wire):
    page = lab.open("panel.ipynb", CELLS)
    lab.run_cell(page, 0)
    return page


def test_while_a_cell_blocks_the_training_and_its_panel_go_on(lab, page):
    lab.run_cell(page, 1)
    page.wait_for_selector(".tractkit-readout", timeout=60_000)
    panel = Panel(page)
    panel.press("Start")
    until(lambda: panel.chip.inner_text() == "training" and panel.batches() > 12)
    assert {"gradient norm", "batches/s", "waiting for data", "memory"} <= set(
        page.locator(".tractkit-measure").evaluate_all("es => es.map(e => e.dataset.name)")
    )

    lab.run_cell(page, 2)
    prompt = page.locator(".jp-Notebook .jp-Cell").nth(2).locator(".jp-InputPrompt")
    until(lambda: prompt.inner_text() == "[*]:")
    before = panel.batches()
    until(lambda: panel.batches() > before + 8, 15)
    assert prompt.inner_text() == "[*]:"  # blocked still: what the page says is news
    page.get_by_text("awake", exact=True).wait_for(timeout=15_000)
    after = panel.batches()
    until(lambda: panel.batches() > after + 2)

    panel.press("Pause")
    until(lambda: panel.chip.inner_text() == "paused")
    rested = panel.batches()
    assert lab.run_cell_with(page, "trainer.log.batches()") == [f"True {rested} 0.01\n"]  # nothing is lost


def hard_to_read(page):
    """The texts of the panel that differ too little from what is behind them; a question below a field is asked."""
    panel = Panel(page)
    panel.tab("Settings")
    field = page.locator(".widget-text input:visible").nth(1)
    field.fill("1")
    field.press("Enter")
    page.get_by_role("button", name="Change it").wait_for()
    found = page.evaluate(CONTRASTS)
    page.get_by_role("button", name="Leave it").click()
    panel.tab("Progress")
    found += page.evaluate(CONTRASTS)
    assert len(found) > 30, found
    return [pair for pair in found if pair[0] < 4.5]


def test_it_is_worked_by_the_keyboard_and_follows_the_theme(lab, page):
    panel = Panel(page)
    rested = panel.batches()
    assert panel.painted() > 2_000  # curves, axes, labels
    assert hard_to_read(page) == []
    panel.readout.screenshot(path=PICTURES / "panel-light.png")
    until(
        lambda: any("TrainerPanel(paused" in str(o) for o in lab.saved_outputs(page, "panel.ipynb"))
    )  # the still follows
    panel.button("1 batch").focus()
    page.keyboard.press("Enter")
    until(lambda: panel.batches() == rested + 1 and "One batch done" in panel.message.inner_text())
    page.get_by_role("radio", name="learning rate").press("Enter")
    page.locator(".tractkit-smoothing input[type=range]").press("ArrowRight")
    panel.readout.screenshot(path=PICTURES / "panel-learning-rate.png")
    page.get_by_role("radio", name="losses").press("Enter")

    panel.button("Stop").press("Enter")
    until(lambda: panel.chip.inner_text() == "stopped" and re.search("saved in", panel.message.inner_text()))
    until(
        lambda: (
            set(page.locator(".jupyter-button:not([disabled])").all_inner_texts())
            >= {"Start", "1 batch", "1 epoch", "Go back", "Branch"}
        )
    )
    until(
        lambda: (
            "step"
            in page.locator(".widget-dropdown select").evaluate(
                "s => s.selectedOptions.length ? s.selectedOptions[0].textContent : ''"
            )
        )
    )
    assert not panel.button("Pause").is_enabled()
    panel.button("Start").scroll_into_view_if_needed()
    page.screenshot(path=PICTURES / "panel-in-lab.png")
    lab.theme(page, "Dark")
    until(
        lambda: panel.readout.get_attribute("data-dark") == "true" and page.locator("#jupyterlab-splash").count() == 0
    )
    page.screenshot(path=PICTURES / "panel-in-lab-dark.png")
    assert hard_to_read(page) == []
    lab.theme(page, "Light")
    assert not page.locator(".tractkit-still").is_visible()  # while the panel lives


def test_a_preview_stays_drawn_when_the_theme_changes(lab, page):
    lab.run_cell_with(page, "PreviewPicture(")
    canvases = page.locator(".tractkit-preview canvas")
    until(lambda: canvases.count() == 3 and min(canvases.evaluate_all(INKS)) > 300)
    for theme in ("Dark", "Light"):
        lab.theme(page, theme)
        page.locator(f"body[data-jp-theme-name='JupyterLab {theme}']").wait_for(state="attached")
        until(lambda: page.locator("#jupyterlab-splash").count() == 0)
        page.wait_for_timeout(700)  # for what comes late
        assert min(canvases.evaluate_all(INKS)) > 300
        page.locator(".tractkit-preview").screenshot(path=PICTURES / f"preview-{theme.lower()}.png")
    page.evaluate("""() => window.jupyterapp.shell.currentWidget.content.widgets.filter(
        c => c.model.sharedModel.source.includes("PreviewPicture(")).forEach(c => c.outputArea.model.clear())""")
    # of itself it has no still: a panel's has one


def test_going_back_asks_before_steps_are_dropped(lab, page):
    panel = Panel(page)
    select, question = page.locator(".widget-dropdown select").first, page.get_by_role("alert")
    steps = panel.batches()
    select.select_option(index=select.locator("option").count() - 1)
    panel.press("Go back")
    question.wait_for()
    assert "steps after it are dropped when training starts" in question.inner_text()
    page.screenshot(path=PICTURES / "panel-question.png")
    page.get_by_role("button", name="Stay", exact=True).click()
    question.wait_for(state="hidden")
    assert panel.batches() == steps
    panel.press("Go back")
    question.wait_for()
    page.locator(".jupyter-button.mod-warning:visible", has_text="Go back").click()
    until(lambda: panel.batches() < steps)
    question.wait_for(state="hidden")


def test_the_buttons_of_a_training_that_runs_in_a_cell_work(lab, page):
    readouts = page.locator(".tractkit-readout").count()
    lab.run_cell_with(page, "in_cell = fit(")
    until(lambda: page.locator(".tractkit-readout").count() == readouts + 1, 60)
    panel = Panel(page, readouts)
    lab.begin_cell_with(page, "in_cell.train_and_validate()")
    until(lambda: panel.chip.inner_text() == "training" and panel.batches() > 4)
    panel.press("Pause")
    until(lambda: panel.chip.inner_text() == "paused")
    panel.press("Resume")
    until(lambda: panel.chip.inner_text() == "training")
    panel.press("Save")
    until(lambda: "Saved: step" in panel.message.inner_text())
    assert page.get_by_text("[*]:").count() == 1  # the cell runs still
    panel.press("Stop")
    until(lambda: panel.chip.inner_text() == "stopped" and panel.button("Start").is_enabled())
    until(lambda: page.get_by_text("[*]:").count() == 0)


def test_the_code_is_shown_whole_and_copied(lab, page):
    panel = Panel(page, page.locator(".tractkit-readout").count() - 1)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    panel.tab("Settings")
    panel.press("Show code")
    code, copy = page.locator("pre.tractkit-code:visible"), page.locator(".tractkit-copy:visible")
    code.wait_for()
    text = code.inner_text()
    assert "trainer = Fit(" in text and code.evaluate("e => getComputedStyle(e).whiteSpace") == "pre"
    code.screenshot(path=PICTURES / "panel-code.png")
    copy.click()
    until(lambda: copy.inner_text() == "Copied")
    assert page.evaluate("() => navigator.clipboard.readText()") == text
    panel.press("Show code")
    code.wait_for(state="hidden")
    panel.tab("Progress")


def test_the_compact_form_is_clicked_in_its_line_and_opens_the_rest(lab, page):
    readouts = page.locator(".tractkit-readout").count()
    lab.run_cell_with(page, "line = tractkit")
    until(lambda: page.locator(".tractkit-readout").count() == readouts + 1, 60)
    panel, buttons = Panel(page, readouts), page.locator(".jupyter-button:has-text('Start')").count()
    line = panel.readout.locator(".tractkit-line")
    assert line.bounding_box()["height"] < 40 and buttons == readouts  # it brings no buttons beside those in the line
    line.get_by_role("button", name="Start").click()
    until(lambda: panel.chip.inner_text() == "training" and panel.painted() > 500)
    assert line.bounding_box()["height"] < 40  # with more to say, too
    line.get_by_role("button", name="Pause").click()
    until(lambda: panel.chip.inner_text() == "paused")
    assert "epoch" in line.locator(".tractkit-where").inner_text() and "train" in line.inner_text()
    lab.theme(page, "Dark")
    until(lambda: panel.readout.get_attribute("data-dark") == "true")
    panel.readout.scroll_into_view_if_needed()
    panel.readout.screenshot(path=PICTURES / "panel-line-dark.png")
    assert [pair for pair in page.evaluate(CONTRASTS) if pair[0] < 4.5] == []
    lab.theme(page, "Light")
    splash = page.locator("#jupyterlab-splash")
    until(lambda: panel.readout.get_attribute("data-dark") != "true" and splash.count() == 0)
    panel.readout.screenshot(path=PICTURES / "panel-line.png")
    line.get_by_role("button", name="Resume").click()
    until(lambda: panel.chip.inner_text() == "training")
    line.get_by_role("button", name="Show the whole panel").click()
    until(lambda: panel.button("Stop").is_visible() and panel.readout.locator(".tractkit-line").count() == 0)
    panel.press("Stop")
    until(lambda: panel.chip.inner_text() == "stopped" and panel.button("Start").is_enabled())


@pytest.mark.parametrize("batches", [1_000, pytest.param(10_000, marks=pytest.mark.full)])
def test_however_long_it_trains_memory_and_messages_stay_flat(lab, page, wire, batches):
    readouts = page.locator(".tractkit-readout").count()
    lab.run_cell_with(page, f"max_epochs={(FILLED + batches) // 8}, ")
    until(lambda: page.locator(".tractkit-readout").count() == readouts + 1, 60)
    panel, kernel = Panel(page, readouts), Kernel(lab)
    process = psutil.Process(kernel.ask("__import__('os').getpid()"))

    def objects() -> int:
        return kernel.ask("(__import__('gc').collect(), __import__('sys').getallocatedblocks())[1]")

    def look() -> dict[str, float]:
        lab.saved_outputs(page, "panel.ipynb")
        return {"at": time.time(), "rss": process.memory_info().rss, "file": (lab.work / "panel.ipynb").stat().st_size,
                "elements": page.evaluate("() => document.querySelectorAll('*').length")}

    panel.press("Start")
    until(lambda: panel.batches() >= FILLED, 60)
    panel.press("Pause")  # once, so that what memory a still takes is taken
    until(
        lambda: (
            panel.chip.inner_text() == "paused" and "TrainerPanel(paused" in str(lab.saved_outputs(page, "panel.ipynb"))
        )
    )
    panel.press("Resume")
    began, resumed = time.time(), panel.batches()
    until(lambda: panel.batches() >= resumed + batches // 10, 60)
    tenth, blocks = look(), objects()
    until(lambda: panel.batches() >= resumed + batches * 19 // 20, 60 + batches / 20)
    blocks = objects() - blocks
    until(lambda: panel.chip.inner_text() == "finished", 60 + batches / 20)
    assert panel.batches() == FILLED + batches
    end = look()
    kernel.close()

    sent = [message for message in wire.seen if message[1] == "comm_msg" and message[0] >= began]
    # On a busy machine an update can come without a new point of a curve, and be small.
    updates, seconds = [(when, size) for when, _, size, held in sent if b'"readout"' in held], sent[-1][0] - began
    fifths = [[size for when, size in updates if k <= 5 * (when - began) / seconds <= k + 1] for k in range(5)]
    note = (
        f"{FILLED + batches - resumed} batches in {seconds:.1f} s: kernel {tenth['rss'] / 2**20:.1f} MiB at 10 %, "
        f"{blocks} blocks of Python's more at 95 %, {end['rss'] / 2**20:.1f} MiB at the end; "
        f"updates in each fifth {[len(f) for f in fifths]} of {[sum(f) // 1000 for f in fifths]} kB, "
        f"{len(sent) - len(updates)} other messages; "
        f"notebook {tenth['file']} and {end['file']} bytes, page {tenth['elements']} and {end['elements']} elements"
    )
    (PICTURES / f"flat-{batches}.txt").write_text(note + "\n")
    print(note)
    # What the process has comes and goes by up to 15 MiB, as freed memory is not given back at once, and the end takes
    # some for its still: whether anything is kept with each batch is seen by the objects that Python holds.
    assert blocks < 40_000 and end["rss"] - tenth["rss"] < 24 << 20, note
    others = len(sent) - len(updates)  # when something changes, not with time
    assert len(updates) <= 4 * seconds + 3 and others < 40, note
    assert max(size for _, size in updates) < 20_000 and max(fifths[4]) < 1.3 * max(fifths[0]), note
    # A still of the curves takes a little more or less than another, and the notebook has one of each panel.
    assert end["file"] < tenth["file"] + 20_000 < 50_000 * (readouts + 1), note
    assert end["elements"] < 1.05 * tenth["elements"], note


def test_the_page_says_when_the_kernel_is_gone_and_keeps_the_still(lab, page):
    kernel = Kernel(lab)
    pid = kernel.ask("__import__('os').getpid()")
    step = kernel.ask("in_cell.checkpoints.steps()[-1]")
    kernel.close()
    until(lambda: "TrainerPanel(stopped" in str(lab.saved_outputs(page, "panel.ipynb")))
    assert page.get_by_role("alert").count() == 0
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    note = page.get_by_role("alert").filter(has_text=f"The run is safe up to step {step:,}.")
    note.wait_for()
    print(f"the page noticed it after {time.monotonic() - killed:.1f} s: {note.inner_text()}")
    greyed = page.locator(".tractkit-gone").filter(has=page.locator(".jupyter-button"))
    assert "The kernel is gone" in note.inner_text() and greyed.last.evaluate("e => e.inert")
    page.locator(".jp-Dialog .jp-mod-accept").click()  # JupyterLab has noticed it, too
    until(lambda: note.inner_text().startswith("The kernel is gone. The run"))
    note.scroll_into_view_if_needed()
    page.screenshot(path=PICTURES / "panel-kernel-gone.png")
    marks = page.evaluate("""() => [...document.querySelectorAll('.jupyter-widgets-disconnected')].map(
        e => [getComputedStyle(e, '::before').content, e.className + ' in ' + e.parentElement.className])""")
    # No broken chain on each button: one sentence says it.
    assert len(marks) > 9 and [name for content, name in marks if content != "none"] == []

    page = lab.visit("panel.ipynb")
    stills = page.locator(".tractkit-still img")
    stills.first.wait_for()
    until(lambda: page.get_by_text("Error displaying widget").count() > 0)  # the page has looked for the widgets
    page.screenshot(path=PICTURES / "panel-reopened.png")
    assert page.get_by_text("Error displaying widget").locator("visible=true").count() == 0
    assert stills.locator("visible=true").count() == stills.count() > 0
