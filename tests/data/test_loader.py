"""loader: the same augmentation in any batch and worker, nothing lost, the right signal under each point."""

import contextlib
import dataclasses
import tracemalloc
from unittest import mock

import h5py
import numpy as np
import pytest
import torch
from helpers_data import CONFIG, SHAPE, make_file, make_subject, random_lines, world_volume
from torch.utils.data import DataLoader

from tractkit.core.files import DataError
from tractkit.data.augment import MIN_PART
from tractkit.data.dataset import MultiSubjectDataset
from tractkit.data.interpolation import GroupInputs, sample_nearest, sample_trilinear
from tractkit.data.loader import BatchLoaderOneInput, BatchLoaderSeveralInputs, StreamlinesBatchLoader
from tractkit.data.prefetch import Feeder
from tractkit.data.sampler import BatchIDSampler
from tractkit.hdf5.create import create_hdf5
from tractkit.models.base import build_model, load_model, save_model
from tractkit.models.learn2track import Learn2Track
from tractkit.spatial.resample import resample_step
from tractkit.spatial.space import voxel_sizes
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Neighborhood, Volume
from tractkit.tracking.tracker import Tracker, _Ground
from tractkit.training.trainer import TrainerOneInput


def on_tensors():
    """Take the way of other devices on this one."""
    return mock.patch.object(GroupInputs, "_by_kernel", GroupInputs._by_gathering)


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
        return list(
            DataLoader(dataset.training_set, batch_sampler=sampler, collate_fn=loader.load_batch_streamlines, **options)
        )

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
    loader = StreamlinesBatchLoader(
        MultiSubjectDataset(path).load_data(),
        None,
        "streamlines",
        split_ratio=0.3,
        reverse_ratio=0.6,
        known_start_ratio=0.2,
    )
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
    loader = StreamlinesBatchLoader(
        dataset, None, "streamlines", split_ratio=0.6, reverse_ratio=0.5, known_start_ratio=1
    )
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
    Tractogram(Streamlines.from_list(lines), t.affine, SHAPE, dps={"bundle": np.zeros(3)}).save(
        tmp_path / "a/lines.trk"
    )
    path = create_hdf5(tmp_path, tmp_path / "x.hdf5", CONFIG, {"training": ["a"]}, progress=False)
    for options in ({}, {"step_size": 0.5}):
        loader = StreamlinesBatchLoader(
            MultiSubjectDataset(path).load_data(),
            None,
            "streamlines",
            known_start_ratio=1,
            reverse_ratio=0.5,
            **options,
        )
        batch = loader.load_batch_streamlines([("a", np.arange(3))])
        assert batch.first_known.tolist() == [False, False, True] and torch.isfinite(batch.previous).all()


def test_draws_differ_between_subjects_and_parts(made):
    loader = StreamlinesBatchLoader(
        made[0], None, "streamlines", split_ratio=1, reverse_ratio=0.5, noise_gaussian_size_forward=0.5
    )
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
        return [
            f(batch).points - batch.points
            for f in (loader.add_noise_streamlines_forward, loader.add_noise_streamlines_loss)
        ]

    voxels, none = noise(noise_gaussian_size_forward=0.3)
    assert (none == 0).all() and voxels.abs().max() <= 0.6 + 1e-5
    assert (
        voxels.std() == pytest.approx(0.3 * 0.96, rel=0.03) and abs(voxels.mean()) < 0.01
    )  # 0.96: clipped at two deviations
    none, mm = noise(noise_gaussian_size_loss_mm=0.3)
    assert (none == 0).all() and torch.allclose((mm * sizes).std(dim=0), torch.tensor(0.3 * 0.96), rtol=0.05)
    forward, loss = noise(noise_gaussian_size_forward=0.3, noise_gaussian_size_loss=0.3)
    assert abs(torch.corrcoef(torch.stack([forward.ravel(), loss.ravel()]))[0, 1]) < 0.05
    assert abs(torch.corrcoef(torch.stack([forward[:-1, 0], forward[1:, 0]]))[0, 1]) < 0.05
    assert abs(torch.corrcoef(forward.T)[0, 1]) < 0.05


def test_the_subject_with_another_number_of_features_is_named(tmp_path):
    path, _ = make_file(tmp_path)
    with h5py.File(path, "a") as h5:
        data = h5["sub-1/input/data"][..., :2]
        del h5["sub-1/input/data"]
        h5["sub-1/input/data"] = data
    with pytest.raises(DataError, match="has 2 features, others have 3") as e:
        _ = BatchLoaderOneInput(MultiSubjectDataset(path).load_data(), None, "input", "streamlines").nb_features
    assert (e.value.subject, e.value.group) == ("sub-1", "input")


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
    assert np.allclose(
        sample_trilinear(torch.from_numpy(volume.data), torch.from_numpy(points), outside), expected, atol=1e-5
    )


