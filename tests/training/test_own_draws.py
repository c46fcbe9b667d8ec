"""Draws from the global generators of torch, NumPy and Python in a user's own code: a run that was interrupted, or
killed at random, ends in the same bits, whoever else draws before and after it."""

import random
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from draws_child import KINDS, WHERE, DrawingFit, DrawingNet, DrawingPoints, draw, make_trainer
from helpers_children import kill_after
from helpers_training import Points, fit, same_states, toy_model
from torch import nn

from tractkit.models.layers import GlobalGenerators, StepNoise, initialize_weights
from tractkit.runs.log import RunLog
from tractkit.training.callbacks import Callback, Event, OnNonFinite, TorchSchedule
from tractkit.training.control import Stopped
from tractkit.training.policy import LambdaEpoch, Policy
from tractkit.training.session import has_own_steps
from tractkit.training.state import TrainerState
from tractkit.training.trainer import Trainer

FEEDING = {"thread": {}, "workers": {"num_workers": 2}, "in turns": {"prefetch": 0}}


def others_draw(seed):
    """What another program, or another cell, has done to the global generators."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


def interrupted(folder, job, options, step=8):
    """A run that is stopped in the midst of its second epoch and gone on with, and one that is not."""
    others_draw(1)
    whole = make_trainer(folder, "whole", job, **options)
    whole.train_and_validate()
    others_draw(2)
    first = make_trainer(folder, "parts", job, **options)
    first.listeners.append(lambda event, t: event == "batch" and t.state.global_step == step and t.control.stop())
    first.train_and_validate()
    assert first.state.global_step == step
    others_draw(3)
    second = make_trainer(folder, "parts", job, **options)
    second.train_and_validate()
    return whole.state, second.state, [*whole.messages, *first.messages, *second.messages]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", WHERE)
def test_draws_of_one_kind_in_one_place(tmp_path, kind, where):
    whole, parts, _ = interrupted(tmp_path, {where: [kind]}, {})
    assert same_states(whole, parts) == []


def test_a_sampler_that_draws_is_not_taken_for_another(tmp_path):
    """Stopped at the end of an epoch, where a sampler without settings is compared by what it plans."""
    _, _, messages = interrupted(tmp_path, {"sampler": ["numpy"]}, {}, step=6)
    assert not [m for m in messages if "plans other batches" in m]


@pytest.mark.parametrize("feeding", FEEDING)
def test_everybody_draws(tmp_path, feeding):
    job = dict.fromkeys(WHERE, KINDS)
    whole, parts, messages = interrupted(tmp_path, job, FEEDING[feeding])
    assert same_states(whole, parts) == []
    said = [m for m in messages if "The loader draws from torch's and NumPy's and Python's" in m]
    assert len(said) == 3 * (feeding == "thread")  # once in each of three trainings


def test_they_do_not_depend_on_who_loads(tmp_path):
    """In a thread, in worker processes, in turns: the same numbers."""
    job, states = dict.fromkeys(WHERE, KINDS), []
    for i, options in enumerate(FEEDING.values()):
        others_draw(i)
        states.append(make_trainer(tmp_path, f"run-{i}", job, **options).train_and_validate())
    for state in states[1:]:
        assert same_states(states[0], state) == []


@pytest.mark.parametrize("later", ["torch", "numpy", "random"])
@pytest.mark.parametrize("forward", ["torch", "numpy"])
def test_a_loader_that_begins_to_draw_later(tmp_path, later, forward):
    """At its fourth batch of the second epoch, in a thread beside steps that draw."""
    whole, parts, _ = interrupted(tmp_path, {"later": [later], "forward": [forward]}, {}, step=11)
    assert same_states(whole, parts) == []
    turns = make_trainer(tmp_path, "turns", {"later": [later], "forward": [forward]}, prefetch=0).train_and_validate()
    assert same_states(whole, turns) == []


def test_a_loader_that_does_not_draw_is_loaded_ahead(tmp_path):
    """Beside steps that draw from torch's generator."""
    trainer = make_trainer(tmp_path, "run", {"forward": ["torch"]}, slow=0.01)
    trainer.train_and_validate()
    assert not [m for m in trainer.messages if "loaded between steps" in m]
    assert trainer.batch_loader.ahead > 0


