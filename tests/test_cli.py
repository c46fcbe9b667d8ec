"""The command line: what is wrong with a person's files is one line that names the file, and leaves nothing behind."""

import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tractkit import cli, demo
from tractkit.cli import main
from tractkit.phantom import sample_subjects
from tractkit.tractogram import Tractogram
from tractkit.volume import Volume

pytestmark = pytest.mark.filterwarnings("ignore:The legacy descoteaux07:PendingDeprecationWarning")
NAMES = {"dwi": "dwi.nii.gz", "bvals": "bvals", "bvecs": "bvecs", "mask": "mask.nii.gz", "tractogram": "tractogram.trk"}


@pytest.fixture(scope="session")
def phantom() -> Path:
    return sample_subjects(3, progress=False)


@pytest.fixture
def mine(phantom, tmp_path) -> Path:
    """A person's folder, whose files a test may spoil."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in NAMES.values():
        shutil.copy(phantom / "sub-01" / name, folder / name)
    return folder


def words(folder, **other):
    """The five flags; another file for a name, or None to leave it out."""
    files = {flag: folder / name for flag, name in NAMES.items()} | other
    return [text for flag, path in files.items() if path is not None for text in (f"--{flag}", str(path))]


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Run `tractkit demo` on words that must be refused: its one line of complaint. Nothing may be left behind."""
    def stop(*args):
        raise KeyboardInterrupt  # what is not refused is not run for minutes

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "_do", stop)

    def run(*args) -> str:
        before = sorted(tmp_path.rglob("*"))
        code = main(["demo", "--no-html", *map(str, args)])
        out, err = capsys.readouterr()
        assert code == 2
        assert out == "" and err.startswith("tractkit: ") and err.endswith("\n") and err.count("\n") == 1, (out, err)
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run


@pytest.mark.parametrize("flag", NAMES)
@pytest.mark.parametrize("out", [["--out", "results/new"], []])
def test_a_wrong_path_is_named(mine, refused, flag, out):
    wrong = mine / "elsewhere" / NAMES[flag]
    assert str(wrong) in refused(*words(mine, **{flag: wrong}), *out)


@pytest.mark.parametrize("flag", ["dwi", "mask", "tractogram"])
def test_a_damaged_file_is_named(mine, refused, flag):
    path = mine / NAMES[flag]
    path.write_bytes(path.read_bytes()[:400])
    assert str(path) in refused(*words(mine))


@pytest.mark.parametrize("flag", ["bvals", "bvecs"])
def test_a_gradient_table_of_words_is_named(mine, refused, flag):
    (mine / NAMES[flag]).write_text("no numbers\n")
    assert str(mine / NAMES[flag]) in refused(*words(mine))


def test_a_mask_of_another_shape_is_named(mine, refused):
    mask = Volume.load(mine / "mask.nii.gz", dtype=np.uint8)
    Volume(mask.data[:-1], mask.affine).save(mine / "mask.nii.gz")
    message = refused(*words(mine))
    assert str(mine / "mask.nii.gz") in message and "47" in message and "48" in message


def test_a_mask_on_a_shifted_grid_is_named(mine, refused):
    mask = Volume.load(mine / "mask.nii.gz", dtype=np.uint8)
    affine = mask.affine.copy()
    affine[0, 3] += 7
    Volume(mask.data, affine).save(mine / "mask.nii.gz")
    assert str(mine / "mask.nii.gz") in refused(*words(mine))


def test_bvals_that_do_not_fit_are_named(mine, refused):
    values = (mine / "bvals").read_text().split()
    (mine / "bvals").write_text(" ".join(values[:-1]) + "\n")
    message = refused(*words(mine))
    assert str(mine / "bvals") in message and f"{len(values) - 1} b-values for {len(values)} volumes" in message


def test_bvecs_that_do_not_fit_are_named(mine, refused):
    np.savetxt(mine / "bvecs", np.loadtxt(mine / "bvecs")[:, :-2] if np.loadtxt(mine / "bvecs").shape[0] == 3
               else np.loadtxt(mine / "bvecs")[:-2])
    assert str(mine / "bvecs") in refused(*words(mine))


