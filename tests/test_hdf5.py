"""hdf5: what is written is what was read, laid out as dwi_ml's, or nothing at all."""

import warnings

import h5py
import nibabel as nib
import numpy as np
import pytest
from helpers_data import CONFIG, SHAPE, make_file, make_subject, random_lines, world_volume

import tractkit.hdf5 as module
from tractkit.files import DataError, data_folder
from tractkit.hdf5 import (
    create_hdf5,
    hdf5_fingerprint,
    open_hdf5,
    part_ids,
)
from tractkit.streamlines import Streamlines
from tractkit.tractogram import Tractogram
from tractkit.volume import Volume


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_file(tmp_path_factory.mktemp("made"))


def test_layout_and_values(made):
    path, sources = made
    with h5py.File(path) as h5:
        for name, t in sources.items():
            g, v = h5[name]["streamlines"], h5[name]["input"]
            assert g["data"].dtype == np.float32 and g["offsets"].dtype == g["lengths"].dtype == np.int64
            assert np.array_equal(g["offsets"], t.streamlines.offsets[:-1]) and np.array_equal(g["lengths"], t.streamlines.nb_points)
            assert np.allclose(g["data"][:] - 0.5, t.streamlines.points, atol=1e-4)  # corner on disk
            rasmm = nib.affines.apply_affine(t.affine, g["data"][:] - 0.5)
            mm = np.linalg.norm(np.diff(rasmm, axis=0), axis=1)
            for i in (0, 7, len(t) - 1):
                a, n = g["offsets"][i], g["lengths"][i]
                assert g["euclidean_lengths"][i] == pytest.approx(mm[a:a + n - 1].sum(), abs=1e-3)
            assert np.array_equal(g["data_per_streamline/bundle"][:, 0], np.arange(len(t)))
            assert (g.attrs["type"], g.attrs["space"], g.attrs["origin"]) == ("streamlines", "Space.VOX", "Origin.TRACKVIS")
            assert np.allclose(g.attrs["affine"], t.affine) and tuple(g.attrs["dimensions"]) == SHAPE
            assert v["data"].shape == (*SHAPE, 3) and v.attrs["nb_features"] == 3
            assert np.allclose(v["data"][:], world_volume(t.affine).data, atol=1e-3)
        assert list(h5.attrs["training_subjs"]) == ["sub-0"] and list(h5.attrs["testing_subjs"]) == ["sub-2"]
        assert h5.attrs["step_size"] == "Not defined by user"


def test_datasets_are_aligned(made):
    with h5py.File(made[0]) as h5:
        offsets = []
        h5.visititems(lambda _, item: offsets.append(item.id.get_offset()) if isinstance(item, h5py.Dataset) else None)
    assert offsets and all(o % 64 == 0 for o in offsets)


@pytest.mark.parametrize("suffix", [".tck", ".trx"])
def test_other_formats(tmp_path, suffix):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t = make_subject(tmp_path / "a", np.random.default_rng(1), suffix=suffix)
    config = {**CONFIG, "streamlines": {"type": "streamlines", "files": "lines.*"}}
    path = create_hdf5(tmp_path, tmp_path / "x.hdf5", config, {"training": ["a"]}, progress=False)
    with h5py.File(path) as h5:
        assert np.allclose(h5["a/streamlines/data"][:] - 0.5, t.streamlines.points, atol=1e-4)
        assert np.allclose(h5["a/streamlines"].attrs["affine"], t.affine, atol=1e-5)


def test_several_files_are_stacked_and_joined(tmp_path):
    t = make_subject(tmp_path / "a", np.random.default_rng(1))
    t[5:9].save(tmp_path / "a/more.trk")
    fa = np.random.default_rng(2).random(SHAPE).astype(np.float32)
    Volume(fa, t.affine).save(tmp_path / "a/fa.nii.gz")
    config = {"input": {"type": "volume", "files": ["xyz.nii.gz", "fa*"], "standardization": "none"},
              "streamlines": {"type": "streamlines", "files": ["*.trk"], "dps_keys": "bundle"}}
    with h5py.File(create_hdf5(tmp_path, tmp_path / "x.hdf5", config, {"training": ["a"]}, progress=False)) as h5:
        assert np.array_equal(h5["a/input/data"][..., 3], fa)
        assert h5["a/streamlines/data_per_streamline/bundle"][-4:, 0].tolist() == [5, 6, 7, 8]
        assert len(h5["a/streamlines/lengths"]) == len(t) + 4