def test_volume_and_streamlines_on_different_grids(tmp_path):
    rng = np.random.default_rng(0)
    t = make_subject(tmp_path / "a", rng, n=20)
    half = t.affine.copy()
    half[:3, :3] /= 2  # twice as many voxels, shifted so that the boxes are equal
    half[:3, 3] -= half[:3, :3] @ [0.5, 0.5, 0.5]
    big = tuple(2 * d for d in SHAPE)
    Tractogram(t.streamlines.transform(np.linalg.inv(half) @ t.affine), half, big, dps=t.dps).save(
        tmp_path / "a/lines.trk"
    )
    path = create_hdf5(tmp_path, tmp_path / "x.hdf5", CONFIG, {"training": ["a"]}, progress=False)
    loader = BatchLoaderOneInput(MultiSubjectDataset(path).load_data(), None, "input", "streamlines")
    batch = loader.load_batch_streamlines([("a", np.arange(20))])
    assert np.allclose(loader.load_batch_inputs(batch.points, batch), t.rasmm().points, atol=3e-3)
    with on_tensors():
        assert np.allclose(loader.load_batch_inputs(batch.points, batch), t.rasmm().points, atol=3e-3)


@pytest.mark.gpu
def test_on_a_device(made):
    loader = BatchLoaderOneInput(made[0], None, "input", "streamlines", **AUGMENT)
    batch = loader.load_batch_streamlines(BatchIDSampler(made[0], "streamlines", 40).plan(0)[0])
    there = batch.pin_memory().to("cuda")
    assert torch.allclose(
        loader.load_batch_inputs(there.points, there).cpu(), loader.load_batch_inputs(batch.points, batch), atol=1e-3
    )
    noisy = loader.add_noise_streamlines_forward(batch, "cuda")
    assert noisy.device.type == "cuda" and torch.equal(
        noisy.points.cpu(), loader.add_noise_streamlines_forward(batch).points
    )


def test_resampling_follows_loader_model_and_file(tmp_path, made):
    class Model:
        step_size, nb_points, compress = 0.9, None, None

    dataset, sources = made
    ids = [("sub-0", np.arange(30))]
    t = sources["sub-0"]
    expected = resample_step(t.streamlines, 0.9, t.affine)[0].nb_points
    assert np.array_equal(
        StreamlinesBatchLoader(dataset, Model(), "streamlines").load_batch_streamlines(ids).nb_points, expected
    )
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
        ({"split_ratio": 2}, ValueError, r"split_ratio must be in \[0, 1\]"),
        ({"step_size": 1, "compress": 0.1}, ValueError, "only one of step_size and compress"),
        ({"noise_gaussian_size_loss": 0.1, "noise_gaussian_size_loss_mm": 0.1}, ValueError, "only one of"),
        ({"noise_gaussian_size_loss": -0.1}, ValueError, "negative"),
    ]:
        with pytest.raises(error, match=message):
            StreamlinesBatchLoader(dataset, None, "streamlines", **options)
    with pytest.raises(DataError, match="no such streamlines group; there are streamlines"):
        StreamlinesBatchLoader(dataset, None, "lines")
    with pytest.raises(DataError, match="no such volumes group; there are input"):
        BatchLoaderOneInput(dataset, None, "fodf", "streamlines")
    with pytest.raises(ValueError, match="outside"):
        BatchLoaderOneInput(dataset, None, "input", "streamlines", outside="wrap")
    nb = BatchLoaderOneInput(dataset, None, "input", "streamlines").nb_features
    BatchLoaderOneInput(dataset, Learn2Track(nb), "input", "streamlines")
    with pytest.raises(
        ValueError, match=f"the model reads {nb + 1} features, 'input' has {nb}: make the model with nb_features={nb}"
    ):
        BatchLoaderOneInput(dataset, Learn2Track(nb + 1), "input", "streamlines")


def test_points_outside_by_policy(made):
    dataset, _ = made
    batch = StreamlinesBatchLoader(dataset, None, "streamlines").load_batch_streamlines([("sub-0", np.arange(3))])
    far = batch.points + 100
    for outside in ("clamp", "zero", "error"):
        loader = BatchLoaderOneInput(dataset, None, "input", "streamlines", outside=outside)
        if outside == "error":
            for path in (on_tensors, contextlib.nullcontext):
                with pytest.raises(DataError, match="sub-0/input: point 0 of .* is outside the box"), path():
                    loader.load_batch_inputs(far, batch)
        else:
            assert bool((loader.load_batch_inputs(far, batch) == 0).all()) == (outside == "zero")
            with on_tensors():
                assert bool((loader.load_batch_inputs(far, batch) == 0).all()) == (outside == "zero")


