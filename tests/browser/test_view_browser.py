"""The live view as a person has it: a real JupyterLab, a mouse, and the kernel asked what came of it.

One notebook, one story: each test goes on where the one before it left the page."""

import io
import os
import signal
import time
from base64 import b64decode

import numpy as np
import pytest
from helpers_waiting import until
from lab import PICTURES, Kernel, Wire
from PIL import Image

from tractkit.viz.theme import palette

pytestmark = [pytest.mark.browser, pytest.mark.vulkan]

CELLS = [
    """import numpy as np
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram
from tractkit.viz.viewer import link_views, view
from tractkit.spatial.volume import Volume
x = np.linspace(-1, 1, 30)
lines = [np.stack([20 + 15 * x, 20 + a + 8 * x**2, 10 + b + 0 * x], 1)
         for a in range(-8, 9, 2) for b in range(-6, 7, 2)]
affine, n = np.diag([-2, 2, 3, 1.]), len(lines)
t = Tractogram(Streamlines.from_list(lines), affine, (40, 40, 20),
               groups={"front": np.arange(n // 2, n), "back": np.arange(n // 2)})
far = np.linalg.norm(np.indices((40, 40, 20)).T - [20, 20, 10], axis=-1).T
ball = Volume((17 - far).clip(0).astype(np.float32), affine)""",
    "v = view(t, ball, colors='groups', size=(400, 300))",
    "import time; time.sleep(2.5)",
    "a, b = (view(each, ball, size=(300, 220), show=False) for each in (t[:n // 2], t[n // 2:]))\nlink_views(a, b)",
    "w = view(t, ball, colors='groups', size=(400, 300), backend='niivue')",
]

SLOW_PICTURES = """import gc, time
from tractkit.viz.live_canvas import LiveCanvas
window = next(type(each.window) for each in gc.get_objects() if type(each) is LiveCanvas)
present = window._rc_present_bitmap
window._rc_present_bitmap = lambda *args, **kwargs: (time.sleep(.06), present(*args, **kwargs))[1]"""

WATCHED = """import asyncio, threading
drawn = []
pass_on = v._drawn.manager.after_draw
v._drawn.manager.after_draw = lambda: (drawn.append(threading.current_thread().name), pass_on())

async def ask():  # as ipykernel 7 does in a thread of its own
    v._drawn.window._rfb_draw_requested = True
    v._drawn.window._rfb_maybe_draw()

thread = threading.Thread(target=lambda: asyncio.run(ask()))
thread.start()
thread.join()"""
COUNT_BUSY = """() => {
    window.busy = 0;
    const { kernel } = window.jupyterapp.shell.currentWidget.sessionContext.session;
    kernel.statusChanged.connect((_, status) => { window.busy += status === "busy"; });
}"""


@pytest.fixture(scope="module")
def kernel(lab, page):
    kernel = Kernel(lab)
    yield kernel
    kernel.close()


@pytest.fixture(scope="module")
def page(lab):
    page = lab.open("view.ipynb", CELLS)
    for cell in (0, 1):
        lab.run_cell(page, cell)
    canvas(page).wait_for(timeout=60_000)
    until(lambda: seen(page))
    rest(page)
    return page


def canvas(page, k=0):
    return page.locator(".jp-OutputArea-output .renderview-wrapper").nth(k)


def seen(page, k=0) -> bool:
    """Whether a person sees a picture there, and no grey box."""
    return np.asarray(Image.open(io.BytesIO(canvas(page, k).screenshot())).convert("L")).std() > 10


def look(page, k=0) -> np.ndarray:
    """The picture that the browser shows, in its own pixels, wherever the page is scrolled to."""
    url = (
        canvas(page, k)
        .locator("img")
        .evaluate("""async e => {
        for (let k = 0; k < 250 && !(e.complete && e.naturalWidth > 1); k++)  // between frames
            await new Promise(r => setTimeout(r, 20));
        const c = document.createElement('canvas');
        [c.width, c.height] = [e.naturalWidth, e.naturalHeight];
        c.getContext('2d').drawImage(e, 0, 0);
        return c.toDataURL(); }""")
    )
    return np.asarray(Image.open(io.BytesIO(b64decode(url.partition(",")[2]))).convert("RGB")).astype(int)


def changed(page, before, k=0) -> float:
    """The share of the canvas that is another than before."""
    now = look(page, k)
    return 1.0 if now.shape != before.shape else float((np.abs(now - before).max(axis=-1) > 24).mean())


