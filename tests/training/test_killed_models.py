"""Every body and every direction getter, killed in a thread, in a process and as two ranks: resumed, the same bits.

All pairs of body and way, and of getter and way. All combinations of body and getter are stopped and resumed in
tests/models."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_data import make_file
from helpers_training import log_without_time, same_states
from helpers_waiting import until
from models_child import BODIES, GETTERS, make_trainer

from tractkit.runs.log import RunLog
from tractkit.training.state import TrainerState

pytestmark = pytest.mark.full
CHILD = Path(__file__).parent.with_name("models_child.py")
WAYS = ("thread", "process", "ranks")
CASES = [(list(BODIES)[(i + w) % len(BODIES)], getter, way) for w, way in enumerate(WAYS) for i, getter in
         enumerate(GETTERS)]


def test_all_pairs_are_there():
    assert {(body, way) for body, _, way in CASES} == {(body, way) for body in BODIES for way in WAYS}
    assert {(getter, way) for _, getter, way in CASES} == {(getter, way) for getter in GETTERS for way in WAYS}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_file(folder, points=(4, 40))
    return folder


class Children:
    """Starts trainings in processes of their own, one after the other; names each, and how it ended."""

    def __init__(self):
        path = os.pathsep.join(filter(None, sys.path))
        self.process = subprocess.Popen(
            [sys.executable, str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path})

    def start(self, **job) -> int:
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def ended(self) -> int:
        return os.waitstatus_to_exitcode(int(self.process.stdout.readline()))


@pytest.fixture(scope="module")
def children():
    two = [Children(), Children()]
    yield two
    for each in two:
        each.process.stdin.close()
        each.process.wait(20)


def reached(folder: Path, step: int = 5) -> None:
    """Wait for a step in the log of a run that still has some to do."""
    until(lambda: len(RunLog(folder).records("batch")) >= step, 60)


def in_thread(children, root, body, getter) -> None:
    pid = children[0].start(root=str(root), name="run", body=body, getter=getter)
    reached(root / "run")
    os.kill(pid, signal.SIGKILL)
    assert children[0].ended() == -signal.SIGKILL


def in_process(children, root, body, getter) -> None:
    trainer = make_trainer(root, "run", body, getter)
    trainer.start(process=True)
    reached(root / "run")
    os.kill(trainer.runner.process._process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="killed"):
        trainer.wait()


def two_ranks(children, root, name, body, getter) -> list[int]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    return [child.start(root=str(root), name=name, body=body, getter=getter, rank=dict(
        RANK=str(r), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)) for r, child in enumerate(children)]


def as_ranks(children, root, body, getter) -> None:
    """One undisturbed; and one that is killed whole, as a job of a cluster is."""
    two_ranks(children, root, "whole", body, getter)
    assert [child.ended() for child in children] == [0, 0]
    pids = two_ranks(children, root, "run", body, getter)
    reached(root / "run")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert [child.ended() for child in children] == [-signal.SIGKILL] * 2


@pytest.mark.parametrize("body, getter, way", CASES)
def test_killed_and_resumed_it_ends_in_the_same_bits(body, getter, way, root, tmp_path, children):
    (tmp_path / "data.hdf5").symlink_to(root / "data.hdf5")
    if way != "ranks":
        make_trainer(tmp_path, "whole", body, getter).train_and_validate()
    {"thread": in_thread, "process": in_process, "ranks": as_ranks}[way](children, tmp_path, body, getter)
    assert 0 < TrainerState.load(tmp_path / "run").global_step < 12
    if way == "ranks":
        two_ranks(children, tmp_path, "run", body, getter)
        assert [child.ended() for child in children] == [0, 0]
    else:
        make_trainer(tmp_path, "run", body, getter).train_and_validate()
    a, b = (TrainerState.load(tmp_path / name) for name in ("run", "whole"))
    assert a.global_step == 12 and same_states(a, b) == []
    a, b = (log_without_time(RunLog(tmp_path / name)) for name in ("run", "whole"))
    assert a == b
