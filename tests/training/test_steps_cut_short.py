"""A step that fails anywhere, and the same trainer run again: it ends in the bits of a run that did not fail.

Where a step can fail is not chosen: a trace lists every call that one step makes, and an error is raised at each."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers_training import Fit, fit, leaves, log_without_time, same_states, toy_model
from torch import nn

import tractkit
from tractkit.runs.checkpoint import load_checkpoint
from tractkit.runs.log import RunLog
from tractkit.training.policy import EarlyStopping, Policy

OURS = str(Path(tractkit.__file__).parent), str(Path(torch.optim.__file__).parent)


class Boom(RuntimeError):
    pass


class Count(Policy):
    """Counts what it is called with."""

    remembers = ("started", "ready", "done", "epochs")

    def __init__(self):
        self.started = self.ready = self.done = self.epochs = 0

    def train_step_started(self, epoch, iteration):
        self.started += 1

    def gradient_ready(self, epoch, iteration, norm):
        self.ready += 1

    def train_step_finished(self, epoch, iteration, loss):
        self.done += 1

    def epoch_finished(self, epoch, *, train_losses, metrics):
        self.epochs += 1


def net():
    model = nn.Sequential(toy_model()[0], nn.BatchNorm1d(16), *toy_model()[1:])
    return model


def counted(folder, name="run", kind=Fit, **options):
    options = dict(policies=[Count(), Count()], clip_grad=.5, checkpoint_every_batches=4, max_epochs=2, model=net(),
                   checkpoint_every_seconds=None, tensorboard=False) | options
    return fit(folder, name, kind, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that does not fail, with all its checkpoints."""
    trainer = counted(tmp_path_factory.mktemp("whole"), checkpoint_every_batches=1, keep_checkpoints=100)
    trainer.train_and_validate()
    trainer.trees = {step: load_checkpoint(trainer.checkpoints.path(step)) for step in trainer.checkpoints.steps()}
    return trainer


class Trace:
    """Lists the calls from the beginning of one step to that of the next, and raises an error at one of them."""

    def __init__(self, step: int, at: int = -1, error: type[BaseException] = Boom):
        self.step, self.at, self.error = step, at, error
        self.calls: list[str] = []
        self.begun = 0

    def __call__(self, frame, event, argument):
        if event not in ("call", "c_call") or not frame.f_code.co_filename.startswith(OURS):
            return
        code = frame.f_code
        if event == "call" and code.co_name == "begin_step" and code.co_filename.endswith("bookkeeping.py"):
            self.begun += 1
        if self.begun < self.step or self.begun > self.step + 1:
            return
        if self.begun > self.step and code.co_name != "begin_step":
            sys.setprofile(None)
            return
        name = code.co_name if event == "call" else f"{code.co_name} -> {argument.__name__}"
        name = f"{Path(code.co_filename).stem}: {name}"
        if name.startswith("checkpoint: ") and self.calls.count(name) > 2:
            return  # the walk over the tree of a checkpoint: thousands of equal calls
        if name == "epoch_plan: _as_text -> asarray":
            return  # an error there is one of the user's own object, whose kind is noted in place of its content
        self.calls.append(name)
        if len(self.calls) - 1 == self.at:
            raise self.error(f"at call {self.at}")

    def run(self, trainer) -> None:
        try:
            sys.setprofile(self)
            trainer.train_and_validate()
        finally:
            sys.setprofile(None)


MIDDLE, LAST = 4, 6  # steps: within an epoch; the last one of it, with what ends the epoch


