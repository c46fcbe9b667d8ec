"""Densities against float64, scipy and numerical integrals; getters on every kind of point; their draws."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

from tractkit import Learn2Track, load_model
from tractkit.core.rng import fold, fold_ids
from tractkit.models.base import save_model, step_targets
from tractkit.models.densities import (
    draw_component,
    fisher_von_mises_entropy,
    fisher_von_mises_log_prob,
    fisher_von_mises_sample,
    keyed_uniform,
    mixture_log_prob,
)
from tractkit.models.direction_getters import DIRECTION_GETTERS, make_direction_getter
from tractkit.models.layers import initialize_weights
from tractkit.models.targets import StepTargets, true_ends, unit

KAPPAS = (0.0, 1e-6, 1e-3, 0.0499, 0.0501, 1.0, 44.0, 88.0, 590.0, 1e4)
DENSITIES = [key for key, getter in DIRECTION_GETTERS.items() if getter.unit_of_density]
REGRESSIONS = [key for key in DIRECTION_GETTERS if key not in DENSITIES]


def spiral(n):
    """n points of equal area on the sphere, (n, 3) float64."""
    k = np.arange(n)
    z = 1 - (2 * k + 1) / n
    turn = k * math.pi * (3 - 5**0.5)
    r = np.sqrt(1 - z * z)
    return torch.from_numpy(np.stack([r * np.cos(turn), r * np.sin(turn), z], 1))


def reference_log_prob(mean, kappa, x):
    """The log density in float64, by the formula as it is in books where that does not overflow."""
    if kappa == 0:
        return np.full(len(x), -math.log(4 * math.pi))
    return math.log(kappa) - math.log(2 * math.pi) - kappa - math.log(-math.expm1(-2 * kappa)) + kappa * (x @ mean)


@pytest.mark.parametrize("kappa", KAPPAS)
def test_fisher_von_mises_is_exact_in_float32(kappa):
    mean = np.array([2.0, -1, 2]) / 3
    x = torch.cat([spiral(400), torch.from_numpy(mean[None]), torch.from_numpy(-mean[None])]).numpy()
    mine = fisher_von_mises_log_prob(
        torch.tensor(mean, dtype=torch.float32), torch.tensor(kappa), torch.tensor(x, dtype=torch.float32)
    )
    wanted = reference_log_prob(mean, kappa, x)
    np.testing.assert_allclose(mine.numpy(), wanted, rtol=2e-6, atol=2e-6 * (1 + kappa / 50))


@pytest.mark.parametrize("kappa", [k for k in KAPPAS if k > 1e-3])
def test_fisher_von_mises_is_scipys(kappa):
    mean, x = np.array([0.6, 0.0, 0.8]), spiral(100)
    wanted = stats.vonmises_fisher(mean, kappa)
    mine = fisher_von_mises_log_prob(torch.from_numpy(mean), torch.tensor(kappa, dtype=torch.float64), x)
    np.testing.assert_allclose(mine.numpy(), wanted.logpdf(x.numpy()), rtol=1e-8, atol=1e-8 * (1 + kappa))
    entropy = fisher_von_mises_entropy(torch.tensor(kappa, dtype=torch.float64))
    assert float(entropy) == pytest.approx(wanted.entropy(), abs=1e-7)


@pytest.mark.parametrize("kappa", KAPPAS)
def test_gradients_of_fisher_von_mises(kappa):
    x = unit(torch.tensor([[1.0, 2, 2], [-1, 0, 0.3], [0.61, 0.01, 0.79]], dtype=torch.float64))
    k = torch.full((3,), kappa, dtype=torch.float32, requires_grad=True)
    direction = torch.tensor([0.6, 0.0, 0.8], requires_grad=True)
    fisher_von_mises_log_prob(unit(direction), k, x.float()).sum().backward()
    cosine = x.numpy() @ [0.6, 0, 0.8]
    slope = 1 / np.tanh(kappa) - 1 / kappa if kappa > 1e-2 else kappa / 3  # A(κ), the mean cosine
    np.testing.assert_allclose(k.grad.numpy(), cosine - slope, atol=2e-6)
    along = kappa * (x.numpy().sum(0) - cosine.sum() * np.array([0.6, 0, 0.8]))  # at right angles to the mean
    np.testing.assert_allclose(direction.grad.numpy(), along, rtol=1e-4, atol=1e-4 * (1 + kappa / 100))


def test_a_component_far_away_takes_nothing_with_it():
    logits = torch.tensor([[0.0, 3.0]], requires_grad=True)
    far = torch.tensor([[-2.0, -3e6]], requires_grad=True)
    value = mixture_log_prob(logits, far)
    value.sum().backward()
    wanted = logsumexp(torch.log_softmax(logits, -1).double().detach().numpy() + far.double().detach().numpy())
    assert float(value.detach()) == pytest.approx(wanted, abs=1e-5)
    assert torch.isfinite(logits.grad).all() and far.grad.tolist() == [[1.0, 0.0]]


def outputs_of(getter, rows=1, seed=0, spread=1.0):
    """Numbers as a trained body gives them: a density that is neither flat nor a needle."""
    draws = torch.randn(rows, getter.out.out_features, generator=torch.Generator().manual_seed(seed)) * spread
    return draws


@pytest.mark.parametrize("key", DENSITIES)
def test_a_density_integrates_to_one(key):
    getter = make_direction_getter(key, 8).double()
    outputs = outputs_of(getter).double()
    if getter.unit_of_density == "steradian":
        x, cell = spiral(60_000), 4 * math.pi / 60_000
    else:
        outputs[:, -getter.nb_outputs // 2 :] = outputs[:, -getter.nb_outputs // 2 :].abs()  # wide enough for the grid
        axis = torch.linspace(-14, 14, 141, dtype=torch.float64)
        x, cell = torch.cartesian_prod(axis, axis, axis), float(axis[1] - axis[0]) ** 3
    total = sum(float(getter.log_prob(outputs, part).exp().sum()) for part in x.split(200_000)) * cell
    assert total == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("key", DIRECTION_GETTERS)
@pytest.mark.parametrize("eos", [False, True])
def test_gradients_are_those_of_finite_differences(key, eos):
    options = {"sphere": "repulsion100"} if "sphere" in key else {} if key in REGRESSIONS else {"entropy_weight": 0.1}
    getter = make_direction_getter(key, 8, add_eos=eos, **options).double()
    outputs = outputs_of(getter, 5, 3).double().requires_grad_()
    targets = unit(outputs_of(getter, 5, 9).double()[:, :3])
    targets[3] = 0
    rest = torch.tensor([True, False, False, False, False]), torch.tensor([False, False, False, True, False])
    lengths = torch.tensor([1.0, 2, 1, 0, 0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda o: getter.loss(o, targets, *rest, lengths)[0], (outputs,))


@pytest.mark.parametrize("key", DIRECTION_GETTERS)
@pytest.mark.parametrize("eos", [False, True])
def test_duplicates_single_points_and_empty_batches_are_finite(key, eos):
    getter = make_direction_getter(key, 8, add_eos=eos)
    for points in (0, 1, 3):
        outputs = torch.zeros(points, getter.out.out_features, requires_grad=True)
        none = torch.zeros(points, dtype=torch.bool)
        loss, n = getter.loss(outputs, torch.zeros(points, 3), none, none, torch.zeros(points))
        loss.backward()
        assert n == 0 and float(loss) == 0 and torch.isfinite(outputs.grad).all()
    outputs = torch.zeros(4, getter.out.out_features, requires_grad=True)  # a body that is silent
    targets = torch.tensor([[0, 0, 1.0], [0, 0, 0], [1, 0, 0], [0, 0, 0]])
    ends = torch.tensor([False, False, False, True])
    loss, n = getter.loss(outputs, targets, torch.zeros(4, dtype=torch.bool), ends, torch.tensor([1.0, 0, 1, 0]))
    loss.backward()
    assert n == (3 if eos else 2) and torch.isfinite(outputs.grad).all() and float(outputs.grad.abs().max()) < 10
    each, _ = getter.loss(
        outputs, targets, torch.zeros(4, dtype=torch.bool), ends, torch.tensor([1.0, 0, 1, 0]), average_results=False
    )
    assert each.isnan().tolist() == [False, True, False, not eos]
    assert float(each.nansum() / n) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("key", DIRECTION_GETTERS)
def test_either_way_is_as_good_where_the_sense_is_unknown(key):
    getter = make_direction_getter(key, 8)
    outputs, targets = outputs_of(getter, 6, 2), unit(outputs_of(getter, 6, 5)[:, :3])
    unknown, known = torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)
    lengths = torch.ones(6)
    there, back = (
        getter.loss(outputs, sense * targets, unknown, None, lengths, average_results=False)[0] for sense in (1, -1)
    )
    np.testing.assert_allclose(there.detach(), back.detach(), rtol=1e-4, atol=1e-5)
    one_way = getter.loss(outputs, targets, known, None, lengths, average_results=False)[0]
    other = getter.loss(outputs, -targets, known, None, lengths, average_results=False)[0]
    assert not torch.allclose(one_way, other, atol=1e-3)


@pytest.mark.parametrize("key", DIRECTION_GETTERS)
def test_an_end_is_scored_by_eos_alone(key):
    getter = make_direction_getter(key, 8, add_eos=True, eos_weight=2.0)
    outputs = outputs_of(getter, 1, 4).requires_grad_()
    end, no = torch.tensor([True]), torch.tensor([False])
    loss, n = getter.loss(outputs, torch.zeros(1, 3), no, end, torch.zeros(1))
    p = float(getter.eos_probability(outputs))
    assert n == 1 and float(loss) == pytest.approx(-2 * math.log(p), rel=1e-4)
    inner, _ = getter.loss(outputs, torch.tensor([[0, 0, 1.0]]), no, no, torch.ones(1))
    alone = make_direction_getter(key, 8).loss(outputs[:, :-1], torch.tensor([[0, 0, 1.0]]), no, None, torch.ones(1))[0]
    if "sphere" in key:
        assert float(inner) == pytest.approx(float(alone) - math.log(1 - p), rel=1e-4)
    else:
        assert float(inner) == pytest.approx(float(alone) - 2 * math.log(1 - p), rel=1e-4)
    assert getter.stops(outputs, p * 0.999).tolist() == [True] and getter.stops(outputs, p * 1.001).tolist() == [False]
    assert getter.answer(outputs, eos_stop=p * 0.999).abs().max() == 0
    with pytest.raises(ValueError, match="where streamlines end"):
        getter.loss(outputs, torch.zeros(1, 3), no, None, torch.zeros(1))
    with pytest.raises(ValueError, match="eos_stop"):
        getter.stops(outputs, "often")


def test_ends_that_were_cut_are_no_ends():
    offsets = torch.tensor([0, 3, 3, 4, 7, 9])
    parts, turned = torch.tensor([1, 0, 0, 2, 1]), torch.tensor([False, False, True, True, True])
    assert true_ends(offsets, parts, turned, 9).nonzero()[:, 0].tolist() == [3, 8]
    batch = SimpleNamespace(points=torch.rand(9, 3), offsets=offsets, voxel_sizes=torch.full((5, 3), 2.0),
                            first_known=torch.zeros(5, dtype=torch.bool), previous=torch.zeros(5, 3))
    found = step_targets(batch)  # it does not say that any was cut
    assert found.ends.nonzero()[:, 0].tolist() == [2, 3, 6, 8] and float(found.lengths[2]) == 0
    batch.parts, batch.reversed = parts, turned
    assert step_targets(batch).ends.nonzero()[:, 0].tolist() == [3, 8]
    wanted = torch.linalg.vector_norm(batch.points[1] - batch.points[0]) * 2
    assert float(found.lengths[0]) == pytest.approx(float(wanted))


@pytest.mark.parametrize("kappa", [1e-4, 0.3, 5.0, 100.0, 9000.0])
def test_draws_of_fisher_von_mises_follow_its_distribution(kappa):
    n = 20_000
    mean = torch.tensor([0.48, -0.6, 0.64])
    u, v = keyed_uniform(fold_ids(fold(11, "draws"), np.arange(n)), 2, mean)
    drawn = fisher_von_mises_sample(mean.expand(n, 3), torch.full((n,), kappa), u, v)
    np.testing.assert_allclose(torch.linalg.vector_norm(drawn, dim=1), 1, atol=1e-6)
    gap = ((drawn - mean) ** 2).sum(1).double().numpy() / 2
    cdf = lambda t: np.expm1(-kappa * np.minimum(t, 2)) / np.expm1(-2 * kappa)  # noqa: E731
    assert stats.kstest(gap, cdf).pvalue > 1e-3
    side = torch.linalg.cross(mean, torch.tensor([0.0, 0, 1]))
    turn = torch.atan2(drawn @ unit(side), drawn @ torch.linalg.cross(unit(side), mean)).numpy()
    assert stats.kstest(turn, stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 1e-3
    edge = fisher_von_mises_sample(mean.expand(2, 3), torch.full((2,), kappa), torch.tensor([0.0, 1 - 2**-24]), v[:2])
    assert torch.isfinite(edge).all()


@pytest.mark.parametrize("key", DENSITIES)
def test_draws_follow_the_density_and_depend_on_the_key_only(key):
    n, getter = 20_000, make_direction_getter(key, 8)
    outputs = outputs_of(getter, 1, 8)
    keys = fold_ids(fold(3, "draws"), np.arange(n))
    drawn = getter.sample(outputs.expand(n, -1), keys)
    few = getter.sample(outputs.expand(3, -1), keys[[5, 1, 800]])
    assert torch.equal(few, drawn[[5, 1, 800]])
    regions = spiral(30).float()  # counts around 30 points against the integral of the density
    if getter.unit_of_density == "steradian":
        x = spiral(60_000).float()
        p = getter.log_prob(outputs, x).exp().double().detach().numpy()
    else:  # of a direction: integrate over its length
        x, r = spiral(6_000).float(), torch.linspace(0.005, 12, 1200)
        p = sum((getter.log_prob(outputs, x * one).exp() * one**2).double() for one in r).detach().numpy()
    share = np.bincount((x @ regions.T).argmax(1).numpy(), p, 30)
    seen = np.bincount((drawn @ regions.T).argmax(1).numpy(), minlength=30)
    expected = share / share.sum() * n
    if "sphere" in key:  # vertices on the edge of a region: compare classes
        seen = np.bincount(getter.classes(drawn).numpy(), minlength=724)
        expected = torch.softmax(outputs[0].double(), -1).numpy() * n
    few = expected < 5
    pooled = [np.append(c[~few], c[few].sum()) for c in (seen, expected)]
    pooled = [c[pooled[1] > 0] for c in pooled]
    assert stats.chisquare(*pooled).pvalue > 1e-3


def test_one_of_the_components_is_drawn_by_weight():
    weights = torch.tensor([0.5, 0.3, 0.0, 0.2])
    chosen = draw_component(weights.log().expand(1000, 4), torch.arange(1000) / 1000)
    assert np.bincount(chosen.numpy(), minlength=4).tolist() == [500, 300, 0, 200]


@pytest.mark.parametrize("key", DENSITIES)
def test_the_direction_is_where_the_density_is_high(key):
    getter = make_direction_getter(key, 8)
    outputs = outputs_of(getter, 1, 1, spread=2.0)
    best = getter.direction(outputs)
    assert float(torch.linalg.vector_norm(best)) == pytest.approx(1, abs=1e-5)
    others = spiral(2000).float()
    if getter.unit_of_density == "steradian":
        found = getter.log_prob(outputs, best)[0]
        assert float(found) >= float(getter.log_prob(outputs, others).max()) - 0.7


@pytest.mark.parametrize("key", ["fisher-von-mises-mixture", "gaussian-mixture"])
def test_of_a_mixture_the_highest_mode_is_chosen_not_the_heaviest(key):
    getter = make_direction_getter(key, 8, nb_components=2)
    wide, narrow = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
    width = [-1.5, 2.5] if "fisher" in key else [1.0] * 3 + [-1.0] * 3
    numbers = torch.tensor([[1.0, 0.0, *(wide - getter.apart[0]), *(narrow - getter.apart[1]), *width]])
    np.testing.assert_allclose(getter.direction(numbers)[0], narrow, atol=1e-6)
    numbers[0, 1] = -9  # nearly no weight
    np.testing.assert_allclose(getter.direction(numbers)[0], wide, atol=1e-6)


@pytest.mark.parametrize("key", ["fisher-von-mises-mixture", "gaussian-mixture"])
@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_components_start_apart(key, k):
    getter = make_direction_getter(key, 8, nb_components=k)
    means = unit(getter.parameters_of(torch.zeros(getter.nb_outputs))[1])
    assert means.shape == (k, 3) and (k == 1 or bool((means.norm(dim=1) > 0.99).all()))
    assert (k == 1 or float((means @ means.T - 2 * torch.eye(k)).max()) < 0.8)


@pytest.mark.parametrize("key", [key for key in DENSITIES if "sphere" not in key])
def test_entropy_is_taken_from_the_loss_by_its_weight(key):
    plain, rewarded = (make_direction_getter(key, 8, entropy_weight=w) for w in (0.0, 0.3))
    outputs, targets = outputs_of(plain, 4, 6), unit(outputs_of(plain, 4, 7)[:, :3])
    none = torch.zeros(4, dtype=torch.bool)
    lower, loss = (float(each.loss(outputs, targets, none)[0]) for each in (rewarded, plain))
    assert loss - lower == pytest.approx(0.3 * float(plain._entropy(outputs).mean()), rel=1e-3, abs=1e-5)
    assert abs(loss - lower) > 0.01


@pytest.mark.parametrize("key", REGRESSIONS)
def test_one_answer_cannot_be_drawn(key):
    getter = make_direction_getter(key, 8)
    with pytest.raises(ValueError, match="such as fisher-von-mises"):
        getter.sample(torch.zeros(1, 3), np.zeros(1, np.uint64))
    with pytest.raises(ValueError, match="no density"):
        getter.log_prob(torch.zeros(1, 3), torch.zeros(1, 3))


def batch_of(lengths, seed=0):
    """Streamlines that turn slowly, with random signal."""
    g = torch.Generator().manual_seed(seed)
    points = [torch.cumsum(unit(torch.tensor([1.0, 0, 0]) + 0.3 * torch.randn(n, 3, generator=g)), 0) for n in lengths]
    offsets = torch.tensor(np.cumsum([0, *lengths]))
    n = len(lengths)
    batch = SimpleNamespace(points=torch.cat(points), offsets=offsets, voxel_sizes=torch.ones(n, 3),
                            first_known=torch.zeros(n, dtype=torch.bool), previous=torch.zeros(n, 3),
                            parts=torch.zeros(n, dtype=torch.int64), reversed=torch.zeros(n, dtype=torch.bool))
    return torch.randn(len(batch.points), 5, generator=g), batch


@pytest.mark.parametrize("key", DIRECTION_GETTERS)
@pytest.mark.parametrize("eos", [False, True])
def test_learn2track_with_every_getter_trains_is_stored_and_steps_as_it_was_trained(key, eos, tmp_path):
    model = Learn2Track(5, rnn_layer_sizes=[12, 12], dg_key=key, add_eos=eos)
    inputs, batch = batch_of([9, 1, 30, 2])
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(25):
        loss, n = model.compute_loss(model(inputs, batch), model.targets(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert n == (42 if eos else 38) and losses[-1] < losses[0] - 0.02
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    with torch.no_grad():
        outputs = model.eval()(inputs, batch)
        assert torch.equal(outputs, again(inputs, batch))
        assert again.hyperparameters == model.hyperparameters
        wanted = model.direction_getter.answer(outputs)[10:40]  # of the streamline of 30 points
        state, previous = again.init_state(1), torch.zeros(1, 3)
        for k in range(30):
            step, state = again.step(inputs[10 + k][None], previous, state)
            np.testing.assert_allclose(step[0], wanted[k], atol=1e-4)
            previous = unit(batch.points[11 + k] - batch.points[10 + k])[None] if k < 29 else previous


def test_a_getter_that_is_not_there_or_has_no_such_setting_is_refused():
    with pytest.raises(ValueError, match="did you mean gaussian"):
        Learn2Track(5, dg_key="gausian")
    with pytest.raises(ValueError, match="gaussian has no sphere; it is for sphere-classification"):
        Learn2Track(5, dg_key="gaussian", sphere="symmetric724")
    with pytest.raises(ValueError, match="did you mean symmetric724"):
        Learn2Track(5, dg_key="sphere-classification", sphere="symmetric742")
    with pytest.raises(ValueError, match="lengths"):
        make_direction_getter("l2-regression", 8).loss(torch.zeros(1, 3), torch.ones(1, 3), torch.tensor([False]))


def test_weights_of_a_model_do_not_depend_on_the_settings_that_are_new():
    model = Learn2Track(5)
    assert "add_eos" not in model.hyperparameters  # a run of before compares its settings with these
    assert Learn2Track(5, dg_key="gaussian", add_eos=True).hyperparameters["add_eos"] is True
    getter = make_direction_getter("fisher-von-mises", 8)
    initialize_weights(getter, 3)
    assert isinstance(model.targets(batch_of([3])[1]), tuple) and not isinstance(
        model.targets(batch_of([3])[1]), StepTargets
    )
