"""The trainer on a toy: what it counts, when it stops, what others may do meanwhile, and what it refuses."""

import io
import math
import multiprocessing
import os
import signal
import threading
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import torch
import yaml
from helpers_data import make_file
from helpers_training import Fit, Points, fit, log_without_time, same_states, streamline_trainer, toy_model
from torch import nn

from tractkit.models.base import load_model
from tractkit.training.policy import EarlyStopping, Exponential, Policy
from tractkit.training.state import TrainerState
from tractkit.training.trainer import TrainerOneInput


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run."""
    trainer = fit(tmp_path_factory.mktemp("whole"))
    trainer.train_and_validate()
    return trainer


def assert_equal_runs(a, b):
    assert same_states(a.state, b.state) == []
    assert log_without_time(a.log) == log_without_time(b.log)


# -- the loop

def test_it_does_what_a_plain_loop_does(whole):
    """Gradient of the mean, clipping off, validation weighted by points, against twenty lines of torch."""
    model, points = toy_model(0.0), Points()
    optimizer = torch.optim.Adam(model.parameters(), lr=.01, weight_decay=.01)
    for epoch in range(3):
        for ids in points.plan(epoch, "training"):
            x, y = points.load_batch_streamlines(ids, epoch=epoch, training=True)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    trainer = fit(whole.folder.parent, "plain", model=toy_model(0.0))
    for p in trainer.model.parameters():
        p.grad = torch.ones_like(p)  # left over from something else
    trainer.train_and_validate()
    for a, b in zip(trainer.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_validation_is_weighted_by_points(tmp_path):
    class Uneven(Points):
        def plan(self, epoch, subset):
            return super().plan(epoch, subset) if subset == "training" else [np.arange(2), np.arange(2, 40)]

    trainer = fit(tmp_path, points=Uneven(), max_epochs=1)
    state = trainer.train_and_validate()
    x, y = Points().load_batch_streamlines(np.arange(40), epoch=0, training=False)
    with torch.no_grad():
        expected = nn.functional.mse_loss(trainer.model.eval()(x), y).item()
    assert state.epochs[0]["valid_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_global_generator_is_left_alone(tmp_path):
    trainers = fit(tmp_path, max_epochs=1), fit(tmp_path, "workers", max_epochs=1, num_workers=1)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for trainer in trainers:
        trainer.train_and_validate()
    assert torch.equal(before, torch.get_rng_state())


def test_workers_and_turns_give_the_same(whole, tmp_path):
    for name, options in {
        "workers": dict(num_workers=2),
        "turns": dict(prefetch=0),
        "far ahead": dict(prefetch=20),
    }.items():
        other = fit(tmp_path, name, **options)
        other.train_and_validate()
        assert_equal_runs(other, whole)


def test_limits_and_missing_validation(tmp_path):
    state = fit(tmp_path, max_batches_per_epoch_training=4, max_batches_per_epoch_validation=1).train_and_validate()
    assert state.global_step == 12 and [r["step"] for r in state.epochs] == [4, 8, 12]
    trainer = fit(tmp_path, "no validation", points=Points(n_valid=0))
    state = trainer.train_and_validate()
    assert "valid_loss" not in state.epochs[0] and state.best["loss"] == min(r["train_loss"] for r in state.epochs)
    with pytest.raises(ValueError, match="nothing to train on"):
        fit(tmp_path, "no data", points=Points(n=0)).train_and_validate()
    with pytest.raises(ValueError, match="max_epochs must be positive"):
        fit(tmp_path, max_epochs=0)
    with pytest.raises(TypeError, match="load_batch_inputs"):
        TrainerOneInput(toy_model(), tmp_path, "x", Points(), Points())
    # The base alone has no run_one_batch of its own either: it says what is needed.
    with pytest.raises(NotImplementedError, match="compute_batch_loss"):
        fit(tmp_path, "abstract", kind=Fit.__mro__[1]).train_and_validate()


def test_learning_rates(tmp_path):
    for name, rate, expected in (
        ("number", 0.02, [0.02] * 3),
        ("list", [0.1, 0.01], [0.1, 0.01, 0.01]),
        ("text", "0.1*2 0.05", [0.1, 0.1, 0.05]),
        ("policy", Exponential(1.0, 0.5), [1, 0.5, 0.25]),
    ):
        trainer = fit(tmp_path, name, learning_rate=rate)
        trainer.train_and_validate()
        assert trainer.log.epochs()["learning_rate"].tolist() == expected
        assert trainer.state.optimizer.param_groups[0]["lr"] == expected[-1]


def test_clipping_bounds_the_step(tmp_path):
    trainer = fit(
        tmp_path,
        optimizer="SGD",
        learning_rate=1.0,
        weight_decay=0.0,
        clip_grad=1e-3,
        max_batches_per_epoch_training=1,
        max_epochs=1,
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train_and_validate()
    moved = (
        sum(float((p.detach() - b).square().sum()) for p, b in zip(trainer.model.parameters(), before, strict=True))
        ** 0.5
    )
    assert moved == pytest.approx(1e-3, rel=1e-2)
    assert trainer.log.batches()["grad_norm"][0] > 1e-2  # logged as it was before clipping


def test_an_optimizer_of_ones_own(tmp_path):
    trainer = fit(tmp_path, optimizer=lambda p: torch.optim.Rprop(p, lr=0.005))
    trainer.train_and_validate()
    assert trainer.state.optimizer.param_groups[0]["lr"] == 0.005
    again = fit(tmp_path, optimizer=lambda p: torch.optim.Rprop(p, lr=0.005), max_epochs=4)
    assert again.train_and_validate().epoch == 4


def test_child_classes_may_replace_the_steps(tmp_path):
    calls = []

    class Own(Fit):
        def run_one_batch(self, batch):
            calls.append("run")
            return super().run_one_batch(batch)

        def fix_parameters(self):
            assert all(p.grad is not None for p in self.model.parameters())
            calls.append("fix")

        def train_one_epoch(self):
            calls.append("epoch")
            return super().train_one_epoch()

        def save_best_model(self):
            calls.append("best")

    fit(tmp_path, kind=Own, max_epochs=1).train_and_validate()
    assert calls == ["epoch", *["run", "fix"] * 6, "run", "run", "best"]


def test_streamlines_under_noise_are_seen_and_answered_for(tmp_path):
    """The model sees the noisy streamline, features and directions; the answer is the direction of the other one."""
    data, _ = make_file(tmp_path / "data", n_subjects=3, n=12, points=(12, 20))
    trainer = streamline_trainer(data, tmp_path)
    loader, seen = trainer.batch_loader, {}
    batch = loader.load_batch_streamlines(trainer.batch_sampler.plan(0)[0])
    forward, loss = trainer.model.forward, trainer.model.compute_loss
    trainer.model.forward = lambda inputs, b: (seen.update(inputs=inputs, points=b.points), forward(inputs, b))[1]
    trainer.model.compute_loss = lambda o, t, average_results: (seen.update(targets=t), loss(o, t, average_results))[1]
    trainer.run_one_batch(batch)
    noisy, to_answer = loader.add_noise_streamlines_forward(batch), loader.add_noise_streamlines_loss(batch)
    assert not torch.equal(noisy.points, batch.points) and not torch.equal(to_answer.points, batch.points)
    assert torch.equal(seen["points"], noisy.points)
    assert torch.equal(seen["inputs"], loader.load_batch_inputs(noisy.points, noisy))
    assert torch.equal(seen["targets"].directions, trainer.model.targets(to_answer).directions)


# -- best, stopping

class Scripted(Fit):
    """Validation losses as written in `losses`."""

    losses: tuple = ()

    def validate_one_epoch(self):
        super().validate_one_epoch()
        return self.losses[self.state.epoch]


def test_best_is_the_best_and_nan_never_is(tmp_path):
    class Nan(Scripted):
        losses = (float("nan"), 3.0, 2.0, float("nan"), 2.5)

    trainer = fit(tmp_path, kind=Nan, max_epochs=5)
    at_best = {}
    trainer.listeners.append(
        lambda event, t: at_best.update({t.state.epoch: t.state.snapshot()}) if event == "epoch" else None
    )
    state = trainer.train_and_validate()
    assert state.best == {"epoch": 2, "loss": 2.0}
    best = load_model(trainer.folder / "best_model", toy_model())
    assert all(torch.equal(a, b) for a, b in zip(best.parameters(), at_best[3].model.parameters(), strict=True))
    assert np.isnan(trainer.log.epochs()["valid_loss"][[0, 3]]).all()
    assert len(trainer.curves()["validation"][0]) == 5


def test_patience_survives_interruptions(tmp_path):
    class Rising(Scripted):
        losses = (5.0, 4.0, 4.5, 4.2, 4.1, 4.3, 9, 9, 9)

    whole = fit(tmp_path, "whole", kind=Rising, patience=3, max_epochs=9)
    state = whole.train_and_validate()
    assert state.epoch == 5 and "no better loss" in state.finished["message"] and whole.status.phase == "finished"
    cut = fit(tmp_path, "cut", kind=Rising, patience=3, max_epochs=9)
    cut.step(6 * 3 + 2)
    cut.stop(wait=True)
    again = fit(tmp_path, "cut", kind=Rising, patience=3, max_epochs=9)
    again.train_and_validate()
    assert_equal_runs(again, whole)
    stays = fit(tmp_path, "cut", kind=Rising, patience=3, max_epochs=9)
    assert stays.train_and_validate().epoch == 5 and "stopped early" in stays.status.message
    longer = fit(tmp_path, "cut", kind=Rising, patience=5, max_epochs=9)
    assert longer.train_and_validate().epoch == 7  # two more without a better one


def test_policies_of_ones_own(tmp_path):
    told = []

    class Watch(Policy):
        remembers = ("steps",)
        steps = 0

        def epoch_started(self, epoch):
            told.append(("epoch", epoch))

        def train_step_finished(self, epoch, iteration, loss):
            self.steps += 1
            if self.steps == 15:
                raise EarlyStopping("enough")

        def epoch_finished(self, epoch, *, train_losses, metrics):
            told.append(
                (
                    len(train_losses),
                    round(float(np.mean(train_losses)), 6) == round(metrics["train_loss"], 6),
                    set(metrics),
                )
            )

    trainer = fit(tmp_path, policies=[Watch()])
    state = trainer.train_and_validate()
    done = (6, True, {"train_loss", "valid_loss"})
    assert told == [("epoch", 0), done, ("epoch", 1), done, ("epoch", 2)]
    assert (state.global_step, state.finished["message"], state.policies["1 Watch"]) == (15, "enough", {"steps": 15})


# -- going on

def test_raising_max_epochs_goes_on(whole, tmp_path):
    fit(tmp_path, max_epochs=1).train_and_validate()
    longer = fit(tmp_path)
    longer.train_and_validate()
    assert_equal_runs(longer, whole)
    again = fit(tmp_path)
    before = again.log.path.read_bytes()
    again.train_and_validate()
    assert "Nothing left" in again.status.message and again.log.path.read_bytes() == before


def test_the_same_trainer_goes_on_where_it_stands(whole, tmp_path):
    trainer = fit(tmp_path)
    trainer.step(8)
    trainer.stop(wait=True)
    trainer.train_and_validate()
    assert_equal_runs(trainer, whole)


def test_a_state_moves_on_to_another_trainer(whole, tmp_path):
    first = fit(tmp_path)
    first.step(8)
    first.stop(wait=True)
    second = fit(tmp_path)
    second.train_and_validate(first.state)
    assert second.model is first.model and second.state is first.state
    assert_equal_runs(second, whole)


def test_other_runs_data_and_models_are_refused(tmp_path):
    trainer = fit(tmp_path, max_epochs=1)
    trainer.train_and_validate()
    with pytest.raises(ValueError, match="holds another run"):
        fit(tmp_path).train_and_validate(TrainerState.create(toy_model()))
    with pytest.raises(ValueError, match="another model"):
        fit(tmp_path, model=nn.Linear(1, 1)).train_and_validate()
    with pytest.raises(ValueError, match="another model"):
        fit(tmp_path, "new", model=nn.Linear(1, 1)).train_and_validate(trainer.state.fork())
    with pytest.raises(ValueError, match="optimizer: Adam -> SGD"):
        fit(tmp_path, optimizer="SGD").train_and_validate()
    with pytest.raises(ValueError, match="another optimizer"):
        fit(tmp_path, "new", optimizer="SGD").train_and_validate(trainer.state.fork())

    class Data(Points):
        class dataset:
            fingerprint = staticmethod(lambda: "abc")

    with pytest.raises(ValueError, match="other data"):
        fit(tmp_path, points=Data()).train_and_validate()


class Settings(Points):
    def settings(self):
        return {"n": self.n}


def test_other_batches_wait_for_the_next_epoch(tmp_path, capsys):
    """Changed in the midst of an epoch: that ends as it was begun, also after another interruption."""
    whole = fit(tmp_path, "whole", points=Settings(), max_epochs=2).train_and_validate()
    trainer = fit(tmp_path, points=Settings())
    trainer.step(8)
    trainer.stop(wait=True)
    other = fit(tmp_path, points=Settings(4), progress=True)
    other.listeners.append(lambda event, t: t.stop() if event == "batch" and t.state.global_step == 10 else None)
    state = other.train_and_validate()
    assert state.global_step == 10 and state.fingerprints["sampler"] == {"n": 6}
    state = fit(tmp_path, points=Settings(4), progress=True).train_and_validate()
    said = capsys.readouterr().out
    assert (
        said.count(
            "The sampler has changed: n: 6 -> 4. This epoch is finished with its batches as they were; the new ones "
            "begin with epoch 3."
        )
        == 2
    )
    assert [r["step"] for r in state.epochs] == [6, 12, 16] and state.fingerprints["sampler"] == {"n": 4}
    assert state.epochs[:2] == whole.epochs


def test_another_batch_size_waits_for_the_next_epoch(tmp_path):
    data, _ = make_file(tmp_path / "data", points=(12, 30))
    trainer = streamline_trainer(data, tmp_path, max_epochs=2)
    trainer.step(2)
    trainer.stop(wait=True)
    n = [len(trainer.batch_sampler.plan(epoch, "training")) for epoch in range(2)]
    trainer.batch_sampler.batch_size_training = 20
    state = trainer.train_and_validate()
    assert (
        state.epochs[0]["step"] == n[0]
        and state.epochs[1]["step"] - n[0] == len(trainer.batch_sampler.plan(1, "training")) < n[1]
    )


def test_other_batches_are_refused_within_an_epoch_and_said_between(tmp_path, capsys):
    trainer = fit(tmp_path)
    trainer.step(8)
    trainer.stop(wait=True)
    with pytest.raises(ValueError, match="batches are not this sampler's"):  # one that does not tell its settings
        fit(tmp_path, points=Points(9)).train_and_validate()
    other = fit(tmp_path, "told", points=Settings(), max_epochs=2)
    other.train_and_validate()
    fit(tmp_path, "told", points=Settings(4), progress=True).train_and_validate()
    assert "The sampler has changed: n: 6 -> 4.\n" in capsys.readouterr().out


def test_what_may_change_the_bits_is_said(tmp_path):
    fit(tmp_path, max_epochs=1).train_and_validate()
    with pytest.warns(UserWarning, match="threads: 1 -> 2"):
        fit(tmp_path, num_threads=2).train_and_validate()


def test_setting_a_run_back(whole, tmp_path):
    trainer = fit(tmp_path, keep_checkpoints=9)
    early = []
    trainer.listeners.append(
        lambda event, t: (
            early.append(t.state.snapshot())
            if event == "batch" and t.state.global_step == 5 and t.state.batch == 5
            else None
        )
    )
    trainer.train_and_validate()
    back = fit(tmp_path)
    back.listeners.append(lambda event, t: t.stop() if event == "started" else None)
    with pytest.warns(UserWarning, match="set back from step 18 to 5"):
        back.train_and_validate(early[0])
    again = fit(tmp_path)
    assert again.checkpoints.steps()[-1] == back.state.global_step < 8
    again.train_and_validate()
    assert_equal_runs(again, whole)


def test_a_damaged_newest_checkpoint_costs_little(whole, tmp_path):
    trainer = fit(tmp_path, checkpoint_every_batches=2)
    trainer.step(9)
    trainer.stop(wait=True)
    newest = trainer.checkpoints.path(trainer.checkpoints.steps()[-1])
    newest.write_bytes(newest.read_bytes()[:-20])
    again = fit(tmp_path)
    with pytest.warns(UserWarning, match="Going back to an earlier checkpoint"):
        again.train_and_validate()
    assert_equal_runs(again, whole)
    assert again.checkpoints.newest()[0]["global_step"] == 18


def test_settings_are_written_down(whole):
    config = yaml.safe_load((whole.folder / "config.yaml").read_text())["trainer"]
    assert config["max_epochs"] == 3 and config["learning_rate"] == .01 and config["class"] == "Fit"
    assert sorted(p.name for p in whole.folder.iterdir()) == [
        ".lock",
        "best_model",
        "checkpoints",
        "config.yaml",
        "log.jsonl",
        "process",
        "tensorboard",
    ]


def test_a_checkpoint_exists_before_the_first_batch(tmp_path):
    seen = []

    class Look(Fit):
        def compute_batch_loss(self, batch):
            seen.append(self.checkpoints.steps())
            return super().compute_batch_loss(batch)

    fit(tmp_path, kind=Look, max_epochs=1).train_and_validate()
    assert seen[0] == [0]


def test_checkpoints_by_number_and_time(tmp_path):
    trainer = fit(tmp_path, max_epochs=1, checkpoint_every_batches=2, keep_checkpoints=100)
    trainer.train_and_validate()
    assert trainer.checkpoints.steps() == [0, 2, 4, 6]
    often = fit(tmp_path, "often", max_epochs=1, checkpoint_every_seconds=0, keep_checkpoints=100)
    often.train_and_validate()
    assert often.checkpoints.steps() == list(range(7))


# -- interrupting and controlling

def test_an_interrupt_ends_after_the_batch_and_returns(whole, tmp_path, capsys):
    trainer = fit(tmp_path, progress=True)
    trainer.listeners.append(
        lambda event, t: os.kill(os.getpid(), signal.SIGINT) if event == "batch" and t.state.global_step == 8 else None
    )
    handler = signal.getsignal(signal.SIGINT)
    state = trainer.train_and_validate()
    assert state.global_step == 8 and trainer.status.phase == "stopped" and signal.getsignal(signal.SIGINT) is handler
    said = capsys.readouterr().out
    assert "Interrupted in epoch 2 after batch 2; saved in" in said and "train_and_validate() or start() again" in said
    trainer.listeners.clear()
    trainer.train_and_validate()
    assert "Going on with" in capsys.readouterr().out
    assert_equal_runs(trainer, whole)


def test_an_interrupt_in_validation_repeats_the_validation(whole, tmp_path):
    trainer = fit(tmp_path)
    trainer.listeners.append(
        lambda event, t: (
            t.stop() if t.status.phase == "validating" and t.status.batch == 1 and t.state.epoch == 1 else None
        )
    )
    trainer.train_and_validate()
    assert trainer.status.phase == "stopped" and (trainer.state.epoch, trainer.state.batch) == (1, 6)
    again = fit(tmp_path)
    again.train_and_validate()
    assert_equal_runs(again, whole)


def test_two_interrupts_do_what_they_always_do(tmp_path):
    class Slow(Fit):
        def compute_batch_loss(self, batch):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.3)  # two at once may count as one

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, kind=Slow).train_and_validate()
    assert not fit(tmp_path).running
    fit(tmp_path).train_and_validate()  # the folder is free again, and there is a checkpoint to start from


@pytest.mark.parametrize("drive", ["start", "steps", "pauses"])
def test_background_runs_end_in_the_same_bits(whole, tmp_path, drive):
    trainer = fit(tmp_path, drive)
    noise = threading.Event()

    def draw():
        while not noise.is_set():
            torch.rand(7)

    threading.Thread(target=draw, daemon=True).start()
    try:
        if drive == "start":
            trainer.start()
        elif drive == "steps":
            for n in (1, 2, 3, 1, 9):
                trainer.step(n)
            assert trainer.state.global_step == 16 and trainer.status.phase == "paused"
            trainer.resume()
        else:
            trainer.start(paused=True)
            for _ in range(20):
                trainer.resume()
                time.sleep(0.005)
                trainer.pause(wait=True)
                if trainer.running:
                    assert trainer.status.phase == "paused"
            trainer.resume()
        trainer.wait()
    finally:
        noise.set()
    assert_equal_runs(trainer, whole)


def test_a_paused_training_can_be_stopped_saved_and_left(tmp_path):
    trainer = fit(tmp_path)
    trainer.step(4)
    assert trainer.save_checkpoint().name == "step-00000004.ckpt"
    with pytest.raises(TimeoutError):
        trainer.wait(0.01)
    with pytest.raises(RuntimeError, match="running already"):
        trainer.train_and_validate()
    with pytest.raises(RuntimeError, match="running already"):
        trainer.start()
    trainer.stop(wait=True)
    assert not trainer.running and trainer.status.phase == "stopped"


def test_an_error_in_the_background_is_kept_and_raised(tmp_path):
    class Breaks(Fit):
        def compute_batch_loss(self, batch):
            if self.state.global_step == 7:
                raise OSError("the disk is gone")
            return super().compute_batch_loss(batch)

    trainer = fit(tmp_path, kind=Breaks)
    trainer.start()
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.wait()
    assert trainer.status.phase == "failed" and "disk is gone" in trainer.status.message
    assert trainer.checkpoints.steps()[-1] == 7
    assert fit(tmp_path).train_and_validate().global_step == 18


def test_two_trainers_do_not_share_a_folder_or_a_state(tmp_path):
    one, two, three = fit(tmp_path), fit(tmp_path), fit(tmp_path, "other")
    one.step(2)
    with pytest.raises(RuntimeError, match="another trainer is at work"):
        two.train_and_validate()
    with pytest.raises(RuntimeError, match="being trained already"):
        three.train_and_validate(one.state)
    one.stop(wait=True)
    two.train_and_validate()


def test_numbers_that_are_not_finite_stop_before_the_weights(tmp_path):
    class Explodes(Fit):
        bad = "loss"

        def compute_batch_loss(self, batch):
            mean, n = super().compute_batch_loss(batch)
            if self.state.global_step == 4 and self.model.training:
                mean = mean * float("nan") if self.bad == "loss" else mean + 0 * (self.model[0].weight * 0).sqrt().sum()
            return mean, n

    for name, text in (
        ("loss", "the loss is nan in epoch 1, batch 5"),
        ("gradient", "norm of the gradient is nan in epoch 1, batch 5"),
    ):
        trainer = fit(tmp_path, name, kind=Explodes)
        trainer.bad = name
        with pytest.raises(FloatingPointError, match=text):
            trainer.train_and_validate()
        assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
        assert (
            same_states(TrainerState.load(trainer.folder, model=toy_model()), trainer.state) == []
            and trainer.state.global_step == 4
        )


def test_a_half_done_update_is_not_saved(whole, tmp_path):
    class Breaks(Fit):
        def back_propagation(self, loss):
            norm = super().back_propagation(loss)
            if self.state.global_step == 8:
                raise MemoryError("out of memory, after the weights were changed")
            return norm

    trainer = fit(tmp_path, kind=Breaks, checkpoint_every_batches=3)
    with pytest.raises(MemoryError):
        trainer.train_and_validate()
    assert trainer.checkpoints.steps()[-1] == 6
    again = fit(tmp_path)
    again.train_and_validate()
    assert_equal_runs(again, whole)


def test_workers_ignore_the_keyboard(whole, tmp_path):
    """An interrupt from the keyboard reaches all processes of the group."""
    trainer, killed = fit(tmp_path, num_workers=2), []

    def interrupt_workers(event, t):
        if event == "batch" and t.state.global_step in (3, 8):
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGINT)
                killed.append(worker.pid)

    trainer.listeners.append(interrupt_workers)
    trainer.train_and_validate()
    assert len(killed) == 4
    assert_equal_runs(trainer, whole)


def test_a_full_disk_is_reported_and_costs_only_what_was_not_saved(whole, tmp_path, monkeypatch):
    trainer = fit(tmp_path, checkpoint_every_batches=3)
    save = trainer.checkpoints.save

    def full(step, tree, best=None, by_hand=False):
        if step >= 9:  # and so is the attempt to save after the error
            raise OSError(28, "No space left on device")
        return save(step, tree, best)

    monkeypatch.setattr(trainer.checkpoints, "save", full)
    with pytest.raises(OSError, match="No space"):
        trainer.train_and_validate()
    again = fit(tmp_path)
    again.train_and_validate()
    assert_equal_runs(again, whole)


def test_listeners_cannot_break_a_training(tmp_path):
    trainer, events = fit(tmp_path, max_epochs=1), []

    def bad(event, t):
        raise RuntimeError("widget closed")

    trainer.listeners += [bad, lambda event, t: events.append((event, t.status.phase))]
    with pytest.warns(UserWarning, match="widget closed"):
        trainer.train_and_validate()
    assert events[0] == ("started", "starting") and events[-1] == ("ended", "finished")
    assert [e for e, _ in events].count("batch") == 8 and len(trainer.listeners) == 1


def test_torchs_own_dropout_is_seeded_too_and_warned_about(tmp_path):
    def model():
        m = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        with torch.no_grad():
            for i, p in enumerate(m.parameters()):
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p) / (i + 1))
        return m

    with pytest.warns(UserWarning, match="Dropout draws from torch's global generator"):
        a = fit(tmp_path, "a", model=model())
        a.train_and_validate()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        b = fit(tmp_path, "b", model=model())
        b.step(4)
        b.stop(wait=True)
        torch.rand(5)
        b.train_and_validate()
    assert same_states(a.state, b.state) == []


def test_the_progress_line_is_bounded(tmp_path):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        fit(tmp_path, progress=True, points=Points(300), max_epochs=2).train_and_validate()
    assert len(err.getvalue()) < 6000 and "epoch 2/2" in err.getvalue() and "valid" in err.getvalue()
    assert out.getvalue().count("\n") == 1 and "Finished: 2 epochs" in out.getvalue()
    assert err.getvalue().count("\n") == 1 and "\r" not in err.getvalue(), "a bar moves in a file"
    quiet = io.StringIO()
    with redirect_stdout(quiet), redirect_stderr(quiet):
        fit(tmp_path, "quiet", progress=False).train_and_validate()
    assert quiet.getvalue() == ""


def test_status_and_curves_can_be_read_all_the_time(tmp_path):
    trainer = fit(tmp_path, points=Points(60), max_epochs=4)
    assert trainer.curves() == {} and trainer.status.phase == "idle"
    trainer.start()
    seen = set()
    while trainer.running:
        status = trainer.status
        assert 0 <= status.batch <= max(status.n_batches, 0) and status.epoch <= 4
        seen.add(status.phase)
        for x, y in trainer.curves().values():
            assert len(x) == len(y)
        str(status)
    trainer.wait()
    assert "training" in seen and trainer.status.phase == "finished" and np.isfinite(trainer.status.eta)


def test_the_thread_count_is_the_trainers_own(tmp_path):
    """Bits depend on the number of threads: what another thread sets must not reach a training that runs."""
    before, seen, done = torch.get_num_threads(), set(), threading.Event()

    class Look(Fit):
        def compute_batch_loss(self, batch):
            seen.add(torch.get_num_threads())
            return super().compute_batch_loss(batch)

    def toggle():
        while not done.is_set():
            for n in (1, 2, 3):
                torch.set_num_threads(n)

    threading.Thread(target=toggle, daemon=True).start()
    try:
        for i in range(20):
            trainer = fit(tmp_path, f"{i}", kind=Look, max_epochs=1, num_threads=1)
            trainer.start()
            trainer.wait()
    finally:
        done.set()
    torch.set_num_threads(before)
    assert seen == {1}


def test_memory_does_not_grow_with_batches(tmp_path):
    trainer = fit(tmp_path, points=Points(1200), max_epochs=1)
    trainer.train_and_validate()
    size = trainer.checkpoints.path(1200).stat().st_size
    small = fit(tmp_path, "small", points=Points(520), max_epochs=1)
    small.train_and_validate()
    assert size < 1.5 * small.checkpoints.path(520).stat().st_size


def test_the_time_left_leaves_out_pauses_and_ways_back(monkeypatch):
    from tractkit.training import progress

    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    line = progress.ProgressLine(False)

    def batches(first, last):  # one a second
        left = math.nan
        for done in range(first, last + 1):
            left = line.update(done, 100, "")
            now[0] += 1
        return left

    assert math.isnan(line.update(0, 100, ""))
    now[0] += 1
    assert batches(1, 10) == 90
    line.rest("paused")
    now[0] += 3600
    assert batches(11, 20) == 80
    assert batches(5, 30) == 70  # it went back to 5


def test_the_bar_counts_no_pause_in_its_elapsed_time(monkeypatch):
    from tractkit.training import progress

    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "bars_move", lambda: True)
    line = progress.ProgressLine(True)
    line.update(0, 100, "")
    line.bar._time, line.bar.start_t, line.bar.last_print_t = (lambda: now[0]), now[0], now[0]
    seen = []
    for move in (lambda: line.update(10, 100, ""), lambda: line.rest("paused"), lambda: line.write("changed"),
                 lambda: line.rest("paused"), lambda: line.update(10, 100, "")):
        now[0] += 10
        move()
        seen.append(line.bar.format_dict["elapsed"])
    now[0] += 10
    line.update(20, 100, "")
    seen.append(line.bar.format_dict["elapsed"])
    line.close()
    assert seen == [10, 20, 20, 20, 20, 30]