def test_batch_moves_and_prints(made):
    loader = StreamlinesBatchLoader(made[0], None, "streamlines", split_ratio=0.5)
    batch = loader.load_batch_streamlines([("sub-0", np.array([3, 1]))])
    moved = batch.to("meta")
    assert moved.points.device.type == "meta" and batch.points.device.type == "cpu" and moved.subjects == ["sub-0"]
    assert len(batch) == len(batch.streamline_ids) and "sub-0" in repr(batch) and "at 0x" not in repr(batch)
    assert torch.equal(batch.ids, torch.from_numpy(batch.streamlines().ids))
    assert len(random_lines(np.random.default_rng(0), 3)) == 3


# ---- sharing, workers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 5])
def test_shards_change_nothing(made, world_size):
    """What the ranks load together is what one process loads, bit for bit; a rank without streamlines loads none."""
    dataset, _ = made
    loader = BatchLoaderOneInput(dataset, None, "input", "streamlines", step_size=0.8, **AUGMENT)
    plan = BatchIDSampler(dataset, "streamlines", 31).plan(3)
    seen = 0
    for i in range(len(plan)):
        whole = by_streamline(loader, loader.load_batch_streamlines(plan[i]))
        parts = [loader.load_batch_streamlines(plan.shard(r, world_size)[i]) for r in range(world_size)]
        together = {k: v for part in parts for k, v in by_streamline(loader, part).items()}
        assert same(whole, together) and {part.epoch for part in parts} == {3}
        seen += sum(len(part) == 0 for part in parts)
        for part in parts:
            assert loader.load_batch_inputs(part.points, part).shape == (len(part.points), 3)
    assert seen or world_size == 2  # the last batch is small


def test_no_streamlines(made):
    loader = BatchLoaderOneInput(made[0], None, "input", "streamlines", step_size=1, **AUGMENT)
    batch = loader.load_batch_streamlines([])
    full = loader.load_batch_streamlines([("sub-0", np.arange(3))])
    assert (
        len(batch) == 0
        and batch.points.shape == (0, 3)
        and batch.offsets.tolist() == [0]
        and batch.dps["bundle"].shape == (0, 1)
    )
    for name in ("points", "offsets", "streamline_ids", "parts", "reversed", "previous", "first_known", "cuts"):
        assert getattr(batch, name).dtype == getattr(full, name).dtype
    assert len(loader.add_noise_streamlines_forward(batch)) == 0 and loader.load_batch_inputs(
        batch.points, batch
    ).shape == (0, 3)
    assert len(batch.provenance()) == 0 and "0" in repr(batch) and "<table" in batch._repr_html_()


START = [("fork", 1), ("fork", 2), ("spawn", 1), ("forkserver", 1)]
START_FULL = [(m, n) for m in ("fork", "spawn", "forkserver") for n in (1, 2, 4)]


@pytest.mark.parametrize(
    "method, workers",
    START + [pytest.param(m, n, marks=pytest.mark.full) for m, n in START_FULL if (m, n) not in START],
)
def test_dwi_ml_9_workers_do_not_share_their_draws(made, method, workers):
    """There, each worker has a copy of the generator: the same noise in each, and other numbers for other workers."""
    dataset = MultiSubjectDataset(made[0].path, lazy=workers == 2).load_data()
    loader = BatchLoaderOneInput(dataset, None, "input", "streamlines", step_size=0.8, **AUGMENT)
    plans = {size: BatchIDSampler(dataset, "streamlines", size).plan(4) for size in (6, 11)}
    here = {k: v for batch in plans[11] for k, v in by_streamline(loader, loader.load_batch_streamlines(batch)).items()}
    feeder = Feeder(loader.load_batch_streamlines, workers, prefetch=1 + workers, context=method)
    try:
        for plan in plans.values():
            with feeder.batches(plan, epoch=4) as batches:
                there = [by_streamline(loader, batch) for batch in batches]
            assert len(there) == len(plan) and same(here, {k: v for part in there for k, v in part.items()})
    finally:
        feeder.close()


@pytest.mark.parametrize("prefetch", [0, 1, 7])
def test_prefetching_changes_nothing(made, prefetch):
    dataset, _ = made
    loader = BatchLoaderOneInput(dataset, None, "input", "streamlines", step_size=0.8, **AUGMENT)
    plan = BatchIDSampler(dataset, "streamlines", 9).plan(2)
    with Feeder(loader.load_batch_streamlines, prefetch=prefetch).batches(plan, 2, epoch=2) as batches:
        for k, batch in enumerate(batches):
            assert same(by_streamline(loader, batch), by_streamline(loader, loader.load_batch_streamlines(plan[2 + k])))
            np.random.default_rng(k).normal(size=3)  # what others draw is nobody's business
            torch.rand(3)


