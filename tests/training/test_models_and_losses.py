"""Ordinary models, optimizers and losses: trained, saved and resumed; or refused in one sentence of what to do."""

import math

import numpy as np
import pytest
import torch
from helpers_training import Fit, Points, fit, same_states, toy_model
from torch import nn

from tractkit.models.base import load_model, save_model
from tractkit.runs.weights import load_weights
from tractkit.training.state import TrainerState


class Counter(nn.Module):
    """Keeps a dict beside its weights."""

    def __init__(self):
        super().__init__()
        self.seen, self.last = 0, torch.zeros(2)

    def forward(self, x):
        if self.training:
            self.seen, self.last = self.seen + len(x), torch.tensor([x.min().item(), x.max().item()])
        return x

    def get_extra_state(self):
        return {"seen": self.seen, "last": self.last, "note": ["a", None]}

    def set_extra_state(self, state):
        self.seen, self.last = state["seen"], state["last"]


class Table(nn.Module):
    """A sparse embedding of the sign, and a layer."""

    def __init__(self, sparse=True):
        super().__init__()
        self.rows, self.layer = nn.Embedding(5, 3, sparse=sparse), nn.Linear(3, 1)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))

    def forward(self, x):
        return self.layer(self.rows((x[:, 0] * 2 + 2).long().clamp(0, 4)))


class Expanded(nn.Module):
    """Buffers of one number that is there many times, and of a part of something larger."""

    def __init__(self):
        super().__init__()
        self.layer = toy_model()
        self.register_buffer("ones", torch.ones(1).expand(16))
        self.register_buffer("part", torch.arange(10.)[2:4])

    def forward(self, x):
        return self.layer(x) * self.ones[0] + self.part[0] * 0


def extra():
    return nn.Sequential(*toy_model(), Counter())


MODELS = {"extra state": (extra, {}), "expanded buffer": (Expanded, {}),
          "sparse": (Table, dict(optimizer="SGD", weight_decay=0.0, clip_grad=.05)),
          "sparse, many": (Table, dict(optimizer="SGD", weight_decay=0.0, accumulate=2)),
          "sparse, Adagrad": (Table, dict(optimizer=torch.optim.Adagrad, weight_decay=0.0))}


@pytest.mark.parametrize("name", MODELS)
def test_trained_saved_and_resumed(tmp_path, name):
    make, options = MODELS[name]
    whole = fit(tmp_path, "whole", model=make(), **options)
    whole.train_and_validate()
    cut = fit(tmp_path, "cut", model=make(), **options)
    cut.step(2 if "many" in name else 4)
    cut.stop(wait=True)
    again = fit(tmp_path, "cut", model=make(), **options)
    again.train_and_validate()
    assert same_states(again.state, whole.state) == []
    whole.save_best_model()
    best = load_model(whole.folder / "best_model", make())
    assert all(torch.equal(a, b) for a, b in zip(best.parameters(), whole.model.parameters(), strict=True))
    assert TrainerState.load(whole.folder, model=make(), optimizer=again.optimizer).snapshot().global_step > 0
    load_weights(whole.checkpoints.path(whole.checkpoints.steps()[-1]), make())


def test_extra_state_is_in_every_file(tmp_path):
    trainer = fit(tmp_path, model=extra(), max_epochs=1)
    trainer.train_and_validate()
    best = load_model(trainer.folder / "best_model", extra())
    assert best[-1].seen == 48 and torch.equal(best[-1].last, trainer.model[-1].last)
    assert TrainerState.load(trainer.folder, model=extra()).model[-1].seen == 48
    class Odd(Counter):
        def get_extra_state(self):
            return {"when": complex(1)}

    with pytest.raises(TypeError, match="0._extra_state/when: a complex cannot be saved"):
        save_model(nn.Sequential(Odd()), tmp_path / "odd")


def test_sparse_gradients_are_clipped_by_their_norm(tmp_path):
    options = dict(optimizer="SGD", weight_decay=0.0, clip_grad=.05, max_epochs=1)
    dense, sparse = (
        fit(tmp_path, name, model=Table(sparse=name == "sparse"), **options) for name in ("dense", "sparse")
    )
    dense.train_and_validate(), sparse.train_and_validate()
    for a, b in zip(dense.model.parameters(), sparse.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert np.allclose(dense.log.batches()["grad_norm"], sparse.log.batches()["grad_norm"], rtol=1e-5)


def test_tied_weights_are_stored_once(tmp_path):
    def tied():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model

    model = tied()
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path, tied())[1].weight, model[0].weight)


# -- refused at the start

def frozen():
    return toy_model().requires_grad_(False)


