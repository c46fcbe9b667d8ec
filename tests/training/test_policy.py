"""Policies against plain arithmetic, over epochs, and cut at every place and gone on with."""

import copy
import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tractkit.training.policy import (
    TQDM,
    Constant,
    DecreasingOnPlateau,
    EarlyStopping,
    Exponential,
    LambdaEpoch,
    LoggerPolicy,
    LossStop,
    Patience,
    PerEpoch,
    Policy,
    Schedule,
    Switch,
    TimeProfiler,
    ValuePolicy,
    as_value_policy,
)


def values(policy, epochs):
    seen = []
    for epoch in range(epochs):
        policy.epoch_started(epoch)
        seen.append(policy.value)
    return seen


@pytest.mark.parametrize("policy, expected", [
    (Constant(3), [3.0] * 5),
    (ValuePolicy("text"), ["text"] * 5),
    (Exponential(16, .5), [16, 8, 4, 2, 1]),
    (Exponential(16, .5, step_length=2), [16, 16, 8, 8, 4]),
    (Exponential(16, .25, step_length=2, floordiv=False), [16, 8, 4, 2, 1]),
    (Exponential(16, .5, min_value=3, max_value=9), [9, 8, 4, 3, 3]),
    (Schedule(8, {1: .5, 3: .25}), [8, 4, 4, 1, 1]),
    (Schedule(8, {3: .25, 1: .5}), [8, 4, 4, 1, 1]),
    (Schedule.constant_multiplier(8, .5, [1, 2]), [8, 4, 2, 2, 2]),
    (Switch(8, {1: 3, 4: 5}), [8, 3, 3, 3, 5]),
    (Switch(8, {0: 1}), [1] * 5),
    (LambdaEpoch(lambda e, a, b: a - b * e, 10, b=2), [10, 8, 6, 4, 2]),
    (PerEpoch([3, 2]), [3, 2, 2, 2, 2]),
], ids=lambda p: type(p).__name__)
def test_values_of_epochs(policy, expected):
    """From the first, and the same at an epoch that is come to at once."""
    assert values(policy, 5) == expected
    for epoch in (4, 0, 2):
        policy.epoch_started(epoch)
        assert policy.value == expected[epoch]
    assert policy.state_dict() == {} and repr(policy).startswith(type(policy).__name__) and " at 0x" not in repr(policy)


def plateau(losses, initial, multiplier, patience, rtol, atol):
    """As the definition has it, in one loop."""
    value, margin, waited, seen = initial, math.inf, 0, []
    for loss in losses:
        if loss < margin:
            margin, waited = max(loss - atol, loss * (1 - rtol)), 0
        else:
            waited += 1
            if waited > patience:
                value, waited = value * multiplier, 0
        seen.append(value)
    return seen


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 10), max_size=25), st.integers(0, 3), st.floats(0, 0.5), st.floats(0, 2), st.integers(0, 25)
)
def test_decreasing_on_plateau(losses, patience, rtol, atol, cut):
    options = dict(initial=1.0, multiplier=.5, patience=patience, rtol=rtol, atol=atol)
    policy, seen = DecreasingOnPlateau(**options), []
    for i, loss in enumerate(losses):
        if i == cut:  # killed here, and gone on with
            old, policy = policy, DecreasingOnPlateau(**options)
            policy.load_state_dict(old.state_dict())
        policy.epoch_finished(i, train_losses=[loss - .1, loss + .1], metrics={})
        seen.append(policy.value)
    assert seen == plateau([float(np.mean([x - .1, x + .1])) for x in losses], **options)


def stopped_at(policy, losses):
    for epoch, loss in enumerate(losses):
        try:
            policy.epoch_finished(
                epoch, train_losses=loss if isinstance(loss, list) else [loss], metrics={"train_loss": loss}
            )
        except EarlyStopping:
            return epoch
    return None