def test_parts_of_one_subject(tmp_path):
    t = make_subject(tmp_path / "a", np.random.default_rng(0), n=101)
    shares = {"training": ["a 0.8"], "validation": ["a 0.1"], "testing": ["a 0.1"]}
    path = create_hdf5(tmp_path, tmp_path / "x.hdf5", CONFIG, shares, progress=False)
    with h5py.File(path) as h5:
        groups = {s: h5[f"a_{s}/streamlines"] for s in ("training", "validation", "testing")}
        ids = {s: g["source_ids"][:] for s, g in groups.items()}
        assert sorted(np.concatenate(list(ids.values()))) == list(range(101)) and len(ids["training"]) == 81
        for s, g in groups.items():
            assert np.allclose(g["data"][:] - 0.5, t.streamlines[ids[s]].points, atol=1e-4)
            assert np.array_equal(g["data_per_streamline/bundle"][:, 0], ids[s])
        assert h5["a_training/input/data"] == h5["a_testing/input/data"]  # one dataset, not a copy
    assert not np.array_equal(part_ids(101, (0, 0.8), 0, "a"), part_ids(101, (0, 0.8), 1, "a"))


def test_nothing_is_written_when_a_file_is_missing(tmp_path, monkeypatch):
    make_file(tmp_path)
    (tmp_path / "sub-2/lines.trk").unlink()
    monkeypatch.setattr(module, "_write_subject", lambda *a: pytest.fail("wrote before all files were checked"))
    with pytest.raises(DataError, match="no such file") as e:
        create_hdf5(tmp_path, tmp_path / "new.hdf5", CONFIG, {"training": ["sub-0", "sub-1", "sub-2"]}, progress=False)
    assert (e.value.subject, e.value.group) == ("sub-2", "streamlines") and not (tmp_path / "new.hdf5").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_leaves_the_old_file(tmp_path, monkeypatch, error):
    path, _ = make_file(tmp_path)
    before = path.read_bytes()
    with pytest.raises(DataError, match="exists already"):
        create_hdf5(tmp_path, path, CONFIG, {"training": ["sub-0"]}, progress=False)
    write = module._write_streamlines

    def stop(*args):
        write(*args)
        raise error

    monkeypatch.setattr(module, "_write_streamlines", stop)
    with pytest.raises(error):
        create_hdf5(tmp_path, path, CONFIG, {"training": ["sub-0"]}, overwrite=True, progress=False)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["data.hdf5"]


def test_streamlines_outside(tmp_path):
    t = make_subject(tmp_path / "a", np.random.default_rng(0), n=20)
    lines = t.streamlines.to_list()
    lines[3] = lines[3] + 20
    lines[11] = np.zeros((0, 3))
    Tractogram(Streamlines.from_list(lines), t.affine, SHAPE, dps=t.dps).save(tmp_path / "a/lines.trk")
    out = tmp_path / "x.hdf5"
    with pytest.raises(DataError, match="2 of 20 streamlines") as e:
        create_hdf5(tmp_path, out, CONFIG, {"training": ["a"]}, progress=False)
    assert e.value.file.endswith("lines.trk") and "remove_invalid" in e.value.fix and not out.exists()
    with pytest.warns(UserWarning, match="2 of 20 streamlines"):
        create_hdf5(tmp_path, out, CONFIG, {"training": ["a"]}, remove_invalid=True, progress=False)
    with h5py.File(out) as h5:
        g = h5["a/streamlines"]
        assert g.attrs["tractkit_removed"] == 2
        assert g["data_per_streamline/bundle"][:, 0].tolist() == [i for i in range(20) if i not in (3, 11)]


