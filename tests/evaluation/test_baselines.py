"""The baselines: where DIPY's streamlines lie under any affine, equal limits for all trackers, the oracle, the guess of
going on."""

import numpy as np
import pytest
import torch
from dipy.data import default_sphere
from dipy.reconst.shm import sf_to_sh
from helpers_training import Straight

from tractkit.core.files import DataError
from tractkit.core.rng import fold, normal
from tractkit.data.dataset import MultiSubjectDataset
from tractkit.data.loader import StreamlinesBatchLoader
from tractkit.data.sampler import BatchIDSampler
from tractkit.evaluation.baselines import (
    DipySettings,
    _shared_limit,
    choose_dipy_settings,
    previous_direction_loss,
    track_dipy,
    track_oracle,
)
from tractkit.evaluation.scoring import GroundTruth, score_tractogram
from tractkit.hdf5.create import create_hdf5
from tractkit.models.learn2track import Learn2Track
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume
from tractkit.tracking.tracker import Tracker, seeds_from_mask

SHAPE = (22, 9, 8)
pytestmark = pytest.mark.filterwarnings("ignore:The legacy descoteaux07:PendingDeprecationWarning")


def rotated(voxel_sizes, flip=False):
    turn = np.linalg.qr(normal(fold("affine"), np.arange(9).reshape(3, 3)).astype(float))[0]
    if (np.linalg.det(turn) < 0) != flip:
        turn[:, 0] *= -1
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn @ np.diag(voxel_sizes), [-31, 12, 7.5]
    return affine


def fodf_along(direction, affine, legacy=True, shape=SHAPE):
    """Every voxel holds a sharp lobe along `direction`, in voxmm."""
    values = (default_sphere.vertices @ np.array(direction, float)) ** 30
    coefficients = sf_to_sh(values, default_sphere, sh_order_max=8, basis_type="descoteaux07", legacy=legacy)
    return Volume(np.broadcast_to(coefficients.astype(np.float32), (*shape, len(coefficients))), affine)


def everywhere(affine, shape=SHAPE):
    return Volume(np.ones(shape, bool), affine)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("voxel_sizes, flip", [((2, 2, 2), False), ((2, 2, 2), True), ((1, 3, 2), False)])
def test_a_straight_fodf_gives_straight_lines_at_the_right_place(voxel_sizes, flip, legacy):
    affine = rotated(voxel_sizes, flip)
    nearest = default_sphere.vertices[
        (default_sphere.vertices @ [0.6, 0.5, 0.62]).argmax()
    ]  # a direction DIPY can answer
    seeds = np.array([[10, 4, 4], [6.3, 3.2, 5.1]], np.float32)
    t = track_dipy(
        fodf_along(nearest, affine, legacy),
        seeds,
        everywhere(affine),
        step_size=0.5,
        min_length=2,
        legacy=legacy,
        progress=False,
    )
    assert len(t) == 2
    for line, seed in zip(t.rasmm(), seeds, strict=True):
        along = affine[:3, :3] @ (nearest / voxel_sizes)  # voxmm -> world; of length one
        start = affine[:3, :3] @ seed + affine[:3, 3]
        off = line - start
        np.testing.assert_allclose(off - np.outer(off @ along, along), 0, atol=2e-3)
        np.testing.assert_allclose(np.abs(np.diff(off @ along)), 0.5, atol=2e-3)
        assert np.abs(off).sum(1).min() < 1e-3
    voxels = np.floor(t.streamlines.points + 0.5)
    assert (voxels >= 0).all() and (voxels < SHAPE).all()
    assert t.inside().all() and (np.ptp(t.streamlines[0], 0) * voxel_sizes).max() > 4


def test_the_wrong_definition_of_the_basis_shows():
    """Why `legacy` is an argument: read with the other definition, coefficients point elsewhere."""
    affine, d = np.eye(4), default_sphere.vertices[(default_sphere.vertices @ [0.6, 0.5, 0.62]).argmax()]
    wrong = track_dipy(
        fodf_along(d, affine, legacy=False), [[10, 4, 4]], everywhere(affine), min_length=0, progress=False, legacy=True
    )
    off = wrong.streamlines[0] - np.float32([10, 4, 4])
    assert np.abs(off - np.outer(off @ d, d)).max() > 0.3