def broken_and_run_again(folder, whole, trace) -> str:
    """What is wrong with a run that failed at one call and was run again with the same trainer; empty if nothing."""
    trainer = counted(folder)
    try:
        trace.run(trainer)
        failed = False
    except (Boom, KeyboardInterrupt, RuntimeError):
        failed = True
    wrong = []
    if failed and trainer.status.phase != "failed":
        wrong.append(f"phase {trainer.status.phase}")
    newest = trainer.checkpoints.newest()[0]
    same = whole.trees[newest["global_step"]]  # the last step of an epoch has two: before and after the validation
    if failed and newest["batch"] == same["batch"] and differing(newest, same):
        wrong.append("checkpoint")
    trainer.train_and_validate()
    if different := same_states(trainer.state, whole.state):
        wrong.append(f"state: {', '.join(different[:3])}")
    if log_without_time(trainer.log) != log_without_time(whole.log):
        wrong.append("log")
    return "; ".join(wrong)


def differing(a, b) -> list[str]:
    """The paths at which two trees of states differ, the clock and the end of the run left out."""
    own = ("/time", "/run_id", "/parent", "/log_path", "/finished", "/fingerprints")
    left, right = (dict(leaves(tree)) for tree in (a, b))
    def same(x, y):
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y or (x != x and y != y)
    return [k for k in left.keys() | right.keys()
            if not k.startswith(own) and not (k in left and k in right and same(left[k], right[k]))]


def table_of(tmp_path, whole, step, error, places) -> dict[str, str]:
    """Each call at which something was wrong, and what."""
    wrong = {}
    for i in places:
        trace = Trace(step, i, error)
        if found := broken_and_run_again(tmp_path / f"{error.__name__}-{step}-{i}", whole, trace):
            wrong[f"{i} {trace.calls[-1]}"] = found
    return wrong


PLACES = [(MIDDLE, Boom), (MIDDLE, KeyboardInterrupt), (LAST, Boom), (LAST, KeyboardInterrupt)]


@pytest.mark.parametrize("step,error", PLACES)
def test_a_step_that_fails_at_some_calls(tmp_path, whole, step, error):
    """Every k-th of its calls; another first one in each case."""
    trace = Trace(step)
    trace.run(counted(tmp_path / "listed"))
    n, first = len(trace.calls), 5 * PLACES.index((step, error))
    assert n > 300
    assert table_of(tmp_path, whole, step, error, range(first, n, n // 5)) == {}


@pytest.mark.full
@pytest.mark.parametrize("step,error", PLACES)
def test_a_step_that_fails_at_every_call(tmp_path, whole, step, error):
    """Every sixteenth call, another first one in each case; with TRACTKIT_EVERY_CALL=1 each of them (ten minutes)."""
    trace = Trace(step)
    trace.run(counted(tmp_path / "listed"))
    every = 1 if os.environ.get("TRACTKIT_EVERY_CALL") else 16
    places = range(2 * PLACES.index((step, error)) % every, len(trace.calls), every)
    wrong = table_of(tmp_path, whole, step, error, places)
    print(f"step {step}, {error.__name__}: {len(trace.calls)} calls, {len(set(trace.calls))} different ones, "
          f"{len(places)} tried, wrong at {len(wrong)}")
    assert wrong == {}


# -- by Ctrl-C

def two_interrupts(trainer, first: float, gap: float) -> bool:
    """Run a trainer and press Ctrl-C twice, after so many seconds each. Return whether it was interrupted."""
    times = [gap]

    def press(*_):
        if times:
            signal.setitimer(signal.ITIMER_REAL, max(times.pop(), 1e-6))
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGALRM, press), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, first)
        trainer.train_and_validate()
        return False
    except KeyboardInterrupt:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before[0]), signal.signal(signal.SIGINT, before[1])


@pytest.mark.parametrize("n", [3, pytest.param(20, marks=pytest.mark.full)])
def test_two_interrupts_at_random(tmp_path, whole, n):
    """The moments are drawn from a seed, but the machine decides what runs then: each of them has to hold."""
    draw, hit = random.Random(n), 0
    began = time.perf_counter()
    counted(tmp_path / "timed").train_and_validate()
    long = time.perf_counter() - began
    for i in range(200):
        if hit == n:
            break
        trainer = counted(tmp_path / str(i))
        if not two_interrupts(trainer, draw.uniform(0, long), draw.choice([0, draw.uniform(0, .004)])):
            continue
        hit += 1
        assert trainer.status.phase not in ("training", "validating", "starting")
        trainer.train_and_validate()
        assert same_states(trainer.state, whole.state) == []
        assert log_without_time(trainer.log) == log_without_time(whole.log)
    assert hit == n


