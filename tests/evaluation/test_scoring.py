"""Scores against a plain reference that looks at one streamline and one voxel at a time; distances against DIPY."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation

from tractkit.core.files import DataError
from tractkit.core.rng import fold, uniform
from tractkit.evaluation.scoring import (
    GroundTruth,
    Scores,
    TextTable,
    classify_streamlines,
    compare_tractograms,
    comparison_table,
    density_map,
    mdf,
    nearest_mdf,
    score_table,
    score_tractogram,
)
from tractkit.spatial.resample import resample_step
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume

SHAPE = (18, 14, 6)
SKEWED = np.array([[0, -1.5, 0, 4], [2, 0, 0, -9], [0, 0, 3, 1], [0, 0, 0, 1.0]])


def make_truth(affine=SKEWED):
    """Two bundles that cross and share no region, a third that shares an end region with the first."""
    x, y, z = np.indices(SHAPE)
    slab = (z > 0) & (z < 5)
    masks = np.stack([(abs(y - 6) < 3) & (x > 0) & (x < 17) & slab, (abs(x - 9) < 3) & (y > 0) & (y < 13) & slab,
                      (y < 8) & (x < 8) & slab])
    ends = np.stack([[masks[0] & (x < 3), masks[0] & (x > 14)], [masks[1] & (y < 3), masks[1] & (y > 10)],
                     [masks[0] & (x < 3), masks[2] & (y < 2) & (x > 4)]])
    return GroundTruth(affine, ("across", "up", "corner"), masks, ends, masks.any(0))


def random_tractogram(seed, n, truth):
    """Curves between random points; half of them start and end in end regions."""
    places = [np.argwhere(e) for e in truth.ends.reshape(-1, *SHAPE)]
    lines = []
    for k in range(n):
        u = uniform(fold("tractogram", seed, k), np.arange(40))
        a, b, c = (u[3 * i:3 * i + 3] * (np.array(SHAPE) + 1) - 1 for i in range(3))
        if u[30] < 0.6:
            ra, rb = places[int(u[31] * 6)], places[int(u[32] * 6)]
            a, b = ra[int(u[33] * len(ra))] + u[9:12] - 0.5, rb[int(u[34] * len(rb))] + u[12:15] - 0.5
            c = (a + b) / 2 + (u[15:18] - 0.5) * 4 * u[35]
        t = np.linspace(0, 1, 1 + int(u[36] * 30))[:, None]
        lines.append((1 - t) ** 2 * a + 2 * t * (1 - t) * c + t**2 * b)
    return Tractogram(Streamlines.from_list(lines), truth.affine, SHAPE)


def voxel_of(point):
    v = tuple(int(math.floor(c + 0.5)) for c in point)
    return v if all(0 <= c < n for c, n in zip(v, SHAPE, strict=True)) else None


def plain_score(tractogram, truth, min_streamlines=10, min_overlap=0.2):
    quarter = np.linalg.norm(truth.affine[:3, :3], axis=0).min() / 4
    ends = [[binary_dilation(e) for e in pair] for pair in truth.ends]
    masks = [binary_dilation(m) for m in truth.masks]
    kinds, bundles, reached = [], [], [set() for _ in truth.names]
    for i in range(len(tractogram)):
        line = tractogram.streamlines[[i]]
        fine = [voxel_of(p) for p in np.float32(resample_step(line, quarter, truth.affine)[0].points)]
        tips = voxel_of(line.points[0]), voxel_of(line.points[-1])
        candidates, regions = [], [False, False]
        for b, pair in enumerate(ends):
            at = [[v is not None and bool(e[v]) for v in tips] for e in pair]
            regions = [regions[k] or at[0][k] or at[1][k] for k in (0, 1)]
            if (at[0][0] and at[1][1]) or (at[0][1] and at[1][0]):
                candidates.append((sum(v is not None and bool(masks[b][v]) for v in fine) / len(fine), -b))
        if candidates:
            share, b = max(candidates)
            kinds.append("valid" if share >= 0.8 else "wrong path")
            bundles.append(-b)
            if share >= 0.8:
                reached[-b].update(v for v in fine if v is not None and truth.white_matter[v])
        else:
            kinds.append("invalid connection" if all(regions) else "no connection")
            bundles.append(-1)
    per_bundle = {}
    for b, name in enumerate(truth.names):
        target = {tuple(v) for v in np.argwhere(truth.masks[b] & truth.white_matter)}
        hit = len(reached[b] & target)
        n = sum(k == "valid" and c == b for k, c in zip(kinds, bundles, strict=True))
        recall, precision = hit / len(target), hit / max(len(reached[b]), 1)
        per_bundle[name] = dict(
            streamlines=n,
            found=n >= min_streamlines and recall >= min_overlap,
            overlap=recall,
            overreach=len(reached[b] - target) / len(target),
            f1=2 * recall * precision / max(recall + precision, 1e-12),
        )
    return kinds, bundles, per_bundle


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_equals_a_plain_reference(seed):
    truth = make_truth()
    t = random_tractogram(seed, 60, truth)
    kinds, bundles, per_bundle = plain_score(t, truth, 2, 0.05)
    classes = classify_streamlines(t, truth)
    assert classes.names() == kinds and classes.bundle.tolist() == bundles
    scores = score_tractogram(t, truth, min_streamlines=2, min_overlap=0.05)
    for name, want in per_bundle.items():
        got = {k: getattr(scores.bundles[name], k) for k in want}
        assert got == pytest.approx(want)
    assert scores.bundles_found == sum(b["found"] for b in per_bundle.values())
    assert scores.mean("f1") == pytest.approx(np.mean([b["f1"] for b in per_bundle.values()]))
    assert (scores.valid, scores.invalid_connections, scores.no_connections, scores.wrong_paths) == (
        kinds.count("valid"),
        kinds.count("invalid connection"),
        kinds.count("no connection") + kinds.count("wrong path"),
        kinds.count("wrong path"),
    )


def test_the_reference_meets_every_kind():
    truth = make_truth()
    kinds = {k for seed in range(5) for k in classify_streamlines(random_tractogram(seed, 60, truth), truth).names()}
    assert kinds == {"valid", "invalid connection", "wrong path", "no connection"}


def test_chunks_change_nothing(monkeypatch):
    truth = make_truth()
    t = random_tractogram(1, 60, truth)
    whole, density = score_tractogram(t, truth).to_dict(), density_map(t).data
    monkeypatch.setattr("tractkit.evaluation.scoring._CHUNK", 7)
    assert score_tractogram(t, truth).to_dict() == whole
    np.testing.assert_array_equal(density_map(t).data, density)


def test_spacing_of_points_and_sense_change_nothing():
    truth = make_truth()
    x = np.linspace(1, 16, 400)
    fine = np.c_[x, 6 + np.sin(x / 3), 2 + 0 * x]
    lines = [fine, fine[::-1], fine[np.r_[0:50:2, 50:390:1, 390:400]]]
    classes = classify_streamlines(Tractogram(Streamlines.from_list(lines), truth.affine, SHAPE), truth)
    assert classes.names() == ["valid"] * 3 and classes.bundle.tolist() == [0] * 3
    # three points on the same straight way as 400
    straight = np.c_[np.linspace(1, 16, 400), np.full(400, 6), np.full(400, 2)]
    scores = [
        score_tractogram(
            Tractogram(Streamlines.from_list([s]), truth.affine, SHAPE), truth, min_streamlines=1
        ).to_dict()
        for s in (straight, straight[[0, 200, 399]], straight[::-1])
    ]
    assert scores[0] == scores[1] == scores[2]


def test_an_end_one_voxel_beside_its_region_counts_and_two_do_not():
    truth = make_truth()
    line = np.c_[np.linspace(1, 16, 50), np.full(50, 6.0), np.full(50, 2)]
    for shift, kind in ((0, "valid"), (2, "valid"), (3, "valid"), (4, "no connection")):
        moved = line + [0, 0, 0]
        moved[0, 0] = shift  # regions are x = 1, 2: x = 3 is one voxel beside, x = 4 two
        assert classify_streamlines(Tractogram(Streamlines.from_list([moved]), truth.affine, SHAPE), truth).names() == [
            kind
        ]


def test_of_two_bundles_with_the_same_ends_the_better_filled_one_counts():
    truth = make_truth()
    x, y, z = np.indices(SHAPE)
    slab = (z > 0) & (z < 5) & (x > 0) & (x < 17)
    low, high = slab & (y < 6), slab & ((y > 7) | (x < 3) | (x > 14))
    ends = [[slab & (x < 3), slab & (x > 14)]] * 2
    line = np.c_[np.linspace(1, 16, 50), 5 + 6 * np.sin(np.linspace(0, np.pi, 50)) ** 0.3, np.full(50, 2)]
    t = Tractogram(Streamlines.from_list([line, line[::-1], line * [1, 0, 1] + [0, 3, 0]]), truth.affine, SHAPE)
    for order, want in (([0, 1], [1, 1, 0]), ([1, 0], [0, 0, 1])):
        both = GroundTruth(truth.affine, ("p", "q"), np.stack([low, high])[order], np.stack(ends), slab)
        assert classify_streamlines(t, both, min_inside=0.3).bundle.tolist() == want


def test_overreach_counts_white_matter_only():
    truth = make_truth()
    bulge = np.c_[
        np.linspace(1, 16, 200), 6 + 3.4 * np.sin(np.linspace(0, np.pi, 200)) ** 8, np.full(200, 2)
    ]  # y up to 9.4
    t = Tractogram(Streamlines.from_list([bulge]), truth.affine, SHAPE)
    scores = score_tractogram(t, truth, min_streamlines=1)
    assert scores.valid == 1 and scores.bundles["across"].overreach > 0  # into "up", which is white matter
    narrow = GroundTruth(truth.affine, truth.names, truth.masks, truth.ends, truth.masks[0] | truth.masks[2])
    assert score_tractogram(t, narrow, min_streamlines=1).bundles["across"].overreach == 0


def test_an_empty_tractogram_has_finite_scores_and_points_outside_are_no_error():
    truth = make_truth()
    for lines in ([], [np.zeros((0, 3))], [np.full((1, 3), 5.0)], [np.array([[-50.0, 0, 0], [90, 90, 90]])]):
        scores = score_tractogram(Tractogram(Streamlines.from_list(lines), truth.affine, SHAPE), truth)
        numbers = json.loads(json.dumps(scores.to_dict(), allow_nan=False))
        assert numbers["valid_share"] == 0 and numbers["f1"] == 0 and numbers["streamlines"] == len(lines)
        assert numbers["no_connections"] == len(lines) - scores.invalid_connections and numbers["nb_bundles"] == 3


def test_another_grid_is_refused():
    truth = make_truth()
    t = random_tractogram(0, 3, truth)
    with pytest.raises(DataError, match="grid"):
        score_tractogram(Tractogram(t.streamlines, np.eye(4), SHAPE), truth)
    with pytest.raises(DataError, match="grid"):
        classify_streamlines(Tractogram(t.streamlines, truth.affine, (18, 14, 7)), truth)


def write_truth(folder, truth):
    Volume(truth.white_matter.astype(np.uint8), truth.affine).save(folder / "wm_mask.nii.gz")
    (folder / "bundle_masks").mkdir()
    (folder / "bundle_ends").mkdir()
    (folder / "bundles").mkdir()
    for name, mask, (a, b) in zip(truth.names, truth.masks, truth.ends, strict=True):
        Volume(mask.astype(np.uint8), truth.affine).save(folder / f"bundle_masks/{name}.nii.gz")
        Volume(a.astype(np.uint8), truth.affine).save(folder / f"bundle_ends/{name}_a.nii.gz")
        Volume(b.astype(np.uint8), truth.affine).save(folder / f"bundle_ends/{name}_b.nii.gz")
    line = np.c_[np.linspace(1, 16, 20), np.full(20, 6), np.full(20, 2)]
    Tractogram(Streamlines.from_list([line]), truth.affine, SHAPE).save(folder / "bundles/across.trk")


def test_a_truth_is_loaded_from_its_folder(tmp_path):
    truth = make_truth()
    write_truth(tmp_path, truth)
    back = GroundTruth.load(tmp_path)
    order = [back.names.index(n) for n in truth.names]
    assert back.names == ("across", "corner", "up")
    np.testing.assert_array_equal(back.masks[order], truth.masks)
    np.testing.assert_array_equal(back.ends[order], truth.ends)
    np.testing.assert_array_equal(back.white_matter, truth.white_matter)
    np.testing.assert_allclose(back.affine, truth.affine)
    assert list(back.bundles) == ["across"] and len(back.bundles["across"]) == 1
    np.testing.assert_allclose(back.bundles["across"].points[[0, -1]], [[1, 6, 2], [16, 6, 2]], atol=1e-5)


def test_what_is_wrong_with_a_folder_is_said_with_the_files_name(tmp_path):
    with pytest.raises(DataError, match="no bundle masks"):
        GroundTruth.load(tmp_path)
    write_truth(tmp_path, make_truth())
    (tmp_path / "bundle_ends/up_b.nii.gz").unlink()
    with pytest.raises(DataError, match="up_b.nii.gz"):
        GroundTruth.load(tmp_path)
    Volume(np.ones((4, 4, 4), np.uint8), SKEWED).save(tmp_path / "bundle_ends/up_b.nii.gz")
    with pytest.raises(DataError, match="up_b.nii.gz"):
        GroundTruth.load(tmp_path)
    Volume(np.zeros(SHAPE, np.uint8), SKEWED).save(tmp_path / "bundle_ends/up_b.nii.gz")
    with pytest.raises(DataError, match="up.*empty"):
        GroundTruth.load(tmp_path)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_density_counts_each_streamline_once_in_a_voxel(seed):
    truth = make_truth()
    t = random_tractogram(seed, 20, truth)
    want = np.zeros(SHAPE, int)
    fine, _ = resample_step(t.streamlines, 1.5 / 4, truth.affine)
    for line in fine:
        for v in {voxel_of(p) for p in line} - {None}:
            want[v] += 1
    np.testing.assert_array_equal(density_map(t).data, want)


@pytest.mark.parametrize("seed", range(3))
def test_nearest_distances_equal_dipys(seed):
    from dipy.tracking.distances import bundles_distances_mdf
    from dipy.tracking.streamline import set_number_of_points

    truth = make_truth()
    a, b = (Tractogram(t.streamlines[t.streamlines.nb_points > 1], t.affine, SHAPE)
            for t in (random_tractogram(seed, 60, truth), random_tractogram(seed + 100, 50, truth)))
    ra, rb = (
        [line.astype(np.float32) for line in set_number_of_points(t.rasmm().to_list(), nb_points=12)] for t in (a, b)
    )
    want = bundles_distances_mdf(ra, rb)
    np.testing.assert_allclose(nearest_mdf(a, b), want.min(1), rtol=1e-4)
    np.testing.assert_allclose(nearest_mdf(b, a), want.min(0), rtol=1e-4)
    np.testing.assert_allclose(mdf(np.array(ra)[:, None], np.array(rb)), want, rtol=1e-4)


def test_comparison_of_tractograms():
    truth = make_truth()
    t = random_tractogram(3, 40, truth)
    t = t[t.streamlines.nb_points > 1]
    same = compare_tractograms(t, t)
    assert same == pytest.approx(
        dict(a_to_b_mm=0, b_to_a_mm=0, coverage=1, voxel_dice=1, density_overlap=1, streamlines=len(t)), abs=1e-5
    )
    half, rest = t[:len(t) // 2], t[len(t) // 2:]
    there = compare_tractograms(half, t)
    assert there["a_to_b_mm"] == pytest.approx(0, abs=1e-5) and there["b_to_a_mm"] > 1 and 0 < there["voxel_dice"] < 1
    assert 0.5 <= there["coverage"] < 1 and 0 < there["density_overlap"] < 1
    assert compare_tractograms(rest, half)["a_to_b_mm"] == pytest.approx(compare_tractograms(half, rest)["b_to_a_mm"])
    assert compare_tractograms(half, t, within=1e-9)["coverage"] < there["coverage"] + 1e-12
    assert all(math.isfinite(v) for v in there.values())
    with pytest.raises(ValueError, match="at least one"):
        compare_tractograms(t[:0], t)
    with pytest.raises(DataError, match="grids"):
        compare_tractograms(t, Tractogram(t.streamlines, np.eye(4), SHAPE))


def test_tables_read_the_same_everywhere():
    truth = make_truth()
    scores = score_tractogram(random_tractogram(3, 40, truth), truth)
    table = score_table({"this <model>": scores, "a much longer name": scores})
    text = str(table).splitlines()
    rule = next(k for k, line in enumerate(text) if set(line) == {"-"})
    assert len({len(line) for line in text[rule:rule + 3]}) == 1 and len(text[rule]) <= 80
    for word in ("valid", "invalid", "connections", "bundles", "found", "overlap", "overreach", "F1"):
        assert any(word in line for line in text[:rule])
    assert f"{100 * scores.share('valid'):.1f}" in text[rule + 1]
    page = table._repr_html_()
    assert "this &lt;model&gt;" in page and "<model>" not in page and "invalid connections %" in page
    assert "across" in str(scores.table()) and isinstance(scores, Scores)
    assert "reference was" in str(
        comparison_table({"x": compare_tractograms(*[random_tractogram(3, 4, truth)] * 2)}, ("The reference was …",))
    )
    titled = TextTable(("a", "b"), (("1", "2"),), caption="same <subject>")
    assert str(titled).splitlines()[0] == "same <subject>" and "same &lt;subject&gt;</caption>" in titled._repr_html_()
    assert str(TextTable(("a", "b\nc"), (("1", "2"),))).splitlines()[1].split() == ["a", "c"]
