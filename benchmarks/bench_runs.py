"""A folder of 500 runs, listed and shown.

Each run is a copy of one training of 30 epochs with 200 batches, with settings of its own (a log of 1.2 MB, three
checkpoints, a config of 30 settings). `find_runs` reads all of them; with `KnownRuns` it reads what has changed,
here nothing, or the log of one run that trains on. "Opened" is all that happens in the kernel until the table and
the curves are on their way to the page: `RunBrowser(folder).widget`; the reference is the 3 s that it may take. The
page cache is warm. In the rows of bytes the columns of ms are kB.

Where there is a Chromium, the folder is opened in a real JupyterLab, in a kernel that has imported tractkit: from the
start of the cell until the first rows are drawn, and until all runs are there with their curves. At the end the kernel
is killed: how long until the page says so. The references are the 3 s that each may take."""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import yaml

from benchmarks.pairs import Ratio, compare
from tractkit.lab.run_browser import RunBrowser
from tractkit.runs.listing import KnownRuns, find_runs
from tractkit.runs.log import RunLog

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / name) for name in ("tests", "tests/browser")]

NB_RUNS = 500


def make_runs(top: Path, nb_runs: int = NB_RUNS) -> Path:
    """Train once, and link its files into the folders of many runs, each with a config of its own."""
    from helpers_training import Points, fit

    trainer = fit(top, "one", points=Points(200, 2), max_epochs=30, tensorboard=False)
    trainer.train_and_validate()
    source, config = top / "one", yaml.safe_load((top / "one/config.yaml").read_text())
    files = [p for p in source.rglob("*") if p.is_file() and p.name not in ("config.yaml", ".lock")]
    for k in range(nb_runs):
        folder = top / "runs" / f"study-{k % 5}" / f"run-{k}"
        for path in files:
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)
        config["trainer"] |= {"learning_rate": 0.001 * (1 + k % 7), "clip_grad": float(k % 3), "rng": k}
        config["model"]["dropout"] = 0.1 * (k % 4)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return top / "runs"


def timed(act: Callable[[], None]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def opened(folder: Path) -> None:
    """Open the browser as a cell does, and close it."""
    browser = RunBrowser(folder)
    assert len(browser.widget.children[1].table["rows"]) == NB_RUNS
    browser.close()


LOOK = """() => {
    const seen = (window.seen = {}), t0 = performance.now();
    const note = (name, there) => { if (there && !(name in seen)) seen[name] = (performance.now() - t0) / 1000; };
    const look = () => {
        const line = document.querySelector(".tractkit-runs-below")?.innerText || "";
        note("first", document.querySelector("tr[data-name]"));
        note("all", line.includes("NB_RUNS ") && document.querySelector(".tractkit-plot-legend")?.innerText);
        note("gone", document.querySelector(".tractkit-gone"));
        requestAnimationFrame(look);
    };
    look(); }"""


def in_lab(folder: Path, place: Path, chromium: str) -> Iterator[Ratio]:
    """Open the folder in JupyterLab some times; then kill the kernel."""
    from lab import Kernel, one_lab

    code = f"from tractkit.lab.run_browser import RunBrowser\nRunBrowser({str(folder)!r})"
    first, whole = [], []
    with one_lab(place, chromium) as lab:
        page = lab.open("runs.ipynb", ["import tractkit.lab.run_browser", code])
        page.set_default_timeout(120_000)
        lab.run_cell(page, 0)
        page.get_by_text("[1]:", exact=True).wait_for()
        for opening in range(6):
            page.evaluate(LOOK.replace("NB_RUNS", str(NB_RUNS)))
            lab.run_cell(page, 1)
            page.wait_for_function("window.seen.all")
            seen = page.evaluate("window.seen")
            page.get_by_text(f"[{opening + 2}]:", exact=True).wait_for()
            if opening:  # the first one also loads the scripts of widgets
                first.append(seen["first"])
                whole.append(seen["all"])
            page.locator(".jp-Notebook .jp-Cell").nth(1).locator(".jp-InputPrompt").first.click()
            lab.command(page, "notebook:clear-cell-output")
            page.locator(".tractkit-runs").wait_for(state="detached")
        lab.run_cell(page, 1)
        page.locator("tr[data-name]").first.wait_for()
        kernel = Kernel(lab)
        pid = kernel.ask("__import__('os').getpid()")
        kernel.close()
        page.evaluate(LOOK)
        os.kill(pid, signal.SIGKILL)
        page.wait_for_function("window.seen.gone")
        gone = [page.evaluate("window.seen.gone")]
    for what, times in (("the first rows", first), ("all, with curves", whole)):
        yield spread(f"{NB_RUNS} runs in JupyterLab: {what}", times)
    yield spread("the page says that its kernel was killed", gone)


def spread(what: str, seconds: list[float]) -> Ratio:
    """The median and the extremes of a few times, against 3 s."""
    low, middle, high = min(seconds), median(seconds), max(seconds)
    note = f"{len(seconds)} times; the interval is of all of them; load {os.getloadavg()[0]:.0f}"
    return Ratio(what, "3 s", 1e3 * middle, 3e3, middle / 3, low / 3, high / 3, note)


def rows() -> Iterator[Ratio]:
    with tempfile.TemporaryDirectory() as place:
        folder = make_runs(Path(place))
        known, working = KnownRuns(), KnownRuns()
        find_runs(folder, known=known)
        find_runs(folder, known=working)
        one = folder / "study-0/run-0"
        content = (one / "log.jsonl").read_bytes()
        (one / "log.jsonl").unlink()
        (one / "log.jsonl").write_bytes(content)  # a file of its own
        log = RunLog(one)

        def look_at_growing() -> None:
            log.append("batch", epoch=30, batch=0, step=6001, loss=0.5, time={})
            find_runs(folder, known=working)

        yield compare(f"{NB_RUNS} runs opened", lambda: timed(lambda: opened(folder)), "3 s", lambda: 3.0,
                      timed=True, warm_up=1)
        again = f"{NB_RUNS} runs, read anew"
        yield compare(f"{NB_RUNS} runs, nothing has changed", lambda: find_runs(folder, known=known), again,
                      lambda: find_runs(folder), warm_up=1)
        yield compare(f"{NB_RUNS} runs, one is training", look_at_growing, again, lambda: find_runs(folder), warm_up=1)
        browser = RunBrowser(folder)
        table = browser.widget.children[1]
        whole = len(json.dumps(table.table)) / 1000
        log.append("batch", epoch=30, batch=0, step=6002, loss=0.5, time={})
        browser.refresh()
        part = len(json.dumps(table.changed)) / 1000
        yield Ratio("bytes sent when one run has grown (kB)", "those of the whole table", part, whole,
                    part / whole, part / whole,
                    part / whole)
        browser.close()
        log.close()
        if chromium := next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None):
            yield from in_lab(folder, Path(place) / "lab", chromium)