def rest(page, k=0) -> np.ndarray:
    """The picture when two looks are the same: all streamlines are back, without traces of compression."""
    before, end = look(page, k), time.monotonic() + 10
    while time.monotonic() < end:
        page.wait_for_timeout(450)
        now = look(page, k)
        if np.array_equal(now, before):
            return now
        before = now
    raise AssertionError("the picture does not come to rest")


def drag(page, dx, dy, k=0):
    canvas(page, k).scroll_into_view_if_needed()
    box = canvas(page, k).bounding_box()
    x, y = box["x"] + box["width"] / 2 - dx / 2, box["y"] + box["height"] / 2 - dy / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + dx, y + dy, steps=6)
    page.mouse.up()


def angle(kernel, name="v") -> np.ndarray:
    """The quaternion of the camera."""
    return np.array(kernel.ask(f"[float(q) for q in {name}.camera['rotation']]"))


def turned(a, b) -> float:
    """Degrees from one quaternion to the other."""
    return float(np.rad2deg(2 * np.arccos(min(abs(a @ b), 1.0))))


def test_at_rest_it_is_as_smooth_as_the_still_and_small_while_it_moves(page, kernel, tmp_path):
    still = page.locator(".jp-RenderedImage img")
    assert still.count() == 1 and not still.is_visible()  # it waits for a page without a kernel
    kernel.ask(f"np.save({str(tmp_path / 'still.npy')!r}, v.still.array)")
    live, still = rest(page)[:, 200:], np.load(tmp_path / "still.npy")[:, 200:, :3]  # beside the legend
    assert live.shape == still.shape and np.abs(live - still).mean() < 0.8
    box = canvas(page).bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 150)
    page.mouse.down()
    page.mouse.move(box["x"] + 203, box["y"] + 150, steps=3)
    until(lambda: look(page).shape == (150, 200, 3))
    page.mouse.move(box["x"] + 200, box["y"] + 150, steps=3)
    page.mouse.up()
    assert rest(page).shape == (300, 400, 3)


def test_a_drag_turns_the_camera_and_the_opposite_one_turns_it_back(page, kernel):
    first, before = angle(kernel), rest(page)
    page.screenshot(path=PICTURES / "view-in-lab.png")
    drag(page, 90, 20)
    until(lambda: turned(angle(kernel), first) > 10)
    assert rest(page).shape == before.shape and changed(page, before) > 0.02
    page.screenshot(path=PICTURES / "view-turned.png")
    drag(page, -90, -20)
    until(lambda: turned(angle(kernel), first) < 1)
    rest(page)
    assert changed(page, before) < 0.005


def test_a_drag_is_drawn_by_one_thread_once_a_move_and_leaves_the_kernel_idle(page, kernel):
    kernel.ask(f"exec({WATCHED!r}, globals())")
    page.evaluate(COUNT_BUSY)
    box = canvas(page).bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 150)
    page.mouse.down()
    page.mouse.move(box["x"] + 230, box["y"] + 150, steps=8)
    page.mouse.move(box["x"] + 200, box["y"] + 150, steps=8)
    until(lambda: look(page).shape == (300, 400, 3))  # the button is held: soon it is drawn in full, and no more
    rest(page)
    assert page.evaluate("window.busy") < 4  # of 16 moves; what was asked before may come late
    drawings = kernel.ask("len(drawn)")
    page.wait_for_timeout(500)
    assert kernel.ask("len(drawn)") == drawings <= 22 and kernel.ask("set(drawn)") == {"MainThread"}
    page.mouse.up()
    rest(page)
    kernel.ask("setattr(v._drawn.manager, 'after_draw', pass_on)")


