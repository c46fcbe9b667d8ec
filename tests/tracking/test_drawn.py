"""Streamlines whose directions are drawn: by seed point, half and step, not by batch; as the density is."""

import math

import numpy as np
import pytest
import torch

from tractkit.core.rng import fold, normal
from tractkit.models.base import TractographyModel
from tractkit.models.direction_getters import FisherVonMises, SphereClassification
from tractkit.models.learn2track import Learn2Track
from tractkit.models.transformers import TransformerSrcOnlyModel
from tractkit.spatial.volume import Volume
from tractkit.tracking.tracker import Tracker

ROOM = Volume(np.ones((40, 40, 40), bool), np.eye(4))
FIELD = Volume(normal(fold("field"), np.arange(40**3 * 3)).reshape(40, 40, 40, 3), np.eye(4))
SEEDS = np.float32([20, 20, 20]) + normal(fold("seeds"), np.arange(90)).reshape(30, 3)


class Always(TractographyModel):
    """Believes the same everywhere: some numbers of a getter."""

    nb_features = 3

    def __init__(self, getter, *numbers):
        super().__init__(step_size=0.1)
        self.getter, self.numbers = getter, torch.tensor(numbers)

    def init_state(self, n, device=None):
        return torch.zeros(n, 0, device=device)

    def step(self, inputs, previous, state):
        return self.getter.answer(self.numbers.expand(len(inputs), -1)), state


def lines_of(model, seeds=SEEDS, **options):
    options = dict(algo="prob", theta=180.0, min_length=0, max_length=12.0) | options
    tracker = Tracker(model, FIELD, ROOM, **options)
    return tracker.track(seeds, progress=False).streamlines


@pytest.mark.parametrize("key", ["fisher-von-mises", "gaussian-mixture", "sphere-classification", "tts"])
def test_a_streamline_does_not_depend_on_its_batch(key):
    model = Learn2Track(3, rnn_layer_sizes=[8], dg_key=key, nb_previous_dirs=2).eval() if key != "tts" else (
        TransformerSrcOnlyModel(3, input_embedded_size=8, nheads=2, n_layers_e=1, dg_key="gaussian").eval())
    want = lines_of(model)
    for batch_size in (1, 7):
        got = lines_of(model, batch_size=batch_size)
        np.testing.assert_array_equal(want.offsets, got.offsets)
        np.testing.assert_allclose(want.points, got.points, atol=1e-3)
    assert np.array_equal(want.points, lines_of(model).points)
    other = lines_of(model, seed=1)
    assert other.points.shape != want.points.shape or np.abs(other.points - want.points).max() > 1
    same = [lines_of(model, algo="det", seed=s).points for s in (0, 1)]
    assert np.array_equal(*same)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_each_draw_is_another_and_they_follow_the_density(temperature):
    """30 streamlines of 121 points; the mean of |cos| for κ = 3 within 4 standard errors."""
    kappa = 3.0
    getter = FisherVonMises(1)
    getter.temperature = temperature
    lines = lines_of(Always(getter, 0.0, 0.0, 1.0, math.log(temperature * kappa / 10)))
    steps = np.concatenate([np.diff(line, axis=0) for line in lines]) / 0.1
    assert len(steps) == 30 * 120 and len(np.unique(np.abs(steps).round(4), axis=0)) > 0.999 * len(steps)
    cosine = steps[:, 2]
    spread = math.sqrt((1 - 2 * _mean_absolute(kappa) / kappa) / len(steps))  # at most
    assert abs(np.abs(cosine).mean() - _mean_absolute(kappa)) < 4 * spread
    squares = cosine.reshape(30, 120) ** 2  # whatever the sense, a draw tells nothing of the next
    assert abs(np.corrcoef(squares[:, :-1].ravel(), squares[:, 1:].ravel())[0, 1]) < 4 / math.sqrt(3570)


def _mean_absolute(kappa: float) -> float:
    """E|cos| of Fisher–von Mises about the axis, by a fine sum."""
    t = (np.arange(200_000) + 0.5) / 100_000 - 1
    weights = np.exp(kappa * (t - 1))
    return float((np.abs(t) * weights).sum() / weights.sum())


@pytest.mark.parametrize("eos_stop, steps", [(0.0, 0), (0.2, 0), (0.5, 120), (1.0, 120), ("max", 120)])
@pytest.mark.parametrize("algo", ["det", "prob"])
def test_when_a_model_with_eos_ends_a_streamline(eos_stop, steps, algo):
    getter = FisherVonMises(1, add_eos=True)  # an end has probability 0.3
    lines = lines_of(Always(getter, 1.0, 0.0, 0.0, 3.0, math.log(0.3 / 0.7)), SEEDS[:2], eos_stop=eos_stop, algo=algo)
    assert [len(line) for line in lines] == ([steps + 1] * 2 if steps else [])


def test_classes_end_where_the_end_is_likelier_than_any_direction():
    numbers = torch.zeros(725)
    numbers[-1] = 1.0
    for extra, ends in ((0.0, True), (2.0, False)):
        numbers[10] = extra
        model = Always(SphereClassification(1, add_eos=True), *numbers.tolist())
        assert (len(lines_of(model, SEEDS[:2], eos_stop="max")) == 0) is ends


def test_the_getters_of_the_given_model_are_left_as_they_are():
    model = Learn2Track(3, rnn_layer_sizes=[8], dg_key="gaussian", add_eos=True).eval()
    lines_of(model, SEEDS[:3], eos_stop=1.0)
    assert model.direction_getter.keys is None and model.direction_getter.eos_stop == 0.5


@pytest.mark.parametrize("model, options, text", [
    (Learn2Track(3, rnn_layer_sizes=[4]), {}, "cosine-regression answers with one direction.*algo='det'"),
    (Learn2Track(3, rnn_layer_sizes=[4]), dict(algo="probabilistic"), 'choose "det" or "prob"'),
    (Learn2Track(3, rnn_layer_sizes=[4], dg_key="gaussian"), dict(eos_stop=1.5), "probability in"),
    (Learn2Track(3, rnn_layer_sizes=[4], dg_key="gaussian"), dict(eos_stop="often"), "probability in"),
])
def test_what_cannot_be_drawn_is_refused(model, options, text):
    with pytest.raises(ValueError, match=text):
        lines_of(model, **options)
