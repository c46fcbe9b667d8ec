"""Reading streamlines of a subject of 20,000, from the file and from memory, beside what NumPy and h5py make of the
same data.

A batch is 1,024 streamlines at random, other ones in each pair. *Fancy-indexing* is `points[rows]` on the points in
memory, with the rows worked out beforehand. *h5py* opens the file once and reads offset, length and points of each
streamline. *An epoch* is all streamlines of the subject in such batches; *mapped* is the same through a memory map,
warm, and *cold* after the system was told to drop the pages of the file. One thread.

Last, the peak of anonymous memory (RssAnon, the interpreter included, read in a child) of a lazy pass over all
streamlines and volumes of a file of several GB, beside that of a file of half the size; ms stands for MB there."""

import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from benchmarks.pairs import Ratio, compare
from benchmarks.subjects import bench_hdf5
from tractkit.data.dataset import MultiSubjectDataset
from tractkit.spatial.streamlines import _take

GROUP, BATCH = "streamlines", 1024

PASS = """
import sys
import numpy as np
from tractkit.data.dataset import MultiSubjectDataset

def anonymous():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("RssAnon")) / 1024

dataset = MultiSubjectDataset(sys.argv[1], lazy=True, cache_size=2).load_data()
peak, points = 0., 0
for s in dataset.training_set:
    data = s.streamlines["streamlines"]
    order = np.random.default_rng(0).permutation(len(data))
    for i in range(0, len(data), 1024):
        got = data.get(order[i:i + 1024])
        s.volumes["input"].volume.sample(got.points[:100])
        points += len(got.points)
        peak = max(peak, anonymous())
print(peak, points)
"""


def drop_pages(path: Path) -> None:
    """Ask the system to forget what it holds of a file."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def rows() -> Iterator[Ratio]:
    path = bench_hdf5()
    lazy, memory = (
        MultiSubjectDataset(path, lazy=b).load_data(volume_groups=[]).training_set[0].streamlines[GROUP]
        for b in (True, False)
    )
    points, offsets = memory.get().points, memory.get().offsets
    yield from batches(path, lazy, memory, points, offsets)
    yield from epochs(path, lazy)
    yield memory_of_a_pass(path)


def batches(path: Path, lazy, memory, points: np.ndarray, offsets: np.ndarray) -> Iterator[Ratio]:
    rng, every = np.random.default_rng(0), np.split(np.arange(len(points)), offsets[1:-1])
    ids = [np.sort(rng.choice(len(lazy), BATCH, replace=False)) for _ in range(102)]
    wanted = [np.concatenate([every[i] for i in one]) for one in ids]

    def each(read, batches):
        """Calls of what this gives read one batch after the other."""
        remaining = iter(batches)
        return lambda: read(next(remaining))

    with h5py.File(path, "r", locking=False) as h5:
        group = h5[f"{lazy.subject}/{GROUP}"]

        def three_reads(one):
            for i in one:
                start = int(group["offsets"][i])
                group["data"][start:start + int(group["lengths"][i])]

        yield compare(
            "lazy, 1,024 random streamlines",
            each(lazy.get, ids),
            "three h5py reads each",
            each(three_reads, ids),
            note="warm page cache",
        )
    with tempfile.TemporaryDirectory() as folder:
        doubled = in_float64(path, Path(folder), lazy.subject)
        yield compare(
            "lazy, 1,024 random streamlines, float64 in the file",
            each(doubled.get, ids),
            "fancy-indexing an array in memory",
            each(points.__getitem__, wanted),
            pairs=100,
            note="warm page cache",
        )
    for name, sft in (("lazy", lazy), ("in memory", memory)):
        yield compare(f"{name}, 1,024 random streamlines", each(sft.get, ids), "fancy-indexing an array in memory",
                      each(points.__getitem__, wanted), pairs=100, note="warm page cache")


def in_float64(path: Path, folder: Path, subject: str):
    """The streamlines of one subject, lazy, from a file that keeps points as dwi_ml does."""
    with h5py.File(path, "r", locking=False) as h5, h5py.File(folder / "float64.hdf5", "w") as out:
        out.attrs.update(
            {
                f"{split}_subjs": np.array([subject] if split == "training" else [], dtype=h5py.string_dtype())
                for split in ("training", "validation", "testing")
            }
        )
        h5.copy(f"{subject}/{GROUP}", out.create_group(subject), GROUP)
        group = out[subject][GROUP]
        data = group["data"][()].astype(np.float64)
        del group["data"]
        group["data"] = data
    return MultiSubjectDataset(folder / "float64.hdf5", lazy=True).load_data().training_set[0].streamlines[GROUP]


def epochs(path: Path, lazy) -> Iterator[Ratio]:
    place, offsets = lazy._points.rows.place, lazy._offsets
    order = np.random.default_rng(2).permutation(len(lazy))
    cut = [np.sort(order[i:i + BATCH]) for i in range(0, len(order), BATCH)]
    def read(cold):
        def run():
            if cold:
                drop_pages(path)
            for ids in cut:
                lazy.get(ids)
        return run

    def mapped(cold):
        def run():
            if cold:
                drop_pages(path)
            with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as m:
                points = np.frombuffer(m, np.float32, 3 * place.shape[0], place.start).reshape(-1, 3)
                for ids in cut:
                    _take(points, offsets, ids)
                del points
        return run

    for cold in (False, True):
        yield compare(
            "lazy, an epoch of 20,000 streamlines",
            read(cold),
            "the same, mapped",
            mapped(cold),
            note=f"{'cold' if cold else 'warm'} page cache",
        )


def memory_of_a_pass(path: Path, subjects: int = 32) -> Ratio:
    """Peak RssAnon of a lazy pass over a file of `subjects`, and over one of half as many."""
    peaks = []
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        for n in (subjects // 2, subjects):
            file = Path(folder) / f"{n}.hdf5"
            with (
                h5py.File(path, "r", locking=False) as h5,
                h5py.File(file, "w", alignment_threshold=1, alignment_interval=64) as out,
            ):
                out.attrs.update(h5.attrs)
                names = [f"many-{i:03d}" for i in range(n)]
                source = sorted(h5)
                for i, name in enumerate(names):
                    h5.copy(source[i % len(source)], out, name)
                out.attrs["training_subjs"] = np.array(names, dtype=h5py.string_dtype())
                out.attrs["validation_subjs"] = out.attrs["testing_subjs"] = np.array([], dtype=h5py.string_dtype())
            size = file.stat().st_size / 1e9
            said = subprocess.run(
                [sys.executable, "-c", PASS, str(file)], check=True, capture_output=True, text=True
            ).stdout
            peaks.append((float(said.split()[0]), size))
            file.unlink()
    (half, half_size), (whole, size) = peaks
    ratio = whole / half
    return Ratio(
        f"peak memory of a lazy pass over {size:.1f} GB, MB",
        f"over {half_size:.1f} GB, MB",
        whole,
        half,
        ratio,
        ratio,
        ratio,
        "two volumes kept; one run each",
    )
