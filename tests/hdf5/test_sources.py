"""sources: what a config means, which files it names, and what they become."""

import json
import shutil
import warnings

import numpy as np
import pytest
import yaml
from helpers_data import CONFIG, SHAPE, make_subject, random_affine, random_lines

from tractkit.core.files import DataError
from tractkit.hdf5.config import read_config, read_splits
from tractkit.hdf5.load_groups import (
    load_connectivity,
    load_streamlines_group,
    load_volume_group,
    standardize,
)
from tractkit.hdf5.sources import find_sources
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume


@pytest.mark.parametrize("mode", ["all", "independent", "per_file", "none"])
@pytest.mark.parametrize("masked", [True, False])
def test_standardization(tmp_path, mode, masked):
    rng = np.random.default_rng(4)
    (tmp_path / "a").mkdir()
    one, two = rng.normal(3, 2, (*SHAPE, 2)), rng.normal(50, 9, (*SHAPE, 3))
    one[:3] = two[:, :2] = 0
    masks = [rng.random(SHAPE) > 0.8 for _ in range(2)]
    for name, data in {
        "one": one,
        "two": two,
        "m0": masks[0].astype(np.uint8),
        "m1": masks[1].astype(np.uint8),
    }.items():
        Volume(np.asarray(data, np.float32 if data.dtype == float else np.uint8), np.eye(4)).save(
            tmp_path / f"a/{name}.nii.gz"
        )
    group = {"type": "volume", "files": ["one.nii.gz", "two.nii.gz"], "standardization": mode}
    if masked:
        group["std_mask"] = ["m0.nii.gz", "m1.nii.gz"]
    got = load_volume_group(find_sources(tmp_path, "a", read_config({"v": group}))["v"]).data

    def z(x, axis):
        inside = x[masks[0] | masks[1]] if masked else x[(x != 0).all(-1)]
        return (x - inside.mean(axis)) / inside.std(axis)

    both = np.concatenate([one, two], -1)
    expected = {"all": lambda: z(both, None), "independent": lambda: z(both, 0), "none": lambda: both,
                "per_file": lambda: np.concatenate([z(one, None), z(two, None)], -1)}[mode]()
    assert got.dtype == np.float32 and np.allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_flat_feature_does_not_divide_by_zero():
    out = standardize(np.full((3, 3, 3, 1), 5, np.float32), None)
    assert np.isfinite(out).all() and (out == 0).all()
    with pytest.raises(DataError, match="no voxel"):
        standardize(np.zeros((3, 3, 3, 1), np.float32), None)


@pytest.mark.parametrize(
    "bad, message",
    [
        (
            {"input": {"type": "volume", "files": "a", "standardization": "all", "std_maks": "m"}},
            "Did you mean 'std_mask'",
        ),
        ({"s": {"type": "streamlines", "files": "a", "dps_key": "m"}}, "Did you mean 'dps_keys'"),
        ({"s": {"type": "stream", "files": "a"}}, "'volume' or 'streamlines'"),
        ({"s": {"type": "streamlines"}}, "'files' is missing"),
        ({"s": {"type": "streamlines", "files": [3]}}, "list of names"),
        ({"v": {"type": "volume", "files": "a"}}, "'standardization' is None"),
        ({"a/b": {"type": "streamlines", "files": "a"}}, "no name for a group"),
        ({"s": {"type": "streamlines", "files": "a", "dpp_key": "m"}}, "Did you mean 'dpp_keys'"),
        ({"s": {"type": "streamlines", "files": "a", "connectivity_matrx": "m"}}, "Did you mean 'connectivity_matrix'"),
        ({"s": {"type": "streamlines", "files": "a", "connectivity_matrix": "m"}}, "exactly one of"),
        ({"s": {"type": "streamlines", "files": "a", "connectivity_nb_blocs": 3}}, "exactly one of"),
        (
            {
                "s": {
                    "type": "streamlines",
                    "files": "a",
                    "connectivity_matrix": "m",
                    "connectivity_nb_blocs": 3,
                    "connectivity_labels": "l",
                }
            },
            "exactly one of",
        ),
        (
            {"s": {"type": "streamlines", "files": "a", "connectivity_matrix": ["m"], "connectivity_nb_blocs": 3}},
            "one file name",
        ),
        (
            {"s": {"type": "streamlines", "files": "a", "connectivity_matrix": "m", "connectivity_nb_blocs": [3, 3]}},
            "one or three whole numbers",
        ),
        (
            {"s": {"type": "streamlines", "files": "a", "connectivity_matrix": "m", "connectivity_nb_blocs": 0}},
            "one or three whole numbers",
        ),
        ({"s": {"type": "streamlines", "files": "a", "enforce_files_presence": "no"}}, "true or false"),
        ({"s": {"type": "streamlines", "files": "a", "groups": 3}}, "list of names"),
        ({}, "no group"),
    ],
)
def test_bad_config(bad, message):
    with pytest.raises(DataError, match=message):
        read_config(bad)