class PointsInStep(DrawingPoints):
    """Takes a while, and notes whether a step was computed meanwhile."""

    def load_batch_streamlines(self, ids, *, epoch, training):
        batch = super().load_batch_streamlines(ids, epoch=epoch, training=training)
        time.sleep(0.01)
        self.ahead += self.in_step
        return batch


@pytest.mark.parametrize("kind", ["numpy", "random"])
def test_nothing_is_loaded_beside_steps_that_draw_where_nobody_sees(tmp_path, kind):
    """From NumPy's generator or Python's, from the first step of each epoch: a load that draws would disturb them."""
    job = {"forward": [kind]}
    points = PointsInStep(job, slow=0.03)
    trainer = fit(tmp_path, "run", DrawingFit, DrawingNet([kind]), points)
    trainer.train_and_validate()
    assert points.ahead == 0
    assert len([m for m in trainer.messages if "nobody could tell" in m]) == 1


def test_other_cells_find_their_generators_as_they_were(tmp_path):
    def numbers():
        return torch.rand(3).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1)  # noqa: NPY002

    trainer = make_trainer(tmp_path, "run", dict.fromkeys(WHERE, KINDS))
    others_draw(5)
    numbers()  # one normal number is drawn ahead, in NumPy and in `random`
    expected = numbers()
    others_draw(5)
    numbers()
    trainer.train_and_validate()
    assert numbers() == expected


def test_steps_differ_and_validations_do_not():
    noise, seen = StepNoise(torch.nn.Linear(1, 1), 5), {}
    for name, block in {"3": noise.step(3), "4": noise.step(4), "again": noise.step(3), "valid": noise.validation(3),
                        "valid again": noise.validation(3), "other": noise.validation(4)}.items():
        with block:
            seen[name] = draw(KINDS)
    assert seen["3"] == seen["again"] and seen["valid"] == seen["valid again"]
    assert len({seen[name] for name in ("3", "4", "valid", "other")}) == 4


@pytest.mark.parametrize("step", [6, 8])
def test_a_sampler_that_validates_on_others_is_noticed(tmp_path, step):
    """Also in the midst of an epoch; one that plans the same, by draws, is not taken for another."""
    class Other(DrawingPoints):
        def plan(self, epoch, subset):
            plan = super().plan(epoch, subset)
            return plan[:, ::-1] if subset == "validation" else plan

    said = []
    for kind in (DrawingPoints, DrawingPoints, Other):
        trainer = fit(tmp_path, "run", DrawingFit, DrawingNet([]), kind({"sampler": KINDS}), max_epochs=3)
        stop = step if not said else step + 2
        trainer.listeners.append(
            lambda event, t, stop=stop: event == "batch" and t.state.global_step == stop and t.control.stop())
        others_draw(len(said))
        trainer.train_and_validate()
        said.append([m for m in trainer.messages if "plans" in m])
    assert not said[0] + said[1] and len(said[2]) == 1 and "another validation" in said[2][0]


class FitValidates(DrawingFit):
    """A validation of one's own, that draws outside of its batches, too; and one with dropout."""

    def validate_one_epoch(self):
        first = draw(KINDS)
        losses = [self.model.train() and self.run_one_batch()[0].item() for _ in self.validation_batches()]
        return sum(losses) + first + draw(KINDS)


def test_a_validation_of_ones_own_draws_the_same_in_each_epoch(tmp_path):
    """Stopped at the end of an epoch's last batch: the validation is the first that is done after the resume."""
    runs, ends = {}, {}
    for name, stops in {"whole": [], "parts": [6]}.items():
        others_draw(len(name))
        for stop in [*stops, None]:
            trainer = runs[name] = fit(tmp_path, name, FitValidates, DrawingNet([]), DrawingPoints({}), max_epochs=2)
            trainer.listeners.append(
                lambda event, t, stop=stop: event == "batch" and t.state.batch == stop and t.control.stop())
            others_draw(7 + len(name))
            expected = draw(KINDS)
            others_draw(7 + len(name))
            trainer.train_and_validate()
            assert draw(KINDS) == expected
        ends[name] = trainer.state
    assert same_states(ends["whole"], ends["parts"]) == []


EVENTS = [e.value for e in Event if e not in (Event.NON_FINITE, Event.TRAINING_ENDED)]