# -- what is asked of a state that is half done

class OptimizerFails(Fit):
    """Half of the weights are changed, then the optimizer fails, once."""

    fails_at = 9

    def compute_batch_loss(self, batch):
        if self.model.training and self.state.global_step == self.fails_at:
            self.fails_at = -1
            optimizer, step = self.state.optimizer, self.state.optimizer.step

            def fail():
                with torch.no_grad():
                    next(iter(self.model.parameters())).add_(1)
                optimizer.step = step
                raise RuntimeError("the driver is gone")

            optimizer.step = fail
        return super().compute_batch_loss(batch)


def failed_in_the_optimizer(folder):
    trainer = counted(folder, kind=OptimizerFails)
    with pytest.raises(RuntimeError, match="driver is gone"):
        trainer.train_and_validate()
    assert trainer.checkpoints.steps()[-1] == 6 and trainer.status.phase == "failed"
    return trainer


def test_a_half_done_state_is_not_kept(tmp_path, whole):
    trainer = failed_in_the_optimizer(tmp_path)
    state = trainer.state
    for keep in (state.snapshot, state.fork, trainer.fork, trainer.save_checkpoint,
                 lambda: state.save(tmp_path / "x.ckpt")):
        with pytest.raises(
            RuntimeError, match=r"half done and cannot be kept: train_and_validate\(\), start\(\) or take"
        ):
            keep()
    assert trainer.checkpoints.steps()[-1] == 6 and not (tmp_path / "x.ckpt").exists()
    assert trainer.take() is state and state.global_step == 6
    assert "going back from step 9 to the last checkpoint, of step 6" in " ".join(trainer.messages)
    assert state.snapshot().global_step == 6
    trainer.train_and_validate()
    assert same_states(trainer.state, whole.state) == []


@pytest.mark.parametrize("way", ["start", "another trainer", "rewind", "process"])
def test_however_it_is_trained_next(tmp_path, whole, way):
    trainer = failed_in_the_optimizer(tmp_path)
    if way == "start":
        trainer.start()
        trainer.wait()
    elif way == "process":
        left = []

        def launch(trainer, paused, leave):
            leave()
            left.extend(trainer.checkpoints.steps())
            raise OSError("no process here")

        with pytest.raises(OSError, match="no process"):
            trainer.start(process=launch)
        assert left == [4, 6] and trainer.state.global_step == 6
        trainer.train_and_validate()
    elif way == "rewind":
        trainer.rewind(1)
        trainer.train_and_validate()
    else:
        given, trainer = trainer.state, counted(tmp_path, "another")
        trainer.train_and_validate(given)
        assert trainer.state is given
    assert same_states(trainer.state, whole.state) == []


class Fails(Policy):
    """Fails, once, in one method."""

    remembers = ()

    def __init__(self, method, error):
        self.failed = False

        def fail(*args, **kwargs):
            if not self.failed and (method != "train_step_finished" or args[1] == 3):
                self.failed = True
                raise error

        setattr(self, method, fail)


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), ValueError("no")], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("method", ["training_started", "epoch_started", "train_step_started", "gradient_ready",
                                    "train_step_finished", "validation_started", "epoch_finished", "checkpoint_saved",
                                    "training_ended"])
def test_an_error_in_a_policy(tmp_path, whole, method, error):
    """The phase is "failed", and the same trainer ends in the same bits."""
    trainer = counted(tmp_path, policies=[Count(), Count(), Fails(method, error)])
    with pytest.raises(type(error)):
        trainer.train_and_validate()
    assert trainer.status.phase == "failed" and type(error).__name__ in trainer.status.message
    trainer.train_and_validate()
    assert same_states(trainer.state, whole.state) == ["/fingerprints/config/policies/3"]
    assert trainer.status.phase == "finished"


