"""`best_model/` has the weights of the best epoch, whatever happened to the folder or to a write of it."""

import shutil

import numpy as np
import pytest
import torch
from helpers_data import make_file
from helpers_training import Fit, Points, fit, streamline_trainer, toy_model
from torch import nn

from tractkit.models.base import load_model, save_model
from tractkit.runs.checkpoint import load_checkpoint
from tractkit.training import loop
from tractkit.training.policy import LossStop, Patience


class Scripted(Fit):
    """Validation losses as written in `losses`."""

    losses = (3.0, 2.0, 4.0, 5.0, 1.0, 6.0)

    def validate_one_epoch(self):
        super().validate_one_epoch()
        return self.losses[self.state.epoch]


def is_best_model(trainer) -> bool:
    """Whether `best_model/` has the weights of the best checkpoint."""
    tree = load_checkpoint(trainer.checkpoints.path(trainer.state.best_step))
    kept = load_model(trainer.folder / "best_model", toy_model()).state_dict()
    return all(torch.equal(kept[k], v) for k, v in tree["model"]["weights"].items())


def break_one_write(monkeypatch, number: int) -> None:
    """Let the write of a best model of this number fail, as on a full disk."""
    calls = []

    def write(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise OSError(28, "No space left on device")
        save_model(*args, **kwargs)

    monkeypatch.setattr(loop, "save_model", write)


@pytest.mark.parametrize("background", [False, True])
def test_a_best_model_that_could_not_be_written_comes_right(tmp_path, monkeypatch, background):
    break_one_write(monkeypatch, 2)
    trainer = fit(tmp_path, kind=Scripted, max_epochs=3, save_in_background=background)
    with pytest.raises(OSError, match="No space"):
        trainer.train_and_validate()
    again = fit(tmp_path, kind=Scripted, max_epochs=4, save_in_background=background)
    again.train_and_validate()
    assert again.state.best["epoch"] == 1 and is_best_model(again)


def test_a_best_model_that_was_deleted_is_written_again(tmp_path):
    trainer = fit(tmp_path, kind=Scripted, max_epochs=4)
    trainer.listeners.append(
        lambda event, t: shutil.rmtree(t.folder / "best_model") if event == "epoch" and t.state.epoch == 3 else None)
    trainer.train_and_validate()
    assert is_best_model(trainer)
    shutil.rmtree(trainer.folder / "best_model")
    again = fit(tmp_path, kind=Scripted, max_epochs=4)
    again.train_and_validate()
    assert "Nothing left" in again.status.message and is_best_model(again)


def test_a_branch_has_the_best_model_of_its_parent(tmp_path):
    trainer = fit(tmp_path, kind=Scripted, max_epochs=4)
    trainer.train_and_validate()
    branch = trainer.fork("branch")
    branch.change(max_epochs=3)
    branch.run_here(lambda t: None, is_part=True)
    tree = load_checkpoint(trainer.checkpoints.path(trainer.state.best_step))
    kept = load_model(branch.folder / "best_model", toy_model()).state_dict()
    assert all(torch.equal(kept[k], v) for k, v in tree["model"]["weights"].items())


def test_a_run_that_was_set_back_has_the_best_model_of_then(tmp_path):
    trainer = fit(tmp_path, kind=Scripted, max_epochs=5, keep_checkpoints=9)
    trainer.train_and_validate()
    assert trainer.state.best["epoch"] == 4
    trainer.rewind(4)
    trainer.run_here(lambda t: None, is_part=True)
    assert trainer.state.best["epoch"] == 1 and is_best_model(trainer)


def test_where_its_checkpoint_is_gone_that_is_said(tmp_path):
    trainer = fit(tmp_path, kind=Scripted, max_epochs=5, keep_checkpoints=2)
    trainer.train_and_validate()
    trainer.rewind(4)
    trainer.run_here(lambda t: None, is_part=True)
    assert any("best_model" in text and "epoch 2" in text for text in trainer.messages)


def test_what_a_user_keeps_there_is_left_alone(tmp_path):
    class Average(Fit):
        def save_best_model(self):
            save_model(nn.Linear(1, 1), self.folder / "best_model")

    trainer = fit(tmp_path, kind=Average, max_epochs=2)
    trainer.train_and_validate()
    kept = load_model(trainer.folder / "best_model", nn.Linear(1, 1))
    assert kept.weight.shape == (1, 1)

    class Nowhere(Fit):
        def save_best_model(self):
            pass

    trainer = fit(tmp_path, "other", kind=Nowhere, max_epochs=1)
    trainer.train_and_validate()
    assert not (trainer.folder / "best_model").exists()


def test_a_model_that_a_user_chose_as_the_best_stays(tmp_path):
    class Last(Scripted):
        def train_and_validate(self):
            while self.state.epoch < 3:
                self.train_one_epoch()
                self.validate_one_epoch()
                self.save_best_model()  # of each epoch, whatever its loss

    trainer = fit(tmp_path, kind=Last, max_epochs=3)
    trainer.train_and_validate()
    kept = load_model(trainer.folder / "best_model", toy_model())
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), trainer.model.parameters(), strict=True))


