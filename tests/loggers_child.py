"""Toy trainings that keep their loggers up to date all the time, and kill themselves at a step: see
runs/test_loggers.py."""

import os
import signal
from pathlib import Path

from helpers_children import fork_for_each_line
from helpers_training import fit

from tractkit.training.state import TrainerState


def work(job: dict) -> None:
    trainer = fit(Path(job["folder"]), checkpoint_every_batches=4, npy_logs=True, **job.get("options", {}))
    for logger in trainer.loggers:
        logger.every = 0.0

    def deadly(event, t):
        if event == "batch" and t.status.phase == job.get("phase", "training") and t.state.global_step >= job["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)

    if job.get("kill"):
        trainer.listeners.append(deadly)
    trainer.train_and_validate()


def warm_up(job: dict) -> None:
    """Have torch import the rest of itself before forking. No backward pass: that would start threads."""
    TrainerState.create(fit(Path(job["folder"])).model).optimizer.step()


if __name__ == "__main__":
    fork_for_each_line(work, warm_up)
    os._exit(0)
