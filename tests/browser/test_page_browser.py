"""A saved page as a person has it: a file opened in a browser without a network, dragged, switched, read."""

import io

import numpy as np
import pytest
from lab import PICTURES
from PIL import Image

from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume
from tractkit.viz.viewer import view

pytestmark = [pytest.mark.browser, pytest.mark.webgl, pytest.mark.vulkan]
SIZE = (600, 500)


def scene() -> dict:
    """Two bundles of tubes, one red and one blue, over a ball."""
    x = np.linspace(-1, 1, 20)
    line = [np.stack([20 + 15 * x, 20 + a + 8 * x**2, 10 + 0 * x], 1) for a in range(-8, 9, 4)]
    affine, n = np.diag([-2, 2, 3, 1.0]), len(line)
    far = np.linalg.norm(np.indices((40, 40, 20)).T - [20, 20, 10], axis=-1).T
    t = Tractogram(Streamlines.from_list(line), affine, (40, 40, 20))
    return {"front": t[n // 2:], "back": t[:n // 2], "ball": Volume((17 - far).clip(0).astype(np.float32), affine),
            "core": Volume((far < 6).astype(np.float32), affine)}


def pixels(page) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(page.locator("#stage").screenshot())).convert("RGB")).astype(int)


def colored(page) -> int:
    """How many pixels are clearly red."""
    seen = pixels(page)
    return int(((seen[..., 0] > 1.6 * seen[..., 2]) & (seen[..., 0] > 150)).sum())


def test_it_turns_offline_and_looks_like_the_still(browser, tmp_path):
    v = view(scene(), colors={"front": "red", "back": "#4060ff"}, tubes=1.5, size=SIZE, show=False)
    v.save(tmp_path / "scene.html")
    context = browser.new_context(offline=True, viewport={"width": SIZE[0] + 280, "height": SIZE[1]})
    page = context.new_page()
    asked, failed = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.goto((tmp_path / "scene.html").as_uri())
    page.wait_for_selector("html[data-ready=yes]")
    first = pixels(page)
    page.screenshot(path=PICTURES / "page.png")
    assert asked == [(tmp_path / "scene.html").as_uri()]
    still = v.still.array[..., :3].astype(int)
    assert first.shape == still.shape
    lit = still.max(2) > 60  # what is there, is there, in its color
    lit[:90, :160] = False   # but for the legend, which is beside the picture
    assert lit.mean() > 0.1 and (abs(first - still).max(2)[lit] < 90).mean() > 0.9
    assert colored(page) > 500  # the red ones

    def changed(act) -> float:
        before = pixels(page)
        act()
        page.wait_for_timeout(500)  # the rest after a movement
        return (abs(pixels(page) - before).max(2) > 12).mean()

    def drag():
        page.mouse.move(250, 200)
        page.mouse.down()
        page.mouse.move(380, 260, steps=4)
        page.mouse.up()

    switch = page.get_by_label("front")
    assert changed(switch.uncheck) > 0.01
    assert "2 of 5" in page.locator("#controls").inner_text()
    assert changed(switch.check) > 0.01
    thin = page.get_by_role("slider", name="opacity")
    red = colored(page)
    assert changed(lambda: thin.fill("0.3")) > 0.01 and colored(page) < 0.5 * red  # what is behind shines through
    thin.fill("1")
    for plane in ("sagittal", "coronal", "axial"):
        box = page.get_by_role("checkbox", name=f"{plane} plane in 3d")
        assert changed(box.uncheck) > 0.01
    assert (pixels(page).max(2) > 60).mean() < 0.7 * (first.max(2) > 60).mean()  # the tubes are left
    page.screenshot(path=PICTURES / "page-no-planes.png")
    for plane in ("sagittal", "coronal", "axial"):
        page.get_by_role("checkbox", name=f"{plane} plane in 3d").check()
    page.wait_for_timeout(300)
    assert (abs(pixels(page) - first).max(2) > 12).mean() < 0.005  # all as before
    assert changed(drag) > 0.05
    page.get_by_role("button", name="axial").click()
    slice_ = page.get_by_role("slider", name="axial")
    assert changed(lambda: slice_.fill(slice_.get_attribute("max"))) > 0.05
    assert "z = " in str(slice_.get_attribute("aria-valuetext")) and page.locator("#bar").is_visible()
    page.locator("canvas").focus()
    assert changed(lambda: page.keyboard.press("ArrowLeft")) > 0.03  # more than its rim
    with page.expect_download() as download:
        page.get_by_role("button", name="save picture").click()
    picture = np.asarray(Image.open(download.value.path()).convert("L"))
    assert download.value.suggested_filename == "scene.png" and (picture > 60).mean() > 0.02
    assert failed == []
    context.close()
