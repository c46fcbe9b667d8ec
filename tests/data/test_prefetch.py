"""feeding: the batches of a plan in its order, from any place in it, whoever makes them; looked up as they are used."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers_waiting import until
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from tractkit.data.prefetch import Feeder


class CountingPlan:
    """Batch i is [i]; remembers what was asked for."""

    def __init__(self, n):
        self.n, self.asked = n, []

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.asked.append(i)
        return [i]


def load(ids, *, epoch, training):
    if ids[0] == 99:
        raise OSError("disk gone")
    time.sleep(0.02 * (ids[0] % 3 == 0))  # some take longer; the order is the plan's all the same
    return torch.tensor([ids[0], epoch, training, os.getpid()])


@pytest.mark.parametrize(
    "options",
    [
        dict(prefetch=0),
        dict(prefetch=1),
        dict(prefetch=5),
        dict(num_workers=1),
        dict(num_workers=2, prefetch=3),
        dict(num_workers=2, context="spawn"),
        dict(num_workers=2, context="forkserver"),
    ],
)
def test_in_order_from_anywhere_again_and_again(options):
    feeder = Feeder(load, **options)
    try:
        for start, stop, epoch, training in (
            (0, None, 0, True),
            (7, None, 2, False),
            (3, 5, 1, True),
            (12, None, 0, True),
        ):
            with feeder.batches(CountingPlan(12), start, stop, epoch=epoch, training=training) as batches:
                found = [b.tolist() for b in batches]
            assert [f[:3] for f in found] == [[i, epoch, training] for i in range(start, stop or 12)]
            assert all((f[3] != os.getpid()) == bool(options.get("num_workers")) for f in found)
        with feeder.batches(CountingPlan(12)) as batches:  # left early, and used again
            assert next(iter(batches))[0] == 0
        with feeder.batches(CountingPlan(12), 4, 6) as batches:
            assert [int(b[0]) for b in batches] == [4, 5]
    finally:
        feeder.close()


@pytest.mark.parametrize("options", [dict(prefetch=0), dict(prefetch=3), dict(num_workers=1, prefetch=3)])
def test_the_plan_is_looked_up_as_it_is_used(options):
    plan, feeder = CountingPlan(1000), Feeder(load, **options)
    try:
        with feeder.batches(plan, 10) as batches:
            for k, _ in enumerate(batches):
                if k == 4:
                    break
        assert plan.asked == list(range(10, 10 + len(plan.asked))) and 5 <= len(plan.asked) <= 12
    finally:
        feeder.close()


@pytest.mark.parametrize("options", [dict(prefetch=0), dict(), dict(num_workers=1)])
def test_an_error_comes_where_it_belongs(options):
    feeder, got = Feeder(load, **options), []
    try:
        with pytest.raises(OSError, match="disk gone"), feeder.batches([[1], [2], [99], [4]]) as batches:
            for batch in batches:
                got.append(int(batch[0]))
        assert got == [1, 2]
    finally:
        feeder.close()


def load_and_be_killed(ids, *, epoch, training):
    if ids[0] == 1:
        time.sleep(0.5)  # the batch before it is under way
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.tensor(ids)


def test_a_worker_that_is_killed_while_a_step_is_computed_is_told_in_the_same_words(monkeypatch):
    before = signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)  # torch sets its handler once
    list(DataLoader(range(2), num_workers=1))  # from now on torch raises, wherever the main thread is
    feeder = Feeder(load_and_be_killed, num_workers=1)
    try:
        with pytest.raises(RuntimeError, match=r"was killed \(signal 9\), .* num_workers=0") as e:
            with feeder.batches(CountingPlan(5)) as batches:
                next(iter(batches))
                until(lambda: False, 30)  # a long step
        assert "DataLoader worker" in str(e.value.__context__)
    finally:
        feeder.close()
        signal.signal(signal.SIGCHLD, before)


def test_bad_settings():
    for options in (dict(num_workers=-1), dict(prefetch=-1)):
        with pytest.raises(ValueError, match="negative"):
            Feeder(load, **options)


ORPHANS = """
import os, sys, time
from pathlib import Path
from tractkit.data.prefetch import Feeder

class Slow:
    "Takes a while to arrive in a worker, which says that it is there."
    def __setstate__(self, state):
        Path(sys.argv[1], str(os.getpid())).touch()
        time.sleep(2)

    def __call__(self, ids, *, epoch, training):
        return ids

    def __getstate__(self):
        return {"a": 1}

if __name__ == "__main__":
    with Feeder(Slow(), num_workers=1, context="spawn").batches([[1], [2]]) as batches:
        list(batches)
"""


def test_a_worker_ends_with_its_parent_that_was_killed_while_it_started(tmp_path):
    (tmp_path / "child.py").write_text(ORPHANS)
    there = tmp_path / "there"
    there.mkdir()
    parent = subprocess.Popen([sys.executable, tmp_path / "child.py", there], stderr=subprocess.DEVNULL)
    until(lambda: list(there.iterdir()))
    parent.kill()
    parent.wait()
    (worker,) = (int(p.name) for p in there.iterdir())
    until(lambda: not Path(f"/proc/{worker}").exists(), 60)
