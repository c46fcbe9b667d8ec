"""A state of very many epochs stays small: its log has the records of all of them."""

import json

import numpy as np
import pytest
from helpers_training import fit, same_states, toy_model

from tractkit.core.files import DataError
from tractkit.lab.status_text import checkpoint_labels
from tractkit.runs.checkpoint import load_checkpoint, save_checkpoint
from tractkit.runs.listing import read_facts
from tractkit.runs.log import RunLog
from tractkit.training.state import TrainerState

MANY = 4000


def train_on_paper(trainer, until: int) -> TrainerState:
    """Bring a state to the end of so many epochs of two steps, with the log and the checkpoints of them."""
    state = trainer.state or trainer.take()
    state.settle(trainer.log, trainer.checkpoints)
    with open(trainer.log.path, "a") as log:
        for epoch in range(state.epoch, until):
            for batch in range(2):
                state.end_step(1, 1.0, 8)
                log.write(json.dumps({"kind": "batch", "epoch": epoch, "batch": batch, "step": state.global_step,
                                      "loss": 1.0, "n": 8, "time": {}}) + "\n")
            loss = float("nan") if epoch == 7 else 1 + abs(epoch - 1501) / MANY
            record = {"epoch": epoch, "step": state.global_step, "train_loss": 1.0, "valid_loss": loss, "n": 16,
                      "learning_rate": .01}
            as_json = {k: None if v != v else v for k, v in record.items()}
            log.write(json.dumps({"kind": "epoch", **as_json, "time": {"training": 1.0}}) + "\n")
            state.end_epoch(record, loss)
            if epoch in (99, 1501):
                trainer.checkpoints.save(state.global_step, state.state_dict(), state.best_step)
    trainer.checkpoints.save(state.global_step, state.state_dict(), state.best_step)
    return state


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    trainer = fit(tmp_path_factory.mktemp("long"), max_epochs=10 * MANY, keep_checkpoints=9, tensorboard=False)
    trainer.folder.mkdir(parents=True)
    train_on_paper(trainer, MANY)
    return trainer


def test_a_checkpoint_and_a_card_are_bounded(long, tmp_path):
    short = fit(tmp_path, max_epochs=9, tensorboard=False)
    short.folder.mkdir(parents=True)
    at = {n: train_on_paper(short, n).save(tmp_path / f"{n}.ckpt").stat().st_size for n in (1000, 1500)}
    state = long.state
    assert state.save(tmp_path / "long.ckpt").stat().st_size < 1.2 * max(at.values())
    assert len(state._repr_html_()) < 60_000 and len(long.log._repr_html_()) < 60_000
    assert len(long.curves()["validation"][0]) < 1100


def test_state_and_history_give_what_they_gave(long, tmp_path):
    for state in (long.state, TrainerState.load(long.folder, toy_model()), long.state.snapshot()):
        assert [r["epoch"] for r in state.epochs] == list(range(MANY)) and len(state.epochs) == MANY
        assert state.epochs[1000]["valid_loss"] == 1 + 501 / MANY and np.isnan(state.epochs[7]["valid_loss"])
        assert state.history["step"].tolist() == list(range(2, 2 * MANY + 2, 2))
        assert len(state.history.batches["loss"]) == 2 * MANY
        assert state.best == {"epoch": 1501, "loss": 1.0} and state.best_step == 3004
    facts = read_facts(long.folder)
    assert (facts.epochs, facts.step, facts.best, facts.best_epoch) == (MANY, 2 * MANY, 1.0, 1502)
    assert checkpoint_labels(long.checkpoints, long.state)[1] == ("after epoch 1502, the best", 3004)


def test_it_is_set_back_to_any_epoch_that_has_a_checkpoint(long):
    state = TrainerState.load(long.folder, toy_model())
    state.rewind(100)
    assert (state.epoch, state.global_step, len(state.epochs), state.best["epoch"]) == (100, 200, 100, 99)
    with pytest.raises(DataError, match="end of 101 epochs; there are those of 100, 1502, 4000"):
        long.state.rewind(101)


def test_a_file_that_left_its_folder_has_the_last_epochs(long, tmp_path):
    path = long.state.save(tmp_path / "alone.ckpt")
    tree = load_checkpoint(path)
    save_checkpoint(path, tree | {"log_path": ""})
    state = TrainerState.load(path, toy_model())
    assert [r["epoch"] for r in state.epochs[-500:]] == list(range(MANY - 500, MANY))
    assert state.best_step == 3004 and state.epoch == MANY and "best" in state._repr_html_()
    assert state.history["epoch"][-1] == MANY - 1


def test_a_checkpoint_of_before_has_all_of_them(long, tmp_path):
    path = long.state.save(tmp_path / "before.ckpt")
    tree = load_checkpoint(path)
    save_checkpoint(path, tree | {"epochs": list(long.state.epochs), "log_path": ""})
    state = TrainerState.load(path, toy_model())
    assert [r["epoch"] for r in state.epochs] == list(range(MANY)) and state.best_step == 3004
    assert state.save(tmp_path / "now.ckpt").stat().st_size < path.stat().st_size / 2


def test_an_interrupted_run_keeps_the_same_records(tmp_path):
    trainers = [fit(tmp_path, name, max_epochs=9, tensorboard=False) for name in ("whole", "parts")]
    for trainer in trainers:
        trainer.folder.mkdir(parents=True)
    whole = train_on_paper(trainers[0], 2600)
    for until in (700, 1300, 2599, 2600):
        trainers[1].use(TrainerState.load(trainers[1].folder, toy_model()) if until > 700 else None)
        parts = train_on_paper(trainers[1], until)
    assert same_states(whole, parts) == []


def test_it_goes_on(long):
    trainer = fit(long.folder.parent, max_epochs=MANY + 1, keep_checkpoints=9, tensorboard=False)
    state = trainer.train_and_validate()
    assert len(state.epochs) == MANY + 1 == state.epoch and len(RunLog(trainer.folder).records("epoch")) == MANY + 1
