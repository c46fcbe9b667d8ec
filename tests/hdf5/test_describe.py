"""validate, describe, extract: every kind of damage is found where it is, nothing good is called bad, and what comes
out is what went in."""

import hashlib
import json
import shutil
import subprocess
import sys

import h5py
import nibabel as nib
import numpy as np
import pytest
from helpers_data import SHAPE, make_file
from helpers_fuzz import HDF5_DAMAGE, sample_file

import tractkit.hdf5.volume_checks as check
from tractkit.core.files import DataError
from tractkit.hdf5.describe import describe_hdf5
from tractkit.hdf5.extract import extract_hdf5
from tractkit.hdf5.layout import group_checksum
from tractkit.hdf5.validate import validate_hdf5
from tractkit.spatial.tractogram import Tractogram


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return sample_file(tmp_path_factory.mktemp("good"))


@pytest.fixture
def changed(good, tmp_path):
    """A copy of the good file after a change; `checked` renews the checksums, as a writer with a bug would."""
    def make(change, checked=False):
        path = shutil.copy(good, tmp_path / "x.hdf5")
        with h5py.File(path, "a") as h5:
            change(h5)
            for subject in h5.values() if checked else ():
                for group in subject.values():
                    group.attrs["tractkit_checksum"] = group_checksum(group)
        return path

    return make


def linked(path, folder):
    """The same file as a small master with a file for each subject."""
    (folder / "x_subjects").mkdir()
    with h5py.File(path) as whole, h5py.File(folder / "x.hdf5", "w") as master:
        master.attrs.update(whole.attrs)
        for name in whole:
            with h5py.File(folder / "x_subjects" / f"{name}.hdf5", "w") as part:
                whole.copy(name, part)
            master[name] = h5py.ExternalLink(f"x_subjects/{name}.hdf5", f"/{name}")
    return folder / "x.hdf5"


def found(path, severity="error"):
    return [
        (f.subject, f.group, f.place.partition("[")[0])
        for f in validate_hdf5(path, progress=False).findings
        if f.severity == severity
    ]


# ---- validate ------------------------------------------------------------------------------------------------


def test_a_good_file_is_ok(good, tmp_path):
    before = hashlib.blake2b(good.read_bytes()).digest()
    report = validate_hdf5(good)
    assert report.findings == () and report.ok and report.exit_code(strict=True) == 0
    assert (report.nb_subjects, report.nb_groups) == (3, 6) and "all is well" in repr(report)
    assert hashlib.blake2b(good.read_bytes()).digest() == before
    path, _ = make_file(tmp_path, splits={"training": ["sub-0 0.5"], "testing": ["sub-0 0.5"]})
    assert validate_hdf5(path, progress=False).findings == ()


@pytest.mark.real
def test_a_file_of_dwi_ml_is_ok(real_data):
    report = validate_hdf5(real_data / "dwi_ml_sample/data.hdf5", progress=False)
    assert report.ok, report
    assert "dwi_ml" in describe_hdf5(real_data / "dwi_ml_sample/data.hdf5").about["format"]


PLACES = {  # damage -> where it is found; `@` is an attribute
    "an offset is negative": "offsets",
    "offsets are missing": "offsets",
    "offsets are floats": "offsets",
    "an offset is huge": "offsets",
    "a length is one more": "lengths",
    "a length is negative": "lengths",
    "a length is huge": "lengths",
    "two lengths cancel": "lengths",
    "lengths are missing": "lengths",
    "lengths are text": "lengths",
    "a point is nan": "data",
    "a point is inf": "data",
    "a point is -inf": "data",
    "points are flat": "data",
    "points are whole numbers": "data",
    "points are missing": "data",
    "points are a group": "data",
    "points were never written": "data",
    "a terabyte of points that is not there": "data",
    "a terabyte of points in empty chunks": "data",
    "a terabyte of points with lengths to match": "data",
    "streamlines has no type": "@type",
    "input has type 'tensor'": "@type",
    "streamlines has an affine that is singular": "@affine",
    "input has an affine that is NaN": "@affine",
    "no origin": "@origin",
    "dimensions are [0, 11, 9]": "@dimensions",
    "dimensions are [1.5, 2, 3]": "@dimensions",
    "no dimensions": "@dimensions",
    "dps has too few rows": "data_per_streamline/bundle",
    "dpp is text": "data_per_point/fa",
    "all dps is a dataset": "data_per_streamline",
    "ids of a group are past the end": "groups/left",
    "ids of a group are negative": "groups/left",
    "ids of a group are floats": "groups/left",
    "lengths in mm are negative": "euclidean_lengths",
    "lengths in mm are too few": "euclidean_lengths",
    "a connectivity matrix is not square": "connectivity_matrix",
    "a connectivity matrix has no type": "@connectivity_matrix_type",
    "a connectivity matrix is of other blocs": "@connectivity_nb_blocs",
    "source ids are too few": "source_ids",
    "the volume is text": "data",
    "the volume is missing": "data",
    "a voxel is nan": "data",
    "a voxel is inf": "data",
    "a terabyte of voxels that is not there": "data",
    "nb_features is wrong": "@nb_features",
    "the volume has a feature less": "@nb_features",
}


