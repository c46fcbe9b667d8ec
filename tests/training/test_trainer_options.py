"""What a trainer may be told beyond a learning rate: schedulers, accumulation, mixed precision, limits, hooks, and what
to do about numbers that are not finite and about too little memory. Whatever is new must resume in the same bits
too."""

import time
from functools import partial

import numpy as np
import pytest
import torch
from helpers_data import make_file
from helpers_training import Fit, Points, fit, log_without_time, same_states, streamline_trainer, toy_model
from torch import nn
from torch.optim import lr_scheduler

from tractkit.data.interpolation import GroupInputs
from tractkit.training.callbacks import Callback, Event, OnNonFinite, TorchSchedule
from tractkit.training.errors import OutOfMemory
from tractkit.training.policy import EarlyStopping, Policy
from tractkit.training.state import TrainerState


def assert_equal_runs(a, b):
    assert same_states(a.state, b.state) == []
    assert log_without_time(a.log) == log_without_time(b.log)


def cut_and_gone_on_with(folder, steps, make):
    """A run stopped after some steps, and gone on with by another trainer, as in another kernel."""
    first = make(folder, "cut")
    first.step(steps)
    first.stop(wait=True)
    second = make(folder, "cut")
    second.train_and_validate()
    return second


# -- optimizers and rates

@pytest.mark.parametrize(
    "optimizer",
    ["SGD", "Adam", "AdamW", "RAdam", torch.optim.Adagrad, lambda p: torch.optim.NAdam(p, lr=0.02), "instance"],
    ids=["SGD", "Adam", "AdamW", "RAdam", "a class", "a function", "an instance"],
)
def test_any_optimizer(tmp_path, optimizer):
    def make(folder, name):
        model = toy_model()
        made = torch.optim.SGD(model.parameters(), lr=.03, momentum=.9) if optimizer == "instance" else optimizer
        return fit(folder, name, model=model, optimizer=made, max_epochs=2)

    whole = make(tmp_path, "whole")
    before = [p.detach().clone() for p in whole.model.parameters()]
    whole.train_and_validate()
    assert any(not torch.equal(a, b) for a, b in zip(before, whole.model.parameters(), strict=True))
    assert_equal_runs(cut_and_gone_on_with(tmp_path, 8, make), whole)
    rate = whole.state.optimizer.param_groups[0]["lr"]
    assert rate == (.03 if optimizer == "instance" else .01 if isinstance(optimizer, (str, type)) else .02)


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    other = torch.optim.SGD(toy_model().parameters(), lr=.1)
    with pytest.raises(ValueError, match="parameters of another model"):
        fit(tmp_path, optimizer=other).train_and_validate()


def test_a_list_of_rates_reaches_an_optimizer_of_ones_own(tmp_path):
    trainer = fit(tmp_path, optimizer=lambda p: torch.optim.SGD(p, lr=9.), learning_rate="0.001*2 0.0001")
    trainer.train_and_validate()
    assert trainer.log.epochs()["learning_rate"].tolist() == [.001, .001, .0001]


SCHEDULERS = {
    "cosine": lambda: TorchSchedule(partial(lr_scheduler.CosineAnnealingLR, T_max=5), 0.02),
    "milestones": lambda: TorchSchedule(partial(lr_scheduler.MultiStepLR, milestones=[3, 9, 9]), 0.02, every="step"),
    "one cycle": lambda: TorchSchedule(
        partial(lr_scheduler.OneCycleLR, max_lr=0.05, total_steps=24), 0.02, every="step"
    ),
    "plateau": lambda: TorchSchedule(partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.99), 0.02),
    "lambda": lambda: TorchSchedule(lambda o: lr_scheduler.LambdaLR(o, lambda e: 0.5**e), 0.02),
    "sequence": lambda: TorchSchedule(
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
        ),
        0.02,
        every="step",
    ),
    "warm restarts": lambda: TorchSchedule(
        partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3), 0.02, every="step"
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_torch(tmp_path, name):
    def make(folder, run):
        return fit(folder, run, learning_rate=SCHEDULERS[name](), max_epochs=4)

    whole = make(tmp_path, "whole")
    whole.train_and_validate()
    # the same rates as torch alone gives
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=.02)
    schedule = SCHEDULERS[name]()
    scheduler, expected = schedule.make(optimizer), []
    for epoch in range(4):
        for _ in range(6):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if schedule.every == "step":
                scheduler.step()
        if schedule.every == "epoch":
            scheduler.step(*([whole.state.epochs[epoch]["valid_loss"]] if name == "plateau" else []))
    assert whole.log.batches()["learning_rate"].tolist() == expected and len(set(expected)) > 1
    assert_equal_runs(cut_and_gone_on_with(tmp_path, 8, make), whole)