# ---- data beside the streamlines -----------------------------------------------------------------------------


class WithDpp:
    """An SFTData that has data per point: the point's own coordinates, and its number."""

    dpp_keys = ("xyz", "number")

    def __init__(self, sft, groups=None):
        self._sft, self.groups = sft, groups or {}

    def __getattr__(self, name):
        return getattr(self.__dict__["_sft"], name)

    def __len__(self):
        return len(self._sft)

    def get_dpp(self, ids):
        s = self._sft.get(ids)
        return {
            "xyz": s.points.copy(),
            "number": (np.arange(len(s.points)) - s.offsets[s.ids])[:, None].astype(np.float32),
        }


@pytest.fixture
def with_dpp(made):
    dataset = MultiSubjectDataset(made[0].path).load_data()
    for s in [*dataset.training_set, *dataset.validation_set, *dataset.testing_set]:
        s.streamlines["streamlines"] = WithDpp(
            s.streamlines["streamlines"], {"even": np.arange(0, 30, 2), s.name: np.arange(3)}
        )
    return dataset


@pytest.mark.parametrize("options", [{}, {"step_size": 0.7}, {"nb_points": 15}, {"compress": 0.002}])
def test_data_per_point_follow_split_reverse_and_resampling(with_dpp, options):
    loader = StreamlinesBatchLoader(with_dpp, None, "streamlines", split_ratio=0.6, reverse_ratio=0.5, **options)
    batch = loader.load_batch_streamlines([("sub-0", np.array([3, 1, 20, 7])), ("sub-1", np.arange(30))])
    assert batch.reversed.any() and (batch.parts > 0).any()
    assert torch.allclose(batch.dpp["xyz"], batch.points, atol=1e-4) and batch.dpp["number"].shape == (
        len(batch.points),
        1,
    )
    turned = torch.stack(
        [
            batch.dpp["number"][a] > batch.dpp["number"][b - 1]
            for a, b in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)
        ]
    )
    assert torch.equal(turned[:, 0], batch.reversed)
    assert torch.equal(batch.dps["bundle"][:, 0].long(), batch.streamline_ids)  # both parts have their streamline's
    assert StreamlinesBatchLoader(
        with_dpp, None, "streamlines", dpp_keys=["number"], dps_keys=[]
    ).load_batch_streamlines([("sub-0", np.arange(3))]).dpp.keys() == {"number"}
    with pytest.raises(DataError, match="sub-0/streamlines: no data per point fa; there are xyz, number"):
        StreamlinesBatchLoader(with_dpp, None, "streamlines", dpp_keys=["fa"])
    with pytest.raises(DataError, match="no data per streamline fa; there are bundle"):
        StreamlinesBatchLoader(with_dpp, None, "streamlines", dps_keys=["fa"])


def test_groups_of_a_batch(with_dpp):
    loader = StreamlinesBatchLoader(with_dpp, None, "streamlines", split_ratio=1)
    batch = loader.load_batch_streamlines([("sub-0", np.array([0, 1, 4])), ("sub-1", np.array([2, 9]))])
    groups = loader.load_batch_groups(batch)
    assert groups["even"].tolist() == [k % 2 == 0 for k in batch.streamline_ids.tolist()]
    of = [batch.subject_of(i) for i in range(len(batch))]
    assert groups["sub-1"].tolist() == [
        name == "sub-1" and k < 3 for name, k in zip(of, batch.streamline_ids.tolist(), strict=True)
    ]


def test_provenance_says_what_was_done(made):
    dataset, sources = made
    loader = StreamlinesBatchLoader(
        dataset, None, "streamlines", step_size=0.5, split_ratio=0.5, reverse_ratio=0.5, noise_gaussian_size_forward=0.1
    )
    batch = loader.load_batch_streamlines([("sub-0", np.arange(9)), ("sub-1", np.array([4, 2]))], epoch=7)
    table = batch.provenance()
    assert len(table) == len(batch)
    for i, row in enumerate(table):
        name, k = row["subject"], int(row["streamline"])
        source = sources[name].streamlines[k]
        assert name == batch.subject_of(i) and k == batch.streamline_ids[i] and row["bundle"] == str(k)
        assert row["points"] == f"{batch.nb_points[i]} of {len(source)} stored" and (
            row["sense"] == "reversed"
        ) == bool(batch.reversed[i])
        whole = resample_step(Streamlines.from_list([source]), 0.5, sources[name].affine)[0][0]
        assert batch.whole_points[i] == len(whole)
        if batch.parts[i]:
            at = int(batch.cuts[i])
            part = whole[:at + 1] if batch.parts[i] == 1 else whole[at:]
            part = part[::-1] if batch.reversed[i] else part
            a, b = batch.offsets[i:i + 2].tolist()
            assert np.allclose(batch.points[a:b], part, atol=1e-4)
    one = int((batch.parts == 2).nonzero()[0])
    text = repr(loader.add_noise_streamlines_forward(batch).provenance(one))
    for words in (
        "resampled to a step of 0.5 mm",
        "noise of 0.1 voxels (forward)",
        f"at point {int(batch.cuts[one])}",
        "part 2 of 2",
        "epoch       7, training",
    ):
        assert words in text
    assert "<table" in batch.provenance(one)._repr_html_() and "0x" not in text
    with pytest.raises(IndexError):
        batch.provenance(len(batch))


