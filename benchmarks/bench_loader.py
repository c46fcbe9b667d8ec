"""Batches of 1,024 streamlines of four subjects in memory (60 points on average, 28 features of 96 x 96 x 60 voxels).

The loader resamples to 1 mm, reverses half and splits half, beside DIPY's set_number_of_points and a Python loop; its
inputs, beside grid_sample on the points of each subject in the faster of its layouts, the volumes already there. Equal
threads on both sides. Where there is a CUDA device: a million points sampled on it, beside a copy on the device of as
many bytes as sampling has to move (eight rows read and one written for each point)."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from benchmarks.bench_streamlines import augment_dipy, make
from benchmarks.bench_volume import FEATURES, SHAPE, make_volume, random_points, torch_sampler, walking_points
from benchmarks.pairs import Ratio, compare
from tractkit.core.rng import fold, uniform
from tractkit.data.dataset import MultiSubjectDataset
from tractkit.data.interpolation import sample_trilinear
from tractkit.data.loader import BatchLoaderOneInput
from tractkit.data.sampler import BatchIDSampler
from tractkit.hdf5.create import create_hdf5
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume

SUBJECTS, GPU_POINTS = 4, 2**20


def make_data(root: Path) -> Path:
    names = [f"sub-{k}" for k in range(SUBJECTS)]
    curves, volume = make(SUBJECTS * 1000), make_volume()
    inside = Streamlines(np.clip(curves.points, 0, np.array(SHAPE) - 1), curves.offsets)
    for k, name in enumerate(names):
        (root / name).mkdir()
        Volume(volume.data, np.diag([2, 2, 2, 1.0])).save(root / name / "in.nii")
        Tractogram(inside[np.arange(1000 * k, 1000 * k + 1000)], np.diag([2, 2, 2, 1.0]), SHAPE).save(
            root / name / "lines.trk"
        )
    config = {
        "input": {"type": "volume", "files": "in.nii", "standardization": "none"},
        "streamlines": {"type": "streamlines", "files": "lines.trk"},
    }
    return create_hdf5(
        root, root / "data.hdf5", config, {"training": names, "validation": [], "testing": []}, progress=False
    )


def rows() -> Iterator[Ratio]:
    before = torch.get_num_threads()
    try:
        with tempfile.TemporaryDirectory() as folder:
            dataset = MultiSubjectDataset(make_data(Path(folder))).load_data()
            torch.set_num_threads(1)
            yield streamlines_row(dataset)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                yield from input_rows(dataset, threads)
    finally:
        torch.set_num_threads(before)
    if torch.cuda.is_available():
        yield from cuda_rows()


def streamlines_row(dataset: MultiSubjectDataset) -> Ratio:
    loader = BatchLoaderOneInput(
        dataset, None, "input", "streamlines", step_size=1.0, split_ratio=0.5, reverse_ratio=0.5
    )
    ids = BatchIDSampler(dataset, "streamlines", 1024).plan(0)[0]
    u = uniform(fold("choices"), np.arange(3 * 1024), dtype=np.float64).reshape(3, 1024)

    def dipys():
        done = []
        for name, k in ids:
            sft = dataset.subject(name).streamlines["streamlines"]
            lines = nib.streamlines.ArraySequence([2 * p for p in sft.get(k)])  # mm: the voxels are 2 mm cubes
            done += augment_dipy(lines, *(x[:len(k)] < 0.5 for x in u[:2]), u[2][:len(k)])
        return done

    return compare(
        "load 1,024: resample 1 mm, reverse .5, split .5",
        lambda: loader.load_batch_streamlines(ids, epoch=1),
        "DIPY and a loop",
        dipys,
        note="1 thread",
    )


def input_rows(dataset: MultiSubjectDataset, threads: int) -> Iterator[Ratio]:
    note = f"{threads} thread{'s' * (threads > 1)}"
    ids = BatchIDSampler(dataset, "streamlines", 1024).plan(0)[0]
    plain = BatchLoaderOneInput(dataset, None, "input", "streamlines", step_size=1.0)
    axes = BatchLoaderOneInput(
        dataset,
        None,
        "input",
        "streamlines",
        step_size=1.0,
        neighborhood_type="axes",
        neighborhood_radius=1,
        neighborhood_resolution=1.0,
    )
    batch = plain.load_batch_streamlines(ids)
    for layout, name in ((torch.channels_last_3d, "channels last"), (torch.contiguous_format, "contiguous")):
        runs = [torch_sampler(dataset.subject(s).volumes["input"].volume, batch.points[r].numpy(), layout)
                for s, r in zip(batch.subjects, batch.point_ranges, strict=True)]
        yield compare(
            f"inputs of {len(batch.points):,} points",
            lambda: plain.load_batch_inputs(batch.points, batch),
            f"grid_sample, {name}",
            lambda runs=runs: [run() for run in runs],
            note=note,
        )
    seven = plain.load_batch_streamlines([(s, np.repeat(k, 7)) for s, k in ids])
    yield compare(
        "inputs with axes: 7 samples each",
        lambda: axes.load_batch_inputs(batch.points, batch),
        "as many samples without",
        lambda: plain.load_batch_inputs(seven.points, seven),
        note=note,
    )


def cuda_rows() -> Iterator[Ratio]:
    volume, name = make_volume(), torch.cuda.get_device_name()
    data = torch.from_numpy(volume.data).cuda()
    moved = torch.empty(GPU_POINTS * FEATURES * 9 // 2, device="cuda")  # a copy reads and writes: half of the bytes
    target = torch.empty_like(moved)

    def timed(run):
        def call():
            run()
            torch.cuda.synchronize()
        return call

    for what, points in (("along streamlines", walking_points(GPU_POINTS)), ("at random", random_points(GPU_POINTS))):
        there = torch.from_numpy(points).cuda()
        ours = timed(lambda there=there: sample_trilinear(data, there))
        yield compare(
            f"{GPU_POINTS:,} points {what} on the device",
            ours,
            "copy of as many bytes",
            timed(lambda: target.copy_(moved)),
            note=name,
        )
        for layout in (torch.channels_last_3d, torch.contiguous_format):
            rival = torch_sampler(volume, points, layout, "cuda")
            yield compare(
                f"{GPU_POINTS:,} points {what} on the device",
                ours,
                f"grid_sample, {str(layout).split('.')[-1]}",
                timed(rival),
                note=name,
            )
