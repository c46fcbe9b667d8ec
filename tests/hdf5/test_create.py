"""hdf5: what is written is what was read, laid out as dwi_ml's, or nothing at all."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings

import h5py
import nibabel as nib
import numpy as np
import pytest
from helpers_data import CONFIG, SHAPE, make_file, make_subject, random_lines, world_volume

import tractkit.hdf5.create as module
from tractkit.core.files import DataError
from tractkit.hdf5 import layout, write_subjects
from tractkit.hdf5.config import ProcessingOptions, SplitEntry
from tractkit.hdf5.create import add_subject, create_hdf5
from tractkit.hdf5.layout import group_checksum, hdf5_fingerprint, open_hdf5
from tractkit.hdf5.write_subjects import part_ids
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_file(tmp_path_factory.mktemp("made"))


def test_layout_and_values(made):
    path, sources = made
    with h5py.File(path) as h5:
        for name, t in sources.items():
            g, v = h5[name]["streamlines"], h5[name]["input"]
            assert g["data"].dtype == np.float32 and g["offsets"].dtype == g["lengths"].dtype == np.int64
            assert np.array_equal(g["offsets"], t.streamlines.offsets[:-1]) and np.array_equal(
                g["lengths"], t.streamlines.nb_points
            )
            assert np.allclose(g["data"][:] - 0.5, t.streamlines.points, atol=1e-4)  # corner on disk
            rasmm = nib.affines.apply_affine(t.affine, g["data"][:] - 0.5)
            mm = np.linalg.norm(np.diff(rasmm, axis=0), axis=1)
            for i in (0, 7, len(t) - 1):
                a, n = g["offsets"][i], g["lengths"][i]
                assert g["euclidean_lengths"][i] == pytest.approx(mm[a:a + n - 1].sum(), abs=1e-3)
            assert np.array_equal(g["data_per_streamline/bundle"][:, 0], np.arange(len(t)))
            assert (g.attrs["type"], g.attrs["space"], g.attrs["origin"]) == (
                "streamlines",
                "Space.VOX",
                "Origin.TRACKVIS",
            )
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
    monkeypatch.setattr(module, "write_subjects", lambda *a: pytest.fail("wrote before all files were checked"))
    with pytest.raises(DataError, match="no such file") as e:
        create_hdf5(tmp_path, tmp_path / "new.hdf5", CONFIG, {"training": ["sub-0", "sub-1", "sub-2"]}, progress=False)
    assert (e.value.subject, e.value.group) == ("sub-2", "streamlines") and not (tmp_path / "new.hdf5").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_leaves_the_old_file(tmp_path, monkeypatch, error):
    path, _ = make_file(tmp_path)
    before = path.read_bytes()
    with pytest.raises(DataError, match="exists already"):
        create_hdf5(tmp_path, path, CONFIG, {"training": ["sub-0"]}, progress=False)
    write = write_subjects.write_streamlines

    def stop(*args, **options):
        write(*args, **options)
        raise error

    monkeypatch.setattr(write_subjects, "write_streamlines", stop)
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
    for options, check in [
        ({"nb_points": 12}, lambda n, old: (n == 12).all()),
        ({"compress": 0.3}, lambda n, old: n.sum() < old.sum() / 2),
    ]:
        create_hdf5(tmp_path, path, CONFIG, {"training": ["sub-0"]}, overwrite=True, progress=False, **options)
        with h5py.File(path) as h5:
            assert check(h5["sub-0/streamlines/lengths"][:], sources["sub-0"].streamlines.nb_points)
    with pytest.raises(ValueError, match="at most one"):
        create_hdf5(tmp_path, path, CONFIG, {"training": ["sub-0"]}, overwrite=True, step_size=1, nb_points=3)


@pytest.mark.parametrize(
    "options",
    [
        {"step_size": 0},
        {"step_size": -1.0},
        {"step_size": np.nan},
        {"step_size": np.inf},
        {"step_size": "1"},
        {"step_size": True},
        {"nb_points": 1},
        {"nb_points": 12.0},
        {"compress": -0.1},
        {"compress": np.inf},
        {"seed": 1.5},
        {"compression": "zip"},
    ],
)
def test_bad_numbers_are_refused_before_anything_is_read(tmp_path, options):
    (name, value), = options.items()
    with pytest.raises(ValueError, match=rf"^{name} (must be|is) .*not {re.escape(repr(value))}$"):
        create_hdf5(tmp_path, tmp_path / "x.hdf5", CONFIG, {"training": ["nobody"]}, **options)


def test_folders_given_as_files(tmp_path):
    (tmp_path / "out").mkdir()
    for overwrite in (False, True):
        with pytest.raises(DataError, match="out: is a folder"):
            create_hdf5(tmp_path, tmp_path / "out", CONFIG, {"training": ["a"]}, overwrite=overwrite)
    with pytest.raises(DataError, match="out: cannot be opened .*It is a folder: give the data file"):
        open_hdf5(tmp_path / "out")


FULL_DISK = """
import resource, sys, warnings
from tractkit.core.files import DataError
from tractkit.hdf5.create import add_subject, create_hdf5
from helpers_data import CONFIG
if __name__ == "__main__":
    how, root = sys.argv[1], sys.argv[2]
    each = {"one_file_per_subject": True}
    options = {"add": each, "one": {}, "each": each, "children": {"processes": 2}}[how]
    options = {"progress": False, "overwrite": True, **options}
    create = lambda: create_hdf5(root, root + "/x.hdf5", CONFIG, {"training": ["sub-0"]}, **options)
    if how == "add":
        create()
    resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, resource.RLIM_INFINITY))
    try:
        add_subject(root + "/x.hdf5", root, "sub-1", "testing", progress=False) if how == "add" else create()
    except DataError as e:
        print(e)