REFUSED = {
    "LBFGS": (dict(optimizer=torch.optim.LBFGS), "LBFGS computes the loss several times .* back_propagation"),
    "LBFGS, made": (dict(optimizer=lambda p: torch.optim.LBFGS(p)), "LBFGS computes the loss several times"),
    "lazy": (dict(model=nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1))), "0.weight, 0.bias is not known yet .* call"),
    "lazy buffer": (dict(model=nn.Sequential(nn.Linear(1, 1), nn.LazyBatchNorm1d())), "call the model once on a batch"),
    "frozen": (dict(model=frozen()), "no weight of the model is trained: requires_grad is False"),
    "sparse, Adam": (
        dict(model=Table()),
        "gradient of the layer rows is sparse, which Adam cannot use: .* sparse=False",
    ),
    "sparse, decay": (dict(model=Table(), optimizer="SGD"), "which SGD with weight_decay cannot use"),
    "sparse, momentum": (dict(model=Table(), optimizer=lambda p: torch.optim.SGD(p, lr=.01, momentum=.9)),
                         "which SGD with momentum cannot use: .* without momentum"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_the_start(tmp_path, name):
    options, text = REFUSED[name]
    trainer = fit(tmp_path, **options)
    with pytest.raises(ValueError, match=text):
        trainer.train_and_validate()
    assert trainer.status.phase == "failed" and trainer.status.global_step == 0 and not trainer.checkpoints.steps()


def test_lbfgs_with_a_step_of_ones_own(tmp_path):
    class Own(Fit):
        def back_propagation(self, loss):
            x, y = self.batch

            def again():
                self.state.optimizer.zero_grad()
                value = nn.functional.mse_loss(self.model(x), y)
                value.backward()
                return value

            self.state.optimizer.step(again)
            return 1.0

    fit(tmp_path, kind=Own, optimizer=torch.optim.LBFGS, max_epochs=1, model=toy_model(0.0)).train_and_validate()


# -- losses

def returns(what):
    class Returns(Fit):
        def compute_batch_loss(self, batch):
            mean, n = super().compute_batch_loss(batch)
            return what(mean, n, self, batch)

    return Returns


@pytest.mark.parametrize("what, text", [
    (lambda mean, n, *_: mean, "returned a Tensor: it must return"),
    (lambda mean, n, *_: None, "returned a NoneType"),
    (lambda mean, n, *_: (mean, n, 3), "returned a tuple of 3"),
    (lambda mean, n, *_: (mean.item(), n), "returned a float as the mean loss"),
    (lambda mean, n, *_: (n, mean), "returned a int as the mean loss"),
    (lambda mean, n, *_: (mean.expand(8), n), r"a loss of shape \(8,\), one per point: take its mean"),
    (lambda mean, n, *_: (mean, None), "returned None as the number of points"),
    (lambda mean, n, *_: (mean, -1), "returned -1 as the number of points"),
    (lambda mean, n, *_: (mean, torch.ones(3)), "as the number of points"),
    (lambda mean, n, *_: (mean, math.nan), "returned nan as the number of points"),
    (lambda mean, n, *_: (mean.detach(), n), "a loss without a gradient"),
])
def test_what_is_no_loss_is_refused_at_the_first_batch(tmp_path, what, text):
    trainer = fit(tmp_path, kind=returns(what))
    with pytest.raises(TypeError, match=f"Returns.compute_batch_loss returned .*{text.removeprefix('returned ')}"):
        trainer.train_and_validate()
    assert trainer.state.global_step == 0 and trainer.checkpoints.steps() == [0]


@pytest.mark.parametrize("what", [
    lambda mean, n, *_: (mean, torch.tensor(n)), lambda mean, n, *_: (mean, np.int64(n)),
    lambda mean, n, *_: (mean.reshape(1), n), lambda mean, n, *_: [mean, n], lambda mean, n, *_: (mean, float(n)),
    lambda mean, n, *_: (mean, torch.tensor([n])), lambda mean, n, *_: (mean, np.array(n))])
def test_what_is_a_loss_in_another_form(tmp_path, what):
    whole, other = fit(tmp_path, "whole", max_epochs=1), fit(tmp_path, "other", kind=returns(what), max_epochs=1)
    whole.train_and_validate(), other.train_and_validate()
    assert same_states(whole.state, other.state) == []


def test_the_method_that_is_named_is_the_one_that_was_written(tmp_path):
    class Own(Fit):
        def run_one_batch(self, batch):
            return super().run_one_batch(batch)[0]

    with pytest.raises(TypeError, match="Own.run_one_batch returned a Tensor"):
        fit(tmp_path, kind=Own).train_and_validate()


# -- epochs without a number

def announced(trainer) -> list[str]:
    return [text for text in trainer.messages if "of epoch " in text]


def test_no_points_in_any_batch_is_announced_in_the_first_epoch(tmp_path):
    trainer = fit(tmp_path, kind=returns(lambda mean, n, trainer, _: (mean, 0 if trainer.model.training else n)))
    trainer.train_and_validate()
    text, = announced(trainer)
    assert text.startswith("The training of epoch 1 has no mean loss: n, the second value that compute_batch_loss")


def test_a_validation_that_is_no_number_is_announced_in_the_first_epoch(tmp_path):
    def nan_in_eval(mean, n, trainer, batch):
        return (mean if trainer.model.training else mean * float("nan")), n

    trainer = fit(tmp_path, kind=returns(nan_in_eval))
    trainer.listeners.append(lambda event, t: said.append(list(announced(t))) if event == "epoch" else None)
    said = []
    trainer.train_and_validate()
    assert [len(texts) for texts in said] == [1, 1, 1]
    assert "The validation loss of epoch 1 is nan: look at the validation data" in said[0][0]


def test_a_whole_epoch_of_numbers_is_announced_by_nothing(tmp_path):
    trainer = fit(tmp_path)
    trainer.train_and_validate()
    no_validation = fit(tmp_path, "no validation", points=Points(n_valid=0), max_epochs=1)
    no_validation.train_and_validate()
    assert announced(trainer) == [] == announced(no_validation)