# -- accumulation

class Uneven(Points):
    """Batches of very unequal sizes."""

    def plan(self, epoch, subset):
        ids = np.concatenate(list(super().plan(epoch, subset)))
        return np.split(ids, [1, 4, 20, 21, 40]) if subset == "training" else [ids]


@pytest.mark.parametrize("accumulate", [2, 4, 6])
def test_accumulation_is_the_gradient_of_the_mean_over_all_points(tmp_path, accumulate):
    model, points = toy_model(0.0).double(), Uneven()
    load = points.load_batch_streamlines
    points.load_batch_streamlines = lambda ids, **k: [t.double() for t in load(ids, **k)]
    optimizer = torch.optim.Adam(model.parameters(), lr=.01, weight_decay=.01)
    for epoch in range(2):
        plan = points.plan(epoch, "training")
        for i in range(0, 6, accumulate):
            x, y = points.load_batch_streamlines(np.concatenate(plan[i:i + accumulate]), epoch=epoch, training=True)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    trainer = fit(tmp_path, model=toy_model(0.0).double(), points=points, accumulate=accumulate, max_epochs=2)
    state = trainer.train_and_validate()
    assert state.global_step == 2 * -(-6 // accumulate) and trainer.log.batches()["n"][:1] == sum(
        map(len, points.plan(0, "training")[:accumulate])
    )
    for a, b in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_accumulation_resumes_at_any_step(tmp_path):
    def make(folder, name):
        return fit(folder, name, points=Uneven(), accumulate=4, clip_grad=.5)

    whole = make(tmp_path, "whole")
    whole.train_and_validate()
    for steps in (1, 2, 3):
        assert_equal_runs(cut_and_gone_on_with(tmp_path / str(steps), steps, make), whole)


def test_each_part_of_a_step_has_its_own_noise(tmp_path):
    seen = []

    class Look(Fit):
        def compute_batch_loss(self, batch):
            if self.model.training:
                seen.append(self.model[2](torch.ones(64)))
            return super().compute_batch_loss(batch)

    fit(tmp_path, kind=Look, accumulate=3, max_epochs=1, model=toy_model(.5)).train_and_validate()
    assert len({tuple(s.tolist()) for s in seen}) == 6


# -- precision, compiling

@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_computes_in_it_and_resumes(tmp_path, amp):
    types = set()

    class Look(Fit):
        def compute_batch_loss(self, batch):
            types.add(self.model[0](batch[0]).dtype)
            return super().compute_batch_loss(batch)

    def make(folder, name):
        return fit(folder, name, kind=Look, amp=amp)

    whole = make(tmp_path, "whole")
    whole.train_and_validate()
    assert types == {torch.bfloat16 if amp == "bf16" else torch.float16}
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in whole.model.parameters())
    assert bool(whole.state.scaler) == (amp == "fp16")
    assert_equal_runs(cut_and_gone_on_with(tmp_path, 8, make), whole)


def test_the_scale_of_gradients_is_lowered_and_goes_on_where_it_was(tmp_path):
    """A loss so large that fp16 overflows at first: steps are left out until the scale fits, and that is remembered."""
    class Large(Fit):
        def compute_batch_loss(self, batch):
            mean, n = super().compute_batch_loss(batch)
            return mean * 200, n

    def make(folder, name):
        return fit(folder, name, kind=Large, amp="fp16", max_epochs=2, points=Points(12), model=toy_model(0.))

    whole = make(tmp_path, "whole")
    whole.train_and_validate()
    norms = whole.log.batches()["grad_norm"]
    assert np.isnan(norms[0]) and np.isfinite(norms[-1]) and whole.state.scaler["scale"] < 2**16
    for steps in (1, 3, 13):
        assert_equal_runs(cut_and_gone_on_with(tmp_path / str(steps), steps, make), whole)


