"""Other data behind the same name: a data file that was edited between two sessions, or while one runs."""

import json
import os
import shutil
import threading
from types import SimpleNamespace

import fsspec
import h5py
import numpy as np
import pytest
from helpers_data import make_file
from helpers_training import Points, fit, streamline_trainer

from tractkit.data.dataset import MultiSubjectDataset
from tractkit.hdf5 import content
from tractkit.hdf5.layout import group_checksum
from tractkit.runs.checkpoint import Checkpoints, load_checkpoint, save_checkpoint
from tractkit.training import data_check
from tractkit.training.state import TrainerState
from tractkit.training.torchrun import launch


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data file and the folder of a run that was trained on it for one epoch."""
    root = tmp_path_factory.mktemp("made")
    data, _ = make_file(root / "data", n_subjects=4, n=8, points=(4, 9))
    streamline_trainer(data, root / "runs", max_epochs=1).train_and_validate()
    return data, root / "runs/run"


@pytest.fixture
def place(made, tmp_path):
    """A copy of both, to edit."""
    data, run = made
    shutil.copytree(run, tmp_path / "run")
    return shutil.copy2(data, tmp_path / "data.hdf5"), tmp_path


def edit_voxels(h5):
    h5["sub-0/input/data"][3, 2, 1] += 1


def edit_points(h5):
    h5["sub-1/streamlines/data"][5] += np.float32(.25)


def edit_affine(h5):
    for group in h5["sub-0"].values():
        affine = group.attrs["affine"]
        affine[0, 3] += 10
        group.attrs["affine"] = affine


def swap_subjects(h5):
    for a, b in (("sub-0", "other"), ("sub-1", "sub-0"), ("other", "sub-1")):
        h5.move(a, b)


def swap_sets(h5):
    h5.attrs["training_subjs"], h5.attrs["validation_subjs"] = h5.attrs["validation_subjs"], h5.attrs["training_subjs"]


def remove_subject(h5):
    h5.attrs["training_subjs"] = np.array(["sub-0"], dtype=h5py.string_dtype())
    del h5["sub-1"]


def add_subject(h5):
    h5.copy("sub-0", "sub-9")
    names = [*h5.attrs["training_subjs"], "sub-9"]
    h5.attrs["training_subjs"] = np.array(names, dtype=h5py.string_dtype())


def reorder_streamlines(h5):
    """The same streamlines, the last one first."""
    group = h5["sub-0/streamlines"]
    offsets, lengths, points = group["offsets"][:], group["lengths"][:], group["data"][:]
    lines = [points[a:a + n] for a, n in zip(offsets, lengths, strict=True)][::-1]
    group["data"][:], group["lengths"][:] = np.concatenate(lines), lengths[::-1]
    group["offsets"][:] = np.cumsum([0, *lengths[::-1][:-1]])
    group["euclidean_lengths"][:] = group["euclidean_lengths"][:][::-1]


def swap_volumes_only(h5):
    """The voxels of two subjects, where attributes and checksums stay."""
    a, b = h5["sub-0/input/data"], h5["sub-1/input/data"]
    a[:], b[:] = b[:], a[:]


def other_type(h5):
    """The same values as float64."""
    values = h5["sub-0/input/data"][:]
    del h5["sub-0/input/data"]
    h5["sub-0/input/data"] = values.astype(np.float64)


def other_attribute(h5):
    h5["sub-0/streamlines"].attrs["origin"] = "Origin.NIFTI"


WAYS = [edit_voxels, edit_points, edit_affine, swap_subjects, swap_sets, remove_subject, add_subject,
        reorder_streamlines, swap_volumes_only, other_type, other_attribute]


def edit(path, way) -> None:
    with h5py.File(path, "r+") as h5:
        way(h5)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_data_file_edited_in_place_is_noticed(place, way):
    """Between two sessions; the attribute with the fingerprint stays as it was."""
    data, folder = place
    edit(data, way)
    with pytest.raises(ValueError, match="other data") as e:
        streamline_trainer(data, folder, max_epochs=2).train_and_validate()
    print(e.value)
    assert "accept=['data']" in str(e.value) and "data.hdf5" in str(e.value)


def session(data, folder, max_epochs=2, lazy=False, **options):
    """A trainer that goes on, and what it says."""
    trainer = streamline_trainer(data, folder, max_epochs=max_epochs, **options)
    if lazy:
        lazily = MultiSubjectDataset(data, lazy=True).load_data()
        trainer.batch_loader.dataset = trainer.batch_sampler.dataset = lazily
    return trainer


@pytest.fixture
def read(monkeypatch):
    """The groups whose content is read."""
    names = []
    real = content.content_checksum
    monkeypatch.setattr(
        content, "content_checksum", lambda group, check: names.append(group.path) or real(group, check)
    )
    return names


def other_time(path, folder):
    os.utime(path, ns=(1, 10**18))
    return path


def other_folder(path, folder):
    (folder / "elsewhere").mkdir()
    return shutil.copy(path, folder / "elsewhere/renamed.hdf5")


def replaced(path, folder):
    """By a file of the same content, as a program that writes files whole does it."""
    shutil.copy(path, folder / "new")
    os.replace(folder / "new", path)
    return path


def compressed(path, folder):
    """Another layout of the same content."""
    with h5py.File(path) as old, h5py.File(folder / "small.hdf5", "w") as new:
        new.attrs.update(old.attrs)
        for name in old:
            old.copy(name, new)
            voxels, attrs = old[name]["input/data"][:], dict(old[name]["input"].attrs)
            del new[name]["input"]
            new.create_group(f"{name}/input").attrs.update(attrs)
            new.create_dataset(f"{name}/input/data", data=voxels, compression="gzip", chunks=(3, 11, 9, 1))
    return folder / "small.hdf5"


@pytest.mark.parametrize(
    ("way", "lazy"),
    [(other_time, False), (other_folder, True), (replaced, False), (compressed, False), (compressed, True)],
)
def test_the_same_content_goes_on(place, read, way, lazy):
    """It is read once for each time of the file, and nothing is said."""
    data, folder = place
    data = way(data, folder)
    trainer = session(data, folder, lazy=lazy)
    trainer.train_and_validate()
    assert len(read) == len(set(read)) == 8 and not [m for m in trainer.messages if "data" in m.lower()]
    session(data, folder, 3).train_and_validate()
    assert len(read) == 8


def test_an_unchanged_file_is_not_read(place, read):
    data, folder = place
    session(data, folder).train_and_validate()
    assert read == []


@pytest.mark.parametrize("way", [edit_voxels, edit_points, reorder_streamlines], ids=lambda way: way.__name__)
def test_an_edit_with_renewed_checksums_is_noticed(place, way):
    data, folder = place
    with h5py.File(data, "r+") as h5:
        way(h5)
        for subject in h5.values():
            for group in subject.values():
                group.attrs["tractkit_checksum"] = group_checksum(group)
    with pytest.raises(ValueError, match=r"sub-\d/(input|streamlines): other content"):
        session(data, folder).train_and_validate()


@pytest.mark.parametrize("way", [edit_voxels, edit_affine, swap_sets], ids=lambda way: way.__name__)
def test_other_data_that_is_accepted(place, way):
    """It is the data of the run from then on: neither refused later, nor taken for what it was before."""
    data, folder = place
    before = shutil.copy2(data, folder / "before.hdf5")
    edit(data, way)
    session(data, folder, accept=["data"]).train_and_validate()
    other_time(data, folder)
    session(data, folder, 3).train_and_validate()
    with pytest.raises(ValueError, match="other data"):
        session(before, folder, 4).train_and_validate()


def without_mark(folder):
    """Make of a run one from before there were marks."""
    checkpoints = Checkpoints(folder / "run/checkpoints")
    for step in checkpoints.steps():
        tree = load_checkpoint(checkpoints.path(step))
        del tree["fingerprints"]["content"]
        save_checkpoint(checkpoints.path(step), tree)


def test_a_run_of_before_is_compared_by_its_fingerprint_and_keeps_the_mark(place):
    data, folder = place
    without_mark(folder)
    edit(data, edit_voxels)
    assert "content" in session(data, folder).train_and_validate().fingerprints
    edit(data, edit_voxels)
    with pytest.raises(ValueError, match="other data"):
        session(data, folder, 3).train_and_validate()
    without_mark(folder)
    with h5py.File(data, "r+") as h5:
        h5.attrs["tractkit_fingerprint"] = "0" * 32
    with pytest.raises(ValueError, match="other data"):
        session(data, folder, 3).train_and_validate()


# -- while it trains


@pytest.fixture
def slow(monkeypatch):
    """The check of the content waits for this event, and no training for the check."""
    go_on = threading.Event()
    real = content.content_checksum
    monkeypatch.setattr(content, "content_checksum", lambda group, check: go_on.wait(60) and real(group, check))
    monkeypatch.setattr(data_check, "_PATIENCE", .01)
    yield go_on
    go_on.set()


def after_step(trainer, step, what):
    trainer.listeners.append(lambda event, t: what() if event == "batch" and t.state.global_step == step else None)


@pytest.mark.parametrize("how", ["foreground", "thread"])
def test_a_mismatch_that_is_found_later_stops_the_training_with_its_state_saved(place, slow, how):
    data, folder = place
    edit(data, edit_points)
    trainer = session(data, folder, 50)
    begun = trainer.take().global_step
    after_step(trainer, begun + 2, slow.set)
    with pytest.raises(ValueError, match="sub-1/streamlines: the state was trained on other data"):
        if how == "foreground":
            trainer.train_and_validate()
        else:
            trainer.start()
            trainer.wait()
    assert any("compared with the checksums while it trains" in m for m in trainer.messages)
    assert "of this session were trained on it: rewind" in trainer.messages[-1] and trainer.status.phase == "failed"
    assert begun + 2 <= trainer.state.global_step < trainer.state.epoch * 50 + 50
    assert TrainerState.load(folder / "run", trainer.model).global_step == trainer.state.global_step
    with pytest.raises(ValueError, match="other data"):
        session(data, folder, 50).train_and_validate()


def test_a_training_ends_when_its_data_is_compared(place, slow):
    """A finished run was trained on the data it was begun with."""
    data, folder = place
    edit(data, edit_points)
    trainer = session(data, folder)
    trainer.listeners.append(lambda event, t: slow.set() if event == "epoch" else None)
    with pytest.raises(ValueError, match="other data"):
        trainer.train_and_validate()


def test_a_check_that_goes_on_does_not_hold_up_a_stop(place, slow):
    data, folder = place
    other_time(data, folder)
    trainer = session(data, folder, 50)
    begun = trainer.take().global_step
    after_step(trainer, begun + 1, lambda: (slow.set(), trainer.stop()))
    state = trainer.train_and_validate()
    assert state.global_step == begun + 1 and trainer.status.phase == "stopped"
    assert session(data, folder).train_and_validate().epoch == 2


def test_a_file_that_is_edited_while_it_trains(place):
    """What is in memory stays what it is; what is read from the file is refused. The next session notices."""
    data, folder = place
    trainer = session(data, folder)
    begun = trainer.take().global_step
    after_step(trainer, begun + 1, lambda: edit(data, edit_voxels))
    trainer.train_and_validate()
    with pytest.raises(ValueError, match="other data"):
        session(data, folder, 3).train_and_validate()
    shutil.copy2(data, folder / "lazy.hdf5")
    trainer = session(folder / "lazy.hdf5", folder, 3, lazy=True, accept=["data"], prefetch=1)
    after_step(trainer, trainer.take().global_step + 1, lambda: edit(folder / "lazy.hdf5", edit_voxels))
    with pytest.raises(ValueError, match="changed since it was first opened"):
        trainer.train_and_validate()


@pytest.mark.full
def test_in_a_process_of_its_own(place):
    data, folder = place
    edit(data, edit_voxels)
    trainer = session(data, folder)
    trainer.start(process=True)
    with pytest.raises((ValueError, RuntimeError), match="other data"):
        trainer.wait(120)


@pytest.mark.full
def test_in_several_processes(place):
    """The first one compares for all that have the same file."""
    data, folder = place
    other_time(data, folder)
    launch(session(data, folder), 2).wait()
    edit(data, edit_voxels)
    with pytest.raises((ValueError, RuntimeError), match="other data"):
        launch(session(data, folder, 3), 2).wait()


# -- other files


def test_files_of_subjects_that_are_linked(tmp_path, read):
    data, _ = make_file(tmp_path / "data", n_subjects=4, n=8, points=(4, 9), one_file_per_subject=True)
    session(data, tmp_path, 1).train_and_validate()
    other_time(tmp_path / "data/data_subjects/sub-1.hdf5", tmp_path)
    session(data, tmp_path).train_and_validate()
    assert read == ["/sub-1/input", "/sub-1/streamlines"]
    edit(tmp_path / "data/data_subjects/sub-1.hdf5", edit_points)
    with pytest.raises(ValueError, match=r"sub-1\.hdf5: sub-1/streamlines: the state was trained on other data"):
        session(data, tmp_path, 3).train_and_validate()


@pytest.mark.parametrize("way", [edit_voxels, edit_affine, edit_points], ids=lambda way: way.__name__)
def test_a_file_without_checksums(tmp_path, slow, way):
    """It is not read before the first batch; its checksums are found out meanwhile."""
    data, _ = make_file(tmp_path / "data", n_subjects=4, n=8, points=(4, 9))
    with h5py.File(data, "r+") as h5:
        del h5.attrs["tractkit_fingerprint"]
        for group in (g for s in h5.values() for g in s.values()):
            del group.attrs["tractkit_checksum"]
    trainer = session(data, tmp_path, 50)
    after_step(trainer, 1, slow.set)
    trainer.listeners.append(lambda event, t: t.session.content_check is None and t.stop())
    assert trainer.train_and_validate().fingerprints["data"] is None
    session(data, tmp_path, trainer.state.epoch + 1).train_and_validate()
    edit(data, way)
    with pytest.raises(ValueError, match="other data"):
        session(data, tmp_path, trainer.state.epoch + 2).train_and_validate()


def test_a_file_at_a_url_is_not_downloaded(place):
    data, folder = place
    memory = fsspec.filesystem("memory")
    memory.put(str(data), "/bucket/data.hdf5")
    trainer = streamline_trainer(data, folder, max_epochs=2)
    for part in (trainer.batch_loader, trainer.batch_sampler):
        part.dataset = MultiSubjectDataset("memory://bucket/data.hdf5").load_data()
    trainer.train_and_validate()
    assert sum("not downloaded" in m for m in trainer.messages) == 1
    assert trainer.session is None and trainer.state.epoch == 2


def test_a_dataset_of_ones_own_is_compared_by_what_its_fingerprint_returns(tmp_path):
    class Own(Points):
        dataset = SimpleNamespace(fingerprint=lambda: "one", loaded_content=lambda: "something else")

    fit(tmp_path, points=Own(), max_epochs=1).train_and_validate()
    fit(tmp_path, points=Own(), max_epochs=2).train_and_validate()
    Own.dataset.fingerprint = lambda: "two"
    with pytest.raises(ValueError, match=r"other data \(fingerprint one, now two\)"):
        fit(tmp_path, points=Own()).train_and_validate()
    assert fit(tmp_path, points=Own(), accept=["data"]).train_and_validate().epoch == 3


def test_more_and_fewer_groups_may_be_loaded(place):
    """What both have is compared."""
    data, folder = place
    trainer = session(data, folder)
    part = MultiSubjectDataset(data).load_data(load_testing=False, subj_id=["sub-0", "sub-1", "sub-2"])
    trainer.batch_loader.dataset = trainer.batch_sampler.dataset = part
    mark = json.loads(trainer.train_and_validate().fingerprints["content"])
    assert len(mark["groups"]) == 8 and mark["since"] == 0