@pytest.mark.parametrize(
    "limits",
    [
        dict(max_length=9),
        dict(max_length=12.4),
        dict(max_length=40, min_length=21),
        dict(min_length=20.9),
        dict(min_length=21.2, max_length=40),
    ],
)
def test_limits_mean_the_same_for_every_tracker(limits):
    affine, mask = np.eye(4), everywhere(np.eye(4))
    sphere_x = np.abs(default_sphere.vertices[:, 0]).argmax()
    along = default_sphere.vertices[sphere_x]
    seeds = np.array([[3, 4, 4], [10.5, 4, 4], [20, 4, 4]])
    limits = {"min_length": 0, "max_length": 200, **limits}
    line = np.c_[np.arange(22.0), np.full(22, 4), np.full(22, 4)]
    truth = GroundTruth(affine, ("x",), mask.data[None], np.stack([[mask.data, mask.data]]), mask.data,
                        {"x": Streamlines.from_list([line])})
    ours = Tracker(Straight(), Volume(np.ones(SHAPE), affine), mask, step_size=0.5, **limits).track(
        seeds, progress=False
    )
    oracle = track_oracle(truth, seeds, mask, step_size=0.5, progress=False, **limits)
    if abs(along[0]) > 0.995:
        dipy = track_dipy(fodf_along(along, affine), seeds, mask, step_size=0.5, progress=False, **limits)
        assert len(dipy) == len(ours)
        np.testing.assert_allclose(dipy.lengths_mm, ours.lengths_mm, atol=0.51 if limits["max_length"] > 30 else 1e-3)
    np.testing.assert_array_equal(oracle.streamlines.offsets, ours.streamlines.offsets)
    np.testing.assert_allclose(np.sort(oracle.streamlines.points, 0), np.sort(ours.streamlines.points, 0), atol=1e-4)


@pytest.mark.parametrize(
    "forward, backward, most, kept",
    [
        (5, 4, 20, (5, 4)),
        (5, 4, 9, (5, 4)),
        (30, 40, 21, (11, 10)),
        (30, 3, 20, (17, 3)),
        (3, 30, 20, (3, 17)),
        (30, 30, 1, (1, 0)),
    ],
)
def test_a_length_is_used_up_by_both_halves_in_turn(forward, backward, most, kept):
    line = np.c_[np.arange(-backward, forward + 1.0), np.zeros((forward + backward + 1, 2))]
    cut = _shared_limit(line, np.zeros(3), most)
    assert (cut[-1, 0], -cut[0, 0]) == kept
    shape, x = (80, 3, 3), backward
    mask = np.zeros(shape, bool)
    mask[:forward + backward + 1] = True
    ours = Tracker(
        Straight(), Volume(np.ones(shape), np.eye(4)), Volume(mask, np.eye(4)), max_length=most, min_length=0
    ).track([[x, 1, 1]], progress=False)
    assert (ours.streamlines[0][:, 0].max() - x, x - ours.streamlines[0][:, 0].min()) == kept


def test_dipy_refuses_what_the_tracker_refuses():
    affine = np.eye(4)
    with pytest.raises(DataError, match="shape"):
        track_dipy(fodf_along([1, 0, 0], affine), [[1, 1, 1]], everywhere(affine, (3, 3, 3)), progress=False)
    with pytest.raises(ValueError, match="outside the mask"):
        track_dipy(fodf_along([1, 0, 0], affine), [[50, 1, 1]], everywhere(affine), progress=False)
    with pytest.raises(ValueError, match="mm"):
        track_dipy(fodf_along([1, 0, 0], affine), [[5, 1, 1]], everywhere(affine), step_size=0, progress=False)
    with pytest.raises(ValueError, match="28"):
        track_dipy(Volume(np.ones((*SHAPE, 27)), affine), [[5, 1, 1]], everywhere(affine), progress=False)


