"""What an optimizer keeps goes by the names of the parameters: of layers that are frozen, thawed or moved."""

import copy

import pytest
import torch
from helpers_training import fit, same_states
from torch import nn

from tractkit.core.files import DataError
from tractkit.runs.checkpoint import load_checkpoint, save_checkpoint
from tractkit.training.state import TrainerState


class Net(nn.Module):
    """Two layers of one shape and a last one, made in an order; some of them frozen."""

    def __init__(self, order=("first", "second", "last"), frozen=()):
        super().__init__()
        made = {"first": nn.Linear(1, 1), "second": nn.Linear(1, 1), "last": nn.Linear(1, 1)}
        for name in order:
            setattr(self, name, made[name])
        with torch.no_grad():
            for i, name in enumerate(("first", "second", "last")):
                made[name].weight.fill_(.3 + i / 5)
                made[name].bias.fill_(i / 10)
        for name in frozen:
            getattr(self, name).requires_grad_(False)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def moments(state) -> dict[str, list[torch.Tensor]]:
    """What the optimizer keeps of each parameter, by its name."""
    names = {id(p): name for name, p in state.model.named_parameters()}
    return {names[id(p)]: [v for v in kept.values() if isinstance(v, torch.Tensor) and v.ndim]
            for p, kept in state.optimizer.state.items()}


def are_equal(a, b) -> bool:
    return len(a) == len(b) > 0 and all(map(torch.equal, a, b))


OPTIMIZERS = {
    "Adam": "Adam", "AdamW": "AdamW", "momentum": lambda ps: torch.optim.SGD(ps, lr=.01, momentum=.9),
    "class": torch.optim.NAdam}


def trained(folder, optimizer="Adam", **options):
    trainer = fit(folder, model=Net(**options), optimizer=optimizer, max_epochs=1)
    trainer.train_and_validate()
    return trainer


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_layers_in_another_order_get_their_own_moments(tmp_path, optimizer):
    before = moments(trained(tmp_path, OPTIMIZERS[optimizer]).state)
    moved = Net(order=("last", "second", "first"))
    state = fit(tmp_path, model=moved, optimizer=OPTIMIZERS[optimizer], max_epochs=1).take()
    after = moments(state)
    assert after.keys() == before.keys() and all(are_equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("then, now, said", [
    ((), ("first",), "first.weight"), (("first",), (), "first.weight"), (("first",), ("last",), "first.*last")])
def test_layers_frozen_or_thawed_are_named_and_can_be_accepted(tmp_path, optimizer, then, now, said):
    before = moments(trained(tmp_path, OPTIMIZERS[optimizer], frozen=then).state)
    with pytest.raises(ValueError, match=rf"(?s){said}.*accept=\['optimizer'\]"):
        fit(tmp_path, model=Net(frozen=now), optimizer=OPTIMIZERS[optimizer]).train_and_validate()
    with pytest.warns(UserWarning, match="keeps what it has of") as warned:
        state = fit(tmp_path, model=Net(frozen=now), optimizer=OPTIMIZERS[optimizer], accept=["optimizer"]).take()
    after = moments(state)
    assert after and all(are_equal(after[k], before[k]) for k in after)
    new = {k for k, p in state.model.named_parameters() if p.requires_grad} - before.keys()
    assert all(name in str(warned[0].message) for name in new)
    assert fit(tmp_path, model=Net(frozen=now), optimizer=OPTIMIZERS[optimizer],
               accept=["optimizer"]).train_and_validate().epoch == 3


def test_an_optimizer_that_is_an_object_goes_by_names_too(tmp_path):
    def made(model, names=("first", "second", "last")):
        groups = [{"params": getattr(model, name).parameters(), "lr": .01 * (i + 1)} for i, name in enumerate(names)]
        return torch.optim.SGD(groups, lr=.01, momentum=.9)

    model = Net()
    trainer = fit(tmp_path, model=model, optimizer=made(model), max_epochs=1)
    before, rates = moments(trainer.train_and_validate()), [.01, .02, .03]
    trainer.state.optimizer.param_groups[0]["lr"] = rates[0] = .5  # as a scheduler would
    trainer.save_checkpoint()
    model = Net()
    state = fit(tmp_path, model=model, optimizer=made(model, ("last", "first", "second")), max_epochs=1).take()
    assert all(are_equal(moments(state)[k], before[k]) for k in before)
    assert [g["lr"] for g in state.optimizer.param_groups] == [.03, .5, .02]
    model = Net()
    other = torch.optim.SGD(model.parameters(), lr=.7, momentum=.9)  # in one group
    with pytest.raises(ValueError, match=r"groups.*accept=\['optimizer'\]"):
        fit(tmp_path, model=model, optimizer=other).take()
    state = fit(tmp_path, model=model, optimizer=other, accept=["optimizer"]).take()
    assert all(are_equal(moments(state)[k], before[k]) for k in before) and other.param_groups[0]["lr"] == .7


def test_a_layer_thawed_in_this_kernel_is_not_left_out_in_silence(tmp_path):
    trainer = trained(tmp_path, frozen=("first",))
    before = moments(trainer.state)
    trainer.model.first.requires_grad_(True)
    trainer.change(max_epochs=2)
    with pytest.raises(ValueError, match=r"first.weight.*accept=\['optimizer'\]"):
        trainer.train_and_validate()
    again = fit(tmp_path, model=trainer.model, max_epochs=2, accept=["optimizer"])
    with pytest.warns(UserWarning, match="keeps what it has of"):
        again.take(trainer.state)
    assert all(are_equal(moments(again.state)[k], before[k]) for k in before)
    weight = again.model.first.weight.detach().clone()
    assert again.train_and_validate().epoch == 2 and not torch.equal(weight, again.model.first.weight)


def without_names(path):
    """Write a state as it was before the names of parameters were in it."""
    tree = load_checkpoint(path)
    tree["optimizer"] = {k: v for k, v in tree["optimizer"].items() if k not in ("format", "parameters")}
    save_checkpoint(path, tree)
    return path


def test_a_state_without_names_goes_on_by_position(tmp_path):
    whole = fit(tmp_path, "whole", model=Net()).train_and_validate()
    trainer = trained(tmp_path)
    old = trainer.state.save(tmp_path / "old.ckpt")
    path = without_names(trainer.checkpoints.path(trainer.state.global_step))
    assert are_equal(*(moments(s)["last.weight"] for s in (TrainerState.load(path, Net()), trainer.state)))
    assert same_states(fit(tmp_path, model=Net()).train_and_validate(), whole) == []
    frozen = Net(frozen=("first",))
    path = without_names(old)
    with pytest.raises(DataError, match=r"6 parameters.*4.*accept=\['optimizer'\]"):
        TrainerState.load(path, frozen)
    with pytest.warns(UserWarning, match="the optimizer starts anew"):
        state = TrainerState.load(path, frozen, accept=["optimizer"])
    assert not state.optimizer.state


def test_the_names_cannot_get_lost(tmp_path):
    state = trained(tmp_path).state
    tree = copy.deepcopy(state.state_dict())
    assert tree["optimizer"]["parameters"] == [name for name, _ in state.model.named_parameters()]
    for name in ("format", "parameters"):
        with pytest.raises(DataError, match="no whole state"):
            state.load_state_dict(tree | {"optimizer": {k: v for k, v in tree["optimizer"].items() if k != name}})
