"""Are gradients, coefficients and streamlines in one frame? Each mistake once, on a small phantom."""

import json
import shutil
import warnings
from dataclasses import replace

import h5py
import numpy as np
import pytest
from dipy.data import get_sphere
from dipy.reconst.shm import sf_to_sh

from tractkit.cli.commands import main
from tractkit.core.files import DataError
from tractkit.demo import pipeline
from tractkit.demo.subject_files import SubjectFiles
from tractkit.dwi.anatomy import PhantomSettings
from tractkit.dwi.basis_check import choose_basis, even_part
from tractkit.dwi.fibre_coherence import (
    axis_maps,
    choose,
    coherence_of_maps,
    cubes_of,
    describe_map,
    tensor_directions,
)
from tractkit.dwi.gradients import DWI
from tractkit.dwi.placement import choose_placement, placements
from tractkit.dwi.simulate import PhantomSubject, simulate_subject
from tractkit.dwi.space_check import (
    FibreField,
    check_space,
    check_streamlines,
    check_subjects,
    field_of_dwi,
    turn_of,
)
from tractkit.hdf5.create import add_subject, create_hdf5
from tractkit.hdf5.describe import describe_hdf5
from tractkit.spatial.streamlines import Streamlines, concatenate_streamlines
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
SAME = np.eye(3)[None]


@pytest.fixture(scope="module")
def subject() -> PhantomSubject:
    return simulate_subject("sub-01", PhantomSettings(0, layout="rotated", n_directions=12, n_streamlines=20))


@pytest.fixture(scope="module")
def lines(subject):
    return concatenate_streamlines([b.streamlines for b in subject.bundles.values()])


@pytest.fixture(scope="module")
def dwi(subject) -> DWI:
    return DWI(subject.dwi, subject.bvals, subject.bvecs, subject.mask.data)


@pytest.fixture(scope="module")
def field(dwi):
    directions, fa = tensor_directions(dwi.volume.data, dwi.bvals, dwi.bvecs, dwi.mask, 50)
    return np.where(fa[..., None] > 0.2, directions, 0)[..., None, :]


@pytest.fixture(scope="module")
def field_(dwi) -> FibreField:
    return field_of_dwi(dwi)


def possible_maps(field, sizes) -> list[str]:
    """The maps of axes that repair a field of directions, as far as its own coherence shows."""
    scores, voxels = coherence_of_maps(field, field.any(axis=(-1, -2)), sizes, axis_maps())
    return [describe_map(m) for m in axis_maps()[choose(scores, cubes_of(voxels)).possible]]


def test_each_map_of_the_gradients_axes_is_repaired_or_left_open(field, dwi):
    for turn in axis_maps()[::4]:
        given = possible_maps(field @ turn.T.astype(np.float32), dwi.volume.voxel_sizes)
        seen = [m for m in axis_maps() if np.array_equal(abs(m @ turn), np.eye(3))]  # as it was, but for signs
        assert any(describe_map(m) in given for m in seen)
        assert len(given) <= 2  # of the plane in which the fibres lie, nothing tells the two sides apart
        right = next(m for m in axis_maps() if np.array_equal(abs(np.trace(m @ turn)), 3.0))
        assert describe_map(right) in given


def test_directions_that_tell_nothing_leave_all_open(field, dwi):
    noise = np.random.default_rng(0).normal(size=field.shape).astype(np.float32)
    noise = np.where(field.any(axis=-1, keepdims=True), noise / np.linalg.norm(noise, axis=-1, keepdims=True), 0)
    assert len(possible_maps(noise, dwi.volume.voxel_sizes)) == 24
    same = np.where(field.any(axis=-1, keepdims=True), np.float32([0, 0.6, 0.8]), 0)
    assert len(possible_maps(same, dwi.volume.voxel_sizes)) == 24
    assert len(possible_maps(field[:6, :6, :6], dwi.volume.voxel_sizes)) == 24


@pytest.mark.parametrize("basis, kind", [
    ("tournier07", "fodf"),
    *(pytest.param(basis, kind, marks=pytest.mark.full) for basis, kind in [
        ("descoteaux07_legacy", "fodf"), ("tournier07", "signal"),
        ("descoteaux07", "fodf"), ("tournier07_legacy", "fodf"), ("descoteaux07_legacy", "signal"),
        ("descoteaux07", "signal"), ("tournier07_legacy", "signal")])])
