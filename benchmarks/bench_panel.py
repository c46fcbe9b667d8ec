"""Training with the panel open beside training without it, what an update of the panel costs, and how soon a click
has its effect.

Learn2Track (28 features, LSTM 64-64) on one batch of 8 streamlines again and again, so that all batches take equally
long, in a thread, as the panel starts it, in the kernel of a real JupyterLab with chromium in front of it (on the same
cores). Stretches with the panel open in the page and with it closed take turns, in the other order each time; compared
are seconds per batch. The bytes are those that the page receives. Then a toy of a thousand batches a second, which is
as much to follow as there can be, without a page: the messages that widgets send are made (JSON and binary), counted
and dropped. Where there is no chromium, so are those of Learn2Track. The time of an update is that of the thread that
makes it, against the 5 ms it may take; its bytes against 20 kB (in the columns of ms: kB).

A click is one on Pause or Resume in the page, by turns, while Learn2Track trains: 1,000 of them, one after the other.
Its effect is that the training rests or goes on, by the clock of the kernel, and that the page says so. Given is the
99th percentile in place of the median, against 100 ms and a batch, with its 95 % interval by order statistics."""

import json
import math
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from ipywidgets import Widget
from torch import nn

from benchmarks.pairs import Ratio, median_interval
from benchmarks.subjects import NB_FEATURES, bench_hdf5
from tractkit.core.rng import fold, permutation
from tractkit.data.dataset import MultiSubjectDataset
from tractkit.data.loader import BatchLoaderOneInput
from tractkit.data.plan import Plan
from tractkit.data.sampler import BatchIDSampler
from tractkit.lab.panel import TrainerPanel
from tractkit.models.learn2track import Learn2Track
from tractkit.training.trainer import Trainer, TrainerOneInput

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests" / part) for part in (".", "browser")]

PAIRS, STRETCH, SETTLE = 52, 1.0, 1.0  # stretches of each kind, seconds of one, and before it: opening is not training
NB_CLICKS = 1000


