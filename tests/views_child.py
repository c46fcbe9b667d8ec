"""A toy training that keeps its views up to date all the time, and kills itself at a step: see test_views.py."""

import json
import os
import signal
import sys
from pathlib import Path

from helpers_training import fit


def main() -> None:
    job = json.loads(sys.argv[1])
    trainer = fit(Path(job["folder"]), checkpoint_every_batches=4, npy_logs=True, **job.get("options", {}))
    for view in trainer.views:
        view.every = 0.0

    def deadly(event, t):
        if event == "batch" and t.status.phase == job.get("phase", "training") and t.state.global_step >= job["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)

    if job.get("kill"):
        trainer.listeners.append(deadly)
    trainer.train_and_validate()


main()
