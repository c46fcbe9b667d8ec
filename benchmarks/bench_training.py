"""Training Learn2Track (28 features, LSTM 128-128, dropout) on batches of 256 streamlines at 1 mm, splits, reversal and
noise on.

The trainer (lazy data, default prefetch thread, log and status written) beside forward + backward + optimizer alone on
the same batches, loaded beforehand, in turns of four batches; a turn of the trainer ends only when the batches that it
used are made anew ahead, so nothing is loaded in the other's time. Then the blocks of `pad_buckets` beside torch's
packed sequences and beside a dense batch of as many points, all of equal lengths: forward + backward of the two LSTM
layers. Then a checkpoint (checksum, fsync, rename) and the log, beside the training that they are a part of; and the
memory of the process over 2,000 batches."""

import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.pairs import Ratio, compare
from benchmarks.subjects import CONFIG, bench_subjects, splits_of
from tractkit.core.rng import fold, normal, uniform
from tractkit.data.dataset import MultiSubjectDataset
from tractkit.data.loader import BatchLoaderOneInput
from tractkit.data.sampler import BatchIDSampler
from tractkit.hdf5.create import create_hdf5
from tractkit.models.layers import StackedRNN, initialize_weights, pad_buckets
from tractkit.models.learn2track import Learn2Track
from tractkit.runs.checkpoint import Checkpoints
from tractkit.runs.log import RunLog
from tractkit.training.state import TrainerState
from tractkit.training.trainer import TrainerOneInput

FEATURES, LAYERS, BATCH, TURN, PAIRS = 28, (128, 128), 256, 4, 50


class CountingLoader(BatchLoaderOneInput):
    """Knows how many batches it has made."""

    made = 0

    def load_batch_streamlines(self, *args, **kwargs):
        batch = super().load_batch_streamlines(*args, **kwargs)
        self.made += 1
        return batch


class Turns:
    """Lets a training in a thread run a few batches whenever it is its turn."""

    def __init__(self, trainer: TrainerOneInput):
        self.go, self.done, self.batches = threading.Semaphore(0), threading.Semaphore(0), 0
        self.ending, self.trainer = False, trainer
        self.ahead = trainer.prefetch + 1  # those in the queue, and one in the hands of the thread that makes them
        trainer.listeners.append(self.at_batch)
        trainer.start()

    def at_batch(self, event: str, trainer: TrainerOneInput) -> None:
        if event == "batch" and not self.ending:
            if self.batches % TURN == 0:
                self.done.release()
                self.go.acquire()
            self.batches += 1

    def settle(self) -> None:
        """Wait until the batches that were used are made anew."""
        while self.trainer.batch_loader.made < self.batches + 1 + self.ahead:
            time.sleep(1e-4)

    def __call__(self) -> None:
        self.go.release()
        self.done.acquire()
        self.settle()

    def end(self) -> None:
        self.ending = True
        self.go.release()
        self.trainer.stop(wait=True)


def make_parts(dataset: MultiSubjectDataset) -> tuple[Learn2Track, BatchIDSampler, CountingLoader]:
    model = Learn2Track(FEATURES, rnn_layer_sizes=LAYERS, dropout=0.1, step_size=1.0)
    sampler = BatchIDSampler(dataset, "streamlines", BATCH, BATCH)
    return (
        model,
        sampler,
        CountingLoader(
            dataset,
            model,
            "input",
            "streamlines",
            step_size=1.0,
            split_ratio=0.2,
            reverse_ratio=0.5,
            noise_gaussian_size_forward=0.1,
        ),
    )


