"""loader: the same augmentation in any batch and worker, nothing lost, the right signal under each point."""

import numpy as np
import pytest
import torch
from helpers_data import CONFIG, SHAPE, make_file, make_subject, random_lines
from torch.utils.data import DataLoader

from tractkit.dataset import MultiSubjectDataset
from tractkit.files import DataError
from tractkit.hdf5 import create_hdf5
from tractkit.loader import MIN_PART, BatchLoaderOneInput, StreamlinesBatchLoader, sample_trilinear
from tractkit.sampler import BatchIDSampler
from tractkit.space import voxel_sizes
from tractkit.streamlines import Streamlines, resample_step
from tractkit.tractogram import Tractogram
from tractkit.volume import Volume

AUGMENT = dict(split_ratio=0.5, reverse_ratio=0.5, noise_gaussian_size_forward=0.1, noise_gaussian_size_loss=0.2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path, sources = make_file(tmp_path_factory.mktemp("made"), n_subjects=4)
    return MultiSubjectDataset(path).load_data(), sources


def by_streamline(loader, batch):
    """Everything about each (subject, id, part), to compare batches of different composition."""
    noisy = {"forward": loader.add_noise_streamlines_forward(batch), "loss": loader.add_noise_streamlines_loss(batch)}
    found = {}
    for name, r in zip(batch.subjects, batch.subject_ranges, strict=True):
        for i in range(r.start, r.stop):
            cut = slice(int(batch.offsets[i]), int(batch.offsets[i + 1]))
            key = name, int(batch.streamline_ids[i]), int(batch.parts[i])
            assert key not in found
            found[key] = [t[cut] for t in (batch.points, *(b.points for b in noisy.values()))] + [
                batch.previous[i], batch.first_known[i], batch.reversed[i]]
    return found


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, y) for k in a for x, y in zip(a[k], b[k], strict=True))


def test_augmentation_does_not_depend_on_the_batch(made):
    dataset, _ = made
    loader = BatchLoaderOneInput(dataset, None, "input", "streamlines", rng=3, step_size=0.8, **AUGMENT)
    everything = {}
    for size in (1000, 7, 1):
        sampler = BatchIDSampler(dataset, "streamlines", size, rng=size)
        parts = [by_streamline(loader, loader.load_batch_streamlines(batch, epoch=5)) for batch in sampler.plan(0)]
        everything[size] = {k: v for p in parts for k, v in p.items()}
    assert same(everything[1000], everything[7]) and same(everything[1000], everything[1])
    ids = list(BatchIDSampler(dataset, "streamlines", 1000).plan(0))[0]
    other_epoch = by_streamline(loader, loader.load_batch_streamlines(ids, epoch=6))
    assert not same(everything[1000], other_epoch)
    other_seed = BatchLoaderOneInput(dataset, None, "input", "streamlines", rng=4, step_size=0.8, **AUGMENT)
    assert not same(everything[1000], by_streamline(other_seed, other_seed.load_batch_streamlines(ids, epoch=5)))


@pytest.mark.parametrize("lazy, method", [(False, "fork"), (True, "fork"), (True, "spawn")])
def test_workers_change_nothing(made, lazy, method):
    dataset = MultiSubjectDataset(made[0].path, lazy=lazy).load_data()
    loader = BatchLoaderOneInput(dataset, None, "input", "streamlines", **AUGMENT)
    sampler = BatchIDSampler(dataset, "streamlines", 16)
    sampler.set_epoch(3)

    def run(n):
        options = dict(num_workers=n, multiprocessing_context=method, prefetch_factor=3) if n else {}
        return list(DataLoader(dataset.training_set, batch_sampler=sampler, collate_fn=loader.load_batch_streamlines, **options))

    here, there = run(0), run(2)
    assert len(here) == len(there) == len(sampler)
    for a, b in zip(here, there, strict=True):
        assert a.epoch == b.epoch == 3 and a.training and same(by_streamline(loader, a), by_streamline(loader, b))