def test_streamlines_outside_a_smaller_volume(tmp_path):
    t = make_subject(tmp_path / "a", np.random.default_rng(0), n=20)
    Volume(np.ones((4, 4, 4), np.float32), t.affine).save(tmp_path / "a/xyz.nii.gz")
    out = ((t.streamlines.points > 3.501).any(1))
    n = len(np.unique(t.streamlines.ids[out]))
    assert n > 0
    with pytest.raises(DataError, match=f"{n} of 20 streamlines"):
        create_hdf5(tmp_path, tmp_path / "x.hdf5", CONFIG, {"training": ["a"]}, progress=False)


def test_options_for_points(tmp_path):
    path, sources = make_file(tmp_path, step_size=0.7)
    with h5py.File(path) as h5:
        assert h5.attrs["step_size"] == 0.7
        expected = np.maximum(1, np.floor(sources["sub-0"].lengths_mm / 0.7 + 0.5)) + 1
        assert np.array_equal(h5["sub-0/streamlines/lengths"], expected)
    for options, check in [({"nb_points": 12}, lambda n, old: (n == 12).all()), ({"compress": 0.3}, lambda n, old: n.sum() < old.sum() / 2)]:
        create_hdf5(tmp_path, path, CONFIG, {"training": ["sub-0"]}, overwrite=True, progress=False, **options)
        with h5py.File(path) as h5:
            assert check(h5["sub-0/streamlines/lengths"][:], sources["sub-0"].streamlines.nb_points)
    with pytest.raises(ValueError, match="at most one"):
        create_hdf5(tmp_path, path, CONFIG, {"training": ["sub-0"]}, overwrite=True, step_size=1, nb_points=3)


def test_fingerprint(tmp_path):
    path, sources = make_file(tmp_path)
    splits = {"training": ["sub-0"], "validation": ["sub-1"], "testing": ["sub-2"]}
    again = create_hdf5(tmp_path, tmp_path / "again.hdf5", CONFIG, splits, progress=False)
    assert hdf5_fingerprint(path) == hdf5_fingerprint(again)
    with h5py.File(again, "a") as h5:  # not ours: no checksums kept
        del h5.attrs["tractkit_fingerprint"]
        for subject in h5.values():
            for group in subject.values():
                del group.attrs["tractkit_checksum"]
    assert hdf5_fingerprint(again) == hdf5_fingerprint(path)
    with h5py.File(again, "a") as h5:
        h5["sub-1/input/data"][3, 4, 5, 0] += 1
    assert hdf5_fingerprint(again) != hdf5_fingerprint(path)
    other = create_hdf5(tmp_path, tmp_path / "other.hdf5", CONFIG, {"training": ["sub-0", "sub-1"], "testing": ["sub-2"]}, progress=False)
    assert hdf5_fingerprint(other) != hdf5_fingerprint(path)


@pytest.mark.parametrize("damage", ["truncated image", "truncated tractogram", "text", "nan", "other grid", "missing dps"])
def test_bad_sources(tmp_path, damage):
    t = make_subject(tmp_path / "a", np.random.default_rng(0))
    image, lines = tmp_path / "a/xyz.nii.gz", tmp_path / "a/lines.trk"
    config = CONFIG
    if damage == "truncated image":
        image.write_bytes(image.read_bytes()[:-300])
    elif damage == "truncated tractogram":
        lines.write_bytes(lines.read_bytes()[:-10])
    elif damage == "text":
        lines.write_text("streamlines")
    elif damage == "nan":
        v = world_volume(t.affine)
        v.data[1, 1, 1, 1] = np.nan
        v.save(image)
    elif damage == "other grid":
        Volume(np.ones(SHAPE, np.float32), np.eye(4)).save(tmp_path / "a/fa.nii.gz")
        config = {"input": {**CONFIG["input"], "files": ["xyz.nii.gz", "fa.nii.gz"]}}
    elif damage == "missing dps":
        config = {**CONFIG, "streamlines": {**CONFIG["streamlines"], "dps_keys": "bundel"}}
    with pytest.raises(DataError) as e:
        create_hdf5(tmp_path, tmp_path / "x.hdf5", config, {"training": ["a"]}, progress=False)
    assert "/a/" in e.value.file and not list(tmp_path.glob("*.hdf5"))


