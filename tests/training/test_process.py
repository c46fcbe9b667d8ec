"""A training in a process of its own: the same bits, controlled the same way, outliving the kernel, alone in its
folder."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_training import Fit, FitBreaks, SlowPoints, fit, log_without_time, same_states
from helpers_waiting import until

from tractkit.lab.folder_run import FolderRun
from tractkit.runs.listing import read_facts
from tractkit.runs.mailbox import Mailbox
from tractkit.runs.status import Status
from tractkit.training.control import Gate
from tractkit.training.policy import Policy
from tractkit.training.process import ProcessRun, attach


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = fit(tmp_path_factory.mktemp("whole"), policies=[], max_epochs=4)
    trainer.train_and_validate()
    return trainer


def assert_equal_runs(a, b):
    assert same_states(a.state, b.state) == []
    assert log_without_time(a.log) == log_without_time(b.log)


def slow(folder, name="run", **options):
    return fit(folder, name, points=SlowPoints(), **{"max_epochs": 4, "prefetch": 0, **options})


def test_in_a_process_all_the_same(whole, tmp_path):
    """Started paused, stepped, watched, copied, paused, resumed, waited for; others are kept out meanwhile."""
    trainer, events = slow(tmp_path), []
    trainer.listeners.append(lambda event, t: events.append((event, t.status.phase)))
    trainer.step(2)                     # some steps here, in a thread
    trainer.stop(wait=True)
    trainer.start(paused=True, process=True)
    with pytest.raises(RuntimeError, match="running already"):
        trainer.start()
    with pytest.raises(RuntimeError, match="being trained already"):
        slow(tmp_path, "other").train_and_validate(trainer.state)
    trainer.step(3)
    assert trainer.runner.process.status.global_step == 5 and trainer.runner.process.status.phase == "paused"
    copy = trainer.state.snapshot()     # brought up to where the process stands
    alone = slow(tmp_path, "alone")
    alone.step(5)
    assert copy.global_step == 5 and same_states(copy, alone.state) == []
    alone.stop(wait=True)
    with pytest.raises(RuntimeError, match="another trainer is at work"):
        slow(tmp_path).train_and_validate()
    with pytest.raises(RuntimeError, match="another trainer is at work|a training process is at work"):
        slow(tmp_path).start(process=True)
    assert len(trainer.curves()["training"][0]) == 5
    trainer.resume()
    until(lambda: trainer.status.global_step >= 8)
    trainer.pause(wait=True)
    at = trainer.runner.process.status.global_step
    time.sleep(0.3)
    assert trainer.runner.process.status.global_step == at < 24
    trainer.resume()
    assert trainer.wait() is trainer.state and trainer.status.phase == "finished" and not trainer.running
    assert_equal_runs(trainer, whole)
    assert events[-1] == ("ended", "finished") and ("batch", "training") in events and ("batch", "paused") in events
    x, y = trainer.curves()["validation"]
    assert len(x) == 4 and np.isfinite(y).all()
    trainer.replace_settings(max_epochs=5)              # and on, here
    assert trainer.train_and_validate().epoch == 5


KERNEL = """
import sys, time
from pathlib import Path
from helpers_training import SlowPoints, fit
from helpers_waiting import until
trainer = fit(Path(sys.argv[1]), "run", points=SlowPoints(), max_epochs=4, prefetch=0)
trainer.start(process=sys.argv[2] == "True")
while trainer.status.global_step < 2:
    time.sleep(.01)
