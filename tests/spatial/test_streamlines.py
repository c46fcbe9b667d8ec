"""Packed streamlines against DIPY, against plain loops in float64, and against bad input."""

import pickle

import numpy as np
import pytest
from dipy.tracking.streamlinespeed import compress_streamlines, length, set_number_of_points
from hypothesis import given, settings
from hypothesis import strategies as st

from tractkit.core.files import DataError
from tractkit.spatial.rearrange import PointMap, reverse, split, take
from tractkit.spatial.resample import compress, resample_nb_points, resample_step
from tractkit.spatial.streamlines import Streamlines, concatenate_streamlines, segment_directions

OBLIQUE = np.array([[-1.6, 0.3, 0, 70], [0.3, 1.6, -0.4, -90], [0, 0.4, 2.9, -30], [0, 0, 0, 1.0]])

check = settings(deadline=None, derandomize=True, max_examples=60)  # the first call compiles


def walks(counts, seed=0, repeats=0.0):
    """Smooth random curves with the given numbers of points; some points repeat their predecessor."""
    rng = np.random.default_rng(seed)
    curves = []
    for k in counts:
        steps = rng.normal(size=3) + 0.4 * rng.normal(size=(k, 3))
        steps[rng.random(k) < repeats] = 0
        curves.append((20 + np.cumsum(0.6 * steps, axis=0)).astype(np.float32))
    return Streamlines.from_list(curves)


def in_mm(points, affine):
    return points.astype(np.float64) @ affine[:3, :3].T + affine[:3, 3]


def arc(points):
    return np.r_[0, np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))]


ragged = st.builds(
    walks,
    st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 7, 40]), max_size=8),
    st.integers(0, 2**20),
    st.sampled_from([0.0, 0.5, 1.0]),
)
affines = st.builds(
    lambda seed: np.vstack([np.c_[np.random.default_rng(seed).normal(size=(3, 3)) + 2 * np.eye(3), [1, 2, 3]],
                            [0, 0, 0, 1]]), st.integers(0, 2**20))


# ---- the value


def test_views_and_copies():
    s = walks([3, 0, 1, 5])
    assert np.shares_memory(s[3], s.points) and np.shares_memory(s[1:3].points, s.points)
    assert [len(p) for p in s] == [3, 0, 1, 5] == s.nb_points.tolist()
    assert s[-1].shape == (5, 3) and s[1].shape == (0, 3)
    with pytest.raises(IndexError):
        s[4]
    for key, ids in [([3, 0, 0], [3, 0, 0]), ([-1], [3]), (np.array([True, False, False, True]), [0, 3]),
                     (slice(None, None, -2), [3, 1]), ([], []), (slice(3, 1), []), (slice(1, 3), [1, 2])]:
        new = s[key]
        assert len(new) == len(ids)
        for p, i in zip(new, ids, strict=True):
            np.testing.assert_array_equal(p, s[i])
        Streamlines(new.points, new.offsets)  # passes the checks
    for bad in ([4], [-5], [True], [[0]], [0.5], ["a"]):
        with pytest.raises(IndexError):
            s[bad]


def test_layout():
    s = Streamlines(np.asfortranarray(np.ones((4, 3))), np.array([0, 4], np.uint16))
    assert s.points.dtype == np.float32 and s.points.flags.c_contiguous and s.offsets.dtype == np.int64
    assert np.shares_memory(Streamlines(s.points, s.offsets).points, s.points)
    with pytest.raises(AttributeError):
        s.points = s.points
    copy = pickle.loads(pickle.dumps(s))
    np.testing.assert_array_equal(copy.points, s.points)
    assert repr(s) == "Streamlines(1 streamlines, 4 points)"


@pytest.mark.parametrize("points, offsets, problem", [
    (np.zeros((4, 2)), [0, 4], "shape"),
    (np.zeros(12), [0, 4], "shape"),
    (np.zeros((4, 3), complex), [0, 4], "complex"),
    ([["a", "b", "c"]], [0, 1], "numbers"),
    (np.zeros((4, 3)), [0, 5], "end at 5 but there are 4"),
    (np.zeros((4, 3)), [0, 3], "end at 3 but there are 4"),
    (np.zeros((4, 3)), [1, 4], "start at 1"),
    (np.zeros((4, 3)), [-1, 4], "start at -1"),
    (np.zeros((4, 3)), [0, 3, 2, 4], "decrease from 3 to 2 at streamline 1"),
    (np.zeros((4, 3)), [0, -2, 4], "decrease from 0 to -2"),
    (np.zeros((4, 3)), [0, 6, 4], "decrease from 6 to 4"),
    (np.zeros((4, 3)), [0.0, 4.0], "integers"),
    (np.zeros((4, 3)), [], "integers"),
    (np.zeros((4, 3)), [[0, 4]], "integers"),
    ([[0, 0, 0], [0, np.nan, 0]], [0, 2], "1 of 2 points are NaN or infinite, the first is point 1"),
    ([[0, 0, np.inf], [0, 0, -np.inf]], [0, 2], "2 of 2"),
    ([[1e300, 0, 0]], [0, 1], "infinite"),  # fits float64, not float32
])
def test_bad_construction(points, offsets, problem):
    with pytest.raises(DataError, match=problem):
        Streamlines(points, np.array(offsets) if offsets else offsets)


