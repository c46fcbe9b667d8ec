"""What is unusual is named where it is, with what to do: batches without points, schedules that end, other settings."""

import math

import pytest
from helpers_training import Fit, fit

from tractkit.training.callbacks import OnNonFinite
from tractkit.training.errors import NonFinite


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
