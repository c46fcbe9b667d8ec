"""What is unusual is named where it is, with what to do: batches without points, schedules that end, other settings."""

import math
import pydoc
import re
import warnings

import pytest
import torch
from helpers_training import Fit, fit, same_states, toy_model
from torch.optim import lr_scheduler

from tractkit.core.files import DataError
from tractkit.core.settings import settings_of
from tractkit.models.base import load_model
from tractkit.runs.curves import read_runs
from tractkit.runs.listing import find_runs
from tractkit.training.callbacks import OnNonFinite, TorchSchedule
from tractkit.training.errors import NonFinite
from tractkit.training.policy import Policy
from tractkit.training.settings import TrainerSettings
from tractkit.training.state import TrainerState
from tractkit.training.trainer import Trainer, TrainerOneInput


def without_points(value: float, *batches: int):
    """A trainer in which some batches have no points, and a mean loss that is 0 or NaN times what it was."""
    class NoPoints(Fit):
        def compute_batch_loss(self, batch):
            loss, n = super().compute_batch_loss(batch)
            here = self.session.block == "training" and self.state.batch + self.session.step.part in batches
            return (loss * value, 0) if here else (loss, n)

    return NoPoints


@pytest.mark.parametrize(("value", "batches", "accumulate", "message"), [
    (math.nan, [2], 1, r"the batch has no points \(n is 0\), so its mean loss is nan in epoch 1, batch 3 "),
    (math.nan, [3], 2, r"the batch has no points \(n is 0\), so its mean loss is nan in epoch 1, batch 4 "),
    (0.0, [2, 3], 2, r"no batch of the step has points \(n is 0\), so the step has no mean in epoch 1, batch 4 "),
])
def test_a_batch_without_points_is_named(tmp_path, value, batches, accumulate, message):
    kind, options = without_points(value, *batches), dict(accumulate=accumulate, max_epochs=1)
    with pytest.raises(NonFinite, match=message) as e:
        fit(tmp_path, kind=kind, **options).train_and_validate()
    assert "learning rate" not in str(e.value) and "OnNonFinite()" in str(e.value)
    state = fit(tmp_path, "out", kind, policies=[OnNonFinite()], **options).train_and_validate()
    assert state.global_step == 6 // accumulate and state.policies["1 OnNonFinite"]["left_out"] == 1


def nested(kind, total):
    """OneCycleLR within another scheduler: alone after 4 steps of another, or beside another."""
    def make(optimizer):
        cycle = lr_scheduler.OneCycleLR(optimizer, max_lr=.1, total_steps=total)
        others = [lr_scheduler.ConstantLR(optimizer, 1.0), cycle]
        if kind == "chained":
            return lr_scheduler.ChainedScheduler(others)
        return lr_scheduler.SequentialLR(optimizer, others if kind == "after" else others[::-1], [4])

    return TorchSchedule(make, every="step")


@pytest.mark.parametrize(("kind", "needed"), [("chained", 18), ("after", 14), ("before", 3)])
def test_a_nested_schedule_that_ends_too_early_is_refused_at_the_start(tmp_path, kind, needed):
    trainer = fit(tmp_path, "short", learning_rate=nested(kind, needed - 1))
    with pytest.raises(ValueError, match=f"OneCycleLR ends after {needed - 1} steps, .* total_steps={needed}"):
        trainer.train_and_validate()
    assert trainer.state.global_step == 0
    whole = fit(tmp_path, "whole", learning_rate=nested(kind, needed)).train_and_validate()
    first = fit(tmp_path, learning_rate=nested(kind, needed))
    first.step(7)
    first.stop(wait=True)
    assert same_states(fit(tmp_path, learning_rate=nested(kind, needed)).train_and_validate(), whole) == []


def test_one_word_may_be_given_where_a_list_of_words_is_taken(tmp_path):
    assert [*TrainerSettings(accept="data").accept] == ["data"]
    with pytest.raises(ValueError, match="accept knows .*, not modle; did you mean 'model'"):
        TrainerSettings(accept="modle")
    with pytest.raises(ValueError, match="accept must be a list of 'data'.*, not True"):
        TrainerSettings(accept=True)
    state = fit(tmp_path, max_epochs=1).train_and_validate()
    wider = torch.nn.Sequential(*toy_model()[:3], torch.nn.Linear(16, 2))
    with pytest.warns(UserWarning, match="weights are taken over"):
        TrainerState.load(tmp_path / "run", wider, accept="model")
    with pytest.raises(ValueError, match="did you mean 'model'"):
        state.load_state_dict(state.state_dict(), accept=["modle"])

    class Counts(Policy):
        remembers = "count"
        count = 3

    assert Counts().state_dict() == {"count": 3}


def test_a_keyword_that_is_not_known_has_a_suggestion(tmp_path):
    for make, meant in (
        (lambda: fit(tmp_path, max_epoch=3), "max_epochs"),
        (lambda: fit(tmp_path, lerning_rate=3), "learning_rate"),
        (lambda: Fit(toy_model(), experiment_path=tmp_path), "experiments_path"),
    ):
        with pytest.raises(TypeError, match=f"unexpected keyword argument .*; did you mean {meant}\\?$"):
            make()
    assert not any(tmp_path.iterdir())


