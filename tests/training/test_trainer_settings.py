"""The settings of a trainer: what they refuse, and in which words."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from tractkit.core.settings import settings_of
from tractkit.training.policy import Exponential, Patience
from tractkit.training.settings import TrainerSettings


@pytest.mark.parametrize(
    "name",
    [
        "max_epochs",
        "clip_grad",
        "num_threads",
        "max_batches_per_epoch_training",
        "max_batches_per_epoch_validation",
        "accumulate",
        "iterations_per_epoch",
        "validation_time_limit",
        "checkpoint_every_batches",
    ],
)
def test_numbers_that_must_be_positive(name):
    for wrong in (0, -1):
        values = {name: wrong}
        for make in (lambda v=values: TrainerSettings(**v), lambda v=values: replace(TrainerSettings(), **v)):
            with pytest.raises(ValueError, match=f"{name} must be positive, not {wrong}"):
                make()
    assert getattr(TrainerSettings(**{name: 3}), name) == 3


def test_settings_that_contradict_each_other():
    with pytest.raises(ValueError, match="give only one of iterations_per_epoch and max_batches_per_epoch_training"):
        TrainerSettings(iterations_per_epoch=5, max_batches_per_epoch_training=5)
    with pytest.raises(ValueError, match="accept knows 'data', 'plan', 'model' and 'optimizer', not weights"):
        TrainerSettings(accept=["data", "weights"])
    with pytest.raises(ValueError, match="amp must be 'bf16' or 'fp16', not 'half'"):
        TrainerSettings(amp="half")


def test_objects_are_taken_as_they_are():
    rate, patience = Exponential(.01, .5), Patience(3)
    made = TrainerSettings(
        rate, optimizer=torch.optim.SGD, device=torch.device("cpu"), policies=[patience], compile={"mode": "default"}
    )
    assert made.learning_rate is rate and made.policies == [patience] and made.optimizer is torch.optim.SGD
    assert TrainerSettings(patience=0).patience == 0  # files written before say it so
    with pytest.raises(FrozenInstanceError):
        made.max_epochs = 3


def test_what_can_change_while_training():
    assert {k: s.live for k, s in settings_of(TrainerSettings).items() if s.live is not None} == {
        "learning_rate": "from the next batch", "max_epochs": "", "patience": "", "clip_grad": "from the next batch"}
    assert all(s.help for s in settings_of(TrainerSettings).values())
