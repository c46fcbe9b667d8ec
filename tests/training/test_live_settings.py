"""Settings that are changed while a model trains: in the log, in config.yaml, and in the same bits."""

import pickle
import shutil
import threading
import time

import numpy as np
import pytest
import torch
import yaml
from helpers_data import make_file
from helpers_training import (
    Points,
    SlowPoints,
    fit,
    log_without_time,
    same_states,
    streamline_trainer,
    toy_model,
)

from tractkit.runs.curves import read_run
from tractkit.runs.log import scalars_of
from tractkit.training.callbacks import Callback
from tractkit.training.policy import DecreasingOnPlateau, Exponential, Patience
from tractkit.training.run_folder import RunFolder
from tractkit.training.state import TrainerState
from tractkit.training.trainer import Trainer

CHANGES = {
    "learning_rate": 0.002,
    "max_epochs": 4,
    "patience": 3,
    "clip_grad": 0.5,
    "batch_size_training": 5,
    "reverse_ratio": 0.9,
    "split_ratio": 0.6,
    "noise_gaussian_size_forward": 0.2,
    "noise_gaussian_size_loss": 0.0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_file(tmp_path_factory.mktemp("data"), points=(5, 30))[0]


def changed(run: Trainer, at: int, **settings) -> Trainer:
    """Train a trainer to the end, with a change after a step."""
    run.policies.append(
        Callback(train_step_finished=lambda *_: run.change(**settings) if run.state.global_step == at else None)
    )
    run.train_and_validate()
    return run


def killed(run: Trainer, name: str, last: int | None = None) -> None:
    """The folder of a run as a SIGKILL at this moment would leave it, as that of another run; with no checkpoint after
    the `last`."""
    shutil.copytree(run.folder, run.folder.parent / name, ignore=shutil.ignore_patterns(".lock"))
    for step in run.checkpoints.steps():
        if last is not None and step > last:
            (run.folder.parent / name / "checkpoints" / run.checkpoints.path(step).name).unlink()


@pytest.mark.parametrize(
    "settings", [CHANGES] + [{k: v} for k, v in CHANGES.items()], ids=lambda s: "all" if len(s) > 1 else next(iter(s))
)
def test_a_changed_run_that_is_killed_ends_as_one_that_is_not(data, tmp_path, settings):
    """Changed in the second epoch; killed three steps later, with no checkpoint but that of the change; gone on with by
    the cell as it was."""
    whole = streamline_trainer(data, tmp_path, "whole")
    at = len(whole.batch_sampler.plan(0, "training")) + 2
    whole.step(at)
    whole.change(**settings)
    whole.resume()
    whole.wait()

    cut = streamline_trainer(data, tmp_path, "cut", keep_checkpoints=9)
    cut.step(at)
    cut.change(**settings)
    cut.step(3)
    killed(cut, "again", last=at)
    cut.stop(wait=True)
    again = streamline_trainer(data, tmp_path, "again")
    again.train_and_validate()
    assert same_states(again.state, whole.state) == []
    assert log_without_time(again.log) == log_without_time(whole.log)
    records = log_without_time(whole.log)
    assert [(r["name"], r["step"], r["to"]) for r in records if r["kind"] == "change"] == [
        (k, at, v) for k, v in settings.items()
    ]

    plain = streamline_trainer(data, tmp_path, "plain")
    plain.train_and_validate()
    assert "patience" in settings or same_states(plain.state, whole.state)  # it made a difference
    before, after = (
        [r for r in log_without_time(t.log) if r["kind"] == "batch" and r["step"] <= at] for t in (plain, whole)
    )
    assert before == after  # from then on


def test_a_change_by_a_policy_in_the_midst_of_a_step_holds_from_the_next(tmp_path):
    run = changed(fit(tmp_path), 7, learning_rate=.5)
    rates = {r["step"]: r["learning_rate"] for r in run.log.records("batch")}
    assert rates == {step: .01 if step <= 7 else .5 for step in range(1, 19)}


def test_it_is_told_everywhere(tmp_path):
    run = fit(tmp_path)
    run.step(8)
    run.change(learning_rate="0.02*2 0.005", clip_grad=1., max_epochs=4)
    record = run.log.records("change")[0]
    assert {k: record[k] for k in ("step", "epoch", "batch", "name", "from", "to")} == {
        "step": 8, "epoch": 1, "batch": 2, "name": "learning_rate", "from": .01, "to": [.02, .02, .005]}
    config = yaml.safe_load((run.folder / "config.yaml").read_text())["trainer"]
    assert (config["learning_rate"], config["clip_grad"], config["max_epochs"]) == ([.02, .02, .005], 1., 4)
    assert (
        run.status.message
        == (
            "learning_rate: 0.01 -> [0.02, 0.02, 0.005], from the next batch; clip_grad: None -> 1.0, from the next "
            "batch; "
            "max_epochs: 3 -> 4."
        )
        and run.messages[-1] == run.status.message
    )
    assert run.status.max_epochs == 4
    run.change(clip_grad=1.)  # as it is: no change
    assert len(run.log.records("change")) == 3
    run.resume()
    state = run.wait()
    assert state.epoch == 4 and {r["epoch"]: r["learning_rate"] for r in run.log.records("batch") if r["step"] > 8} == {
        1: 0.02,
        2: 0.005,
        3: 0.005,
    }
    assert state.history["train_loss"].shape == (4,) and len(state.history.batches["loss"]) == 24
    assert read_run(run.folder).columns["batch"]["loss"].shape == (24,)
    assert TrainerState.load(run.folder, model=toy_model()).fingerprints["changes"]["clip_grad"] == [None, 1.]
    assert scalars_of(run.log.records("change")[1]) == {"change/clip_grad": 1.} and scalars_of(record) == {}


def test_a_cell_that_says_something_new_has_the_last_word(tmp_path):
    run = fit(tmp_path)
    run.step(3)
    run.change(learning_rate=.002)
    run.stop(wait=True)
    other = fit(tmp_path, learning_rate=.03)
    other.step(1)
    other.stop(wait=True)
    assert [(r["step"], r["from"], r["to"]) for r in other.log.records("change")] == [(3, .01, .002), (3, .002, .03)]
    same = fit(tmp_path, learning_rate=.03)
    same.train_and_validate()
    assert len(same.log.records("change")) == 2 and same.log.records("batch")[-1]["learning_rate"] == .03


def test_a_change_while_it_rests_in_no_run_is_written_when_one_begins(tmp_path):
    """Each is one record, with the step at which it was made; also in another process, and once."""
    run = fit(tmp_path)
    run.change(clip_grad=1.)
    run.change(learning_rate=.02, clip_grad=2.)
    run.change(clip_grad=2.)  # as it is
    assert not run.log.path.exists()
    sent = pickle.loads(pickle.dumps(run))
    run.step(2)
    run.stop(wait=True)
    run.change(clip_grad=.1)
    run.change(clip_grad=None)
    branch = run.fork()
    for trainer in (branch, run):
        trainer.train_and_validate()
        assert [(r["step"], r["from"], r["to"]) for r in trainer.log.records("change")] == [
            (0, None, 1.), (0, .01, .02), (0, 1., 2.), (2, 2., .1), (2, .1, None)]
    sent.use_folder(RunFolder(tmp_path / "sent"), [])
    sent.train_and_validate()
    assert [(r["step"], r["to"]) for r in sent.log.records("change")] == [(0, 1.), (0, .02), (0, 2.)]


def test_after_a_rewind_the_change_is_told_where_it_now_begins(tmp_path):
    run = fit(tmp_path, keep_checkpoints=5)
    run.step(8)
    run.change(learning_rate=.001)
    run.stop(wait=True)
    run.rewind(1)
    assert run.state.global_step == 6 and run.status.phase == "stopped" and "Set back" in run.status.message
    run.train_and_validate()
    assert [(r["step"], r["to"]) for r in run.log.records("change")] == [(6, .001)]


def test_a_policy_keeps_its_memory_across_a_kill_and_loses_it_when_it_is_replaced(tmp_path):
    falls = dict(initial=.01, multiplier=.5, patience=0, rtol=1., atol=1.)  # each epoch but the first
    run = fit(tmp_path, max_epochs=8)
    run.step(1)
    run.change(learning_rate={"class": "DecreasingOnPlateau", **falls})
    run.step(4, unit="epoch")
    assert run.learning_rate.value < .01
    killed(run, "again")
    again = fit(tmp_path, "again", max_epochs=8)
    again.step(1)
    assert isinstance(again.learning_rate, DecreasingOnPlateau) and again.learning_rate.value == run.learning_rate.value
    again.change(learning_rate=DecreasingOnPlateau(**falls | {"initial": .3}))
    again.step(1)
    assert again.log.records("batch")[-1]["learning_rate"] == .3
    for r in (run, again):
        r.stop(wait=True)


def test_an_optimizer_with_rates_of_its_own_gets_the_new_one(tmp_path):
    model = toy_model()
    run = fit(tmp_path, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=.1))
    run.step(2)
    run.change(learning_rate=.003)
    run.resume()
    run.wait()
    assert [r["learning_rate"] for r in run.log.records("batch")] == [.1] * 2 + [.003] * 16


