"""Plain Python attributes of a model that change in a step are not in the state: that is said, once."""

import random

import numpy as np
import pytest
import torch
from helpers_data import make_file
from helpers_training import Fit, Points, fit, streamline_trainer, toy_model
from torch import nn

from tractkit.data.loader import BatchLoaderOneInput
from tractkit.models.learn2track import Learn2Track
from tractkit.models.unsaved import UnsavedAttributes, plain_attributes
from tractkit.training.policy import Policy


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


@pytest.mark.parametrize(
    "do, name", [(increase, "n"), (append, "seen"), (average, "means"), (once, "n"), (nothing, "")]
)
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


class Means(nn.Module):
    """Keeps a running mean in a buffer: one that is saved, or not; also in a module of torch's."""

    def __init__(self, persistent, changes=True, of_torch=False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 1))
        self.changes, self.owner = changes, [self.net if of_torch else self]
        self.owner[0].register_buffer("mean", torch.zeros(1), persistent=persistent)

    def forward(self, x):
        if self.training:
            self.owner[0].mean = self.owner[0].mean * 0.9 + x.detach().mean() * self.changes
        return self.net(x)


@pytest.mark.parametrize("model, name", [
    (Means(False), "mean"), (Means(False, of_torch=True), "net.mean"), (Means(True), ""), (Means(False, False), "")])
def test_a_buffer_that_is_not_saved_is_named_if_it_changes(tmp_path, model, name):
    trainer = fit(tmp_path, model=model, max_epochs=2)
    trainer.train_and_validate()
    assert [m.split()[2] for m in said(trainer)] == ([name] if name else [])
    assert all("persistent=False" in m for m in said(trainer))


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


class Thing:
    pass


def drawn(part): part.g.random()
def drawn_by_torch(part): torch.rand(1, generator=part.g)
def drawn_in_a_list(part): part.g[0].normal()
def in_place(part): part.g += 1
def anew(part): part.g = part.g * .5 + 1
def added(part): part.g.add(len(part.g))
def in_a_list(part): part.g[0] += 1


OTHERS = {
    "default_rng": (lambda: np.random.default_rng(0), drawn), "RandomState": (lambda: np.random.RandomState(0), drawn),
    "random.Random": (lambda: random.Random(0), drawn), "torch.Generator": (torch.Generator, drawn_by_torch),
    "list of them": (lambda: [np.random.default_rng(0)], drawn_in_a_list),
    "tensor": (lambda: torch.zeros(3), in_place), "another tensor": (lambda: torch.zeros(3), anew),
    "array": (lambda: np.zeros(3), in_place), "scalar": (lambda: np.float32(1), in_place),
    "large tensor": (lambda: torch.zeros(600_000), in_place), "list of tensors": (lambda: [torch.zeros(2)], in_a_list),
    "dict of arrays": (lambda: {0: np.zeros(2)}, in_a_list), "set": (set, added)}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_values(kind):
    make, do = OTHERS[kind]
    part = Part(do)
    part.g = make()
    unsaved = UnsavedAttributes(nn.Sequential(part))
    with unsaved.watched():
        part(torch.zeros(1, 1))
    assert [note.split()[2] for note in unsaved.notes] == ["0.g"]
    part.do, unsaved = nothing, UnsavedAttributes(nn.Sequential(part))
    with unsaved.watched():
        part(torch.zeros(1, 1))
    assert unsaved.notes == []


def keep_activation(part): part.g = part.net(torch.rand(4, 1)).tanh()
def same_mask(part): part.g = torch.ones(600_000).bool()
def object_arrays(part): part.g = np.array([Thing()])


@pytest.mark.parametrize("do", [keep_activation, same_mask, object_arrays])
def test_no_false_alarm_of_what_is_made_anew_in_each_step(do):
    part = Part(do)
    unsaved = UnsavedAttributes(part)
    for _ in range(3):
        with unsaved.watched():
            part(torch.zeros(1, 1))
    assert unsaved.notes == []


