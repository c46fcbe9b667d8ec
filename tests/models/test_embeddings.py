"""What a body reads at each point: against plain loops; in tracking as in training, also where places are refilled."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_data import make_file
from helpers_training import leaves
from torch import nn

import tractkit as tk
from tractkit.models.base import TractographyModel, load_model, save_model
from tractkit.models.direction_getters import DIRECTION_GETTERS
from tractkit.models.embeddings import GridEmbedding, PointEmbedding, direction_history
from tractkit.models.learn2track import Learn2Track
from tractkit.models.targets import unit
from tractkit.spatial.volume import Neighborhood

GRID = dict(neighborhood_type="grid", neighborhood_radius=1, neighborhood_resolution=1.0)
INPUTS = {
    "none": {},
    "nn": dict(input_embedding_key="nn_embedding", input_embedded_size=7),
    "cnn": dict(input_embedding_key="cnn_embedding", nb_cnn_filters=[4, 3], kernel_size=2, **GRID),
}
PREVIOUS = {
    "none": {},
    "nn": dict(prev_dirs_embedding_key="nn_embedding", prev_dirs_embedded_size=5),
    "in mm": dict(prev_dirs_embedding_key="nn_embedding", normalize_prev_dirs=False),
}


def batch_of(lengths, seed=0, step=1.0, known=True, nb_features=3):
    """Streamlines with steps of one length, and random signal."""
    g = torch.Generator().manual_seed(seed)
    n, offsets = len(lengths), torch.tensor(np.cumsum([0, *lengths]))
    turns = [unit(torch.tensor([2.0, 0, 0]) + torch.randn(m, 3, generator=g)) * step for m in lengths]
    sizes = torch.tensor([[1.0, 2.0, 1.5]]).expand(n, 3)
    first = torch.arange(n) % 2 == 0 if known else torch.zeros(n, dtype=torch.bool)
    batch = SimpleNamespace(
        points=torch.cat([t.cumsum(0) for t in turns] + [torch.zeros(0, 3)]) / sizes[0], offsets=offsets,
        voxel_sizes=sizes, first_known=first, previous=unit(torch.randn(n, 3, generator=g)) * first[:, None],
        parts=torch.zeros(n, dtype=torch.int64), reversed=torch.zeros(n, dtype=torch.bool))
    return torch.randn(int(offsets[-1]), nb_features, generator=g), batch


def track(model: TractographyModel, inputs, batch, nb_places: int) -> torch.Tensor:
    """What a model answers, step by step, at each point of a batch, on its own way: a place that is finished begins
    the next streamline, while others are in the midst of theirs; when there is none left, it is dropped."""
    offsets, answers = batch.offsets, torch.full((len(inputs), 3), torch.nan)
    queue = [i for i in range(len(offsets) - 1) if offsets[i + 1] > offsets[i]]
    now, queue = queue[:nb_places], queue[nb_places:]
    at, state, previous = offsets[now].clone(), model.init_state(len(now)), batch.previous[now]
    while now:
        answers[at], state = model.step(inputs[at], previous, state)
        moved = torch.nn.functional.pad(batch.points, (0, 0, 0, 1))[at + 1] - batch.points[at]
        at, previous = at + 1, unit(moved * batch.voxel_sizes[0])
        done = [k for k, i in enumerate(now) if at[k] == offsets[i + 1]]
        refilled = done[:len(queue)]
        for k in refilled:
            now[k], queue = queue[0], queue[1:]
            at[k], previous[k] = offsets[now[k]], batch.previous[now[k]]
        if refilled:
            state = model.reset_state(state, torch.tensor(refilled))
        if dropped := done[len(refilled):]:
            keep = torch.tensor([k for k in range(len(now)) if k not in dropped], dtype=torch.int64)
            now, at, previous = [now[k] for k in keep], at[keep], previous[keep]
            state = model.select_state(state, keep)
    return answers


LENGTHS = [120, 1, 300, 2, 17, 0, 3, 64, 1, 40, 211, 5]


@pytest.mark.parametrize("rnn_key", ["lstm", "gru"])
@pytest.mark.parametrize("nb", [0, 1, 2, 4])
@pytest.mark.parametrize("key", INPUTS)
@torch.no_grad()
def test_tracking_answers_as_training_does_while_places_are_refilled(key, nb, rnn_key):
    for name, previous in PREVIOUS.items() if nb else [("none", {})]:
        model = Learn2Track(3, rnn_key, [9, 6], nb_previous_dirs=nb, use_skip_connection=nb == 2, step_size=0.5,
                            **INPUTS[key], **previous).eval()
        inputs, batch = batch_of(LENGTHS, step=0.5, nb_features=3 * (27 if key == "cnn" else 1))
        wanted = model.direction_getter.answer(model(inputs, batch))
        found = track(model, inputs, batch, nb_places=4)
        np.testing.assert_allclose(found, wanted, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("key", DIRECTION_GETTERS)
@torch.no_grad()
def test_every_getter_answers_in_tracking_as_in_training(key):
    inputs, batch = batch_of(LENGTHS)
    for eos in (False, True):
        model = Learn2Track(3, rnn_layer_sizes=[9, 6], dg_key=key, add_eos=eos, nb_previous_dirs=2).eval()
        outputs = model(inputs, batch)
        getter = model.direction_getter
        getter.eos_stop = float(getter.eos_probability(outputs).median()) if eos else 0.5
        wanted = model.direction_getter.answer(outputs)
        assert (wanted == 0).all(1).any() == eos
        found = track(model, inputs, batch, nb_places=4)
        near = torch.isclose(found, wanted, atol=1e-4).all(1)
        # where two answers are equally good, or the end is as likely as where it stops, rounding decides
        assert near.float().mean() > 0.99, f"eos={eos}: {int((~near).sum())} points differ"


@torch.no_grad()
def test_previous_directions_are_those_of_a_loop_over_streamlines():
    inputs, batch = batch_of([6, 1, 0, 3], step=0.7)
    for normalize in (True, False):
        embedding = PointEmbedding(3, 3, step_size=0.7, normalize_prev_dirs=normalize)
        rows = embedding(inputs, batch).numpy()
        assert rows.shape == (10, 12) and np.array_equal(rows[:, :3], inputs)
        for i, (a, b) in enumerate(itertools.pairwise(batch.offsets.tolist())):
            points = batch.points[a:b].numpy() * batch.voxel_sizes[i].numpy()
            steps = np.diff(points, axis=0)
            before = [np.zeros(3), np.zeros(3), batch.previous[i].numpy() * (1 if normalize else 0.7)]
            before += [s / np.linalg.norm(s) if normalize else s for s in steps]
            for t in range(b - a):
                np.testing.assert_allclose(rows[a + t, 3:], np.concatenate(before[t:t + 3][::-1]), atol=1e-6)


def test_the_future_is_not_read():
    _, batch = batch_of([9, 9])
    steps = unit(torch.randn(18, 3, generator=torch.Generator().manual_seed(0)))
    before = direction_history(steps, batch.offsets, batch.previous, 4)
    steps[5:9] = 7.0
    after = direction_history(steps, batch.offsets, batch.previous, 4)
    assert torch.equal(before[:6], after[:6]) and torch.equal(before[9:], after[9:])
    assert not torch.equal(before[6:9], after[6:9])


@torch.no_grad()
def test_a_convolution_sees_each_sample_at_its_place():
    around = Neighborhood("grid", 2, 1.0)
    grid = GridEmbedding(2, 2, [5], [3])
    coordinates = torch.from_numpy(around.vectors(np.ones(3)))
    signal = torch.stack([coordinates @ torch.tensor([1.0, 10.0, 100.0]), coordinates[:, 2]], 1)
    found = grid(signal.reshape(1, -1))[0]
    x, y, z = torch.meshgrid(*[torch.arange(-2.0, 3)] * 3, indexing="ij")
    cube = torch.stack([x + 10 * y + 100 * z, z])[None]
    wanted = torch.relu(nn.functional.conv3d(cube, grid.convolutions[0].weight, grid.convolutions[0].bias))
    torch.testing.assert_close(found, wanted.flatten())
    assert grid.output_size == 5 * 27 == len(found)


def test_a_longer_step_of_the_tracker_is_read_where_steps_are_not_normalized():
    model = Learn2Track(3, rnn_layer_sizes=[4], normalize_prev_dirs=False, step_size=None, nb_points=10).eval()
    x, previous = torch.ones(1, 3), torch.tensor([[1.0, 0, 0]])
    with pytest.raises(ValueError, match="set_step"):
        model.step(x, previous, model.init_state(1))
    rows = []
    for step in (0.5, 2.0):
        model.set_step(step)
        rows.append(model.embedding.step(x, previous, model.embedding.init_state(1))[0])
    assert rows[0][0, 3:].tolist() == [0.5, 0, 0] and rows[1][0, 3:].tolist() == [2.0, 0, 0]


@pytest.mark.parametrize("key", INPUTS)
def test_a_model_is_stored_with_its_embeddings_and_only_those_that_are_set(key, tmp_path):
    model = Learn2Track(3, rnn_layer_sizes=[4], nb_previous_dirs=2, **INPUTS[key], **PREVIOUS["in mm"]).eval()
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.hyperparameters == model.hyperparameters and again.hyperparameters["normalize_prev_dirs"] is False
    inputs, batch = batch_of([5, 2], nb_features=3 * (27 if key == "cnn" else 1))
    assert torch.equal(again(inputs, batch), model(inputs, batch))
    plain = Learn2Track(3, nb_previous_dirs=2)
    assert not {*PREVIOUS["in mm"], *INPUTS["cnn"]} & {*plain.hyperparameters}
    assert not [name for name, _ in plain.named_parameters() if name.startswith("embedding")]


@pytest.mark.parametrize("options, text", [
    (dict(input_embedding_key="nn_embeding"), "did you mean nn_embedding"),
    (dict(prev_dirs_embedding_key="cnn_embedding"),
     "prev_dirs_embedding_key must be one of no_embedding, nn_embedding"),
    (dict(input_embedding_key="cnn_embedding", nb_cnn_filters=4), 'neighborhood_type="grid"'),
    (dict(input_embedding_key="cnn_embedding", **GRID), "nb_cnn_filters"),
    (dict(input_embedding_key="cnn_embedding", nb_cnn_filters=[4, 4], **GRID), "raise neighborhood_radius"),
    (dict(input_embedding_key="cnn_embedding", nb_cnn_filters=[4, 4], kernel_size=[2] * 3, **GRID), "as many"),
    (dict(input_embedded_size=3), "not for no_embedding"),
    (dict(nb_previous_dirs=-1), "nb_previous_dirs"),
    (dict(nb_cnn_filters=[3]), "not for no_embedding"),
])
def test_settings_that_do_not_fit_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        Learn2Track(3, **options)


# -- stopped and resumed

@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tk.MultiSubjectDataset(make_file(tmp_path_factory.mktemp("data"), 2, n=12)[0]).load_data()


def trainer_of(dataset, folder, **options):
    """Everything random is switched on: dropout, splits, reversal and noise."""
    model = Learn2Track(3, rnn_layer_sizes=[6, 4], dropout=0.2, dg_dropout=0.2, step_size=3.0, seed=5, **options)
    sampler = tk.BatchIDSampler(dataset, "streamlines", 4, 4, rng=3)
    loader = tk.BatchLoaderOneInput(
        dataset, model, "input", "streamlines", rng=4, split_ratio=0.3, reverse_ratio=0.5,
        noise_gaussian_size_forward=0.1)
    return tk.TrainerOneInput(model, folder, "run", sampler, loader, max_epochs=2, learning_rate=0.01, num_threads=1,
                              device="cpu", progress=False)


def same_bits(dataset, tmp_path, **options):
    """A run that is stopped after two batches and resumed ends as one that is not."""
    whole = trainer_of(dataset, tmp_path / "whole", **options).train_and_validate()
    cut = trainer_of(dataset, tmp_path / "cut", **options)
    cut.step(2)
    cut.stop(wait=True)
    resumed = trainer_of(dataset, tmp_path / "cut", **options)
    after = resumed.train_and_validate()
    assert after.global_step == whole.global_step == 6 and resumed.model is not None
    for (path, a), (_, b) in zip(leaves(whole.model.state_dict()), leaves(after.model.state_dict()), strict=True):
        assert torch.equal(a, b), path


@pytest.mark.parametrize("key", ["cosine-regression", "gaussian", "fisher-von-mises"])
@torch.no_grad()
def test_a_model_in_voxels_tracks_in_mm_as_it_was_trained(key):
    """The convention of dwi_ml, in voxels of 1, 2 and 1.5 mm."""
    model = Learn2Track(3, rnn_layer_sizes=[9, 6], nb_previous_dirs=3, step_size=0.5, normalize_prev_dirs=False,
                        dg_key=key, convention="dwi_ml").eval()
    inputs, batch = batch_of([40, 1, 7, 90, 2], step=0.5, known=False)
    with pytest.raises(ValueError, match="set_step"):
        model.step(inputs[:1], torch.zeros(1, 3), model.init_state(1))
    wanted = unit(model.direction_getter.answer(model(inputs, batch)) * batch.voxel_sizes[0])
    model.set_step(0.5, batch.voxel_sizes[0])
    np.testing.assert_allclose(track(model, inputs, batch, nb_places=2), wanted, atol=1e-4)
    steps = batch.points[1:40] - batch.points[:39]
    np.testing.assert_allclose(model.targets(batch).directions[:39], unit(steps), atol=1e-6)


IN_SHORT = [("none", 1, "lstm"), ("nn", 4, "gru"), ("cnn", 2, "lstm")]


@pytest.mark.parametrize("key, nb, rnn_key", [
    each if each in IN_SHORT else pytest.param(*each, marks=pytest.mark.full)
    for each in itertools.product(INPUTS, (0, 1, 2, 4), ("lstm", "gru"))])
def test_stopped_at_a_batch_and_resumed_it_ends_in_the_same_bits(key, nb, rnn_key, dataset, tmp_path):
    options = dict(rnn_key=rnn_key, nb_previous_dirs=nb, **INPUTS[key], **PREVIOUS[["none", "nn", "in mm"][nb % 3]])
    same_bits(dataset, tmp_path, **options)


@pytest.mark.parametrize("key, eos, rnn_key", [
    each if each in [("gaussian", True, "lstm"), ("smooth-sphere-classification", False, "gru")] else
    pytest.param(*each, marks=pytest.mark.full)
    for each in itertools.product(DIRECTION_GETTERS, (False, True), ("lstm", "gru"))])
def test_every_getter_resumed_ends_in_the_same_bits(key, eos, rnn_key, dataset, tmp_path):
    same_bits(dataset, tmp_path, dg_key=key, add_eos=eos, rnn_key=rnn_key)