def test_precision_the_device_has_not(tmp_path):
    with pytest.raises(ValueError, match="amp must be"):
        fit(tmp_path, amp="fp8")


def test_compiled_on_request(tmp_path):
    plain, compiled = (
        fit(tmp_path, "plain", max_epochs=1),
        fit(tmp_path, "compiled", max_epochs=1, compile={"backend": "eager"}),
    )
    plain.train_and_validate()
    compiled.train_and_validate()
    assert compiled.model._compiled_call_impl is not None and plain.model._compiled_call_impl is None
    assert same_states(compiled.state, plain.state) == [] and compiled.state.snapshot().nb_parameters


# -- limits

def test_epochs_of_a_length_of_ones_own(tmp_path):
    seen = []

    class Seen(Points):
        def load_batch_streamlines(self, ids, *, epoch, training):
            if training:
                seen.append((epoch, tuple(ids)))
            return super().load_batch_streamlines(ids, epoch=epoch, training=training)

    def make(folder, name, n):
        return fit(folder, name, points=Seen(), iterations_per_epoch=n, prefetch=0)

    short = make(tmp_path, "short", 4)
    short.train_and_validate()
    assert [r["step"] for r in short.state.epochs] == [4, 8, 12]
    seen.clear()
    whole = make(tmp_path, "long", 15)  # more than the plan has: 6, 6 and 3
    whole.train_and_validate()
    assert whole.state.global_step == 45 and len(set(seen)) == 45
    assert [t for e, t in seen[:6]] == [tuple(i) for i in Points().plan(0, "training")]
    assert_equal_runs(cut_and_gone_on_with(tmp_path, 22, partial(make, n=15)), whole)
    with pytest.raises(ValueError, match="only one of"):
        fit(tmp_path, iterations_per_epoch=3, max_batches_per_epoch_training=3)


def test_a_limit_of_seconds_is_turned_into_batches_once(tmp_path):
    """The batches that the first validation came to are those of all later ones, however slow these are."""
    pause = [.03]

    class Slow(Fit):
        def compute_batch_loss(self, batch):
            if not self.model.training:
                time.sleep(pause[0])
            return super().compute_batch_loss(batch)

    def make(limit=.1):
        return fit(
            tmp_path, kind=Slow, points=Points(n_valid=40), validation_time_limit=limit, max_epochs=4, prefetch=0
        )

    counts, last = [], [0]

    def count(event, t):
        if event == "batch" and t.status.phase == "validating":
            last[0] = t.status.batch
        if event == "epoch":
            counts.append(last[0])
            pause[0] = 0.

    trainer = make()
    trainer.listeners.append(count)
    trainer.step(14)
    first = trainer.state.validation["batches"]
    assert 1 < first < 10 and trainer.state.validation["seconds"] == .1 and counts == [first] * 2
    trainer.stop(wait=True)
    again = make()
    again.listeners.append(count)
    again.train_and_validate()
    assert counts == [first] * 4 and again.state.validation["batches"] == first


# -- hooks

class Remembers(Policy):
    remembers = ("told",)

    def __init__(self):
        self.told = []

    def __getattribute__(self, name):
        if name in {e.value for e in Event}:
            return lambda *args, **kwargs: self.told.append(name)
        return super().__getattribute__(name)


def test_hooks_are_told_in_order_and_remembered(tmp_path):
    order, policy = [], Remembers()
    callbacks = [
        Callback(
            **{
                name: lambda *a, k=k, name=name, **kw: order.append((name, k))
                for name in map(str.lower, Event.__members__)
            }
        )
        for k in (0, 1)
    ]
    trainer = fit(
        tmp_path, policies=[callbacks[0], policy, callbacks[1]], max_epochs=1, max_batches_per_epoch_training=1
    )
    trainer.train_and_validate()
    step = ["train_step_started", "gradient_ready", "train_step_finished"]
    names = [
        "training_started",
        "checkpoint_saved",
        "epoch_started",
        *step,
        "validation_started",
        "epoch_finished",
        "checkpoint_saved",
        "training_ended",
        "checkpoint_saved",
    ]
    assert order == [(name, k) for name in names for k in (0, 1)]
    assert (
        policy.told == names
        and TrainerState.load(trainer.folder, model=toy_model()).policies["2 Remembers"]["told"] == names[:-1]
    )
    with pytest.raises(TypeError, match="no event epoch_begun; there are training_started"):
        Callback(epoch_begun=print)