@pytest.mark.parametrize("n", [1, 2, 8, 10, 11, 12, 13, 30])
def test_split_loses_nothing(tmp_path, n):
    """dwi_ml deletes streamlines of up to 12 points that were chosen for a split."""
    t = make_subject(tmp_path / "a", np.random.default_rng(0), n=40, points=(n, n + 1))
    path = create_hdf5(tmp_path, tmp_path / "x.hdf5", CONFIG, {"training": ["a"]}, progress=False)
    loader = StreamlinesBatchLoader(MultiSubjectDataset(path).load_data(), None, "streamlines", split_ratio=1)
    batch = loader.load_batch_streamlines([("a", np.arange(40))])
    assert sorted(set(batch.streamline_ids.tolist())) == list(range(40))
    lengths = np.bincount(batch.streamline_ids, batch.streamlines().lengths(t.affine))
    assert np.allclose(lengths, t.lengths_mm, rtol=1e-4)
    assert len(batch) == (80 if n >= 2 * MIN_PART - 1 else 40)
    if n >= 2 * MIN_PART - 1:
        assert batch.nb_points.min() >= MIN_PART and (batch.parts > 0).all()
    if n == 30:  # the cut is anywhere
        assert len(np.unique(batch.nb_points[::2])) > 10


def test_shares_are_as_asked(tmp_path):
    make_subject(tmp_path / "a", np.random.default_rng(0), n=2000, points=(15, 16))
    path = create_hdf5(tmp_path, tmp_path / "x.hdf5", CONFIG, {"training": ["a"]}, progress=False)
    loader = StreamlinesBatchLoader(MultiSubjectDataset(path).load_data(), None, "streamlines", split_ratio=0.3, reverse_ratio=0.6, known_start_ratio=0.2)
    batch = loader.load_batch_streamlines([("a", np.arange(2000))])
    assert (batch.parts == 1).sum() / 2000 == pytest.approx(0.3, abs=0.04)
    assert batch.reversed.float().mean() == pytest.approx(0.6, abs=0.04)
    assert batch.first_known.float().mean() == pytest.approx(0.2, abs=0.04)
    both = torch.stack([batch.reversed[:-1][batch.parts[:-1] == 1], batch.reversed[1:][batch.parts[1:] == 2]]).double()
    assert abs(torch.corrcoef(both)[0, 1]) < 0.15  # the parts of one streamline turn independently


def test_validation_is_not_augmented(made):
    dataset, sources = made
    loader = BatchLoaderOneInput(dataset, None, "input", "streamlines", step_size=1, **AUGMENT)
    sampler = BatchIDSampler(dataset, "streamlines", 16, 1000)
    ids = sampler.plan(4, "validation")[0]
    batch = loader.load_batch_streamlines(ids)
    assert not batch.training and not batch.reversed.any() and not batch.parts.any()
    t = sources[ids[0][0]]
    assert np.allclose(batch.points, resample_step(t.streamlines, 1, t.affine)[0].points, atol=1e-4)
    assert loader.add_noise_streamlines_forward(batch) is batch and loader.add_noise_streamlines_loss(batch) is batch
    again = loader.load_batch_streamlines(ids, epoch=9)
    assert torch.equal(batch.previous, again.previous) and 0 < batch.first_known.sum() < len(batch)


