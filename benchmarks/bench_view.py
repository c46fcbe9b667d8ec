"""The live view in a real JupyterLab, with Debian's chromium in front of it (both on the same cores, and the driver's
software rendering too). How long a view of 100,000 streamlines (60 points each, over a volume) takes, its still
with it, from running the cell `v = tk.view(many, volume)` to a painted canvas: in fresh kernels that have done
`import tractkit as tk` and `tk.Tractogram.load` and nothing else, so that the import of FURY counts (the very first
of them in a new home folder, where matplotlib and the driver have no caches yet), and again in the last of these
kernels. How fast 2,000 streamlines turn under a mouse of 60 Hz at 640 × 480 (then 500 of them are drawn, with fewer
points, at half the width and height; a picture counts once the browser has it, and each shows another move) beside
the rate at which all of them are redrawn offscreen, in turns; the processor time of a picture, of all processes
together; and what an open view costs a kernel that does nothing. Needs chromium and the packages of the dev
extra."""

import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

import psutil

from benchmarks.pairs import median_interval

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests" / part) for part in (".", "browser")]

SETUP = """import gc, os, time
import numpy as np
import tractkit as tk
from tractkit.core.rng import fold, normal, uniform

def made(n, points=60):
    ends = uniform(fold("ends", 1), np.arange(n * 6).reshape(n, 2, 3)) * [90, 110, 70] + 5
    bend = normal(fold("bend", 1), np.arange(n * 3).reshape(n, 1, 3)) * 12
    t = np.linspace(0, 1, points)[:, None]
    lines = ends[:, :1] + (ends[:, 1:] - ends[:, :1]) * t + bend * np.sin(np.pi * t)
    packed = tk.Streamlines(lines.reshape(-1, 3).astype(np.float32), np.arange(n + 1) * points)
    return tk.Tractogram(packed, np.diag([-2, 2, 2, 1.]), (100, 120, 80))

if not os.path.exists("many.trk"): made(100_000).save("many.trk")
many, few = tk.Tractogram.load("many.trk"), made(2_000)
far = np.linalg.norm((np.indices((100, 120, 80)).T - [50, 60, 40]) * [1, .9, 1.3], axis=-1).T
volume = tk.Volume((60 - far).clip(0).astype(np.float32),
                   np.diag([-2, 2, 2, 1.]))

def redraw_rate(seconds, composition=None):
    # a scene, by default that of the open view, moved, drawn and read back offscreen
    from tractkit.viz.fury_scene import Stage, open_stage
    manager = open_stage(Stage(composition or v.composition), (640, 480), "offscreen", 1)
    manager.render(); manager.window.draw()
    began, n = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        manager.stage.camera.local.x += 0.5
        manager.window.draw(); n += 1
    rate = n / (time.perf_counter() - began)
    manager.close()
    return rate

def glyph_rate(seconds):
    # 1,024 glyphs of order 8 on a plane
    from tractkit.viz.composition import Composition
    from tractkit.viz.drawables import Glyphs
    data = normal(fold("glyphs"), np.arange(32 * 32 * 3 * 45).reshape(32, 32, 3, 45)) * np.float32(.05)
    data[..., 0] = .3
    return redraw_rate(seconds, Composition([Glyphs(tk.Volume(data, np.diag([2, 2, 2, 1.])))], view="axial"))
"""
OPEN, TURN = "v = tk.view(many, volume)", "v.close(); v = tk.view(few, volume)"
OPEN_ALL = "v = tk.view(many, volume, max_streamlines=None)"
SECONDS = 2.0


