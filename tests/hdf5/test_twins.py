"""hdf5: one subject under two names, and maps that hold NaN outside of the brain."""

import json
import shutil
import warnings

import h5py
import nibabel as nib
import numpy as np
import pytest
from helpers_data import CONFIG, make_subject

from tractkit.core.files import DataError
from tractkit.data.dataset import MultiSubjectDataset
from tractkit.hdf5.create import add_subject, create_hdf5
from tractkit.hdf5.layout import hdf5_fingerprint
from tractkit.hdf5.validate import validate_hdf5
from tractkit.spatial.tractogram import Tractogram


@pytest.fixture
def twins(tmp_path):
    """Three subjects, of which two are one."""
    for i, name in enumerate(("a", "b")):
        make_subject(tmp_path / name, np.random.default_rng(i))
    shutil.copytree(tmp_path / "a", tmp_path / "twin")
    return tmp_path


@pytest.mark.parametrize("split", ["validation", "testing"])
def test_a_subject_under_two_names_across_splits(twins, split):
    with pytest.raises(DataError, match=f"twin/streamlines: has the streamlines of a of training, and is in {split}"):
        create_hdf5(twins, twins / "x.hdf5", CONFIG, {"training": ["a", "b"], split: ["twin"]}, progress=False)
    assert not (twins / "x.hdf5").exists()


def test_a_subject_under_two_names_in_one_split(twins):
    with pytest.warns(UserWarning, match="twin/streamlines: has the streamlines of a"):
        path = create_hdf5(twins, twins / "x.hdf5", CONFIG, {"training": ["a", "b", "twin"]}, progress=False)
    report = validate_hdf5(path, progress=False)
    assert report.ok and [(f.subject, f.group) for f in report.warnings] == [("twin", "streamlines")]
    with h5py.File(path, "r+") as h5:  # as files were made before
        names = h5py.string_dtype()
        h5.attrs["training_subjs"], h5.attrs["testing_subjs"] = (
            np.array(["a", "b"], dtype=names), np.array(["twin"], dtype=names))
        for name in ("a", "twin"):
            del h5[f"{name}/streamlines"].attrs["tractkit_checksum"]
    report = validate_hdf5(path, progress=False)
    assert [(f.subject, f.group) for f in report.errors] == [("twin", "streamlines")]
    assert "training" in report.errors[0].problem and "testing" in report.errors[0].problem


def test_a_twin_is_not_added(twins):
    path = create_hdf5(twins, twins / "x.hdf5", CONFIG, {"training": ["a", "b"]}, one_file_per_subject=True,
                       progress=False)
    before = path.read_bytes()
    with pytest.raises(DataError, match="has the streamlines of a of training"):
        add_subject(path, twins, "twin", "testing", progress=False)
    assert path.read_bytes() == before