class Owner(Fit):
    """A child class with attributes of its own."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.n, self.draws, self.crit, self.scale = 0, np.random.default_rng(0), nn.BatchNorm1d(1), 2.0
        self.part, self.settled = next(self.model.children()), nn.BatchNorm1d(1).eval()

    def compute_batch_loss(self, batch):
        self.do()
        return super().compute_batch_loss(batch)

    def do(self): pass


class Counts(Owner):
    def do(self): self.n += 1


class Draws(Owner):
    def do(self): self.draws.random()


class Normalizes(Owner):
    def do(self): self.crit(torch.rand(4, 1))


class Evaluates(Owner):
    def do(self): self.settled(torch.rand(4, 1))


@pytest.mark.parametrize(
    "kind, name", [(Counts, "n"), (Draws, "draws"), (Normalizes, "crit"), (Owner, ""), (Evaluates, "")]
)
def test_an_attribute_of_a_trainer(tmp_path, kind, name):
    trainer = fit(tmp_path, kind=kind, max_epochs=1, accumulate=2)
    trainer.train_and_validate()
    assert [m.split()[2] for m in said(trainer)] == ([name] if name else [])
    assert all(m.startswith("The trainer's") and "self.state.global_step" in m for m in said(trainer))


class DrawsWhileLoading(Points):
    """A loader with a generator of its own, a cache and buffers."""

    def __init__(self, draws):
        super().__init__()
        self.draws, self.rng, self.cache, self.out = draws, np.random.default_rng(0), {}, np.zeros(8)

    def load_batch_streamlines(self, ids, *, epoch, training):
        self.cache[tuple(ids)] = self.out = self.out + 1
        if self.draws:
            self.rng.random()
        return super().load_batch_streamlines(ids, epoch=epoch, training=training)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("draws", [True, False])
def test_a_generator_of_a_loader(tmp_path, prefetch, draws):
    trainer = fit(tmp_path, points=DrawsWhileLoading(draws), max_epochs=2, prefetch=prefetch)
    trainer.train_and_validate()
    assert len(said(trainer)) == draws
    assert all(m.startswith("The loader's rng") and "default_rng((seed, epoch, *ids))" in m for m in said(trainer))


def test_loaders_of_this_package_have_nothing_to_name(tmp_path):
    class Own(BatchLoaderOneInput):
        pass

    trainer = streamline_trainer(
        make_file(tmp_path / "data", n_subjects=2, n=12, points=(12, 20))[0], tmp_path / "runs", max_epochs=1
    )
    trainer.batch_loader.__class__ = Own
    trainer.train_and_validate()
    assert said(trainer) == []


GENERATORS = {"np": np.random.default_rng(3), "old": np.random.RandomState(3), "py": random.Random(3),
              "torch": torch.Generator().manual_seed(3)}
RNG, OLD, PY, TORCH = GENERATORS.values()


class GlobalRng(Part):
    def forward(self, x): return super().forward(x) + RNG.random()


class GlobalOld(Part):
    def forward(self, x): return super().forward(x) + OLD.rand()


class GlobalPy(Part):
    def forward(self, x): return super().forward(x) + PY.random()


class GlobalTorch(Part):
    def forward(self, x): return super().forward(x) + torch.rand((), generator=TORCH)


class InDict(Part):
    def forward(self, x): return super().forward(x) + GENERATORS["np"].random()


def noise(): return max(RNG.random() for _ in range(2))


class InHelper(Part):
    def forward(self, x): return super().forward(x) + noise()


class InClosure(Part):
    def __init__(self, do):
        super().__init__(do)
        g = random.Random(3)
        self.f = lambda: g.random()

    def forward(self, x): return super().forward(x) + self.f()


class Augment:
    def __init__(self): self.rng = np.random.default_rng(3)

    def __call__(self, x): return x + self.rng.random()


class InObject(Part):
    def __init__(self, do):
        super().__init__(do)
        self.augment = Augment()

    def forward(self, x): return super().forward(self.augment(x))


class InHook(Part):
    def __init__(self, do):
        super().__init__(do)
        self.net.register_forward_hook(lambda module, x, y: y + RNG.random())


class MadeInCall(Part):
    def forward(self, x): return super().forward(x) + np.random.default_rng((3, len(x))).random()


class SetInCall(Part):
    def forward(self, x):
        TORCH.manual_seed(len(x))
        PY.seed(3)
        return super().forward(x) + torch.rand((), generator=TORCH) + PY.random()


class NotUsed(Part):
    def __init__(self, do):
        super().__init__(do)
        self.n = RNG.integers(3)


@pytest.mark.parametrize("kind, name", [
    (GlobalRng, "RNG"), (GlobalOld, "OLD"), (GlobalPy, "PY"), (GlobalTorch, "TORCH"), (InDict, "GENERATORS"),
    (InHelper, "RNG"), (InClosure, "g"), (InObject, "augment.rng"), (InHook, "RNG"),
    (MadeInCall, ""), (SetInCall, ""), (NotUsed, "")])
def test_a_generator_in_the_code_of_a_model_is_named_once(kind, name):
    part = kind(nothing)
    unsaved = UnsavedAttributes(nn.Sequential(part))
    for _ in range(4):
        with unsaved.watched():
            part(torch.zeros(1, 1))
        RNG.random() if kind is NotUsed else None
        unsaved.look_at_generators()
    assert [note.split()[2] for note in unsaved.notes] == ([name] if name else [])
    assert all("is not saved" in note for note in unsaved.notes)


class LossDraws(Fit):
    def compute_batch_loss(self, batch):
        loss, n = super().compute_batch_loss(batch)
        return loss * (1 + RNG.random()), n


class LoadDraws(Points):
    def load_batch_streamlines(self, ids, *, epoch, training):
        x, y = super().load_batch_streamlines(ids, epoch=epoch, training=training)
        return x + float(RNG.random()), y


class PlanDraws(Points):
    def plan(self, epoch, subset):
        return RNG.permutation(super().plan(epoch, subset))


class PlanDrawsOwn(Points):
    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(3)

    def plan(self, epoch, subset):
        return self.rng.permutation(super().plan(epoch, subset))


SHARED = np.random.mtrand._rand


class SharedDraws(Fit):
    """With a variable for a generator that is seeded."""

    def compute_batch_loss(self, batch):
        loss, n = super().compute_batch_loss(batch)
        return loss * (1 + SHARED.rand()), n


class PolicyDraws(Policy):
    def epoch_finished(self, epoch, *, train_losses, metrics):
        self.x = float(RNG.random())


@pytest.mark.parametrize("options, start", [
    (dict(kind=LossDraws), "The trainer's RNG (in compute_batch_loss)"),
    (dict(points=LoadDraws()), "The loader's RNG (in load_batch_streamlines)"),
    (dict(points=PlanDraws()), "The loader's RNG (in plan)"),
    (dict(policies=[PolicyDraws()]), "The policy's RNG (in epoch_finished)"), ({}, ""),
    (dict(kind=SharedDraws), "")])
def test_a_generator_in_the_code_of_a_training_is_named_once(tmp_path, options, start):
    trainer = fit(tmp_path, max_epochs=2, tensorboard=False, **options)
    trainer.listeners.append(lambda event, t: SHARED.rand())
    trainer.train_and_validate()
    assert [m.startswith(start) for m in said(trainer)] == [True] * bool(start)


def test_a_generator_that_a_sampler_keeps_is_named(tmp_path):
    trainer = fit(tmp_path, max_epochs=1, tensorboard=False)
    trainer.batch_sampler = PlanDrawsOwn()
    trainer.train_and_validate()
    assert [m.split()[1:3] for m in said(trainer)] == [["sampler's", "rng"]]


def test_a_generator_without_a_state_stops_nothing(tmp_path):
    part = Part(drawn)
    part.g = random.SystemRandom()
    fit(tmp_path, model=part, max_epochs=1, tensorboard=False).train_and_validate()
