"""What another trainer holds is left alone, and a run says what it does not take over."""

import math

import pytest
import torch
from helpers_training import fit, same_states, toy_model

from tractkit.core.files import DataError


def test_a_folder_at_work_takes_no_checkpoint_of_another(tmp_path):
    one = fit(tmp_path)
    one.start(paused=True)
    one.step(3)
    other = fit(tmp_path)
    other.take()
    before = {p.name: p.read_bytes() for p in one.checkpoints.folder.iterdir()}
    with torch.no_grad():
        next(other.model.parameters()).add_(100)
    with pytest.raises(RuntimeError, match="another trainer is at work in"):
        other.save_checkpoint()
    assert {p.name: p.read_bytes() for p in one.checkpoints.folder.iterdir()} == before
    one.save_checkpoint()
    one.stop(wait=True)
    other = fit(tmp_path)
    other.take()
    assert same_states(other.state, one.state) == [] and other.save_checkpoint().exists()


def test_a_start_that_is_refused_has_failed(tmp_path):
    one, other = fit(tmp_path), fit(tmp_path)
    one.start(paused=True)
    one.step()
    other.start()
    with pytest.raises(RuntimeError, match="another trainer is at work"):
        other.wait()
    assert other.status.phase == "failed" and "another trainer is at work" in other.status.message
    assert one.status.phase == "paused"
    one.stop(wait=True)
    other.start()
    assert other.wait().epoch == other.settings.max_epochs


@pytest.mark.parametrize("kind", [torch.float16, torch.float64])
def test_weights_of_another_type_are_refused(tmp_path, kind):
    fit(tmp_path, max_epochs=1).train_and_validate()
    with pytest.raises(DataError, match=rf"torch.float32 -> {kind}.*accept=\['model'\]"):
        fit(tmp_path, model=toy_model().to(kind), max_epochs=2).train_and_validate()
    whole = fit(tmp_path, max_epochs=1)
    state = whole.take()
    with pytest.raises(ValueError, match=f"torch.float32 -> {kind}"):
        fit(tmp_path, "other", model=toy_model().to(kind)).train_and_validate(state)


def test_the_seed_of_a_run_is_kept_and_said(tmp_path):
    fit(tmp_path, max_epochs=1).train_and_validate()
    again = fit(tmp_path, max_epochs=2, rng=7)
    with pytest.warns(UserWarning, match="keeps the seed that it was begun with, rng=1234, not 7"):
        state = again.train_and_validate()
    assert state.seed == again.settings.rng == 1234 and "rng: 1234" in (again.folder / "config.yaml").read_text()
    assert same_states(state, fit(tmp_path, "whole", max_epochs=2).train_and_validate()) == []


@pytest.mark.parametrize("setting", [
    {"iterations_per_epoch": math.inf}, {"num_workers": math.inf}, {"num_threads": math.inf}, {"weight_decay": -1},
    {"checkpoint_every_seconds": -1}, {"learning_rate": 10**400}, {"max_epochs": 10**400}])
def test_numbers_that_cannot_be_used_leave_no_folder(tmp_path, setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))}"):
        fit(tmp_path, **setting)
    assert list(tmp_path.iterdir()) == []