def test_previous_is_the_way_the_streamline_came(made):
    """Against a slow search in the whole streamline."""
    dataset, sources = made
    loader = StreamlinesBatchLoader(dataset, None, "streamlines", split_ratio=0.6, reverse_ratio=0.5, known_start_ratio=1)
    batch = loader.load_batch_streamlines(list(BatchIDSampler(dataset, "streamlines", 1000).plan(0))[0])
    assert len({(int(p), bool(r)) for p, r in zip(batch.parts, batch.reversed, strict=True)}) == 6
    lines = batch.streamlines()
    for name, r in zip(batch.subjects, batch.subject_ranges, strict=True):
        t = sources[name]
        for i in range(r.start, r.stop):
            whole = dataset.subject(name).streamlines["streamlines"].get(int(batch.streamline_ids[i]))[0]
            if batch.reversed[i]:
                whole = whole[::-1]
            at = next(k for k in range(len(whole)) if np.array_equal(whole[k:k + len(lines[i])], lines[i]))
            step = whole[at] - whole[at - 1] if at else whole[1] - whole[0]
            expected = step * voxel_sizes(t.affine)
            assert np.allclose(batch.previous[i], expected / np.linalg.norm(expected), atol=1e-4)
            assert bool(batch.first_known[i]) and (at > 0) == (int(batch.parts[i]) == (1 if batch.reversed[i] else 2))


def test_unknown_start_is_zero(made):
    loader = StreamlinesBatchLoader(made[0], None, "streamlines")
    batch = loader.load_batch_streamlines([("sub-0", np.arange(30))])
    assert 0 < batch.first_known.sum() < 30 and (batch.previous[~batch.first_known] == 0).all()
    assert torch.allclose(batch.previous[batch.first_known].norm(dim=1), torch.tensor(1.0))


def test_repeated_and_single_points_have_no_direction(tmp_path):
    t = make_subject(tmp_path / "a", np.random.default_rng(0), n=2)
    lines = [np.ones((4, 3)), np.ones((1, 3)), t.streamlines[0]]
    Tractogram(Streamlines.from_list(lines), t.affine, SHAPE, dps={"bundle": np.zeros(3)}).save(tmp_path / "a/lines.trk")
    path = create_hdf5(tmp_path, tmp_path / "x.hdf5", CONFIG, {"training": ["a"]}, progress=False)
    for options in ({}, {"step_size": 0.5}):
        loader = StreamlinesBatchLoader(MultiSubjectDataset(path).load_data(), None, "streamlines", known_start_ratio=1, reverse_ratio=0.5, **options)
        batch = loader.load_batch_streamlines([("a", np.arange(3))])
        assert batch.first_known.tolist() == [False, False, True] and torch.isfinite(batch.previous).all()


def test_draws_differ_between_subjects_and_parts(made):
    loader = StreamlinesBatchLoader(made[0], None, "streamlines", split_ratio=1, reverse_ratio=0.5, noise_gaussian_size_forward=0.5)
    batch = loader.load_batch_streamlines([(name, np.arange(30)) for name in ("sub-0", "sub-1")])
    noise = loader.add_noise_streamlines_forward(batch).points - batch.points
    first = noise[batch.offsets[:-1]]
    assert len(torch.unique((first * 1e4).round(), dim=0)) == len(batch)  # no two subjects, ids or parts share noise
    a, b = (batch.reversed[r][batch.parts[r] < 2] for r in batch.subject_ranges)
    assert not torch.equal(a, b)


def test_noise(tmp_path):
    t = make_subject(tmp_path / "a", np.random.default_rng(0), n=300)
    path = create_hdf5(tmp_path, tmp_path / "x.hdf5", CONFIG, {"training": ["a"]}, progress=False)
    dataset = MultiSubjectDataset(path).load_data()
    sizes = torch.tensor(voxel_sizes(t.affine), dtype=torch.float32)

    def noise(**options):
        loader = StreamlinesBatchLoader(dataset, None, "streamlines", **options)
        batch = loader.load_batch_streamlines([("a", np.arange(300))])
        return [f(batch).points - batch.points for f in (loader.add_noise_streamlines_forward, loader.add_noise_streamlines_loss)]

    voxels, none = noise(noise_gaussian_size_forward=0.3)
    assert (none == 0).all() and voxels.abs().max() <= 0.6 + 1e-5
    assert voxels.std() == pytest.approx(0.3 * 0.96, rel=0.03) and abs(voxels.mean()) < 0.01  # 0.96: clipped at two deviations
    none, mm = noise(noise_gaussian_size_loss_mm=0.3)
    assert (none == 0).all() and torch.allclose((mm * sizes).std(dim=0), torch.tensor(0.3 * 0.96), rtol=0.05)
    forward, loss = noise(noise_gaussian_size_forward=0.3, noise_gaussian_size_loss=0.3)
    assert abs(torch.corrcoef(torch.stack([forward.ravel(), loss.ravel()]))[0, 1]) < 0.05
    assert abs(torch.corrcoef(torch.stack([forward[:-1, 0], forward[1:, 0]]))[0, 1]) < 0.05
    assert abs(torch.corrcoef(forward.T)[0, 1]) < 0.05