"""


@pytest.mark.linux
@pytest.mark.parametrize("how", ["one", "each", "children", "add"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, how):
    for name in ("sub-0", "sub-1"):
        t = make_subject(tmp_path / name, np.random.default_rng(0))
        Volume(np.random.default_rng(0).random((40, 40, 40), np.float32), t.affine).save(tmp_path / name / "xyz.nii.gz")
    (tmp_path / "full.py").write_text(FULL_DISK)
    before = snapshot(tmp_path)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, tmp_path / "full.py", how, tmp_path], capture_output=True, text=True, env=env, timeout=120
    )
    assert re.fullmatch(r"/.*: cannot be written \([Ff]ile too large\)\. Check the space.*\n", done.stdout), done
    left = snapshot(tmp_path)
    if how != "add":
        assert left == before
    else:
        assert set(left) - set(before) == {tmp_path / "x.hdf5", tmp_path / "x_subjects/sub-0.hdf5"}


def test_errors_name_the_config_file(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"input": {**CONFIG["input"], "std_maks": "m"}}))
    with pytest.raises(DataError, match="c.json.*unknown key 'std_maks'"):
        create_hdf5(tmp_path, tmp_path / "x.hdf5", tmp_path / "c.json", {"training": ["a"]})


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
    other = create_hdf5(
        tmp_path,
        tmp_path / "other.hdf5",
        CONFIG,
        {"training": ["sub-0", "sub-1"], "testing": ["sub-2"]},
        progress=False,
    )
    assert hdf5_fingerprint(other) != hdf5_fingerprint(path)


@pytest.mark.parametrize(
    "damage", ["truncated image", "truncated tractogram", "text", "nan", "other grid", "missing dps"]
)
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


def test_a_file_without_streamlines_is_named(tmp_path):
    t = make_subject(tmp_path / "a", np.random.default_rng(0))
    t[:0].save(tmp_path / "a/lines.trk")
    with pytest.raises(DataError, match="no streamline") as e:
        create_hdf5(tmp_path, tmp_path / "x.hdf5", CONFIG, {"training": ["a"]}, progress=False)
    assert (e.value.file, e.value.subject, e.value.group) == (str(tmp_path / "a/lines.trk"), "a", "streamlines")


def test_open_says_what_is_wrong(tmp_path):
    with pytest.raises(DataError, match=r"none.hdf5: cannot be opened \(No such file or directory\). Check the path$"):
        open_hdf5(tmp_path / "none.hdf5")
    (tmp_path / "text.hdf5").write_text("no")
    with pytest.raises(DataError, match="no HDF5 file"):
        open_hdf5(tmp_path / "text.hdf5")
    with h5py.File(tmp_path / "empty.hdf5", "w"):
        pass
    with pytest.raises(DataError, match="training_subjs"):
        open_hdf5(tmp_path / "empty.hdf5")


@pytest.mark.real
@pytest.mark.parametrize("options", [{}, {"one_file_per_subject": True}])
def test_same_as_dwi_ml(tmp_path, options, real_data):
    """The sample's sources give the sample: every dataset and attribute, their kinds, shapes and values; points
    float32 instead of float64."""
    sample = real_data / "dwi_ml_sample"
    lists = [sample / f"source/{s}.txt" for s in ("train", "valid", "test")]
    path = create_hdf5(
        sample / "source/ready", tmp_path / "x.hdf5", sample / "source/config.json", lists, progress=False, **options
    )
    with h5py.File(path) as ours, h5py.File(sample / "data.hdf5") as theirs:
        compared = [compare_items(ours, theirs, skip=("data_and_time", "chosen_subjs"))]
        assert sorted(ours.attrs["chosen_subjs"]) == sorted(
            theirs.attrs["chosen_subjs"]
        )  # dwi_ml has them in the order of a set
        theirs.visit(lambda name: compared.append(compare_items(ours[name], theirs[name])))
        assert len(compared) == 1 + 3 * (1 + 2 + 2 + 8)
        extra = []
        for subject in theirs:
            ours[subject].visit(lambda name, of=theirs[subject]: None if name in of else extra.append(name))
        assert not extra  # nothing that dwi_ml does not know, in a file that asks for nothing else
        assert (
            ours["sub-1/streamlines/data"].dtype == np.float32 and theirs["sub-1/streamlines/data"].dtype == np.float64
        )


def compare_items(ours, theirs, skip=()):
    """Everything that `theirs` has is in `ours`: same kind, type, shape and value."""
    assert type(ours) is type(theirs), theirs.name
    for key in theirs.attrs.keys() - set(skip):
        mine, other = ours.attrs[key], theirs.attrs[key]
        assert (
            type(mine) is type(other)
            and np.asarray(mine).dtype == np.asarray(other).dtype
            and np.shape(mine) == np.shape(other)
        ), (theirs.name, key)
        assert ours.attrs.get_id(key).dtype == theirs.attrs.get_id(key).dtype
        assert (
            np.allclose(mine, other, rtol=1e-5) if np.asarray(other).dtype.kind in "fi" else np.array_equal(mine, other)
        ), (theirs.name, key)
    if isinstance(theirs, h5py.Dataset):
        assert ours.shape == theirs.shape and ours.chunks == theirs.chunks and ours.compression == theirs.compression
        assert ours.dtype == theirs.dtype or (
            theirs.name.endswith("streamlines/data") and ours.dtype.kind == theirs.dtype.kind
        ), theirs.name
        assert (
            np.array_equal(ours[()], theirs[()])
            if theirs.dtype.kind in "bi"
            else np.allclose(ours[()], theirs[()], rtol=1e-5, atol=2e-5)
        ), theirs.name


RICH = {
    "input": {"type": "volume", "files": ["xyz.nii.gz"], "standardization": "none"},
    "streamlines": {
        "type": "streamlines",
        "files": ["lines.trx"],
        "dps_keys": "id",
        "dpp_keys": ["xyz", "label"],
        "groups": True,
        "connectivity_matrix": "m.npy",
        "connectivity_nb_blocs": 2,
    },
}


def rich_subject(folder, seed=0, n=40, outside=()):
    """A .trx whose data per point are the points themselves, so that any operation on both can be checked."""
    rng = np.random.default_rng(seed)
    t = make_subject(folder, rng)
    lines = random_lines(rng, n, points=(3, 40)).to_list()
    for i in outside:
        lines[i] = lines[i] + 50
    s = Streamlines.from_list(lines)
    t = Tractogram(
        s,
        t.affine,
        SHAPE,
        dps={"id": np.arange(n)},
        dpp={"xyz": s.points, "label": s.ids},
        groups={"odd": np.arange(1, n, 2), "all": np.arange(n)},
    )
    t.save(folder / "lines.trx")
    np.save(folder / "m.npy", rng.integers(0, 9, (8, 8)))
    return t


def contents(path):
    """Everything in a file but time and provenance, by name."""
    found = {}

    def put(name, item):
        found[name] = (item.dtype, item.shape, item[()].tobytes()) if isinstance(item, h5py.Dataset) else None
        found.update({(name, k): str(v) for k, v in item.attrs.items()})

    with open_hdf5(path) as h5:
        for subject in h5:
            for group in h5[subject]:
                put(f"{subject}/{group}", h5[subject][group])
                h5[subject][group].visititems(lambda name, item, at=f"{subject}/{group}/": put(at + name, item))
        found |= {("/", k): str(v) for k, v in h5.attrs.items() if k not in ("data_and_time", "tractkit_checksums")}
    return found


@pytest.mark.parametrize("options", [{}, {"step_size": 0.4}, {"nb_points": 17}, {"compress": 0.2}])
def test_data_follow_what_is_done_to_streamlines(tmp_path, options):
    gone = [3, 4, 20]
    t = rich_subject(tmp_path / "a", outside=gone)
    with pytest.warns(UserWarning, match="3 of 40 streamlines"):
        path = create_hdf5(
            tmp_path,
            tmp_path / "x.hdf5",
            RICH,
            {"training": ["a 0.6"], "testing": ["a 0.4"]},
            remove_invalid=True,
            progress=False,
            **options,
        )
    kept = [i for i in range(40) if i not in gone]
    with h5py.File(path) as h5:
        seen = []
        for name in ("a_training", "a_testing"):
            g = h5[name]["streamlines"]
            ids = g["data_per_streamline/id"][:, 0].astype(int)
            seen += ids.tolist()
            assert [kept[i] for i in g["source_ids"]] == ids.tolist() and g.attrs["tractkit_removed"] == 3
            assert g["data_per_point/xyz"].dtype == np.float32 and len(g["data_per_point/xyz"]) == len(g["data"])
            assert np.allclose(g["data_per_point/xyz"], g["data"][:] - 0.5, atol=1e-4)  # moved as the points were
            assert np.array_equal(g["data_per_point/label"][:, 0], np.repeat(ids, g["lengths"]))
            assert ids[g["groups/odd"]].tolist() == [i for i in ids if i % 2] and g["groups/odd"].dtype == np.int64
            assert g["groups/all"][:].tolist() == list(range(len(ids)))
            assert np.array_equal(g["connectivity_matrix"], np.load(tmp_path / "a/m.npy")) and g.attrs[
                "connectivity_nb_blocs"
            ].tolist() == [2, 2, 2]
            assert g.attrs["tractkit_checksum"] == group_checksum(g)
            assert np.allclose(t.lengths_mm[ids], g["euclidean_lengths"], rtol=0.1) and (
                options or np.allclose(t.lengths_mm[ids], g["euclidean_lengths"], rtol=1e-4)
            )
        assert sorted(seen) == kept


def two_subjects(tmp_path):
    for k, name in enumerate(("a", "b", "c")):
        rich_subject(tmp_path / name, seed=k)
    return {"training": ["a 0.5", "b"], "validation": ["a 0.5"], "testing": []}


@pytest.mark.parametrize(
    "options",
    [
        {"one_file_per_subject": True, "nb_points": np.int64(9)},
        {"processes": 2},
        {"processes": 2, "one_file_per_subject": True},
    ],
)
def test_however_it_is_written_the_content_is_the_same(tmp_path, options):
    splits = two_subjects(tmp_path)
    one = create_hdf5(tmp_path, tmp_path / "one.hdf5", RICH, splits, progress=False, nb_points=options.get("nb_points"))
    other = create_hdf5(tmp_path, tmp_path / "other.hdf5", RICH, splits, progress=False, **options)
    assert contents(one) == contents(other) and hdf5_fingerprint(one) == hdf5_fingerprint(other)
    names = {p.name for p in tmp_path.iterdir()} - {"a", "b", "c", "one.hdf5", "other.hdf5"}
    with open_hdf5(other) as h5:
        assert h5["a_training/input/data"] == h5["a_validation/input/data"]
        places = []
        h5["a_training"].visititems(
            lambda _, item: places.append(item.id.get_offset() % 64) if isinstance(item, h5py.Dataset) else None
        )
        assert not any(places) and (
            other.stat().st_size < 1.1 * one.stat().st_size or "one_file_per_subject" in options
        )
        if "one_file_per_subject" not in options:
            assert not names
            return
        assert names == {"other_subjects"} and {p.name for p in (tmp_path / "other_subjects").iterdir()} == {
            "a.hdf5",
            "b.hdf5",
        }
        link = h5.get("a_validation", getlink=True)
        assert isinstance(link, h5py.ExternalLink) and (link.filename, link.path) == (
            "other_subjects/a.hdf5",
            "/a_validation",
        )
        checksums = json.loads(h5.attrs["tractkit_checksums"])
        assert checksums["b/streamlines"] == h5["b/streamlines"].attrs["tractkit_checksum"] and len(checksums) == 6
    with open_hdf5(tmp_path / "other_subjects/b.hdf5") as h5:  # a data file too
        assert list(h5.attrs["training_subjs"]) == ["b"] and list(h5) == ["b"]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(other, moved / "other.hdf5"), shutil.move(tmp_path / "other_subjects", moved / "other_subjects")
    assert contents(moved / "other.hdf5") == contents(one)  # links are relative
    (moved / "other_subjects/b.hdf5").unlink()
    with pytest.raises(DataError, match="links to other_subjects/b.hdf5, which is not there"):
        open_hdf5(moved / "other.hdf5")
    assert hdf5_fingerprint(one) == json_fingerprint(moved / "other.hdf5")  # known without opening a subject


def json_fingerprint(path):
    with h5py.File(path) as h5:
        return h5.attrs["tractkit_fingerprint"]


def snapshot(root):
    return {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_add_subject(tmp_path, monkeypatch):
    two_subjects(tmp_path)
    path = create_hdf5(
        tmp_path,
        tmp_path / "x.hdf5",
        RICH,
        {"training": ["a"], "validation": ["b"]},
        one_file_per_subject=True,
        nb_points=9,
        progress=False,
    )
    before = snapshot(tmp_path)
    replaced = module.os.replace

    for stop_at in (1, 2):  # killed while the subject's file is written, or between it and the links
        calls = []

        def stop(*args, calls=calls, stop_at=stop_at):
            calls.append(args)
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            return replaced(*args)

        monkeypatch.setattr("tractkit.core.files.os.replace", stop)
        with pytest.raises(KeyboardInterrupt):
            add_subject(path, tmp_path, "c", "testing", progress=False)
        after = snapshot(tmp_path)
        assert before.items() <= after.items() and after.keys() - before.keys() <= {tmp_path / "x_subjects/c.hdf5"}
        with open_hdf5(path) as h5:
            assert list(h5) == ["a", "b"]
    monkeypatch.setattr("tractkit.core.files.os.replace", replaced)
    add_subject(path, tmp_path, "c", "testing", progress=False)
    after = snapshot(tmp_path)
    assert {p for p in before if before[p] != after[p]} == {path}  # no other file is touched
    whole = create_hdf5(
        tmp_path,
        tmp_path / "whole.hdf5",
        RICH,
        {"training": ["a"], "validation": ["b"], "testing": ["c"]},
        nb_points=9,
        progress=False,
    )
    assert contents(path) == contents(whole) and hdf5_fingerprint(path) == hdf5_fingerprint(whole)
    for arguments, message in [
        ((path, tmp_path, "c", "testing"), "is there already"),
        ((path, tmp_path, "none", "testing"), "no such folder"),
        ((path, tmp_path, "c", "test"), "Did you mean 'testing'"),
        ((whole, tmp_path, "c", "testing"), "holds its subjects itself"),
    ]:
        with pytest.raises(DataError, match=message):
            add_subject(*arguments, progress=False)


def test_two_who_add_at_once(tmp_path, monkeypatch):
    two_subjects(tmp_path)
    path = create_hdf5(
        tmp_path, tmp_path / "x.hdf5", RICH, {"training": ["a"]}, one_file_per_subject=True, progress=False
    )
    write = module.write_subject_file

    def and_another(*args):
        write(*args)
        monkeypatch.setattr(module, "write_subject_file", write)
        add_subject(path, tmp_path, "b", "training", progress=False)

    monkeypatch.setattr(module, "write_subject_file", and_another)
    with pytest.raises(DataError, match="changed by someone else"):
        add_subject(path, tmp_path, "c", "testing", progress=False)
    with open_hdf5(path) as h5:
        assert list(h5) == ["a", "b"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("exists", [True, False])
def test_interrupted_leaves_no_folders_either(tmp_path, monkeypatch, error, exists):
    splits = two_subjects(tmp_path)
    options = {"one_file_per_subject": True, "save_intermediate": True, "progress": False, "overwrite": True}
    if exists:
        create_hdf5(tmp_path, tmp_path / "x.hdf5", RICH, {"training": ["c"]}, **options)
    before = snapshot(tmp_path)
    write, calls = write_subjects.write_streamlines, []

    def stop(*args, **options):
        write(*args, **options)
        calls.append(1)
        if len(calls) == 3:  # in the second subject
            raise error

    monkeypatch.setattr(write_subjects, "write_streamlines", stop)
    with pytest.raises(error):
        create_hdf5(tmp_path, tmp_path / "x.hdf5", RICH, splits, **options)
    assert snapshot(tmp_path) == before and {p.name for p in tmp_path.iterdir()} <= {
        "a",
        "b",
        "c",
        "x.hdf5",
        "x_subjects",
        "x_intermediate",
    }
    monkeypatch.undo()
    create_hdf5(tmp_path, tmp_path / "x.hdf5", RICH, splits, **options)
    assert {p.name for p in (tmp_path / "x_subjects").iterdir()} == {"a.hdf5", "b.hdf5"}  # the old ones are gone


def test_a_folder_of_others_is_not_replaced(tmp_path):
    splits = two_subjects(tmp_path)
    (tmp_path / "x_subjects").mkdir()
    with pytest.raises(DataError, match="x_subjects: exists already"):
        create_hdf5(tmp_path, tmp_path / "x.hdf5", RICH, splits, one_file_per_subject=True, progress=False)
    (tmp_path / "x_subjects/notes.txt").write_text("mine")
    with pytest.raises(DataError, match="holds notes.txt, which was not made here"):
        create_hdf5(
            tmp_path, tmp_path / "x.hdf5", RICH, splits, one_file_per_subject=True, overwrite=True, progress=False
        )
    assert (tmp_path / "x_subjects/notes.txt").read_text() == "mine" and not (tmp_path / "x.hdf5").exists()


def test_error_and_warning_of_a_child(tmp_path):
    splits = two_subjects(tmp_path)
    shutil.rmtree(tmp_path / "b")
    rich_subject(tmp_path / "b", outside=[5])
    with pytest.raises(DataError, match="1 of 40 streamlines") as e:
        create_hdf5(tmp_path, tmp_path / "x.hdf5", RICH, splits, processes=2, progress=False)
    assert (
        (e.value.subject, e.value.group) == ("b", "streamlines")
        and e.value.file.endswith("b/lines.trx")
        and e.value.fix
    )
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "c"}
    with pytest.warns(UserWarning, match="1 of 40 streamlines"):
        create_hdf5(tmp_path, tmp_path / "x.hdf5", RICH, splits, processes=2, remove_invalid=True, progress=False)


def test_interrupt_with_children(tmp_path):
    """Ctrl-C goes to the whole group of processes; nothing is left, and no child stays."""
    for k in range(4):
        rich_subject(tmp_path / f"s{k}", seed=k)
    script = tmp_path / "run.py"
    script.write_text(f"""
