"""How many threads torch computes with: one core is left free, a choice of the user stays, a run keeps its number."""

import os

import numpy as np
import pytest
import torch
from helpers_training import fit

from tractkit.models import threads
from tractkit.models.threads import default_threads, usable_cores, use_threads
from tractkit.spatial.volume import Volume
from tractkit.tracking.tracker import Tracker


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 8)
    with use_threads(4):
        yield


def test_one_core_is_left_free(four_cores, monkeypatch):
    assert default_threads() == 3
    monkeypatch.setattr(threads, "usable_cores", lambda: 1)
    assert default_threads() == 1


def test_a_number_that_was_chosen_stays(four_cores, monkeypatch):
    for chosen in (2, 9):
        with use_threads(chosen):
            assert default_threads() == chosen
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert default_threads() == 4


def test_quotas_of_control_groups_count(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    process = tmp_path / "cgroup"
    process.write_text("0::/job/step\n")
    assert usable_cores(tmp_path, process) == 64
    (tmp_path / "job/step").mkdir(parents=True)
    (tmp_path / "job/step/cpu.max").write_text("max 100000\n")
    (tmp_path / "job/cpu.max").write_text("250000 100000\n")
    assert usable_cores(tmp_path, process) == 2
    process.write_text("3:cpu,cpuacct:/old\n")
    (tmp_path / "cpu/old").mkdir(parents=True)
    (tmp_path / "cpu/old/cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu/old/cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores(tmp_path, process) == 64
    (tmp_path / "cpu/old/cpu.cfs_quota_us").write_text("50000\n")
    assert usable_cores(tmp_path, process) == 1
    assert usable_cores(tmp_path, tmp_path / "none") == 64


def threads_of(trainer):
    return trainer.state.fingerprints["environment"]["threads"]


def test_a_run_takes_the_default_and_one_that_began_with_another_number_keeps_it(four_cores, tmp_path):
    new = fit(tmp_path, "new", num_threads=None, max_epochs=1)
    new.train_and_validate()
    assert threads_of(new) == 3 and torch.get_num_threads() == 4
    fit(tmp_path, "old", num_threads=4, max_epochs=1).train_and_validate()  # as all did before
    old = fit(tmp_path, "old", num_threads=None, max_epochs=2)
    old.train_and_validate()
    assert threads_of(old) == 4
    apart = fit(tmp_path, "thread", num_threads=None, max_epochs=1)
    apart.start()
    assert threads_of(apart) == 3 if apart.wait() else False


def test_tracking_uses_one_thread():
    seen = []

    class Straight:
        step_size, nb_features = 1.0, 1

        def init_state(self, n, device=None):
            return ()

        def select_state(self, state, rows):
            return state

        def step(self, inputs, previous, state):
            seen.append(torch.get_num_threads())
            return torch.ones_like(previous), state

    volume = Volume(np.ones((5, 5, 5, 1), np.float32), np.eye(4))
    with use_threads(2):
        Tracker(Straight(), volume, volume, min_length=0).track(progress=False)
        assert set(seen) == {1} and torch.get_num_threads() == 2