class Meter:
    """Stands in for the kernel's line to the browser: makes each message, notes its bytes, drops it."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.before: Any = None

    def __enter__(self) -> "Meter":
        self.before = Widget._send
        meter = self

        def send(self: Widget, message: dict, buffers: Any = None) -> None:
            meter.sizes.append(
                len(json.dumps(message, default=str).encode())
                + sum(len(memoryview(b).cast("B")) for b in buffers or [])
            )

        Widget._send = send
        return self

    def __exit__(self, *_: Any) -> None:
        Widget._send = self.before


class Timed(TrainerPanel):
    """Notes how long an update takes."""

    def refresh(self) -> None:
        began = time.thread_time()
        super().refresh()
        self.__dict__.setdefault("spent", []).append(time.thread_time() - began)


def pace(trainer: Trainer, seconds: float) -> float:
    """Seconds per batch, over a stretch that begins and ends with a batch."""
    marks: list[tuple[float, int]] = []
    trainer.listeners.append(
        listener := lambda event, t: (
            marks.append((time.perf_counter(), t.state.global_step))
            if event == "batch" and t.status.phase == "training"
            else None
        )
    )
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(marks) < 4:
        time.sleep(.02)
    trainer.listeners.remove(listener)
    return (marks[-1][0] - marks[0][0]) / (marks[-1][1] - marks[0][1])


def as_rows(
    what: str, note: str, times: tuple[list[float], list[float]], spent: Sequence[float], large: Sequence[int]
) -> Iterator[Ratio]:
    """Seconds per batch with the panel and without, seconds of each update, its bytes: as rows."""
    ratios = [a / b for a, b in zip(*times, strict=True)]
    low, high = median_interval(ratios)
    yield Ratio(
        f"{what}: a batch, panel open",
        "the same, panel closed",
        1e3 * median(times[0]),
        1e3 * median(times[1]),
        median(ratios),
        low,
        high,
        f"{note}; {len(ratios)} pairs of {STRETCH:g} s",
    )
    shares = [s / .005 for s in spent]
    low, high = median_interval(shares)
    yield Ratio(
        f"{what}: an update",
        "5 ms",
        1e3 * median(spent),
        5,
        median(shares),
        low,
        high,
        f"{len(spent)} updates, the longest {1e3 * max(spent):.1f} ms",
    )
    low, high = median_interval([s / 20_000 for s in large])
    yield Ratio(
        f"{what}: bytes of an update (kB)",
        "20 kB",
        median(large) / 1000,
        20,
        median(large) / 20_000,
        low,
        high,
        f"the largest {max(large) / 1000:.1f} kB",
    )


def beside(trainer: Trainer, what: str, note: str) -> Iterator[Ratio]:
    """Without a page."""
    trainer.start()
    while trainer.status.global_step < 20:
        time.sleep(.05)
    times: tuple[list[float], list[float]] = ([], [])
    spent: list[float] = []
    with Meter() as meter:
        for pair in range(-2, PAIRS):
            for which in (0, 1) if pair % 2 else (1, 0):
                panel = Timed(trainer) if which == 0 else None
                time.sleep(.1)
                meter.sizes = meter.sizes if pair >= 0 else []
                value = pace(trainer, STRETCH)
                if panel is not None:
                    panel.close()
                    spent += panel.__dict__["spent"][1:] if pair >= 0 else []
                if pair >= 0:
                    times[which].append(value)
    trainer.stop(wait=True)
    yield from as_rows(what, note, times, spent, [s for s in meter.sizes if s > 1000])


CLICKS = """async n => {
    const panel = document.querySelector('.tractkit-readout'), chip = panel.querySelector('.tractkit-chip');
    const button = verb => [...document.querySelectorAll('.jupyter-button')].find(b => b.textContent.trim() === verb);
    const until = test => new Promise(done => {
        if (test()) return done();
        const seen = new MutationObserver(() => { if (test()) { seen.disconnect(); done(); } });
        seen.observe(document.body, { subtree: true, childList: true, characterData: true, attributes: true });
    });
    const clicks = [];
    for (let i = 0; i < n; i++) {
        const [verb, effect] = i % 2 ? ['Resume', 'training'] : ['Pause', 'paused'];
        await until(() => !button(verb).disabled);
        await new Promise(done => setTimeout(done, 20 + 30 * (i * 0.618 % 1)));
        const at = Date.now() / 1000, began = performance.now();
        button(verb).click();
        await until(() => chip.textContent === effect);
        clicks.push([verb, at, performance.now() - began]);
    }
    return clicks;
}"""


def percentile(values: Sequence[float], share: float = 0.99) -> tuple[float, float, float]:
    """A percentile, and its 95 % interval from order statistics (normal approximation of the binomial)."""
    ordered, n = sorted(values), len(values)
    half = 1.96 * math.sqrt(n * share * (1 - share))
    ranks = (n * share, n * share - half, n * share + half)
    value, low, high = (ordered[min(max(math.ceil(rank) - 1, 0), n - 1)] for rank in ranks)
    return value, low, high


def click_rows(clicks: Sequence[tuple[str, float, float]], effects: Sequence[tuple[str, float]],
               batch: float) -> Iterator[Ratio]:
    """From each click to its effect in the kernel and on the page, against 100 ms and a batch."""
    wanted = {"Pause": "paused", "Resume": "resumed"}
    delays = [1000 * (next(t for event, t in effects if event == wanted[verb] and t > at - 0.002) - at)
              for verb, at, _ in clicks]
    bound = 100 + 1000 * batch
    for what, values in (("the training obeys", delays), ("the page shows it", [shown for _, _, shown in clicks])):
        value, low, high = percentile(values)
        yield Ratio(f"Learn2Track in a page: 99th percentile from a click until {what}", "100 ms and a batch", value,
                    bound, value / bound, low / bound, high / bound,
                    f"{len(values):,} clicks; median {median(values):.1f} ms, the longest {max(values):.0f} ms")


class InPage:
    """Runs in the kernel of the page: trains, and times a stretch in a thread while the kernel stays free."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.paces, self.spent = trainer, list[float](), list[float]()
        self.panel: Timed | None = None
        self.effects = list[tuple[str, float]]()
        trainer.listeners.append(self.note)
        trainer.start()

    def note(self, event: str, trainer: Trainer) -> None:
        if event in ("paused", "resumed"):
            self.effects.append((event, time.time()))

    def open(self) -> TrainerPanel:
        self.panel = Timed(self.trainer)
        return self.panel

    def close(self) -> None:
        if self.panel is not None:
            self.panel.close()
            self.spent += self.panel.__dict__["spent"][1:]
            self.panel = None

    def time_stretch(self) -> None:
        threading.Thread(target=lambda: self.paces.append(pace(self.trainer, STRETCH))).start()


