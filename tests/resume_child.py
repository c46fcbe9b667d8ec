"""Runs trainings that are to be killed: one child process for each line of JSON on the standard input.

The imports are done once; each training is forked off before torch or numba have started a thread. The answer to a
line is the child's process id, then, when it has ended, its wait status. A child that is to die at a named point of the
checkpoint code kills itself there with SIGKILL, which no code can catch."""

import hashlib
import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from helpers_children import fork_for_each_line
from torch import nn

from tractkit.core import files
from tractkit.data.dataset import MultiSubjectDataset
from tractkit.data.loader import BatchLoaderOneInput
from tractkit.data.sampler import BatchIDSampler
from tractkit.functional.batch_iter import BatchIter
from tractkit.functional.torch_model import TorchModel, train_model
from tractkit.models import layers
from tractkit.models.learn2track import Learn2Track
from tractkit.models.targets import Targets
from tractkit.runs import checkpoint
from tractkit.runs import log as runlog
from tractkit.spatial.volume import Volume
from tractkit.tracking.tracker import Tracker
from tractkit.training.policy import DecreasingOnPlateau, Exponential
from tractkit.training.state import TrainerState
from tractkit.training.trainer import TrainerOneInput

EPOCHS, BATCHES = 3, 6  # batches of each epoch
POINTS = [
    "copy",
    "sync of the log",
    "serialise",
    "write",
    "written",
    "fsync",
    "fsynced",
    "rename",
    "renamed",
    "fsync of the folder",
    "rotate",
]


class DeadlyOs:
    """`os` as one module sees it: in some of its calls this process ends."""

    def __init__(self, at):
        self.at = at

    def __getattr__(self, name):
        return getattr(os, name)

    def fsync(self, fd):
        file = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
        if file == "log.jsonl":
            self.at("sync of the log")
        if file == "checkpoints":
            self.at("fsync of the folder")
        if file.startswith(".step-"):
            self.at("written")
            self.at("fsync")
        os.fsync(fd)
        if file.startswith(".step-"):
            self.at("fsynced")

    def replace(self, a, b):
        ours = os.path.basename(b).startswith("step-")
        if ours:
            self.at("rename")
        os.replace(a, b)
        if ours:
            self.at("renamed")


