"""Volumes larger than the cache, now and before: 40 subjects of 6.2 MB each (48 x 48 x 24 voxels, 28 features), one
batch of 1,024 streamlines of all of them after the other, and a cache of 33 volumes, as 2 GiB hold of volumes of 62 MB.

*Least recently used goes* is how tractkit kept volumes before (`ByteCache` in its cache's place, nothing read ahead).
The reference has room for all. *Fetched ahead*: beside the thread of a training that reads what there is room for. A
warm page cache. Then, where there is a CUDA device, the same on it."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.pairs import Ratio, compare
from tractkit.core.rng import fold, uniform
from tractkit.data.cache import LoopCache
from tractkit.data.dataset import MultiSubjectDataset
from tractkit.data.loader import BatchLoaderOneInput
from tractkit.data.sampler import BatchIDSampler
from tractkit.hdf5.create import create_hdf5
from tractkit.hdf5.local_file import ByteCache
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume

SHAPE, FEATURES, SUBJECTS, FITTING, LINES, BATCH = (48, 48, 24), 28, 40, 33, 300, 1024
ONE = 4 * FEATURES * int(np.prod(SHAPE))


class Recent(ByteCache):
    """The cache of before."""

    def limit(self, choose: Callable[[], int] | None = None) -> int:
        return self.max_bytes

    def drop_ready(self) -> None:
        pass


def make_data(root: Path) -> Path:
    names = [f"sub-{k:02d}" for k in range(SUBJECTS)]
    for k, name in enumerate(names):
        (root / name).mkdir()
        values = uniform(fold("volume", k), np.arange(ONE // 4), dtype=np.float32).reshape(*SHAPE, FEATURES)
        points = uniform(fold("points", k), np.arange(LINES * 60), dtype=np.float32).reshape(LINES * 20, 3)
        lines = Streamlines(points * (np.array(SHAPE, np.float32) - 1), np.arange(0, LINES * 20 + 1, 20))
        Volume(values, np.diag([2, 2, 2, 1.0])).save(root / name / "in.nii")
        Tractogram(lines, np.diag([2, 2, 2, 1.0]), SHAPE).save(root / name / "lines.trk")
    config = {"input": {"type": "volume", "files": "in.nii", "standardization": "none"},
              "streamlines": {"type": "streamlines", "files": "lines.trk"}}
    return create_hdf5(root, root / "data.hdf5", config, {"training": names, "validation": [], "testing": []},
                       progress=False)


class Batches:
    """The inputs of one batch after the other, from a cache of so many volumes."""

    def __init__(self, data: Path, kind: type, volumes: int, ahead: bool, stack: contextlib.ExitStack,
                 device: str = "cpu"):
        on_disk, self.device, self.at = device == "cpu", torch.device(device), 0
        dataset = MultiSubjectDataset(data, lazy=on_disk).load_data()
        loader = self.loader = BatchLoaderOneInput(dataset, None, "input", "streamlines")
        cache = kind(volumes * ONE)
        if on_disk:
            dataset._cache = cache
            for subject in dataset.training_set:
                object.__setattr__(subject.volumes["input"].source, "cache", cache)
        else:
            loader.device_cache = loader.inputs["input"]._on_device = cache
        plan = list(BatchIDSampler(dataset, "streamlines", BATCH).plan(0))[:8]
        self.made = [loader.load_batch_streamlines(ids).to(self.device) for ids in plan]
        if ahead:
            stack.enter_context(loader.fetching(plan * 1000, 0, 8000, self.device))

    def __call__(self) -> float:
        """Return the seconds for the inputs of a batch."""
        began, batch = time.perf_counter(), self.made[self.at % len(self.made)]
        self.loader.load_batch_inputs(batch.points, batch)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.at += 1
        return time.perf_counter() - began


def rows() -> Iterator[Ratio]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            data = make_data(Path(folder))
            for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
                yield from rows_on(data, device)
    finally:
        torch.set_num_threads(before)


def rows_on(data: Path, device: str) -> Iterator[Ratio]:
    name = torch.cuda.get_device_name() if device == "cuda" else "1 thread"
    for what, kind, ahead in (("least recently used goes (before)", Recent, False),
                                    ("due last goes", LoopCache, False),
                                    ("due last goes, fetched ahead", LoopCache, True)):
        with contextlib.ExitStack() as stack:
            ours = Batches(data, kind, FITTING, ahead, stack, device)
            whole = Batches(data, LoopCache, SUBJECTS + 1, False, stack, device)
            yield compare(f"inputs of a batch, {what}", ours, "all kept", whole, timed=True, note=f"{device}, {name}")