class DrawsAt(Policy):
    """Draws at one event, also from the dropout of the model; the loss of the next steps has what was drawn."""

    def __init__(self, event):
        self.now = 0.0
        setattr(self, event, self.draw)

    def draw(self, *args, **kwargs):
        noise = nn.functional.dropout(torch.ones(20), 0.5).mean().item() + self.dropout(torch.ones(20)).mean().item()
        self.now = draw(KINDS) + noise


class FitWithPolicies(DrawingFit):
    def compute_batch_loss(self, batch):
        loss, n = super().compute_batch_loss(batch)
        return loss * (1 + sum(policy.now for policy in self.policies[1:])), n


def test_policies_that_draw_at_events(tmp_path):
    """Stopped in the midst of the second epoch, and gone on with; each batch is saved, so that this event, too, comes
    as often as in a run that is not stopped. Each policy keeps what it drew last: what differs names it."""
    ends = {}
    for name, stops in {"whole": [], "parts": [8]}.items():
        for stop in [*stops, None]:
            policies, model = [DrawsAt(event) for event in EVENTS], toy_model()
            for policy in policies:
                policy.dropout = model[2]
            trainer = fit(tmp_path, name, FitWithPolicies, model, DrawingPoints({}), max_epochs=2, policies=policies,
                          checkpoint_every_batches=1)
            trainer.listeners.append(
                lambda event, t, stop=stop: event == "batch" and t.state.global_step == stop and t.control.stop())
            others_draw(len(name) + (stop or 0))
            expected = draw(KINDS)
            others_draw(len(name) + (stop or 0))
            trainer.train_and_validate()
            assert draw(KINDS) == expected and all(policy.now for policy in policies)
        ends[name] = trainer.state
    assert same_states(ends["whole"], ends["parts"]) == []


@pytest.mark.parametrize("rate, calls", [(0.01, 0), (LambdaEpoch(lambda epoch: 0.01), 2), (
    TorchSchedule(partial(torch.optim.lr_scheduler.StepLR, step_size=1)), 0)])
def test_policies_of_this_package_are_not_seeded(tmp_path, monkeypatch, rate, calls):
    """They never draw; a function of a user's own may."""
    events = []
    seed = StepNoise.event
    monkeypatch.setattr(StepNoise, "event", lambda self, name, at: events.append(name) or seed(self, name, at))
    fit(tmp_path, learning_rate=rate, max_epochs=2, patience=5, policies=[OnNonFinite()]).train_and_validate()
    assert events == ["epoch_started"] * calls


def test_a_run_begun_before_policies_were_seeded_keeps_its_rule(tmp_path):
    trainer = fit(tmp_path, max_epochs=1, policies=[DrawsAt("epoch_finished")])
    trainer.policies[1].dropout = trainer.model[2]
    state = trainer.train_and_validate()
    assert state.fingerprints.pop("event_draws") == 1
    others_draw(1)
    expected = draw(KINDS)
    others_draw(1)
    more = fit(tmp_path, "more", max_epochs=2, policies=[Callback(epoch_started=lambda epoch: draw(KINDS))])
    state.save(tmp_path / "old.ckpt")
    old = TrainerState.load(tmp_path / "old.ckpt", model=toy_model())
    assert "event_draws" not in more.train_and_validate(old).fingerprints
    assert draw(KINDS) != expected


def test_what_is_drawn_is_seen():
    generators = GlobalGenerators()
    for kinds in ([], *([k] for k in KINDS), KINDS):
        with generators.seeded(1, ask=True) as drawn:
            draw(kinds)
        assert drawn == set(kinds)
    generators.watch()
    for i, kind in enumerate(KINDS, 1):
        draw([kind])
        generators.look()
        generators.look()
        assert (generators.nb_changes, generators.changed) == (i, set(KINDS[:i]))