def test_patience_can_come_go_and_be_changed(tmp_path):
    run = fit(tmp_path, max_epochs=6, learning_rate=0., weight_decay=0.)
    run.step(1)
    run.change(patience=2)
    run.change(patience=None)
    run.change(patience=3)
    run.resume()
    assert run.wait().finished["why"] == "early stopping" and run.state.epoch <= 5
    assert [(r["from"], r["to"]) for r in run.log.records("change")] == [(None, 2), (2, None), (None, 3)]
    run.change(patience=50)
    assert run.train_and_validate().epoch == 6  # it was stopped by a patience that it has no more
    own = fit(tmp_path, "own", policies=[Patience(4), Callback()])
    with pytest.raises(ValueError, match="among the policies"):
        own.change(patience=None)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"learning_rate": -1.0}, "finite and not negative"),
        ({"learning_rate": "fast"}, "cannot read 'fast'"),
        ({"learning_rate": None}, "learning rate"),
        ({"max_epochs": 2.5}, "whole number"),
        ({"patience": 0}, "positive whole number or None"),
        ({"clip_grad": float("nan")}, "positive number or None"),
        ({"batch_size_training": None}, "positive number"),
        ({"reverse_ratio": 1.5}, r"must be in \[0, 1\]"),
        ({"noise_gaussian_size_loss": -0.1}, "cannot be negative"),
        ({"noise_gaussian_size_forward_mm": 0.1}, "give only one of"),
        ({"optimizer": "SGD"}, "stop it, and give it to a new trainer"),
        ({"step_size": 1.0}, "stop it, and give it to a new trainer"),
        ({"learning_rte": 0.1}, "did you mean learning_rate"),
    ],
)
def test_what_cannot_be_is_refused_as_a_whole(data, tmp_path, settings, message):
    run = streamline_trainer(data, tmp_path)
    before = run.config()
    with pytest.raises(ValueError, match=message):
        run.change(**{"clip_grad": .7} | settings)
    assert run.config() == before


