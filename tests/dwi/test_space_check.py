"""Are gradients, coefficients and streamlines in one frame? Each mistake once, on a phantom small enough to be quick."""

import warnings

import numpy as np
import pytest
from dipy.data import get_sphere
from dipy.reconst.shm import sf_to_sh

from tractkit.dwi.anatomy import PhantomSettings
from tractkit.dwi.basis_check import choose_basis, even_part
from tractkit.dwi.fibre_coherence import (
    axis_maps,
    choose,
    coherence_of_maps,
    cubes_of,
    describe_map,
    tensor_directions,
)
from tractkit.dwi.gradients import DWI
from tractkit.dwi.placement import choose_placement, placements
from tractkit.dwi.simulate import PhantomSubject, simulate_subject
from tractkit.spatial.streamlines import concatenate_streamlines

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
SAME = np.eye(3)[None]


@pytest.fixture(scope="module")
def subject() -> PhantomSubject:
    return simulate_subject("sub-01", PhantomSettings(0, layout="rotated", n_directions=12, n_streamlines=20))


@pytest.fixture(scope="module")
def lines(subject):
    return concatenate_streamlines([b.streamlines for b in subject.bundles.values()])


@pytest.fixture(scope="module")
def dwi(subject) -> DWI:
    return DWI(subject.dwi, subject.bvals, subject.bvecs, subject.mask.data)


@pytest.fixture(scope="module")
def field(dwi):
    directions, fa = tensor_directions(dwi.volume.data, dwi.bvals, dwi.bvecs, dwi.mask, 50)
    return np.where(fa[..., None] > 0.2, directions, 0)[..., None, :]


def possible_maps(field, sizes) -> list[str]:
    """The maps of axes that repair a field of directions, as far as its own coherence shows."""
    scores, voxels = coherence_of_maps(field, field.any(axis=(-1, -2)), sizes, axis_maps())
    return [describe_map(m) for m in axis_maps()[choose(scores, cubes_of(voxels)).possible]]


def test_each_map_of_the_gradients_axes_is_repaired_or_left_open(field, dwi):
    for turn in axis_maps()[::4]:
        given = possible_maps(field @ turn.T.astype(np.float32), dwi.volume.voxel_sizes)
        seen = [m for m in axis_maps() if np.array_equal(abs(m @ turn), np.eye(3))]  # as it was, but for signs
        assert any(describe_map(m) in given for m in seen)
        assert len(given) <= 2  # of the plane in which the fibres lie, nothing tells the two sides apart
        right = next(m for m in axis_maps() if np.array_equal(abs(np.trace(m @ turn)), 3.0))
        assert describe_map(right) in given


def test_directions_that_tell_nothing_leave_all_open(field, dwi):
    noise = np.random.default_rng(0).normal(size=field.shape).astype(np.float32)
    noise = np.where(field.any(axis=-1, keepdims=True), noise / np.linalg.norm(noise, axis=-1, keepdims=True), 0)
    assert len(possible_maps(noise, dwi.volume.voxel_sizes)) == 24
    same = np.where(field.any(axis=-1, keepdims=True), np.float32([0, 0.6, 0.8]), 0)
    assert len(possible_maps(same, dwi.volume.voxel_sizes)) == 24
    assert len(possible_maps(field[:6, :6, :6], dwi.volume.voxel_sizes)) == 24


@pytest.mark.parametrize("basis, kind", [
    ("descoteaux07_legacy", "fodf"), ("tournier07", "fodf"), ("tournier07", "signal"),
    *(pytest.param(basis, kind, marks=pytest.mark.full) for basis, kind in [
        ("descoteaux07", "fodf"), ("tournier07_legacy", "fodf"), ("descoteaux07_legacy", "signal"),
        ("descoteaux07", "signal"), ("tournier07_legacy", "signal")])])
def test_basis_and_kind_are_found(field, dwi, basis, kind):
    sphere, name, fibres = get_sphere(name="repulsion100"), basis.partition("_")[0], field.any(axis=(-1, -2))
    along = (field[fibres][:, 0] @ sphere.vertices.T) ** 2
    values = np.exp(12 * (along - 1)) if kind == "fodf" else np.exp(-2.5 * along)
    noise = np.random.default_rng(0).normal(size=values.shape)
    full, data = basis == "tournier07", np.zeros((*fibres.shape, 81 if basis == "tournier07" else 45), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data[fibres] = sf_to_sh(values + 0.05 * noise, sphere, sh_order_max=8, basis_type=name,
                                legacy="legacy" in basis, full_basis=full)
    data += np.float32(1e-3)  # outside of white matter nothing but a little of everything
    even = even_part(data)
    assert even is not None and even.shape[-1] == 45
    found = choose_basis(even, dwi.volume.voxel_sizes, "descoteaux07")
    possible = {b for b, row in zip(found.bases, found.possible, strict=True) if row.any()}
    assert found.kind == kind and basis in possible
    assert possible == {basis} or (kind == "signal" and possible == {"tournier07", "tournier07_legacy"})


def test_streamlines_in_place_are_in_place(field, lines, dwi):
    found = choose_placement(field, lines, dwi.volume.affine, SAME)
    assert found.best == (0, 0) and found.possible.sum() == 1 and found.inside == 1.0
    assert found.shift is not None and np.abs(found.shift).max() < 0.2


def test_each_misplacement_is_repaired(field, lines, dwi):
    every = placements(dwi.volume.affine, field.shape[:3])
    for mistake in every[1::19]:
        moved = lines.transform(np.linalg.inv(mistake.matrix))
        found = choose_placement(field, moved, dwi.volume.affine, SAME)
        assert found.possible.sum() == 1
        back = moved.transform(found.tried[found.best[1]].matrix)
        assert np.abs(back.points - lines.points).max() < 0.6


@pytest.mark.parametrize("by", [-0.5, 0.5])
def test_half_a_voxel_is_seen(field, lines, dwi, by):
    moved = np.eye(4)
    moved[:3, 3] = by
    found = choose_placement(field, lines.transform(moved), dwi.volume.affine, SAME)
    assert found.best == (0, 0) and found.shift is not None
    assert np.abs(found.shift + by).max() < 0.2


def test_nothing_but_a_map_of_white_matter_leaves_mirrors_open(field, lines, dwi):
    white = field.any(axis=(-1, -2)).astype(np.float32)
    found = choose_placement(white, lines, dwi.volume.affine, SAME)
    assert found.best == (0, 0) and found.possible.sum() > 1