def test_html_of_a_batch(made):
    loader = StreamlinesBatchLoader(made[0], None, "streamlines")
    batch = loader.load_batch_streamlines([("sub-0", np.arange(30)), ("sub-1", np.arange(30))])
    batch.subjects[1] = "<b>"
    page = batch._repr_html_()
    assert (
        page.count("<polyline") == 60
        and "&lt;b&gt;" in page
        and "<b>" not in page
        and "sub-0 (30)" in page
        and len(page) < 40_000
    )


# ---- inputs: neighbourhoods, several groups, policies --------------------------------------------------------


@pytest.mark.parametrize("how, function", [("trilinear", sample_trilinear), ("nearest", sample_nearest)])
@pytest.mark.parametrize("outside", ["clamp", "zero"])
@pytest.mark.parametrize("shape", [(7, 5, 6, 3), (1, 4, 1, 2), (2, 2, 2, 1)])
def test_tensors_equal_the_kernel_with_neighborhoods(how, function, outside, shape):
    rng = np.random.default_rng(0)
    volume = Volume(rng.normal(size=shape).astype(np.float32), np.diag([2, 2, 3, 1]))
    points = rng.uniform(-3, 9, (400, 3)).astype(np.float32)
    points[:40] = np.round(points[:40]) + 0.5
    for around in (Neighborhood("axes", 2, 0.7), Neighborhood("grid", 1, resolution_mm=1.3)):
        vectors = around.vectors(volume.voxel_sizes)
        expected = volume.sample(points, how, outside, neighborhood=vectors)
        assert expected.shape == (400, around.nb_points * shape[3])
        args = torch.from_numpy(volume.data), torch.from_numpy(points), outside, torch.from_numpy(vectors)
        assert np.allclose(function(*args), expected, atol=1e-5)
        with mock.patch.dict("tractkit.data.interpolation._SLICE", {"cpu": 37}):
            assert np.allclose(function(*args), expected, atol=1e-5)
    with pytest.raises(ValueError, match="outside is 'wrap'"):
        function(*args[:2], "wrap")
    with pytest.raises(DataError, match=r"point \d+ of 400.* or its neighborhood is outside the box of"):
        function(*args[:2], "error", args[3])


@pytest.mark.parametrize("kind", ["axes", "grid"])
@pytest.mark.parametrize("path", [contextlib.nullcontext, on_tensors])
def test_neighborhood_of_inputs(made, kind, path):
    """[current, neighbours], features fastest: the world coordinates of each point of the neighbourhood."""
    dataset, sources = made
    options = dict(neighborhood_type=kind, neighborhood_radius=1, neighborhood_resolution_mm=0.5)
    loader = BatchLoaderOneInput(dataset, None, "input", "streamlines", **options)
    batch = loader.load_batch_streamlines([("sub-0", np.arange(30)), ("sub-1", np.arange(30))])
    with path():
        inputs = loader.load_batch_inputs(batch.points, batch)
    assert inputs.shape == (len(batch.points), loader.neighborhood.nb_points * 3)
    for name, r in zip(batch.subjects, batch.point_ranges, strict=True):
        affine = sources[name].affine
        vectors = loader.neighborhood.vectors(voxel_sizes(affine))
        assert np.allclose(np.linalg.norm((vectors * voxel_sizes(affine))[1:7], axis=1).min(), 0.5, atol=1e-5)
        for k, vector in enumerate(vectors):
            inside = np.clip(batch.points[r].numpy() + vector, 0, np.array(SHAPE) - 1)
            world = Streamlines(inside, [0, len(inside)]).transform(affine).points
            assert np.allclose(inputs[r][:, 3 * k:3 * k + 3], world, atol=3e-3)


