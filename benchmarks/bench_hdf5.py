"""Making one HDF5 file of 4 subjects of 20,000 streamlines: against merely reading the same files with nibabel
(`np.asarray(image.dataobj)`, `nib.streamlines.load`), warm page cache, ours with all that it adds: checks,
standardizing, lengths,
checksums, writing, flushing to disk. Must be within 1.5. Then, from a process of its own: the peak memory that making
the file
takes beyond importing (must be under one subject's data and 200 MB); and the size of a streamlines group against that
of
dwi_ml, whose points are float64 (must be at most 0.55)."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np

from benchmarks.pairs import Ratio, compare
from benchmarks.subjects import CONFIG, bench_hdf5, bench_subjects, splits_of
from tractkit.hdf5.create import create_hdf5

N_SUBJECTS = 4


def read_all(root: Path) -> None:
    """What any program that uses these subjects must do."""
    for names in splits_of(root, N_SUBJECTS).values():
        for name in names:
            for image in ("sh.nii.gz", "wm_mask.nii.gz"):
                np.asarray(nib.load(root / name / image).dataobj)
            nib.streamlines.load(root / name / "wm.trk")


def make(root: Path, folder: str, **options) -> Path:
    return create_hdf5(
        root, Path(folder) / "made.hdf5", CONFIG, splits_of(root, N_SUBJECTS), overwrite=True, progress=False, **options
    )


def sizes(path: Path) -> dict[str, int]:
    """Bytes of the first subject's data, of its streamlines, and of those with float64 points."""
    with h5py.File(path) as h5:
        subject = h5[str(h5.attrs["training_subjs"][0])]
        bytes_of = {name: item.nbytes for group in subject for name, item in _datasets(subject[group])}
        lines = sum(n for name, n in bytes_of.items() if "/streamlines/" in name)
        points = subject["streamlines/data"].nbytes
        return {"subject": sum(bytes_of.values()), "streamlines": lines, "float64": lines + points}


def _datasets(group: h5py.Group) -> list[tuple[str, h5py.Dataset]]:
    found: list[tuple[str, h5py.Dataset]] = []
    group.visititems(lambda _, item: found.append((item.name, item)) if isinstance(item, h5py.Dataset) else None)
    return found


def peak_memory(root: Path, folder: str) -> tuple[float, float]:
    """MB of resident memory after importing, and at most while the file is made, of a new process."""
    code = f"""
from benchmarks.bench_hdf5 import make, Path
def resident(key):
    return next(int(line.split()[1]) / 1e3 for line in open("/proc/self/status") if line.startswith(key))
before = resident("VmRSS")
make(Path({str(root)!r}), {folder!r})
print(before, resident("VmHWM"))
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    return float(said[0]), float(said[1])


def rows() -> Iterator[Ratio]:
    root = bench_subjects(N_SUBJECTS)
    with tempfile.TemporaryDirectory(dir=root.parent) as folder:
        yield compare(
            "create_hdf5, 4 subjects of 20,000 streamlines",
            lambda: make(root, folder),
            "reading the files with nibabel",
            lambda: read_all(root),
            warm_up=1,
            note="warm; one process",
        )
        yield compare(
            "the same, processes=2",
            lambda: make(root, folder, processes=2),
            "reading the files with nibabel",
            lambda: read_all(root),
            warm_up=1,
            note="warm; children import and their files are copied",
        )
        size = sizes(bench_hdf5(N_SUBJECTS))
        if Path("/proc/self/status").is_file():
            before, peak = peak_memory(root, folder)
            limit = size["subject"] / 1e6 + 200
            yield _plain(
                "peak memory beyond importing, MB",
                peak - before,
                f"a subject's {limit - 200:.0f} MB and 200",
                limit,
                f"{before:.0f} MB imported, {peak:.0f} in all",
            )
    yield _plain(
        "bytes of a streamlines group, MB",
        size["streamlines"] / 1e6,
        "with float64 points, as dwi_ml",
        size["float64"] / 1e6,
        "not a time",
    )


def _plain(what: str, ours: float, reference_name: str, reference: float, note: str) -> Ratio:
    """A row that is measured once and is no time."""
    ratio = ours / reference
    return Ratio(what, reference_name, ours, reference, ratio, ratio, ratio, note)