def test_open_says_what_is_wrong(tmp_path):
    with pytest.raises(DataError, match="Check the path"):
        open_hdf5(tmp_path / "none.hdf5")
    (tmp_path / "text.hdf5").write_text("no")
    with pytest.raises(DataError, match="no HDF5 file"):
        open_hdf5(tmp_path / "text.hdf5")
    with h5py.File(tmp_path / "empty.hdf5", "w"):
        pass
    with pytest.raises(DataError, match="training_subjs"):
        open_hdf5(tmp_path / "empty.hdf5")


@pytest.mark.real
@pytest.mark.skipif(data_folder() is None, reason="TRACTKIT_DATA is not set")
@pytest.mark.parametrize("options", [{}, {"one_file_per_subject": True}])
def test_same_as_dwi_ml(tmp_path, options):
    """The sample's sources give the sample: every dataset and attribute, their kinds, shapes and values; points
    float32 instead of float64."""
    sample = data_folder() / "dwi_ml_sample"
    lists = [sample / f"source/{s}.txt" for s in ("train", "valid", "test")]
    path = create_hdf5(sample / "source/ready", tmp_path / "x.hdf5", sample / "source/config.json", lists, progress=False, **options)
    with h5py.File(path) as ours, h5py.File(sample / "data.hdf5") as theirs:
        compared = [compare_items(ours, theirs, skip=("data_and_time", "chosen_subjs"))]
        assert sorted(ours.attrs["chosen_subjs"]) == sorted(theirs.attrs["chosen_subjs"])  # dwi_ml has them in the order of a set
        theirs.visit(lambda name: compared.append(compare_items(ours[name], theirs[name])))
        assert len(compared) == 1 + 3 * (1 + 2 + 2 + 8)
        extra = []
        for subject in theirs:
            ours[subject].visit(lambda name, of=theirs[subject]: None if name in of else extra.append(name))
        assert not extra  # nothing that dwi_ml does not know, in a file that asks for nothing else
        assert ours["sub-1/streamlines/data"].dtype == np.float32 and theirs["sub-1/streamlines/data"].dtype == np.float64


def compare_items(ours, theirs, skip=()):
    """Everything that `theirs` has is in `ours`: same kind, type, shape and value."""
    assert type(ours) is type(theirs), theirs.name
    for key in theirs.attrs.keys() - set(skip):
        mine, other = ours.attrs[key], theirs.attrs[key]
        assert type(mine) is type(other) and np.asarray(mine).dtype == np.asarray(other).dtype and np.shape(mine) == np.shape(other), (theirs.name, key)
        assert ours.attrs.get_id(key).dtype == theirs.attrs.get_id(key).dtype
        assert np.allclose(mine, other, rtol=1e-5) if np.asarray(other).dtype.kind in "fi" else np.array_equal(mine, other), (theirs.name, key)
    if isinstance(theirs, h5py.Dataset):
        assert ours.shape == theirs.shape and ours.chunks == theirs.chunks and ours.compression == theirs.compression
        assert ours.dtype == theirs.dtype or (theirs.name.endswith("streamlines/data") and ours.dtype.kind == theirs.dtype.kind), theirs.name
        assert np.array_equal(ours[()], theirs[()]) if theirs.dtype.kind in "bi" else np.allclose(ours[()], theirs[()], rtol=1e-5, atol=2e-5), theirs.name


def test_random_lines_stay_inside():
    s = random_lines(np.random.default_rng(0), 200)
    assert (s.points >= 0).all() and (s.points <= np.array(SHAPE) - 1).all()
