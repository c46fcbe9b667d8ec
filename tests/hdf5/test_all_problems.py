"""hdf5: one run names everything that is wrong with a study, before anything is computed."""

import pickle
import warnings

import nibabel as nib
import numpy as np
import pytest
from helpers_data import CONFIG, SHAPE, make_subject, world_volume

from tractkit.cli.commands import main
from tractkit.core.files import DataError, DataErrors
from tractkit.hdf5.config import read_config, read_splits
from tractkit.hdf5.create import create_hdf5


@pytest.fixture
def study(tmp_path):
    """Subjects of which each has a fault of its own, and a config with three."""
    for i, name in enumerate(("good", "no-volume", "damaged", "odd", "text")):
        make_subject(tmp_path / name, np.random.default_rng(i))
    (tmp_path / "no-volume/xyz.nii.gz").unlink()
    (tmp_path / "damaged/xyz.nii.gz").write_bytes(b"what")
    (tmp_path / "damaged/lines.trk").write_bytes(b"ever")
    world_volume(np.eye(4), (5, 4, 3)).save(tmp_path / "odd/fa.nii.gz")
    (tmp_path / "text/lines.trk").rename(tmp_path / "text/lines.txt")
    for name in ("good", "no-volume", "damaged", "text"):
        if name != "damaged":
            nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.float32), None), tmp_path / name / "fa.nii.gz")
    return tmp_path


def test_all_that_is_wrong_with_a_study(study):
    config = {"input": {"type": "volume", "files": ["xyz.nii.gz"], "standardization": "zscore"},
              "map": {"type": "volume", "files": "fa.nii.gz", "standardization": "none", "mask": "m", "std": "x"},
              "lines": {"type": "streamlines", "files": "lines.t??"}, "xyz": CONFIG["input"]}
    splits = {"training": ["good", "no-volume", "damaged", "goof"], "validation": ["odd", "text", "nobody"]}
    (study / "x.hdf5").write_bytes(b"kept")
    with pytest.raises(DataErrors) as e:
        create_hdf5(study, study / "x.hdf5", config, splits, progress=False)
    told = str(e.value)
    for words in ("x.hdf5: exists already",
                  "input: 'standardization' is 'zscore'", "map: unknown key 'mask'", "map: unknown key 'std'",
                  "goof: no such folder", "nobody: no such folder", "no-volume/xyz: no such file",
                  "damaged/xyz: cannot be read as an image", "damaged/lines: cannot be read as a tractogram",
                  "text/lines: unknown kind of tractogram '.txt'"):
        assert told.count(words) == 1, words
    assert told.startswith("10 things are wrong:\n") and len(e.value.errors) == 10
    assert (study / "x.hdf5").read_bytes() == b"kept"


def test_grids_that_differ_are_all_named(study):
    config = {"input": {"type": "volume", "files": ["xyz.nii.gz", "fa.nii.gz"], "standardization": "none",
                        "std_mask": "none.nii.gz"}}
    with pytest.raises(DataErrors) as e:
        create_hdf5(study, study / "x.hdf5", config, {"training": ["odd", "no-volume"]}, progress=False)
    names = [(error.subject, error.file.split("/")[-1]) for error in e.value.errors]
    assert names == [("odd", "none.nii.gz"), ("no-volume", "xyz.nii.gz"), ("no-volume", "none.nii.gz")]


def test_a_tractogram_is_not_blamed_for_its_volume(study):
    """A .tck takes the grid of a volume: where that cannot be read, the volume is named alone."""
    (study / "damaged/lines.trk").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_subject(study / "other", np.random.default_rng(0), suffix=".tck")
    (study / "other/lines.tck").rename(study / "damaged/lines.tck")
    config = CONFIG | {"streamlines": {"type": "streamlines", "files": "lines.tck"}}
    with pytest.raises(DataError, match="cannot be read as an image") as e:
        create_hdf5(study, study / "x.hdf5", config, {"training": ["damaged"]}, progress=False)
    assert not isinstance(e.value, DataErrors)


def test_one_problem_is_the_error_itself(study):
    with pytest.raises(ValueError, match="^nb_points must be") as e:
        create_hdf5(study, study / "x.hdf5", CONFIG, {"training": ["good"]}, nb_points=1, progress=False)
    assert not isinstance(e.value, DataError)
    with pytest.raises(DataError, match="no such file") as e:
        create_hdf5(study, study / "x.hdf5", CONFIG, {"training": ["good", "no-volume"]}, progress=False)
    assert (e.value.subject, e.value.group) == ("no-volume", "input")


def test_configs_and_lists(tmp_path):
    with pytest.raises(DataErrors) as e:
        read_config({"a": {"type": "vol"}, "b": 3, "c/d": {"type": "volume"},
                     "e": {"type": "streamlines", "files": [1], "groups": 7, "dpp": "x"}}, "c.yaml")
    assert [error.group for error in e.value.errors] == ["a", "b", "c/d", "e", "e", "e"]
    (tmp_path / "sub").mkdir()
    with pytest.raises(DataErrors) as e:
        read_splits({"train": ["sub"], "training": [3, "sub 2"], "testing": tmp_path / "none.txt"}, tmp_path)
    told = str(e.value)
    assert len(e.value.errors) == 4 and "unknown split 'train'" in told and "an entry of the splits is 3" in told
    assert "a share of 2" in told and "cannot read the list of subjects" in told
    with pytest.raises(DataError, match="no such folder") as e:  # a root that is not there is one problem
        read_splits({"training": ["a", "b", "c"]}, tmp_path / "none")
    assert not isinstance(e.value, DataErrors)


def test_many_errors_cross_processes_and_are_cut():
    errors = DataErrors([DataError(f"problem {i}", file="f", fix="Mend it") for i in range(60)])
    back = pickle.loads(pickle.dumps(errors))
    assert str(back) == str(errors) and len(back.errors) == 60
    assert str(errors).count("\n") == 41 and str(errors).endswith("and 20 more")


def test_the_command_line_names_its_options(study, capsys):
    (study / "x.hdf5").write_bytes(b"")
    (study / "c.json").write_text('{"v": {"type": "volume", "files": "xyz.nii.gz", "standardization": "none"}}')
    assert main(["hdf5", "create", str(study), str(study / "x.hdf5"), str(study / "c.json"),
                 "--training", "no-volume"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("tractkit: 2 things are wrong:\n") and "--overwrite" in told
    assert "--skip-enforce-files-presence" in told and "=True" not in told and "=False" not in told
