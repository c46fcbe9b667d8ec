"""Ratios that mean something on a busy machine: ours and the reference take turns within one run."""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Ratio:
    """One line of a result table."""

    what: str            # what was timed, with its size
    reference: str       # what it is compared to
    ours_ms: float       # median
    reference_ms: float  # median
    ratio: float         # median over the pairs of ours / reference; below 1 is faster
    low: float           # the 95 % interval of that median
    high: float
    note: str = ""       # page cache warm or cold, threads

    def cells(self) -> list[str]:
        return [self.what, self.reference, f"{self.ours_ms:.3g}", f"{self.reference_ms:.3g}",
                f"{self.ratio:.2f}", f"{self.low:.2f} – {self.high:.2f}", self.note]


HEADINGS = ["what", "reference", "ours, ms", "reference, ms", "ratio", "95 % interval", "note"]


def median_interval(values: list[float]) -> tuple[float, float]:
    """The 95 % interval of the median, from order statistics: no assumption on how times are distributed.

    The number of values below the true median is binomial(n, 1/2); the widest tails that hold at most 2.5 % each
    give the ranks (Conover, Practical Nonparametric Statistics, 1999, section 3.2)."""
    ordered, n, tail, rank = sorted(values), len(values), 0.0, 0
    while (tail := tail + math.comb(n, rank) / 2**n) <= 0.025:
        rank += 1
    rank = max(rank - 1, 0)
    return ordered[rank], ordered[n - 1 - rank]


def compare(
    what: str,
    ours: Callable[[], object],
    reference_name: str,
    reference: Callable[[], object],
    *,
    pairs: int = 20,
    warm_up: int = 2,  # pairs that are run and not counted: compilation, caches
    note: str = "",
    timed: bool = False,  # whether they return their seconds: what is timed happens in another process
) -> Ratio:
    """Time `ours` and `reference` in turns, each pair in the other order than the one before it."""
    if pairs < 20:
        raise ValueError(f"{pairs} pairs: a median with an interval needs at least 20")
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(-warm_up, pairs):
        for which in (0, 1) if pair % 2 else (1, 0):
            began = time.perf_counter()
            answer = (ours, reference)[which]()
            seconds = answer if timed else time.perf_counter() - began
            if pair >= 0:
                times[which].append(seconds)
    ratios = [a / b for a, b in zip(*times, strict=True)]
    low, high = median_interval(ratios)
    return Ratio(what, reference_name, 1e3 * median(times[0]), 1e3 * median(times[1]), median(ratios), low, high, note)


def as_table(rows: list[Ratio]) -> str:
    """A Markdown table of `rows`."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def machine() -> str:
    """The machine in words, for the head of a result."""
    import platform

    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            name = next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {name}, {platform.system()}, Python {platform.python_version()}"


Benchmark = Callable[[], Iterator[Ratio]]  # what each bench_*.py names `rows`