def test_a_callback_with_a_state(tmp_path):
    class Count:
        def __init__(self):
            self.n = 0

        def __call__(self, epoch, iteration, loss):
            self.n += 1
            if self.n == 15:
                raise EarlyStopping("enough")

        def state_dict(self):
            return {"n": self.n}

        def load_state_dict(self, state):
            self.n = state["n"]

    cut = cut_and_gone_on_with(
        tmp_path, 8, lambda folder, name: fit(folder, name, policies=[Callback(train_step_finished=Count())])
    )
    assert cut.state.global_step == 15 and cut.state.finished["message"] == "enough"


def test_a_step_that_fails_is_told_of_once(tmp_path):
    """What policies remember goes back with the step: it is made again when training goes on."""
    class Count(Policy):
        remembers = ("started",)
        started = 0

        def train_step_started(self, epoch, iteration):
            self.started += 1

    class Breaks(Fit):
        def compute_batch_loss(self, batch):
            if self.state.global_step == 4 and self.model.training:
                raise OSError("the disk is gone")
            return super().compute_batch_loss(batch)

    with pytest.raises(OSError):
        fit(tmp_path, kind=Breaks, policies=[Count()]).train_and_validate()
    assert fit(tmp_path, policies=[Count()]).train_and_validate().policies == {"1 Count": {"started": 18}}


# -- numbers that are not finite

class Explodes(Fit):
    """Not finite at some steps."""

    bad, at, part = "loss", (4, 5), 0

    def compute_batch_loss(self, batch):
        mean, n = super().compute_batch_loss(batch)
        if self.model.training and self.state.global_step in self.at and self.session.step.part == self.part:
            mean = mean * float("nan") if self.bad == "loss" else mean + 0 * (self.model[0].weight * 0).sqrt().sum()
        return mean, n


def with_buffers():
    model = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p) / (i + 1))
    return model


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_it_stops_with_the_data_named_and_the_state_before_it(tmp_path, bad):
    class Bad(Explodes):
        pass

    Bad.bad = bad
    clean = fit(tmp_path, "clean", model=with_buffers())
    clean.step(4)
    trainer = fit(tmp_path, kind=Bad, model=with_buffers())
    with pytest.raises(
        FloatingPointError, match=rf"{'loss' if bad == 'loss' else 'norm of the gradient'} .*nan in epoch 1, batch 5 \("
    ):
        trainer.train_and_validate()
    assert same_states(TrainerState.load(trainer.folder, model=with_buffers()), clean.state) == []
    clean.stop(wait=True)
    again = fit(tmp_path, model=with_buffers())
    again.train_and_validate()
    clean.train_and_validate()
    assert_equal_runs(again, clean)


def test_streamlines_are_named(tmp_path):
    data, _ = make_file(tmp_path / "data", n_subjects=3, n=12, points=(12, 20))
    trainer = streamline_trainer(data, tmp_path)
    loss = trainer.model.compute_loss
    trainer.model.compute_loss = lambda *a, **k: (loss(*a, **k)[0] * float("nan"), 1)
    with pytest.raises(FloatingPointError, match=r"batch 1 \(streamlines of sub-0: \d+, \d+"):
        trainer.train_and_validate()


