"""A folder of 500 runs, listed and shown.

Each run is a copy of one training of 30 epochs with 200 batches, with settings of its own (a log of 1.2 MB, three
checkpoints, a config of 30 settings). `find_runs` reads all of them; with `KnownRuns` it reads what has changed,
here nothing, or the log of one run that trains on. "Opened" is all that happens in the kernel until the table and
the curves are on their way to the page: `RunBrowser(folder).widget`; the reference is the 3 s that it may take. The
page cache is warm. In the rows of bytes the columns of ms are kB."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from benchmarks.pairs import Ratio, compare
from tractkit.lab.run_browser import RunBrowser
from tractkit.runs.listing import KnownRuns, find_runs
from tractkit.runs.log import RunLog

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests")]

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
    assert len(browser.widget.children[0].table["rows"]) == NB_RUNS
    browser.close()


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
        table = browser.widget.children[0]
        whole = len(json.dumps(table.table)) / 1000
        log.append("batch", epoch=30, batch=0, step=6002, loss=0.5, time={})
        browser.refresh()
        part = len(json.dumps(table.changed)) / 1000
        yield Ratio("bytes sent when one run has grown (kB)", "those of the whole table", part, whole,
                    part / whole, part / whole,
                    part / whole)
        browser.close()
        log.close()