def test_a_tractogram_outside_the_volume_is_named(mine, refused):
    path = mine / "tractogram.trk"
    t = Tractogram.load(path)
    moved = nib.streamlines.Tractogram([line + [40, 0, 0] for line in t.rasmm()], affine_to_rasmm=np.eye(4))
    nib.streamlines.save(moved, path, header=nib.streamlines.load(path).header)
    message = refused(*words(mine))
    assert str(path) in message and "leave the volume" in message


def test_a_tractogram_of_another_grid_is_named(mine, refused):
    path = mine / "tractogram.trk"
    t = Tractogram.load(path)
    affine = t.affine.copy()
    affine[:3, 3] += 25
    Tractogram(t.streamlines, affine, t.dimensions).save(path)
    assert str(path) in refused(*words(mine))


def test_all_five_files_are_asked_for(mine, refused):
    message = refused(*words(mine, bvals=None, tractogram=None))
    assert "--bvals, --tractogram" in message and "--dwi" not in message


def test_folders_and_single_files_do_not_mix(mine, refused):
    assert "--subject" in refused("--subject", mine, "--dwi", mine / "dwi.nii.gz")


def test_a_folder_without_a_tractogram_is_named(mine, refused):
    (mine / "tractogram.trk").unlink()
    message = refused("--subject", mine)
    assert f"{mine}: has no tractogram" in message


def test_a_folder_that_is_none_is_named(mine, refused):
    assert str(mine / "bvals") in refused("--subject", mine, "--subject", mine / "bvals")


def test_two_candidates_are_a_question(mine, refused):
    (mine / "tractogram.trk").rename(mine / "left.trk")
    shutil.copy(mine / "left.trk", mine / "right.trk")
    message = refused("--subject", mine)
    assert "left.trk, right.trk" in message and str(mine) in message


def test_one_name_for_two_subjects_is_refused(mine, refused, phantom):
    assert "mine" in refused("--subject", mine, "--subject", mine, "--subject", phantom / "sub-02")


@pytest.mark.parametrize("spoiled", ["first", "last"])
def test_one_bad_subject_of_several_stops_before_anything_is_written(mine, refused, phantom, spoiled):
    (mine / "bvals").write_text("0 1000\n")
    good = [phantom / "sub-02", phantom / "sub-03"]
    folders = [mine, *good] if spoiled == "first" else [*good, mine]
    assert str(mine / "bvals") in refused(*(w for f in folders for w in ("--subject", f)))


def test_a_folder_with_other_things_is_left_alone(tmp_path, refused):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    for more in ([], ["--fresh"]):
        assert str(tmp_path / "thesis") in refused("--out", tmp_path / "thesis", *more)


def test_an_out_that_is_a_file_is_named(tmp_path, refused):
    (tmp_path / "notes.txt").write_text("notes")
    assert str(tmp_path / "notes.txt") in refused("--out", tmp_path / "notes.txt")


@pytest.mark.parametrize("epochs", ["0", "-3", "many"])
def test_epochs_are_a_positive_number(epochs, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--epochs", epochs, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2 and "--epochs" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_help_and_version_are_quick_and_import_nothing_heavy():
    code = ("import sys; from tractkit.cli import main; main(['--version']); main([]);"
            "sys.exit(bool({'torch', 'fury', 'matplotlib', 'dipy', 'numba'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("tractkit") and "demo" in done.stdout


def test_lab_without_jupyterlab_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert main(["lab"]) == 2
    assert "pip install 'tractkit[lab]'" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_lab_copies_tutorials_and_keeps_what_was_changed(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(cli.subprocess, "call", lambda words: called.append(words) or 0)
    monkeypatch.setattr(cli, "find_spec", lambda name: object())
    names = [p.name for p in cli.resources.files("tractkit.tutorials").iterdir() if p.name.endswith(".ipynb")]
    assert names
    for before, now in (("", "{"), ("changed by me", "changed by me")):
        if before:
            for name in names:
                (tmp_path / "mine" / name).write_text(before)
        with pytest.raises(SystemExit) as ended:
            main(["lab", "--folder", str(tmp_path / "mine")])
        assert ended.value.code == 0
        assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == sorted(names)
        assert all((tmp_path / "mine" / name).read_text().startswith(now) for name in names)
    assert called[0][1:3] == ["-m", "jupyterlab"] and called[0][3].startswith(str(tmp_path / "mine"))