def test_inputs_are_the_world_under_the_points(made):
    dataset, sources = made
    loader = BatchLoaderOneInput(dataset, None, "input", "streamlines", step_size=1, **AUGMENT)
    assert loader.nb_features == 3
    for batch_ids in BatchIDSampler(dataset, "streamlines", 16).plan(1):
        batch = loader.load_batch_streamlines(batch_ids)
        inputs = loader.load_batch_inputs(batch.points, batch)
        assert inputs.shape == (len(batch.points), 3) and inputs.dtype == torch.float32
        for name, r, s in zip(batch.subjects, batch.point_ranges, batch.subject_ranges, strict=True):
            assert (r.start, r.stop) == (int(batch.offsets[s.start]), int(batch.offsets[s.stop]))
            world = Streamlines(batch.points[r].numpy(), [0, r.stop - r.start]).transform(sources[name].affine).points
            assert np.allclose(inputs[r], world, atol=2e-3)


@pytest.mark.parametrize("outside", ["clamp", "zero"])
@pytest.mark.parametrize("shape", [(7, 5, 6, 3), (1, 4, 1, 2), (2, 2, 2, 1)])
def test_sample_trilinear_equals_volume_sample(outside, shape):
    rng = np.random.default_rng(0)
    volume = Volume(rng.normal(size=shape).astype(np.float32), np.eye(4))
    points = rng.uniform(-3, 9, (500, 3)).astype(np.float32)
    points[:50] = np.round(points[:50])
    points[50:60] = [-0.5, shape[1] - 0.5, 0]
    expected = volume.sample(points, outside=outside)
    assert np.allclose(sample_trilinear(torch.from_numpy(volume.data), torch.from_numpy(points), outside), expected, atol=1e-5)


