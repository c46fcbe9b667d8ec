"""What test_plots.py, test_scene.py, test_viewer.py and test_niivue.py draw: grids of any orientation, a voxel to find
again, lines."""

import numpy as np

from tractkit.spatial.space import apply_affine
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume

SHAPE = (30, 26, 20)
LIT = np.array([22, 6, 13])  # far from every middle, so that any flip moves it


def turned(angle: float, axis: int, sizes) -> np.ndarray:
    c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    i, j = [a for a in range(3) if a != axis]
    rotation = np.eye(3)
    rotation[i, i], rotation[i, j], rotation[j, i], rotation[j, j] = c, -s, s, c
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag(sizes)
    affine[:3, 3] = [7, -11, 5] - affine[:3, :3] @ ((np.array(SHAPE) - 1) / 2)
    return affine


AFFINES = {
    "RAS": turned(0, 2, (2, 2, 2)),
    "LAS anisotropic": turned(0, 2, (-1.5, 2, 3)),
    "rotated 25 about z, LPS": turned(25, 2, (-2, -2, 2.5)),
    "rotated 35 about x": turned(35, 0, (2, 1.5, 2.5)),
    "axes permuted": turned(0, 2, (2, 2, 2)) @ np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, -1, 0, 20], [0, 0, 0, 1.0]]),
}
PLANES = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (1, 2, 0)}


def voxel_and_line(affine: np.ndarray) -> tuple[Volume, Tractogram, np.ndarray, np.ndarray]:
    """A volume with one lit voxel, a streamline that begins in it, and where both its ends are in the world."""
    data = np.zeros(SHAPE, np.float32)
    data[tuple(LIT)] = 1
    ends = np.stack([LIT, LIT + [0, 9, -6]])
    return (
        Volume(data, affine),
        Tractogram(Streamlines.from_list([ends]), affine, SHAPE),
        *apply_affine(affine, ends.astype(float)),
    )


def wavy(n: int, shift: float = 0.0) -> Tractogram:
    x = np.linspace(4, 25, 30)
    lines = [np.stack([x, 8 + k % 9 + np.sin(x / 3), np.full_like(x, 8 + shift)], 1) for k in range(n)]
    return Tractogram(Streamlines.from_list(lines), AFFINES["LAS anisotropic"], SHAPE)


SIDE = 300


def in_world(mask: np.ndarray, box: np.ndarray, plane: str) -> np.ndarray:
    """World coordinates, along the plane's axes, of marked pixels of a square picture that a cubic box fills."""
    rows, columns = np.nonzero(mask)
    mm = np.ptp(box, axis=0).max() * 1.07 / SIDE
    return (np.column_stack([columns, SIDE - 1 - rows]) + 0.5 - SIDE / 2) * mm + box.mean(0)[list(PLANES[plane][:2])]


def cube_around(box: np.ndarray) -> np.ndarray:
    half = np.ptp(box, axis=0).max() / 2
    return np.stack([box.mean(0) - half, box.mean(0) + half])
