"""`tractkit view`: files in, one page or picture out; what is wrong is one line."""

import re
import shutil

import numpy as np
import pytest
from helpers_data import make_file
from helpers_scene import AFFINES, SHAPE, wavy
from PIL import Image

from tractkit.cli.commands import main
from tractkit.spatial.volume import Volume


@pytest.fixture
def folder(tmp_path, monkeypatch):
    t = wavy(30)
    t.save(tmp_path / "left.trk")
    t.save(tmp_path / "right.tck")
    Volume(np.ones(SHAPE, np.float32), AFFINES["LAS anisotropic"]).save(tmp_path / "t1.nii.gz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_volumes_and_tractograms_become_a_page_named_after_the_first(folder, capsys):
    assert main(["view", "left.trk", "right.tck", "t1.nii.gz"]) == 0
    assert re.search(r"left.html: 0.\d MB", capsys.readouterr().out)
    text = (folder / "left.html").read_text()
    for name in ("left", "right", "t1"):
        assert f'"name":"{name}"' in text
    assert text.count('"paint":"one"') == 2  # several tractograms are told apart by color
    before = text
    assert main(["view", "left.trk"]) == 2
    assert "left.html: exists already. Give --overwrite" in capsys.readouterr().err
    assert (folder / "left.html").read_text() == before
    assert main(["view", "left.trk", "-f", "--max_streamlines", "7"]) == 0
    assert "7 of 30 streamlines are in the page" in capsys.readouterr().out


def test_a_subject_of_a_data_file(folder, capsys):
    path, _ = make_file(folder, n_subjects=2)
    assert main(["view", str(path), "--out", "all.html"]) == 0
    assert "sub-0:" in capsys.readouterr().err and '"name":"input"' in (folder / "all.html").read_text()
    assert main(["view", str(path), "--subject", "sub-1", "--out", "one.html"]) == 0
    assert "sub-1:" in capsys.readouterr().err
    assert main(["view", str(path), "--subject", "me", "--out", "me.html"]) == 2
    assert "no subject 'me'. There are sub-0, sub-1" in capsys.readouterr().err


def test_a_png_is_a_still(folder, capsys):
    assert main(["view", "left.trk", "--out", "left.png", "--view", "axial"]) == 0
    assert np.asarray(Image.open("left.png").convert("L")).max() > 100


@pytest.mark.parametrize(("words", "said"), [
    (["left.trk", "--out", "x.svg"], "a view is written as .html, a page to turn, or .png, a still, not as '.svg'"),
    (["nobody.trk"], "nobody.trk: no such file"),
    (["right.tck"], "a .tck does not know its grid. Give a volume of the subject with it"),
    (["notes.txt"], "notes.txt: neither a volume, a tractogram nor a data file by its ending"),
    (["left.trk", "--colors", "nobody"], "colors 'nobody' is neither a color nor one of direction, groups"),
    (["half.trk"], "half.trk: "),
    (["study.hdf5", "left.trk"], "a data file is shown alone"),
])
def test_what_is_wrong_is_one_line_and_leaves_nothing(folder, capsys, words, said):
    shutil.copy("left.trk", "half.trk")
    with open("half.trk", "r+b") as f:
        f.truncate(1500)
    before = sorted(folder.iterdir())
    assert main(["view", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("tractkit: ") and error.count("\n") == 1
    assert sorted(folder.iterdir()) == before
