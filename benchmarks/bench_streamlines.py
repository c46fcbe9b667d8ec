"""Packed operations and tractogram files beside what they replace: 20,000 curves of 60 to 240 points, or 1,024 of them.

One thread on both sides, data in memory, files in the page cache. trx-python maps the positions and leaves them in
scanner space; ours also checks them and brings them to voxel space."""

import tempfile
from collections.abc import Iterator

import nibabel as nib
import numpy as np
import trx.trx_file_memmap as tmm
from dipy.tracking.streamlinespeed import compress_streamlines, length, set_number_of_points

from benchmarks.pairs import Ratio, compare
from tractkit.core.rng import fold, normal, uniform
from tractkit.spatial.rearrange import reverse, split
from tractkit.spatial.resample import compress, resample_step
from tractkit.spatial.streamlines import Streamlines, segment_directions
from tractkit.spatial.tractogram import Tractogram

NOTE = "1 thread"


def make(n: int = 20_000) -> Streamlines:
    """Curves of 60 to 240 points, about 0.5 mm apart."""
    counts = 60 + (180 * uniform(fold("counts"), np.arange(n), dtype=np.float64)).astype(int)
    offsets = np.r_[0, np.cumsum(counts)]
    steps = np.repeat(normal(fold("way"), np.arange(3 * n)).reshape(n, 3), counts, axis=0)
    steps = 0.5 * steps / np.linalg.norm(steps, axis=1, keepdims=True)
    steps += 0.1 * normal(fold("wiggle"), np.arange(steps.size)).reshape(steps.shape)
    walk = np.cumsum(steps, axis=0)
    return Streamlines(walk - np.repeat(walk[offsets[:-1]], counts, axis=0) + 40, offsets)


def augment_dipy(lines, turn: np.ndarray, cut: np.ndarray, where: np.ndarray) -> list[np.ndarray]:
    """Resample to 1 mm, reverse some and split some, one after the other."""
    out = []
    for line, total, r, c, u in zip(lines, length(lines), turn, cut, where, strict=True):
        p = set_number_of_points(line, nb_points=max(2, int(round(total)) + 1))
        p = p[::-1] if r else p
        at = 1 + int(u * (len(p) - 2))
        out.extend([p[:at + 1], p[at:]] if c and len(p) > 2 else [p])
    return out


def rows() -> Iterator[Ratio]:
    s, affine = make(), np.eye(4)
    u = uniform(fold("choices"), np.arange(4 * 1024), dtype=np.float64).reshape(4, 1024)
    ids = np.unique((u[0] * len(s)).astype(int))
    batch = s[ids]
    lines = nib.streamlines.ArraySequence(batch.to_list())
    turn, cut, where = u[1][:len(ids)] < 0.5, u[2][:len(ids)] < 0.5, u[3][:len(ids)]
    picked = np.concatenate([np.arange(s.offsets[i], s.offsets[i + 1]) for i in ids])

    def augment():
        new, _ = resample_step(batch, 1.0, affine)
        new, _ = reverse(new, turn)
        at = 1 + np.floor(where * (new.nb_points - 2)).astype(np.int64)
        return split(new, at, cut & (new.nb_points > 2))[0]

    yield compare("take 1,024", lambda: s[ids], "fancy indexing of their points", lambda: s.points[picked], note=NOTE)
    yield compare(
        "resample 1 mm, reverse .5, split .5",
        augment,
        "DIPY and a loop",
        lambda: augment_dipy(lines, turn, cut, where),
        note=NOTE,
    )
    yield compare("lengths", lambda: batch.lengths(affine), "DIPY", lambda: length(lines), note=NOTE)
    yield compare(
        "compress 0.1 mm",
        lambda: compress(batch, 0.1, affine),
        "DIPY",
        lambda: compress_streamlines(lines, tol_error=0.1),
        note=NOTE,
    )
    yield compare(
        "directions",
        lambda: segment_directions(batch),
        "a loop of np.diff",
        lambda: [np.diff(p, axis=0) for p in lines],
        note=NOTE,
    )
    with tempfile.TemporaryDirectory() as folder:
        t = Tractogram(s, np.diag([2.0, 2, 2, 1]), (100, 100, 100))
        for kind in ("trk", "tck", "trx"):
            path = f"{folder}/a.{kind}"
            t.save(path)
            name, read = {
                "trx": ("trx-python, positions only", lambda path=path: np.array(tmm.load(path).streamlines._data))
            }.get(kind, ("nibabel", lambda path=path: nib.streamlines.load(path)))
            yield compare(
                f"read .{kind}",
                lambda path=path: Tractogram.load(path, reference=t),
                name,
                read,
                note=f"{NOTE}, page cache warm",
            )
