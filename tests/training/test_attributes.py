"""Attributes of a trainer: settings can be read and are not set by mistake; a child class cannot hide a part."""

import pytest
from helpers_training import Fit, fit

from tractkit.training.live_settings import LIVE


def test_a_child_class_reads_settings_and_the_last_loss_from_itself(tmp_path):
    seen = []

    class Reads(Fit):
        def compute_batch_loss(self, batch):
            seen.append((self.max_epochs, self.clip_grad, self.num_workers))
            return super().compute_batch_loss(batch)

        def back_propagation(self, loss):
            seen.append(self.loss is loss)
            return super().back_propagation(loss)

    trainer = fit(tmp_path, kind=Reads, max_epochs=1, clip_grad=0.5)
    assert trainer.loss is None
    trainer.train_and_validate()
    assert set(seen) == {(1, 0.5, 0), True}


@pytest.mark.parametrize("name", ["max_epochs", "clip_grad", "learning_rate", "patience"])
def test_a_setting_that_is_set_as_an_attribute_names_change(tmp_path, name):
    trainer = fit(tmp_path)
    assert name in LIVE
    with pytest.raises(AttributeError, match=rf"{name} is a setting: trainer.change\({name}=...\) changes it"):
        setattr(trainer, name, 3)


@pytest.mark.parametrize("name", ["weight_decay", "accumulate", "rng", "num_workers", "checkpoint_every_batches"])
def test_a_setting_that_cannot_change_names_the_constructor(tmp_path, name):
    trainer = fit(tmp_path)
    before = getattr(trainer, name)
    with pytest.raises(AttributeError, match=rf"{name} is a setting: give it when it is made: Fit\(..., {name}=...\)"):
        setattr(trainer, name, 3)
    assert getattr(trainer, name) == before == getattr(trainer.settings, name)


@pytest.mark.parametrize(
    "name", ["runner", "live", "reporter", "session", "run_folder", "settings", "use", "use_folder"]
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_attribute_of_a_child_cannot_take_the_place_of_a_part(tmp_path, name, when):
    class Own(Fit):
        def __init__(self, *args, **settings):
            if when == "before":
                setattr(self, name, {"mine": 1})
            super().__init__(*args, **settings)
            setattr(self, name, {"mine": 1})

    with pytest.raises(AttributeError, match=f"{name} is a part of the trainer: an attribute of your own needs"):
        fit(tmp_path, kind=Own)


@pytest.mark.parametrize("name", ["settings", "runner", "use", "join"])
def test_a_method_of_a_child_cannot_hide_a_part(name):
    with pytest.raises(TypeError, match=f"Own.{name} hides a part of the trainer: give it another name"):
        type("Own", (Fit,), {name: lambda self: None})


@pytest.mark.parametrize("name", ["folder", "log", "checkpoints"])
def test_the_folder_of_a_run_is_given_when_the_trainer_is_made(tmp_path, name):
    trainer = fit(tmp_path)
    with pytest.raises(AttributeError, match=rf"{name} belongs to the folder of the run"):
        setattr(trainer, name, tmp_path / "elsewhere")


def test_other_attributes_are_free_and_go_along(tmp_path):
    class Own(Fit):
        def __init__(self, *args, **settings):
            self.batch = None  # set by hand, in whatever place
            super().__init__(*args, **settings)
            self.notes = ["mine"]

        def run_one_batch(self, batch):
            self.batch = batch
            return self.compute_batch_loss(batch)

    trainer = fit(tmp_path, kind=Own, max_epochs=1)
    trainer.train_and_validate()
    assert trainer.fork("b").notes == ["mine"]


def test_names_of_the_version_before_and_misspelt_ones_say_where_it_is(tmp_path):
    trainer = fit(tmp_path)
    for name, message in [
        ("views", "it is `loggers` now"),
        ("max_epoch", "did you mean max_epochs"),
        ("zzz", "'zzz'$"),
    ]:
        with pytest.raises(AttributeError, match=message):
            getattr(trainer, name)
    assert not hasattr(trainer, "_repr_png_")


def test_a_class_beside_the_trainer_may_take_keywords():
    class Tagged:
        def __init_subclass__(cls, tag="none", **kw):
            super().__init_subclass__(**kw)
            cls.tag = tag

    class Both(Fit, Tagged, tag="hello"):
        pass

    assert Both.tag == "hello"
