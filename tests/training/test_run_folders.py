"""Each run has a folder of its own: default names, names that are given, branches, and the current folder."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import make_file
from helpers_training import Fit, fit, toy_model
from torch import nn

from tractkit.data.dataset import MultiSubjectDataset
from tractkit.functional.torch_model import ModelTrainer, TorchModel
from tractkit.lab.folder_run import FolderRun
from tractkit.lab.run_browser import RunBrowser
from tractkit.models.base import load_model, save_model
from tractkit.runs.checkpoint import Checkpoints, load_checkpoint, peek_checkpoint, save_checkpoint
from tractkit.runs.curves import read_run
from tractkit.runs.listing import find_runs, read_facts
from tractkit.runs.log import RunLog
from tractkit.runs.mailbox import Mailbox
from tractkit.runs.weights import load_latest
from tractkit.training.config import read_run_config
from tractkit.training.policy import TimeProfiler
from tractkit.training.process import ProcessRun
from tractkit.training.state import TrainerState


def folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def unnamed(folder, **options):
    return fit(folder, None, **options)


# -- default names

def test_trainers_without_a_name_have_a_folder_each(tmp_path):
    """A sweep made in a list: three runs, none of which goes on with another's weights."""
    trainers = [unnamed(tmp_path, learning_rate=rate, max_epochs=1) for rate in (.1, .01, .001)]
    assert len({t.folder for t in trainers}) == 3
    for t in trainers:
        t.train_and_validate()
    assert all(t.state.global_step == 6 for t in trainers) and len(find_runs(tmp_path)) == 3
    assert not torch.equal(*(t.model[0].weight for t in trainers[:2]))
    name, *later = folders(tmp_path)
    assert later == [f"{name}-2", f"{name}-3"] or len({n.split("-")[1] for n in later}) > 1  # a second went by


CLAIM = """
import sys
from tractkit.runs.lock import claim_folder, dated_names
for _ in range(20):
    print(claim_folder(sys.argv[1], dated_names()))
"""


def test_jobs_of_an_array_have_a_folder_each(tmp_path):
    """Claims of several processes at once: no two have the same."""
    jobs = [subprocess.Popen([sys.executable, "-c", CLAIM, tmp_path], stdout=subprocess.PIPE, text=True)
            for _ in range(3)]
    told = [line for job in jobs for line in job.communicate()[0].split()]
    assert len(told) == len(set(told)) == 60 == len(folders(tmp_path))


def test_a_trainer_that_is_never_started_leaves_no_folder(tmp_path):
    trainer = unnamed(tmp_path)
    assert trainer.folder.is_dir()
    del trainer
    gc.collect()
    assert folders(tmp_path) == []
    with pytest.raises(ValueError):
        unnamed(tmp_path, max_epochs=-1)
    assert folders(tmp_path) == []


def test_a_folder_that_was_written_to_stays(tmp_path):
    trainer = unnamed(tmp_path, max_epochs=1)
    trainer.train_and_validate()
    del trainer
    gc.collect()
    assert len(find_runs(tmp_path)) == 1


def test_a_name_that_was_given_goes_on_with_its_run(tmp_path):
    fit(tmp_path, "mine", max_epochs=1).train_and_validate()
    again = fit(tmp_path, "mine", max_epochs=2)
    assert again.train_and_validate().global_step == 12


def test_a_folder_that_cannot_be_made_is_an_error_of_the_constructor(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="experiments_path"):
        unnamed(tmp_path / "file")


# -- branches

def test_branches_without_a_name_have_a_folder_each(tmp_path):
    trainer = fit(tmp_path, max_epochs=1)
    trainer.train_and_validate()
    branches = [trainer.fork() for _ in range(3)]
    assert [b.folder.name for b in branches] == ["run-fork", "run-fork2", "run-fork3"]


def test_two_branches_of_one_name_are_refused(tmp_path):
    trainer = fit(tmp_path, max_epochs=1)
    trainer.train_and_validate()
    branch = trainer.fork("b")
    with pytest.raises(ValueError, match="is there already"):
        trainer.fork("b")
    branch.change(max_epochs=2)
    assert branch.train_and_validate().global_step == 12


# -- ranks

class FirstOf:
    """Two ranks in one process: what the first one shared is given to the second."""

    shared: list = []

    def __init__(self, rank):
        self.rank, self.size, self.first = rank, 2, rank == 0

    def share(self, value):
        self.shared.append(value)
        return self.shared[0]


def test_all_ranks_have_the_folder_of_the_first(tmp_path):
    first, second = unnamed(tmp_path), unnamed(tmp_path)
    first.join(FirstOf(0), torch.device("cpu"))
    second.join(FirstOf(1), torch.device("cpu"))
    assert first.folder == second.folder == second.log.path.parent == second.checkpoints.folder
    assert folders(tmp_path) == [first.folder.name]


# -- the current folder

