"""hdf5: a tractogram of one file per bundle keeps the bundles' names, from the folder to the batches and back."""

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers_data import CONFIG, SHAPE, las, random_affine, random_lines, world_volume

from tractkit.data.dataset import MultiSubjectDataset
from tractkit.data.sampler import BatchIDSampler
from tractkit.evaluation.scoring import compare_tractograms
from tractkit.hdf5.create import add_subject, create_hdf5
from tractkit.hdf5.describe import describe_hdf5
from tractkit.hdf5.extract import extract_hdf5
from tractkit.hdf5.sources import group_names
from tractkit.hdf5.validate import validate_hdf5
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram
from tractkit.viz.colors import color_streamlines

BUNDLES = {"AF_left": 12, "AF_right": 3, "CST_left": 6}


def write_bundles(folder, bundles, rng, suffix=".trk", name="{bundle}"):
    """A subject whose tractogram is a file per bundle, each with so many streamlines."""
    (folder / "bundles").mkdir(parents=True)
    affine = las(random_affine(rng))
    world_volume(affine).save(folder / "xyz.nii.gz")
    for bundle, n in bundles.items():
        file = folder / "bundles" / (name.format(bundle=bundle) + suffix)
        Tractogram(random_lines(rng, n), affine, SHAPE).save(file)


def config(files="bundles/*.trk", **more):
    return {"input": CONFIG["input"], "streamlines": {"type": "streamlines", "files": files, **more}}


@pytest.fixture
def three(tmp_path):
    """Three subjects; the second has one bundle alone, the third an empty one."""
    rng = np.random.default_rng(5)
    for name, bundles in {"sub-1": BUNDLES, "sub-2": {"AF_left": 5}, "sub-3": BUNDLES | {"CST_left": 0}}.items():
        write_bundles(tmp_path / name, bundles, rng, name=f"{name}__{{bundle}}")
    return tmp_path


def members(group):
    return {name: ids[()].tolist() for name, ids in group["groups"].items()}


def test_a_group_for_each_file(three):
    splits = {"training": ["sub-1", "sub-3"], "validation": ["sub-2"]}
    path = create_hdf5(three, three / "x.hdf5", config(), splits, progress=False)
    with h5py.File(path) as h5:
        groups = {name: members(h5[f"{name}/streamlines"]) for name in ("sub-1", "sub-2", "sub-3")}
        files = json.loads(h5["sub-3/streamlines"].attrs["tractkit_sources"])
    assert groups["sub-1"] == {"AF_left": [*range(12)], "AF_right": [12, 13, 14], "CST_left": [*range(15, 21)]}
    assert groups["sub-2"] == {"AF_left": [*range(5)]}  # one file, where other subjects have several
    assert groups["sub-3"]["CST_left"] == []
    assert [(f["file"], f["streamlines"]) for f in files] == [
        (f"sub-3/bundles/sub-3__{bundle}.trk", n) for bundle, n in (BUNDLES | {"CST_left": 0}).items()]
    assert validate_hdf5(path, progress=False).ok and "groups AF_left, AF_right, CST_left" in repr(describe_hdf5(path))


def test_groups_are_used(three):
    """Balance, scores, colors and files: what a group of a .trx can do."""
    splits = {"training": ["sub-1", "sub-3"], "validation": ["sub-2"]}
    path = create_hdf5(three, three / "x.hdf5", config(), splits, step_size=1.0, progress=False)
    dataset = MultiSubjectDataset(path)
    dataset.load_data()
    with pytest.warns(UserWarning, match="of AF_left"):
        plan = BatchIDSampler(dataset, "streamlines", 9, balance="groups", rng=1).plan(0)
    assert set(plan.left_out) == {"AF_left"} and len(plan.order) == 18  # 6 of each: as many as AF_right has
    t = dataset.subject("sub-1").streamlines["streamlines"].as_tractogram()
    assert {name: len(ids) for name, ids in t.groups.items()} == BUNDLES
    coloring = color_streamlines(t, "groups")
    assert [name for name, _ in coloring.legend.names] == list(BUNDLES)
    one = t[t.groups["AF_right"]]
    assert compare_tractograms(one, t)["coverage"] < 1 == compare_tractograms(one, one)["coverage"]
    extract_hdf5(path, three / "out", subjects="sub-1", groups="streamlines", progress=False)
    back = Tractogram.load(three / "out/sub-1/streamlines.trx")
    assert {name: len(ids) for name, ids in back.groups.items()} == BUNDLES


