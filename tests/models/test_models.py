"""Layers, directions, models: against torch's own, against plain loops in float64, and against themselves."""

import copy
import json
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tractkit.core.files import DataError
from tractkit.core.rng import fold, normal, uniform
from tractkit.models.base import TractographyModel, build_model, load_model, register_model, save_model
from tractkit.models.direction_getters import CosineRegression
from tractkit.models.layers import (
    KeyedDropout,
    StackedRNN,
    StepNoise,
    _cut_by_cost,
    initialize_weights,
    pad_buckets,
    use_generator,
)
from tractkit.models.learn2track import Learn2Track
from tractkit.models.targets import point_directions, previous_directions, unit


def draws(*key, shape):
    return torch.from_numpy(normal(fold(*key), np.arange(int(np.prod(shape)))).reshape(shape).astype(np.float32))


def make_batch(lengths, seed=0, known=0.5, sizes=(1.0, 1.0, 1.0)):
    lengths = np.asarray(lengths)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    n = len(lengths)
    points = torch.cumsum(draws(seed, "points", shape=(int(offsets[-1]), 3)), 0)
    first = torch.from_numpy(uniform(fold(seed, "known"), np.arange(n)) < known)
    previous = unit(draws(seed, "previous", shape=(n, 3))) * first[:, None]
    return SimpleNamespace(points=points, offsets=offsets, first_known=first, previous=previous,
                           voxel_sizes=torch.tensor(sizes).expand(n, 3))


# -- padding

@given(st.lists(st.integers(0, 40), max_size=60), st.floats(0, 300))
@settings(max_examples=60, deadline=None)
def test_padding_and_back_is_the_identity(lengths, overhead):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    x = torch.arange(float(2 * offsets[-1])).view(-1, 2).requires_grad_()
    buckets = pad_buckets(offsets, overhead)
    if not offsets[-1]:
        assert not buckets.gather
        return
    blocks = buckets.pad(x)
    y = buckets.pack(blocks)
    assert torch.equal(y, x)
    weights = torch.arange(float(y.numel())).view_as(y)
    (y * weights).sum().backward()
    assert torch.equal(x.grad, weights)
    for block, ids in zip(blocks, buckets.streamlines, strict=True):
        for j, i in enumerate(ids.tolist()):  # a streamline is one column, then its last point again and again
            own = x[offsets[i]:offsets[i + 1]]
            assert torch.equal(block[:len(own), j], own)
            assert (block[len(own):, j] == own[-1]).all()
    seen = torch.cat(list(buckets.streamlines))
    assert sorted(seen.tolist()) == [i for i, n in enumerate(lengths) if n]


@pytest.mark.parametrize("overhead", [0.0, 3.0, 50.0])
def test_cuts_are_the_best_there_are(overhead):
    lengths = np.array([19, 19, 12, 11, 7, 7, 2, 1])

    def cost(cuts):
        edges = [0, *cuts, len(lengths)]
        return sum(lengths[a] * (b - a + overhead) for a, b in zip(edges[:-1], edges[1:], strict=True))

    best = min(cost(c) for k in range(len(lengths)) for c in combinations(range(1, len(lengths)), k))
    assert cost(_cut_by_cost(lengths, overhead)[:-1]) == best


# -- recurrent layers

@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_stack_equals_torch(kind):
    theirs = getattr(nn, kind.upper())(5, 8, num_layers=2)
    ours = StackedRNN(5, (8, 8), kind)
    for i, layer in enumerate(ours.layers):
        layer.load_state_dict({k[:-1] + "0": v for k, v in theirs.state_dict().items() if k.endswith(str(i))})
    x = draws("x", shape=(9, 4, 5))
    assert torch.allclose(ours(x)[0], theirs(x)[0], atol=1e-6)


def test_blocks_equal_a_packed_sequence():
    lengths = np.array([5, 1, 30, 12, 12, 7])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rnn = StackedRNN(4, (6,))
    initialize_weights(rnn, 0)
    x = draws("x", shape=(int(offsets[-1]), 4))
    buckets = pad_buckets(offsets)
    ours = buckets.pack([rnn(b)[0] for b in buckets.pad(x)])
    packed = nn.utils.rnn.pack_sequence(
        [x[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)], enforce_sorted=False
    )
    theirs = nn.utils.rnn.unpack_sequence(rnn.layers[0](packed)[0])
    assert torch.allclose(ours, torch.cat(theirs), atol=1e-6)


def test_bad_layers_are_refused():
    with pytest.raises(ValueError, match="'lstm' or 'gru'"):
        StackedRNN(3, (4,), "rnn")
    with pytest.raises(ValueError, match="layer_sizes is empty"):
        StackedRNN(3, ())
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        KeyedDropout(1.0)


# -- noise and first weights

