"""A SIGTERM to a script that trains: the state is saved first, then the process ends by it."""

import os
import signal

import pytest
from helpers_training import Fit, fit

from tractkit.training.state import TrainerState


class Terminates(Fit):
    def compute_batch_loss(self, batch):
        if self.state.global_step == 4 and self.session.block == "training":
            os.kill(os.getpid(), signal.SIGTERM)
        return super().compute_batch_loss(batch)


@pytest.fixture
def raised(monkeypatch):
    """The signals that would have ended this process."""
    found = []
    monkeypatch.setattr(signal, "raise_signal", found.append)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield found
    signal.signal(signal.SIGTERM, before)


def test_a_terminated_script_saves_and_then_ends(tmp_path, raised):
    trainer = fit(tmp_path, kind=Terminates)
    trainer.train_and_validate()
    assert raised == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert TrainerState.load(tmp_path / "run", trainer.model).global_step == 5
    assert trainer.status.phase == "stopped" and "Terminated in epoch 1 after batch 5; saved" in trainer.status.message


def test_a_handler_of_the_users_own_stays(tmp_path, raised):
    seen = []
    signal.signal(signal.SIGTERM, own := lambda *_: seen.append(1))
    trainer = fit(tmp_path, kind=Terminates)
    assert trainer.train_and_validate().global_step == 18 and seen == [1] and not raised
    assert signal.getsignal(signal.SIGTERM) is own
