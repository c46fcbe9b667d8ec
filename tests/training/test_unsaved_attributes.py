"""Plain Python attributes of a model that change in a step are not in the state: that is said, once."""

import pytest
import torch
from helpers_training import Fit, Points, fit, toy_model
from torch import nn

from tractkit.models.learn2track import Learn2Track
from tractkit.models.unsaved import UnsavedAttributes, plain_attributes


class Part(nn.Module):
    """Does something with an attribute in each call."""

    def __init__(self, do):
        super().__init__()
        self.net, self.do, self.n, self.seen, self.means = nn.Linear(1, 1), do, 0, [], {"mean": 0.0}

    def forward(self, x):
        self.do(self)
        return self.net(x)


def increase(part): part.n += 1
def append(part): part.seen.append(part.n)
def average(part): part.means["mean"] += 0.5
def once(part): part.n = 1
def nothing(part): pass


def said(trainer):
    return [m for m in trainer.messages if "is not saved" in m or "are not saved" in m]


@pytest.mark.parametrize("do, name", [(increase, "n"), (append, "seen"), (average, "means"), (once, "n"), (nothing, "")])
def test_an_attribute_that_changes_is_named_once(tmp_path, do, name):
    trainer = fit(tmp_path, model=nn.Sequential(toy_model(), Part(do)), max_epochs=2)
    trainer.train_and_validate()
    assert [m.split()[2] for m in said(trainer)] == ([f"1.{name}"] if name else [])
    assert all("register_buffer" in m and "get_extra_state" in m for m in said(trainer))


def test_also_one_that_the_loss_changes_and_in_slices(tmp_path):
    class FitCounts(Fit):
        def compute_batch_loss(self, batch):
            self.model.n += 1
            return super().compute_batch_loss(batch)
    trainer = fit(tmp_path, kind=FitCounts, model=Part(nothing), accumulate=2)
    trainer.train_and_validate()
    assert len(said(trainer)) == 1


class Kept(Part):
    """Saves its counter."""

    def get_extra_state(self):
        return self.n

    def set_extra_state(self, n):
        self.n = n


def test_what_is_saved_is_not_named(tmp_path):
    trainer = fit(tmp_path, model=nn.Sequential(toy_model(), Kept(increase)), max_epochs=1)
    trainer.train_and_validate()
    assert said(trainer) == []


def test_one_set_between_steps_by_a_policy_is_not_named(tmp_path):
    trainer = fit(tmp_path, model=Part(nothing), max_epochs=1)
    trainer.listeners.append(lambda event, t: setattr(t.model, "n", t.state.global_step))
    trainer.train_and_validate()
    assert said(trainer) == []


class Caching(nn.Module):
    """Keeps a shape from its first call, as many models do."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)

    def forward(self, x):
        self.last_shape = tuple(x.shape)
        return self.net(x)


FIELD = {
    "lstm": lambda: nn.LSTM(2, 2, num_layers=2), "gru": lambda: nn.GRU(2, 2), "caching": Caching,
    "transformer": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(2, 1, 4, batch_first=True), 1),
    "norms": lambda: nn.Sequential(nn.BatchNorm1d(2), nn.LayerNorm(2), nn.Dropout(.5), nn.PReLU()),
    "spectral": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)),
    "old spectral": lambda: nn.utils.spectral_norm(nn.Linear(2, 2)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    "lazy": lambda: nn.LazyLinear(2),
}


@pytest.mark.parametrize("kind", FIELD)
def test_no_false_alarm(kind):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.rate, self.sizes = FIELD[kind](), .5, [1, 2]

        def forward(self, x):
            return self.part(x)

    model = Model()
    unsaved = UnsavedAttributes(model)
    for training in (True, False, True):
        with unsaved.watched():
            model.train(training)
            y = model(torch.rand(4, 2))
            (y[0] if isinstance(y, tuple) else y).sum().backward()
    assert unsaved.notes == []
    assert {"rate", "sizes"} <= plain_attributes(model).keys() <= {"rate", "sizes", "part.last_shape"}


def test_models_of_this_package_have_nothing_to_name():
    assert plain_attributes(Learn2Track(3)) == plain_attributes(toy_model()) == {}


def test_only_the_first_steps_are_looked_at(tmp_path):
    calls = iter(range(100))
    model = Part(lambda part: setattr(part, "n", max(0, next(calls) - 3)))
    trainer = fit(tmp_path, model=model, points=Points(n=6), max_epochs=1)
    trainer.train_and_validate()
    assert model.n > 0 and said(trainer) == []