def test_the_settings_are_explained_where_help_is_asked_for():
    for kind in (Trainer, TrainerOneInput, Fit):
        text = pydoc.render_doc(kind.__init__, renderer=pydoc.plaintext)
        for name, s in settings_of(TrainerSettings).items():
            assert f"{name} = " in text and s.help in text.replace("\n", " ")


def test_a_folder_of_another_kind_says_what_to_do(tmp_path):
    fit(tmp_path, "a", max_epochs=1).train_and_validate()
    best = tmp_path / "a" / "best_model"
    with pytest.raises(DataError, match=f"Give its best_model: load_model\\('{best}'\\)"):
        load_model(tmp_path / "a", toy_model())
    load_model(best, toy_model())
    with pytest.raises(DataError, match="It holds 1 folders of runs: give one, such as a, or all .*find_runs"):
        read_runs(tmp_path)
    assert [*read_runs([run.folder for run in find_runs(tmp_path)])] == ["a"]


def sgd(lr, momentum):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=momentum)


def ready(lr, momentum):
    model = toy_model()
    return dict(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum))


@pytest.mark.parametrize("given", [lambda *a: dict(optimizer=sgd(*a)), ready])
def test_another_optimizer_than_the_run_goes_on_with_is_announced_once(tmp_path, given):
    whole = fit(tmp_path, "whole", max_epochs=4, **given(.1, .9)).train_and_validate()
    fit(tmp_path, max_epochs=1, **given(.1, .9)).train_and_validate()
    with pytest.warns(UserWarning, match=r"lr 0.1 -> 0.2, momentum 0.9 -> 0.8. To use the new ones, take\(\)"):
        fit(tmp_path, max_epochs=2, **given(.2, .8)).train_and_validate()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(tmp_path, max_epochs=3, **given(.2, .8)).train_and_validate()
        assert same_states(fit(tmp_path, max_epochs=4, **given(.1, .9)).train_and_validate(), whole) == []
    trainer = fit(tmp_path, max_epochs=5, **given(.3, .8))
    trainer.take().optimizer.param_groups[0]["momentum"] = .8
    trainer.change(learning_rate=.3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The optimizer is made")
        group = trainer.train_and_validate().optimizer.param_groups[0]
    assert (group["lr"], group["momentum"]) == (.3, .8)


def test_other_settings_of_a_run_are_seen_without_messages_too(tmp_path):
    fit(tmp_path, max_epochs=1, learning_rate=.1).train_and_validate()
    with pytest.warns(UserWarning, match=re.escape("Constant(0.1)'] -> ['Constant(0.2)")):
        fit(tmp_path, max_epochs=2, learning_rate=.2).train_and_validate()
    with pytest.warns(UserWarning, match="trained to its end.*clip_grad: None -> 3.0.*another experiment_name"):
        fit(tmp_path, max_epochs=2, learning_rate=.2, clip_grad=3.0).train_and_validate()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(tmp_path, max_epochs=2, learning_rate=.2).train_and_validate()


def test_a_branch_has_other_settings_on_purpose(tmp_path):
    state = fit(tmp_path, max_epochs=1).train_and_validate()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        branch = fit(tmp_path, "branch", max_epochs=2, learning_rate=.3)
        branch.train_and_validate(state.fork())
    assert any("Going on with other settings" in text for text in branch.messages)


class DrawsInLoss(Fit):
    def compute_batch_loss(self, batch):
        loss, n = super().compute_batch_loss(batch)
        return loss * (1 + torch.rand(())), n


def test_draws_of_a_kernel_are_a_remark_once_and_no_status(tmp_path):
    trainer = fit(tmp_path, kind=DrawsInLoss, max_epochs=2, tensorboard=False)
    for _ in range(2):
        trainer.step(2)
        assert trainer.status.phase == "paused" and "draws from" not in trainer.status.message
        trainer.stop(wait=True)
    assert len([m for m in trainer.messages if "This training draws from torch's" in m]) == 1


@pytest.mark.parametrize("chosen, named", [
    (lambda m: [m[0].weight], "0.bias, 3 and does not train them"), (lambda m: [*m[3].parameters()], "0 and does"),
    (lambda m: m.parameters(), ""), (lambda m: [p.requires_grad_(p.dim() == 2) for p in m.parameters()][::2], "")])
def test_layers_that_the_optimizer_lacks_are_named_once(tmp_path, chosen, named):
    model = toy_model()
    trainer = fit(tmp_path, model=model, optimizer=torch.optim.Adam(chosen(model)), max_epochs=2, tensorboard=False)
    for _ in range(2):
        trainer.train_one_epoch()
    found = [m for m in trainer.messages if m.startswith("The optimizer does not have")]
    assert len(found) == bool(named) and all(f"have {named}" in m for m in found)


def test_a_trainer_in_one_line(tmp_path):
    trainer = fit(tmp_path, name="a run", max_epochs=2, tensorboard=False)
    place = f"folder {str(tmp_path / 'a run')!r})"
    assert repr(trainer) == f"Fit('a run', idle, epoch 1/2, step 0, {place}"
    trainer.train_and_validate()
    best = trainer.state.best["loss"]
    assert repr(trainer) == f"Fit('a run', finished, epoch 2/2, step 12, best loss {best:.4g}, {place}"
    assert repr(Fit.__new__(Fit)) == "Fit(no run yet)"