def table(kernels: int = 4, opens: int = 4, pairs: int = 20, idle: float = 20.0) -> str:
    """Everything, as Markdown."""
    from conftest import CHROMIUM
    from helpers_waiting import until
    from lab import Kernel, one_lab
    from test_view_browser import canvas, rest, seen

    if CHROMIUM is None:
        return "No chromium was found: nothing was measured."
    with tempfile.TemporaryDirectory() as folder, one_lab(Path(folder), CHROMIUM) as lab:
        page = lab.open("view.ipynb", [SETUP, OPEN, "v.close(); gc.collect()", TURN, OPEN_ALL])
        page.set_viewport_size({"width": 1200, "height": 900})  # so that a view has the width it asks for
        first, later, loads, memory = [], [], [], []
        for number in range(kernels):
            if number:
                page.evaluate("() => { window.jupyterapp.commands.execute('kernelmenu:restart'); }")
                page.locator(".jp-Dialog .jp-mod-accept").click()
                page.wait_for_timeout(4000)
            lab.run_cell(page, 0)
            kernel = Kernel(lab)
            until(lambda k=kernel: k.ask("'redraw_rate' in globals()"), 120)
            page.wait_for_timeout(2000)
            for number_here in range(opens + 1 if number == kernels - 1 else 1):
                process = psutil.Process(kernel.ask("os.getpid()"))
                assert number_here or not kernel.ask("'fury' in __import__('sys').modules")
                loads.append(os.getloadavg()[0])
                before, began = sum(process.cpu_times()[:2]), time.perf_counter()
                lab.run_cell(page, 1)
                canvas(page).wait_for(timeout=60_000)
                until(lambda: seen(page), 60)
                (later if number_here else first).append(
                    (time.perf_counter() - began, sum(process.cpu_times()[:2]) - before)
                )
                rest(page)
                words = kernel.ask("repr(v)")
                lab.run_cell(page, 2)
                if number == kernels - 1:
                    page.wait_for_timeout(1000)
                    memory.append(process.memory_info().rss / 1e6)
                page.evaluate("() => window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
        began = time.perf_counter()
        lab.run_cell(page, 4)
        canvas(page).wait_for(timeout=60_000)
        until(lambda: seen(page), 60)
        all_first = time.perf_counter() - began
        rest(page)
        all_of_them = time.perf_counter() - began
        glyphs = kernel.ask(f"glyph_rate({SECONDS})")
        lab.run_cell(page, 3)
        until(lambda: kernel.ask("v.total") == 2000, 60)
        shown = canvas(page, page.locator(".jp-OutputArea-output .renderview-wrapper").count() - 1)
        shown.scroll_into_view_if_needed()
        page.wait_for_timeout(2000)
        rates, full, work, load = [], [], [], os.getloadavg()[0]
        for pair in range(pairs):
            both = {}
            for which in ("browser", "offscreen") if pair % 2 else ("offscreen", "browser"):
                if which == "browser":
                    both[which] = _drag_rate(page, shown, kernel, full, work)
                else:
                    both[which] = kernel.ask(f"redraw_rate({SECONDS})")
            rates.append((both["browser"], both["offscreen"]))
        process = psutil.Process(kernel.ask("os.getpid()"))
        page.wait_for_timeout(3000)
        before = sum(process.cpu_times()[:2])
        time.sleep(idle)
        share = (sum(process.cpu_times()[:2]) - before) / idle
        kernel.close()
    print(f"load average before each opening: {', '.join(f'{load:.1f}' for load in loads)}; openings: {first + later}")
    ratios = [a / b for a, b in rates]
    low, high = median_interval(ratios)
    return "\n".join(
        [
            "| what | measured | promised |",
            "| --- | --- | --- |",
            f"| 100,000 streamlines, from running the cell to a painted canvas, {words}: in a fresh kernel and a new "
            f"home folder | "
            f"{_seconds(first[:1])} | |",
            f"| the same in {kernels - 1} fresh kernels, median | {_seconds(first[1:])} | under 5 s |",
            f"| the same, {opens} times more in one of these kernels, median | {_seconds(later)} | under 5 s |",
            f"| all 100,000 of them in one of these kernels, to a painted canvas, and until the picture no longer "
            f"changes (two looks, .45 s apart) | {all_first:.1f} and {all_of_them:.1f} s | 4 and 8 s |",
            f"| 1,024 glyphs of order 8, redrawn offscreen at 640 × 480 | {glyphs:.1f} frames/s | 8 |",
            f"| 2,000 streamlines dragged in the browser beside redrawn offscreen, {pairs} pairs of {SECONDS:g} s | "
            f"{median(a for a, _ in rates):.1f} and {median(b for _, b in rates):.1f} frames/s, ratio "
            f"{median(ratios):.2f} "
            f"({low:.2f} – {high:.2f}) | 25 frames/s |",
            f"| processor time of such a picture, of browser, server, kernel and driver together | "
            f"{1e3 * median(work):.0f} ms (load average before: {load:.1f}) | |",
            f"| from the end of a drag to the full picture, median of {len(full)} | {1e3 * median(full):.0f} ms | "
            f"300 ms |",
            f"| memory of the kernel after the first and the last of {len(memory)} views of {words} were closed | "
            f"{memory[0]:.0f} and {memory[-1]:.0f} MB | the same |",
            f"| an open view at rest for {idle:g} s, the kernel's processor time | {100 * share:.1f} % of a core | "
            f"under 2 % |",
        ]
    )


def _seconds(opened: list[tuple[float, float]]) -> str:
    if not opened:
        return "not measured"
    return (f"{median(wall for wall, _ in opened):.1f} s (the kernel's processor time "
            f"{median(cpu for _, cpu in opened):.1f} s)")


MOVES = """async ([x, y, milliseconds]) => {  // by the page itself: a driver's moves come late from a busy page
    const at = document.elementFromPoint(x, y), began = performance.now();
    for (let k = 0; performance.now() < began + milliseconds; k++) {
        at.dispatchEvent(new PointerEvent("pointermove", {bubbles: true, pointerId: 1, pointerType: "mouse",
            isPrimary: true, buttons: 1, button: -1,
            clientX: x + 60 * (k % 40) / 40, clientY: y + 30 * (k % 25) / 25}));
        await new Promise(r => setTimeout(r, 1000 / 60));
    }
}"""


def _work() -> float:
    """Processor seconds of this process and of all that it has started."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with suppress(psutil.Error):
            total += sum(process.cpu_times()[:2])
    return total


def _drag_rate(page, shown, kernel, full: list[float], work: list[float]) -> float:
    """Frames a second that the browser confirms while the mouse turns the scene; adds to `full` how long it takes
    from the end of the drag until the picture has its full width again, and to `work` the processor time of a frame,
    seconds."""
    wide = "e => e.complete && e.naturalWidth"
    width = shown.locator("img").evaluate(wide)
    box = shown.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    window = "v._drawn.manager.window"
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 5, y)
    frames, used = kernel.ask(f"{window}.get_stats()['confirmed_frames']"), _work()
    began = time.perf_counter()
    page.evaluate(MOVES, [x, y, 1e3 * SECONDS])
    seconds, used = time.perf_counter() - began, _work() - used
    frames = kernel.ask(f"{window}.get_stats()['confirmed_frames']") - frames
    work.append(used / frames)
    page.mouse.up()
    ended = time.perf_counter()
    while shown.locator("img").evaluate(wide) != width and time.perf_counter() < ended + 10:
        time.sleep(0.005)
    full.append(time.perf_counter() - ended)
    page.wait_for_timeout(700)
    return frames / seconds