print("started", flush=True)
time.sleep(600)
"""


def kernel(folder, process=True):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-c", KERNEL, str(folder), str(process)],
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )


def test_it_outlives_its_kernel_and_another_takes_over(whole, tmp_path):
    old = kernel(tmp_path)
    assert old.stdout.readline() == "started\n"
    os.killpg(old.pid, signal.SIGKILL)  # what a restart of a kernel does
    old.wait()
    run = attach(tmp_path / "run")
    assert isinstance(run, ProcessRun) and run.running
    at = run.status.global_step
    until(lambda: run.status.global_step > at)
    run.pause(wait=True)
    assert run.status.phase == "paused" and len(run.curves()["training"][0]) == run.status.global_step
    with pytest.raises(TimeoutError):
        run.wait(0.05)
    trainer = slow(tmp_path)
    trainer.attach()                    # a trainer as it was built before
    until(lambda: trainer.status.phase == "paused")
    trainer.step(1)
    assert trainer.save_checkpoint().exists() and trainer.state.snapshot().global_step == run.status.global_step
    trainer.stop(wait=True)
    assert trainer.status.phase == "stopped" and not run.running and trainer.state.global_step < 24
    with pytest.raises(RuntimeError, match="no training process is at work .*stopped"):
        attach(tmp_path / "run")
    with pytest.raises(RuntimeError, match=r"start\(process=True\)"):
        run.start()
    trainer.train_and_validate()        # the rest here
    assert_equal_runs(trainer, whole)


@pytest.mark.full
def test_a_thread_of_another_kernel_is_told_what_to_do_and_found_dead(whole, tmp_path):
    """By the folder: as a process of its own, as long as its kernel lives."""
    other = kernel(tmp_path, process=False)
    assert other.stdout.readline() == "started\n"
    run = attach(tmp_path / "run")
    run.pause(wait=True)
    at = run.status.global_step
    assert (run.status.phase, read_facts(tmp_path / "run").status) == ("paused", "paused")
    run.step(2)
    run.save_checkpoint()
    assert run.status.global_step == at + 2
    branch = slow(tmp_path, run.fork("branch").name)
    os.killpg(other.pid, signal.SIGKILL)
    other.wait()
    assert (
        not run.running
        and read_facts(tmp_path / "run").status == "dead"
        and FolderRun(tmp_path / "run").status.phase == "dead"
    )
    again = slow(tmp_path)
    for trainer in (again, branch):
        trainer.train_and_validate()
        assert trainer.log.records("batch")[-1]["step"] == 24
        assert same_states(trainer.state, whole.state) == []
    assert read_facts(tmp_path / "run").status == "finished"


def test_killed_it_says_so_and_goes_on_in_another_process(whole, tmp_path):
    trainer = slow(tmp_path, checkpoint_every_batches=2)
    trainer.start(process=True)
    until(lambda: trainer.status.global_step >= 5)
    os.kill(trainer.runner.process._process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="without a word .exit code -9"):
        trainer.wait()
    assert trainer.status.phase == "failed"
    again = slow(tmp_path)
    again.start(process=True)
    until(lambda: again.status.global_step >= 9)
    os.kill(again.runner.process._process.pid, signal.SIGTERM)  # in good order
    assert again.wait().global_step < 24 and "Terminated" in again.status.message
    again.train_and_validate()
    assert_equal_runs(again, whole)


def test_its_error_comes_to_who_waits(tmp_path):
    trainer, threads = fit(tmp_path, kind=FitBreaks, num_threads=None), torch.get_num_threads()
    torch.set_num_threads(3)            # what is set here holds there
    try:
        trainer.start(process=True)
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(RuntimeError, match="OSError: the disk is gone[^$]*compute_batch_loss"):
        trainer.wait()
    assert trainer.status.phase == "failed" and trainer.state.global_step == 7
    assert trainer.state.fingerprints["environment"]["threads"] == 3
    assert fit(tmp_path, num_threads=3).train_and_validate().global_step == 18


def test_what_cannot_be_imported_is_named_and_nothing_is_started(tmp_path, monkeypatch):
    class Local(Fit):
        pass

    cell = type("FitOfACell", (Fit,), {"__module__": "__main__"})
    for name, options, text in (
        ("a", dict(kind=Local), "Local.*inside a function"),
        ("b", dict(kind=cell), "FitOfACell is defined in this notebook.*writefile"),
        ("c", dict(optimizer=lambda p: torch.optim.SGD(p, lr=1)), "lambda.*inside a function"),
        ("d", dict(policies=[Unsendable()]), "cannot be sent"),
    ):
        trainer = fit(tmp_path, name, **options)
        with pytest.raises(ValueError, match=text):
            trainer.start(process=True)
        assert not trainer.running and not (trainer.folder / "checkpoints").exists()
        assert not list(trainer.folder.glob("process/*.json"))


class Unsendable(Policy):
    """Holds a lock."""

    def __init__(self):
        self.lock = threading.Lock()


def test_a_trainer_crosses_without_state_or_listeners(tmp_path):
    trainer = fit(tmp_path, learning_rate="0.1 0.01", patience=3)
    trainer.step(2)
    trainer.stop(wait=True)
    trainer.listeners.append(print)
    other = pickle.load(io.BytesIO(pickle.dumps(trainer)))
    assert other.state is None and other.listeners == [] and other.status == Status(max_epochs=3)
    assert other.settings == trainer.settings and other.policies[0] is other.learning_rate
    other.train_and_validate()
    assert other.state.global_step == 18


def test_status_files_are_whole_and_hold_what_was_said(tmp_path):
    mailbox = Mailbox(tmp_path)
    mailbox.clear()
    said = [Status("training", batch=i, message="x" * 5000) for i in range(200)]
    done = threading.Event()

    def write():
        for s in said:
            mailbox.write_status(s, ended=False)
        done.set()

    threading.Thread(target=write).start()
    seen = []
    while not done.is_set():
        if heard := mailbox.read_status():
            assert str(heard["status"]) == str(said[heard["status"].batch])
            seen.append(heard["status"].batch)
    assert seen == sorted(seen)
    assert json.loads((tmp_path / "process/status.json").read_text())["status"]["train_loss"] is None
    assert sorted(p.name for p in Path(tmp_path / "process").iterdir()) == ["status.json"]


def test_commands_are_obeyed_in_order(tmp_path):
    mailbox = Mailbox(tmp_path)
    mailbox.clear()
    for i in range(30):
        mailbox.send_command("step", n=i)
    assert [c["n"] for _, c in mailbox.commands()] == list(range(30))
    assert not mailbox.is_running()


def test_one_process_lives_in_a_folder(tmp_path):
    mailbox = Mailbox(tmp_path)
    mailbox.clear()
    code = ("import sys; from tractkit.runs.mailbox import Mailbox\nwith Mailbox(sys.argv[1]).hold(): print('in', "
            "flush=True); sys.stdin.read()")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    one = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    assert one.stdout.readline() == "in\n" and mailbox.is_running()
    with pytest.raises(RuntimeError, match="another training process"):
        with mailbox.hold():
            pass
    one.kill()
    one.wait()
    assert not mailbox.is_running()


def test_a_gate_says_that_work_is_waiting():
    gate, given = Gate(), []
    with gate.own():
        assert not gate.waiting
        other = threading.Thread(target=lambda: given.append(gate.call(lambda: 7)))
        other.start()
        until(lambda: gate.waiting)
        gate.serve()
        other.join()
    assert given == [7] and not gate.waiting
