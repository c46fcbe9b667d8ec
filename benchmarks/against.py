"""Training, the panel and the import of tractkit, beside another version of it.

    python -m benchmarks.against OTHER_ROOT    # a checkout of the other version, as `git worktree add` makes it

Each version runs in a process of its own, and they take turns. Learn2Track (28 features, LSTM 128-128) trains on
batches of
256 streamlines with its loader and prefetch thread; the toy, a line through points, has next to nothing to compute, so
its time is that of the trainer around a batch. An update of the panel is `TrainerPanel.refresh` after 200 more batches,
with the messages made, counted and dropped; its time is that of its thread."""

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.__main__ import RESULTS, put
from benchmarks.pairs import Ratio, as_table, compare, machine

HERE = Path(__file__).resolve().parent.parent
CHILD = '''
import sys, tempfile, threading, time
import torch
from torch import nn
from benchmarks.bench_panel import Fit, Meter, Points, options
from benchmarks.bench_training import make_parts
from benchmarks.subjects import bench_hdf5
import tractkit as tk

torch.set_num_threads(1)
kind, root = sys.argv[1], tempfile.mkdtemp()

class Turns:
    """Let a training in a thread run some batches whenever it is asked."""
    def __init__(self, trainer, size):
        self.go, self.done, self.batches, self.size = threading.Semaphore(0), threading.Semaphore(0), 0, size
        trainer.listeners.append(self.at_event)
        trainer.start()
    def at_event(self, event, trainer):
        if event == "batch":
            if self.batches % self.size == 0:
                self.done.release()
                self.go.acquire()
            self.batches += 1
    def __call__(self):
        self.go.release()
        self.done.acquire()

def learn2track():
    dataset = tk.MultiSubjectDataset(bench_hdf5(2, 4000)).load_data()
    model, sampler, loader = make_parts(dataset)
    return tk.TrainerOneInput(model, root, "run", sampler, loader, **options())

if kind == "training":
    turn = Turns(learn2track(), 4)
else:
    trainer = Fit(nn.Linear(1, 1), root, "run", Points(), Points(), **options())
    turn = Turns(trainer, 200)
turn.done.acquire()
if kind == "panel":
    Meter().__enter__()
    panel, batches = tk.TrainerPanel(trainer), turn
print("ready", flush=True)
for _ in sys.stdin:
    if kind == "panel":
        batches()
        began = time.thread_time()
        panel.refresh()
        print(time.thread_time() - began, flush=True)
    else:
        began = time.perf_counter()
        turn()
        print(time.perf_counter() - began, flush=True)
import os; os._exit(0)
'''


def environment(root: Path) -> dict[str, str]:
    """Return the environment in which `root` is the tractkit that is imported."""
    return os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


def turns_of(root: Path, kind: str, stack: contextlib.ExitStack) -> Callable[[], float]:
    """Start a version's process; what is returned lets it make one turn, and gives the seconds that it took."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, kind], cwd=root, env=environment(root), text=True, bufsize=1,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    stack.callback(child.wait)
    assert child.stdin is not None and child.stdout is not None
    stack.callback(child.stdin.close)
    while (line := child.stdout.readline().strip()) != "ready":
        if not line and child.poll() is not None:
            raise RuntimeError(f"{root}: the benchmark's process ended with {child.returncode}; see its messages above")

    def turn() -> float:
        child.stdin.write("\n")
        return float(child.stdout.readline())

    return turn


def command(root: Path, *words: str) -> Callable[[], None]:
    """Return a call that runs Python with these words."""
    return lambda: (
        subprocess.run([sys.executable, *words], cwd=root, env=environment(root), check=True, stdout=subprocess.DEVNULL)
        and None
    )


def rows(other: Path) -> Iterator[Ratio]:
    """Compare this checkout with another one."""
    before = "the version before"
    for what, words in {
        "import tractkit": ("-c", "import tractkit"),
        "tractkit train --help": ("-m", "tractkit", "train", "--help"),
    }.items():
        yield compare(
            what, command(HERE, *words), before, command(other, *words), note="a process each; warm page cache"
        )
    for kind, what in {
        "training": "Learn2Track, 4 batches of 256",
        "toy": "toy, 200 batches",
        "panel": "an update of the panel",
    }.items():
        with contextlib.ExitStack() as stack:
            now, then = (turns_of(root, kind, stack) for root in (HERE, other))
            pairs = 100 if kind == "panel" else 30
            yield compare(what, now, before, then, pairs=pairs, warm_up=3, note="1 thread", timed=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, metavar="OTHER_ROOT")
    parser.add_argument("--dry", action="store_true", help="print, do not write RESULTS.md")
    args = parser.parse_args()
    commit = subprocess.run(
        ["git", "-C", args.other, "log", "-1", "--format=%h %s"], capture_output=True, text=True, check=True
    ).stdout.strip()
    text = (f"## against\n\n{(__doc__ or '').strip()}\n\nThe version before: "
            f"{commit}.\n\n{as_table(list(rows(args.other.resolve())))}\n\n{machine()}.")
    print(text)
    if not args.dry:
        RESULTS.write_text(put(RESULTS.read_text(encoding="utf-8"), "against", text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
