"""Text files as editors write them, numbers that float32 does not hold, masks of few voxels, .mgz, no terminal."""

import warnings
from dataclasses import replace

import h5py
import nibabel as nib
import numpy as np
import pytest
from helpers_data import CONFIG, SHAPE, make_subject, random_lines

from tractkit.cli.commands import main
from tractkit.core.files import DataError
from tractkit.dwi.sh import load_sh
from tractkit.dwi.space_check import check_space
from tractkit.hdf5.config import read_config, read_splits
from tractkit.hdf5.create import create_hdf5
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume


def test_lists_and_configs_as_editors_write_them(tmp_path):
    for name in ("a", "b c", "d"):
        (tmp_path / name).mkdir()
    text = "\ufeff# who trains\r\na\t0.5  # half\r\n\r\nb c\r\n  d 0.25\r\n"
    (tmp_path / "list.txt").write_bytes(text.encode())
    found = read_splits({"training": tmp_path / "list.txt"}, tmp_path)["training"]
    assert [(e.subject, e.part) for e in found] == [("a", (0, 0.5)), ("b c", None), ("d", (0, 0.25))]
    for name, text in (("c.json", '{"s": {"type": "streamlines", "files": "a.trk"}}'),
                       ("c.yaml", "s: {type: streamlines, files: a.trk}\n")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert list(read_config(tmp_path / name)) == ["s"]


@pytest.mark.parametrize("kind", ["utf-8", "utf-16", "no text", "too long", "a folder", "missing"])
def test_texts_that_a_user_gives_are_read_or_named(tmp_path, monkeypatch, kind):
    image = tmp_path / "sh.nii.gz"
    Volume(np.zeros((2, 2, 2, 6), np.float32), np.eye(4)).save(image)
    (tmp_path / "a").mkdir()
    texts = {"list.txt": "a\r\n", "c.yaml": "s: {type: streamlines, files: ü.trk}\r\n",
             "c.json": '{"s": {"type": "streamlines", "files": "ü.trk"}}', "sh.json": '{"kind": "fodf", "sh_order": 2}'}
    reads = {"list.txt": lambda file: read_splits({"training": file}, tmp_path), "c.yaml": read_config,
             "c.json": read_config, "sh.json": lambda file: load_sh(image)}
    for name, text in texts.items():
        file, encoding = tmp_path / name, kind if kind.startswith("utf") else "utf-8-sig"
        file.write_bytes(b"\xfa\xce\x80\x00" if kind == "no text" else text.encode(encoding))
        if kind == "too long":
            monkeypatch.setattr("tractkit.core.text._MOST_TEXT", 2)
        elif kind in ("a folder", "missing"):
            file.unlink()
            if kind == "a folder":
                file.mkdir()
        if kind.startswith("utf"):
            assert reads[name](file)
            continue
        with pytest.raises(DataError, match={"no text": "no text", "too long": "more than"}.get(kind, ".")) as e:
            reads[name](file)
        assert e.value.file == str(file), name


@pytest.mark.parametrize("text", ['{"EchoTime": 0.09}', "[1]", "no JSON"])
def test_a_json_beside_an_image_need_not_be_about_coefficients(tmp_path, text):
    make_subject(tmp_path / "a", np.random.default_rng(0))
    (tmp_path / "a/xyz.json").write_text(text)  # BIDS has one beside each image
    create_hdf5(tmp_path, tmp_path / "data.hdf5", CONFIG, {"training": ["a"]}, progress=False)
    Volume(np.random.default_rng(0).random((4, 4, 4, 6)), np.eye(4)).save(tmp_path / "sh.nii.gz")
    (tmp_path / "sh.json").write_text(text)
    assert check_space(sh=tmp_path / "sh.nii.gz").findings[0].status != "wrong"


def test_whole_numbers_that_float32_does_not_hold(tmp_path):
    t = make_subject(tmp_path / "a", np.random.default_rng(0))
    ids = np.arange(len(t)) + 2**24
    replace(t, dps={"id": ids, "bundle": ids - 2**24}, dpp={"at": np.full(len(t.streamlines.points), 2**25 + 1)}).save(
        tmp_path / "a/lines.trx")
    lines = {"type": "streamlines", "files": "lines.trx", "dps_keys": "*", "dpp_keys": "*"}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        create_hdf5(tmp_path, tmp_path / "x.hdf5", CONFIG | {"streamlines": lines}, {"training": ["a"]}, progress=False)
    told = [str(w.message) for w in said]
    assert len(told) == 2 and all("over 2^24 are rounded" in text for text in told)
    assert "a/streamlines: data_per_streamline 'id'" in told[0] and "data_per_point 'at'" in told[1]


def test_a_mask_of_few_voxels_is_said(tmp_path):
    """Without a mask, statistics are over voxels that are zero in no feature: one feature may leave few of them."""
    t = make_subject(tmp_path / "a", np.random.default_rng(0))
    sparse = np.zeros(SHAPE, np.float32)
    sparse.flat[:10] = np.arange(1, 11)
    Volume(sparse, t.affine).save(tmp_path / "a/sparse.nii.gz")
    group = {"type": "volume", "files": ["xyz.nii.gz", "sparse.nii.gz"], "standardization": "all"}
    with pytest.warns(UserWarning, match="a/input: .* are taken over 10 of 1,386 voxels .* std_mask"):
        create_hdf5(tmp_path, tmp_path / "x.hdf5", CONFIG | {"input": group}, {"training": ["a"]}, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_hdf5(tmp_path, tmp_path / "y.hdf5", CONFIG | {"input": group | {"files": "xyz.nii.gz"}},
                    {"training": ["a"]}, progress=False)


def test_mgz(tmp_path):
    """FreeSurfer's format is read as nibabel reads it; a damaged file is one error."""
    data = np.random.default_rng(0).random((5, 6, 7)).astype(np.float32)
    affine = np.diag([2.0, 3, 4, 1])
    nib.save(nib.MGHImage(data, affine), tmp_path / "fa.mgz")
    volume = Volume.load(tmp_path / "fa.mgz")
    assert np.array_equal(volume.data, data) and np.allclose(volume.affine, affine)
    assert Volume.load(tmp_path / "fa.mgz", dtype=bool).data.dtype == bool
    (tmp_path / "a").mkdir()
    nib.save(nib.MGHImage(data, affine), tmp_path / "a/fa.mgz")
    Tractogram(random_lines(np.random.default_rng(1), 9, (5, 6, 7)), affine, (5, 6, 7)).save(tmp_path / "a/t.trk")
    config = {"input": {"type": "volume", "files": "fa.mgz", "standardization": "none"},
              "streamlines": {"type": "streamlines", "files": "t.trk"}}
    with h5py.File(create_hdf5(tmp_path, tmp_path / "x.hdf5", config, {"training": ["a"]}, progress=False)) as h5:
        assert np.array_equal(h5["a/input/data"][..., 0], data)
    (tmp_path / "fa.mgz").write_bytes((tmp_path / "fa.mgz").read_bytes()[:200])
    with pytest.raises(DataError, match="fa.mgz: cannot be read"):
        Volume.load(tmp_path / "fa.mgz")


def test_no_bars_without_a_terminal(tmp_path, capsys):
    make_subject(tmp_path / "a", np.random.default_rng(0))
    (tmp_path / "c.json").write_text('{"s": {"type": "streamlines", "files": "lines.trk"}}')
    assert main(["hdf5", "create", *(str(tmp_path / f) for f in ("", "x.hdf5", "c.json")), "--training", "a"]) == 0
    assert main(["hdf5", "validate", str(tmp_path / "x.hdf5")]) == 0
    assert capsys.readouterr().err == ""