@pytest.mark.parametrize("name", PLACES)
def test_damage_is_found_where_it_is(name, changed):
    _, group, function = HDF5_DAMAGE[name]
    path = changed(lambda h5: function(h5, "sub-1"))
    errors = found(path)
    assert ("sub-1", group, PLACES[name]) in errors
    assert {e[:2] for e in errors} == {("sub-1", group)}


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize(
    "place",
    [
        "input/data",
        "streamlines/data",
        "streamlines/data_per_streamline/bundle",
        "streamlines/data_per_point/fa",
        "streamlines/groups/left",
    ],
)
def test_the_checksum_is_that_of_the_content(changed, place, checked):
    """A change that fits everything else is seen by the checksum, and by nothing else."""
    def change(h5):
        data = h5["sub-1"][place]
        data[0] = data[0] + (1 if place.endswith("left") else np.float32(1e-3))

    errors = found(changed(change, checked))
    assert errors == ([] if checked else [("sub-1", place.split("/")[0], "@tractkit_checksum")])


def test_points_are_compared_with_offsets_across_pieces(good, changed, monkeypatch):
    """Lengths, NaN and leaving the box, found the same when a piece holds two points."""
    def change(h5):
        g = h5["sub-1/streamlines"]
        g["data"][20, 0] = np.nan
        g["data"][int(g["offsets"][5]) + 1, 2] += 50

    path = changed(change)
    whole = validate_hdf5(path, progress=False).findings
    assert any("streamlines leave the volume, the first is 5" in f.problem for f in whole) and any(
        f.place == "data[20]" for f in whole
    )
    monkeypatch.setattr(check, "PIECE", 24)
    assert validate_hdf5(path, progress=False).findings == whole and validate_hdf5(good, progress=False).findings == ()


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Peak memory over a volume of 200 MB is that over one of 20 MB."""
    peaks = []
    for k, x in enumerate((50, 500)):
        path, _ = make_file(tmp_path / str(k), n_subjects=1)
        with h5py.File(path, "a") as h5:
            del h5["sub-0/input/data"]
            data = h5["sub-0/input"].create_dataset("data", (x, 100, 100, 10), np.float32)
            for i in range(x):
                data[i] = np.full(data.shape[1:], i, np.float32)
            h5["sub-0/input"].attrs.update({"nb_features": 10, "tractkit_checksum": group_checksum(h5["sub-0/input"])})
        code = (
            f"import resource; from tractkit.hdf5.validate import validate_hdf5; r = validate_hdf5({str(path)!r}, "
            f"progress=False);"
            "assert r.ok, r; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
        )
        peaks.append(
            int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        )
    assert peaks[1] - peaks[0] < 40, peaks  # MB


def test_streamlines_that_leave_the_volume_are_a_warning(changed):
    def change(h5):
        h5["sub-1/streamlines/data"][0, 0] = SHAPE[0] + 0.01  # corner: the box ends at SHAPE

    path = changed(change, checked=True)
    assert [f for f in found(path) if f[2] != "euclidean_lengths"] == [] and found(path, "warning") == [
        ("sub-1", "streamlines", "data")
    ]

    def smaller(h5):  # a volume that ends before the box of the tractogram does
        data = h5["sub-1/input/data"][:4]
        del h5["sub-1/input/data"]
        h5["sub-1/input/data"] = data

    assert found(changed(smaller, checked=True), "warning") == [("sub-1", "streamlines", "data")]


def test_exit_codes(changed):
    report = validate_hdf5(changed(lambda h5: h5.attrs.__setitem__("testing_subjs", [])), progress=False)
    assert [(f.severity, f.subject) for f in report.findings] == [("warning", "sub-2")]
    assert report.ok and report.exit_code() == 0 and report.exit_code(strict=True) == 1


def test_splits_against_subjects(changed):
    def change(h5):
        h5.attrs["training_subjs"] = ["sub-0", "sub-9"]
        h5.attrs["testing_subjs"] = ["sub-0"]

    report = validate_hdf5(changed(change), progress=False)
    assert [(f.severity, f.subject, f.place) for f in report.findings] == [
        ("warning", "sub-0", "@testing_subjs"), ("error", "sub-9", "@training_subjs"), ("warning", "sub-2", "")]
    assert "listed in training and testing" in report.findings[0].problem


def test_subjects_against_each_other(changed):
    def change(h5):
        del h5["sub-2/streamlines"]
        g = h5["sub-1/input"]
        data = g["data"][..., :2]
        del g["data"]
        g["data"], g.attrs["nb_features"] = data, 2

    path = changed(change, checked=True)
    assert found(path) == [("sub-1", "input", "data")] and found(path, "warning") == [("sub-2", "streamlines", "")]


def test_links_that_lead_nowhere(good, tmp_path):
    path = linked(good, tmp_path)
    assert validate_hdf5(path, progress=False).findings == ()
    (tmp_path / "x_subjects/sub-1.hdf5").unlink()
    report = validate_hdf5(path, progress=False)
    assert [(f.severity, f.subject, f.group) for f in report.findings] == [("error", "sub-1", "")]
    assert "x_subjects/sub-1.hdf5" in report.findings[0].problem and "Put that file back" in report.findings[0].fix
    with h5py.File(tmp_path / "x_subjects/sub-2.hdf5", "a") as h5:
        h5["sub-2/streamlines/lengths"][0] += 1
    assert ("sub-2", "streamlines", "lengths") in found(path)


def test_what_cannot_be_opened(tmp_path, good):
    with pytest.raises(DataError, match="none.hdf5"):
        validate_hdf5(tmp_path / "none.hdf5")
    for content in (b"", b"text", good.read_bytes()[:3000]):
        (tmp_path / "x.hdf5").write_bytes(content)
        report = validate_hdf5(tmp_path / "x.hdf5", progress=False)
        assert not report.ok and len(report.findings) == 1 and report.findings[0].problem


def test_reports_name_subject_group_place_and_fix(changed):
    report = validate_hdf5(changed(lambda h5: HDF5_DAMAGE["an offset is negative"][2](h5, "sub-1")), progress=False)
    line = next(line for line in repr(report).splitlines() if line.startswith("error"))
    for word in ("sub-1", "streamlines", "offsets[1]", "is -5", "Extract with repair='offsets'"):
        assert word in line and word.replace("'", "&#x27;") in report._repr_html_()


def test_html_is_escaped(changed):
    path = changed(lambda h5: h5.move("sub-2", "<b>sub-2"))
    for page in (validate_hdf5(path, progress=False)._repr_html_(), describe_hdf5(path)._repr_html_()):
        assert "<b>" not in page and "&lt;b&gt;sub-2" in page


# ---- describe ------------------------------------------------------------------------------------------------


def test_describe(good):
    page = describe_hdf5(good)
    with h5py.File(good) as h5:
        lengths = np.concatenate([s["streamlines/euclidean_lengths"] for s in h5.values()])
        n_points = sum(len(s["streamlines/data"]) for s in h5.values())
    assert page.splits == {"training": ["sub-0"], "validation": ["sub-1"], "testing": ["sub-2"]} and page.groups == [
        "input",
        "streamlines",
    ]
    assert np.array_equal(page.lengths_mm("streamlines"), lengths)
    for text in (repr(page), page._repr_html_()):
        for word in (
            f"{len(lengths):,} streamlines, {n_points:,} points",
            f"median {np.median(lengths):.0f} mm",
            "14 × 11 × 9",
            "dps bundle, weight",
            "dpp fa",
            "groups left, none",
            "connectivity 8 × 8 from blocs",
            "float32, contiguous",
            "xyz.nii.gz",
            "1 training, 1 validation, 1 testing",
            "tractkit 1",
        ):
            assert word in text, word
    assert "<svg" in page._repr_html_()


def test_describe_linked_compressed_and_many(good, tmp_path):
    path = linked(good, tmp_path)
    with h5py.File(tmp_path / "x_subjects/sub-1.hdf5", "a") as h5:
        data = h5["sub-1/input/data"][:]
        del h5["sub-1/input/data"]
        h5["sub-1/input"].create_dataset("data", data=data.astype(">f4"), compression="lzf")
    page = describe_hdf5(path)
    assert (
        "in 4 files" in page.about["on disk"]
        and page.subjects["sub-1"]["input"].stored == "float32, other byte order, lzf"
    )
    with h5py.File(path, "a") as h5:
        for k in range(60):
            h5[f"copy-{k}"] = h5py.ExternalLink("x_subjects/sub-0.hdf5", "/sub-0")
        h5.attrs["training_subjs"] = ["sub-0", *(f"copy-{k}" for k in range(60))]
    page = describe_hdf5(path)
    assert "and 31 more" in repr(page) and "61 training" in repr(page)
    assert "xyz.nii.gz" in repr(page) and page.about["on disk"] == describe_hdf5(path).about["on disk"]


def test_describe_a_damaged_file_shows_the_rest(changed):
    def change(h5):
        del h5["sub-1/streamlines/lengths"]
        del h5["sub-0"]
        h5["sub-0"] = np.zeros(3)

    page = repr(describe_hdf5(changed(change)))
    assert "damaged in 1 of 2 subjects" in page and "sub-2" in page


# ---- extract -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".trx", ".trk"])
def test_extract_gives_back_what_went_in(tmp_path, suffix):
    path, sources = make_file(tmp_path)
    files = extract_hdf5(path, tmp_path / "out", tractogram=suffix, progress=False)
    assert sorted(f.relative_to(tmp_path / "out").as_posix() for f in files) == sorted(
        f"sub-{i}/{name}" for i in range(3) for name in ("input.nii.gz", f"streamlines{suffix}"))
    with h5py.File(path) as h5:
        for name, t in sources.items():
            image = nib.load(tmp_path / "out" / name / "input.nii.gz")
            assert (
                np.asarray(image.dataobj).tobytes() == h5[name]["input/data"][()].tobytes()
                and image.get_data_dtype() == np.float32
            )
            assert np.allclose(image.affine, t.affine, atol=1e-5)
            back, source = (
                Tractogram.load(tmp_path / "out" / name / f"streamlines{suffix}"),
                Tractogram.load(tmp_path / name / "lines.trk"),
            )
            assert np.abs(back.rasmm().points.astype(float) - source.rasmm().points).max() < 1e-4
            assert np.array_equal(back.streamlines.offsets, source.streamlines.offsets) and np.array_equal(
                back.dps["bundle"], source.dps["bundle"]
            )
            assert back.dimensions == SHAPE


@pytest.mark.parametrize("kind", [np.float64, np.int16, np.uint8, ">f4", np.float16, bool, np.int64])
def test_volumes_keep_their_bits(changed, tmp_path, kind):
    rng = np.random.default_rng(1)
    data = (rng.normal(size=(*SHAPE, 2)) * 100).astype(kind)

    def change(h5):
        del h5["sub-0/input/data"]
        h5["sub-0/input/data"], h5["sub-0/input"].attrs["nb_features"] = data, 2

    extract_hdf5(changed(change, checked=True), tmp_path / "out", subjects="sub-0", groups="input", progress=False)
    back = np.asarray(nib.load(tmp_path / "out/sub-0/input.nii.gz").dataobj)
    assert np.array_equal(back, data) and back.dtype.newbyteorder("=") == {
        np.float16: np.dtype("f4"),
        bool: np.dtype("u1"),
    }.get(kind, np.dtype(kind).newbyteorder("="))


@pytest.mark.parametrize("suffix", [".trx", ".trk"])
def test_extract_everything_that_goes_with_streamlines(good, tmp_path, suffix):
    out = tmp_path / "out"
    extract_hdf5(good, out, tractogram=suffix, progress=False)
    with h5py.File(good) as h5:
        for name in h5:
            g, t = h5[name]["streamlines"], Tractogram.load(out / name / f"streamlines{suffix}")
            assert np.array_equal(t.dps["weight"], g["data_per_streamline/weight"]) and np.array_equal(
                t.dpp["fa"], g["data_per_point/fa"]
            )
            for key in ("left", "none"):
                ids = t.groups[key] if suffix == ".trx" else np.load(out / name / f"streamlines_group_{key}.npy")
                assert np.array_equal(ids, g[f"groups/{key}"])
            assert np.array_equal(np.load(out / name / "streamlines_connectivity.npy"), g["connectivity_matrix"])
            assert np.array_equal(np.load(out / name / "streamlines_source_ids.npy"), g["source_ids"])
            made = json.loads((out / name / "streamlines_connectivity.json").read_text())
            assert made["connectivity_matrix_type"] == ("from_labels" if name == "sub-2" else "from_blocs") and (
                name == "sub-2" or made["connectivity_nb_blocs"] == 2
            )
        labels = nib.load(out / "sub-2/streamlines_connectivity_labels.nii.gz")
        assert (
            np.array_equal(np.asarray(labels.dataobj), h5["sub-2/streamlines/connectivity_label_volume"])
            and labels.get_data_dtype() == np.int16
        )


def test_extract_follows_links(good, tmp_path):
    extract_hdf5(good, tmp_path / "a", progress=False)
    extract_hdf5(linked(good, tmp_path), tmp_path / "b", progress=False)
    names = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(names) == 16 and all(
        (tmp_path / "b" / n).read_bytes() == (tmp_path / "a" / n).read_bytes() for n in names
    )


@pytest.mark.real
def test_extract_a_file_of_dwi_ml(real_data, tmp_path):
    extract_hdf5(real_data / "dwi_ml_sample/data.hdf5", tmp_path, progress=False)
    for name in ("sub-1", "sub-2", "sub-3"):
        source = Tractogram.load(real_data / f"dwi_ml_sample/source/ready/{name}/bundle.trk")
        back = Tractogram.load(tmp_path / name / "streamlines.trx")
        assert np.abs(back.rasmm().points.astype(float) - source.rasmm().points).max() < 1e-4
        assert np.allclose(back.dps["weight"], source.dps["weight"], atol=1e-6)
        assert np.array_equal(
            np.load(tmp_path / name / "streamlines_connectivity.npy"),
            np.load(real_data / f"dwi_ml_sample/source/ready/{name}/conn.npy"),
        )


def test_extract_refuses_to_overwrite(good, tmp_path):
    (tmp_path / "out/sub-1").mkdir(parents=True)
    (tmp_path / "out/sub-1/input.nii.gz").write_text("mine")
    with pytest.raises(DataError, match="sub-1/input.nii.gz: exists already. Give overwrite"):
        extract_hdf5(good, tmp_path / "out", progress=False)
    assert [p.name for p in (tmp_path / "out").rglob("*") if p.is_file()] == ["input.nii.gz"]
    extract_hdf5(good, tmp_path / "out", overwrite=True, progress=False)
    assert (tmp_path / "out/sub-1/input.nii.gz").read_bytes() != b"mine"


def test_extract_says_when_it_cannot_write(good, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        DataError, match="sub-0/.*cannot be extracted .*Not a directory.*Check the space and the rights"
    ):
        extract_hdf5(good, tmp_path / "file", progress=False)


def test_extract_interrupted_leaves_whole_files(good, tmp_path, monkeypatch):
    def stop(path, *_):
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr("tractkit.hdf5.extract._save_nifti", stop)
    with pytest.raises(KeyboardInterrupt):
        extract_hdf5(good, tmp_path / "out", progress=False)
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    "words, message",
    [
        ({"subjects": "sub-9"}, "no subject 'sub-9', only sub-0, sub-1, sub-2"),
        ({"groups": ["inputs"]}, "sub-0: there is no group 'inputs'"),
    ],
)
def test_extract_unknown_names(good, tmp_path, words, message):
    with pytest.raises(DataError, match=message):
        extract_hdf5(good, tmp_path / "out", **words)
    for more in ({"repair": "all"}, {"tractogram": ".tck"}):
        with pytest.raises(ValueError, match="is none of"):
            extract_hdf5(good, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["..", "a\\b"])
@pytest.mark.parametrize("place", ["sub-1", "sub-1/input", "sub-1/streamlines/groups/left"])
def test_a_name_does_not_lead_out_of_the_folder(changed, tmp_path, name, place):
    path = changed(lambda h5: h5.move(place, "/".join([*place.split("/")[:-1], name])))
    with pytest.raises(DataError, match="no name for a file"):
        extract_hdf5(path, tmp_path / "out", tractogram=".trk", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["an offset is negative", "offsets are missing", "offsets are floats", "offsets are too few"]
)
def test_repair_of_offsets(good, changed, tmp_path, name):
    extract_hdf5(good, tmp_path / "whole", progress=False)
    path = changed(lambda h5: HDF5_DAMAGE[name][2](h5, "sub-1"))
    with pytest.raises(DataError, match="offsets.*Extract with repair='offsets'") as e:
        extract_hdf5(path, tmp_path / "out", progress=False)
    assert (e.value.subject, e.value.group, e.value.file) == ("sub-1", "streamlines", str(path))
    with pytest.warns(UserWarning, match="sub-1/streamlines: offsets are taken from the lengths"):
        extract_hdf5(path, tmp_path / "mended", repair="offsets", progress=False)
    assert (tmp_path / "mended/sub-1/streamlines.trx").read_bytes() == (
        tmp_path / "whole/sub-1/streamlines.trx"
    ).read_bytes()


def test_repair_of_nan(good, changed, tmp_path):
    def change(h5):
        g = h5["sub-1/streamlines"]
        g["data"][int(g["offsets"][2])] = np.nan
        g["data"][int(g["offsets"][5]) + 1, 1] = np.inf

    path = changed(change)
    with pytest.raises(DataError, match="2 of 11 streamlines have such points"):
        extract_hdf5(path, tmp_path / "out", subjects="sub-1", groups="streamlines", repair="offsets", progress=False)
    with pytest.warns(UserWarning, match="NaN or infinite are left out"):
        extract_hdf5(path, tmp_path / "out", subjects="sub-1", groups="streamlines", repair=["nan"], progress=False)
    extract_hdf5(good, tmp_path / "whole", subjects="sub-1", groups="streamlines", progress=False)
    t, whole = (Tractogram.load(tmp_path / f / "sub-1/streamlines.trx") for f in ("out", "whole"))
    kept = [i for i in range(11) if i not in (2, 5)]
    expected = whole[kept]
    assert np.array_equal(t.streamlines.points, expected.streamlines.points) and np.array_equal(
        t.dpp["fa"], expected.dpp["fa"]
    )
    assert np.array_equal(t.groups["left"], expected.groups["left"]) and t.dps["bundle"][:, 0].tolist() == kept
    assert np.load(tmp_path / "out/sub-1/streamlines_source_ids.npy").tolist() == kept


def test_repair_of_a_checksum(changed, tmp_path):
    def change(h5):
        h5["sub-1/input/data"][0, 0, 0, 0] += 1

    path = changed(change)
    with pytest.raises(DataError, match="tractkit_checksum"):
        extract_hdf5(path, tmp_path / "out", progress=False)
    with pytest.warns(UserWarning, match="sub-1/input: the content is taken as it is"):
        extract_hdf5(path, tmp_path / "mended", repair="checksum", progress=False)


def test_lengths_in_mm_are_not_needed(changed, tmp_path):
    extract_hdf5(
        changed(lambda h5: h5["sub-1/streamlines/euclidean_lengths"].__setitem__(0, -1)),
        tmp_path / "out",
        progress=False,
    )
    assert (tmp_path / "out/sub-1/streamlines.trx").exists()