def test_dipy_gives_one_streamline_a_seed_where_bundles_cross():
    affine = np.eye(4)
    values = sum((default_sphere.vertices @ d) ** 30 for d in np.eye(3)[:2])
    both = sf_to_sh(values, default_sphere, sh_order_max=8, legacy=True).astype(np.float32)
    fodf = Volume(np.broadcast_to(both, (*SHAPE, 45)), affine)
    t = track_dipy(fodf, [[10, 4, 4], [5, 3, 3]], everywhere(affine), min_length=0, progress=False)
    assert len(t) == 2


def test_dipys_min_length_is_a_length_too():
    affine, seed = np.eye(4), [[10, 4, 4]]
    fodf = fodf_along(default_sphere.vertices[np.abs(default_sphere.vertices[:, 0]).argmax()], affine)
    length = track_dipy(fodf, seed, everywhere(affine), min_length=0, progress=False).lengths_mm[0]
    assert len(track_dipy(fodf, seed, everywhere(affine), min_length=length - 0.01, progress=False)) == 1
    assert len(track_dipy(fodf, seed, everywhere(affine), min_length=length + 0.01, progress=False)) == 0


def test_dipy_touches_no_generator():
    affine = np.eye(4)
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    track_dipy(fodf_along([1, 0, 0], affine), [[5, 4, 4]], everywhere(affine), min_length=0, progress=False)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def crossing_truth():
    """Two bundles that cross at right angles, with true streamlines."""
    affine = rotated((2, 2, 2))
    x, y, z = np.indices((30, 30, 5))
    masks = np.stack([(abs(y - 14) < 4) & (z > 0) & (z < 4), (abs(x - 14) < 4) & (z > 0) & (z < 4)])
    ends = np.stack([[masks[0] & (x < 3), masks[0] & (x > 26)], [masks[1] & (y < 3), masks[1] & (y > 26)]])
    t = np.linspace(0.6, 28.4, 50)
    a = [np.c_[t, np.full(50, o), np.full(50, h)] for o in np.arange(11.5, 17) for h in (1, 2, 3)]
    return GroundTruth(affine, ("a", "b"), masks, ends, masks.any(0),
                       {"a": Streamlines.from_list(a), "b": Streamlines.from_list([s[:, [1, 0, 2]] for s in a])})


def test_the_oracle_keeps_to_the_bundle_of_its_seed():
    truth = crossing_truth()
    mask = Volume(truth.white_matter, truth.affine)
    t = track_oracle(truth, seeds_from_mask(mask)[::5], mask, progress=False)
    scores = score_tractogram(t, truth)
    assert scores.valid == len(t) > 100 and scores.bundles_found == 2
    curves = np.array([[o, h] for o in np.arange(11.5, 17) for h in (1, 2, 3)])
    for line in t.streamlines:  # straight bundles: one coordinate runs, the others come closer to a curve and stay
        aside = np.delete(line, np.ptp(line, 0).argmax(), axis=1)
        off = np.linalg.norm(aside[:, None] - curves, axis=2).min(1)
        assert np.ptp(aside, 0).max() < 1.3 and (off[[0, -1]] <= off.max()).all()
        assert min(off[0], off[-1]) < 0.2 * off.max() + 0.02


def test_an_oracle_without_curves_is_refused():
    truth = crossing_truth()
    bare = GroundTruth(truth.affine, truth.names, truth.masks, truth.ends, truth.white_matter)
    mask = Volume(truth.white_matter, truth.affine)
    with pytest.raises(ValueError, match="no streamlines to follow"):
        track_oracle(bare, seeds_from_mask(mask)[:3], mask, progress=False)


def test_points_without_a_direction_do_not_mislead_the_oracle():
    truth = crossing_truth()
    middle = np.array([[13.0, 14, 2]])
    dots = [p[None] + 0.3 for p in truth.bundles["a"].points[::7]]
    dots = Streamlines.from_list([*dots, middle + [[0, 1, 0]] * 3, np.zeros((0, 3)), *truth.bundles["a"]])
    truth.bundles["a"] = dots
    mask = Volume(truth.white_matter, truth.affine)
    t = track_oracle(truth, seeds_from_mask(mask)[::25], mask, progress=False)
    assert score_tractogram(t, truth).valid == len(t) > 10


