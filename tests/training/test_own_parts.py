"""Samplers and loaders of a user's own: what does not fit is refused with what is wanted."""

import functools
import inspect

import numpy as np
import pytest
import torch
from helpers_data import make_file
from helpers_training import Fit, Points, fit, toy_model

from tractkit.data.dataset import MultiSubjectDataset
from tractkit.data.loader import BatchLoaderOneInput
from tractkit.data.sampler import BatchIDSampler
from tractkit.models.learn2track import Learn2Track
from tractkit.runs.mailbox import Mailbox
from tractkit.training.epoch_plan import checked_plan, plan_sample
from tractkit.training.policy import EarlyStopping, Policy
from tractkit.training.trainer import Trainer, TrainerOneInput

BATCHES = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(8, 1), torch.zeros(8, 1)), 4)


class Iterates:
    def __iter__(self):
        return iter([[0, 1]])


class OneArgument(Points):
    def plan(self, epoch):
        return [[0, 1]]


class Gets:
    def __getitem__(self, ids):
        return ids


def load_ids(ids):
    return ids


PLAN = r"plan\(epoch, subset\) that returns a list of what makes each batch"
LOAD = r"load\(ids, \*, epoch, training\) that returns a batch"


@pytest.mark.parametrize(("sampler", "loader", "found", "wanted"), [
    (Iterates(), Points(), "a Iterates, which has no method plan", f"{PLAN}.*tk.train_model"),
    ([[0, 1]], Points(), "a list, which has no method plan", f"{PLAN}.*tk.train_model"),
    (BATCHES, None, "a DataLoader, which has no method plan", f"{PLAN}.*tk.train_model"),
    (None, Points(), "batch_sampler is None", PLAN),
    (None, BATCHES, "batch_loader is a DataLoader, which cannot be called", f"{LOAD}.*tk.train_model"),
    (None, None, "batch_sampler is None", PLAN),
    (Points, Points(), "the class Points, not an object of it.*'subset'", PLAN),
    (OneArgument(), Points(), r"cannot be called as plan\(epoch, subset\) \(too many positional", PLAN),
    (Points(), None, "batch_loader is None, which cannot be called", LOAD),
    (Points(), load_ids, "batch_loader is load_ids.*unexpected keyword argument 'epoch'", LOAD),
    (Points(), print, "batch_loader is print", LOAD),
    (Points(), Gets(), "a Gets, which cannot be called", f"{LOAD}.*tk.train_model"),
])
def test_a_part_that_does_not_fit_is_refused_before_there_is_a_folder(tmp_path, sampler, loader, found, wanted):
    with pytest.raises(TypeError, match=f"{found}.*{wanted}") as e:
        Fit(toy_model(), tmp_path, None, sampler, loader, progress=False)
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


def wrapped(load):
    @functools.wraps(load)
    def call(ids, *, epoch, training):
        return load(ids)
    return call


@pytest.mark.parametrize("load", [
    Points().load_batch_streamlines, lambda ids, **options: ids, lambda *args, **options: args, wrapped(load_ids),
    functools.partial(Points().load_batch_streamlines), lambda ids, epoch, training: ids, dict,
], ids=["method", "kwargs", "all", "wrapped", "partial", "plain", "builtin"])
def test_loaders_that_fit_are_taken(tmp_path, load):
    Fit(toy_model(), tmp_path, "run", Points(), load, progress=False)


def test_a_trainer_with_batches_of_its_own_needs_none(tmp_path):
    class Own(Trainer):
        def train_and_validate(self, state=None):
            pass

    Own(toy_model(), tmp_path, "run", progress=False).train_and_validate()
    with pytest.raises(TypeError, match="has no method plan"):
        Own(toy_model(), tmp_path, "run", [1], progress=False)


@pytest.mark.parametrize(("answer", "found", "subset", "options"), [
    (lambda plan: None, "None", "validation", {}),
    (lambda plan: (ids for ids in plan), "a generator", "training", {}),
    (iter, "a [a-z_]*iterator", "training", {"iterations_per_epoch": 3})], ids=["none", "generator", "iterator"])
def test_what_is_no_plan_is_one_error_at_the_start(tmp_path, options, subset, answer, found):
    class Odd(Points):
        def plan(self, epoch, asked):
            plan = super().plan(epoch, asked)
            return answer(plan) if asked == subset else plan

    trainer = fit(tmp_path, points=Odd(), **options)
    with pytest.raises(TypeError, match=f"Odd.plan\\(0, '{subset}'\\) returned {found}: it must return a list"):
        trainer.train_and_validate()
    assert not trainer.log.records("batch") and trainer.state.global_step == 0


