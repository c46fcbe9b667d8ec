"""What a volume's numbers are: said in the config, brought to one orientation, on record; not said, and refused."""

from pathlib import Path

import numpy as np
import pytest
from helpers_data import random_lines

from tractkit.core.files import DataError
from tractkit.data.dataset import MultiSubjectDataset
from tractkit.dwi.sh_basis import ShBasis, sh_turn
from tractkit.hdf5.config import read_config
from tractkit.hdf5.create import add_subject, create_hdf5
from tractkit.hdf5.describe import describe_hdf5
from tractkit.hdf5.validate import validate_hdf5
from tractkit.spatial.space import voxel_order, voxel_sizes
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume

pytestmark = pytest.mark.filterwarnings("ignore:The legacy:PendingDeprecationWarning")
VOLUME = {"type": "volume", "files": ["a.nii.gz", "b.nii.gz"], "standardization": "none"}
STREAMLINES = {"type": "streamlines", "files": ["lines.trk"]}
SHAPE = (6, 5, 4)
# how the grid of RAS becomes that of the file: order of axes, and which of the new ones run the other way
ORIENTATIONS = {"RAS": ((0, 1, 2), (1, 1, 1)), "LAS": ((0, 1, 2), (-1, 1, 1)), "AIR": ((1, 2, 0), (1, -1, 1)),
                "PSL": ((1, 2, 0), (-1, 1, -1))}


@pytest.mark.parametrize("said, problem", [
    ({"features": "vectors"}, "did you mean"),
    ({"features": "sh:descoteux07"}, "did you mean 'sh:descoteaux07'"),
    ({"features": ["scalars", "scalars", "scalars"]}, "3 words for 2 files"),
    ({"features": "peaks"}, "'axes' is missing"),
    ({"features": ["scalars", "sh:tournier07"]}, "'axes' is missing"),
    ({"features": "peaks", "axes": "world"}, "choose voxel, scanner"),
    ({"features": "scalars", "axes": "voxel"}, "'axes' without peaks"),
    ({"axes": "voxel"}, "'axes' without peaks"),
])
def test_what_features_cannot_be_is_one_error(said, problem):
    with pytest.raises(DataError, match=problem) as e:
        read_config({"input": VOLUME | said})
    assert e.value.group == "input"


def test_all_volumes_say_what_they_are_or_none():
    groups = read_config({"input": VOLUME | {"features": ["sh:tournier07", "scalars"], "axes": "scanner"},
                          "streamlines": {"type": "streamlines", "files": "a.trk"}})
    assert groups["input"].features == ("sh:tournier07", "scalars")
    with pytest.raises(DataError, match="other volumes do") as e:
        read_config({"input": VOLUME | {"features": "scalars"}, "mask": VOLUME})
    assert e.value.group == "mask"


# one brain, written in several orientations -----------------------------------------------------------------------