def test_volume_and_streamlines_on_different_grids(tmp_path):
    rng = np.random.default_rng(0)
    t = make_subject(tmp_path / "a", rng, n=20)
    half = t.affine.copy()
    half[:3, :3] /= 2  # twice as many voxels, shifted so that the boxes are equal
    half[:3, 3] -= half[:3, :3] @ [0.5, 0.5, 0.5]
    big = tuple(2 * d for d in SHAPE)
    Tractogram(t.streamlines.transform(np.linalg.inv(half) @ t.affine), half, big, dps=t.dps).save(tmp_path / "a/lines.trk")
    path = create_hdf5(tmp_path, tmp_path / "x.hdf5", CONFIG, {"training": ["a"]}, progress=False)
    loader = BatchLoaderOneInput(MultiSubjectDataset(path).load_data(), None, "input", "streamlines")
    batch = loader.load_batch_streamlines([("a", np.arange(20))])
    assert np.allclose(loader.load_batch_inputs(batch.points, batch), t.rasmm().points, atol=3e-3)
    there = loader._sample_there(loader.dataset.subject("a").volumes["input"], batch.points, np.linalg.inv(t.affine) @ half)
    assert np.allclose(there, t.rasmm().points, atol=3e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_on_a_device(made):
    loader = BatchLoaderOneInput(made[0], None, "input", "streamlines", **AUGMENT)
    batch = loader.load_batch_streamlines(BatchIDSampler(made[0], "streamlines", 40).plan(0)[0])
    there = batch.pin_memory().to("cuda")
    assert torch.allclose(loader.load_batch_inputs(there.points, there).cpu(), loader.load_batch_inputs(batch.points, batch), atol=1e-3)
    noisy = loader.add_noise_streamlines_forward(batch, "cuda")
    assert noisy.device.type == "cuda" and torch.equal(noisy.points.cpu(), loader.add_noise_streamlines_forward(batch).points)


def test_resampling_follows_loader_model_and_file(tmp_path, made):
    class Model:
        step_size, nb_points, compress = 0.9, None, None

    dataset, sources = made
    ids = [("sub-0", np.arange(30))]
    t = sources["sub-0"]
    expected = resample_step(t.streamlines, 0.9, t.affine)[0].nb_points
    assert np.array_equal(StreamlinesBatchLoader(dataset, Model(), "streamlines").load_batch_streamlines(ids).nb_points, expected)
    seven = StreamlinesBatchLoader(dataset, Model(), "streamlines", nb_points=7).load_batch_streamlines(ids)
    assert (seven.nb_points == 7).all()
    few = StreamlinesBatchLoader(dataset, None, "streamlines", compress=0.2).load_batch_streamlines(ids)
    assert len(few.points) < len(t.streamlines.points)
    path, _ = make_file(tmp_path, step_size=0.9)
    resampled = MultiSubjectDataset(path).load_data()
    batch = StreamlinesBatchLoader(resampled, Model(), "streamlines").load_batch_streamlines(ids, training=False)
    assert np.array_equal(batch.points, resampled.subject("sub-0").streamlines["streamlines"].get().points)  # not twice


def test_bad_settings(made):
    dataset = made[0]
    for options, error, message in [
            ({"split_ratio": 2}, ValueError, r"split_ratio must be in \[0, 1\]"), ({"step_size": 1, "compress": 0.1}, ValueError, "only one of step_size and compress"),
            ({"noise_gaussian_size_loss": 0.1, "noise_gaussian_size_loss_mm": 0.1}, ValueError, "only one of"),
            ({"noise_gaussian_size_loss": -0.1}, ValueError, "negative")]:
        with pytest.raises(error, match=message):
            StreamlinesBatchLoader(dataset, None, "streamlines", **options)
    with pytest.raises(DataError, match="no such streamlines group; there are streamlines"):
        StreamlinesBatchLoader(dataset, None, "lines")
    with pytest.raises(DataError, match="no such volumes group; there are input"):
        BatchLoaderOneInput(dataset, None, "fodf", "streamlines")
    with pytest.raises(ValueError, match="outside"):
        BatchLoaderOneInput(dataset, None, "input", "streamlines", outside="wrap")


def test_points_outside_by_policy(made):
    dataset, _ = made
    batch = StreamlinesBatchLoader(dataset, None, "streamlines").load_batch_streamlines([("sub-0", np.arange(3))])
    far = batch.points + 100
    for outside in ("clamp", "zero", "error"):
        loader = BatchLoaderOneInput(dataset, None, "input", "streamlines", outside=outside)
        if outside == "error":
            with pytest.raises(DataError, match="outside"):
                loader.load_batch_inputs(far, batch)
            with pytest.raises(DataError, match="outside"):
                loader._sample_there(dataset.subject("sub-0").volumes["input"], far, None)
        else:
            assert bool((loader.load_batch_inputs(far, batch) == 0).all()) == (outside == "zero")


def test_batch_moves_and_prints(made):
    loader = StreamlinesBatchLoader(made[0], None, "streamlines", split_ratio=0.5)
    batch = loader.load_batch_streamlines([("sub-0", np.array([3, 1]))])
    moved = batch.to("meta")
    assert moved.points.device.type == "meta" and batch.points.device.type == "cpu" and moved.subjects == ["sub-0"]
    assert len(batch) == len(batch.streamline_ids) and "sub-0" in repr(batch) and "at 0x" not in repr(batch)
    assert torch.equal(batch.ids, torch.from_numpy(batch.streamlines().ids))
    assert len(random_lines(np.random.default_rng(0), 3)) == 3