def test_config_files(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(CONFIG))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    assert read_config(tmp_path / "c.json") == read_config(tmp_path / "c.yaml") == read_config(CONFIG)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(DataError, match="bad.json.*no valid json"):
        read_config(tmp_path / "bad.json")
    with pytest.raises(DataError, match="none.yaml"):
        read_config(tmp_path / "none.yaml")
    with pytest.raises(DataError, match="c.json.*no group"):
        read_config([1], tmp_path / "c.json")


@pytest.mark.parametrize("suffix, text", [
    ("json", '{"a": {"type": "volume"}, "a": {"type": "streamlines"}}'), ("json", '{"b": {"a": 1, "a": 2}}'),
    ("yaml", "a: {type: volume}\na: {type: streamlines}"), ("yaml", "b:\n  a: 1\n  a: 2")])
def test_a_name_twice_in_a_config_is_an_error(tmp_path, suffix, text):
    """Both parsers would keep the last."""
    (tmp_path / f"c.{suffix}").write_text(text)
    with pytest.raises(DataError, match=f"c.{suffix}.*'a' is there twice"):
        read_config(tmp_path / f"c.{suffix}")


def test_yaml_may_share_settings(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "one: &v {type: volume, files: a, standardization: none}\ntwo: {<<: *v, files: b, standardization: all}\n"
    )
    assert read_config(tmp_path / "c.yaml") == read_config(
        {
            "one": {"type": "volume", "files": "a", "standardization": "none"},
            "two": {"type": "volume", "files": "b", "standardization": "all"},
        }
    )


def test_splits(tmp_path):
    for name in ("a", "b", "c d"):
        (tmp_path / name).mkdir()
    (tmp_path / "train.txt").write_text("a 0.5\nc d\n")
    (tmp_path / "valid.txt").write_bytes(b"a 0.5\r\n\n")
    (tmp_path / "test.txt").write_text("")
    placed = read_splits([tmp_path / f"{s}.txt" for s in ("train", "valid", "test")], tmp_path)
    assert [e.name for e in placed["training"]] == ["a_training", "c d"] and placed["testing"] == []
    assert placed["validation"][0].part == (0.5, 1.0)
    for splits, message in [
        ({"training": ["a"], "validation": ["a"]}, "listed twice"),
        ({"training": ["a", "a"]}, "listed twice"),
        ({"training": ["a 0.7"], "testing": ["a 0.7"]}, "add up to 1.4"),
        ({"training": ["x"]}, "no such folder"),
        ({"training": ["a 0.7"], "testing": ["a"]}, "listed twice"),
        ({"training": ["a 2"]}, "share of 2"),
        ({"training": ["a 0.5"], "validation": ["a 0.5"], "testing": ["a 0.1"]}, "add up to 1.1"),
        ({"training": ["a"], "testing": ["a 0.1"]}, "listed twice"),
        ({"training": [" "]}, "no such folder"),
        ({"train": ["a"]}, "Did you mean 'training'"),
        ({}, "no subject"),
        ({"training": [3]}, "entry of the splits is 3"),
        ({"training": [("a", 0.5, 1)]}, "entry of the splits is \\('a', 0.5, 1"),
        ({"training": [("a", "0.5")]}, "entry of the splits is"),
        ({"training": [["a", None]], "testing": [(None, 0.5)]}, "splits is \\(None"),
    ]:
        with pytest.raises(DataError, match=message):
            read_splits(splits, tmp_path)
    for splits in ("abc", ["a", "b"], None):
        with pytest.raises(ValueError, match="needs three lists"):
            read_splits(splits, tmp_path)



def one(root, config, subject="a", **options):
    """The sources of the only group of a config."""
    return find_sources(root, subject, read_config({"g": config}), **options)["g"]