def test_largest_numbers_are_finite():
    Streamlines(np.full((1000, 3), np.finfo(np.float32).max), [0, 1000])


def test_lists():
    arrays = [np.ones((2, 3)), np.empty((0, 3)), [], [[1, 2, 3]]]
    s = Streamlines.from_list(arrays)
    assert s.nb_points.tolist() == [2, 0, 0, 1] and len(Streamlines.from_list([])) == 0
    np.testing.assert_array_equal(s.to_list()[3], [[1, 2, 3]])
    with pytest.raises(DataError):
        Streamlines.from_list([np.ones((2, 4))])


@check
@given(ragged, affines)
def test_lengths_and_transform(s, affine):
    mm = [in_mm(p, affine) for p in s]
    np.testing.assert_allclose(s.lengths(affine), [arc(p)[-1] if len(p) else 0 for p in mm], rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(s.lengths(), s.lengths(np.eye(4)))
    new = s.transform(affine)
    np.testing.assert_array_equal(new.points, in_mm(s.points, affine).astype(np.float32))
    np.testing.assert_array_equal(s.ids, np.repeat(np.arange(len(s)), s.nb_points))


def test_affine_is_checked():
    with pytest.raises(ValueError, match="4, 4"):
        walks([3]).lengths(np.eye(3))


def test_read_only_arrays_do():
    s = walks([30, 4])
    s.points.flags.writeable = s.offsets.flags.writeable = False
    resample_step(s, 1.0), compress(s, 0.1), reverse(s), split(s, np.array([1, 1])), take(s, np.array([1]))
    segment_directions(s)


# ---- resample


def check_map(old, new, where):
    np.testing.assert_allclose(where.apply(old.points), new.points, atol=2e-5)
    np.testing.assert_array_equal(np.repeat(where.streamlines, new.nb_points), old.ids[where.left])
    np.testing.assert_array_equal(np.repeat(where.streamlines, new.nb_points), old.ids[where.right])
    assert where.weight.dtype == np.float32 and ((0 <= where.weight) & (where.weight <= 1)).all()
    Streamlines(new.points, new.offsets)


@check
@given(ragged, affines, st.floats(0.05, 20))
def test_resample_step(s, affine, step):
    new, where = resample_step(s, step, affine)
    check_map(s, new, where)
    ends = [(new.offsets[:-1], s.offsets[:-1]), (new.offsets[1:] - 1, s.offsets[1:] - 1)]
    for k, old in ends:  # the map, too, says that end points are old points
        some = s.nb_points > 0
        np.testing.assert_array_equal(where.left[k[some]], old[some])
        assert not where.weight[k[some]].any()
    for p, q, total in zip(s, new, s.lengths(affine), strict=True):
        if len(p) < 2:
            np.testing.assert_array_equal(p, q)
            continue
        assert len(q) - 1 == max(1, int(np.floor(total / step + 0.5)))
        np.testing.assert_array_equal(q[[0, -1]], p[[0, -1]])
        at = arc(in_mm(p, affine))
        if total > 0:  # NumPy's interpolation in float64, through mm
            wanted = np.linspace(0, total, len(q))
            keep = np.r_[True, np.diff(at) > 0]
            truth = np.stack([np.interp(wanted, at[keep], p[keep, d].astype(float)) for d in range(3)], 1)
            np.testing.assert_allclose(q, truth, atol=1e-4)


def test_resample_matches_dipy():
    s = walks([50, 3, 2, 120], seed=1)
    for n in (2, 3, 17, 200):
        new, where = resample_nb_points(s, n)
        check_map(s, new, where)
        theirs = set_number_of_points([p.astype(np.float64) for p in s], nb_points=n)
        np.testing.assert_allclose(new.points, np.concatenate(theirs), atol=1e-4)
    mm, _ = resample_nb_points(s, 30, OBLIQUE)
    theirs = set_number_of_points([in_mm(p, OBLIQUE) for p in s], nb_points=30)
    np.testing.assert_allclose(in_mm(mm.points, OBLIQUE), np.concatenate(theirs), atol=1e-4)
    np.testing.assert_allclose(s.lengths(), length([p.astype(np.float64) for p in s]), rtol=1e-6)


def test_resample_of_little():
    s = Streamlines.from_list([[], [[1, 2, 3]], [[4, 4, 4]] * 3])
    assert resample_step(s, 1.0)[0].nb_points.tolist() == [0, 1, 2]
    new, where = resample_nb_points(s, 4)
    assert new.nb_points.tolist() == [0, 4, 4]
    np.testing.assert_array_equal(where.apply(s.points), new.points)
    assert len(resample_step(Streamlines.from_list([]), 1.0)[0]) == 0
    for bad in (0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="step_mm"):
            resample_step(s, bad)
    with pytest.raises(ValueError, match="nb_points"):
        resample_nb_points(s, 1)


def test_step_is_in_mm():
    line = Streamlines([[0, 0, 0], [0, 0, 5.0]], [0, 2])
    tall = np.diag([1.0, 1, 3, 1])
    np.testing.assert_allclose(resample_step(line, 1.0, tall)[0].points[:, 2], np.arange(16) / 3, atol=1e-6)
    assert resample_step(line, 2.0)[0].nb_points[0] == 4  # 2.5 segments round up to 3


# ---- compress


@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("longest", [10.0, 3.0])
def test_compress_matches_dipy(tolerance, longest):
    s = walks([60, 3, 2, 1, 200, 30], seed=2)
    new, where = compress(s, tolerance, max_segment_mm=longest)
    check_map(s, new, where)
    theirs = compress_streamlines(s.to_list(), tol_error=tolerance, max_segment_length=longest)
    assert new.nb_points.tolist() == [len(p) for p in theirs]
    np.testing.assert_array_equal(new.points, np.concatenate(theirs))


def test_compress_is_in_mm():
    s = walks([200] * 5, seed=3)
    new, _ = compress(s, 0.3, OBLIQUE)
    theirs = compress_streamlines([in_mm(p, OBLIQUE) for p in s], tol_error=0.3)
    assert new.nb_points.tolist() == [len(p) for p in theirs]
    assert new.nb_points.tolist() != compress(s, 0.3)[0].nb_points.tolist()


@check
@given(ragged, st.floats(0, 2))
def test_compress_keeps_ends_and_tolerance(s, tolerance):
    new, where = compress(s, tolerance)
    check_map(s, new, where)
    np.testing.assert_array_equal(new.nb_points, np.minimum(new.nb_points, s.nb_points))
    for i, (p, q) in enumerate(zip(s, new, strict=True)):
        assert len(q) == len(p) if len(p) < 3 else len(q) >= 2
        np.testing.assert_array_equal(q[:1], p[:1])
        np.testing.assert_array_equal(q[-1:], p[-1:])
        kept = where.left[new.offsets[i]:new.offsets[i + 1]] - s.offsets[i]
        for a, b in zip(kept[:-1], kept[1:], strict=True):
            way = (p[b] - p[a]).astype(float)
            for x in (p[a + 1:b] - p[a]).astype(float):
                assert np.linalg.norm(x - x @ way / (way @ way) * way) <= tolerance + 1e-9


def test_compress_arguments():
    for bad in ({"tolerance_mm": -1}, {"tolerance_mm": np.nan}, {"max_segment_mm": 0}):
        with pytest.raises(ValueError, match="tolerance_mm"):
            compress(walks([4]), **bad)


# ---- reverse, split, take, concatenate, directions


@check
@given(ragged, st.integers(0, 2**20))
def test_reverse(s, seed):
    flags = np.random.default_rng(seed).random(len(s)) < 0.5
    new, where = reverse(s, flags)
    check_map(s, new, where)
    for p, q, turned in zip(s, new, flags, strict=True):
        np.testing.assert_array_equal(q, p[::-1] if turned else p)
    np.testing.assert_array_equal(reverse(new, flags)[0].points, s.points)
    np.testing.assert_array_equal(where.apply(s.points), new.points)
    np.testing.assert_array_equal(reverse(s)[0].points, reverse(s, np.ones(len(s), bool))[0].points)


@check
@given(ragged, st.integers(0, 2**20))
def test_split(s, seed):
    rng = np.random.default_rng(seed)
    flags = (rng.random(len(s)) < 0.6) & (s.nb_points > 2)
    at = rng.integers(1, np.maximum(s.nb_points - 1, 2))
    new, where = split(s, at, flags)
    check_map(s, new, where)
    parts = []
    for p, k, cut in zip(s, at, flags, strict=True):
        parts += [p[:k + 1], p[k:]] if cut else [p]
    assert new.nb_points.tolist() == [len(p) for p in parts]
    np.testing.assert_array_equal(new.points, Streamlines.from_list(parts).points)
    np.testing.assert_array_equal(where.apply(s.points), new.points)
    np.testing.assert_array_equal(where.streamlines, np.repeat(np.arange(len(s)), 1 + flags))
    np.testing.assert_allclose(new.lengths().sum(), s.lengths().sum(), rtol=1e-9)


def test_split_refuses():
    s = walks([5, 2, 0])
    yes = np.array([True, False, False])
    for at in (0, 4, 5, -1):
        with pytest.raises(ValueError, match=f"streamline 0 has 5 points and cannot be cut at {at}"):
            split(s, np.full(3, at), yes)
    with pytest.raises(ValueError, match="streamline 1"):
        split(s, np.array([1, 1, 1]))
    with pytest.raises(ValueError, match="at must"):
        split(s, np.array([1, 1]))
    with pytest.raises(ValueError, match="flags must"):
        split(s, np.array([1, 1, 1]), np.array([1, 0, 0]))
    with pytest.raises(ValueError, match="flags must"):
        reverse(s, np.array([True]))
    with pytest.raises(ValueError, match="at must"):
        split(s, np.array([1.0, 1, 1]), yes)


@check
@given(ragged, st.integers(0, 2**20))
def test_take_and_concatenate(s, seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, len(s), 5) if len(s) else np.empty(0, int)
    new, where = take(s, ids)
    check_map(s, new, where)
    np.testing.assert_array_equal(new.points, s[ids].points)
    np.testing.assert_array_equal(where.apply(s.points), new.points)
    both = concatenate_streamlines([s, new, s[:0]])
    for p, q in zip(both, [*s, *new], strict=True):
        np.testing.assert_array_equal(p, q)
    Streamlines(both.points, both.offsets)
    assert len(concatenate_streamlines([])) == 0


@check
@given(ragged)
def test_directions(s):
    d = segment_directions(s)
    assert d.dtype == np.float32
    for p, q in zip(s, Streamlines(d, s.offsets), strict=True):
        np.testing.assert_array_equal(q[:-1], np.diff(p, axis=0))
        np.testing.assert_array_equal(q[-1:], np.zeros((min(1, len(p)), 3)))


# ---- maps


def test_map_of_any_array():
    s = walks([30, 5], seed=4)
    new, where = resample_step(s, 0.7)
    n = len(s.points)
    np.testing.assert_allclose(where.apply(np.arange(n) * 2.0), 2 * (where.left + where.weight.astype(float)))
    cube = np.random.default_rng(0).random((n, 2, 2)).astype(np.float32)
    np.testing.assert_allclose(where.apply(cube)[:, 1, 0], where.apply(cube[:, 1, 0]))
    assert where.apply(cube).dtype == np.float32
    labels = where.apply(np.arange(n))
    assert labels.dtype.kind == "i" and set(labels) <= set(range(n))
    np.testing.assert_array_equal(labels, np.where(where.weight > 0.5, where.right, where.left))
    assert where.apply(np.arange(n) % 2 == 0).dtype == bool


def test_map_made_by_hand_and_pickled():
    where = PointMap(np.array([0, 1]), np.array([1, 1]), np.array([0.25, 0], np.float32), np.array([0]))
    np.testing.assert_allclose(where.apply(np.array([0.0, 4.0])), [1, 4])
    for _, later in (resample_step(walks([9]), 1.0), reverse(walks([9])), split(walks([9]), np.array([3])),
                     compress(walks([9])), take(walks([9]), np.array([0]))):
        copy = pickle.loads(pickle.dumps(later))
        np.testing.assert_array_equal(copy.left, later.left)
        np.testing.assert_array_equal(copy.right, later.right)


# ---- real streamlines


@pytest.mark.real
def test_real_bundle_against_dipy(real_data):
    import nibabel as nib
    lines = nib.streamlines.load(real_data / "stanford_bundles" / "hardi-lr-superiorfrontal.trk").streamlines[:300]
    s = Streamlines.from_list(lines)
    np.testing.assert_allclose(s.lengths(), length(lines), rtol=1e-5)
    theirs = compress_streamlines(lines, tol_error=0.1)
    assert np.mean(compress(s, 0.1)[0].nb_points == [len(p) for p in theirs]) > 0.99
    theirs = set_number_of_points(lines, nb_points=40)
    np.testing.assert_allclose(resample_nb_points(s, 40)[0].points, np.concatenate(list(theirs)), atol=1e-3)
