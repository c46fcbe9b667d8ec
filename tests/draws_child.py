"""Trainings whose model, loss, loader and sampler draw from global generators; also as processes that tests kill."""

import os
import random
import time

import numpy as np
import torch
from helpers_children import fork_for_each_line
from helpers_training import Fit, Points, fit, toy_model
from torch import nn

from tractkit.models.layers import StepNoise
from tractkit.training.state import TrainerState

KINDS = ["torch", "numpy", "random"]
WHERE = ["forward", "loss", "loader", "sampler", "validation"]
DRAWS = {"torch": lambda: float(torch.rand(())), "numpy": lambda: float(np.random.rand()),  # noqa: NPY002
         "random": random.random}


def draw(kinds) -> float:
    return sum(DRAWS[kind]() for kind in kinds)


class DrawingNet(nn.Module):
    def __init__(self, kinds):
        super().__init__()
        self.net, self.kinds = toy_model(), kinds

    def forward(self, x):
        return self.net(x + .1 * draw(self.kinds))


class DrawingPoints(Points):
    """A sampler that may draw in its plan, and a loader that may draw in each batch, or only later."""

    def __init__(self, job, slow=0.0):
        super().__init__()
        self.job, self.slow, self.ahead, self.in_step = job, slow, 0, False

    def plan(self, epoch, subset):
        return np.roll(super().plan(epoch, subset), int(100 * draw(self.job.get("sampler", ()))), axis=1)

    def load_batch_streamlines(self, ids, *, epoch, training):
        x, y = super().load_batch_streamlines(ids, epoch=epoch, training=training)
        time.sleep(self.slow)
        self.ahead += self.in_step
        is_late = training and epoch == 1 and int(ids[0]) == int(super().plan(1, "training")[3][0])
        return x, y + .1 * draw(self.job.get("loader", ())) + .1 * draw(self.job.get("later", ()) if is_late else ())


class DrawingFit(Fit):
    def compute_batch_loss(self, batch):
        points = self.batch_loader
        points.in_step = True
        time.sleep(points.slow)
        loss, n = super().compute_batch_loss(batch)
        points.in_step = False
        job = points.job
        return loss * (1 + draw(job.get("loss" if self.model.training else "validation", ()))), n


def make_trainer(folder, name, job, slow=0.0, **options):
    return fit(folder, name, DrawingFit, DrawingNet(job.get("forward", ())), DrawingPoints(job, slow), **options)


def child(job):
    trainer = make_trainer(job["folder"], job["name"], dict.fromkeys(WHERE, KINDS), num_workers=job["workers"],
                           checkpoint_every_batches=1)
    trainer.train_and_validate()


def warm_up(job):
    """Have compiled functions and parts of torch loaded before forking. No backward pass: that would start threads."""
    trainer = make_trainer(job["folder"], "warm", {})
    points = trainer.batch_loader
    ids = points.plan(0, "training")[0]
    points.load_batch_streamlines(ids, epoch=0, training=True)
    noise = StepNoise(trainer.model, 1)
    for block in noise.step(1), noise.validation(1), noise.plan(1, "training"):
        with block:
            pass
    state = TrainerState.create(trainer.model)
    for p in trainer.model.parameters():
        p.grad = torch.zeros_like(p)
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    state.optimizer.step()


if __name__ == "__main__":
    fork_for_each_line(child, warm_up)
    os._exit(0)