def test_dropout_keeps_the_mean_and_leaves_the_global_generator_alone():
    drop, x = KeyedDropout(0.4), torch.full((200_000,), 2.0)
    before = torch.get_rng_state()
    y = drop(x)
    assert abs(float(y.mean()) - 2) < 0.02 and abs(float((y == 0).float().mean()) - 0.4) < 0.01
    assert torch.equal(before, torch.get_rng_state())
    use_generator(drop, torch.Generator())
    assert copy.deepcopy(drop).generator is None  # a copy draws from no one else's generator


def test_models_are_built_without_the_global_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = Learn2Track(7, dropout=0.1, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    b, other = Learn2Track(7, dropout=0.1, seed=3), Learn2Track(7, seed=4)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(a.parameters(), other.parameters(), strict=True))


def test_first_weights_have_torchs_bounds():
    for layer, inputs in ((nn.Linear(50, 400), 50), (nn.LSTM(9, 64), 64)):
        initialize_weights(layer, 0)
        for p in layer.parameters():
            p = p.detach()
            assert abs(float(p.abs().max()) * inputs**0.5 - 1) < 0.1 and abs(float(p.mean())) < 0.2 / inputs**0.5
    with pytest.raises(TypeError, match="ConvTranspose1d"):
        initialize_weights(nn.Sequential(nn.ConvTranspose1d(1, 1, 1)), 0)


def test_step_noise_with_torchs_dropout_restores_the_generator():
    layer = nn.Dropout(0.5)
    with pytest.warns(UserWarning, match="global generator"):
        noise = StepNoise(layer, 5)
    with noise.step(9):
        a = layer(torch.ones(100))
    before = torch.get_rng_state()
    with noise.step(9):
        b = layer(torch.ones(100))
    assert torch.equal(a, b) and torch.equal(before, torch.get_rng_state())


# -- directions

