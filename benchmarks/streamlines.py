"""Packed operations and tractogram files against what they replace. Run: python benchmarks/streamlines.py

Every line is a ratio of CPU times, reference / ours, from interleaved pairs in this process, one thread each,
files in the page cache: the median and the middle 80 %. Above 1, ours is faster. trx-python maps the positions
and leaves them in scanner space; ours also checks them and brings them to voxel space.
"""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"

import argparse
import json
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import trx.trx_file_memmap as tmm
from dipy.tracking.streamlinespeed import compress_streamlines, length, set_number_of_points

from tractkit.streamlines import (
    Streamlines,
    compress,
    resample_step,
    reverse,
    segment_directions,
    split,
)
from tractkit.tractogram import Tractogram


def make(n: int, seed: int = 0) -> Streamlines:
    """Curves of 60 to 240 points, about 0.5 mm apart."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(60, 240, n)
    offsets = np.r_[0, np.cumsum(counts)]
    steps = np.repeat(rng.normal(size=(n, 3)), counts, axis=0)
    steps = 0.5 * steps / np.linalg.norm(steps, axis=1, keepdims=True) + 0.1 * rng.normal(size=steps.shape)
    walk = np.cumsum(steps, axis=0)
    return Streamlines(walk - np.repeat(walk[offsets[:-1]], counts, axis=0) + 40, offsets)


def pairs(ours, reference, repeats: int) -> dict:
    ours(), reference()
    times = np.empty((repeats, 2))
    for k in range(repeats):
        for j, f in ((0, ours), (1, reference)) if k % 2 else ((1, reference), (0, ours)):
            start = time.process_time()
            f()
            times[k, j] = time.process_time() - start
    low, middle, high = np.quantile(times[:, 1] / times[:, 0], [0.1, 0.5, 0.9])
    return {"ratio": middle, "low": low, "high": high, "ours_ms": 1e3 * np.median(times[:, 0]), "pairs": repeats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--streamlines", type=int, default=20_000)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()

    s = make(options.streamlines)
    rng = np.random.default_rng(1)
    ids = rng.choice(len(s), 1024, replace=False)
    batch, affine = s[ids], np.eye(4)
    lines = nib.streamlines.ArraySequence(batch.to_list())
    turn, cut, where = rng.random(1024) < 0.5, rng.random(1024) < 0.5, rng.random(1024)
    rows = np.concatenate([np.arange(s.offsets[i], s.offsets[i + 1]) for i in ids])

    def augment():
        new, _ = resample_step(batch, 1.0, affine)
        new, _ = reverse(new, turn)
        at = 1 + np.floor(where * (new.nb_points - 2)).astype(np.int64)
        return split(new, at, cut & (new.nb_points > 2))[0]

    def augment_dipy():
        out = []
        for line, total, r, c, u in zip(lines, length(lines), turn, cut, where, strict=True):
            p = set_number_of_points(line, nb_points=max(2, int(round(total)) + 1))
            p = p[::-1] if r else p
            at = 1 + int(u * (len(p) - 2))
            out.extend([p[:at + 1], p[at:]] if c and len(p) > 2 else [p])
        return out

    results = {
        "take 1,024 of them: NumPy fancy indexing of their points": pairs(
            lambda: s[ids], lambda: s.points[rows], options.pairs),
        "resample 1 mm, reverse .5, split .5: DIPY and a loop": pairs(augment, augment_dipy, options.pairs),
        "lengths: DIPY": pairs(lambda: batch.lengths(affine), lambda: length(lines), options.pairs),
        "compress 0.1 mm: DIPY": pairs(
            lambda: compress(batch, 0.1, affine), lambda: compress_streamlines(lines, tol_error=0.1), options.pairs),
        "directions: a loop of np.diff": pairs(
            lambda: segment_directions(batch), lambda: [np.diff(p, axis=0) for p in lines], options.pairs),
    }
    with tempfile.TemporaryDirectory() as folder:
        t = Tractogram(s, np.diag([2.0, 2, 2, 1]), (100, 100, 100))
        for kind in ("trk", "tck", "trx"):
            path = f"{folder}/a.{kind}"
            t.save(path)
            read = {"trx": lambda path=path: np.array(tmm.load(path).streamlines._data)}.get(
                kind, lambda path=path: nib.streamlines.load(path))
            results[f"read .{kind}: {'trx-python, positions only' if kind == 'trx' else 'nibabel'}"] = pairs(
                lambda path=path: Tractogram.load(path, reference=t), read, max(20, options.pairs // 2))
    for name, r in results.items():
        print(f"{r['ratio']:7.1f} × [{r['low']:.1f}, {r['high']:.1f}]  {r['ours_ms']:8.2f} ms  {name}")
    if options.json:
        options.json.write_text(json.dumps({"streamlines": len(s), "results": results}, indent=1))


if __name__ == "__main__":
    main()