def in_page(hdf5: Path, chromium: str, note: str) -> Iterator[Ratio]:
    """With a page: the panel is shown by running a cell, and closed by running another."""
    from helpers_waiting import until
    from lab import Kernel, Wire, one_lab

    with tempfile.TemporaryDirectory() as folder, one_lab(Path(folder), chromium) as lab:
        wire = Wire(lab.page)
        page = lab.open(
            "panel.ipynb",
            [
                f"from benchmarks.bench_panel import InPage, steady\nrun = InPage(steady({str(hdf5)!r}, '.'))",
                "run.open()",
                "run.close()",
            ],
        )
        lab.run_cell_with(page, "import")
        kernel, readout = Kernel(lab), page.locator(".tractkit-readout .tractkit-measure[data-name=step]")
        until(lambda: kernel.ask("run.trainer.status.global_step") > 20, 120)
        times: tuple[list[float], list[float]] = ([], [])
        for pair in range(-2, PAIRS):
            for which in (0, 1) if pair % 2 else (1, 0):
                lab.run_cell_with(page, "run.open()" if which == 0 else "run.close()")
                until(lambda which=which: (readout.count() > 0) == (which == 0))
                page.wait_for_timeout(1000 * SETTLE)
                before = kernel.ask("(len(run.paces), run.time_stretch())")[0]
                page.wait_for_timeout(1000 * STRETCH)
                until(lambda before=before: kernel.ask("len(run.paces)") > before)
                if pair >= 0:
                    times[which].append(kernel.ask("run.paces[-1]"))
                lab.run_cell_with(page, "run.close()")
        spent = kernel.ask("run.spent")
        lab.run_cell_with(page, "run.open()")
        until(lambda: readout.count() > 0)
        page.wait_for_timeout(1000 * SETTLE)
        clicks = page.evaluate(CLICKS, NB_CLICKS)
        effects = kernel.ask("run.effects")
        kernel.ask("run.trainer.stop(wait=True) is None")
        kernel.close()
        yield from as_rows(
            "Learn2Track in a page",
            note,
            times,
            spent,
            [size for _, kind, size, _ in wire.seen if kind == "comm_msg" and size > 1000],
        )
        yield from click_rows(clicks, effects, median(times[0]))


class OneBatch(BatchIDSampler):
    """The same batch again and again."""

    def plan(self, epoch: int = 0, subset: str = "training") -> Plan:
        plan, n = super().plan(1, subset), 1000 if subset == "training" else 1
        first = plan.order[plan.starts[0]:plan.starts[1]]
        return Plan(
            plan.subjects, plan._firsts, np.tile(first, n), np.arange(n + 1) * len(first), epoch=epoch, subset=subset
        )


class Points:
    def plan(self, epoch: int, subset: str) -> np.ndarray:
        return permutation(fold(1, epoch, subset), 4000 * 8).reshape(4000, 8)[:4000 if subset == "training" else 2]

    def load_batch_streamlines(self, ids: np.ndarray, *, epoch: int, training: bool) -> Any:
        x = torch.from_numpy((ids[:, None] / 16000 - 1).astype(np.float32))
        return x, x**3


class Fit(Trainer):
    def compute_batch_loss(self, batch: Any) -> tuple[torch.Tensor, int]:
        return nn.functional.mse_loss(self.model(batch[0]), batch[1]), len(batch[0])


def options() -> dict[str, Any]:
    return dict(
        max_epochs=10_000,
        progress=False,
        device="cpu",
        num_threads=torch.get_num_threads(),
        tensorboard=False,
        checkpoint_every_seconds=None,
        max_batches_per_epoch_validation=1,
    )


def steady(hdf5: str | Path, folder: str) -> Trainer:
    dataset = MultiSubjectDataset(hdf5).load_data()
    group, lines = (next(iter(g)) for g in (dataset.training_set[0].volumes, dataset.training_set[0].streamlines))
    model = Learn2Track(NB_FEATURES, rnn_layer_sizes=(64, 64), dropout=.1, step_size=1.0, seed=1)
    return TrainerOneInput(
        model,
        folder,
        "learn2track",
        OneBatch(dataset, lines, 8),
        BatchLoaderOneInput(dataset, model, group, lines),
        **options(),
    )


def rows() -> Iterator[Ratio]:
    from conftest import CHROMIUM

    hdf5, note = bench_hdf5(2, 4000), f"{torch.get_num_threads()} threads"
    with tempfile.TemporaryDirectory() as folder:
        if CHROMIUM:
            yield from in_page(hdf5, CHROMIUM, note)
        else:
            yield from beside(steady(hdf5, folder), "Learn2Track", f"{note}; no chromium, so no page")
        yield from beside(
            Fit(nn.Linear(1, 1), folder, "toy", Points(), Points(), **options()), "toy", "1,000 batches a second or so"
        )
