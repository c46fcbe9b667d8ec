"""Runs trainings that are to be killed: one child process for each line of JSON on the standard input.

The imports are done once; each training is forked off before torch or numba have started a thread. The answer to a
line is the child's process id, then, when it has ended, its wait status. A child that is to die at a named point of the
checkpoint code kills itself there with SIGKILL, which no code can catch."""

import copy
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
from helpers_training import streamline_trainer
from tqdm import tqdm

from tractkit import checkpoint, files
from tractkit.models import layers
from tractkit.state import TrainerState


def die_at(point: str, count: int) -> None:
    """Kill this process when `point` is reached for the `count`-th time."""
    holder, name = {"write": (Path, "write_bytes"), "fsync": (files.os, "fsync"), "rename": (files.os, "replace"),
                    "renamed": (files.os, "replace"), "serialise": (checkpoint.safetensors.torch, "save"),
                    "rotate": (Path, "unlink")}[point]
    original, seen = getattr(holder, name), [0]

    def deadly(*args, **kwargs):
        seen[0] += 1
        if seen[0] == count:
            if point == "renamed":
                original(*args, **kwargs)
            if point == "write":
                original(args[0], args[1][:len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(holder, name, deadly)


def child(job: dict) -> None:
    options = job["options"]
    trainer = streamline_trainer(Path(job["data"]), Path(job["folder"]), **options)
    if job.get("forget"):
        spoil(job["forget"])
    if job.get("point"):
        die_at(job["point"], job["count"])
    if job.get("signal"):
        def at_batch(event, t):
            if event == "batch" and t.status.phase == "training" and t.state.global_step >= job["step"]:
                os.kill(os.getpid(), job["signal"])
        trainer.listeners.append(at_batch)
    if job.get("how") == "background":
        trainer.start()
        trainer.wait()
    else:
        trainer.train_and_validate()


def spoil(what: str) -> None:
    """Break one thing, to see that the test notices."""
    if what == "dropout":  # the generator goes on instead of being seeded for each step
        layers.torch_seed = lambda key, seed=[0]: seed.__setitem__(0, seed[0] + 1) or seed[0]
        return
    load = TrainerState.load_state_dict

    def forgetful(self, tree):
        keep = copy.deepcopy(getattr(self, what, None))
        fresh = self.optimizer.state_dict()
        load(self, tree)
        if what == "optimizer":
            self.optimizer.load_state_dict(fresh)
        else:
            setattr(self, what, keep)

    TrainerState.load_state_dict = forgetful


def warm_up(job: dict) -> None:
    """Have compiled functions loaded before forking. No backward pass: that would start threads."""
    trainer = streamline_trainer(Path(job["data"]), Path(job["folder"]))
    for ids in trainer.batch_sampler.plan(0, "training"):
        batch = trainer.batch_loader.load_batch_streamlines(ids, epoch=0, training=True)
    trainer.compute_batch_loss(batch)
    state = TrainerState.create(trainer.model)
    for p in trainer.model.parameters():
        p.grad = torch.zeros_like(p)
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    state.optimizer.step()  # torch imports a good part of itself here


def main() -> None:
    tqdm.monitor_interval = 0  # its thread could hold a lock at the moment of a fork
    for i, line in enumerate(sys.stdin):
        if i == 0:
            warm_up(json.loads(line))
        pid = os.fork()
        if pid == 0:
            status = 0
            try:
                child(json.loads(line))
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stderr.flush()
            os._exit(status)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


main()
os._exit(0)