def test_worker_processes_load_by_the_new_settings(data, tmp_path):
    runs = []
    for name, workers in (("thread", 0), ("workers", 1)):
        run = streamline_trainer(data, tmp_path, name, num_workers=workers, max_epochs=1)
        run.step(2)
        run.change(reverse_ratio=0., split_ratio=1.)
        run.resume()
        run.wait()
        runs.append(run)
    assert log_without_time(runs[0].log) == log_without_time(runs[1].log)


def test_many_threads_may_change_at_once(tmp_path):
    run = fit(tmp_path, points=SlowPoints(), max_epochs=9)
    run.step(1)
    run.resume()
    threads = [threading.Thread(target=lambda i=i: run.change(clip_grad=float(i))) for i in range(1, 9)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    run.stop(wait=True)
    records = run.log.records("change")
    assert sorted(r["to"] for r in records) == list(range(1, 9)) and all(
        a["to"] == b["from"] for a, b in zip(records, records[1:], strict=False)
    )


# -- the verbs beside it

def test_one_epoch_rests_between_epochs(tmp_path):
    run = fit(tmp_path)
    run.step(1, unit="epoch")
    assert (run.state.epoch, run.state.batch, run.state.global_step, run.status.phase) == (1, 0, 6, "paused")
    run.step(2)
    run.step(1, unit="epoch")
    assert (run.state.epoch, run.state.batch) == (2, 0)
    run.change(clip_grad=.01)
    run.resume()
    run.wait()
    assert [("clipped_to" in r) for r in run.log.records("batch")] == [False] * 12 + [True] * 6
    with pytest.raises(ValueError, match="at least 1 epoch"):
        run.step(0, unit="epoch")
    with pytest.raises(ValueError, match="'batch' or 'epoch'"):
        run.step(1, unit="hour")


def test_a_trainer_started_at_rest_has_trained_nothing(tmp_path):
    run = fit(tmp_path)
    run.start(paused=True)
    assert run.control.rested.wait(10)
    time.sleep(.05)
    assert run.state.global_step == 0
    run.stop(wait=True)


def test_a_fork_is_a_trainer_of_its_own(data, tmp_path):
    run = streamline_trainer(data, tmp_path)
    run.step(3)
    run.change(learning_rate=.005, reverse_ratio=0.)
    branch = run.fork()
    assert (
        branch.folder == tmp_path / "run-fork"
        and branch.state.parent == run.state.run_id
        and branch.status.global_step == 3
    )
    branch.change(learning_rate=.1, reverse_ratio=1., batch_size_training=3)
    assert (run.learning_rate.value, run.batch_loader.reverse_ratio, run.batch_sampler.batch_size_training) == (
        0.005,
        0.0,
        8,
    )
    branch.train_and_validate()
    run.resume()
    run.wait()
    assert [(r["step"], r["to"]) for r in branch.log.records("change")] == [
        (3, 0.005),
        (3, 0.0),
        (3, 0.1),
        (3, 1.0),
        (3, 3),
    ]
    alone = streamline_trainer(data, tmp_path, "alone")
    alone.step(3)
    alone.change(learning_rate=.005, reverse_ratio=0.)
    alone.resume()
    alone.wait()
    assert same_states(alone.state, run.state) == []  # the branch has not disturbed it
    (tmp_path / "taken").mkdir()
    with pytest.raises(ValueError, match="another name"):
        run.fork("taken")


def test_a_state_is_taken_over_without_training(tmp_path):
    run = fit(tmp_path)
    run.step(8)
    run.stop(wait=True)
    again = fit(tmp_path)
    state = again.take()
    assert same_states(state, run.state) == [] and again.status.phase == "stopped"
    for name in ("epoch", "batch", "global_step", "valid_loss", "best_loss"):
        assert getattr(again.status, name) == getattr(run.status, name), name
    assert again.train_and_validate().epoch == 3 and again.status.phase == "finished"
    assert fit(tmp_path / "new").take().global_step == 0


def test_the_status_tells_how_it_goes(tmp_path):
    class Waits(Points):
        def load_batch_streamlines(self, ids, **kwargs):
            time.sleep(.05)
            return super().load_batch_streamlines(ids, **kwargs)

    run = fit(tmp_path, points=Waits(), max_epochs=2)
    run.train_and_validate()
    s, last = run.status, run.log.records("batch")[-1]
    assert (s.grad_norm, s.learning_rate) == (last["grad_norm"], .01) and s.memory > 10_000_000
    assert s.speed < 21  # batches take as long as they take to load
    quick = fit(tmp_path, "quick", max_epochs=30)
    quick.train_and_validate()
    assert quick.status.speed > s.speed and quick.status.waiting < s.waiting <= 1


def test_an_error_says_of_which_batch(tmp_path):
    class Breaks(Points):
        def load_batch_streamlines(self, ids, *, epoch, training):
            if epoch == 1 and training and 3 in ids:
                raise OSError("cannot be read")
            return super().load_batch_streamlines(ids, epoch=epoch, training=training)

    run = fit(tmp_path, points=Breaks())
    with pytest.raises(OSError, match="cannot be read") as e:
        run.train_and_validate()
    batch = next(i for i, ids in enumerate(run.batch_sampler.plan(1, "training")) if 3 in ids)
    assert e.value.__notes__ == [
        f"It happened in epoch 2, batch {batch + 1} ({str(run.batch_sampler.plan(1, 'training')[batch])})."
    ]
    assert run.status.message == f"OSError: cannot be read {e.value.__notes__[0]}" and run.status.phase == "failed"
    run.batch_loader = Points()  # after a fix
    whole = fit(tmp_path, "whole")
    assert same_states(run.train_and_validate(), whole.train_and_validate()) == []


def test_exponential_parameters_are_words(tmp_path):
    run = fit(tmp_path, learning_rate=Exponential(.01, .5))
    run.change(learning_rate={"class": "Exponential", "initial": .02, "multiplier": .1})
    run.train_and_validate()
    assert np.allclose([r["learning_rate"] for r in run.log.records("epoch")], [.02, .002, .0002])