def write_subject(folder: Path, orientation: str, axes: str, basis: str = "descoteaux07_legacy"):
    """One brain, the same in each folder: harmonics, peaks, a map and streamlines, in the axes asked for."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(3)
    n = 16 if "full" in basis else 15
    sh, peaks, fa = (rng.normal(size=(*SHAPE, k)).astype(np.float32) for k in (n, 6, 1))
    tilt, _ = np.linalg.qr(np.eye(3) + 0.15 * rng.normal(size=(3, 3)))
    ras = np.eye(4)
    ras[:3, :3] = tilt * np.sign(np.diag(tilt)) * [2, 2.5, 3]
    ras[:3, 3] = [-5, 7, 3]
    lines = Tractogram(random_lines(rng, 8, SHAPE), ras, SHAPE)
    order, signs = ORIENTATIONS[orientation]
    turn = np.array(signs, float)[:, None] * np.eye(3)[list(order)]  # directions: RAS voxel axes → the file's
    back = np.eye(4)                                                  # points: the file's voxels → those of RAS
    back[:3, :3] = turn.T
    back[:3, 3] = turn.T @ -np.where(np.array(signs) < 0, np.array(SHAPE)[list(order)] - 1, 0)
    affine = ras @ back
    assert voxel_order(affine) == orientation
    to_axes = turn if axes == "voxel" else ras[:3, :3] / voxel_sizes(ras) if axes == "scanner" else (
        np.diag([-1.0 if np.linalg.det(affine) > 0 else 1, 1, 1]) @ turn)
    flips = tuple(slice(None, None, s) for s in signs)
    written = {"sh": sh @ sh_turn(ShBasis.parse(basis), n, to_axes).T, "fa": fa,
               "peaks": (peaks.reshape(*SHAPE, 2, 3) @ to_axes.T).reshape(*SHAPE, 6)}
    for name, data in written.items():
        Volume(data.transpose(*order, 3)[flips].astype(np.float32), affine).save(folder / f"{name}.nii.gz")
    shape = tuple(SHAPE[i] for i in order)
    Tractogram(lines.streamlines.transform(np.linalg.inv(back)), affine, shape).save(folder / "lines.trk")
    return np.concatenate([sh, peaks, fa], axis=-1), ras, lines


def config(axes="voxel", basis="descoteaux07_legacy", said=True, **more):
    features = {"features": [f"sh:{basis}", "peaks", "scalars"], "axes": axes} if said else {}
    return {"input": {"type": "volume", "files": ["sh.nii.gz", "peaks.nii.gz", "fa.nii.gz"],
                      "standardization": "none", **features, **more}, "streamlines": STREAMLINES}


@pytest.mark.parametrize("axes, basis", [("voxel", "descoteaux07_legacy"), ("scanner", "tournier07"),
                                         ("fsl", "descoteaux07_full")])
def test_one_brain_in_any_orientation_is_one_in_the_file(tmp_path, axes, basis):
    for orientation in ORIENTATIONS:
        data, affine, lines = write_subject(tmp_path / orientation, orientation, axes, basis)
    splits = {"training": list(ORIENTATIONS)[:2], "validation": ["AIR"], "testing": ["PSL"]}
    out = create_hdf5(tmp_path, tmp_path / "data.hdf5", config(axes, basis), splits, progress=False)
    dataset = MultiSubjectDataset(out).load_data()
    for subject in dataset.subjects():
        volume, t = subject.volumes["input"].volume, subject.streamlines["streamlines"].as_tractogram()
        np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
        np.testing.assert_allclose(volume.data, data, atol=2e-5)
        np.testing.assert_allclose(t.affine, affine, atol=1e-5)
        np.testing.assert_allclose(t.streamlines.points, lines.streamlines.points, atol=1e-4)
        record = subject.volumes["input"].record
        assert (record.orientation, record.source_orientation, record.axes) == ("RAS", subject.name, axes)
        assert record.features == (f"sh:{basis}", "peaks", "scalars")
    assert f"sh:{basis}, peaks, scalars in voxel axes RAS" in str(describe_hdf5(out))
    assert not validate_hdf5(out, progress=False).findings


def test_not_said_and_different_is_refused_and_listed(tmp_path):
    for orientation in ("RAS", "LAS"):
        write_subject(tmp_path / orientation, orientation, "voxel")
    splits = {"training": ["RAS"], "validation": ["LAS"]}
    with pytest.raises(DataError, match="RAS in RAS; LAS in LAS") as e:
        create_hdf5(tmp_path, tmp_path / "data.hdf5", config(said=False), splits, progress=False)
    assert "'features'" in e.value.fix and "accept_mixed_orientations=True" in e.value.fix
    assert not (tmp_path / "data.hdf5").exists()
    out = create_hdf5(tmp_path, tmp_path / "data.hdf5", config(said=False), splits, progress=False,
                      accept_mixed_orientations=True)
    with pytest.warns(UserWarning, match="voxel axes of its subjects run differently"):
        MultiSubjectDataset(out).load_data()
    assert [f.severity for f in validate_hdf5(out, progress=False).findings] == ["warning"]


def test_streamlines_in_another_orientation_than_their_volume_are_refused(tmp_path):
    for orientation in ("RAS", "PSL"):
        write_subject(tmp_path / orientation, orientation, "voxel")
    (tmp_path / "PSL" / "lines.trk").rename(tmp_path / "RAS" / "lines.trk")
    with pytest.raises(DataError, match="voxel axes run PSL, those of the volume RAS") as e:
        create_hdf5(tmp_path, tmp_path / "data.hdf5", config(said=False), {"training": ["RAS"]}, progress=False)
    assert e.value.file and e.value.subject == "RAS" and e.value.group == "streamlines"


def test_a_subject_that_is_added_is_turned_or_refused(tmp_path):
    for orientation in ("LAS", "AIR"):
        data, _, _ = write_subject(tmp_path / orientation, orientation, "voxel")
    said, silent = (create_hdf5(tmp_path, tmp_path / f"{name}.hdf5", config(said=name == "said"), {"training": ["LAS"]},
                                one_file_per_subject=True, progress=False) for name in ("said", "silent"))
    add_subject(said, tmp_path, "AIR", "testing", progress=False)
    added = MultiSubjectDataset(said).load_data().testing_set[0].volumes["input"].volume
    np.testing.assert_allclose(added.data, data, atol=2e-5)
    with pytest.raises(DataError, match="LAS in LAS; AIR in AIR"):
        add_subject(silent, tmp_path, "AIR", "testing", progress=False)


def test_labels_are_turned_and_blocs_refused(tmp_path):
    write_subject(tmp_path / "LAS", "LAS", "voxel")
    np.save(tmp_path / "LAS" / "matrix.npy", np.eye(3))
    image = Volume.load(tmp_path / "LAS" / "fa.nii.gz")
    labels = np.zeros(image.shape3d, np.int16)
    labels[0], labels[1], labels[2] = 1, 2, 3
    Volume(labels, image.affine).save(tmp_path / "LAS" / "labels.nii.gz")
    groups = config()
    groups["streamlines"] = STREAMLINES | {"connectivity_matrix": "matrix.npy", "connectivity_labels": "labels.nii.gz"}
    out = create_hdf5(tmp_path, tmp_path / "a.hdf5", groups, {"training": ["LAS"]}, progress=False)
    stored = MultiSubjectDataset(out).load_data().training_set[0].streamlines["streamlines"].connectivity.labels
    assert np.array_equal(stored, labels[::-1])
    groups["streamlines"] = STREAMLINES | {"connectivity_matrix": "matrix.npy", "connectivity_nb_blocs": [3, 1, 1]}
    with pytest.raises(DataError, match="blocs of a grid that is LAS"):
        create_hdf5(tmp_path, tmp_path / "b.hdf5", groups, {"training": ["LAS"]}, progress=False)


def test_numbers_that_do_not_fit_are_named_before_anything_is_written(tmp_path):
    write_subject(tmp_path / "LAS", "LAS", "voxel")
    groups = config()
    groups["input"]["features"] = ["sh:descoteaux07_full", "peaks", "scalars"]
    with pytest.raises(DataError, match="15 coefficients fit no order") as e:
        create_hdf5(tmp_path, tmp_path / "a.hdf5", groups, {"training": ["LAS"]}, progress=False)
    assert e.value.file.endswith("sh.nii.gz") and not (tmp_path / "a.hdf5").exists()