def test_shares_of_one_subject_are_no_twins(twins):
    shares = {"training": ["a 0.5"], "validation": ["a 0.5"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = create_hdf5(twins, twins / "x.hdf5", CONFIG, shares, progress=False)
        linked = create_hdf5(twins, twins / "y.hdf5", CONFIG, shares, one_file_per_subject=True, progress=False)
        add_subject(linked, twins, "b", "testing", progress=False)
    assert not validate_hdf5(linked, progress=False).findings
    assert not validate_hdf5(path, progress=False).findings


def with_nan(folder, where):
    """A volume of a subject with NaN and infinity, and its mask."""
    image = nib.load(folder / "xyz.nii.gz")
    data, mask = image.get_fdata(dtype=np.float32), np.zeros(image.shape[:3], np.uint8)
    mask[2:8, 2:8, 2:8] = 1
    data[0, 0, :3] = np.nan
    data[0, 0, 3] = np.inf
    data[where] = np.nan
    nib.save(nib.Nifti1Image(data, image.affine), folder / "xyz.nii.gz")
    nib.save(nib.Nifti1Image(mask, image.affine), folder / "mask.nii.gz")


@pytest.mark.parametrize("way", ["all", "none"])
def test_nan_outside_of_the_mask(tmp_path, way):
    make_subject(tmp_path / "a", np.random.default_rng(0))
    with_nan(tmp_path / "a", (0, 1, 0))
    group = {"type": "volume", "files": "xyz.nii.gz", "standardization": way, "std_mask": "mask.nii.gz"}
    with pytest.warns(
        UserWarning, match="xyz.nii.gz: 15 values outside of the mask are NaN or infinite; replaced by 0"
    ):
        path = create_hdf5(tmp_path, tmp_path / "x.hdf5", CONFIG | {"input": group}, {"training": ["a"]},
                           progress=False)
    with h5py.File(path) as h5:
        v = h5["a/input"]
        assert np.isfinite(v["data"][()]).all() and json.loads(v.attrs["tractkit_sources"])[0]["replaced"] == 15
        if way == "none":
            assert (v["data"][0, 0, :4] == 0).all()
    with_nan(tmp_path / "a", (3, 3, 3))
    with pytest.raises(DataError, match="3 values inside of the mask are NaN or infinite"):
        create_hdf5(tmp_path, tmp_path / "y.hdf5", CONFIG | {"input": group}, {"training": ["a"]}, progress=False)
    with pytest.raises(DataError, match="values are not finite.*std_mask"):
        create_hdf5(tmp_path, tmp_path / "y.hdf5", CONFIG, {"training": ["a"]}, progress=False)


def rewritten(folder, change):
    """Write the streamlines of a subject otherwise; the volume stays."""
    t = Tractogram.load(folder / "lines.trk")
    change(t).save(folder / "lines.trk")


@pytest.mark.parametrize("change", [lambda t: t[::2], lambda t: t[::-1]], ids=["every second", "reversed order"])
def test_a_twin_with_other_streamlines_is_known_by_its_volume(twins, change):
    rewritten(twins / "twin", change)
    with pytest.raises(DataError, match="twin/input: has the volume of a of training, and is in testing"):
        create_hdf5(twins, twins / "x.hdf5", CONFIG, {"training": ["a", "b"], "testing": ["twin"]}, progress=False)
    with pytest.warns(UserWarning, match="twin/input: has the volume of a: one subject counts twice"):
        path = create_hdf5(twins, twins / "x.hdf5", CONFIG, {"training": ["a", "b", "twin"]}, progress=False)
    assert [f.group for f in validate_hdf5(path, progress=False).warnings] == ["input"]


def test_a_volume_linked_across_splits_and_a_template_of_all(twins):
    shutil.copy(twins / "a" / "xyz.nii.gz", twins / "b" / "template.nii.gz")
    shutil.copy(twins / "a" / "xyz.nii.gz", twins / "a" / "template.nii.gz")
    path = create_hdf5(twins, twins / "x.hdf5", CONFIG, {"training": ["a"], "testing": ["b"]}, progress=False)
    assert validate_hdf5(path, progress=False).ok
    with h5py.File(path, "r+") as h5:
        del h5["b/input"]
        h5["b/input"] = h5py.SoftLink("/a/input")
    report = validate_hdf5(path, progress=False)
    assert ("b", "input", "has the volume of a of training, and is in testing") in [
        (f.subject, f.group, f.problem) for f in report.errors]
    with h5py.File(path, "r+") as h5:  # what all subjects share beside their own: no twins
        h5["a/template"] = h5["b/template"] = h5["a/input"]
        del h5["b/input"]
        h5.copy("a/input", "b/input")
        h5["b/input/data"][0] += 1
        del h5["b/input"].attrs["tractkit_checksum"], h5["a/input"].attrs["tractkit_checksum"]
    assert not [f for f in validate_hdf5(path, progress=False).errors if "has the" in f.problem]


def test_a_mask_of_several_volumes_is_one_error(tmp_path):
    make_subject(tmp_path / "a", np.random.default_rng(0))
    image = nib.load(tmp_path / "a" / "xyz.nii.gz")
    mask = np.ones((*image.shape[:3], 3), np.uint8)
    nib.save(nib.Nifti1Image(mask, image.affine), tmp_path / "a" / "mask.nii.gz")
    group = {"type": "volume", "files": "xyz.nii.gz", "standardization": "all", "std_mask": "mask.nii.gz"}
    with pytest.raises(DataError, match="mask.nii.gz: a/input: holds 3 volumes, and a mask is one"):
        create_hdf5(tmp_path, tmp_path / "x.hdf5", CONFIG | {"input": group}, {"training": ["a"]}, progress=False)
    nib.save(nib.Nifti1Image(mask[..., :1], image.affine), tmp_path / "a" / "mask.nii.gz")
    create_hdf5(tmp_path, tmp_path / "x.hdf5", CONFIG | {"input": group}, {"training": ["a"]}, progress=False)


@pytest.mark.parametrize("value", [5, h5py.Empty("S1"), "a", ["."], ["a/input"]], ids=str)
def test_lists_of_subjects_that_are_none(twins, value):
    path = create_hdf5(twins, twins / "x.hdf5", CONFIG, {"training": ["a"], "testing": ["b"]}, progress=False)
    with h5py.File(path, "r+") as h5:
        h5.attrs["training_subjs"] = value
    report = validate_hdf5(path, progress=False)
    assert "training_subjs" in report.errors[0].place
    if not isinstance(value, list):
        for read in (lambda p: MultiSubjectDataset(p).load_data(), hdf5_fingerprint):
            with pytest.raises(DataError, match="'training_subjs' is no list of names"):
                read(path)