@pytest.fixture
def places(tmp_path, monkeypatch):
    """Two folders, of which the first is the current one, and a home folder."""
    for name in ("here", "there", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


class FitMoves(Fit):
    """Changes the current folder in the middle of an epoch."""

    to: Path

    def compute_batch_loss(self, batch):
        if self.state.global_step == 7:
            os.chdir(self.to)
        return super().compute_batch_loss(batch)


@pytest.mark.parametrize("where", ["here", "thread", pytest.param("process", marks=pytest.mark.full)])
def test_a_run_stays_in_its_folder_when_the_current_folder_changes(places, monkeypatch, where):
    trainer = fit("runs", kind=FitMoves, max_epochs=2, npy_logs=True)
    FitMoves.to = places / "there"
    if where == "here":
        trainer.train_and_validate()
    else:
        if where == "process":
            trainer = fit("runs", max_epochs=2, npy_logs=True)
            monkeypatch.chdir(places / "there")
        trainer.start(process=where == "process")
        trainer.wait()
    trainer.change(max_epochs=3)
    trainer.train_and_validate()
    branch = trainer.fork("branch")
    assert branch.folder.parent == trainer.folder.parent and trainer.state.global_step == 18
    assert folders(places / "there") == [] and folders(places / "here") == ["runs"]
    assert {"best_model", "checkpoints", "config.yaml", "log.jsonl", "logs"} <= set(folders(places / "here/runs/run"))


def test_the_home_folder_is_meant_by_its_sign(places):
    trainer = fit("~/runs", max_epochs=1)
    state = trainer.train_and_validate()
    assert trainer.folder == places / "home/runs/run" and folders(places / "here") == []
    state.save("~/one.ckpt")
    save_model(trainer.model, "~/model")
    save_checkpoint("~/two.ckpt", {"a": 1})
    assert folders(places / "here") == [] and {"one.ckpt", "two.ckpt", "model"} < set(folders(places / "home"))
    for path in ("~/one.ckpt", "~/runs/run", "~/runs/run/checkpoints"):
        assert TrainerState.load(path, toy_model()).global_step == 6
    assert load_checkpoint("~/two.ckpt") == {"a": 1} and peek_checkpoint("~/two.ckpt", ["a"]) == {"a": 1}
    load_model("~/runs/run/best_model", toy_model())
    assert [run.step for run in find_runs("~/runs")] == [read_facts("~/runs/run").step] == [6]
    assert len(read_run("~/runs/run").columns["epoch"]["step"]) == 1 and load_latest("~/runs/run", toy_model())
    assert read_run_config("~/runs/run")["trainer"]["experiments_path"] == str(places / "home/runs")
    for what in (lambda: fit("~nobody-of-this-name/runs"), lambda: find_runs("~nobody-of-this-name")):
        with pytest.raises(ValueError, match="nobody-of-this-name"):
            what()


def test_what_reads_a_run_reads_the_same_one_in_another_folder(places, monkeypatch):
    """Made from a path that is not whole, used after the current folder has changed."""
    fit("runs", max_epochs=1).train_and_validate()
    made = {
        "log": (RunLog("runs/run"), lambda log: len(log.records("epoch"))),
        "checkpoints": (Checkpoints("runs/run/checkpoints"), lambda kept: kept.steps()),
        "mailbox": (Mailbox("runs/run"), lambda box: box.read_status()["status"].global_step),
        "process": (ProcessRun("runs/run"), lambda run: (run.status.global_step, len(run.curves()["training"][0]))),
        "panel": (FolderRun("runs/run"), lambda run: (run.status, run.config(), len(run.curves()["training"][0]))),
        "browser": (RunBrowser("runs"), lambda b: (b.refresh(), [r.step for r in b.runs])),
        "listing": (find_runs("runs"), lambda runs: Checkpoints(runs[0].folder / "checkpoints").steps()),
        "state": (TrainerState.load("runs/run", toy_model()), lambda s: len(s.history.batches["loss"])),
    }
    before = {name: repr(look(thing)) for name, (thing, look) in made.items()}
    monkeypatch.chdir(places / "there")
    assert {name: repr(look(thing)) for name, (thing, look) in made.items()} == before
    assert folders(places / "there") == []


def test_other_paths_are_kept_whole(places, monkeypatch):
    data = make_file(places / "home", n=4, points=(4, 8))[0]
    monkeypatch.chdir(places / "home")
    datasets = [MultiSubjectDataset(path, lazy=True) for path in (data.name, f"~/{data.name}")]
    policy = TimeProfiler("times.jsonl")
    model = TorchModel(toy_model(), nn.Identity(), nn.functional.mse_loss, "Adam")
    trainer = ModelTrainer(model, [(np.zeros((2, 1), "f"), np.zeros((2, 1), "f"))], 1, .1, "logs", "~/fits/one")
    monkeypatch.chdir(places / "there")
    for dataset in datasets:
        assert len(dataset.load_data().training_set) and dataset.settings()["path"] == str(data)
    fit(places / "runs", max_epochs=1, policies=[policy]).train_and_validate()
    trainer.train_and_validate()
    assert folders(places / "there") == [] and folders(places / "here") == []
    assert {"times.jsonl", "logs", "fits"} <= set(folders(places / "home"))


def test_configs_of_before_are_read_as_before(places, monkeypatch):
    """Their experiments_path may begin at the current folder; a run that was moved goes on where it is."""
    trainer = fit("runs", max_epochs=1)
    trainer.train_and_validate()
    config = read_run_config("runs/run")
    assert config["trainer"]["experiments_path"] == str(places / "here/runs")
    old = places / "old.yaml"
    old.write_text("trainer: {experiments_path: runs, experiment_name: run}")
    assert read_run_config(old)["trainer"] == {"experiments_path": "runs", "experiment_name": "run"}
    (places / "here/runs").rename(places / "there/moved")
    for path in ("moved/run", "moved/run/config.yaml", places / "there/moved/run"):
        monkeypatch.chdir(places / "there")
        assert read_run_config(path)["trainer"]["experiments_path"] == str(places / "there/moved")
    (places / "there/moved/run").rename(places / "there/moved/other")
    assert read_run_config("moved/other")["trainer"]["experiment_name"] == "other"
    assert read_run_config("moved/other/config.yaml")["trainer"]["experiment_name"] == "run"  # to begin it anew
