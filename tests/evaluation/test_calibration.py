"""Calibration: densities of directions integrate to one; a true one gives even numbers, a false one its distance."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import kstest

from tractkit.core.rng import fold, fold_ids
from tractkit.evaluation.calibration import (
    Answers,
    angle_pit,
    calibrate,
    calibrate_previous_direction,
    collect_answers,
    fit_kappa,
    fit_temperature,
    kolmogorov_distance,
    mean_loss,
    plot_calibrations,
    tempered,
)
from tractkit.models.densities import gaussian_log_prob, projected_normal_log_prob
from tractkit.models.direction_getters import DIRECTION_GETTERS, make_direction_getter
from tractkit.models.dwi_ml_getters import DwiMlFisherVonMises, DwiMlGaussian
from tractkit.models.learn2track import Learn2Track
from tractkit.models.targets import unit

DENSITIES = [key for key, getter in DIRECTION_GETTERS.items() if getter.unit_of_density]
LEVEL = 1e-3  # of the statistical tests; seeds are fixed


def keys(what, n):
    return fold_ids(fold(17, what), np.arange(n))


def random_numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spiral(n):
    k = torch.arange(n, dtype=torch.float64)
    z, turn = 1 - (2 * k + 1) / n, k * math.pi * (3 - 5**0.5)
    r = (1 - z * z).sqrt()
    return torch.stack([r * turn.cos(), r * turn.sin(), z], 1)


def true_answers(getter, n, temperature=1.0, seed=0):
    """Outputs, and directions that are drawn from what they say at a temperature."""
    sharp = 4 if "sphere" in getter.key else 1  # else 724 classes say next to nothing
    outputs = random_numbers(n, getter.nb_outputs, seed=seed) * sharp
    return Answers(outputs, tempered(getter, temperature).sample(outputs, keys("truth", n)), torch.zeros(n, 3))


@pytest.mark.parametrize("log_sigma", [[0.0, 0.5, -0.7], [-4.0, -3.5, -2.0], [2.0, 2.0, 2.0]])
def test_the_direction_of_a_gaussian_has_the_density_that_an_integral_gives(log_sigma):
    mean, log_sigma = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64), torch.tensor(log_sigma, dtype=torch.float64)
    x = unit(torch.cat([random_numbers(6).reshape(2, 3), mean[None].float(), -mean[None].float()]).double())

    def integrand(r, direction):
        return r**2 * float(gaussian_log_prob(mean, log_sigma, r * direction).exp())

    for direction in x:
        z, m = direction * (-log_sigma).exp(), mean * (-log_sigma).exp()
        middle, width = float(m @ z / (z @ z)), 1 / float(z.norm())
        low, high = max(0.0, middle - 12 * width), max(0.0, middle) + 12 * width
        wanted = quad(integrand, low, high, args=(direction,), epsabs=0, epsrel=1e-9, limit=200)[0]
        found = float(projected_normal_log_prob(mean, log_sigma, direction).exp())
        assert found == pytest.approx(wanted, rel=1e-6) or max(found, wanted) < 1e-200


def test_the_direction_of_a_gaussian_is_finite_far_behind():
    found = projected_normal_log_prob(torch.tensor([1.0, 0, 0]), torch.full((3,), -4.6), -torch.eye(3))
    assert torch.isfinite(found).all() and found[0] < -4900


@pytest.mark.parametrize("key", DENSITIES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_per_steradian_every_density_integrates_to_one(key, temperature):
    getter = tempered(make_direction_getter(key, 8, add_eos=True), temperature)
    x = spiral(40_000).float()
    outputs = random_numbers(1, getter.nb_outputs + 1, seed=4) / 2
    with torch.no_grad():
        total = float(getter.log_prob_per_steradian(outputs, x).double().exp().mean()) * 4 * math.pi
    assert total == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("key", DENSITIES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_true_density_gives_even_numbers(key, temperature):
    getter = make_direction_getter(key, 8)
    answers = true_answers(getter, 1500, temperature)
    true = tempered(getter, temperature)
    pit = angle_pit(true, answers.outputs, answers.directions, nb_draws=99)
    assert pit.shape == (1500,) and 0 <= pit.min() and pit.max() <= 1
    assert kstest(pit, "uniform").pvalue > LEVEL
    some = angle_pit(true, answers.outputs[:70], answers.directions[:70], nb_draws=99)
    np.testing.assert_allclose(some, pit[:70], rtol=0, atol=1e-5)  # whatever else is asked about
    few = angle_pit(true, answers.outputs, answers.directions, nb_draws=3)  # between ranks, too
    assert kstest(few, "uniform").pvalue > LEVEL
    if temperature == 1:
        too_sure = angle_pit(tempered(getter, 0.25), answers.outputs, answers.directions, nb_draws=99)
        assert kstest(too_sure, "uniform").pvalue < 1e-6 and (too_sure > 0.5).mean() > 0.55


@pytest.mark.parametrize("ratio", [0.25, 0.5, 2.0])
@pytest.mark.parametrize("key", ["fisher-von-mises", "fisher-von-mises-mixture", "gaussian"])
def test_a_density_that_is_too_sure_has_the_distance_that_is_known(key, ratio):
    """Of narrow densities, 1 - cos is exponential: the numbers have the distribution 1 - (1 - u) ** ratio."""
    n, kappa = 3000, 900.0
    mean = unit(random_numbers(n, 3, seed=2))
    if key == "gaussian":
        getter, outputs = DwiMlGaussian(8), torch.cat([mean, torch.full((n, 3), -math.log(kappa) / 2)], 1)
    elif key == "fisher-von-mises":
        getter, outputs = make_direction_getter(key, 8), torch.cat([mean, torch.full((n, 1), math.log(kappa / 10))], 1)
    else:
        getter = make_direction_getter(key, 8, nb_components=1)
        outputs = torch.cat([torch.zeros(n, 1), mean, torch.full((n, 1), math.log(kappa / 10))], 1)
    truth = tempered(getter, 1 / ratio).sample(outputs, keys("truth", n))
    s = ratio ** (1 / (1 - ratio))
    distance = kolmogorov_distance(angle_pit(getter, outputs, truth))
    assert distance == pytest.approx(abs(s**ratio - s), abs=1.95 / math.sqrt(n))  # level .001


def test_classes_are_judged_between_the_sums_without_and_with_a_class():
    getter = make_direction_getter("sphere-classification", 8)
    vertices = getter.vertices
    best, near = 5, int((vertices @ vertices[5]).argsort(descending=True)[1])
    logits = torch.full((724,), -60.0)
    logits[best], logits[near] = math.log(0.7), math.log(0.3)
    n = 400
    outputs = logits.expand(n, -1)
    right = angle_pit(getter, outputs, vertices[best].expand(n, 3))
    beside = angle_pit(getter, outputs, vertices[near].expand(n, 3))
    opposite = angle_pit(getter, outputs, -vertices[best].expand(n, 3))
    assert kstest(right / 0.7, "uniform").pvalue > LEVEL and opposite.min() > 1 - 1e-6
    assert kstest((beside - 0.7) / 0.3, "uniform").pvalue > LEVEL


@pytest.mark.parametrize("key", DENSITIES)
def test_the_temperature_of_the_truth_is_found(key):
    getter = make_direction_getter(key, 8)
    answers = true_answers(getter, 1500, 2.5, seed=5)
    assert fit_temperature(getter, answers, "likelihood") == pytest.approx(2.5, rel=0.1)
    assert fit_temperature(getter, answers) == pytest.approx(2.5, rel=0.2)  # of 50 draws at each point
    assert getter.temperature == 1.0
    found = calibrate(getter, answers, true_answers(getter, 1000, 2.5, seed=6))
    assert kstest(found.pit, "uniform").pvalue > LEVEL and found.distance < found.distance_before
    at_one = mean_loss(getter, answers)
    assert mean_loss(tempered(getter, found.temperature), answers) < at_one - 0.01


@pytest.mark.parametrize("getter", [DwiMlGaussian(8), DwiMlFisherVonMises(8)])
def test_getters_of_dwi_ml_have_a_temperature_too(getter):
    answers = true_answers(getter, 3000, 2.5)
    assert fit_temperature(getter, answers, "likelihood") == pytest.approx(2.5, rel=0.1)


def test_a_few_directions_that_are_far_off_do_not_widen_all():
    getter, n = make_direction_getter("fisher-von-mises", 8), 4000
    mean = unit(random_numbers(n, 3))
    outputs = torch.cat([mean, torch.full((n, 1), math.log(40))], 1)
    directions = getter.sample(outputs, keys("truth", n))
    directions[::50] = unit(random_numbers(n // 50, 3, seed=1))  # 2 % point anywhere
    answers = Answers(outputs, directions, mean)
    of = {by: calibrate(tempered(getter, fit_temperature(getter, answers, by)), None, answers)
          for by in ("distance", "likelihood")}
    assert of["distance"].temperature < 1.2 and of["distance"].distance < 0.03
    assert of["likelihood"].temperature > 3 and of["likelihood"].distance > 0.2
    with pytest.raises(ValueError, match="by is"):
        fit_temperature(getter, answers, "luck")


@pytest.mark.parametrize("kappa", [0.01, 1.0, 30.0, 5e4])
def test_kappa_of_a_mean_cosine(kappa):
    assert fit_kappa(1 / math.tanh(kappa) - 1 / kappa) == pytest.approx(kappa, rel=1e-2)
    assert fit_kappa(-0.2) < 1e-6 and fit_kappa(1.0) == pytest.approx(1e6)


def test_going_straight_is_judged_by_one_kappa():
    getter, n = make_direction_getter("fisher-von-mises", 8), 3000
    outputs = torch.cat([unit(random_numbers(n, 3)), torch.full((n, 1), 0.7)], 1)
    mean, kappas = getter.parameters_of(outputs)
    answers = Answers(outputs, getter.sample(outputs, keys("truth", n)), mean)
    found, kappa = calibrate_previous_direction(answers, answers)
    assert kappa == pytest.approx(float(kappas[0]), rel=0.06)
    assert kstest(found.pit, "uniform").pvalue > LEVEL
    assert found.loss == pytest.approx(mean_loss(getter, answers), abs=1e-3)


class _Lines:
    """A loader of batches that are there."""

    def __init__(self, points, offsets, known):
        n = len(offsets) - 1
        previous = torch.tensor([[1.0, 0, 0]]).expand(n, 3) * torch.tensor(known)[:, None]
        self.batch = SimpleNamespace(points=points, offsets=torch.tensor(offsets), voxel_sizes=torch.ones(n, 3),
                                     first_known=torch.tensor(known), previous=previous)

    def load_batch_streamlines(self, ids, training):
        assert not training
        return self.batch

    def load_batch_inputs(self, points, batch):
        return torch.zeros(len(batch.points), 2)


def test_points_without_a_direction_or_a_way_there_are_left_out():
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0],  # a duplicate in it, its start is unknown
                           [5, 5, 5],                                     # one point
                           [0, 0, 0], [1, 0, 0], [1, 0, 2]])              # its first point: the sense is given there
    loader = _Lines(points, [0, 4, 5, 8], [False, True, True])
    model = Learn2Track(2, rnn_layer_sizes=[4], dg_key="gaussian").train()
    found = collect_answers(model, loader, [None, None])
    assert model.training and len(found) == 2  # the turn after the duplicate has no way there; of two equal batches
    assert found.directions.tolist() == [[0, 0, 1]] * 2 and found.previous.tolist() == [[1, 0, 0]] * 2
    line = torch.cumsum(torch.ones(9, 3), 0)
    assert len(collect_answers(model, _Lines(line, [0, 9], [False]), [None], every=3)) == 3  # of 7
    with pytest.raises(ValueError, match="no point of the plan"):
        collect_answers(model, loader, [])


def test_a_picture_of_any_number_of_densities():
    getter = make_direction_getter("fisher-von-mises", 8)
    answers = true_answers(getter, 200)
    found = calibrate(getter, None, answers)
    for n in (1, 5):
        axes = plot_calibrations({f"number {k}": found for k in range(n)}).axes
        assert len(axes) == n and all(sum(p.get_height() for p in ax.patches) == pytest.approx(20) for ax in axes)


def test_a_temperature_at_its_bound_is_told_and_one_that_cannot_be_is_refused():
    getter = make_direction_getter("fisher-von-mises", 8)
    mean = unit(random_numbers(300, 3))
    sure = Answers(torch.cat([mean, torch.full((300, 1), 12.0)], 1), unit(random_numbers(300, 3, seed=1)), mean)
    for by in ("distance", "likelihood"):
        with pytest.warns(UserWarning, match=r"temperature of fisher-von-mises is at its bound.*\.01 to 100"):
            assert 97 < fit_temperature(getter, sure, by) <= 100
    for wrong in (0, -1, math.nan, math.inf, "1"):
        with pytest.raises(ValueError, match="temperature must be a number above 0"):
            getter.temperature = wrong
    assert getter.temperature == 1 and tempered(getter, np.float32(2)).temperature == 2


def test_what_is_not_what_it_should_be_is_told_in_one_sentence():
    model, getter = Learn2Track(2, rnn_layer_sizes=[4], dg_key="gaussian"), make_direction_getter("gaussian", 8)
    answers = true_answers(getter, 200)
    found = calibrate(getter, None, answers)
    assert repr(found).startswith("Calibration(200 points: distance 0.") and len(repr(found)) < 100
    with pytest.raises(TypeError, match="not a Learn2Track: give its direction_getter"):
        calibrate(model, None, answers)
    with pytest.raises(ValueError, match="cosine-regression has 3 outputs at a point, and these answers have 6"):
        calibrate(make_direction_getter("cosine-regression", 8), answers, answers)
    for wrong, error, message in ((found, TypeError, "by their names"), ({}, ValueError, "no calibration to draw"),
                                  ({"straight": (found, 3.0)}, TypeError, "straight: this is a pair"),
                                  ({"a": 3}, TypeError, "a: a Calibration is needed, not a int")):
        with pytest.raises(error, match=message):
            plot_calibrations(wrong)


def _overlaps(texts):
    boxes = [t.get_window_extent() for t in texts if t.get_text()]
    return [(a, b) for k, a in enumerate(boxes) for b in boxes[:k] if a.overlaps(b)]


def test_texts_of_the_picture_do_not_lie_on_one_another():
    getter = make_direction_getter("fisher-von-mises", 8)
    found = calibrate(tempered(getter, 2.476), None, true_answers(getter, 200))
    wrong = Answers(torch.cat([unit(random_numbers(200, 3)), torch.full((200, 1), 9.0)], 1),
                    unit(random_numbers(200, 3, seed=1)), torch.zeros(200, 3))
    cut = calibrate(getter, None, wrong)
    named = {f"the density number {k} of {k}": (cut if k % 2 else found) for k in range(6)}
    picture = plot_calibrations(named, columns=9)
    picture.array()
    texts = [t for ax in picture.axes
             for t in (ax._left_title, *ax.texts, *ax.get_xticklabels(), *ax.get_yticklabels())]
    assert _overlaps([*texts, *picture.texts]) == [] and all(t.get_window_extent().x1 <= 800 for t in texts)
    assert "↑20" in [t.get_text() for t in picture.axes[1].texts]  # the bar is cut at 5
