"""What cannot be read is not damaged: it is named, nothing is used in its place, and it is not deleted."""

import errno
import os
import warnings
from pathlib import Path

import pytest
from helpers_training import fit, toy_model

from tractkit.core.files import DataError
from tractkit.lab.folder_run import FolderRun
from tractkit.runs.checkpoint import Checkpoints, load_checkpoint, peek_checkpoint
from tractkit.runs.listing import read_facts
from tractkit.runs.weights import load_latest
from tractkit.training.state import TrainerState


@pytest.fixture(params=[errno.EACCES, errno.EIO, errno.ESTALE])
def refusing(request, monkeypatch):
    """Have files of one name fail to be read, as another user's or on a bad disk; root may read all others."""
    refused = set()
    real_bytes, real_open, real_list = Path.read_bytes, open, os.listdir

    def check(path):
        if Path(os.fsdecode(path)).name in refused:
            raise OSError(request.param, os.strerror(request.param), str(path))

    def read_bytes(self):
        check(self)
        return real_bytes(self)

    def opened(file, *args, **kwargs):
        if isinstance(file, (str, os.PathLike)):
            check(file)
        return real_open(file, *args, **kwargs)

    def listed(path="."):
        check(path)
        return real_list(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    monkeypatch.setattr("builtins.open", opened)
    monkeypatch.setattr(os, "listdir", listed)
    return refused


def run_of_two(tmp_path):
    trainer = fit(tmp_path, max_epochs=2, keep_checkpoints=2)
    trainer.train_and_validate()
    assert trainer.checkpoints.steps() == [6, 12]
    return trainer


@pytest.mark.parametrize("name", ["step-00000012.ckpt", "checkpoints"])
def test_a_run_that_cannot_be_read_is_not_begun_anew(tmp_path, refusing, name):
    run_of_two(tmp_path)
    files = sorted((p.name, p.stat().st_size) for p in (tmp_path / "run/checkpoints").iterdir())
    log = (tmp_path / "run/log.jsonl").read_text()
    refusing.add(name)
    again = fit(tmp_path, max_epochs=4)
    for _ in range(2):
        with pytest.raises(OSError, match=name):
            again.train_and_validate()
    again.start()
    with pytest.raises(OSError, match=name):
        again.wait()
    with pytest.raises(OSError, match=name):
        TrainerState.load(tmp_path / "run", toy_model())
    refusing.clear()
    assert sorted((p.name, p.stat().st_size) for p in (tmp_path / "run/checkpoints").iterdir()) == files
    assert (tmp_path / "run/log.jsonl").read_text() == log
    assert again.train_and_validate().global_step == 24


def test_what_was_not_read_is_never_deleted(tmp_path, refusing):
    kept = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        kept.save(step, {"a": step})
    refusing.add("step-00000002.ckpt")
    with pytest.raises(OSError, match="may be whole"):
        kept.newest()
    for step in (3, 4, 5):
        kept.save(step, {"a": step})
    kept.drop_after(1)
    assert kept.steps() == [2]
    refusing.clear()
    assert kept.newest()[0] == {"a": 2}


def test_damage_is_content(tmp_path):
    """A damaged file is passed over as before, a folder of its name too."""
    kept = Checkpoints(tmp_path, keep=9)
    for step in (1, 2):
        kept.save(step, {"a": step})
    kept.path(2).write_bytes(b"\0" * 99)
    kept.path(3).mkdir()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert kept.newest()[0] == {"a": 1}
    assert len(said) == 2
    with pytest.raises(DataError, match="no such"):
        load_checkpoint(kept.path(9))


def test_who_reads_checkpoints_names_the_file(tmp_path, refusing):
    trainer = run_of_two(tmp_path)
    path = trainer.checkpoints.path(12)
    refusing.add(path.name)
    for read in (lambda: load_checkpoint(path), lambda: peek_checkpoint(path, ["epoch"]),
                 lambda: trainer.rewind(2), lambda: load_latest(tmp_path / "run/checkpoints", toy_model())):
        with pytest.raises((OSError, DataError), match=path.name) as e:
            read()
        assert "damaged" not in str(e.value)


def test_listing_and_panel_say_it_and_go_on(tmp_path, refusing):
    run_of_two(tmp_path)
    refusing.add("step-00000012.ckpt")
    facts = read_facts(tmp_path / "run")
    assert facts.status == "stopped" and "step-00000012.ckpt: not readable" in facts.note and facts.epochs == 2
    panel = FolderRun(tmp_path / "run")
    assert "step-00000012.ckpt" in panel.status.message and "damaged" not in panel.status.message
    refusing.clear()
    assert panel.status.phase == "finished" and read_facts(tmp_path / "run").status == "finished"