import sys, json
from pathlib import Path
from tractkit.hdf5.create import create_hdf5
if __name__ == "__main__":
    root = Path({str(tmp_path)!r})
    print("go", flush=True)
    create_hdf5(root, root / "x.hdf5", {RICH!r}, {{"training": ["s0", "s1", "s2", "s3"]}}, processes=2, progress=False)
""")
    process = subprocess.Popen(
        [sys.executable, script], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".x.hdf5.*/*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)  # until a child has begun to write
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode and "KeyboardInterrupt" in err
    assert {p.name for p in tmp_path.iterdir()} == {"s0", "s1", "s2", "s3", "run.py"}
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:  # multiprocessing's own helper ends a little later than its parent
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("a child is still there")


@pytest.mark.parametrize("compression", ["gzip", "lzf"])
def test_compressed_volumes(tmp_path, compression):
    splits = two_subjects(tmp_path)
    plain = create_hdf5(tmp_path, tmp_path / "plain.hdf5", RICH, splits, progress=False)
    small = create_hdf5(tmp_path, tmp_path / "small.hdf5", RICH, splits, compression=compression, progress=False)
    with h5py.File(plain) as a, h5py.File(small) as b:
        assert b["b/input/data"].compression == compression and a["b/input/data"].compression is None
        assert (
            np.array_equal(a["b/input/data"], b["b/input/data"])
            and b["b/input/data"].id.get_storage_size() < a["b/input/data"].id.get_storage_size()
        )
        b["b/streamlines"].visititems(
            lambda _, item: (
                None
                if isinstance(item, h5py.Group) or (item.chunks is None and item.id.get_offset() % 64 == 0)
                else pytest.fail(item.name)
            )
        )
    assert hdf5_fingerprint(plain) == hdf5_fingerprint(small)  # the content is the same
    with pytest.raises(ValueError, match="compression is None"):
        create_hdf5(tmp_path, tmp_path / "no.hdf5", RICH, splits, compression="zip", progress=False)


def test_save_intermediate(tmp_path):
    splits = two_subjects(tmp_path)
    make_subject(tmp_path / "d", np.random.default_rng(5))
    plain = {**RICH, "input": RICH["input"] | {"standardization": "all"}}
    path = create_hdf5(
        tmp_path, tmp_path / "x.hdf5", plain, splits, step_size=0.5, save_intermediate=True, progress=False
    )
    kept = tmp_path / "x_intermediate"
    assert {p.relative_to(kept).as_posix() for p in kept.rglob("*.*")} == {
        "a/input.nii.gz",
        "a_training/streamlines.trx",
        "a_validation/streamlines.trx",
        "b/input.nii.gz",
        "b/streamlines.trx",
    }
    with h5py.File(path) as h5:
        assert np.array_equal(Volume.load(kept / "b/input.nii.gz").data, h5["b/input/data"])
        t = Tractogram.load(kept / "a_validation/streamlines.trx")
        g = h5["a_validation/streamlines"]
        assert np.allclose(t.streamlines.points, g["data"][:] - 0.5, atol=1e-4) and np.array_equal(
            t.dps["id"][:, 0], g["data_per_streamline/id"][:, 0]
        )
        assert np.array_equal(t.groups["odd"], g["groups/odd"])
    bare = {"s": {"type": "streamlines", "files": "lines.trk"}}
    create_hdf5(tmp_path, tmp_path / "y.hdf5", bare, {"training": ["d"]}, save_intermediate=True, progress=False)
    assert (tmp_path / "y_intermediate/d/s.trk").is_file()


def test_missing_groups_and_provenance(tmp_path):
    two_subjects(tmp_path)
    (tmp_path / "b/lines.trx").unlink()
    with pytest.warns(UserWarning, match="b/streamlines goes without it"):
        path = create_hdf5(
            tmp_path, tmp_path / "x.hdf5", RICH, {"training": ["a", "b"]}, enforce_files_presence=False, progress=False
        )
    with h5py.File(path) as h5:
        assert list(h5["a"]) == ["input", "streamlines"] and list(h5["b"]) == ["input"]
        files = json.loads(h5["a/streamlines"].attrs["tractkit_sources"])
        assert [f["file"] for f in files] == ["a/lines.trx", "a/m.npy"] and files[0]["size"] == (
            tmp_path / "a/lines.trx"
        ).stat().st_size
        assert (
            files[0]["blake2b"] == hashlib.blake2b((tmp_path / "a/lines.trx").read_bytes(), digest_size=16).hexdigest()
        )
        assert h5["a/input"].attrs["tractkit_version"]
    with pytest.raises(DataError, match="lines.trx: b/streamlines: no such file"):
        create_hdf5(tmp_path, tmp_path / "y.hdf5", RICH, {"training": ["a", "b"]}, progress=False)


def test_many_subjects_in_a_master(tmp_path):
    """Checksums of more subjects than an attribute of 64 kB would hold."""
    with h5py.File(tmp_path / "x.hdf5", "w") as h5:
        checksums = {f"sub-{k:05d}/streamlines": f"{k:032x}" for k in range(3000)}
        placed = {
            "training": [SplitEntry(f"sub-{k:05d}", f"sub-{k:05d}") for k in range(3000)],
            "validation": [],
            "testing": [],
        }
        layout.write_root(h5, RICH, placed, ProcessingOptions(), checksums)
    with open_hdf5(tmp_path / "x.hdf5") as h5:
        assert json.loads(h5.attrs["tractkit_checksums"]) == checksums and len(h5.attrs["training_subjs"]) == 3000


def test_random_lines_stay_inside():
    s = random_lines(np.random.default_rng(0), 200)
    assert (s.points >= 0).all() and (s.points <= np.array(SHAPE) - 1).all()