# -- a validation that finds nothing

class WithoutTargets(Fit):
    def compute_batch_loss(self, batch):
        loss, n = super().compute_batch_loss(batch)
        return (loss, n) if self.session.block == "training" else (loss * float("nan"), 0)


def test_a_validation_set_without_points_is_refused_in_the_first_epoch(tmp_path):
    trainer = fit(tmp_path, kind=WithoutTargets, patience=2, max_epochs=9)
    with pytest.raises(ValueError, match="validation.*no points.*2 batches"):
        trainer.train_and_validate()
    assert trainer.state.epoch == 0 and trainer.checkpoints.steps()[-1] == 6  # the epoch of training is saved
    state = fit(tmp_path, points=Points(n_valid=0)).train_and_validate()
    assert state.epoch == 3 and "valid_loss" not in state.epochs[0]


@pytest.mark.parametrize("policy", [Patience(2), LossStop()])
def test_no_message_compares_with_infinity(policy):
    with pytest.raises(Exception, match="not finite|no number") as stopped:
        for epoch in range(3):
            policy.epoch_finished(epoch, train_losses=[float("nan")], metrics={"valid_loss": float("nan")})
    assert "inf" not in str(stopped.value).replace("finite", "")


@pytest.mark.parametrize("n, points, what", [(0, 9, "no streamline"), (3, 1, "3 streamlines.*one point")])
def test_a_validation_set_without_targets_is_refused_before_the_first_epoch(tmp_path, n, points, what):
    data = make_file(tmp_path / "data", n_subjects=2, n=4, points=(8, 9))[0]
    trainer = streamline_trainer(data, tmp_path, max_epochs=1)
    lines = trainer.batch_loader.dataset.validation_set["sub-1"].streamlines["streamlines"]
    lines._offsets, lines.lengths_mm = np.arange(n + 1) * points, lines.lengths_mm[:n]
    with pytest.raises(ValueError, match=f"validation.*{what}.*load_validation=False"):
        trainer.train_and_validate()
    assert not list(trainer.log.records("batch"))
    trainer.batch_loader.dataset.load_data(load_validation=False)
    assert trainer.train_and_validate().epoch == 1


@pytest.mark.parametrize("left", [0, 100, -4])
def test_a_best_model_that_is_cut_is_written_again(tmp_path, left):
    trainer = fit(tmp_path, kind=Scripted, max_epochs=4)
    trainer.train_and_validate()
    file = trainer.folder / "best_model/model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    again = fit(tmp_path, kind=Scripted, max_epochs=4)
    again.train_and_validate()
    assert is_best_model(again)


def test_a_file_in_the_place_of_the_best_model_is_named(tmp_path):
    trainer = fit(tmp_path, kind=Scripted, max_epochs=4)
    trainer.train_and_validate()
    shutil.rmtree(trainer.folder / "best_model")
    (trainer.folder / "best_model").write_text("mine")
    again = fit(tmp_path, kind=Scripted, max_epochs=4)
    with pytest.raises(
        FileExistsError, match="a file is in the place of the folder of a model: move it away.*best_model"
    ):
        again.train_and_validate()
    assert (trainer.folder / "best_model").read_text() == "mine"
    (trainer.folder / "best_model").unlink()
    again.train_and_validate()
    assert is_best_model(again)
