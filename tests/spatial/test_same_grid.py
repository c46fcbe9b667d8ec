"""spatial: one rule for "the same grid", wherever two grids meet: a hundredth of a voxel."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers_data import CONFIG, SHAPE, make_subject, random_affine, random_lines, world_volume

from tractkit.core.files import DataError
from tractkit.evaluation.scoring import GroundTruth, compare_tractograms, score_tractogram
from tractkit.hdf5.config import read_config
from tractkit.hdf5.create import create_hdf5
from tractkit.hdf5.load_groups import load_connectivity, load_streamlines_group
from tractkit.hdf5.sources import find_sources
from tractkit.spatial.space import grid_gap, same_grid
from tractkit.spatial.tractogram import Tractogram, concatenate_tractograms
from tractkit.spatial.volume import Volume

AFFINE = random_affine(np.random.default_rng(3))


def shifted(voxels: float) -> np.ndarray:
    """The affine, moved by so many of its smallest voxels."""
    affine = AFFINE.copy()
    affine[0, 3] += voxels * np.linalg.norm(AFFINE[:3, :3], axis=0).min()
    return affine


def lines(affine) -> Tractogram:
    return Tractogram(random_lines(np.random.default_rng(1), 8), affine, SHAPE)


def of_volumes(a, b, folder):
    world_volume(a).check_same_grid(world_volume(b))


def of_stacked_files(a, b, folder):
    for name, affine in (("a", a), ("b", b)):
        Volume(np.ones(SHAPE, np.float32), affine).save(folder / f"x/{name}.nii.gz")
    group = {"type": "volume", "files": ["a.nii.gz", "b.nii.gz"], "standardization": "none"}
    find_sources(folder, "x", read_config({"v": group}))


def of_joined_files(a, b, folder):
    lines(a).save(folder / "x/a.trk"), lines(b).save(folder / "x/b.trx")
    group = {"type": "streamlines", "files": ["a.trk", "b.trx"]}
    load_streamlines_group(find_sources(folder, "x", read_config({"s": group}))["s"])


def of_labels(a, b, folder):
    np.save(folder / "x/m.npy", np.eye(1))
    lines(a).save(folder / "x/a.trk"), Volume(np.ones(SHAPE, np.int16), b).save(folder / "x/l.nii.gz")
    group = {"type": "streamlines", "files": "a.trk", "connectivity_matrix": "m.npy", "connectivity_labels": "l.nii.gz"}
    load_connectivity(find_sources(folder, "x", read_config({"s": group}))["s"], (a, SHAPE))


def of_a_reference(a, b, folder):
    lines(a).save(folder / "x/a.trk")
    Tractogram.load(folder / "x/a.trk", reference=world_volume(b))


def of_parts(a, b, folder):
    concatenate_tractograms([lines(a), lines(b)])


def of_a_comparison(a, b, folder):
    compare_tractograms(lines(a), lines(b))


def of_a_truth(a, b, folder):
    masks = np.ones((1, *SHAPE), bool)
    score_tractogram(lines(a), GroundTruth(b, ["one"], masks, masks[:, None].repeat(2, 1), masks[0]))


@pytest.mark.parametrize("meet", [of_volumes, of_stacked_files, of_joined_files, of_labels, of_a_reference, of_parts,
                                  of_a_comparison, of_a_truth])
def test_a_hundredth_of_a_voxel(tmp_path, meet):
    (tmp_path / "x").mkdir()
    meet(AFFINE, shifted(0.009), tmp_path)
    with pytest.raises(DataError, match="grid|affine"):
        meet(AFFINE, shifted(0.011), tmp_path)


def test_the_rule():
    assert same_grid((AFFINE, SHAPE), (AFFINE, SHAPE)) and grid_gap((AFFINE, SHAPE), (AFFINE, SHAPE)) == 0
    assert not same_grid((AFFINE, SHAPE), (AFFINE, (14, 11, 10)))
    turned = AFFINE.copy()
    turned[:3, 0] *= 1 + 0.02 / SHAPE[0]  # voxels a little longer: the far corner is 0.02 of one away
    assert not same_grid((AFFINE, SHAPE), (turned, SHAPE)) and same_grid((AFFINE, (5, 5, 5)), (turned, (5, 5, 5)))


def test_a_header_in_float32_is_the_same_grid(tmp_path):
    """What a .trk and a NIfTI keep of one affine differs by 2e-5 mm: nothing is refused or left out."""
    rng = np.random.default_rng(0)
    t = make_subject(tmp_path / "a", rng)
    far = AFFINE + np.array([[0, 0, 0, 2e-5]] * 3 + [[0] * 4])
    box = np.array(SHAPE, np.float32) - 0.5
    ends = t.streamlines.points.copy()
    ends[t.streamlines.offsets[:-1]] = box  # each begins in the corner of the box
    Tractogram(type(t.streamlines)(ends, t.streamlines.offsets), far, SHAPE, t.dps).save(tmp_path / "a/lines.trk")
    world_volume(AFFINE).save(tmp_path / "a/xyz.nii.gz")
    path = create_hdf5(tmp_path, tmp_path / "x.hdf5", CONFIG, {"training": ["a"]}, progress=False)
    with h5py.File(path) as h5:
        assert len(h5["a/streamlines/lengths"]) == len(t)


def test_no_other_comparison_of_affines():
    """Whoever compares two affines asks `same_grid`; exceptions are named here, with the reason."""
    allowed = {
        "spatial/nifti.py": 2,  # is the header that is kept that of this affine, bit for bit; does a qform hold it
        "data/interpolation.py": 1,  # points are moved wherever affines differ at all: the bits of a run depend on it
    }
    package = Path(__file__).parents[2] / "tractkit"
    found = {}
    for file in package.rglob("*.py"):
        text = file.read_text(encoding="utf-8").splitlines()
        n = sum("affine" in line and ("allclose" in line or "array_equal" in line) for line in text)
        n += sum(line.rstrip().endswith("np.allclose(") for line in text)
        if n:
            found[file.relative_to(package).as_posix()] = n
    assert found == allowed
