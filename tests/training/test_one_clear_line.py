"""What a machine lacks (a GPU, open files, a home folder) is one line that says what to do, before a folder."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_training import Learn2Track, toy_model

from tractkit.core import files
from tractkit.core.files import DataError
from tractkit.data import prefetch
from tractkit.data.prefetch import Feeder
from tractkit.models.base import load_model, usable_device
from tractkit.spatial.volume import Volume
from tractkit.tracking.tracker import Tracker
from tractkit.training.trainer import Trainer


@pytest.mark.parametrize(
    "there, device, says",
    [
        (0, "cuda:3", "'cuda:3': this machine has no GPU that CUDA finds"),
        (0, "cuda", "no GPU"),
        (1, "cuda:1", "cuda:0 only"),
        (4, "cuda:4", "cuda:0 to cuda:3 only"),
        (0, "gpu", "'gpu' is none that torch has"),
        (0, "cuda:x", "is none"),
        (0, torch.device("cuda", 2), "no GPU"),
    ],
)
def test_a_device_that_is_not_there(tmp_path, monkeypatch, there, device, says):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    volume, mask = (Volume(np.ones(shape, np.float32), np.eye(4)) for shape in ((2, 2, 2, 1), (2, 2, 2)))
    for make in (
        lambda: Trainer(toy_model(), tmp_path, "run", device=device),
        lambda: load_model(tmp_path, device=device),
        lambda: Tracker(Learn2Track(1, rnn_layer_sizes=(4,)), volume, mask, step_size=1.0, device=device),
    ):
        with pytest.raises(ValueError, match=says) as e:
            make()
        assert "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_devices_that_are_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [str(usable_device(d)) for d in ("cpu", "cuda", "cuda:1", torch.device("cuda:0"), "meta")] == [
        "cpu", "cuda", "cuda:1", "cuda:0", "meta"]


# ---- open files


def no_more(*args):
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def torch_says(*args):
    """As its DataLoader does."""
    raise RuntimeError("Too many open files. Communication with the workers is no longer possible. Please increase the "
                       "limit using `ulimit -n` in the shell or change the sharing strategy")


class Later:
    """The batches of workers that cannot be received."""

    def __next__(self):
        torch_says()


@pytest.mark.parametrize("start", [no_more, lambda feeder: Later()])
def test_workers_with_too_few_open_files(monkeypatch, start):
    monkeypatch.setattr(Feeder, "_start_pass", start)
    with pytest.raises(RuntimeError, match=r"more open files than are allowed.*ulimit -n 4096.*num_workers=0") as e:
        with Feeder(lambda ids, **_: ids, num_workers=2).batches([[1], [2]]) as batches:
            list(batches)
    assert "sharing strategy" not in str(e.value)


def test_a_worker_that_can_open_no_file_says_so(monkeypatch):
    monkeypatch.setattr(prefetch.ForkingPickler, "dumps", no_more)
    assert "ulimit -n 4096" in prefetch._pack(torch.zeros(3)).why


# ---- no home folder


def test_without_a_home_folder(tmp_path, monkeypatch):
    pwd = pytest.importorskip("pwd")

    def nobody(*args):
        raise KeyError("no such user")

    for name in ("HOME", "TRACTKIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no home folder.*Set HOME, or TRACTKIT_CACHE") as e:
        files.cache_folder()
    assert "\n" not in str(e.value)
    with pytest.raises(DataError, match="~/x.nii.gz.*Write the whole path"):
        Volume(np.zeros((2, 2, 2), np.float32), np.eye(4)).save("~/x.nii.gz")
    assert not list(tmp_path.iterdir())  # no folder that is called ~
    monkeypatch.setenv("TRACTKIT_CACHE", str(tmp_path / "c"))
    assert files.cache_folder() == Path(tmp_path / "c") and files.absolute_path("x") == tmp_path / "x"