def test_wheel_sliders_and_legend_do_what_they_say(page, kernel):
    before = rest(page)
    canvas(page).click()
    wide = kernel.ask("float(v.camera['height'])")
    page.mouse.wheel(0, -400)
    until(lambda: kernel.ask("float(v.camera['height'])") < 0.9 * wide)
    until(lambda: changed(page, before) > 0.02)
    page.screenshot(path=PICTURES / "view-zoomed.png")
    page.mouse.wheel(0, 400)
    near = rest(page)
    handles = page.locator(".jp-OutputArea-output .noUi-handle")
    height = kernel.ask("float(v._stage.position[2])")
    handles.nth(2).focus()
    for _ in range(8):
        page.keyboard.press("ArrowUp")
    until(lambda: kernel.ask("float(v._stage.position[2])") > height + 1)
    until(lambda: changed(page, near) > 0.02)
    moved = rest(page)
    handles.nth(4).focus()  # the upper end of the grey values
    for _ in range(25):
        page.keyboard.press("ArrowLeft")
    until(lambda: (rest(page) - moved).mean() > 1)  # brighter
    bright = rest(page)
    page.get_by_label("front").uncheck()
    until(lambda: changed(page, bright) > 0.005)
    assert kernel.ask("v.shown") == kernel.ask("len(t.groups['back'])")
    page.screenshot(path=PICTURES / "view-changed.png")


def test_a_click_tells_what_is_there_and_the_wheel_goes_through_slices(page, kernel):
    view = page.locator(".tractkit-view").first
    handles = view.get_by_role("slider")
    assert [handles.nth(k).get_attribute("aria-label") for k in (0, 3, 4)] == [
        "sagittal", "grey, lower end", "grey, upper end"]
    assert all(box.bounding_box()["width"] >= 200 for box in view.locator(".noUi-target").all())
    view.get_by_role("button", name="axial").click()
    until(lambda: kernel.ask("v._stage.view") == "axial")
    rest(page)
    mm, pixel = kernel.ask("""[(m.tolist(), ((s[:2] / s[3] * (1, -1) + 1) / 2 * (400, 300)).tolist())
        for m in [lines[n // 4][10] * (-2, 2, 3)] for s in [v._stage.camera.camera_matrix @ [*m, 1]]][0]""")
    canvas(page).scroll_into_view_if_needed()
    box = canvas(page).bounding_box()
    page.mouse.click(box["x"] + pixel[0], box["y"] + pixel[1])
    view.get_by_text("volume (").wait_for(timeout=10_000)
    words = view.get_by_text("volume (").inner_text()
    assert "back" in words and "30 points" in words and " mm" in words
    np.testing.assert_allclose(kernel.ask("[float(p) for p in v._stage.position[:2]]"), mm[:2], atol=0.5)
    page.screenshot(path=PICTURES / "view-clicked.png")
    height = kernel.ask("float(v._stage.position[2])")
    page.mouse.wheel(0, -100)
    until(lambda: kernel.ask("float(v._stage.position[2])") > height + 1)
    view.get_by_role("button", name="Reset").click()
    until(lambda: kernel.ask("v._stage.view") == "3d" and not kernel.ask("v._stage._chosen"))
    view.get_by_role("button", name="Full screen").click()
    page.wait_for_function("document.fullscreenElement?.classList.contains('tractkit-view')")
    until(lambda: look(page).shape[1] > 600)
    page.evaluate("document.exitFullscreen()")
    until(lambda: look(page).shape == (300, 400, 3))


def test_while_a_cell_blocks_the_picture_stays(page, lab):
    before = rest(page)
    lab.run_cell(page, 2)
    until(lambda: page.locator(".jp-Notebook .jp-Cell").nth(2).locator(".jp-InputPrompt").inner_text() == "[*]:")
    drag(page, 60, 0)
    assert changed(page, before) < 0.001
    until(lambda: changed(page, before) > 0.02)  # what was dragged meanwhile is not lost


def test_after_a_reload_the_view_is_painted_as_it_was_left(page, lab, kernel):
    before = rest(page)
    lab.saved_outputs(page, "view.ipynb")
    wire = Wire(page)
    page.reload()
    lab.ready(page)
    canvas(page).wait_for(timeout=30_000)
    until(lambda: changed(page, before) < 0.005 and seen(page))
    page.screenshot(path=PICTURES / "view-reloaded.png")
    # On a quick machine a picture is there before the next move: here each takes a while.
    kernel.ask(f"exec({SLOW_PICTURES!r}, globals())")
    del wire.seen[:]
    box = canvas(page).bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 150)
    page.mouse.down()
    page.evaluate(
        """async ([x, y]) => {  // moves as fast as a mouse makes them, also on a busy machine
        const at = document.elementFromPoint(x, y);
        for (let k = 0; k < 100; k++) {
            at.dispatchEvent(new PointerEvent("pointermove", {bubbles: true, pointerId: 1, pointerType: "mouse",
                isPrimary: true, buttons: 1, button: -1, clientX: x + .6 * k, clientY: y}));
            await new Promise(r => setTimeout(r, 8));
        }
    }""",
        [box["x"] + 100, box["y"] + 150],
    )
    page.mouse.up()
    until(lambda: changed(page, before) > 0.02)
    kernel.ask("exec('window._rc_present_bitmap = present', globals())")
    pictures = sum(b"framebufferdata" in content for *_, content in wire.seen)
    assert pictures and len(wire.seen) < 4 * pictures + 30  # of a hundred moves: one message a picture, busy, idle


