"""Resident memory of a training of Learn2Track (28 features, LSTM 128-128) on batches of 256 streamlines, in MB, after
10, 50 and 200 batches: with the bound on compiled shapes that a training sets, beside oneDNN's own of 1,024. Each is a
process of its own; the last row is the time of the 200 batches, in ms each. Loss by loss, both have the same bits."""

import os
import subprocess
import sys
from collections.abc import Iterator

import torch

from benchmarks.bench_training import make_parts
from benchmarks.pairs import Ratio
from benchmarks.subjects import bench_hdf5
from tractkit.data.dataset import MultiSubjectDataset

SEEN = (10, 50, 200)


def train() -> None:
    """Print the memory after some batches, then the milliseconds of a batch and a digest of the losses."""
    import hashlib
    import time

    torch.set_num_threads(1)
    model, sampler, loader = make_parts(MultiSubjectDataset(bench_hdf5(2, 4000)).load_data())
    optimizer, digest, began = torch.optim.Adam(model.parameters()), hashlib.blake2b(digest_size=8), time.perf_counter()
    plans = [ids for epoch in range(20) for ids in sampler.plan(epoch)]
    for i, ids in enumerate(plans[:max(SEEN)], 1):
        batch = loader.add_noise_streamlines_forward(loader.load_batch_streamlines(ids, epoch=i))
        loss, _ = model.compute_loss(model(loader.load_batch_inputs(batch.points, batch), batch), model.targets(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        digest.update(repr(loss.item()).encode())
        if i in SEEN:
            with open("/proc/self/statm", encoding="ascii") as f:
                print(int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)
    print(1e3 * (time.perf_counter() - began) / max(SEEN))
    print(digest.hexdigest())


def found(**environment: str) -> list[str]:
    clean = {k: v for k, v in os.environ.items() if k != "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
    code = "from benchmarks.bench_memory import train; train()"
    return subprocess.run([sys.executable, "-c", code], env=clean | environment, stdout=subprocess.PIPE, text=True,
                          check=True).stdout.split()


def rows() -> Iterator[Ratio]:
    bench_hdf5(2, 4000)
    ours, reference = found(), found(ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024")
    same = "the same bits" if ours.pop() == reference.pop() else "OTHER BITS"
    whats = [f"memory after {n} batches, MB" for n in SEEN] + ["a batch"]
    for what, a, b in zip(whats, map(float, ours), map(float, reference), strict=True):
        yield Ratio(what, "with oneDNN's own bound", a, b, a / b, a / b, a / b, f"1 thread, {same}")