def test_plans_that_fit_are_taken():
    for plan in ([], (), np.zeros((2, 3)), range(3), "ab", {0: [1]}):
        assert checked_plan(plan) is plan


# ---- plans that draw when their items are asked for


class Lazy:
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return np.random.permutation(48)[:8]  # noqa: NPY002


class LazyPoints(Points):
    def plan(self, epoch, subset):
        return Lazy() if subset == "training" else super().plan(epoch, subset)


@pytest.mark.parametrize(("stop", "options"), [
    (3, {}), pytest.param(8, {"prefetch": 0}, marks=pytest.mark.full),
    pytest.param(8, {"iterations_per_epoch": 5}, marks=pytest.mark.full)])
def test_a_plan_that_draws_late_can_be_resumed(tmp_path, stop, options):
    whole = fit(tmp_path, "whole", points=LazyPoints(), max_epochs=2, **options).train_and_validate()
    first = fit(tmp_path, points=LazyPoints(), max_epochs=2, **options)
    first.listeners.append(lambda event, t: event == "batch" and t.state.global_step == stop and t.control.stop())
    assert first.train_and_validate().global_step == stop
    np.random.seed(99)  # noqa: NPY002
    again = fit(tmp_path, points=LazyPoints(), max_epochs=2, **options)
    again.train_and_validate()
    assert not any("sampler" in m for m in again.messages)
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_place_names_what_a_plan_drew_for_the_batch(tmp_path):
    seen = []

    class Breaks(LazyPoints):
        def load_batch_streamlines(self, ids, *, epoch, training):
            seen.append(ids)
            if len(seen) == 2:
                raise KeyError("mine")
            return super().load_batch_streamlines(ids, epoch=epoch, training=training)

    with pytest.raises(KeyError) as e:
        fit(tmp_path, points=Breaks(), prefetch=0).train_and_validate()
    assert e.value.__notes__[0] == f"It happened in epoch 1, batch 2 ({str(seen[1])})."


def test_a_plan_with_a_generator_of_its_own_is_warned_of():
    class Own(Lazy):
        rng = np.random.default_rng(1)

        def __getitem__(self, i):
            return self.rng.permutation(48)

    with pytest.warns(UserWarning, match="first item of a Own .* is another one each time"):
        plan_sample(Own(), 0)


# ---- errors of a loader that Python or the loop take for something else


class Raises(Points):
    error, at = StopIteration, 3

    def load_batch_streamlines(self, ids, *, epoch, training):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == self.at:
            raise self.error
        return super().load_batch_streamlines(ids, epoch=epoch, training=training)


@pytest.mark.parametrize(("at", "prefetch"), [(3, 0), (3, 2), (7, 2)])
def test_a_loader_that_raises_stop_iteration_is_named(tmp_path, at, prefetch):
    points = Raises()
    points.at = at
    with pytest.raises(RuntimeError, match="^the loader raised StopIteration: .*next") as e:
        fit(tmp_path, points=points, prefetch=prefetch).train_and_validate()
    place = f"in epoch 1, batch {at} (" if at < 7 else "in the validation after epoch 1"
    assert place in e.value.__notes__[0]


def test_a_plan_that_raises_stop_iteration_is_named(tmp_path):
    class Ends(Lazy):
        def __getitem__(self, i):
            return next(iter(()))

    class EndsPoints(Points):
        def plan(self, epoch, subset):
            return Ends()

        def settings(self):
            return {}

    with pytest.raises(RuntimeError, match="^the plan raised StopIteration"):
        fit(tmp_path, points=EndsPoints()).train_and_validate()


def test_an_end_without_a_reason_has_one(tmp_path):
    points = Raises()
    points.error = EarlyStopping
    trainer = fit(tmp_path, points=points)
    trainer.train_and_validate()
    assert "Finished: EarlyStopping was raised in epoch 1, batch 3 (" in trainer.status.message

    class Ends(Policy):
        def train_step_finished(self, epoch, iteration, loss):
            raise EarlyStopping

    trainer = fit(tmp_path, "policy", policies=[Ends()])
    trainer.train_and_validate()
    assert "Finished: ended by Ends." in trainer.status.message.replace(";", ".")


class Unwritable(Exception):
    def __str__(self):
        raise ValueError("no text")


@pytest.mark.parametrize(("make", "told"), [
    (lambda: OSError("sub-\udcff"), r"sub-\udcff"), (lambda: ValueError("lone \ud800"), r"lone \ud800"),
    (Unwritable, "Unwritable whose text cannot be made")])
