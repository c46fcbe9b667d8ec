"""Plans of a sampler of one's own, which has no settings: another one is said between epochs, refused within one."""

import numpy as np
import pytest
from helpers_training import Points, fit

from tractkit.runs.checkpoint import Checkpoints, load_checkpoint, save_checkpoint


class Plans(Points):
    """Plans of one's own, as lists of arrays, tuples or numbers, without a fingerprint."""

    kind = "arrays"

    def plan(self, epoch, subset):
        plan = super().plan(epoch, subset)
        return {"array": plan, "arrays": list(plan), "tuples": [tuple(b.tolist()) for b in plan]}[self.kind]

    def load_batch_streamlines(self, ids, *, epoch, training):
        return super().load_batch_streamlines(np.asarray(ids), epoch=epoch, training=training)


def planning(kind, **options):
    points = Plans(**options)
    points.kind = kind
    return points


OTHER = [({"seed": 2}, "batches 1, 2, 3, 4, 5, 6 are others"), ({"n": 4}, "6 batches -> 4")]


@pytest.mark.parametrize("kind", ["array", "arrays", "tuples"])
@pytest.mark.parametrize(("other", "text"), OTHER)
@pytest.mark.parametrize("options", [{}, {"iterations_per_epoch": 9}], ids=["whole", "chained"])
def test_another_plan_is_said_between_epochs(tmp_path, kind, other, text, options):
    fit(tmp_path, points=planning(kind), max_epochs=1, **options).train_and_validate()
    same = fit(tmp_path, points=planning(kind), max_epochs=2, **options)
    same.train_and_validate()
    assert not any("sampler" in m for m in same.messages)
    trainer = fit(tmp_path, points=planning(kind, **other), max_epochs=3, **options)
    trainer.train_and_validate()
    assert [m for m in trainer.messages if "sampler" in m] == [
        f"The sampler plans other batches than before: of epoch 2, {text}."
    ]


@pytest.mark.parametrize("kind", ["array", "arrays", "tuples"])
@pytest.mark.parametrize("other", [{"seed": 2}, {"n": 9}])
def test_another_plan_in_the_middle_of_an_epoch_is_refused(tmp_path, kind, other):
    trainer = fit(tmp_path, points=planning(kind))
    trainer.step(8)
    trainer.stop(wait=True)
    with pytest.raises(ValueError, match="whose batches are not this sampler's"):
        fit(tmp_path, points=planning(kind, **other)).train_and_validate()
    assert fit(tmp_path, points=planning(kind)).train_and_validate().epoch == 3


def test_what_a_plan_has_may_be_anything(tmp_path):
    """Objects of one's own are compared by their kind alone; a plan of before is compared by its number."""
    class Item:
        def __init__(self, ids):
            self.ids = ids

    class Items(Points):
        def plan(self, epoch, subset):
            return [Item(ids) for ids in super().plan(epoch, subset)]

        def load_batch_streamlines(self, item, *, epoch, training):
            return super().load_batch_streamlines(item.ids, epoch=epoch, training=training)

    for epochs in (1, 2):
        trainer = fit(tmp_path, points=Items(seed=epochs), max_epochs=epochs)
        trainer.train_and_validate()
        assert not any("sampler" in m for m in trainer.messages)
    checkpoints = Checkpoints(trainer.folder / "checkpoints")
    for step in checkpoints.steps():
        tree = load_checkpoint(checkpoints.path(step))
        del tree["fingerprints"]["planned"]
        save_checkpoint(checkpoints.path(step), tree)
    trainer = fit(tmp_path, points=Items(4), max_epochs=3)
    trainer.train_and_validate()
    assert not any("sampler" in m for m in trainer.messages)