def numbered(path, k, shape=(3, 4, 5)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Volume(np.full(shape, k, np.float32), np.eye(4)).save(path)


def values(root, files, **more):
    volume = load_volume_group(one(root, {"type": "volume", "files": files, "standardization": "none", **more}))
    return volume.data[0, 0, 0].tolist()


def test_names_of_files(tmp_path):
    """Plain and BIDS-like trees; the order is that of the patterns, then of the names."""
    for k, name in enumerate(
        [
            "a/x.nii.gz",
            "a/ses-1/dwi/a_ses-1_fa.nii.gz",
            "a/ses-2/dwi/a_ses-2_fa.nii.gz",
            "deriv/a/a_md.nii.gz",
            "deriv/b/b_md.nii.gz",
            "a/ses-2/.hidden_fa.nii.gz",
            "a/f1.nii",
            "a/f2.nii",
        ]
    ):
        numbered(tmp_path / name, k)
    assert values(tmp_path, "ses-*/dwi/{subject}_*_fa.nii.gz") == [1, 2]
    assert values(tmp_path, ["**/*_fa.nii.gz", "x.nii.gz"]) == [1, 2, 0]  # not the hidden one
    assert values(tmp_path, "../deriv/{subject}/*_md.nii.gz") == [3]
    assert values(tmp_path, ["f[2].nii", "f?.nii"][:1]) == [7] and values(tmp_path, "f?.nii") == [6, 7]
    assert values(tmp_path, "ses-2/.hidden*") == [5]
    with pytest.raises(DataError, match="f2.nii: a/g: is named by two patterns"):
        values(tmp_path, ["f2.nii", "f?.nii"])
    with pytest.raises(DataError, match=r"ses-3/\*: a/g: no such file"):
        values(tmp_path, ["f2.nii", "ses-3/*"])


def test_missing_files_are_skipped_when_asked_and_reported_once(tmp_path):
    t = make_subject(tmp_path / "a", np.random.default_rng(0))
    config = {"v": {"type": "volume", "files": ["xyz.nii.gz", "no.nii.gz"], "standardization": "none"},
              "w": {"type": "volume", "files": "no/*", "standardization": "none"},
              "s": {"type": "streamlines", "files": ["lines.trk", "more.trk"]},
              "u": {"type": "streamlines", "files": ["more.trk"], "enforce_files_presence": True}}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = find_sources(tmp_path, "a", read_config(config), enforce_files_presence=False)
    assert list(found) == ["v", "s"] and [p.name for p in found["v"].files] == ["xyz.nii.gz"]
    told = [str(w.message) for w in said]
    assert len(told) == len(set(told)) == 4
    for name, group in (("no.nii.gz", "a/v"), ("no/*", "a/w"), ("more.trk", "a/s"), ("more.trk", "a/u")):
        assert sum(f"/{name}: no such file" in text and group in text for text in told) == 1
    assert len(load_streamlines_group(found["s"])[0]) == len(t)
    with pytest.raises(DataError, match="has none of the files"), pytest.warns(UserWarning):
        find_sources(tmp_path, "a", read_config({"w": config["w"]}), enforce_files_presence=False)
    with pytest.raises(DataError, match="a/w: no such file"):
        find_sources(tmp_path, "a", read_config({"v": config["v"] | {"files": "xyz.nii.gz"}, "w": config["w"]}))
    one_group = config["w"] | {"enforce_files_presence": False}
    with pytest.warns(UserWarning, match="a/w goes without it"):
        assert list(
            find_sources(tmp_path, "a", read_config({"v": config["v"] | {"files": "xyz.nii.gz"}, "w": one_group}))
        ) == ["v"]


def test_what_a_file_needs_is_never_skipped(tmp_path):
    make_subject(tmp_path / "a", np.random.default_rng(0))
    for config in (
        {"type": "volume", "files": "xyz.nii.gz", "standardization": "all", "std_mask": "no.nii.gz"},
        {"type": "streamlines", "files": "lines.trk", "connectivity_matrix": "no.npy", "connectivity_nb_blocs": 2},
    ):
        with pytest.raises(DataError, match="no such file"):
            one(tmp_path, config, enforce_files_presence=False)


def rich_subject(folder, rng, n=25):
    """A .trx with data per point and streamline and groups; its first point's value is at its first point."""
    folder.mkdir(parents=True)
    affine, s = random_affine(rng), random_lines(rng, n)
    t = Tractogram(
        s,
        affine,
        SHAPE,
        dps={"id": np.arange(n), "w": rng.random((n, 3))},
        dpp={"x": s.points[:, 0], "xyz": s.points, "label": s.ids},
        groups={"odd": np.arange(1, n, 2), "few": [4, 2]},
    )
    t.save(folder / "lines.trx")
    return t


def test_data_beside_streamlines(tmp_path):
    t = rich_subject(tmp_path / "a", np.random.default_rng(3))
    t[:7].save(tmp_path / "a/more.trx")
    Tractogram(t[:4].streamlines, t.affine, SHAPE, dps=t[:4].dps, dpp=t[:4].dpp).save(tmp_path / "a/bare.trx")
    config = {"type": "streamlines", "files": "lines.trx"}
    bare, _ = load_streamlines_group(one(tmp_path, config))
    assert not bare.dps and not bare.dpp and not bare.groups  # only what is asked for
    full, _ = load_streamlines_group(one(tmp_path, config | {"dps_keys": ["id"], "dpp_keys": ["x*"], "groups": True}))
    assert list(full.dps) == ["id"] and set(full.dpp) == {"x", "xyz"} and set(full.groups) == {"odd", "few"}
    few, _ = load_streamlines_group(one(tmp_path, config | {"groups": ["few"]}))
    assert list(few.groups) == ["few"] and sorted(few.groups["few"]) == [2, 4]
    both, _ = load_streamlines_group(
        one(tmp_path, config | {"files": ["lines.trx", "more.trx", "bare.trx"], "groups": "odd", "dpp_keys": "*"})
    )
    assert len(both) == 36 and both.groups["odd"].tolist() == [*range(1, 25, 2), 26, 28, 30]
    assert np.allclose(both.dpp["xyz"], both.streamlines.points, atol=1e-4)
    for keys, message in (
        ({"dps_keys": "ID"}, "no data per streamline 'ID'. Did you mean 'id'"),
        ({"dpp_keys": "y"}, "no data per point 'y'"),
        ({"groups": ["od"]}, "no group 'od'. Did you mean 'odd'"),
    ):
        with pytest.raises(DataError, match=message) as e:
            load_streamlines_group(one(tmp_path, config | keys))
        assert e.value.file.endswith("a/lines.trx") and (e.value.subject, e.value.group) == ("a", "g")
    with pytest.raises(DataError, match="no group 'nowhere'"):
        load_streamlines_group(one(tmp_path, config | {"files": ["lines.trx", "more.trx"], "groups": ["nowhere"]}))


def test_connectivity(tmp_path):
    rng = np.random.default_rng(1)
    t = make_subject(tmp_path / "a", rng)
    labels = np.zeros(SHAPE, np.int16)
    labels[2:5], labels[6:9] = 7, 1000
    Volume(labels, t.affine).save(tmp_path / "a/labels.nii.gz")
    Volume(labels, np.eye(4)).save(tmp_path / "a/elsewhere.nii.gz")
    grid, base = (t.affine, t.dimensions), {"type": "streamlines", "files": "lines.trk", "connectivity_matrix": "m.npy"}
    with_volume = {"v": {"type": "volume", "files": "xyz.nii.gz", "standardization": "none"}}

    def load(matrix, **how):
        np.save(tmp_path / "a/m.npy", matrix)
        return load_connectivity(find_sources(tmp_path, "a", read_config({**with_volume, "g": base | how}))["g"], grid)

    for dtype in (bool, np.int32, np.float64):
        matrix = (rng.random((24, 24)) * 9).astype(dtype)
        arrays, attrs = load(matrix, connectivity_nb_blocs=[2, 3, 4])
        assert arrays["connectivity_matrix"].dtype == dtype and np.array_equal(
            arrays["connectivity_matrix"], matrix
        )  # as given
        assert attrs["connectivity_matrix_type"] == "from_blocs" and attrs["connectivity_nb_blocs"].tolist() == [
            2,
            3,
            4,
        ]
    for n in (2, 3):  # without and with the background
        arrays, attrs = load(np.eye(n), connectivity_labels="labels.nii.gz")
        assert attrs == {"connectivity_matrix_type": "from_labels"} and np.array_equal(
            arrays["connectivity_label_volume"], labels
        )
        assert arrays["connectivity_label_volume"].dtype.kind == "i"
    for matrix, how, message in [
        (np.eye(8), {"connectivity_nb_blocs": 3}, "8 rows do not fit 3 × 3 × 3 blocs"),
        (np.eye(5), {"connectivity_labels": "labels.nii.gz"}, "5 rows do not fit 2 labels"),
        (np.ones((2, 3)), {"connectivity_nb_blocs": 1}, "no square matrix"),
        (np.full((1, 1), np.nan), {"connectivity_nb_blocs": 1}, "no square matrix of finite"),
        (np.array([["a"]]), {"connectivity_nb_blocs": 1}, "no square matrix"),
        (np.eye(2), {"connectivity_labels": "elsewhere.nii.gz"}, "grid is not that of the streamlines"),
        (np.eye(3), {"connectivity_labels": "xyz.nii.gz"}, "xyz.nii.gz: a/g: holds values that are no int32"),
    ]:
        with pytest.raises(DataError, match=message):
            load(matrix, **how)
    (tmp_path / "a/m.npy").write_bytes(b"\x93NUMPY broken")
    with pytest.raises(DataError, match="m.npy: a/g: cannot be read as .npy"):
        load_connectivity(one(tmp_path, base | {"connectivity_nb_blocs": 2}), grid)
    shutil.copy(tmp_path / "a/m.npy", tmp_path / "a/m2.npy")
    with pytest.raises(DataError, match="2 files match where one is needed"):
        one(tmp_path, base | {"connectivity_matrix": "m*.npy", "connectivity_nb_blocs": 2})


def test_standardize_in_place_and_without(tmp_path):
    """In place it gives the same, and NumPy's own result; on strided views too."""
    rng = np.random.default_rng(0)
    data = rng.normal(1e4, 3, (9, 8, 7, 5)).astype(np.float32)
    mask = rng.random((9, 8, 7)) > 0.5
    for independent in (False, True):
        inside = data[mask].astype(np.float64)
        expected = (data - inside.mean(0 if independent else None)) / inside.std(0 if independent else None)
        kept, before = data.copy(), data.copy()
        assert np.allclose(standardize(kept, mask, independent=independent), expected, atol=2e-3) and np.array_equal(
            kept, before
        )
        assert standardize(kept, mask, independent=independent, out=kept) is kept and np.allclose(
            kept, expected, atol=2e-3
        )
        wide = np.zeros((9, 8, 7, 11), np.float32)
        wide[..., 3:8] = data
        standardize(wide[..., 3:8], mask, independent=independent, out=wide[..., 3:8])
        assert np.array_equal(wide[..., 3:8], kept) and not wide[..., :3].any() and not wide[..., 8:].any()


def test_provenance(tmp_path):
    t = make_subject(tmp_path / "a", np.random.default_rng(0))
    np.save(tmp_path / "a/m.npy", np.eye(8))
    source = one(
        tmp_path,
        {"type": "streamlines", "files": "lines.trk", "connectivity_matrix": "m.npy", "connectivity_nb_blocs": 2},
    )
    record = source.provenance(tmp_path)
    assert [r["file"] for r in record] == ["a/lines.trk", "a/m.npy"] and record[0]["size"] == (
        tmp_path / "a/lines.trk"
    ).stat().st_size
    assert record == source.provenance(tmp_path)
    t[::-1].save(tmp_path / "a/lines.trk")
    assert (
        source.provenance(tmp_path)[0]["blake2b"] != record[0]["blake2b"]
        and source.provenance(tmp_path)[1] == record[1]
    )


@pytest.mark.parametrize("what", ["std_mask empty", "nan in the second file", "cut tractogram"])
def test_errors_name_the_place(tmp_path, what):
    t = make_subject(tmp_path / "a", np.random.default_rng(0))
    Volume(np.zeros(SHAPE, np.uint8), t.affine).save(tmp_path / "a/mask.nii.gz")
    bad = np.zeros(SHAPE, np.float32)
    bad[1, 2, 3] = np.inf
    nib_image(bad, t.affine, tmp_path / "a/bad.nii.gz")
    (tmp_path / "a/cut.trk").write_bytes((tmp_path / "a/lines.trk").read_bytes()[:-10])
    files, load, config = {
        "std_mask empty": (
            "mask.nii.gz",
            load_volume_group,
            {"type": "volume", "files": "xyz.nii.gz", "standardization": "all", "std_mask": "mask.nii.gz"},
        ),
        "nan in the second file": (
            "bad.nii.gz",
            load_volume_group,
            {"type": "volume", "files": ["xyz.nii.gz", "bad.nii.gz"], "standardization": "all"},
        ),
        "cut tractogram": ("cut.trk", load_streamlines_group, {"type": "streamlines", "files": "cut.trk"}),
    }[what]
    with pytest.raises(DataError) as e:
        load(one(tmp_path, config))
    assert e.value.file.endswith(files) and (e.value.subject, e.value.group) == ("a", "g")


def nib_image(data, affine, path):
    import nibabel as nib
    nib.save(nib.Nifti1Image(data, affine), path)


def test_how_grids_differ_is_said(tmp_path):
    affine = np.diag([2., 2, 2, 1])
    (tmp_path / "a").mkdir()
    for name, shape, shift in (("one", SHAPE, 0), ("two", SHAPE, 3), ("three", (4, 5, 6), 0)):
        moved = affine.copy()
        moved[0, 3] += shift
        Volume(np.ones(shape, np.float32), moved).save(tmp_path / f"a/{name}.nii.gz")
    for other, how in (("two", "affines differ by up to 3"), ("three", "4 × 5 × 6 voxels, not 14 × 11 × 9")):
        with pytest.raises(DataError, match=rf"{other}.nii.gz: a/g: its grid is not that of one.nii.gz \({how}\)"):
            one(tmp_path, {"type": "volume", "files": ["one.nii.gz", f"{other}.nii.gz"], "standardization": "none"})


def test_a_subject_misspelt_and_a_root_that_is_not_there(tmp_path):
    (tmp_path / "sub-01").mkdir()
    with pytest.raises(DataError, match="no such folder. Did you mean 'sub-01'") as e:
        read_splits({"training": ["sub-1"]}, tmp_path)
    assert e.value.file == str(tmp_path / "sub-1") and e.value.subject == "sub-1"
    with pytest.raises(DataError, match="no such folder. Check the root") as e:
        read_splits({"training": ["sub-1"]}, tmp_path / "none")
    assert e.value.file == str(tmp_path / "none")


@pytest.mark.parametrize("damage", ["cut", "empty"])
def test_errors_name_the_mask(tmp_path, damage):
    make_subject(tmp_path / "a", np.random.default_rng(0))
    mask = tmp_path / "a/mask.nii.gz"
    data = np.random.default_rng(0).integers(0, 255, SHAPE, np.uint8) * (damage == "cut")
    Volume(data.astype(np.uint8), Volume.load(tmp_path / "a/xyz.nii.gz").affine).save(mask)
    if damage == "cut":
        mask.write_bytes(mask.read_bytes()[:-400])
    group = {**CONFIG["input"], "standardization": "all", "std_mask": "mask.nii.gz"}
    with pytest.raises(DataError) as e:
        load_volume_group(one(tmp_path, group))
    assert (e.value.file, e.value.subject, e.value.group) == (str(mask), "a", "g")


def test_a_tractogram_of_another_space_is_not_called_invalid_streamlines(tmp_path):
    t = make_subject(tmp_path / "a", np.random.default_rng(0))
    config = read_config(CONFIG)
    far = t.affine.copy()
    far[:3, 3] += 500
    Tractogram(t.streamlines, far, t.dimensions, t.dps).save(tmp_path / "a/lines.trk")
    with pytest.raises(DataError, match="30 of 30 streamlines .*Is it of another subject"):
        load_streamlines_group(find_sources(tmp_path, "a", config)["streamlines"])


def test_what_dipy_reads(tmp_path):
    t = make_subject(tmp_path / "a", np.random.default_rng(0))
    from dipy.io.streamline import save_tractogram
    save_tractogram(t.to_sft(), str(tmp_path / "a/lines.dpy"), bbox_valid_check=False)
    config = {
        "v": {"type": "volume", "files": "xyz.nii.gz", "standardization": "none"},
        "g": {"type": "streamlines", "files": "lines.dpy"},
    }
    read, _ = load_streamlines_group(find_sources(tmp_path, "a", read_config(config))["g"])
    assert np.allclose(read.streamlines.points, t.streamlines.points, atol=1e-4) and np.array_equal(
        read.streamlines.offsets, t.streamlines.offsets
    )
    with pytest.raises(DataError, match="has no grid of its own"):
        one(tmp_path, config["g"])


def test_a_mask_of_any_number_and_an_unzipped_trx(tmp_path):
    import zipfile
    rng = np.random.default_rng(0)
    t = rich_subject(tmp_path / "a", rng)
    with zipfile.ZipFile(tmp_path / "a/lines.trx") as archive:
        archive.extractall(tmp_path / "a/open.trx")
    read, _ = load_streamlines_group(one(tmp_path, {"type": "streamlines", "files": "open*", "dps_keys": "id"}))
    assert np.allclose(read.streamlines.points, t.streamlines.points, atol=1e-4) and read.dps["id"][
        :, 0
    ].tolist() == list(range(len(t)))
    assert len(one(tmp_path, {"type": "streamlines", "files": "open.trx"}).provenance(tmp_path)) == 1
