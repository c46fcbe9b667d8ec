"""Spaces: nibabel and DIPY as oracles, over random affines."""

import numpy as np
import pytest
from dipy.io.stateful_tractogram import Origin as DipyOrigin
from dipy.io.stateful_tractogram import Space as DipySpace
from dipy.io.stateful_tractogram import StatefulTractogram
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel import affines as oracle
from nibabel.orientations import aff2axcodes

from tractkit.core.files import DataError
from tractkit.spatial.space import (
    Origin,
    Space,
    apply_affine,
    check_affine,
    conversion_affine,
    convert_points,
    voxel_order,
    voxel_sizes,
)

ADDRESSES = [(space, origin) for space in Space for origin in Origin]


@st.composite
def any_affine(draw, shear=True):
    """Rotated, anisotropic, flipped, shifted, and by default sheared."""
    angles = [draw(st.floats(-3.2, 3.2)) for _ in range(3)]
    a = np.eye(4)
    for (i, j), t in zip([(0, 1), (0, 2), (1, 2)], angles, strict=True):
        turn = np.eye(4)
        turn[[i, i, j, j], [i, j, i, j]] = np.cos(t), -np.sin(t), np.sin(t), np.cos(t)
        a = a @ turn
    if shear:
        lean = np.eye(4)
        lean[0, 1], lean[0, 2], lean[1, 2] = (draw(st.floats(-0.4, 0.4)) for _ in range(3))
        a = a @ lean
    sizes = [draw(st.floats(0.3, 5)) * draw(st.sampled_from([-1, 1])) for _ in range(3)]
    a = a @ np.diag([*sizes, 1])
    a[:3, 3] = [draw(st.floats(-200, 200)) for _ in range(3)]
    return a


def points_of(seed, n=20, dtype=np.float64):
    from tractkit.core.rng import uniform

    return (uniform(seed, np.arange(3 * n)).reshape(n, 3) * 60 - 5).astype(dtype)


@given(any_affine(), st.integers(0, 99), st.sampled_from([np.float32, np.float64]))
@settings(max_examples=40, deadline=None)
def test_apply_affine_is_nibabel(affine, seed, dtype):
    points = points_of(seed, dtype=dtype)
    ours = apply_affine(affine, points)
    assert ours.dtype == dtype and ours is not points
    exact = oracle.apply_affine(affine, points.astype(np.float64))
    np.testing.assert_allclose(ours, exact, rtol=6e-8 if dtype == np.float32 else 1e-12, atol=1e-9)


def test_apply_affine_in_blocks_of_any_length():
    affine = np.array([[1, 2, 0, 3], [0, 1.5, 1, -7], [0, 0, -2, 9], [0, 0, 0, 1.0]])
    points = points_of(1, 70_001, np.float32)
    np.testing.assert_allclose(apply_affine(affine, points), oracle.apply_affine(affine, points), rtol=1e-6, atol=1e-5)
    assert apply_affine(affine, np.zeros((0, 3), np.float32)).shape == (0, 3)
    assert apply_affine(np.eye(4), np.arange(6).reshape(2, 3)).dtype == np.float64
    for bad in (np.zeros(3), np.zeros((2, 4)), np.zeros((1, 2, 3))):
        with pytest.raises(ValueError, match="not \\(4, 4\\) and \\(n, 3\\)"):
            apply_affine(affine, bad)
    with pytest.raises(ValueError):
        apply_affine(np.eye(3), points)


@given(any_affine())
@settings(max_examples=40, deadline=None)
def test_sizes_and_order_are_nibabels(affine):
    np.testing.assert_allclose(voxel_sizes(affine), oracle.voxel_sizes(affine), rtol=1e-12)
    assert voxel_order(affine) == "".join(aff2axcodes(affine))
    assert check_affine(affine) is not affine
    np.testing.assert_array_equal(check_affine(affine.tolist()), affine)


@given(any_affine(), st.sampled_from(ADDRESSES), st.sampled_from(ADDRESSES), st.sampled_from(ADDRESSES))
@settings(max_examples=60, deadline=None)
def test_there_and_back_and_through(affine, a, b, c):
    points = points_of(2)
    there = convert_points(points, affine, source=a, target=b)
    np.testing.assert_allclose(convert_points(there, affine, source=b, target=a), points, atol=1e-7)
    direct = convert_points(points, affine, source=a, target=c)
    np.testing.assert_allclose(convert_points(there, affine, source=b, target=c), direct, atol=1e-6)


@given(any_affine())
@settings(max_examples=15, deadline=None)
def test_every_conversion_is_dipys(affine):
    line = points_of(3, dtype=np.float32) + 10
    header = (affine, np.array([90, 90, 90]), voxel_sizes(affine), voxel_order(affine))
    for source in ADDRESSES:
        for target in ADDRESSES:
            sft = StatefulTractogram([line], header, DipySpace(source[0].value), origin=DipyOrigin(source[1].value))
            sft.to_space(DipySpace(target[0].value))
            sft.to_origin(DipyOrigin(target[1].value))
            ours = convert_points(line, affine, source=source, target=target)
            np.testing.assert_allclose(
                ours, sft.streamlines[0], atol=2e-3 if Space.RASMM in (source[0], target[0]) else 1e-4
            )


def test_half_a_voxel_is_exact():
    affine = np.array([[0.3, 0.1, 0, 1], [0, 2.7, 0.2, 5], [0, 0, 3.1, -4], [0, 0, 0, 1]])
    points = points_of(4, dtype=np.float32)
    corner = convert_points(points, affine, source=("vox", "center"), target=("vox", "corner"))
    np.testing.assert_array_equal(corner, points + np.float32(0.5))
    assert corner.dtype == np.float32
    same = conversion_affine(affine, ("rasmm", "corner"), ("rasmm", "corner"))
    np.testing.assert_array_equal(same, np.eye(4))
    with pytest.raises(ValueError, match="'world'"):
        convert_points(points, affine, source=("world", "center"), target=("vox", "center"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad, says",
    [
        (np.eye(3), "shape (3, 3)"),
        (np.zeros((4, 4)), "last row"),
        (np.diag([1, 1, 0, 1]), "cannot be inverted"),
        (np.diag([1, np.nan, 1, 1]), "NaN"),
        (np.diag([1, 1, 1, 2]), "last row"),
        ("nonsense", "no matrix"),
        (None, "shape ()"),
        ([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], "cannot be inverted"),
    ],
)
def test_bad_affines_name_the_file(bad, says):
    with pytest.raises(DataError) as e:
        check_affine(bad, file="b0.nii.gz", subject="sub-02", group="dwi")
    assert str(e.value).startswith("b0.nii.gz: sub-02/dwi: ") and says in str(e.value)


def test_tiny_voxels_are_no_error():
    check_affine(np.diag([1e-3, 2e-3, 1e-3, 1]))  # microscopy: a small determinant, but three good axes
