"""What a user has set stays: rates of groups, modes of layers; and a model is trained in one run at a time."""

import copy
from functools import partial

import pytest
import torch
from helpers_training import Fit, fit, same_states, toy_model
from torch import nn
from torch.optim import lr_scheduler

from tractkit.training.callbacks import TorchSchedule
from tractkit.training.policy import Policy


def groups(parameters):
    first, *others = parameters
    return torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": others, "lr": 0.001}])


def rates(trainer):
    return [group["lr"] for group in trainer.state.optimizer.param_groups]


def test_rates_of_groups_are_not_levelled(tmp_path):
    trainer = fit(tmp_path, "list", optimizer=groups, learning_rate=[.01, .001])
    with pytest.raises(ValueError, match=r"rates of their own \(0.1, 0.001\), and PerEpoch.* would give one to all"):
        trainer.train_and_validate()
    assert trainer.checkpoints.steps() == []
    number = fit(tmp_path, "number", optimizer=groups, learning_rate=.01)
    number.step(2)
    for rate in (.5, [.1, .2]):
        with pytest.raises(ValueError, match="would give one to all"):
            number.change(learning_rate=rate)
    number.stop(wait=True)
    assert rates(number) == [.1, .001]
    halving = TorchSchedule(partial(lr_scheduler.LambdaLR, lr_lambda=lambda epoch: .5**epoch))
    scaled = fit(tmp_path, "scaled", optimizer=groups, learning_rate=halving)
    scaled.train_and_validate()
    assert rates(scaled) == [.1 / 8, .001 / 8]


def one_cycle(total, every="step"):
    return TorchSchedule(partial(lr_scheduler.OneCycleLR, max_lr=.1, total_steps=total), every=every)


@pytest.mark.parametrize("total, every, options, needed", [
    (17, "step", {}, 18), (18, "step", {}, 0), (8, "step", {"accumulate": 2}, 9), (9, "step", {"accumulate": 2}, 0),
    (2, "epoch", {}, 3), (3, "epoch", {}, 0), (6, "step", {"max_epochs": 1}, 0)])
def test_a_schedule_that_ends_too_early_is_refused_at_the_start(tmp_path, total, every, options, needed):
    trainer = fit(tmp_path, learning_rate=one_cycle(total, every), **options)
    if needed:
        with pytest.raises(ValueError, match=f"OneCycleLR ends after {total} steps, and this .* total_steps={needed}"):
            trainer.train_and_validate()
        assert trainer.state.global_step == 0 and trainer.status.phase == "failed"
        return
    trainer.step(4)
    trainer.stop(wait=True)
    fit(tmp_path, learning_rate=one_cycle(total, every), **options).train_and_validate()


def net(in_eval=True):
    first, *rest = toy_model()
    model = nn.Sequential(first, nn.BatchNorm1d(16), *rest)
    if in_eval:
        model[1].eval()
    return model


class Modes(Fit):
    def compute_batch_loss(self, batch):
        modes.append((self.model.training, self.model[1].training))
        return super().compute_batch_loss(batch)


modes: list[tuple[bool, bool]] = []


def test_layers_in_eval_mode_stay_in_it(tmp_path):
    modes.clear()
    whole = fit(tmp_path, "whole", kind=Modes, model=net())
    whole.train_and_validate()
    assert set(modes) == {(True, False), (False, False)} and whole.model[1].num_batches_tracked == 0
    cut = fit(tmp_path, "cut", kind=Modes, model=net())
    cut.listeners.append(lambda event, t: t.stop() if t.status.phase == "validating" and t.state.epoch == 1 else None)
    cut.train_and_validate()
    assert not cut.model.training  # all of it, since a validation was interrupted
    cut.listeners.clear()
    cut.train_and_validate()
    assert same_states(cut.state, whole.state) == []
    other = fit(tmp_path, "cut", model=net(in_eval=False), max_epochs=4)
    other.train_and_validate()
    assert "Other layers are in eval mode than before: 1 -> none" in " ".join(other.messages)
    assert other.model[1].num_batches_tracked == 6


def test_a_run_of_before_puts_all_layers_in_training_mode(tmp_path):
    trainer = fit(tmp_path, model=net(), max_epochs=1)
    trainer.train_and_validate()
    del trainer.state.fingerprints["in_eval"]  # as a state that was made before
    trainer.model.train()
    trainer.model[1].eval()
    again = fit(tmp_path, model=net(), max_epochs=2)
    again.train_and_validate(trainer.state)
    assert again.model[1].num_batches_tracked == 6


# -- one model, two runs

def test_a_model_of_another_run_is_announced_and_its_state_is_kept_apart(tmp_path):
    whole = fit(tmp_path, "whole", max_epochs=4)
    whole.train_and_validate()
    model = toy_model()
    first = fit(tmp_path, "first", model=model, max_epochs=2)
    first.train_and_validate()
    second = fit(tmp_path, "second", model=model, max_epochs=1)
    second.train_and_validate()
    text = " ".join(second.messages)
    assert "trained in another run before, in" in text and "this run begins with the weights of that one" in text
    with pytest.raises(RuntimeError, match="the model of this state was trained in another run since"):
        first.state.snapshot()
    first.change(max_epochs=4)
    first.train_and_validate()
    assert "The model was trained in another run: going back" in " ".join(first.messages)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), whole.model.parameters(), strict=True))
    again = fit(tmp_path, "first", model=model, max_epochs=5)  # the cell that makes the trainer, run again
    again.train_and_validate()
    assert "another run" not in " ".join(again.messages)


