"""Training Learn2Track (28 features, LSTM 100-100) on streamlines of 60 points on average, batches of 100, one thread.

The trainer (lazy data, default prefetch thread, splitting, reversal and noise on, log and status written) beside
forward + backward + optimizer alone on the same batches, loaded beforehand, in turns of four batches. Then the blocks
of `pad_buckets` beside torch's packed sequences and beside a dense batch of as many points, all of equal lengths:
forward + backward of the two LSTM layers. Last, a checkpoint (checksum, fsync, rename) beside torch.save."""

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.pairs import Ratio, compare
from tractkit.dataset import MultiSubjectDataset
from tractkit.hdf5 import create_hdf5
from tractkit.keyed import fold, normal, uniform
from tractkit.loader import BatchLoaderOneInput
from tractkit.models.layers import StackedRNN, initialize_weights, pad_buckets
from tractkit.models.learn2track import Learn2Track
from tractkit.sampler import BatchIDSampler
from tractkit.streamlines import Streamlines
from tractkit.tractogram import Tractogram
from tractkit.trainer import TrainerOneInput
from tractkit.volume import Volume

SHAPE, FEATURES, SUBJECTS, STREAMLINES, TURN = (48, 48, 12), 28, 4, 3000, 4


def make_data(root: Path) -> Path:
    """Arcs of 20 to 120 points over a volume of noise."""
    affine, names = np.diag([2, 2, 2, 1.0]), [f"sub-{i}" for i in range(SUBJECTS)]
    for name in names:
        (root / name).mkdir()
        Volume(normal(fold(name), np.arange(np.prod(SHAPE) * FEATURES).reshape(*SHAPE, FEATURES)), affine).save(root / name / "in.nii.gz")
        u = uniform(fold(name, "arcs"), np.arange(STREAMLINES * 3)).reshape(-1, 3)
        lines = []
        for radius, length, z in zip(5 + 15 * u[:, 0], 20 + 80 * u[:, 1], 11 * u[:, 2], strict=True):
            t = np.arange(int(length)) * 0.5 / radius
            lines.append(np.c_[24 + radius * np.cos(t), 24 + radius * np.sin(t), z + 0 * t])
        Tractogram(Streamlines.from_list(lines), affine, SHAPE).save(root / name / "lines.trk")
    config = {"input": {"type": "volume", "files": "in.nii.gz", "standardization": "none"},
              "streamlines": {"type": "streamlines", "files": "lines.trk"}}
    return create_hdf5(root, root / "data.hdf5", config, {"training": names, "validation": [], "testing": []}, progress=False)


class Turns:
    """Lets a training in a thread run a few batches whenever it is its turn."""

    def __init__(self, trainer: TrainerOneInput):
        self.go, self.done, self.batches = threading.Semaphore(0), threading.Semaphore(0), 0
        self.ending, self.trainer = False, trainer
        trainer.listeners.append(self.at_batch)
        trainer.start()

    def at_batch(self, event: str, trainer: TrainerOneInput) -> None:
        if event == "batch" and not self.ending:
            if self.batches % TURN == 0:
                self.done.release()
                self.go.acquire()
            self.batches += 1

    def __call__(self) -> None:
        self.go.release()
        self.done.acquire()

    def end(self) -> None:
        self.ending = True
        self.go.release()
        self.trainer.stop(wait=True)


def trainer_row(data: Path, root: Path) -> Ratio:
    dataset = MultiSubjectDataset(data, lazy=True).load_data()

    def parts():
        model = Learn2Track(FEATURES, dropout=0.1)
        sampler = BatchIDSampler(dataset, "streamlines", 100, 100)
        return model, sampler, BatchLoaderOneInput(dataset, model, "input", "streamlines", split_ratio=0.2, reverse_ratio=0.5,
                                                   noise_gaussian_size_forward=0.1)

    model, sampler, loader = parts()
    loaded, used = [], [0]
    for ids in list(sampler.plan(0))[:TURN * 28]:
        batch = loader.add_noise_streamlines_forward(loader.load_batch_streamlines(ids))
        loaded.append((loader.load_batch_inputs(batch.points, batch), batch, model.targets(batch)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=0.01)

    def alone():
        for inputs, batch, targets in loaded[used[0]:used[0] + TURN]:
            loss, _ = model.compute_loss(model(inputs, batch), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        used[0] += TURN

    other, sampler, loader = parts()
    turns = Turns(TrainerOneInput(other, root, "run", sampler, loader, max_epochs=1, num_threads=1, device="cpu", checkpoint_every_seconds=None))
    turns.done.acquire()  # it has run its first batch
    try:
        row = compare(f"trainer, {TURN} batches", turns, "forward + backward + step alone", alone, pairs=25)
    finally:
        turns.end()
    points = sum(len(inputs) for inputs, _, _ in loaded) / len(loaded)
    return Ratio(*[*vars(row).values()][:-1], f"{TURN * points / row.ours_ms * 1e3:,.0f} points/s, CPU, 1 thread")


def padding_rows() -> Iterator[Ratio]:
    lengths = (20 + 80 * uniform(fold("lengths"), np.arange(256))).astype(int)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    total, mean = int(offsets[-1]), int(lengths.mean())
    x = torch.from_numpy(normal(fold("x"), np.arange(total * FEATURES)).reshape(total, FEATURES))
    dense = x[:total // mean * mean].view(mean, -1, FEATURES)
    rnn = StackedRNN(FEATURES, (100, 100))
    initialize_weights(rnn, 0)

    def blocks():
        buckets = pad_buckets(offsets)
        buckets.pack([rnn(b)[0] for b in buckets.pad(x)]).square().mean().backward()

    def packed():
        y = torch.nn.utils.rnn.pack_sequence([x[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)], enforce_sorted=False)
        for layer in rnn.layers:
            y, _ = layer(y)
        y.data.square().mean().backward()

    note = f"256 streamlines, {total:,} points, 1 thread"
    yield compare("padded blocks, LSTM 100-100", blocks, "pack_sequence", packed, note=note)
    yield compare("padded blocks, LSTM 100-100", blocks, "one dense batch of equal lengths", lambda: rnn(dense)[0].square().mean().backward(), note=note)


def checkpoint_row(root: Path) -> Ratio:
    from tractkit.state import TrainerState

    model = Learn2Track(FEATURES)
    state = TrainerState.create(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    state.optimizer.step()
    return compare(f"checkpoint of {state.nb_parameters:,} parameters and Adam", lambda: state.save(root / "a.ckpt"), "torch.save, no fsync",
                   lambda: torch.save(state.state_dict(), root / "b.pth"), note="disk cache warm")


def rows() -> Iterator[Ratio]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield trainer_row(make_data(Path(folder)), Path(folder))
            yield from padding_rows()
            yield checkpoint_row(Path(folder))
    finally:
        torch.set_num_threads(threads)
