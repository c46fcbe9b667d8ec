"""What a child class overrides is called wherever it trains; and little of ours lies between a user's call and her
loss."""

from collections import Counter

import pytest
from helpers_training import FitFrames, FitOverrides, fit, same_states

from tractkit.training.state import TrainerState


def train(trainer, where: str) -> TrainerState:
    """Train in the foreground, in a thread, or in a process."""
    if where == "foreground":
        return trainer.train_and_validate()
    trainer.start(process=where == "process")
    return trainer.wait()


WHERE = ["foreground", "thread", "process"]


@pytest.mark.parametrize("where", WHERE)
def test_every_step_can_be_overridden(tmp_path, where):
    trainer = fit(tmp_path, kind=FitOverrides, max_epochs=2)
    state = train(trainer, where)
    called = Counter((tmp_path / "run.called").read_text().split())
    assert called == {
        "train_and_validate": 1,
        "train_one_epoch": 2,
        "validate_one_epoch": 2,
        "run_one_batch": 16,
        "compute_batch_loss": 16,
        "back_propagation": 12,
        "fix_parameters": 12,
        "save_best_model": called["save_best_model"],
    }
    assert called["save_best_model"] >= 1
    assert same_states(state, fit(tmp_path, "plain", max_epochs=2).train_and_validate()) == []


@pytest.mark.parametrize("where", WHERE)
def test_few_frames_lie_between_the_call_and_the_loss(tmp_path, where):
    train(fit(tmp_path, kind=FitFrames, max_epochs=1), where)
    assert 1 <= int((tmp_path / "run.frames").read_text()) <= 5