def test_a_model_is_trained_in_one_run_at_a_time(tmp_path):
    model = toy_model()
    one, two = fit(tmp_path, "one", model=model), fit(tmp_path, "two", model=model)
    one.step(2)
    with pytest.raises(RuntimeError, match="this model is being trained already, in .*one: .* copy.deepcopy"):
        two.train_and_validate()
    three = fit(tmp_path, "three", model=copy.deepcopy(model), max_epochs=1)
    three.train_and_validate()
    one.stop(wait=True)
    two.train_and_validate()


def test_fewer_epochs_than_are_done(tmp_path):
    trainer = fit(tmp_path)
    trainer.step(13)
    trainer.stop(wait=True)
    less = fit(tmp_path, max_epochs=1)
    less.train_and_validate()
    assert (
        "Nothing left to train" in less.status.message
        and "2 epochs are done and max_epochs is 1" in less.status.message
    )


def with_head(encoder):
    return nn.Sequential(encoder, nn.Linear(4, 1))


def test_two_models_that_share_an_encoder(tmp_path):
    encoder = nn.Linear(1, 4)
    one, other = (fit(tmp_path, name, model=with_head(encoder), max_epochs=2) for name in ("one", "other"))
    one.step(1)
    with pytest.raises(RuntimeError, match="a part of this model is being trained already, in .*one: .* copy.deepcopy"):
        other.train_and_validate()
    one.stop(wait=True)
    other.train_and_validate()
    assert [m for m in other.messages if m.startswith("A part of this model was trained in another run before")]
    with pytest.raises(RuntimeError, match="the model of this state was trained in another run since"):
        one.state.snapshot()
    one.train_and_validate()
    assert "The model was trained in another run: going back" in " ".join(one.messages)


def test_two_models_may_share_an_encoder_that_is_not_trained(tmp_path):
    encoder = nn.Linear(1, 4).requires_grad_(False)
    one, other = (fit(tmp_path, name, model=with_head(encoder), max_epochs=1) for name in ("one", "other"))
    one.step(1)
    other.train_and_validate()
    one.stop(wait=True)
    assert not any("another run" in m for m in [*one.messages, *other.messages])
    one.state.snapshot()


def test_two_trainings_of_one_model_that_start_at_once(tmp_path):
    model = toy_model()
    first, second = fit(tmp_path, "first", model=model), fit(tmp_path, "second", model=model)
    first.start(paused=True)
    with pytest.raises(RuntimeError, match="this model is being trained already, in .*first"):
        second.start()
    first.stop(wait=True)
    second.train_and_validate()
    assert second.status.phase == "finished"


def test_the_model_of_another_run_is_said_where_no_message_is_shown(tmp_path):
    model = toy_model()
    fit(tmp_path, "first", model=model, max_epochs=1).train_and_validate()
    with pytest.warns(UserWarning, match="trained in another run before, in .*first: this run begins with the weights"):
        fit(tmp_path, "second", model=model, max_epochs=1).train_and_validate()


def test_a_layer_that_a_policy_puts_in_eval_mode_stays_in_it(tmp_path):
    class Freezes(Policy):
        def epoch_started(self, epoch):
            model[1].eval()

    model = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    fit(tmp_path, model=model, policies=[Freezes()]).train_and_validate()
    assert model[1].num_batches_tracked == 0


class FreezesInItsOwnLoop(Fit):
    """Puts a layer in eval mode in a loop of its own."""

    def train_one_epoch(self):
        if self.state.epoch != 1:
            self.model[1].eval()
        return super().train_one_epoch()


def test_a_layer_that_a_loop_of_ones_own_puts_in_eval_mode_stays_in_it(tmp_path):
    whole = fit(tmp_path, kind=FreezesInItsOwnLoop, model=net(in_eval=False), max_epochs=1)
    whole.train_and_validate()
    assert whole.model[1].num_batches_tracked == 0
    whole = fit(tmp_path, kind=FreezesInItsOwnLoop, model=net(in_eval=False), max_epochs=3)
    whole.train_and_validate()
    assert whole.model[1].num_batches_tracked == whole.state.global_step // 3  # of the second epoch

    cut = fit(tmp_path, "cut", kind=FreezesInItsOwnLoop, model=net(in_eval=False), max_epochs=3)
    for _ in range(5):
        cut.step()
    cut.stop(wait=True)
    assert not cut.state.fingerprints["in_eval"] and cut.model[1].num_batches_tracked == 0
    cut.train_and_validate()
    assert "eval mode" not in " ".join(cut.messages)
    assert same_states(cut.state, whole.state) == []


def test_a_run_begun_when_layers_were_put_back_goes_on_so(tmp_path):
    old = fit(tmp_path, kind=FreezesInItsOwnLoop, model=net(in_eval=False), max_epochs=1)
    old.step()
    old.stop(wait=True)
    del old.state.fingerprints["modes"]
    old.train_and_validate()
    assert old.model[1].num_batches_tracked == old.state.global_step - 1  # all but the first
