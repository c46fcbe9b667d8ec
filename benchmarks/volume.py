"""Trilinear sampling against torch's grid_sample and SciPy's map_coordinates, as ratios.

    python benchmarks/volume.py [--features 28] [--points 200000] [--threads 2] [--pairs 20]

Data in memory, a volume of 96 x 96 x 60 voxels; points walk along streamlines in steps of half a voxel, then at
random places. Each pair runs ours and the other one after the other, ours first in every second pair; both with
the same number of threads and their own output each time. SciPy has no threads, so it gets a pool, one feature a
task. Printed: median of the ratios of times, and the interval of the middle half. A ratio is how many times faster
ours is.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy import ndimage

from tractkit.keyed import fold, normal, uniform
from tractkit.volume import Volume

SHAPE = (96, 96, 60)


def walking_points(n: int, length: int = 50) -> np.ndarray:
    """(n, 3) float32: straight lines of `length` points with a little noise, in order."""
    lines = -(-n // length)
    start = 5 + uniform(fold("start"), np.arange(lines * 3)).reshape(lines, 1, 3) * (np.array(SHAPE) - 11)
    way = normal(fold("way"), np.arange(lines * 3)).reshape(lines, 1, 3)
    way /= np.linalg.norm(way, axis=-1, keepdims=True)
    noise = 0.05 * normal(fold("noise"), np.arange(lines * length * 3)).reshape(lines, length, 3)
    points = start + 0.5 * np.arange(length)[None, :, None] * way + noise
    return np.clip(points, 0, np.array(SHAPE) - 1).reshape(-1, 3)[:n].astype(np.float32)


def torch_sampler(volume: Volume, points: np.ndarray, layout: torch.memory_format):
    """grid_sample on a volume already in its layout and a grid already normalised: only the sampling is timed."""
    data = torch.from_numpy(volume.data).permute(3, 2, 1, 0)[None].contiguous(memory_format=layout)
    grid = torch.from_numpy(2 * points / (np.array(SHAPE, np.float32) - 1) - 1)[None, None, None]
    return lambda: torch.nn.functional.grid_sample(data, grid, mode="bilinear", padding_mode="border", align_corners=True)


def scipy_sampler(volume: Volume, points: np.ndarray, threads: int):
    """map_coordinates(order=1) of each feature, contiguous beforehand."""
    features, where = np.ascontiguousarray(np.moveaxis(volume.data, 3, 0)), np.ascontiguousarray(points.T)
    out = np.empty((len(features), len(points)), np.float32)

    def one(c):
        ndimage.map_coordinates(features[c], where, output=out[c], order=1, mode="nearest")

    def run():
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, range(len(features))))
        return out
    return run


def seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(ours, other, pairs: int) -> np.ndarray:
    """(3,) quartiles of time(other) / time(ours) over interleaved pairs."""
    ratios = []
    for i in range(pairs):
        a, b = (seconds(f) for f in ((ours, other) if i % 2 else (other, ours)))
        ratios.append(b / a if i % 2 else a / b)
    return np.percentile(ratios, [25, 50, 75])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--features", type=int, default=28)
    parser.add_argument("--points", type=int, default=200_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    n = int(np.prod(SHAPE)) * args.features
    volume = Volume(uniform(fold("data"), np.arange(n)).reshape(*SHAPE, args.features), np.eye(4))
    random = (uniform(fold("random"), np.arange(3 * args.points)).reshape(-1, 3) * (np.array(SHAPE) - 1)).astype(np.float32)
    print(f"{args.features} features, {args.points} points, {args.threads} threads each, {args.pairs} pairs, data in memory")
    for name, points in (("along streamlines", walking_points(args.points)), ("at random", random)):
        def ours(points=points):
            return volume.sample(points, threads=args.threads)

        ours()
        rate = [args.points / seconds(ours) / 1e6 for _ in range(args.pairs)]
        print(f"{name}: ours {np.median(rate):.1f} M points/s")
        rivals = {
            "torch grid_sample, channels last": torch_sampler(volume, points, torch.channels_last_3d),
            "torch grid_sample, contiguous": torch_sampler(volume, points, torch.contiguous_format),
            "scipy map_coordinates": scipy_sampler(volume, points, args.threads),
        }
        for rival, run in rivals.items():
            theirs = np.asarray(run()).reshape(args.features, -1).T
            error = float(np.abs(theirs - ours()).max())
            low, middle, high = compare(ours, run, args.pairs)
            print(f"  {rival:34} {middle:6.1f} x slower than ours ({low:.1f} to {high:.1f}); largest difference {error:.1e}")


if __name__ == "__main__":
    main()