@pytest.mark.parametrize("bad", ["loss", "gradient"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_policy_leaves_it_out(tmp_path, bad, accumulate):
    class Bad(Explodes):
        pass

    Bad.bad, Bad.at, Bad.part = bad, (2, 3, 4) if accumulate == 1 else (1,), accumulate - 1

    def make(folder, name):
        return fit(
            folder, name, kind=Bad, policies=[OnNonFinite(factor=0.5)], accumulate=accumulate, model=with_buffers()
        )

    whole = make(tmp_path, "whole")
    state = whole.train_and_validate()
    n = len(Bad.at)
    assert state.policies["1 OnNonFinite"] == {"factor_now": .5**n, "in_a_row": 0, "left_out": n}
    assert all(torch.isfinite(v).all() for v in whole.model.state_dict().values())
    log = whole.log.records("batch")
    out = [r for r in log if "left_out" in r]
    assert len(out) == n and len(log) == 18 // accumulate
    assert [r["loss"] for r in out] == ([None] * n if bad == "gradient" or accumulate == 1 else [out[0]["loss"]])
    if accumulate == 2 and bad == "loss":
        assert out[0]["n"] == 8 and out[0]["loss"] > 0  # the other half was used
    assert whole.log.batches()["learning_rate"][-1] == .01 * .5**n
    assert_equal_runs(cut_and_gone_on_with(tmp_path, 4, make), whole)


def test_but_not_without_end(tmp_path):
    class Bad(Explodes):
        at = range(99)

    with pytest.raises(FloatingPointError, match="batch 4"):
        fit(tmp_path, kind=Bad, policies=[OnNonFinite(at_most=3)]).train_and_validate()


def test_the_rate_of_an_optimizer_of_ones_own_is_lowered_too(tmp_path):
    for name, options in {
        "own": dict(optimizer=lambda p: torch.optim.SGD(p, lr=0.04)),
        "schedule": dict(learning_rate=TorchSchedule(partial(lr_scheduler.LambdaLR, lr_lambda=lambda e: 1.0), 0.04)),
    }.items():
        trainer = fit(tmp_path, name, kind=Explodes, policies=[OnNonFinite(factor=.5)], **options)
        trainer.train_and_validate()
        assert trainer.log.batches()["learning_rate"][[3, -1]].tolist() == [.04, .01]


# -- memory

def test_too_little_memory_says_what_to_lower_and_saves(tmp_path):
    data, _ = make_file(tmp_path / "data", n_subjects=3, n=30, points=(12, 20))
    whole = streamline_trainer(data, tmp_path, "whole")
    whole.train_and_validate()
    trainer = streamline_trainer(data, tmp_path)
    forward, lack = trainer.model.forward, [torch.OutOfMemoryError("tried to allocate 20.00 GiB")]
    trainer.model.forward = lambda *a: (
        (_ for _ in ()).throw(lack[0]) if trainer.state.global_step == 2 and lack else forward(*a)
    )
    with pytest.raises(
        OutOfMemory,
        match=r"in epoch 1, batch 3 \(streamlines of .*lower batch_size_training \(now 8 "
              r"nb_streamlines\).*accumulate.*20.00 GiB",
    ):
        trainer.train_and_validate()
    assert trainer.checkpoints.steps()[-1] == 2 and trainer.status.phase == "failed"
    lack.clear()
    trainer.train_and_validate()
    assert_equal_runs(trainer, whole)


def test_a_device_cache_far_below_the_data_costs_time_and_no_bits(tmp_path, monkeypatch):
    """The way of a device, on the CPU: with a bound of bytes below one volume, each is moved anew."""
    data, _ = make_file(tmp_path / "data", n_subjects=4, n=30, points=(12, 20))
    runs, kept = {}, []

    def there(self, *args):
        self._by_gathering(*args)
        kept.append(self._on_device.nbytes)

    monkeypatch.setattr(GroupInputs, "_by_kernel", there)
    for name, bound in (("large", 2**31), ("small", 1000)):
        trainer = streamline_trainer(data, tmp_path, name, max_epochs=2, device_bytes=bound)
        kept.clear()
        trainer.train_and_validate()
        runs[name] = trainer, max(kept)
    one = runs["small"][1]
    assert runs["large"][1] >= 2 * one > 0  # never more than one volume
    assert same_states(runs["large"][0].state, runs["small"][0].state) == []


# -- what cannot be gone on with, and yet is

def test_other_data_and_plans_can_be_accepted_by_name(tmp_path):
    class Data(Points):
        class dataset:
            fingerprint = staticmethod(lambda: "abc")

    trainer = fit(tmp_path)
    trainer.step(8)
    trainer.stop(wait=True)
    with pytest.raises(ValueError, match=r"accept=\['data'\]"):
        fit(tmp_path, points=Data()).train_and_validate()
    with pytest.raises(ValueError, match=r"accept=\['plan'\]"):
        fit(tmp_path, points=Points(9)).train_and_validate()
    assert fit(tmp_path, points=Data(9), accept=["data", "plan"]).train_and_validate().epoch == 3
    with pytest.raises(ValueError, match="accept knows"):
        fit(tmp_path, accept=["everything"])