def die_at(point: str, count: int) -> None:
    """Kill this process when `point` of the checkpoint code is reached for the `count`-th time."""
    seen = [0]

    def at(here, first=lambda: None):
        if here == point:
            seen[0] += 1
            if seen[0] == count:
                first()
                os.kill(os.getpid(), signal.SIGKILL)

    write, unlink, save, freeze = (
        Path.write_bytes,
        Path.unlink,
        checkpoint.safetensors.torch.save,
        checkpoint.freeze_tree,
    )

    def write_bytes(path, data):
        if path.name.startswith(".step-"):
            at("write", lambda: write(path, data[:len(data) // 2]))
        return write(path, data)

    def unlink_path(path, *args, **kwargs):
        if path.name.startswith("step-"):
            at("rotate")
        return unlink(path, *args, **kwargs)

    def serialise(*args):
        at("serialise")
        return save(*args)

    def freeze_tree(tree):
        at("copy")
        return freeze(tree)

    files.os = runlog.os = DeadlyOs(at)
    Path.write_bytes, Path.unlink, checkpoint.freeze_tree = write_bytes, unlink_path, freeze_tree
    checkpoint.safetensors = SimpleNamespace(
        torch=SimpleNamespace(save=serialise, load=checkpoint.safetensors.torch.load)
    )


class Noted(TrainerOneInput):
    """Notes which batches it was given, bit for bit, as soon as it has them; and dies where it is told to."""

    job: dict = {}

    def compute_batch_loss(self, batch):
        state = self.state
        if self.model.training and "slow" not in self.job:
            note(self.folder, state.global_step, batch.subjects, batch.streamline_ids.tolist(), batch.points)
        if not self.model.training and "slow" in self.job and state.epoch == 0:
            time.sleep(self.job["slow"])
        return super().compute_batch_loss(batch)


def note(folder, step, subjects, ids, points):
    line = json.dumps([step, subjects, ids, hashlib.blake2b(points.numpy().tobytes(), digest_size=8).hexdigest()])
    with open(Path(folder) / "batches.jsonl", "a") as f:
        f.write(line + "\n")


def parts(data, rnn="lstm"):
    """Learn2Track with dropout, and the default loader with splits, reversal and noise."""
    dataset = MultiSubjectDataset(data).load_data()
    model = Learn2Track(
        dataset.training_set[0].volumes["input"].volume.nb_features,
        rnn_layer_sizes=(10, 8),
        rnn_key=rnn,
        dropout=0.2,
        dg_dropout=0.1,
        step_size=4.0,
        seed=5,
    )
    sampler = BatchIDSampler(dataset, "streamlines", 7, 30, rng=3)
    loader = BatchLoaderOneInput(dataset, model, "input", "streamlines", rng=4, split_ratio=.3, reverse_ratio=.5,
                                 noise_gaussian_size_forward=.1, noise_gaussian_size_loss=.05)
    return model, sampler, loader


def make_trainer(job, **options):
    model, sampler, loader = parts(job["data"], job.get("rnn", "lstm"))
    options = (
        dict(
            max_epochs=EPOCHS,
            learning_rate=[0.01, 0.005],
            clip_grad=1.0,
            patience=50,
            num_threads=1,
            device="cpu",
            progress=False,
            max_batches_per_epoch_training=BATCHES,
            checkpoint_every_batches=2,
        )
        | options
        | job.get("options", {})
    )
    trainer = Noted(model, job["folder"], job["name"], sampler, loader, **options)
    trainer.job = job
    return trainer


class Streamlines(BatchIter):
    """The same batches, for `train_model`: as arrays."""

    def __init__(self, job):
        super().__init__(BATCHES)
        self.job = job
        self.model, self.sampler, self.loader = parts(job["data"])

    def batch(self, epoch, i, subset):
        batch = self.loader.load_batch_streamlines(
            self.sampler.plan(epoch, subset)[i], epoch=epoch, training=subset == "training"
        )
        seen = self.loader.add_noise_streamlines_forward(batch, "cpu")
        targets = self.model.targets(self.loader.add_noise_streamlines_loss(batch, "cpu"))
        return (
            self.loader.load_batch_inputs(seen.points, seen),
            seen.points,
            seen.offsets,
            seen.previous,
            seen.voxel_sizes,
            *targets,
        )

    def make(self, number):
        return self.batch(*divmod(number, BATCHES), "training")


class Core(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs, points, offsets, previous, voxel_sizes):
        return self.model(
            inputs, SimpleNamespace(points=points, offsets=offsets, previous=previous, voxel_sizes=voxel_sizes)
        )

    def loss(self, outputs, *targets):
        return self.model.compute_loss(outputs, Targets(*targets))[0]


class Noting(TorchModel):
    def do_train_step(self, *arrays, lr, weight):
        with open(Path(self.folder) / "batches.jsonl", "a") as f:
            f.write(
                json.dumps(
                    [self.at(), [hashlib.blake2b(np.asarray(a).tobytes(), digest_size=8).hexdigest() for a in arrays]]
                )
                + "\n"
            )
        return super().do_train_step(*arrays, lr=lr * weight)


def functional(job):
    batches = Streamlines(job)
    core = Core(batches.model)
    model = Noting(core, nn.Identity(), core.loss, torch.optim.Adam, n_targets=2)
    folder = model.folder = Path(job["folder"]) / job["name"]
    folder.mkdir(exist_ok=True)
    steps = [r["step"] for p in [runlog.RunLog(folder / "logs")] for r in p.records("batch")]
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints")
    newest = checkpoints.newest() if steps or checkpoints.steps() else None
    counter = iter(range(newest[0]["global_step"] if newest else 0, 10**6))
    model.at = lambda: next(counter)

    def validate():
        *inputs, directions, undirected = batches.batch(0, 0, "validation")
        outputs = torch.from_numpy(model.do_inf_step(*inputs))
        return {"valid_loss": float(core.loss(outputs, directions, undirected))}

    train_model(
        model,
        batches,
        EPOCHS,
        DecreasingOnPlateau(initial=0.01, multiplier=0.5, patience=0, rtol=0.5, atol=0.5),
        folder / "logs",
        folder / "checkpoints",
        validate,
        weight=Exponential(1, 0.8),
        progress=False,
        options={"checkpoint_every_batches": 2, "num_threads": 1, **job.get("options", {})},
    )


def child(job: dict) -> None:
    if job.get("forget") == "dropout":  # the generator goes on instead of being seeded for each step
        layers.torch_seed = lambda key, seed=[0]: seed.__setitem__(0, seed[0] + 1) or seed[0]
    if job.get("point"):
        die_at(job["point"], job["count"])
    if job.get("draw"):
        threading.Thread(target=draw_for_ever, daemon=True).start()
    if job.get("functional"):
        return functional(job)
    trainer = make_trainer(job)
    if job.get("signal"):
        def at_batch(event, t):
            if event == "batch" and t.status.phase == "training" and t.state.global_step >= job["step"]:
                os.kill(os.getpid(), job["signal"])
        trainer.listeners.append(at_batch)
    {
        "foreground": trainer.train_and_validate,
        "background": lambda: background(trainer),
        "pauses": lambda: pauses(trainer),
        "steps": lambda: step_by_step(trainer),
        "interrupts": lambda: interrupts(trainer, job),
        "company": lambda: company(trainer, Path(job["folder"])),
    }[job.get("how", "foreground")]()


def draw_for_ever():
    """What another cell may do."""
    while True:
        by_numpy = np.random.rand(9)  # noqa: NPY002
        drawn = [torch.rand(50), torch.randn(3, 3) @ torch.randn(3, 3), by_numpy, random.random()]
        torch.manual_seed(len(drawn) + random.randrange(2**31))
        time.sleep(0.0005)


def background(trainer):
    trainer.start()
    trainer.wait()


def pauses(trainer):
    rng = random.Random(3)
    trainer.start()
    while trainer.running:
        time.sleep(rng.random() * .02)
        trainer.pause(wait=rng.random() < .5)
        time.sleep(rng.random() * .01)
        trainer.resume()
    trainer.wait()


def step_by_step(trainer):
    rng = random.Random(4)
    while trainer.state is None or trainer.state.finished is None:
        trainer.step(rng.randint(1, 3))
    trainer.wait()


def interrupts(trainer, job):
    """Ctrl-C, and the cell run again, with a new trainer or the same."""
    for step in (2, 6, 7, 13, 99):
        stop = lambda event, t, step=step: (  # noqa: E731
            event == "batch"
            and t.status.phase == "training"
            and t.state.global_step == step
            and os.kill(os.getpid(), signal.SIGINT)
        )
        trainer.listeners[:] = [stop]
        trainer.train_and_validate()
        assert trainer.state.global_step == min(step, EPOCHS * BATCHES)
        if step == 6:
            state, trainer = trainer.state, make_trainer(job, learning_rate=[.01, .005])
            trainer.take(state)


def company(trainer, folder):
    """Cells beside the training: copies, saves, branches, tracking and evaluation of the live model."""
    volume = trainer.batch_loader.dataset.validation_set[0].volumes["input"].volume
    mask = Volume(np.ones(volume.shape3d, dtype=np.uint8), volume.affine)
    held = trainer.batch_loader.load_batch_streamlines(
        trainer.batch_sampler.plan(0, "validation")[0], epoch=0, training=False
    )
    inputs = trainer.batch_loader.load_batch_inputs(held.points, held)
    trainer.listeners.append(
        lambda event, t: event == "batch" and time.sleep(0.15)
    )  # so that the cells have their turn, however slow they are
    trainer.step(1)
    trainer.resume()
    seen, state, branches = set(), trainer.state, []
    while trainer.running:
        seen.add(state.snapshot().global_step)
        branches.append(state.fork())
        state.save(folder / f"{trainer.job['name']}-cell.ckpt")
        trainer.save_checkpoint()
        state.evaluate(lambda model: model.compute_loss(model(inputs, held), model.targets(held)))
        Tracker(trainer.model, volume, mask, min_length=0, max_length=20).track(
            held.points[:20].numpy(), progress=False
        )
    trainer.wait()
    assert len(seen) > 3, seen
    other = make_trainer({**trainer.job, "name": trainer.job["name"] + "-branch"})
    other.train_and_validate(branches[0])


def warm_up(job: dict) -> None:
    """Have compiled functions loaded before forking. No backward pass: that would start threads."""
    trainer = make_trainer(job)
    for ids in trainer.batch_sampler.plan(0, "training"):
        batch = trainer.batch_loader.load_batch_streamlines(ids, epoch=0, training=True)
    TrainerOneInput.compute_batch_loss(trainer, batch)
    state = TrainerState.create(trainer.model)
    for p in trainer.model.parameters():
        p.grad = torch.zeros_like(p)
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    state.optimizer.step()  # torch imports a good part of itself here


def main() -> None:
    fork_for_each_line(child, warm_up)


if __name__ == "__main__":
    main()
    os._exit(0)