@given(st.lists(st.integers(0, 6), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_directions_against_a_plain_loop(lengths):
    batch = make_batch(lengths)
    sizes = np.array([0.7, 2.0, 3.1])
    each = torch.tensor(sizes, dtype=torch.float32).expand(len(lengths), 3)
    expected, reached_by = np.zeros((len(batch.points), 3)), np.zeros((len(batch.points), 3))
    for i in range(len(lengths)):
        a, b = int(batch.offsets[i]), int(batch.offsets[i + 1])
        line = batch.points[a:b].double().numpy()
        for t in range(len(line) - 1):
            step = (line[t + 1] - line[t]) * sizes
            expected[a + t] = step / np.linalg.norm(step)
        if b > a:
            reached_by[a] = batch.previous[i]
            reached_by[a + 1:b] = expected[a:b - 1]
    d = point_directions(batch.points, batch.offsets, each)
    assert np.allclose(d, expected, atol=1e-4)
    assert np.allclose(previous_directions(d, batch.offsets, batch.previous), reached_by, atol=1e-4)


def test_loss_against_a_plain_loop_and_its_gradient():
    head = CosineRegression(4)
    outputs, targets = draws("o", shape=(40, 3)).double(), unit(draws("t", shape=(40, 3)).double())
    targets[::7] = 0
    undirected = torch.arange(40) % 3 == 0
    plain = []
    for o, t, u in zip(outputs.numpy(), targets.numpy(), undirected.numpy(), strict=True):
        if t.any():
            c = o @ t / np.linalg.norm(o)
            plain.append(1 - (abs(c) if u else c))
    mean, n = head.loss(outputs, targets, undirected)
    assert n == len(plain) and abs(float(mean) - np.mean(plain)) < 1e-12
    each, _ = head.loss(outputs, targets, undirected, average_results=False)
    assert np.allclose(each[~each.isnan()], plain)
    assert torch.autograd.gradcheck(lambda o: head.loss(o, targets, undirected)[0], outputs.requires_grad_())
    assert head.loss(outputs, torch.zeros_like(targets), undirected) == (0.0, 0)


# -- Learn2Track

VARIANTS = [
    dict(),
    dict(rnn_key="gru"),
    dict(use_skip_connection=True, use_layer_normalization=True),
    dict(nb_previous_dirs=0),
    dict(rnn_layer_sizes=[9]),
]


@pytest.mark.parametrize("options", VARIANTS)
def test_stepping_equals_forward(options):
    model = Learn2Track(4, **{"rnn_layer_sizes": [8, 6], **options}).eval()
    batch = make_batch([7, 1, 12, 0, 3], sizes=(1.0, 2.0, 3.0))
    inputs = draws("in", shape=(len(batch.points), 4))
    with torch.no_grad():
        expected = unit(model(inputs, batch))
        directions = point_directions(batch.points, batch.offsets, batch.voxel_sizes)
        previous = previous_directions(directions, batch.offsets, batch.previous)
        lengths = batch.offsets.diff()
        alive, state = torch.arange(5), model.init_state(5)
        for t in range(12):
            keep = lengths[alive] > t
            alive, state = alive[keep], model.select_state(state, keep)
            at = batch.offsets[alive] + t
            direction, state = model.step(inputs[at], previous[at], state)
            assert torch.allclose(direction, expected[at], atol=1e-5)
            assert torch.allclose(direction.norm(dim=1), torch.ones(len(at)), atol=1e-5)


@pytest.mark.parametrize("options", VARIANTS)
def test_outputs_depend_on_the_past_only_and_on_no_neighbour(options):
    model = Learn2Track(4, **{"rnn_layer_sizes": [8, 6], **options}).eval()
    batch = make_batch([9, 14, 5])
    inputs = draws("in", shape=(28, 4))
    with torch.no_grad():
        before = model(inputs, batch)
        batch.points[15:] += 3   # streamline 1 from its 6th point on, and streamline 2
        inputs[15:] -= 1
        after = model(inputs, batch)
        assert torch.allclose(before[:15], after[:15], atol=1e-6) and not torch.allclose(
            before[16:], after[16:], atol=1e-3
        )
        alone = SimpleNamespace(
            points=batch.points[:9],
            offsets=torch.tensor([0, 9]),
            first_known=batch.first_known[:1],
            previous=batch.previous[:1],
            voxel_sizes=batch.voxel_sizes[:1],
        )
        assert torch.allclose(model(inputs[:9], alone), after[:9], atol=1e-6)


def test_unknown_starts_are_undirected():
    batch = make_batch([5, 0, 1, 4], known=0.5)
    batch.first_known = torch.tensor([True, True, False, False])
    targets = Learn2Track(3).targets(batch)
    assert targets.undirected.nonzero().flatten().tolist() == [5, 6]
    assert (targets.directions == 0).all(1).nonzero().flatten().tolist() == [4, 5, 9]


def test_settings_that_do_not_exist_are_refused():
    for options, text in (
        (dict(dg_key="magic"), "dg_key"),
        (dict(nb_previous_dirs=-1), "nb_previous_dirs"),
        (dict(rnn_key="x"), "rnn_key"),
    ):
        with pytest.raises(ValueError, match=text):
            Learn2Track(3, **options)


# -- saving

def test_a_saved_model_answers_alike(tmp_path):
    model = Learn2Track(4, rnn_layer_sizes=(6, 5), dropout=0.3, rnn_key="gru", seed=9).eval()
    save_model(model, tmp_path / "best")
    back = load_model(tmp_path / "best")
    assert type(back) is Learn2Track and back.hyperparameters == model.hyperparameters and not back.training
    batch = make_batch([6, 3])
    x = draws("in", shape=(9, 4))
    assert torch.equal(back(x, batch), model(x, batch))
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == ["model.json", "model.safetensors"]
    assert json.loads((tmp_path / "best/model.json").read_text())["model"] == "Learn2Track"


def test_tied_weights_are_saved(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    model = Tied()
    save_model(model, tmp_path)
    back = load_model(tmp_path, Tied())
    assert torch.equal(back.b.weight, model.a.weight) and back.b.weight is back.a.weight


def test_files_name_no_class_of_their_own(tmp_path):
    class Sneaky(nn.Linear):
        pass

    save_model(Sneaky(2, 2), tmp_path)
    with pytest.raises(ValueError, match="Sneaky is no registered model"):
        load_model(tmp_path)
    for name in ("os.system", "TractographyModel", "Trainer", "nn.Linear"):
        with pytest.raises(ValueError, match="no registered model"):
            build_model(name, {})

    class Learn2Track(TractographyModel):  # noqa: F811
        pass

    with pytest.raises(ValueError, match="another name"):
        register_model(Learn2Track)


def test_damaged_models_are_reported(tmp_path):
    with pytest.raises(DataError, match=r"no model\.safetensors"):
        load_model(tmp_path)
    save_model(Learn2Track(4, rnn_layer_sizes=(6,)), tmp_path)
    path = tmp_path / "model.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-3])
    with pytest.raises(DataError, match="cannot be read"):
        load_model(tmp_path)
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(DataError, match="cannot be read"):
        load_model(tmp_path)


def test_a_misspelt_setting_is_refused_and_a_child_may_have_its_own():
    with pytest.raises(
        TypeError, match="Learn2Track has no setting 'neighborhod_type'; did you mean neighborhood_type"
    ):
        Learn2Track(3, neighborhod_type="axes")
    with pytest.raises(TypeError, match="Learn2Track has no setting 'zzz'$"):
        Learn2Track(3, zzz=1)

    class Child(Learn2Track):
        def __init__(self, nb_features, gain=1.0):
            super().__init__(nb_features, gain=gain)

    assert Child(3, gain=2.0).hyperparameters["gain"] == 2.0
