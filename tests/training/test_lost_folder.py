"""A folder that is moved, deleted or replaced while it is trained: noticed at the next save, and nothing is split."""

import os
import shutil

import pytest
from helpers_training import SlowPoints, fit, same_states
from helpers_waiting import until

from tractkit.runs.log import RunLog
from tractkit.runs.mailbox import Mailbox
from tractkit.training.process import ProcessRun
from tractkit.training.run_folder import LostFolder


def delete(run):
    shutil.rmtree(run)


def replace(run):
    shutil.rmtree(run)
    fit(run.parent, "run", max_epochs=1).checkpoints.save(0, {"a": 1})
    Mailbox(run).clear()


LOST = {
    "moved": lambda run: run.rename(run.with_name("elsewhere")),
    "deleted": delete,
    "without its log": lambda run: (run / "log.jsonl").unlink(),
    "without process": lambda run: shutil.rmtree(run / "process"),
    "replaced": replace,
    "without checkpoints": lambda run: (run / "checkpoints").rename(run / "old checkpoints"),
}


def content(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.parametrize("how", LOST)
@pytest.mark.parametrize("resting", [False, True])
def test_a_lost_folder_is_noticed_at_the_next_save(tmp_path, how, resting):
    trainer = fit(tmp_path, points=SlowPoints(), max_epochs=500, prefetch=0, checkpoint_every_batches=1000)
    trainer.start()
    until(lambda: trainer.state is not None and trainer.state.global_step >= 2)
    if resting:
        trainer.pause(wait=True)
    LOST[how](tmp_path / "run")
    after = content(tmp_path)
    if how == "replaced":  # a command for the new run is not obeyed
        command = Mailbox(tmp_path / "run").send_command("stop")
        after = content(tmp_path)
    elif how in ("moved", "deleted", "without process"):
        with pytest.raises(RuntimeError, match="no training is at work"):
            ProcessRun(tmp_path / "run").pause()
    at = trainer.state.global_step
    if resting:
        trainer.resume()
    until(lambda: trainer.state.global_step > at)
    if how == "replaced":
        assert command.exists() and trainer.running
    trainer.stop()
    with pytest.raises(RuntimeError, match="was moved, deleted or replaced"):
        trainer.wait()
    assert trainer.status.phase == "failed" and len([m for m in trainer.messages if "replaced" in m]) == 1
    assert content(tmp_path) == after


def test_a_log_that_is_closed_while_it_is_looked_at_is_not_lost(tmp_path, monkeypatch):
    """The thread that serves the folder looks while the one that trains closes the log; it must not end."""
    log = RunLog(tmp_path)
    log.append("batch", step=1)

    def closed(number):
        raise OSError(9, "Bad file descriptor")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", closed)
        assert not log.is_lost
    log._file.close()
    assert not log.is_lost
    log._file = None
    log.append("batch", step=2)
    (tmp_path / "log.jsonl").unlink()
    assert log.is_lost
    log.close()


def test_a_deleted_folder_is_not_made_again_by_the_best_model(tmp_path):
    trainer = fit(tmp_path, checkpoint_every_seconds=None)
    trainer.listeners.append(
        lambda event, t: event == "batch" and t.state.global_step == 3 and shutil.rmtree(t.folder))
    with pytest.raises(LostFolder):
        trainer.train_and_validate()
    assert not (trainer.folder / "best_model").exists()


@pytest.mark.parametrize("how", ["without checkpoints", "its log cut"])
def test_the_same_trainer_goes_on_from_where_it_is(tmp_path, how):
    whole = fit(tmp_path, "whole").train_and_validate()
    trainer = fit(tmp_path)
    trainer.step(7)
    if how == "its log cut":
        os.truncate(tmp_path / "run" / "log.jsonl", 0)
    else:
        LOST[how](tmp_path / "run")
    trainer.stop()
    with pytest.raises(LostFolder, match="log, checkpoints/ or process/ was: nothing more is written"):
        trainer.wait()
    last = Mailbox(tmp_path / "run").read_status()  # whoever watches from another process knows why it ended
    assert last["ended"] and last["error"]["type"] == "LostFolder"
    assert same_states(trainer.train_and_validate(), whole) == []
    assert RunLog(tmp_path / "run").path.stat().st_size and trainer.checkpoints.steps()[-1] == 18
