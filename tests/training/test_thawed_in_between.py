"""Layers that are thawed while a training runs, and steps of models whose forward changes more than buffers."""

import pytest
import torch
from helpers_training import Fit, fit, toy_model
from torch import nn


class Thaws(Fit):
    def train_one_epoch(self):
        if self.state.epoch >= 1:
            self.model[0].requires_grad_(True)
        return super().train_one_epoch()


def test_a_layer_that_is_thawed_in_a_training_is_named(tmp_path):
    model = toy_model()
    model[0].requires_grad_(False)
    trainer = fit(tmp_path, kind=Thaws, model=model)
    with pytest.raises(
        ValueError, match=r"0\.weight, 0\.bias can be trained now, and the optimizer does not have them"
    ):
        trainer.train_and_validate()
    assert trainer.state.epoch == 1
    again = fit(tmp_path, model=model, accept=["optimizer"])
    before = model[0].weight.clone()
    again.train_and_validate()
    assert again.status.phase == "finished" and not torch.equal(model[0].weight, before)


class Counts(nn.Module):
    """Its output depends on the number of its calls, which is in its extra state."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.line, self.calls = nn.Linear(1, 1), 0

    def forward(self, x):
        self.calls += self.training
        return self.line(x) * (1 + .1 * self.calls)

    def get_extra_state(self):
        return self.calls

    def set_extra_state(self, calls):
        self.calls = calls


class Teacher(nn.Module):
    """A frozen copy of its layer follows it in each forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.line, self.mean = nn.Linear(1, 1), nn.Linear(1, 1).requires_grad_(False)

    def forward(self, x):
        if self.training:
            self.mean.weight.data.lerp_(self.line.weight.data, .1)
        return self.line(x) + self.mean(x)


class Clamped(nn.Linear):
    """Its weight is changed in forward."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(1, 1)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.weight.mul_(.9)
        return super().forward(x)


class Fails(Fit):
    at: int | None = None

    def compute_batch_loss(self, batch):
        loss = super().compute_batch_loss(batch)
        if self.state.global_step == self.at:
            type(self).at = None
            raise KeyboardInterrupt
        return loss


@pytest.mark.parametrize("model", [Counts, Teacher, Clamped])
def test_a_step_of_a_model_that_changes_more_is_not_undone_by_halves(tmp_path, model):
    whole = fit(tmp_path, "whole", model=model())
    whole.train_and_validate()
    cut = fit(tmp_path, "cut", model=model(), kind=type("Fails", (Fails,), {"at": 8}))
    with pytest.raises(KeyboardInterrupt):
        cut.train_and_validate()
    cut.train_and_validate()
    assert any("going back" in text for text in cut.messages)
    for a, b in zip(whole.model.state_dict().values(), cut.model.state_dict().values(), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