@pytest.mark.parametrize(
    "losses, epoch",
    [
        ([1, 3, 3.1], 2),
        ([2, 1, 2.9, 0.9, 2.8], 4),
        ([1, 2, 3, 3, 3], None),
        ([2, [1, 3], [5, 8]], 2),
        ([1, math.nan], 1),
        ([math.nan], 0),
        ([1, math.inf], 1),
    ],
)
def test_loss_stop(losses, epoch):
    assert stopped_at(LossStop(), losses) == epoch
    first = LossStop()
    assert stopped_at(first, losses[:1]) is (0 if epoch == 0 else None)
    second = LossStop()
    second.load_state_dict(first.state_dict())
    if epoch:
        assert stopped_at(second, losses[1:]) == epoch - 1


def test_patience_counts_epochs():
    assert stopped_at(Patience(2), [3, 2, 2, 2]) == 3
    assert stopped_at(Patience(2, delta=.5), [3, 2.6, 2.4, 2.2, 2.0]) == 4
    with pytest.raises(ValueError, match="at least 1"):
        Patience(0)


class Sees(Policy):
    """Written in a cell: says nothing of what it remembers."""

    def __init__(self, limit=5):
        self.limit, self.losses, self.table, self.pair = limit, [], {"seen": 0, 3: (1, 2)}, (0, None)
        self.other = io.StringIO()

    def train_step_finished(self, epoch, iteration, loss):
        self.losses.append(loss)
        self.table["seen"] += 1
        self.pair = (iteration, "text")
        self.fresh = np.float32(loss)


def test_a_policy_of_a_cell_is_remembered():
    policy = Sees()
    assert policy.state_dict() == {}
    policy.train_step_finished(0, 4, .5)
    stored = copy.deepcopy(policy.state_dict())
    assert stored == {"losses": [.5], "table": {"seen": 1, 3: (1, 2)}, "pair": (4, "text"), "fresh": np.float32(.5)}
    again = Sees(limit=7)
    again.state_dict()
    again.load_state_dict(stored)
    assert again.limit == 7 and again.losses == [.5] and again.pair == (4, "text")  # the setting is the cell's
    again.train_step_finished(0, 5, .25)
    assert stored["losses"] == [.5]  # a copy was taken
    again.load_state_dict({})  # a run that begins again
    assert again.losses == [] and again.table["seen"] == 0 and again.limit == 7


def test_names_in_remembers_are_all_that_is_kept():
    class Own(Sees):
        remembers = ("pair",)
    policy = Own()
    policy.train_step_finished(0, 1, 2.)
    assert policy.state_dict() == {"pair": (1, "text")}


def test_as_value_policy():
    class Own(Policy):
        value = 3

    own = Own()
    assert as_value_policy(own) is own
    assert values(as_value_policy("0.1*2 0.05"), 4) == [.1, .1, .05, .05]
    assert values(as_value_policy([1, 2]), 3) == [1, 2, 2] and as_value_policy(1).value == 1.0
    with pytest.raises(ValueError, match="cannot read 'x'"):
        as_value_policy("1 x")
    with pytest.raises(ValueError, match="at least one"):
        as_value_policy([])


def drive(policies, epochs, steps):
    for epoch in range(epochs):
        for p in policies:
            p.epoch_started(epoch)
        for i in range(steps):
            for p in policies:
                p.train_step_started(epoch, i)
            for p in policies:
                p.train_step_finished(epoch, i, 0.5)
        for p in policies:
            p.validation_started(epoch, [0.5] * steps)
        for p in policies:
            p.epoch_finished(epoch, train_losses=[0.5] * steps, metrics={})


def test_onlookers(capsys):
    seen = []

    class Logger:
        def value(self, name, value, step):
            seen.append((name, value, step))

    bar = TQDM()
    bar.total = 3
    drive([TimeProfiler(), LoggerPolicy(Logger()), bar, TQDM(loss=False)], 2, 3)
    assert seen == [("train/loss", 0.5, i) for i in range(6)]
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in out.splitlines()] == ["epoch 1 (3 steps)", "epoch 2 (3 steps)"]
    assert "3/3" in err and "loss 0.5" in err