def test_the_best_settings_are_those_at_the_top():
    truth = crossing_truth()
    mask = Volume(truth.white_matter, truth.affine)
    lobes = [(default_sphere.vertices @ d) ** 20 for d in np.eye(3)[:2]]
    values = truth.masks[0][..., None] * lobes[0] + 0.8 * truth.masks[1][..., None] * lobes[1]
    fodf = Volume(sf_to_sh(values, default_sphere, sh_order_max=8, legacy=True), truth.affine)
    seeds = seeds_from_mask(mask)[::40]
    best, table = choose_dipy_settings(
        fodf, seeds, mask, truth, step_sizes=(1, 4), max_angles=(20, 89), peak_thresholds=(0.1, 0.9), progress=False
    )
    assert len(table.rows) == 8 and isinstance(best, DipySettings)
    means = [float(row[-1]) for row in table.rows]
    assert means == sorted(means, reverse=True) and means[0] > means[-1]
    of = {tuple(map(float, row[:3])): row[3:] for row in table.rows}
    assert of[1, 20, 0.1] != of[1, 20, 0.9] and of[1, 20, 0.1] != of[4, 20, 0.1] and of[1, 20, 0.1] != of[1, 89, 0.1]
    assert [float(v) for v in table.rows[0][:3]] == [best.step_size, best.max_angle, best.peak_threshold]
    t = track_dipy(
        fodf,
        seeds,
        mask,
        step_size=best.step_size,
        max_angle=best.max_angle,
        peak_threshold=best.peak_threshold,
        progress=False,
    )
    scores = score_tractogram(t, truth)
    assert (scores.share("valid") + scores.mean("f1")) / 2 == pytest.approx(means[0], abs=1e-3)
    default = choose_dipy_settings.__kwdefaults__
    assert len(default["step_sizes"]) * len(default["max_angles"]) * len(default["peak_thresholds"]) >= 9


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("lines")
    for k, sizes in enumerate([(2, 2, 2), (1, 2, 3)]):
        (root / f"sub-{k}").mkdir()
        steps = normal(fold("steps", k), np.arange(12 * 30 * 3).reshape(12, 30, 3)) * 0.2 + [0.5, 0.3, 0.1]
        lines = [15 + np.cumsum(s, 0) for s in steps]
        Tractogram(Streamlines.from_list(lines), np.diag([*sizes, 1.0]), (60, 60, 60)).save(root / f"sub-{k}/lines.trk")
        Volume(np.ones((60, 60, 60), np.uint8), np.diag([*sizes, 1.0])).save(root / f"sub-{k}/input.nii.gz")
    config = {"lines": {"type": "streamlines", "files": "lines.trk"},
              "input": {"type": "volume", "files": "input.nii.gz", "standardization": "none"}}
    path = create_hdf5(
        root, root / "data.hdf5", config, {"training": [], "validation": ["sub-0", "sub-1"]}, progress=False
    )
    return MultiSubjectDataset(path).load_data()


@pytest.mark.parametrize("known", [0.0, 0.5, 1.0])
def test_the_loss_of_going_on_is_over_the_points_of_the_models_validation(dataset, known):
    plan = BatchIDSampler(dataset, "lines", batch_size_validation=7).plan(0, "validation")
    loader = StreamlinesBatchLoader(dataset, None, "lines", known_start_ratio=known)
    loss, n = previous_direction_loss(loader, plan)
    total, points, model = 0.0, 0, Learn2Track(1)
    for ids in plan:
        batch = loader.load_batch_streamlines(ids, training=False)
        targets = model.targets(batch)
        points += model.compute_loss(torch.ones(len(batch.points), 3), targets)[1]
        for i, line in enumerate(batch.streamlines()):
            d = np.diff(line.astype(float), axis=0) * batch.voxel_sizes[i].numpy()
            d /= np.linalg.norm(d, axis=1, keepdims=True)
            first = 1 - d[0] @ batch.previous[i].numpy() if batch.first_known[i] else 0.5
            total += first + (1 - (d[1:] * d[:-1]).sum(1)).sum()
    assert n == points and loss == pytest.approx(total / n, rel=1e-5)


def test_the_loss_of_going_on_needs_points(dataset):
    with pytest.raises(ValueError, match="no point"):
        previous_direction_loss(StreamlinesBatchLoader(dataset, None, "lines"), [])