@pytest.mark.parametrize("at", ["load", "policy"])
def test_an_error_whose_text_cannot_be_written_is_told_all_the_same(tmp_path, make, told, at):
    error = make()

    class Breaks(Points):
        def load_batch_streamlines(self, ids, *, epoch, training):
            if at == "load":
                raise error
            return super().load_batch_streamlines(ids, epoch=epoch, training=training)

    class Policed(Policy):
        def train_step_finished(self, *args, **kwargs):
            raise error

    trainer = fit(tmp_path, points=Breaks(), prefetch=0, progress=True, policies=[Policed()])
    with pytest.raises(type(error)) as raised:
        trainer.train_and_validate()
    assert raised.value is error
    text = (tmp_path / "run" / "failed.txt").read_text(encoding="utf-8")
    kept = Mailbox(tmp_path / "run").read_status()["status"].message
    assert told in text and told in trainer.status.message and told in kept
    assert trainer.status.message.encode() and trainer.status.phase == "failed"


def test_an_error_in_a_plan_names_file_and_line(tmp_path):
    class Breaks(Points):
        def plan(self, epoch, subset):
            return np.array([]).max()

    class BreaksLate(Lazy):
        def __getitem__(self, i):
            raise KeyError("no such batch")

    class Plans(Points):
        def plan(self, epoch, subset):
            return BreaksLate()

    def told(points, options):
        trainer = fit(tmp_path, points.__name__ + str(options), points=points(), **options)
        with pytest.raises((ValueError, KeyError)):
            trainer.train_and_validate()
        return trainer.status.message

    line = inspect.getsourcelines(Breaks)[1] + 2
    for options in ({}, {"iterations_per_epoch": 3}):
        assert told(Breaks, options).endswith(
            f"It happened in Breaks.plan(0, 'training') ({__file__}, line {line}).")
    assert told(Plans, {"prefetch": 0}).endswith("It happened in epoch 1, batch 1.")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path, _ = make_file(tmp_path_factory.mktemp("data"), n=8)
    return MultiSubjectDataset(path).load_data()


def one_input(data, folder, model, made_for, kind=TrainerOneInput, **settings):
    loader = BatchLoaderOneInput(data, made_for, "input", "streamlines", **settings)
    return kind(model, folder, "run", BatchIDSampler(data, "streamlines", 8), loader, progress=False)


def test_a_model_without_a_loss_is_refused_before_there_is_a_folder(data, tmp_path):
    with pytest.raises(TypeError, match=r"needs a model with targets\(batch\) and compute_loss\(outputs, targets\)"):
        one_input(data, tmp_path, torch.nn.Linear(3, 3), None)
    assert not list(tmp_path.iterdir())

    class OwnLoss(TrainerOneInput):
        def compute_batch_loss(self, batch):
            return self.model(batch.points).mean(), len(batch.points)

    class WithLoss(torch.nn.Linear):
        def targets(self, batch):
            pass

        def compute_loss(self, outputs, targets, average_results=True):
            pass

    one_input(data, tmp_path / "own", torch.nn.Linear(3, 3), None, OwnLoss)
    one_input(data, tmp_path / "with", WithLoss(3, 3), None)


def small(**options):
    return Learn2Track(3, rnn_layer_sizes=(4,), **options)


AXES = dict(neighborhood_type="axes", neighborhood_radius=1, neighborhood_resolution_mm=1.0)


@pytest.mark.parametrize(("mine", "others", "found"), [
    (dict(step_size=2.0), dict(step_size=1.0), "its step_size is 1.0, this model's is 2.0"),
    (dict(step_size=2.0), dict(step_size=None), "its step_size is None, this model's is 2.0"),
    (dict(nb_points=9, step_size=None), dict(step_size=1.0), "its step_size is 1.0, this model's is None"),
    (dict(step_size=1.0), dict(step_size=1.0, **AXES), "its neighborhood is Neighborhood.*, this model's is None"),
    ({}, dict(convention="dwi_ml"), "its convention is dwi_ml, this model's is None"),
])
def test_a_loader_made_for_another_model_is_refused(data, tmp_path, mine, others, found):
    with pytest.raises(ValueError, match=f"^the loader was made for another model: {found}; make the loader with this"):
        one_input(data, tmp_path, small(**mine), small(**others))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("mine", "others", "given"), [
    (dict(step_size=2.0), dict(step_size=2.0), {}), (dict(step_size=2.0), None, {}),
    (dict(step_size=2.0), dict(step_size=1.0), dict(step_size=1.5)), (dict(**AXES), dict(**AXES), {}), ({}, {}, AXES),
])
def test_a_loader_of_equal_or_given_settings_is_taken(data, tmp_path, mine, others, given):
    one_input(data, tmp_path, small(**mine), None if others is None else small(**others), **given)