def test_a_run_of_the_old_rule_keeps_it(tmp_path):
    """Its state has no word on draws: nothing but torch is seeded, and that only for layers that are known."""
    job = {"forward": ["torch"]}
    trainer = make_trainer(tmp_path, "run", job)
    trainer.listeners.append(lambda event, t: event == "batch" and t.state.global_step == 8 and t.control.stop())
    state = trainer.train_and_validate()
    assert state.fingerprints.pop("draws") == 1
    state.save(tmp_path / "old.ckpt")
    ends = []
    for i in (1, 1, 2):
        others_draw(i)
        old = TrainerState.load(tmp_path / "old.ckpt", model=DrawingNet(KINDS))
        other = make_trainer(tmp_path, f"old-{len(ends)}", job)
        other.model.load_state_dict(old.model.state_dict())
        ends.append(other.train_and_validate(old))
        assert "draws" not in ends[-1].fingerprints
    assert same_states(ends[0], ends[1]) == [] and same_states(ends[0], ends[2]) != []


# -- two trainings in one kernel

def beside(call):
    """Make a call in a thread. Return it; it is joined by `ended`."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def ended(thread):
    thread.join(20)
    return not thread.is_alive()


def in_the_background(*trainers):
    for trainer in trainers:
        trainer.start()
    return [trainer.wait(60) for trainer in trainers]


def test_two_trainings_that_draw_take_turns(tmp_path):
    """In threads of one kernel: each has the weights that it has alone, and no loader is blamed."""
    job = dict.fromkeys(WHERE, KINDS)
    kinds = [(job, {}), ({"forward": ["numpy"]}, {"rng": 5})]
    alone = [make_trainer(tmp_path, f"alone {i}", job, max_epochs=2, **options).train_and_validate()
             for i, (job, options) in enumerate(kinds)]
    trainers = [make_trainer(tmp_path, f"both {i}", job, slow=0.002, max_epochs=2, **options)
                for i, (job, options) in enumerate(kinds)]
    both = in_the_background(*trainers)
    assert [same_states(a, b) for a, b in zip(alone, both, strict=True)] == [[], []]
    assert not [m for m in trainers[1].messages if "loader draws" in m]
    assert [len([m for m in t.messages if "start(process=True)" in m]) for t in trainers] == [1, 1]


def test_cells_are_a_matter_of_trainings_in_the_background(tmp_path):
    trainers = [make_trainer(tmp_path, "draws", {"loss": ["random"]}, max_epochs=1), fit(tmp_path, max_epochs=1)]
    trainers[0].train_and_validate()
    in_the_background(trainers[1])
    assert not [m for t in trainers for m in t.messages if "start(process=True)" in m]


def test_a_policy_that_trains_another_model(tmp_path):
    """In the turn of the trainer that calls it, also by a thread that loads."""
    job = dict.fromkeys(WHERE, KINDS)

    def train_another(epoch, **_):
        make_trainer(tmp_path, f"inner {epoch}", job, max_epochs=1).train_and_validate()

    trainer = make_trainer(tmp_path, "outer", job, max_epochs=1, policies=[Callback(epoch_finished=train_another)])
    trainer.start()
    trainer.wait(30)
    plain = make_trainer(tmp_path, "plain", job, max_epochs=1).train_and_validate()
    inner = TrainerState.load(tmp_path / "inner 0", model=DrawingNet(KINDS))
    assert [k for k in same_states(plain, inner) if "policies" not in k] == []


def test_what_never_draws_does_not_wait():
    """And leaves the generators to those that draw."""
    one, other, seen = GlobalGenerators(), GlobalGenerators(), []
    with one.seeded(1):
        expected = draw(KINDS), draw(KINDS)
    with one.seeded(1):
        first = draw(KINDS)

        def step():
            with other.seeded(2, waits=False):
                seen.append(1)

        assert ended(beside(step)) and seen
        assert (first, draw(KINDS)) == expected


def test_a_training_that_is_paused_lets_others_draw():
    one, other, seen = GlobalGenerators(), GlobalGenerators(), []
    with one.seeded(1):
        expected = draw(KINDS), draw(KINDS)

    def step():
        with other.seeded(2):
            seen.append(draw(KINDS))

    with one.seeded(1):
        first, waiting = draw(KINDS), beside(step)
        assert not seen
        one.lend()
        assert ended(waiting)
        one.take_back()
        assert (first, draw(KINDS)) == expected
    step()
    assert seen[0] == seen[1]


def test_a_training_that_waits_can_be_stopped():
    one, other, raised = GlobalGenerators(), GlobalGenerators(), []

    def stop():
        raise Stopped("stopped")

    def step():
        other.on_wait = stop
        try:
            with other.seeded(2, may_end=True):
                pass
        except Stopped as e:
            raised.append(e)

    with one.seeded(1):
        assert ended(beside(step)) and raised


def test_a_training_that_hangs_holds_nobody(monkeypatch):
    monkeypatch.setattr("tractkit.models.layers._PATIENCE", 0.0)
    one, other, before = GlobalGenerators(), GlobalGenerators(), []

    def step():
        with other.seeded(2):
            before.append(draw(KINDS))

    others_draw(1)
    expected = draw(KINDS)
    others_draw(1)
    with one.seeded(1):
        assert ended(beside(step))
    assert draw(KINDS) == expected
    assert before and len(other.notes) == 1 and "hung" in other.notes[0]
    step()
    assert before[0] == before[1]


def test_steps_of_this_package_are_known_not_to_draw(tmp_path):
    def is_own(kind=Trainer, model=None, **events):
        trainer = fit(tmp_path, kind=kind, model=model, policies=[Callback(**events)])
        return has_own_steps(trainer, TrainerState.create(trainer.model))

    assert not is_own(epoch_finished=print)
    assert is_own(gradient_ready=print) and is_own(DrawingFit) and is_own(model=DrawingNet([]))
    assert is_own(model=nn.Sequential(nn.Linear(1, 1), nn.Dropout()))


# -- killed

class Children:
    """Trainings in processes of their own, where everybody draws."""

    def __init__(self, root: Path):
        self.root, here = root, Path(__file__).parent.parent
        self.process = subprocess.Popen(
            [sys.executable, str(here / "draws_child.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, name: str, workers: int) -> int:
        self.process.stdin.write(f'{{"folder": "{self.root}", "name": "{name}", "workers": {workers}}}\n')
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self) -> int:
        return int(self.process.stdout.readline())

    def step(self, name: str) -> int:
        steps = [r["step"] for r in RunLog(self.root / name).records("batch")]
        return steps[-1] if steps else 0

    def state(self, name: str) -> TrainerState:
        return TrainerState.load(self.root / name, model=DrawingNet(KINDS))


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    made = Children(tmp_path_factory.mktemp("killed"))
    made.start("whole", 0)
    assert made.end() == 0
    yield made
    made.process.stdin.close()
    made.process.wait(60)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.full)])
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_random(children, workers, kills):
    rng, runs = random.Random(kills + workers), 0
    for i in range(kills):
        name = f"{workers}-{kills}-{runs}"
        pid = children.start(name, workers)
        kill_after(
            pid, lambda name=name: children.step(name), children.step(name) + rng.randint(1, 5), rng.random() * 0.02
        )
        if children.end() == 0 or i == kills - 1 or children.step(name) > 12:
            children.start(name, workers)
            assert children.end() == 0
            assert same_states(children.state(name), children.state("whole")) == []
            runs += 1
    assert runs


def test_the_library_itself_draws_from_none(tmp_path):
    """A model with keyed dropout: nobody is taken for one who draws, and the state has the rule."""
    trainer = fit(tmp_path, points=Points())
    trainer.train_and_validate()
    assert not [m for m in trainer.messages if "draws from" in m]
    assert trainer.state.fingerprints["draws"] == 1


def test_a_loader_that_forks_the_generator_beside_a_model_that_draws(tmp_path):
    class Forks(Points):
        def load_batch_streamlines(self, ids, *, epoch, training):
            x, y = super().load_batch_streamlines(ids, epoch=epoch, training=training)
            with torch.random.fork_rng():
                torch.manual_seed(int(ids[0]))
                time.sleep(0.002)
                return x + 0.1 * torch.randn(1), y

    def trained(name, **options):
        model = nn.Sequential(nn.Linear(1, 16), nn.Dropout(0.3), nn.Linear(16, 1))
        initialize_weights(model, seed=0)
        trainer = fit(tmp_path, name, model=model, points=Forks(n=12), **options)
        trainer.train_and_validate()
        assert options or any("The loader draws from torch" in text for text in trainer.messages)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    ahead = [trained(f"run {i}") for i in range(2)]
    assert torch.equal(ahead[0], ahead[1]) and torch.equal(ahead[0], trained("in turns", prefetch=0))
