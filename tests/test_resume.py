"""Killed at any moment, and gone on with: Learn2Track with dropout and every augmentation ends in the same bits.

The reference is one undisturbed run. Real processes are killed with SIGKILL, at random moments and at named points of
the checkpoint code; weights, optimizer, history and log (its clock left out) must come out equal, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers_data import make_file
from helpers_training import log_without_time, same_states

from tractkit.runlog import RunLog
from tractkit.state import TrainerState

BATCHES = 15  # of the whole run
OPTIONS = {"checkpoint_every_batches": 2}
POINTS = ["serialise", "write", "fsync", "rename", "renamed", "rotate"]


class Children:
    """Starts trainings in processes of their own."""

    def __init__(self, data: Path, root: Path):
        self.data, self.root = data, root
        here = Path(__file__).parent
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen([sys.executable, str(here / "resume_child.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=env, cwd=root)

    def start(self, name: str, **job) -> int:
        job = {"data": str(self.data), "folder": str(self.root), "options": {**OPTIONS, **job.pop("options", {}), "name": name}, **job}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self) -> int:
        """The exit code; negative: the signal that killed it."""
        return os.waitstatus_to_exitcode(int(self.process.stdout.readline()))

    def run(self, name: str, **job) -> int:
        self.start(name, **job)
        return self.end()

    def step(self, name: str) -> int:
        """The last step in the log of a run."""
        steps = [r["step"] for r in RunLog(self.root / name).records("batch")]
        return steps[-1] if steps else 0


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    data, _ = make_file(root / "data", n_subjects=3, n=36, points=(12, 30))
    made = Children(data, root)
    assert made.run("whole") == 0
    assert made.step("whole") == BATCHES
    yield made
    made.process.stdin.close()
    made.process.wait(20)


def differences(children, name):
    a, b = (TrainerState.load(children.root / n) for n in (name, "whole"))
    logs = [log_without_time(RunLog(children.root / n)) for n in (name, "whole")]
    best = [(children.root / n / "best_model/model.safetensors").read_bytes() for n in (name, "whole")]
    return same_states(a, b) + ["log"] * (logs[0] != logs[1]) + ["best model"] * (best[0] != best[1])


def finish(children, name, **job):
    assert children.run(name, **job) == 0
    assert differences(children, name) == []


def kill_at_random(children, name, rng, **job):
    """Start a training, kill it a while after a batch drawn at random. Returns the step it had come to."""
    pid = children.start(name, **job)
    until = children.step(name)
    until += rng.randint(1, max(1, (BATCHES - until) // 2))
    while children.step(name) < until and Path(f"/proc/{pid}").exists():
        time.sleep(0.001)
    time.sleep(rng.random() * 0.03)
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    children.end()
    return children.step(name)


@pytest.mark.parametrize("point, count", [("write", 3), ("rename", 6)])
def test_killed_inside_a_save(children, point, count):
    name = f"{point}-{count}"
    assert children.run(name, point=point, count=count) == -signal.SIGKILL
    assert children.step(name) < BATCHES
    finish(children, name)


def test_killed_in_its_first_moments(children):
    assert children.run("first", point="serialise", count=1) == -signal.SIGKILL
    assert children.run("first", signal=signal.SIGKILL, step=1) == -signal.SIGKILL
    finish(children, "first")


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_random(children, workers):
    rng, name, options = random.Random(workers), f"random-{workers}", {"num_workers": workers}
    where = [kill_at_random(children, name, rng, options=options) for _ in range(2)]
    print("killed after steps", where)
    finish(children, name, options=options)


def test_interrupted_with_a_signal(children):
    assert children.run("interrupt", signal=signal.SIGINT, step=4) == 0
    assert children.step("interrupt") == 4
    finish(children, "interrupt", how="background")


FIELDS = ["policies", "loss_sum", "loss_points", "curve", "seed", "epochs", "best", "epoch", "batch", "global_step", "fingerprints"]


@pytest.mark.parametrize("what", ["dropout", "optimizer", *(pytest.param(f, marks=pytest.mark.full) for f in FIELDS)])
def test_this_test_notices_what_is_forgotten(children, what):
    """Something that belongs to the state is lost on the way: the comparison must turn red."""
    name = f"forgets-{what}"
    assert children.run(name, signal=signal.SIGKILL, step=9) == -signal.SIGKILL
    assert children.run(name, forget=what) != 0 or differences(children, name) != []


@pytest.mark.full
@pytest.mark.parametrize("workers, kills", [(0, 30), (2, 6)])
def test_killed_many_times(children, workers, kills):
    """At random moments, and every third time inside a save; then from there, run after run."""
    rng, options, hit = random.Random(7 + workers), {"num_workers": workers}, []
    for i in range(kills):
        name = f"many-{workers}-{i // 5}"
        if i % 3 == 0:
            point, count = POINTS[(i // 3) % len(POINTS)], 1 + rng.randrange(12)
            ended = children.run(name, point=point, count=count, options=options)
            assert ended in (0, -signal.SIGKILL)
            hit.append((point, children.step(name)) if ended else ("not reached", BATCHES))
        else:
            hit.append(("random", kill_at_random(children, name, rng, options=options)))
        if i % 5 == 4 or i == kills - 1:
            finish(children, name, options=options)
    print("killed at", hit)
    assert len(set(hit)) > kills // 2