def test_linked_views_turn_together(page, lab, kernel):
    lab.run_cell(page, 3)
    for k in (1, 2):
        canvas(page, k).wait_for(timeout=30_000)
    rest(page, 1)
    canvas(page, 2).scroll_into_view_if_needed()
    first, before = angle(kernel, "b"), rest(page, 2)
    drag(page, 60, 10, k=1)
    until(lambda: turned(angle(kernel, "b"), first) > 10)
    rest(page, 1)
    assert np.abs(angle(kernel, "a") - angle(kernel, "b")).max() < 1e-9
    canvas(page, 2).scroll_into_view_if_needed()
    until(lambda: changed(page, before, 2) > 0.02)
    page.screenshot(path=PICTURES / "view-linked.png")


@pytest.mark.full
@pytest.mark.webgl
def test_niivue_draws_the_same_in_the_browser(page, lab):
    lab.run_cell(page, 4)
    drawn = page.locator(".jp-OutputArea-output canvas").last

    def near(color) -> int:
        """Pixels of about this color."""
        drawn.scroll_into_view_if_needed()
        pixels = np.asarray(Image.open(io.BytesIO(drawn.screenshot())).convert("RGB")).astype(int)
        return int((np.abs(pixels - color).max(axis=-1) < 12).sum())

    front, back = (np.rint(np.array(color) * 255) for color in palette(2))
    until(lambda: near(front) > 100 and near(back) > 100)
    page.screenshot(path=PICTURES / "view-niivue.png")
    for theme in ("Dark", "Light"):
        lab.theme(page, theme)
        page.locator(f"body[data-jp-theme-name='JupyterLab {theme}']").wait_for(state="attached")
        page.wait_for_timeout(500)
        until(lambda: near(front) > 100 and near(back) > 100)  # NiiVue alone leaves a black canvas
        page.screenshot(path=PICTURES / f"view-niivue-{theme.lower()}.png")
    page.get_by_label("front").last.uncheck()
    until(lambda: near(front) < 30 and near(back) > 100)


@pytest.mark.full
def test_a_restart_leaves_no_dead_view(page, lab):
    lab.restart_and_run_all(page)
    page.locator(".jp-Notebook .jp-Cell").last.scroll_into_view_if_needed()
    until(
        lambda: page.locator(".jp-InputArea-prompt").all_text_contents() == [f"[{k + 1}]:" for k in range(len(CELLS))]
    )
    for k in range(3):
        canvas(page, k).scroll_into_view_if_needed()
        until(lambda k=k: seen(page, k))
    assert canvas(page, 3).count() == 0 and page.get_by_text("Error displaying widget").count() == 0
    assert page.locator(".jp-RenderedImage img").count() == 3
    lab.theme(page, "Dark")
    page.wait_for_timeout(500)
    page.screenshot(path=PICTURES / "view-restarted-dark.png")
    lab.theme(page, "Light")


def test_a_view_says_that_its_kernel_is_gone(page, lab):
    kernel = Kernel(lab)
    process = kernel.ask("__import__('os').getpid()")
    kernel.close()
    assert page.locator(".tractkit-watch").first.is_hidden()
    os.kill(process, signal.SIGKILL)
    until(lambda: "The kernel is gone" in page.locator(".tractkit-watch").first.inner_text(), 60)
    assert page.locator(".tractkit-view > .tractkit-gone[inert]").count() >= 2  # the canvas, and controls


def test_reopened_only_the_stills_are_left(page, lab):
    lab.saved_outputs(page, "view.ipynb")
    page = lab.visit("view.ipynb")
    until(lambda: page.get_by_text("Error displaying widget").count() >= 1)  # the page has looked for the views
    page.screenshot(path=PICTURES / "view-reopened.png")
    assert page.get_by_text("Error displaying widget").locator("visible=true").count() == 0
    stills = page.locator(".jp-RenderedImage img")
    assert stills.count() >= 1 and stills.first.is_visible()
