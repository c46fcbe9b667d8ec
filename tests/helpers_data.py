"""Tiny subjects for tests: rotated, flipped and anisotropic grids, random curves, volumes of world coordinates."""

from pathlib import Path

import numpy as np
from nibabel.orientations import io_orientation

from tractkit.hdf5.create import create_hdf5
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume

SHAPE = (14, 11, 9)
CONFIG = {
    "input": {"type": "volume", "files": ["xyz.nii.gz"], "standardization": "none"},
    "streamlines": {"type": "streamlines", "files": ["lines.trk"], "dps_keys": ["bundle"]},
}


def random_affine(rng) -> np.ndarray:
    """Any rotation, one axis flipped or not, voxels of 1 to 3 mm, unequal."""
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = q * rng.uniform(1, 3, 3)
    affine[:3, 3] = rng.uniform(-50, 50, 3)
    return affine


def las(affine):
    """The affine with its voxel axes in the order left, anterior, superior, as far as its rotation allows."""
    axes, signs = io_orientation(affine).astype(int).T
    order = np.argsort(axes)
    turned = affine.copy()
    turned[:3, :3] = affine[:3, :3][:, order] * signs[order] * [-1, 1, 1]
    return turned


def random_lines(rng, n, shape=SHAPE, points=(2, 40)) -> Streamlines:
    """Smooth random curves inside the box."""
    lines = []
    for _ in range(n):
        a, b, c = rng.uniform(0, np.array(shape) - 1, (3, 3))
        t = np.linspace(0, 1, rng.integers(*points))[:, None]
        lines.append(a * (1 - t) ** 2 + 2 * b * t * (1 - t) + c * t**2)
    return Streamlines.from_list(lines)


def world_volume(affine, shape=SHAPE) -> Volume:
    """Each voxel holds its own world coordinates."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return Volume((grid @ affine[:3, :3].T + affine[:3, 3]).astype(np.float32), affine)


def make_subject(folder: Path, rng, n=30, points=(2, 40), suffix=".trk") -> Tractogram:
    """Write a subject; the tractogram that was written."""
    folder.mkdir(parents=True)
    affine = las(random_affine(rng))
    world_volume(affine).save(folder / "xyz.nii.gz")
    t = Tractogram(random_lines(rng, n, points=points), affine, SHAPE, dps={"bundle": np.arange(n, dtype=np.float32)})
    t.save(folder / f"lines{suffix}")
    return t


def make_file(root: Path, n_subjects=3, n=30, seed=0, points=(2, 40), **options) -> tuple[Path, dict[str, Tractogram]]:
    """A file with sub-0, sub-1, ...: the last two in validation and testing if there are three."""
    rng = np.random.default_rng(seed)
    names = [f"sub-{i}" for i in range(n_subjects)]
    sources = {name: make_subject(root / name, rng, n + 5 * i, points) for i, name in enumerate(names)}
    cut = max(1, n_subjects - 2)
    splits = {"training": names[:cut], "validation": names[cut:cut + 1], "testing": names[cut + 1:]}
    options = {"config": CONFIG, "splits": splits, "progress": False, **options}
    return create_hdf5(root, root / "data.hdf5", **options), sources