def test_groups_follow_what_is_left_out_and_shared(three):
    t = Tractogram.load(three / "sub-1/bundles/sub-1__AF_left.trk")
    replace(t, streamlines=Streamlines(t.streamlines.points + 900 * (t.streamlines.ids == 2)[:, None],
                                       t.streamlines.offsets)).save(three / "sub-1/bundles/sub-1__AF_left.trk")
    with pytest.warns(UserWarning, match="1 of 12 streamlines"):
        path = create_hdf5(three, three / "x.hdf5", config(), {"training": ["sub-1 0.5"], "validation": ["sub-1 0.5"]},
                           remove_invalid=True, progress=False)
    with h5py.File(path) as h5:
        parts = [h5[f"sub-1_{split}/streamlines"] for split in ("training", "validation")]
        sizes = {name: sum(len(g["groups"][name]) for g in parts) for name in BUNDLES}
        for g in parts:
            ids = g["source_ids"][()]
            assert sorted(i for part in members(g).values() for i in part) == [*range(len(ids))]
            assert (ids[g["groups/AF_left"][()]] < 11).all()
            (first, *_) = json.loads(g.attrs["tractkit_sources"])
            assert (first["streamlines"], first["removed"]) == (11, 1)
    assert sizes == {"AF_left": 11, "AF_right": 3, "CST_left": 6}


@pytest.mark.parametrize("asked, groups", [({"groups": False}, []), ({"groups": []}, []),
                                           ({"groups": True}, ["inner"]), ({}, ["a", "b"])])
def test_groups_that_are_asked_for(tmp_path, asked, groups):
    """A config that says which groups it wants gets those, and no others."""
    write_bundles(tmp_path / "x", {"a": 3, "b": 2}, np.random.default_rng(1))
    t = Tractogram.load(tmp_path / "x/bundles/a.trk")
    replace(t, groups={"inner": [1]}).save(tmp_path / "x/bundles/a.trx")
    files = ["bundles/a.trx", "bundles/b.trk"]
    path = create_hdf5(tmp_path, tmp_path / "x.hdf5", config(files, **asked), {"training": ["x"]}, progress=False)
    with h5py.File(path) as h5:
        assert list(h5["x/streamlines"].get("groups", ())) == groups


def test_one_file_for_each_subject_is_no_group(tmp_path):
    for name in ("a", "b"):
        write_bundles(tmp_path / name, {"all": 4}, np.random.default_rng(1))
    path = create_hdf5(tmp_path, tmp_path / "x.hdf5", config(), {"training": ["a", "b"]}, progress=False)
    with h5py.File(path) as h5:
        assert "groups" not in h5["a/streamlines"]
        assert json.loads(h5["a/streamlines"].attrs["tractkit_sources"])[0]["streamlines"] == 4


def test_a_subject_that_is_added_is_as_the_others(tmp_path):
    rng = np.random.default_rng(2)
    for name, bundles in {"a": {"left": 3, "right": 2}, "b": {"left": 4}, "c": {"left": 2, "right": 2}}.items():
        write_bundles(tmp_path / name, bundles, rng)
    path = create_hdf5(tmp_path, tmp_path / "x.hdf5", config(), {"training": ["a"]}, one_file_per_subject=True,
                       progress=False)
    add_subject(path, tmp_path, "b", "training", progress=False)
    with h5py.File(path) as h5:
        assert members(h5["b/streamlines"]) == {"left": [0, 1, 2, 3]}
    for file in (path, *(tmp_path / "x_subjects").iterdir()):  # as files were made before: several files, no groups
        with h5py.File(file, "r+") as h5:
            for subject in ("a", "b"):
                if file != path and subject in h5:
                    del h5[f"{subject}/streamlines/groups"]
    add_subject(path, tmp_path, "c", "training", progress=False)
    with h5py.File(path) as h5:
        assert "groups" not in h5["c/streamlines"]


@pytest.mark.parametrize("files, names", [
    (["b/AF_left.trk", "b/AF_right.trk"], ["AF_left", "AF_right"]),
    (["sub-01_AF.tck", "sub-01__CST.tck"], ["AF", "CST"]),
    (["AF_sub-01.trx", "CST.sub-01.trx"], ["AF", "CST"]),
    (["left/AF.trk", "right/AF.trk", "CC.trk"], ["left_AF", "right_AF", "CC"]),
    (["ses-1/left/AF.trk", "ses-2/left/AF.trk"], ["ses-1_left_AF", "ses-2_left_AF"]),
    (["AF.trk", "AF.tck", "CC.v2.trk"], ["AF_trk", "AF_tck", "CC_v2"]),
    (["sub-01.trk", "sub-01_AF.trk"], ["sub-01", "AF"]),
])
def test_names_of_groups(files, names):
    assert group_names([Path("/data/sub-01") / f for f in files], "sub-01") == tuple(names)


def test_a_number_is_no_name_of_a_subject_at_the_end():
    assert group_names([Path("/data/1/bundle_1.trk"), Path("/data/1/bundle_2.trk")], "1") == ("bundle_1", "bundle_2")
