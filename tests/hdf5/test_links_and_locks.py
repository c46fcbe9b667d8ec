"""Where a file lies: behind a symbolic link, which stays one, and on a file system that has no locks."""

import errno
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers_data import CONFIG, make_file, make_subject

from tractkit.core.files import DataError, atomic_path
from tractkit.data.dataset import MultiSubjectDataset
from tractkit.hdf5.create import add_subject, create_hdf5
from tractkit.hdf5.validate import validate_hdf5
from tractkit.runs import lock
from tractkit.spatial.volume import Volume


@pytest.mark.parametrize("there", [True, False])
def test_a_file_is_replaced_behind_its_link(tmp_path, there):
    (tmp_path / "disk").mkdir()
    (tmp_path / "home").mkdir()
    target, link = tmp_path / "disk/KEY", tmp_path / "home/a.nii.gz"
    if there:
        target.write_text("old")
    (tmp_path / "home/middle").symlink_to("../disk/KEY")
    link.symlink_to("middle")
    with atomic_path(link) as temporary:
        assert temporary.parent == tmp_path / "disk" and temporary.name.endswith(".nii.gz")
        temporary.write_text("new")
    assert link.is_symlink() and not target.is_symlink() and target.read_text() == "new"
    with pytest.raises(RuntimeError), atomic_path(link) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "new" and [p.name for p in target.parent.iterdir()] == ["KEY"]
    Volume(np.ones((2, 2, 2), np.float32), np.eye(4)).save(link)
    assert link.is_symlink() and Volume.load(link).data.shape == (2, 2, 2)


@pytest.mark.parametrize("own_files", [False, True])
def test_a_data_file_is_made_and_grows_behind_its_link(tmp_path, own_files):
    (tmp_path / "disk/deep").mkdir(parents=True)
    for name in ("a", "b"):
        make_subject(tmp_path / name, np.random.default_rng(ord(name)))
    link = tmp_path / "x.hdf5"
    link.symlink_to("disk/deep/y.hdf5")
    options = {"one_file_per_subject": own_files, "progress": False}
    for overwrite in (False, True):
        made = create_hdf5(tmp_path, link, CONFIG, {"training": ["a"]}, overwrite=overwrite, **options)
        assert made == link and link.is_symlink() and validate_hdf5(link, progress=False).ok
    if own_files:
        assert add_subject(link, tmp_path, "b", "validation", progress=False) == link
    assert link.is_symlink() and sorted(p.name for p in (tmp_path / "disk/deep").iterdir()) == [
        "y.hdf5", *["y_subjects"] * own_files]
    assert len(MultiSubjectDataset(link).load_data().training_set.subjects) == 1


def test_the_folder_of_subjects_may_be_a_link_too(tmp_path):
    make_subject(tmp_path / "a", np.random.default_rng(1))
    (tmp_path / "disk/parts").mkdir(parents=True)
    (tmp_path / "x_subjects").symlink_to("disk/parts")
    for _ in range(2):
        create_hdf5(
            tmp_path,
            tmp_path / "x.hdf5",
            CONFIG,
            {"training": ["a"]},
            one_file_per_subject=True,
            overwrite=True,
            progress=False,
        )
    assert (tmp_path / "x_subjects").is_symlink() and [p.name for p in (tmp_path / "disk").iterdir()] == ["parts"]
    assert validate_hdf5(tmp_path / "x.hdf5", progress=False).ok


class NoLocks(h5py.File):
    """HDF5 on a file system without locks."""

    def __init__(self, name, mode="r", locking=None, **kwargs):
        if locking is not False:
            said = f"unable to lock file, errno = {errno.ENOLCK}, error message = 'No locks available'"
            raise BlockingIOError(errno.ENOLCK, said)
        assert mode == "r" or ".hdf5." in Path(name).name, "only what this process made is written without a lock"
        super().__init__(name, mode, locking=locking, **kwargs)


@pytest.mark.parametrize("own_files", [False, True])
def test_without_locks_a_data_file_is_made_all_the_same(tmp_path, monkeypatch, own_files):
    monkeypatch.setattr(h5py, "File", NoLocks)
    path, _ = make_file(tmp_path, n_subjects=2, one_file_per_subject=own_files)
    make_subject(tmp_path / "sub-9", np.random.default_rng(9))
    if own_files:
        add_subject(path, tmp_path, "sub-9", "testing", progress=False)
    assert validate_hdf5(path, progress=False).ok and os.environ.get("HDF5_USE_FILE_LOCKING") is None
    assert MultiSubjectDataset(path).load_data().training_set.subjects


def test_locks_that_are_demanded_where_there_are_none(tmp_path, monkeypatch):
    class Demanded(NoLocks):
        def __init__(self, name, mode="r", locking=None, **kwargs):  # as with HDF5_USE_FILE_LOCKING=TRUE
            super().__init__(name, mode, locking=None if mode == "w" else locking, **kwargs)

    monkeypatch.setattr(h5py, "File", Demanded)
    with pytest.raises(DataError, match=r"No locks available.*Unset HDF5_USE_FILE_LOCKING"):
        make_file(tmp_path, n_subjects=1)


@pytest.mark.skipif(lock.fcntl is None, reason="no such locks on Windows")
def test_a_run_trains_where_there_are_no_locks(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", no_locks)
    with pytest.warns(UserWarning, match="has no locks"), lock.folder_lock(tmp_path):
        with pytest.raises(RuntimeError, match="another trainer"), lock.folder_lock(tmp_path):  # in this process
            pass