@pytest.mark.parametrize("method", ["epoch_started", "train_step_started", "gradient_ready", "train_step_finished",
                                    "validation_started", "epoch_finished"])
def test_a_policy_that_ends_it_leaves_a_whole_state(tmp_path, whole, method):
    """Gone on with without that policy: the same bits."""
    trainer = counted(tmp_path, policies=[Fails(method, EarlyStopping("enough")), Count(), Count()])
    trainer.train_and_validate()
    assert trainer.status.phase == "finished" and trainer.state.finished["message"] == "enough"
    counts = Policy(), Count(), Count()
    again, unbroken = counted(tmp_path, policies=counts), counted(tmp_path, "unbroken", policies=counts)
    again.train_and_validate(), unbroken.train_and_validate()
    assert same_states(again.state, unbroken.state) == []


def test_a_full_disk_while_the_log_is_written(tmp_path, whole, monkeypatch):
    append, left = RunLog.append, [9]

    def full(self, kind, **values):
        left[0] -= kind == "batch"
        if left == [0]:
            left[0] = -99
            append(self, kind, **values)
            with open(self.path, "rb+") as f:
                f.truncate(self.path.stat().st_size - 9)
            raise OSError(28, "No space left on device")
        append(self, kind, **values)

    monkeypatch.setattr(RunLog, "append", full)
    trainer = counted(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        trainer.train_and_validate()
    trainer.train_and_validate()
    assert same_states(trainer.state, whole.state) == [] and log_without_time(trainer.log) == log_without_time(
        whole.log
    )


def test_nothing_to_go_back_to_is_an_error(tmp_path):
    trainer = failed_in_the_optimizer(tmp_path)
    for file in trainer.checkpoints.folder.iterdir():
        file.unlink()
    with pytest.raises(RuntimeError, match="no checkpoint of the run to go back to"):
        trainer.train_and_validate()
    assert trainer.status.phase == "failed"


class Growing(nn.Module):
    """Keeps what it has seen in a buffer that grows, or in one more buffer in each step."""

    def __init__(self, new):
        super().__init__()
        self.net, self.new = nn.Linear(1, 1), new
        self.register_buffer("seen", torch.zeros(1, 1))

    def forward(self, x):
        if self.new:
            self.register_buffer(f"seen_{len(self._buffers)}", x.detach()[:1])
        else:
            self.seen = torch.cat([self.seen, x.detach()[:1]])
        return self.net(x)


@pytest.mark.parametrize("new", [False, True])
def test_a_buffer_that_grew_hides_no_error(tmp_path, new):
    class Fails(Fit):
        def compute_batch_loss(self, batch):
            super().compute_batch_loss(batch)
            raise KeyError("the user's own")
    trainer = fit(tmp_path, kind=Fails, model=Growing(new))
    with pytest.raises(KeyError, match="the user's own") as failed:
        trainer.train_and_validate()
    if new:
        assert any("goes back to the last checkpoint" in note for note in failed.value.__notes__)
    else:  # it is put back
        assert trainer.model.seen.shape == (1, 1) and not trainer.model.seen.any()


def test_an_interrupt_that_leaves_the_block_open_does_not_keep_a_trainer_busy(tmp_path):
    trainer = counted(tmp_path / "left")
    kept = []  # as a notebook keeps the last traceback, with all that its frames hold

    def leave():
        context = trainer.runner.here()
        kept.append(context)
        context.__enter__()  # and no __exit__: an interrupt at its first line
        with pytest.raises(RuntimeError, match="running already"):
            trainer.train_and_validate()  # from within it is refused

    leave()
    trainer.train_and_validate()
    assert trainer.status.phase == "finished" and not trainer.running
    kept.clear()  # the block that was left ends now
    trainer.train_and_validate()
    assert not trainer.running