def test_the_neighborhood_is_the_models(made):
    dataset, _ = made
    model = Learn2Track(
        3, rnn_layer_sizes=(4,), neighborhood_type="axes", neighborhood_radius=1, neighborhood_resolution=0.5
    )
    assert BatchLoaderOneInput(dataset, model, "input", "streamlines").neighborhood == Neighborhood("axes", 1, 0.5)
    assert BatchLoaderOneInput(dataset, model, "input", "streamlines", neighborhood_type="axes", neighborhood_radius=1,
                               neighborhood_resolution=0.5).inputs["input"].input_size == 21
    with pytest.raises(ValueError, match="leave it to the model"):
        BatchLoaderOneInput(
            dataset,
            model,
            "input",
            "streamlines",
            neighborhood_type="grid",
            neighborhood_radius=1,
            neighborhood_resolution=0.5,
        )
    for options, message in [
        ({"neighborhood_type": "axes"}, "neighborhood_radius"),
        ({"neighborhood_type": "axes", "neighborhood_radius": 1}, "resolution"),
        ({"neighborhood_type": "ball", "neighborhood_radius": 1, "neighborhood_resolution": 1}, "'axes' or 'grid'"),
        (
            {
                "neighborhood_type": "axes",
                "neighborhood_radius": 1,
                "neighborhood_resolution": 1,
                "neighborhood_resolution_mm": 1,
            },
            "one of",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            BatchLoaderOneInput(dataset, None, "input", "streamlines", **options)
        with pytest.raises(ValueError, match=message):
            Learn2Track(3, **options)
    again = build_model("Learn2Track", model.hyperparameters)
    assert again.neighborhood == model.neighborhood and model.hyperparameters["neighborhood_type"] == "axes"
    assert "neighborhood_type" not in Learn2Track(3).hyperparameters


def test_trains_and_tracks_with_a_neighborhood(tmp_path, made):
    """The tracker shows the model, at the same points, what the loader showed it."""
    dataset, _ = made
    model = Learn2Track(
        3,
        rnn_layer_sizes=(6,),
        step_size=2.0,
        neighborhood_type="axes",
        neighborhood_radius=1,
        neighborhood_resolution_mm=1,
    )
    sampler = BatchIDSampler(dataset, "streamlines", 40)
    loader = BatchLoaderOneInput(dataset, model, "input", "streamlines", outside="zero")
    TrainerOneInput(
        model, tmp_path, "run", sampler, loader, max_epochs=1, num_threads=1, device="cpu", progress=False
    ).train_and_validate()
    save_model(model, tmp_path / "model")
    model = load_model(tmp_path / "model")
    assert model.neighborhood == Neighborhood("axes", 1, resolution_mm=1)
    seen = []
    volume = dataset.subject("sub-0").volumes["input"].volume
    mask = Volume(np.ones(SHAPE, bool), volume.affine)
    tracker = Tracker(model, volume, mask, min_length=0, theta=180, max_length=20, outside="zero")
    step = tracker._model.step
    tracker._model.step = lambda inputs, previous, state: (seen.append(inputs.clone()), step(inputs, previous, state))[
        1
    ]
    seeds = np.array([[0.2, 5, 4], [7, 5, 8.4]], np.float32)  # at the rim: neighbours are outside
    t = tracker.track(seeds, progress=False)
    batch = dataclasses.replace(
        loader.load_batch_streamlines([("sub-0", np.arange(1))]),
        points=torch.from_numpy(seeds),
        point_ranges=[slice(0, 2)],
    )
    assert len(t) and torch.equal(seen[0], loader.load_batch_inputs(batch.points, batch)) and seen[0].shape == (2, 21)
    assert (seen[0] == 0).any()
    clamped = Tracker(model, volume, mask, min_length=0)._ground.features(batch.points)
    assert not torch.equal(clamped, seen[0])
    there = _Ground(volume, mask.data, torch.device("cpu"), "zero", model.neighborhood)
    there.data = torch.from_numpy(volume.data)
    assert torch.allclose(there.features(batch.points), seen[0], atol=1e-3)
    with pytest.raises(ValueError, match="outside"):
        Tracker(model, volume, mask, outside="wrap")


def test_several_inputs(tmp_path):
    rng = np.random.default_rng(0)
    t = make_subject(tmp_path / "a", rng, n=20)
    labels = Volume(rng.integers(0, 5, SHAPE).astype(np.float32), t.affine)
    labels.save(tmp_path / "a/labels.nii.gz")
    config = {**CONFIG, "labels": {"type": "volume", "files": ["labels.nii.gz"], "standardization": "none"}}
    dataset = MultiSubjectDataset(
        create_hdf5(tmp_path, tmp_path / "x.hdf5", config, {"training": ["a"]}, progress=False)
    ).load_data()
    loader = BatchLoaderSeveralInputs(
        dataset, None, ["input", "labels"], "streamlines", interpolation={"input": "trilinear", "labels": "nearest"}
    )
    batch = loader.load_batch_streamlines([("a", np.arange(20))])
    found = loader.load_batch_inputs(batch.points, batch)
    one = BatchLoaderOneInput(dataset, None, "input", "streamlines").load_batch_inputs(batch.points, batch)
    assert found.keys() == {"input", "labels"} and torch.equal(found["input"], one)
    x, y, z = np.floor(batch.points.numpy() + 0.5).astype(int).T
    assert np.array_equal(found["labels"][:, 0], labels.data[x, y, z])
    with on_tensors():
        assert np.array_equal(loader.load_batch_inputs(batch.points, batch)["labels"][:, 0], labels.data[x, y, z])
    for groups, options in (
        ("input", {}),
        ([], {}),
        (["input", "labels"], {"interpolation": {"input": "nearest"}}),
        (["input"], {"interpolation": "cubic"}),
    ):
        with pytest.raises(ValueError, match="input_group_names|interpolation"):
            BatchLoaderSeveralInputs(dataset, None, groups, "streamlines", **options)


@pytest.mark.parametrize("path", [contextlib.nullcontext, on_tensors])
def test_temporaries_are_bounded(tmp_path, path):
    """Sampling needs its output and at most as much again (NumPy's memory; tensors' on the CPU by their peak)."""
    rng = np.random.default_rng(0)
    t = make_subject(tmp_path / "a", rng, n=2)
    Volume(rng.normal(size=(*SHAPE, 28)).astype(np.float32), t.affine).save(tmp_path / "a/xyz.nii.gz")
    dataset = MultiSubjectDataset(
        create_hdf5(tmp_path, tmp_path / "x.hdf5", CONFIG, {"training": ["a"]}, progress=False)
    ).load_data()
    loader = BatchLoaderOneInput(dataset, None, "input", "streamlines")
    batch = loader.load_batch_streamlines([("a", np.arange(1))])
    points = torch.rand(400_000, 3, generator=torch.Generator().manual_seed(0)) * 8
    batch = dataclasses.replace(batch, points=points, point_ranges=[slice(0, len(points))])
    with (
        path(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        tracemalloc.start()
        out = loader.load_batch_inputs(points, batch)
        _, numpy_peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    now, peak = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert out.nbytes <= peak and peak + numpy_peak <= 2 * out.nbytes


# ---- what goes wrong in dwi_ml -------------------------------------------------------------------------------


def test_dwi_ml_1_no_half_voxel_shift(made):
    """There, corner coordinates are floored as if they were centers: a ramp comes out half a voxel off."""
    dataset, sources = made
    loader = BatchLoaderOneInput(dataset, None, "input", "streamlines")
    batch = loader.load_batch_streamlines([("sub-0", np.arange(30))])
    found = loader.load_batch_inputs(batch.points, batch).numpy()
    world = sources["sub-0"].rasmm().points  # the volume holds its own world coordinates
    assert np.abs(found - world).max() < 3e-3 < np.linalg.norm(sources["sub-0"].affine[:3, :3] @ [0.5, 0.5, 0.5]) / 10
    ramp = Volume(np.arange(8, dtype=np.float32)[:, None, None] * np.ones((8, 2, 2), np.float32), np.eye(4))
    corner = np.float32([[3.5, 1, 1]])
    assert (
        ramp.sample(corner - 0.5)[0, 0] == 3
        and sample_trilinear(torch.from_numpy(ramp.data[..., None]), torch.from_numpy(corner - 0.5)) == 3
    )


def test_dwi_ml_2_splits_delete_nothing_and_validation_is_as_stored(tmp_path):
    """There, streamlines of up to 12 points chosen for a split vanish; and validation is split and reversed, too."""
    rng = np.random.default_rng(0)
    t = make_subject(tmp_path / "a", rng, n=4)
    t = Tractogram(
        Streamlines.from_list([random_lines(rng, 1, points=(n, n + 1))[0] for n in (8, 12, 13, 30)]),
        t.affine,
        SHAPE,
        dps={"bundle": np.zeros(4)},
    )
    t.save(tmp_path / "a/lines.trk")
    dataset = MultiSubjectDataset(
        create_hdf5(tmp_path, tmp_path / "x.hdf5", CONFIG, {"training": ["a"]}, progress=False)
    ).load_data()
    loader = StreamlinesBatchLoader(dataset, None, "streamlines", split_ratio=1, reverse_ratio=1)
    batch = loader.load_batch_streamlines([("a", np.arange(4))])
    assert np.bincount(batch.streamline_ids, weights=batch.nb_points - (batch.parts == 2).long()).tolist() == [
        8,
        12,
        13,
        30,
    ]
    valid = loader.load_batch_streamlines([("a", np.arange(4))], training=False)
    assert valid.nb_points.tolist() == [8, 12, 13, 30] and np.allclose(valid.points, t.streamlines.points, atol=1e-4)


def test_dwi_ml_11_outside_is_a_policy(made):
    """There, trilinear clips in silence and nearest wraps a negative index around to the other side."""
    volume = Volume(np.arange(8, dtype=np.float32)[:, None, None] * np.ones((8, 2, 2), np.float32), np.eye(4))
    data, low = torch.from_numpy(volume.data[..., None]), np.float32([[-1.2, 0, 0]])
    for how, function in (("nearest", sample_nearest), ("trilinear", sample_trilinear)):
        for outside in ("clamp", "zero"):
            assert volume.sample(low, how, outside)[0, 0] == function(data, torch.from_numpy(low), outside)[0, 0] == 0
            assert (
                volume.sample(-low + 7, how, outside)[0, 0]
                == function(data, torch.from_numpy(-low + 7), outside)[0, 0]
                == 7 * (outside == "clamp")
            )
        for sample in (
            lambda p, how=how: volume.sample(p.numpy(), how, "error"),
            lambda p, function=function: function(data, p, "error"),
        ):
            with pytest.raises(DataError, match="outside the box"):
                sample(torch.from_numpy(low))


@pytest.mark.parametrize("settings", [{"nb_points": 7}, {"compress": 0.3}, {"step_size": 1.1}])
def test_dwi_ml_17_a_models_points_are_the_loaders(made, settings):
    """There, a model with nb_points is an AttributeError in the loader."""
    dataset, sources = made
    model = Learn2Track(3, rnn_layer_sizes=(4,), **{"step_size": None, **settings})
    assert (
        settings.items() <= model.hyperparameters.items()
        and settings.items() <= build_model("Learn2Track", model.hyperparameters).hyperparameters.items()
    )
    found = StreamlinesBatchLoader(dataset, model, "streamlines").load_batch_streamlines([("sub-0", np.arange(30))])
    asked = StreamlinesBatchLoader(dataset, None, "streamlines", **settings).load_batch_streamlines(
        [("sub-0", np.arange(30))]
    )
    assert torch.equal(found.points, asked.points) and len(found.points) != len(sources["sub-0"].streamlines.points)
    if "nb_points" in settings:
        assert (found.nb_points == 7).all()
    with pytest.raises(ValueError, match="one of step_size, nb_points and compress"):
        Learn2Track(3, step_size=1.0, nb_points=7)


@pytest.mark.parametrize("sizes", [(2.0001, 2, 2), (1, 2, 3.5)])
def test_dwi_ml_19_voxels_need_not_be_cubes(tmp_path, sizes):
    """There, voxels of 2.0001 mm raise. Steps, directions and neighbourhoods are in mm, whatever the voxels."""
    affine = np.diag([*sizes, 1.0])
    (tmp_path / "a").mkdir()
    world_volume(affine).save(tmp_path / "a/xyz.nii.gz")
    line = np.float32([[1, 1, 1]]) + np.linspace(0, 1, 40)[:, None] * np.float32([8, 6, 4])
    Tractogram(Streamlines.from_list([line]), affine, SHAPE, dps={"bundle": np.zeros(1)}).save(tmp_path / "a/lines.trk")
    path = create_hdf5(tmp_path, tmp_path / "x.hdf5", CONFIG, {"training": ["a"]}, progress=False)
    dataset = MultiSubjectDataset(path).load_data()
    loader = BatchLoaderOneInput(
        dataset,
        None,
        "input",
        "streamlines",
        step_size=0.5,
        known_start_ratio=1,
        neighborhood_type="axes",
        neighborhood_radius=1,
        neighborhood_resolution_mm=0.5,
    )
    batch = loader.load_batch_streamlines([("a", np.arange(1))])
    steps = np.linalg.norm(np.diff(batch.points.numpy() * sizes, axis=0), axis=1)
    assert np.allclose(steps, steps.mean(), rtol=1e-3) and steps.mean() == pytest.approx(0.5, rel=0.02)
    way = (line[1] - line[0]) * sizes
    assert np.allclose(batch.previous[0], way / np.linalg.norm(way), atol=1e-4)
    around = loader.load_batch_inputs(batch.points, batch).reshape(-1, 7, 3)
    assert np.allclose(torch.linalg.norm(around[:, 1:] - around[:, :1], dim=2), 0.5, atol=1e-3)
