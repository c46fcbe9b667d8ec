"""A batch that does not come: the training says so, can be paused, saved, changed and stopped, and goes on unharmed."""

import os
import resource
import signal
import threading
import time

import pytest
import torch
from helpers_training import Points, fit
from helpers_waiting import until

from tractkit.data import prefetch
from tractkit.training import bookkeeping


class Stuck(Points):
    """Loads as Points does, but call `at` for `training`, counted from 0, hangs until it is let go."""

    def __init__(self, at=3, training=True):
        super().__init__()
        self.at, self.training, self.calls, self.loose = at, training, 0, threading.Event()

    def load_batch_streamlines(self, ids, *, epoch, training):
        if training == self.training:
            self.calls += 1
            if self.calls == self.at + 1:
                self.loose.wait(300)
        return super().load_batch_streamlines(ids, epoch=epoch, training=training)


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
    monkeypatch.setattr(prefetch, "_LAST_BATCH", 0.1)
    monkeypatch.setattr(prefetch, "_LOOK_AFTER", 0.05)
    monkeypatch.setattr(bookkeeping, "_LONG_WAIT", 0.2)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def trained(folder, **options):
    trainer = fit(folder, "whole", **options)
    trainer.train_and_validate()
    return weights(trainer)


def waiting(trainer, batch):
    until(lambda: f"waiting for batch {batch} for " in str(trainer.status))


@pytest.mark.parametrize("size", [1, 2])
def test_it_is_paused_saved_and_goes_on_in_the_same_bits(tmp_path, size):
    points = Stuck(at=4)
    trainer = fit(tmp_path, "stuck", points=points, accumulate=size)
    trainer.start()
    waiting(trainer, 5)
    trainer.pause(wait=True)
    assert trainer.status.phase == "paused" and trainer.state.batch == 4
    assert trainer.save_checkpoint().is_file()
    trainer.resume()
    points.loose.set()
    trainer.wait(60)
    assert trainer.status.phase == "finished" and trainer.status.wait == 0
    assert torch.equal(weights(trainer), trained(tmp_path, accumulate=size))


@pytest.mark.parametrize("stuck, size, batch", [
    (dict(at=4), 1, 5), (dict(at=3), 2, 4), (dict(at=0), 1, 1), (dict(at=1, training=False), 1, 2)])
def test_it_is_stopped_and_resumed_in_the_same_bits(tmp_path, stuck, size, batch):
    points = Stuck(**stuck)
    trainer = fit(tmp_path, "stuck", points=points, accumulate=size)
    trainer.start()
    waiting(trainer, batch)
    trainer.stop()
    trainer.wait(60)
    assert trainer.status.phase == "stopped"
    points.loose.set()
    trainer.train_and_validate()
    assert trainer.status.phase == "finished"
    assert torch.equal(weights(trainer), trained(tmp_path, accumulate=size))


def test_one_interrupt_is_enough_in_the_foreground(tmp_path):
    points = Stuck(at=4)
    trainer = fit(tmp_path, "stuck", points=points)

    def interrupt():
        waiting(trainer, 5)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    trainer.train_and_validate()
    thread.join()
    assert trainer.status.phase == "stopped" and "Interrupted in epoch 1 after batch 4" in trainer.status.message
    points.loose.set()
    trainer.train_and_validate()
    assert torch.equal(weights(trainer), trained(tmp_path))


def test_a_changed_loader_loads_the_batch_again(tmp_path):
    class Changing(Stuck):
        shift = 0.0

        def settings(self):
            return {"shift": self.shift}

        def change(self, shift):
            self.shift = shift

    points = Changing(at=2)
    trainer = fit(tmp_path, "stuck", points=points)
    trainer.start()
    waiting(trainer, 3)
    trainer.session.loading.mark_stale()  # as a change of the loader's settings does
    until(lambda: trainer.state.batch > 2 or not trainer.running)
    trainer.wait(60)
    points.loose.set()
    assert trainer.status.phase == "finished" and torch.equal(weights(trainer), trained(tmp_path))


# -- in worker processes


class InWorker(Points):
    """Does something in the worker process that loads the third batch of the training, once."""

    def __init__(self, folder):
        super().__init__()
        self.mark, self.parent, self.calls = folder / "done", os.getpid(), 0

    def load_batch_streamlines(self, ids, *, epoch, training):
        batch = super().load_batch_streamlines(ids, epoch=epoch, training=training)
        self.calls += training
        if os.getpid() == self.parent or self.calls != 3 or self.mark.exists():
            return batch
        self.mark.touch()
        return self.fail(batch)


class Hangs(InWorker):
    def fail(self, batch):
        time.sleep(600)


class IsKilled(InWorker):
    def fail(self, batch):
        os.kill(os.getpid(), signal.SIGKILL)


class Exits(InWorker):
    def fail(self, batch):
        os._exit(3)


class HasNoSharedMemory(InWorker):
    def fail(self, batch):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return batch


class CannotBePickled(InWorker):
    def fail(self, batch):
        return batch, lambda: None


def test_a_worker_that_hangs_is_ended_by_stop(tmp_path):
    trainer = fit(tmp_path, "stuck", points=Hangs(tmp_path), num_workers=1)
    trainer.start()
    waiting(trainer, 3)
    trainer.stop()
    trainer.wait(60)
    assert trainer.status.phase == "stopped"
    trainer.train_and_validate()
    assert torch.equal(weights(trainer), trained(tmp_path))


@pytest.mark.parametrize("kind, words", [
    (IsKilled, r"a worker process that loads batches was killed \(signal 9\), .* num_workers=0"),
    (Exits, "ended by itself with exit code 3"),
    (HasNoSharedMemory, "could not put a batch into shared memory .* num_workers=0"),
    (CannotBePickled, "could not send a batch .* num_workers=0"),
])
def test_a_worker_that_cannot_go_on_is_one_error_and_nothing_is_lost(tmp_path, kind, words):
    trainer = fit(tmp_path, "stuck", points=kind(tmp_path), num_workers=1)
    with pytest.raises(RuntimeError, match=words) as e:
        trainer.train_and_validate()
    assert "Traceback" not in str(e.value)
    assert trainer.status.phase == "failed" and trainer.state.batch <= 2  # with a worker go the batches it had made
    trainer.train_and_validate()
    assert torch.equal(weights(trainer), trained(tmp_path))


def test_what_asks_for_the_state_within_a_step_is_answered(tmp_path):
    points = Stuck(at=3)
    trainer = fit(tmp_path, "stuck", points=points, accumulate=2)
    trainer.start()
    waiting(trainer, 4)
    for ask in (trainer.save_checkpoint, lambda: trainer.change(max_epochs=4), trainer.state.snapshot):
        with pytest.raises(RuntimeError, match="waiting for batch 4 .* in the middle of a step"):
            ask()
    points.loose.set()
    trainer.wait(60)
    assert torch.equal(weights(trainer), trained(tmp_path, accumulate=2))
