"""Subjects of realistic size for the benchmarks: 96 x 96 x 60 voxels of 2 mm with 28 features, 20,000 streamlines each.

The environment variable TRACTKIT_BENCH may name a folder of such subjects (`sub-01/sh.nii.gz`, `wm_mask.nii.gz`,
`wm.trk`, ...); without it they are made once and kept in the cache folder."""

import os
import secrets
import shutil
from pathlib import Path

import numpy as np

from tractkit.core.files import cache_folder
from tractkit.hdf5.create import create_hdf5
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume

VERSION = 1  # of what is made; raise it when that changes
SHAPE, NB_FEATURES = (96, 96, 60), 28
CONFIG = {
    "input": {"type": "volume", "files": ["sh.nii.gz"], "standardization": "all", "std_mask": "wm_mask.nii.gz"},
    "wm_mask": {"type": "volume", "files": ["wm_mask.nii.gz"], "standardization": "none"},
    "streamlines": {"type": "streamlines", "files": ["wm.trk"]},
}


def bench_subjects(n_subjects: int = 4, n_streamlines: int = 20_000) -> Path:
    """A folder with a folder per subject: `TRACTKIT_BENCH`, or a generated one in the cache."""
    named = os.environ.get("TRACTKIT_BENCH")
    if named:
        found = [p.name for p in sorted(Path(named).iterdir()) if (p / "sh.nii.gz").is_file()]
        if len(found) < n_subjects:
            raise ValueError(f"TRACTKIT_BENCH={named} holds {len(found)} subjects, {n_subjects} are needed")
        return Path(named)
    root = cache_folder() / "benchmarks" / f"subjects-{VERSION}-{n_subjects}-{n_streamlines}"
    if not root.is_dir():
        unfinished = root.with_name(f".{root.name}.{secrets.token_hex(4)}")
        try:
            for k in range(n_subjects):
                make_subject(unfinished / f"sub-{k + 1:02d}", n_streamlines, seed=2026 + k)
            if not root.is_dir():
                unfinished.rename(root)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return root


def splits_of(root: Path, n_subjects: int = 4) -> dict[str, list[str]]:
    """The first subjects train, the last two validate and test (all three the same if there is but one)."""
    names = [p.name for p in sorted(root.iterdir()) if (p / "sh.nii.gz").is_file()][:n_subjects]
    cut = max(1, len(names) - 2)
    return {"training": names[:cut], "validation": names[cut:cut + 1], "testing": names[cut + 1:]}


def bench_hdf5(n_subjects: int = 4, n_streamlines: int = 20_000) -> Path:
    """One HDF5 file of those subjects, made once and kept in the cache folder (anew for each TRACTKIT_BENCH)."""
    root = bench_subjects(n_subjects, n_streamlines)
    where = cache_folder() / "benchmarks" / f"data-{VERSION}-{n_subjects}-{n_streamlines}.hdf5"
    if os.environ.get("TRACTKIT_BENCH"):
        where = root.parent / f"tractkit-{VERSION}-{n_subjects}.hdf5"
    if not where.is_file():
        create_hdf5(root, where, CONFIG, splits_of(root, n_subjects), progress=False, overwrite=True)
    return where


def make_subject(folder: Path, n_streamlines: int, seed: int) -> None:
    """Write one subject: a signal with noise inside an ellipsoid, and arcs of constant step through the box."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    affine = _oblique(rng)
    grid = np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij")
    radius = sum(g**2 for g in grid) ** 0.5
    waves = rng.uniform(1, 4, (NB_FEATURES, 3)), rng.uniform(0, 2 * np.pi, NB_FEATURES)
    data = np.empty((*SHAPE, NB_FEATURES), np.float32)
    for k, (wave, phase) in enumerate(zip(*waves, strict=True)):
        data[..., k] = np.sin(sum(w * g for w, g in zip(wave, grid, strict=True)) + phase) / (1 + k // 6)
    data += rng.normal(0, 0.02, data.shape).astype(np.float32)
    data *= (radius < 1.05)[..., None]
    Volume(data, affine).save(folder / "sh.nii.gz")
    Volume((radius < 1).astype(np.uint8), affine).save(folder / "wm_mask.nii.gz")
    Tractogram(_arcs(rng, n_streamlines), affine, SHAPE).save(folder / "wm.trk")


def _oblique(rng) -> np.ndarray:
    """2 mm voxels, axes a little turned."""
    turn, _ = np.linalg.qr(np.eye(3) + 0.15 * rng.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = 2 * turn * np.sign(np.diag(turn))
    affine[:3, 3] = rng.uniform(-90, -40, 3)
    return affine


def _arcs(rng, n: int) -> Streamlines:
    """Circular arcs of 20 to 120 mm (median about 50), steps of 0.5 to 1 mm, one for each, all inside the box."""
    kept: list[Streamlines] = []
    box = np.array(SHAPE) - 1
    while sum(map(len, kept)) < n:
        step, length = rng.uniform(0.5, 1, n), np.clip(rng.gamma(4, 13, n), 20, 120)
        counts = np.ceil(length / step).astype(np.int64) + 1
        offsets = np.r_[0, np.cumsum(counts)]
        ids = np.repeat(np.arange(n), counts)
        ahead, side = rng.normal(size=(2, n, 3))
        ahead /= np.linalg.norm(ahead, axis=1, keepdims=True)
        side -= (side * ahead).sum(1, keepdims=True) * ahead
        side /= np.linalg.norm(side, axis=1, keepdims=True)
        bend = rng.uniform(25, 200, n) / 2  # voxels
        angle = ((np.arange(len(ids)) - offsets[ids] - counts[ids] / 2) * (step[ids] / 2) / bend[ids])[:, None]
        points = rng.uniform(0, 1, (n, 3))[ids] * box + bend[ids, None] * (
            np.sin(angle) * ahead[ids] + (1 - np.cos(angle)) * side[ids]
        )
        inside = np.logical_and.reduceat(((points >= 0) & (points <= box)).all(1), offsets[:-1])
        kept.append(Streamlines(points, offsets)[inside])
    offsets = np.concatenate([s.nb_points for s in kept])[:n]
    points = np.concatenate([s.points for s in kept])[:offsets.sum()]
    return Streamlines(points, np.r_[0, np.cumsum(offsets)])
