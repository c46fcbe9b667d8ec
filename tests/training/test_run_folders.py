"""Each run has a folder of its own: default names, names that are given, branches, and the current folder."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_training import fit

from tractkit.runs.listing import find_runs


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


CLAIM = ("import sys, torch; sys.path[:0] = [{tests!r}]\n"
         "from helpers_training import fit\n"
         "input(); t = fit({folder!r}, None, max_epochs=1); t.train_and_validate(); print(t.folder, t.state.global_step)")


def test_jobs_of_an_array_have_a_folder_each(tmp_path):
    code = CLAIM.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    jobs = [subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(3)]
    for job in jobs:
        job.stdin.write("\n")
        job.stdin.flush()
    told = [job.communicate(timeout=120)[0].split() for job in jobs]
    assert [steps for _, steps in told] == ["6"] * 3 and len({folder for folder, _ in told}) == 3


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
