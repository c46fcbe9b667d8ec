"""Trilinear sampling on the CPU, 28 features of 96 x 96 x 60 voxels in memory, beside torch's grid_sample in both of
its
layouts and SciPy's map_coordinates; points along streamlines, half a voxel apart, and at random places.

Equal threads on both sides; each writes a new output. SciPy has no threads, so it gets a pool, one feature a task. A
neighbourhood of seven points is timed beside as many points without one: the ratio is that of the samples."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy import ndimage

from benchmarks.pairs import Ratio, compare
from tractkit.core.rng import fold, normal, uniform
from tractkit.spatial.volume import Volume, neighborhood_vectors

SHAPE, FEATURES, POINTS = (96, 96, 60), 28, 210_000


def walking_points(n: int, length: int = 50) -> np.ndarray:
    """(n, 3) float32: straight lines of `length` points with a little noise, in order."""
    lines = -(-n // length)
    start = 5 + uniform(fold("start"), np.arange(lines * 3)).reshape(lines, 1, 3) * (np.array(SHAPE) - 11)
    way = normal(fold("way"), np.arange(lines * 3)).reshape(lines, 1, 3)
    way /= np.linalg.norm(way, axis=-1, keepdims=True)
    noise = 0.05 * normal(fold("noise"), np.arange(lines * length * 3)).reshape(lines, length, 3)
    points = start + 0.5 * np.arange(length)[None, :, None] * way + noise
    return np.clip(points, 0, np.array(SHAPE) - 1).reshape(-1, 3)[:n].astype(np.float32)


def random_points(n: int) -> np.ndarray:
    return (uniform(fold("random"), np.arange(3 * n)).reshape(-1, 3) * (np.array(SHAPE) - 1)).astype(np.float32)


def make_volume(features: int = FEATURES) -> Volume:
    return Volume(uniform(fold("data"), np.arange(int(np.prod(SHAPE)) * features)).reshape(*SHAPE, features), np.eye(4))


def torch_sampler(volume: Volume, points: np.ndarray, layout: torch.memory_format, device: str = "cpu"):
    """grid_sample on a volume already in its layout and a grid already normalised: only the sampling is timed."""
    data = torch.from_numpy(volume.data).to(device).permute(3, 2, 1, 0)[None].contiguous(memory_format=layout)
    grid = torch.from_numpy(2 * points / (np.array(SHAPE, np.float32) - 1) - 1).to(device)[None, None, None]
    return lambda: torch.nn.functional.grid_sample(
        data, grid, mode="bilinear", padding_mode="border", align_corners=True
    )


def scipy_sampler(volume: Volume, points: np.ndarray, threads: int):
    """map_coordinates(order=1) of each feature, contiguous beforehand."""
    features, where = np.ascontiguousarray(np.moveaxis(volume.data, 3, 0)), np.ascontiguousarray(points.T)

    def run():
        out = np.empty((len(features), len(points)), np.float32)
        with ThreadPoolExecutor(threads) as pool:
            list(
                pool.map(
                    lambda c: ndimage.map_coordinates(features[c], where, output=out[c], order=1, mode="nearest"),
                    range(len(features)),
                )
            )
        return out
    return run


def rows() -> Iterator[Ratio]:
    before, volume = torch.get_num_threads(), make_volume()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            yield from _rows(volume, threads)
    finally:
        torch.set_num_threads(before)


def _rows(volume: Volume, threads: int) -> Iterator[Ratio]:
    note, axes = f"{threads} thread{'s' * (threads > 1)}", neighborhood_vectors("axes", 1, 1.0)
    for name, points in (("along streamlines", walking_points(POINTS)), ("at random", random_points(POINTS))):
        def ours(points=points):
            return volume.sample(points, threads=threads)

        rivals = {"grid_sample, channels last": torch_sampler(volume, points, torch.channels_last_3d),
                  "grid_sample, contiguous": torch_sampler(volume, points, torch.contiguous_format),
                  "map_coordinates(order=1)": scipy_sampler(volume, points, threads)}
        for rival, run in rivals.items():
            np.testing.assert_allclose(ours(), np.asarray(run()).reshape(FEATURES, -1).T, atol=1e-3)
            yield compare(f"{POINTS:,} points {name}", ours, rival, run, note=note)
        few = points[:POINTS // 7]
        yield compare(
            f"{len(few):,} points {name}, axes: 7 samples each",
            lambda few=few: volume.sample(few, neighborhood=axes, threads=threads),
            f"{7 * len(few):,} points without",
            lambda points=points, few=few: volume.sample(points[: 7 * len(few)], threads=threads),
            note=note,
        )
