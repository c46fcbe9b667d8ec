"""Runs trainings of `train_model` that are to be killed: one process forked off for each line of JSON on the standard
input."""

import os
import signal

import numpy as np
import torch
from helpers_children import fork_for_each_line
from torch import nn

from tractkit.core import files
from tractkit.core.rng import normal, uniform
from tractkit.functional.batch_iter import Infinite
from tractkit.functional.pipeline import Iterator, Threads
from tractkit.functional.sources import item_key, load_by_random_id, random_apply
from tractkit.functional.torch_model import TorchModel, train_model
from tractkit.models.layers import KeyedDropout, PyramidPooling, initialize_weights
from tractkit.runs import checkpoint
from tractkit.training.policy import DecreasingOnPlateau, Exponential, Policy

BATCHES, EPOCHS = 6, 3


def load_image(i):
    return np.sin(np.arange(36.0).reshape(1, 6, 6) * (i + 1) / 9) + 0.1 * normal(item_key(), np.arange(36)).reshape(
        1, 6, 6
    )


def load_label(i):
    return i % 3


def turn(item, sometimes):
    image, label = item
    return (np.rot90(image, axes=(1, 2)) if uniform(item_key(), 0) < sometimes else image), label


def counting():
    """Items of a stream: exact, if counted."""
    for i in range(10**6):
        yield load_image(i % 17), load_label(i)


def in_pairs(items):
    for a, b in zip(items, items, strict=False):
        yield b
        yield a


def make_batches(kind="keyed"):
    source = load_by_random_id(load_image, load_label, ids=range(40)) if kind == "keyed" else counting()
    stages = [Iterator(in_pairs)] if kind == "counted" else []
    return Infinite(
        source,
        *stages,
        Threads(turn, 0.5, n_workers=2),
        random_apply(0.3, turn, 1.0),
        batch_size=4,
        batches_per_epoch=BATCHES,
        seed=3,
    )


class Weighted(TorchModel):
    def do_train_step(self, *inputs, lr, weights, decay):
        return super().do_train_step(*inputs, lr=lr * weights, weight_decay=decay)


class Remembers(Policy):
    """Knows what it has seen, without saying so; and changes its value by it."""

    def __init__(self):
        self.value, self.losses = 1e-3, []

    def train_step_finished(self, epoch, iteration, loss):
        self.losses = [*self.losses[-4:], loss]
        self.value = 1e-3 * sum(self.losses)


class Dies(Policy):
    """Kills the process in one of its hooks."""

    def __init__(self, hook, count):
        self.hook, self.count = hook, count

    def epoch_started(self, epoch): self._at("epoch_started")
    def train_step_started(self, epoch, iteration): self._at("train_step_started")
    def train_step_finished(self, epoch, iteration, loss): self._at("train_step_finished")
    def validation_started(self, epoch, train_losses): self._at("validation_started")
    def epoch_finished(self, epoch, *, train_losses, metrics): self._at("epoch_finished")

    remembers = ()

    def _at(self, hook):
        if hook == self.hook:
            self.count -= 1
            if self.count == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def die_in_save(point, count):
    holder, name = {
        "fsync": (files.os, "fsync"),
        "rename": (files.os, "replace"),
        "serialise": (checkpoint.safetensors.torch, "save"),
    }[point]
    original, seen = getattr(holder, name), [0]

    def deadly(*args, **kwargs):
        seen[0] += 1
        if seen[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(holder, name, deadly)


def make_core():
    core = nn.Sequential(nn.Flatten(2), nn.Linear(36, 16), nn.Dropout(.2), nn.Tanh(), KeyedDropout(.1),
                         PyramidPooling(nn.functional.avg_pool1d, 2), nn.Linear(3, 3))
    initialize_weights(core, seed=1)
    return core


def warm_up():
    """What is compiled or imported when first used, before forking. No backward pass: that would start threads."""
    images, _ = make_batches("counted").load(0)
    core = make_core()
    core(torch.tensor(images, dtype=torch.float32))
    for p in core.parameters():
        p.grad = torch.zeros_like(p)
    nn.utils.clip_grad_norm_(core.parameters(), 1.0)
    torch.optim.AdamW(core.parameters()).step()


def train(folder, kind="keyed", hook="", count=0, **options):
    model = Weighted(make_core(), nn.Softmax(-1), nn.CrossEntropyLoss(), torch.optim.AdamW)
    lr = DecreasingOnPlateau(initial=.02, multiplier=.5, patience=0, rtol=.5, atol=.5)
    images = np.stack([np.sin(np.arange(36.0).reshape(1, 6, 6) * (i + 1) / 9) for i in range(6)])
    policies = {"dies": Dies(hook, count)} if hook in Dies.__dict__ else {}
    if hook and not policies:
        die_in_save(hook, count)
    return train_model(
        model,
        make_batches(kind),
        EPOCHS,
        lr,
        log_path=folder + "/logs",
        checkpoints_path=folder + "/checkpoints",
        validate=lambda: {"mean": model.do_inf_step(images).max(-1).mean()},
        progress=False,
        weights=Exponential(1, 0.8),
        decay=Remembers(),
        options={"checkpoint_every_batches": 2, "num_threads": 1, **options},
        **policies,
    )


def main():
    fork_for_each_line(lambda job: train(**job), lambda job: warm_up())


if __name__ == "__main__":
    main()
    os._exit(0)
