"""hdf5: one run names everything that is wrong with a study, before anything is computed."""

import pickle
import subprocess
import sys
import warnings

import nibabel as nib
import numpy as np
import pytest
from helpers_data import CONFIG, SHAPE, make_subject, world_volume

from tractkit.cli.commands import main
from tractkit.core.files import DataError, DataErrors
from tractkit.hdf5.config import read_config, read_splits
from tractkit.hdf5.create import create_hdf5
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram


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


@pytest.mark.parametrize("how", [{}, {"one_file_per_subject": True},
                                 pytest.param({"processes": 2}, marks=pytest.mark.full)])
def test_content_that_is_wrong_is_named_for_all_subjects(tmp_path, how):
    """What only reading shows is told at once, and the rest is looked at; nothing is left."""
    for i, name in enumerate(("a", "b", "c", "d")):
        make_subject(tmp_path / name, np.random.default_rng(i))
    for name in ("b", "d"):
        image = nib.load(tmp_path / name / "xyz.nii.gz")
        data = image.get_fdata(dtype=np.float32)
        data[3, 3, 3] = np.nan
        nib.save(nib.Nifti1Image(data, image.affine), tmp_path / name / "xyz.nii.gz")
    t = Tractogram.load(tmp_path / "c/lines.trk")
    Tractogram(Streamlines(t.streamlines.points + 99, t.streamlines.offsets), t.affine, SHAPE, t.dps).save(
        tmp_path / "c/lines.trk")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataErrors) as e, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        create_hdf5(tmp_path, tmp_path / "x.hdf5", CONFIG, {"training": ["a", "b", "c", "d"]}, progress=False, **how)
    found = [(error.subject, error.group) for error in e.value.errors]
    assert found == [("b", "input"), ("c", "streamlines"), ("d", "input")]
    assert sorted(tmp_path.iterdir()) == before
    assert sum("b/input: 3 values are not finite" in str(w.message) for w in said) == 1


def test_demo_names_what_is_missing_before_it_imports_anything(tmp_path, capsys):
    for name, files in {"one": ("dwi.nii.gz", "bvals"), "two": ("mask.nii.gz", "a_mask.nii.gz", "t.trk")}.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
    folders = [str(tmp_path / name) for name in ("one", "two", "none")]
    assert main(["demo", *(word for folder in folders for word in ("--subject", folder))]) == 2
    told = capsys.readouterr().err
    assert told.startswith("tractkit: 7 things are wrong:\n")
    for words in ("one: has no bvecs", "one: has no mask", "one: has no tractogram", "two: has no dwi",
                  "two: has no bvals", "two: has no bvecs", "none: is no folder"):
        assert told.count(words) == 1, words
    assert main(["demo", "--dwi", "no1.nii", "--bvals", "no2", "--bvecs", "no3", "--mask", "no4.nii",
                 "--tractogram", "no5.trk"]) == 2
    assert capsys.readouterr().err.count("no such file") == 5


def test_the_command_line_starts_light():
    """What finds a demo's files, and what reads a study's headers, loads neither torch nor DIPY."""
    code = ("import sys; import tractkit.cli.commands, tractkit.demo.subject_files, tractkit.hdf5.create; "
            "heavy = [m for m in ('torch', 'dipy', 'fury', 'matplotlib') if m in sys.modules]; "
            "assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_subjects_of_a_demo_are_checked(tmp_path):
    from tractkit.demo.pipeline import run_demo
    from tractkit.demo.subject_files import SubjectFiles

    subjects = []
    for name in ("one", "two"):
        t = make_subject(tmp_path / name, np.random.default_rng(0))
        (tmp_path / name / "lines.trk").write_bytes(b"no trk")
        world_volume(t.affine).save(tmp_path / name / "dwi.nii.gz")
        (tmp_path / name / "mask.nii.gz").write_bytes(b"no mask")
        (tmp_path / name / "bvals").write_text("0 1000 1000")
        (tmp_path / name / "bvecs").write_text("0 1 0\n0 0 1\n0 0 0\n")
        subjects.append(SubjectFiles.find(tmp_path / name))
    with pytest.raises(DataErrors) as e:
        run_demo(tmp_path / "out", subjects=subjects, progress=False)
    assert [error.file.split("/")[-2:] for error in e.value.errors] == [
        [name, file] for name in ("one", "two") for file in ("mask.nii.gz", "lines.trk")]
    assert not (tmp_path / "out").exists()