class Alone:
    """Forward, backward and optimizer on batches that are in memory."""

    def __init__(self, dataset: MultiSubjectDataset):
        self.model, sampler, loader = make_parts(dataset)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, weight_decay=0.01)
        self.loaded, self.used = [], 0
        for ids in list(sampler.plan(0))[:32]:
            batch = loader.add_noise_streamlines_forward(loader.load_batch_streamlines(ids))
            self.loaded.append((loader.load_batch_inputs(batch.points, batch), batch, self.model.targets(batch)))
        self.points = sum(len(inputs) for inputs, _, _ in self.loaded) / len(self.loaded)

    def __call__(self) -> None:
        for _ in range(TURN):
            inputs, batch, targets = self.loaded[self.used % len(self.loaded)]
            loss, _ = self.model.compute_loss(self.model(inputs, batch), targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.used += 1


def trainer_row(dataset: MultiSubjectDataset, root: Path, threads: int) -> Ratio:
    alone = Alone(dataset)
    model, sampler, loader = make_parts(dataset)
    trainer = TrainerOneInput(
        model,
        root,
        f"run-{threads}",
        sampler,
        loader,
        max_epochs=1,
        num_threads=threads,
        device="cpu",
        checkpoint_every_seconds=None,
    )
    turns = Turns(trainer)
    turns.done.acquire()  # it has run its first batch
    turns.settle()
    try:
        row = compare(
            f"trainer, {TURN} batches of {BATCH}", turns, "forward + backward + step alone", alone, pairs=PAIRS
        )
    finally:
        turns.end()
    return replace(
        row, note=f"{TURN * alone.points / row.ours_ms * 1e3:,.0f} points/s, CPU, {threads} thread{'s' * (threads > 1)}"
    )


def padding_rows() -> Iterator[Ratio]:
    lengths = (20 + 80 * uniform(fold("lengths"), np.arange(BATCH))).astype(int)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    total, mean = int(offsets[-1]), int(lengths.mean())
    x = torch.from_numpy(normal(fold("x"), np.arange(total * FEATURES)).reshape(total, FEATURES))
    dense = x[:total // mean * mean].view(mean, -1, FEATURES)
    rnn = StackedRNN(FEATURES, LAYERS)
    initialize_weights(rnn, 0)

    def blocks():
        buckets = pad_buckets(offsets)
        buckets.pack([rnn(b)[0] for b in buckets.pad(x)]).square().mean().backward()

    def packed():
        y = torch.nn.utils.rnn.pack_sequence(
            [x[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)], enforce_sorted=False
        )
        for layer in rnn.layers:
            y, _ = layer(y)
        y.data.square().mean().backward()

    note, name = (
        f"{BATCH} streamlines, {total:,} points, {torch.get_num_threads()} thread(s)",
        f"padded blocks, LSTM {LAYERS[0]}-{LAYERS[1]}",
    )
    yield compare(name, blocks, "pack_sequence", packed, note=note)
    row = compare(
        name, blocks, "one dense batch of equal lengths", lambda: rnn(dense)[0].square().mean().backward(), note=note
    )
    rate = dense.shape[0] * dense.shape[1] / total / row.ratio
    yield replace(row, note=f"{note}; {rate:.2f} of its points/s")


def share_rows(dataset: MultiSubjectDataset, root: Path) -> Iterator[Ratio]:
    """What checkpoints and the log take of an epoch."""
    alone, plan = Alone(dataset), make_parts(dataset)[1].plan(0)
    for _ in range(3):
        alone()
    state = TrainerState.create(alone.model)
    for p in alone.model.parameters():
        p.grad = torch.zeros_like(p)
    state.optimizer.step()
    checkpoints, log, step = Checkpoints(root / "checkpoints", 2), RunLog(root / "log"), [0]

    def save():
        step[0] += 1
        checkpoints.save(step[0], state.state_dict())

    def write():
        for k in range(TURN):
            log.append(
                "batch",
                epoch=0,
                batch=k,
                step=k,
                loss=0.123456789,
                n=12345,
                grad_norm=1.23456,
                learning_rate=1e-3,
                time={"seconds": 1.5, "wait": 0.1},
            )

    epoch = len(plan) / TURN
    row = compare(
        f"a checkpoint of {state.nb_parameters:,} parameters and Adam", save, f"an epoch of {len(plan)} batches", alone
    )
    yield replace(
        row,
        reference_ms=row.reference_ms * epoch,
        ratio=row.ratio / epoch,
        low=row.low / epoch,
        high=row.high / epoch,
        note=f"{row.ratio / epoch:.3%} of the time",
    )
    row = compare(f"the log of {TURN} batches", write, f"{TURN} batches", alone)
    yield replace(row, note=f"{row.ratio:.3%} of the time")


def memory_row(dataset: MultiSubjectDataset, root: Path) -> Ratio:
    """Resident memory after 200 and after 2,000 batches (of 32, for time's sake)."""
    model, _, loader = make_parts(dataset)
    sampler, seen = BatchIDSampler(dataset, "streamlines", 32, 32), {}
    trainer = TrainerOneInput(
        model,
        root,
        "memory",
        sampler,
        loader,
        max_epochs=1,
        max_batches_per_epoch_training=2000,
        device="cpu",
        progress=False,
    )

    def at_batch(event: str, trainer: TrainerOneInput) -> None:
        if event == "batch" and trainer.state.global_step in (200, 2000):
            with open("/proc/self/status", encoding="ascii") as f:
                seen[trainer.state.global_step] = (
                    next(int(line.split()[1]) for line in f if line.startswith("VmRSS")) / 1024
                )

    trainer.listeners.append(at_batch)
    trainer.train_and_validate()
    low, high = seen[200], seen[2000]
    return Ratio(
        "memory after 2,000 batches, MB", "after 200", high, low, high / low, high / low, high / low, "not a time"
    )


def rows() -> Iterator[Ratio]:
    threads = torch.get_num_threads()
    try:
        with tempfile.TemporaryDirectory() as folder:
            root, names = bench_subjects(), list(splits_of(bench_subjects()).values())
            data = create_hdf5(
                root,
                Path(folder) / "data.hdf5",
                CONFIG,
                {"training": sum(names, []), "validation": [], "testing": []},
                progress=False,
            )
            dataset = MultiSubjectDataset(data, lazy=True).load_data()
            for n in sorted({1, threads}):
                torch.set_num_threads(n)
                yield trainer_row(dataset, Path(folder), n)
                yield from padding_rows()
            torch.set_num_threads(1)
            yield from share_rows(dataset, Path(folder))
            yield memory_row(dataset, Path(folder))
    finally:
        torch.set_num_threads(threads)