def test_basis_and_kind_are_found(field, dwi, basis, kind):
    sphere, name, fibres = get_sphere(name="repulsion100"), basis.partition("_")[0], field.any(axis=(-1, -2))
    along = (field[fibres][:, 0] @ sphere.vertices.T) ** 2
    values = np.exp(12 * (along - 1)) if kind == "fodf" else np.exp(-2.5 * along)
    noise = np.random.default_rng(0).normal(size=values.shape)
    full, data = basis == "tournier07", np.zeros((*fibres.shape, 81 if basis == "tournier07" else 45), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data[fibres] = sf_to_sh(values + 0.05 * noise, sphere, sh_order_max=8, basis_type=name,
                                legacy="legacy" in basis, full_basis=full)
    data += np.float32(1e-3)  # outside of white matter nothing but a little of everything
    even = even_part(data)
    assert even is not None and even.shape[-1] == 45
    found = choose_basis(even, dwi.volume.voxel_sizes, "descoteaux07")
    possible = {b for b, row in zip(found.bases, found.possible, strict=True) if row.any()}
    assert found.kind == kind and basis in possible
    assert possible == {basis} or (kind == "signal" and possible == {"tournier07", "tournier07_legacy"})


def test_streamlines_in_place_are_in_place(field, lines, dwi):
    found = choose_placement(field, lines, dwi.volume.affine, SAME)
    assert found.best == (0, 0) and found.possible.sum() == 1 and found.inside == 1.0
    assert found.shift is not None and np.abs(found.shift).max() < 0.2


def test_each_misplacement_is_repaired(field, lines, dwi):
    every = placements(dwi.volume.affine, field.shape[:3])
    for mistake in every[5::40]:
        moved = lines.transform(np.linalg.inv(mistake.matrix))
        found = choose_placement(field, moved, dwi.volume.affine, SAME)
        assert found.possible.sum() == 1
        back = moved.transform(found.tried[found.best[1]].matrix)
        assert np.abs(back.points - lines.points).max() < 0.6


@pytest.mark.parametrize("by", [-0.5, 0.5])
def test_half_a_voxel_is_seen(field, lines, dwi, by):
    moved = np.eye(4)
    moved[:3, 3] = by
    found = choose_placement(field, lines.transform(moved), dwi.volume.affine, SAME)
    assert found.best == (0, 0) and found.shift is not None
    assert np.abs(found.shift + by).max() < 0.2


def moved(shape, turn: float = 0.0, scale: float = 1.0, shift=(0, 0, 0)) -> np.ndarray:
    """Return what turns about the third axis, by degrees, and scales about the middle of a grid, then shifts."""
    c, s, matrix = np.cos(np.radians(turn)), np.sin(np.radians(turn)), np.eye(4)
    matrix[:3, :3] = scale * np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    matrix[:3, 3] = np.array(shape) / 2 - matrix[:3, :3] @ (np.array(shape) / 2) + shift
    return matrix


@pytest.mark.parametrize("shift, fix", [
    ((1, 1, 1), "subtract 1 voxel in x, subtract 1 voxel in y, subtract 1 voxel in z (voxels were counted from 1"),
    ((2, 0, 0), "subtract 2 voxels in x"),
    pytest.param((0, -3, 0), "add 3 voxels in y", marks=pytest.mark.full)])
def test_whole_voxels_are_named(field_, lines, dwi, shift, fix):
    bad = lines.transform(moved(dwi.volume.shape3d, shift=shift))
    finding = check_streamlines(Tractogram(bad, dwi.volume.affine, dwi.volume.shape3d), field_)
    assert finding.status == "wrong" and fix in finding.fix


@pytest.mark.parametrize("turn, scale", [
    (8, 1.0), (0, 1.2), *(pytest.param(*k, marks=pytest.mark.full) for k in [(15, 1.0), (-20, 1.0), (0, 0.8)])])
def test_what_is_turned_or_scaled_is_wrong(field_, lines, dwi, turn, scale):
    bad = lines.transform(moved(dwi.volume.shape3d, turn, scale))
    finding = check_streamlines(Tractogram(bad, dwi.volume.affine, dwi.volume.shape3d), field_)
    assert finding.status == "wrong" and "compare the transforms" in finding.fix


@pytest.mark.full
def test_a_small_scale_of_many_streamlines_is_not_called_right():
    subject = simulate_subject("sub-01", PhantomSettings(0, layout="rotated"))
    lines = concatenate_streamlines([b.streamlines for b in subject.bundles.values()])
    bad = lines.transform(moved(np.array(subject.dwi.shape3d) - 1, scale=0.9))
    field = field_of_dwi(DWI(subject.dwi, subject.bvals, subject.bvecs, subject.mask.data))
    finding = check_streamlines(Tractogram(bad, subject.dwi.affine, subject.dwi.shape3d), field)
    assert finding.status == "open" and "moved, turned or scaled" in finding.left


def test_a_mirror_that_is_moved_too_is_not_repaired_by_the_mirror_alone(field_, lines, dwi):
    mirror = np.diag([-1.0, 1, 1, 1]) + [[0, 0, 0, dwi.volume.shape3d[0] - 1], *[[0] * 4] * 3]
    bad = lines.transform(moved(dwi.volume.shape3d, shift=(2, 2, 0)) @ mirror)
    finding = check_streamlines(Tractogram(bad, dwi.volume.affine, dwi.volume.shape3d), field_)
    assert finding.status == "open" or "compare the transforms" in finding.fix


def test_random_lines_are_never_right(field_, lines, dwi):
    ways = np.random.default_rng(0).normal(size=lines.points.shape).astype(np.float32)
    noise = Streamlines(lines.points + ways, lines.offsets)  # where the fibres are, but along none
    finding = check_streamlines(Tractogram(noise, dwi.volume.affine, dwi.volume.shape3d), field_)
    assert finding.status == "open"


@pytest.mark.parametrize("few", [slice(0, 20), slice(20, 40), slice(None, None, 3)])
def test_one_bundle_and_few_streamlines_are_not_wrong(field_, lines, dwi, few):
    ids = np.arange(len(lines.offsets) - 1)[few]
    kept = [lines.points[lines.offsets[i]:lines.offsets[i + 1]] for i in ids]
    some = Streamlines(np.concatenate(kept), np.cumsum([0, *map(len, kept)]))
    finding = check_streamlines(Tractogram(some, dwi.volume.affine, dwi.volume.shape3d), field_)
    assert finding.status != "wrong" and "motion" not in finding.evidence


def test_nothing_but_a_map_of_white_matter_leaves_mirrors_open(field, lines, dwi):
    white = field.any(axis=(-1, -2)).astype(np.float32)
    found = choose_placement(white, lines, dwi.volume.affine, SAME)
    assert found.best == (0, 0) and found.possible.sum() > 1


# ---- a subject ------------------------------------------------------------------------------------------------


def test_a_good_subject_has_nothing_wrong(subject, lines, dwi):
    tractogram = Tractogram(lines, dwi.volume.affine, dwi.volume.shape3d)
    report = check_space(tractogram, dwi=dwi).raise_if_wrong()
    assert [(f.what, f.status) for f in report.findings] == [("gradients", "right"), ("streamlines", "right")]
    assert report.findings[0].left == ("(x, y, -z)",) and "nothing wrong" in report._repr_html_()


def test_wrong_gradients_are_named_and_not_blamed_on_the_streamlines(lines, dwi):
    bad = replace(dwi, bvecs=dwi.bvecs * [1, -1, 1])
    report = check_space(Tractogram(lines, dwi.volume.affine, dwi.volume.shape3d), dwi=bad)
    assert [f.status for f in report.findings] == ["wrong", "right"]
    assert "(x, -y, z)" in report.findings[0].fix
    with pytest.raises(DataError, match="gradients: fibres do not go on"):
        report.raise_if_wrong()


def test_streamlines_tracked_with_wrong_gradients_are_to_be_tracked_again(subject, dwi):
    points = np.argwhere(subject.wm_mask.data[..., 5:7])[::3] + [0, 0, 5]
    bad = replace(dwi, bvecs=dwi.bvecs * [1, -1, 1])
    directions, _ = tensor_directions(bad.volume.data, bad.bvals, bad.bvecs, bad.mask, 50)
    way = directions[tuple(points.T)]
    short = np.stack([points - 0.3 * way, points + 0.3 * way], axis=1).astype(np.float32)
    tractogram = Tractogram(Streamlines(short.reshape(-1, 3), np.arange(len(points) + 1) * 2), dwi.volume.affine,
                            dwi.volume.shape3d)
    report = check_space(tractogram, dwi=bad)
    assert [f.status for f in report.findings] == ["wrong", "wrong"]
    assert "Track them again" in report.findings[1].fix


@pytest.mark.parametrize("axes, order", [("scanner", [1, 0, 2]), ("fsl", [0, 1, 2])])
def test_peaks_in_other_axes_say_which(field, dwi, axes, order):
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[order] * 2 * (-1 if axes == "scanner" else 1)  # fsl: of positive determinant
    peaks = Volume(field[..., 0, :] @ turn_of(axes, affine), affine)
    white = Volume(field.any(axis=(-1, -2)).astype(np.float32), affine)
    assert check_space(peaks=peaks, axes=axes).findings[0].status == "open"  # of one length, so it may all be noise
    assert check_space(peaks=peaks, axes=axes, white_matter=white).findings[0].status == "right"
    (finding,) = check_space(peaks=peaks, white_matter=white).findings
    assert finding.status == "wrong" and f"axes={axes!r}" in finding.fix


def test_what_cannot_be_compared_is_open(lines, dwi):
    tractogram = Tractogram(lines, dwi.volume.affine, dwi.volume.shape3d)
    assert [f.status for f in check_space(tractogram).findings] == ["open"]
    with pytest.raises(DataError, match="fit no order"):
        check_space(sh=Volume(np.zeros((3, 3, 3, 7)), np.eye(4)))
    with pytest.raises(DataError, match="three numbers each"):
        check_space(peaks=Volume(np.zeros((3, 3, 3, 4)), np.eye(4)))


def test_a_folder_is_searched(subject, lines, dwi, tmp_path, capsys):
    folder = tmp_path / "sub-01"
    folder.mkdir()
    subject.dwi.save(folder / "dwi.nii.gz")
    np.savetxt(folder / "bvals", subject.bvals[None])
    np.savetxt(folder / "bvecs", subject.bvecs.T)
    subject.mask.save(folder / "mask.nii.gz")
    mirrored = lines.transform(np.diag([-1.0, 1, 1, 1]) + [[0, 0, 0, 47], *[[0] * 4] * 3])
    Tractogram(mirrored, dwi.volume.affine, dwi.volume.shape3d).save(folder / "tractogram.trk")
    (report,) = check_subjects(folder)
    assert [(f.what, f.status) for f in report.findings] == [
        ("gradients bvecs", "right"), ("streamlines tractogram.trk", "wrong")]
    assert "(-x, y, z)" in report.findings[1].fix
    assert main(["check-space", str(folder)]) == 1
    assert "WRONG  streamlines tractogram.trk" in capsys.readouterr().out
    assert main(["check-space", str(tmp_path / "none"), str(folder), "--basis", "descoteaux"]) == 2
    assert "did you mean" in capsys.readouterr().err
    directions = ([-1, 1, 1] * subject.bvecs).T  # read as FSL's, of a positive determinant
    np.savetxt(folder / "bvecs", directions)
    (folder / "tractogram.trk").unlink()
    (finding,) = check_subjects(folder)[0].findings
    assert finding.status == "wrong" and "(-x, y, z)" in finding.fix


def test_a_data_file_of_what_is_not_in_one_frame_is_refused(field, lines, dwi, tmp_path):
    (tmp_path / "sub-01").mkdir()
    Volume(field[..., 0, :], dwi.volume.affine).save(tmp_path / "sub-01" / "peaks.nii.gz")
    mirrored = lines.transform(np.diag([-1.0, 1, 1, 1]) + [[0, 0, 0, 47], *[[0] * 4] * 3])
    Tractogram(mirrored, dwi.volume.affine, dwi.volume.shape3d).save(tmp_path / "sub-01" / "lines.trk")
    config = {"input": {"type": "volume", "files": ["peaks.nii.gz"], "standardization": "none", "features": "peaks",
                        "axes": "voxel"},
              "streamlines": {"type": "streamlines", "files": ["lines.trk"]}}
    splits = {"training": ["sub-01"]}
    with pytest.raises(DataError, match=r"sub-01.*streamlines lines.trk.*\(-x, y, z\).*accept_wrong_space=True"):
        create_hdf5(tmp_path, tmp_path / "data.hdf5", config, splits, progress=False)
    assert not (tmp_path / "data.hdf5").exists()
    out = tmp_path / "data.hdf5"
    create_hdf5(tmp_path, out, config, splits, progress=False, accept_wrong_space=True)
    assert "1 not checked, accepted (sub-01)" in describe_hdf5(out).about["one frame"]
    Tractogram(lines, dwi.volume.affine, dwi.volume.shape3d).save(tmp_path / "sub-01" / "lines.trk")
    shutil.copytree(tmp_path / "sub-01", tmp_path / "sub-02")
    Tractogram(lines[:-1], dwi.volume.affine, dwi.volume.shape3d).save(tmp_path / "sub-02" / "lines.trk")
    create_hdf5(tmp_path, out, config, splits, progress=False, overwrite=True, one_file_per_subject=True)
    add_subject(out, tmp_path, "sub-02", "training", accept_wrong_space=True, progress=False)
    assert describe_hdf5(out).about["one frame"] == "1 undecided (sub-01); 1 not checked, accepted (sub-02)"
    with h5py.File(out) as h5:
        record = json.loads(h5.attrs["tractkit_space_check"])
    assert record["version"] == 1
    assert [f["status"] for f in record["subjects"]["sub-01"]["findings"]] == ["open", "right"]


def test_another_basis_of_fibre_orientations_is_named_with_the_option(field, lines, dwi, tmp_path, capsys):
    sphere, fibres = get_sphere(name="repulsion100"), field.any(axis=(-1, -2))
    data = np.full((*fibres.shape, 45), 1e-3, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data[fibres] += sf_to_sh(np.exp(12 * ((field[fibres][:, 0] @ sphere.vertices.T) ** 2 - 1)), sphere,
                                 sh_order_max=8, basis_type="descoteaux07", legacy=False)
    folder = tmp_path / "study" / "sub-01"
    folder.mkdir(parents=True)
    Volume(data, dwi.volume.affine).save(folder / "sub-01__fodf.nii.gz")
    Tractogram(lines, dwi.volume.affine, dwi.volume.shape3d).save(folder / "sub-01__all.trk")
    command = ["hdf5", "from-bids", str(tmp_path / "study"), str(tmp_path / "data.hdf5")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "'features': 'sh:descoteaux07' in the config (from-bids: --basis 'descoteaux07')" in said
    assert "streamlines" not in said  # they are along the fibres, whatever the basis
    assert main([*command, "--basis", "descoteaux07", "--overwrite"]) == 0
    with h5py.File(tmp_path / "data.hdf5") as h5:
        assert json.loads(h5.attrs["tractkit_config"])["input"]["features"] == ["sh:descoteaux07"]
        assert {r["verdict"] for r in json.loads(h5.attrs["tractkit_space_check"])["subjects"].values()} == {"right"}
    assert main([*command, "--basis", "descoteau", "--overwrite"]) == 2


def test_the_demo_begins_with_what_is_in_one_frame(subject, lines, dwi, tmp_path, monkeypatch):
    def stop(*settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "open_folder", stop)
    subject.dwi.save(tmp_path / "dwi.nii.gz")
    subject.mask.save(tmp_path / "mask.nii.gz")
    np.savetxt(tmp_path / "bvals", subject.bvals[None])
    np.savetxt(tmp_path / "bvecs", (subject.bvecs * [1, -1, 1]).T)
    Tractogram(lines, dwi.volume.affine, dwi.volume.shape3d).save(tmp_path / "tractogram.trk")
    files = SubjectFiles.find(tmp_path)
    with pytest.raises(DataError, match=r"\(x, -y, z\).*accept_wrong_space=True"):
        pipeline.run_demo(tmp_path / "out", subjects=[files])
    assert not (tmp_path / "out").exists()
    with pytest.raises(KeyboardInterrupt):
        pipeline.run_demo(tmp_path / "out", subjects=[files], accept_wrong_space=True)


def test_a_subject_that_cannot_be_read_does_not_hide_the_others(lines, dwi, tmp_path, capsys):
    for name in ("sub-01", "sub-02"):
        (tmp_path / name / "dwi").mkdir(parents=True)
        tractogram = Tractogram(lines, dwi.volume.affine, dwi.volume.shape3d)
        tractogram.save(tmp_path / name / "dwi" / f"{name}_tractogram.tck")
        dwi.volume.save(tmp_path / name / "dwi" / f"{name}_FA.nii.gz")
    (tmp_path / "sub-01" / "dwi" / "sub-01_tractogram.tck").rename(tmp_path / "sub-01/dwi/sub-01_tractogram.tck.gz")
    assert main(["check-space", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert "sub-02" in shown.out and "sub-01" not in shown.out
    assert "sub-01_tractogram.tck.gz: is compressed" in shown.err and "gunzip -k" in shown.err
    with pytest.raises(DataError, match="is compressed"):
        check_subjects(tmp_path)
