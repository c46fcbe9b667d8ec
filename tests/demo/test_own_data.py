"""One's own subjects in a demo: in several orientations, with points outside, and with settings of one's own."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from tractkit.cli.commands import main
from tractkit.core.files import DataError
from tractkit.data.dataset import MultiSubjectDataset
from tractkit.demo import pipeline
from tractkit.demo.pipeline import run_demo
from tractkit.demo.settings import demo_settings
from tractkit.demo.steps import seeds_and_mask
from tractkit.demo.subject_files import SubjectFiles
from tractkit.dwi.phantom import sample_subjects
from tractkit.hdf5.recipe import check_input, prepare_input, recipe_of
from tractkit.spatial.space import same_grid, voxel_order
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume
from tractkit.tracking.tracker import check_seeds

pytestmark = pytest.mark.filterwarnings("ignore:The legacy descoteaux07:PendingDeprecationWarning")
FILES = ("dwi.nii.gz", "bvals", "bvecs", "mask.nii.gz", "tractogram.trk")


def write_turned(
    source: Path, folder: Path, orientation: str,
    small: bool = True,  # a mask of some voxels and some of the streamlines, which is faster
) -> SubjectFiles:
    """Write a subject in another orientation: volumes, b-vectors and streamlines, by nibabel alone."""
    folder.mkdir(parents=True)
    start = nib.load(source / "dwi.nii.gz").affine
    old, new = nib.orientations.io_orientation(start), nib.orientations.axcodes2ornt(orientation)
    change = nib.orientations.ornt_transform(old, new)
    for name in ("dwi.nii.gz", "mask.nii.gz"):
        image = nib.load(source / name)
        if small and name == "mask.nii.gz":
            part = np.zeros(image.shape, np.uint8)
            part[18:30, 18:30, 4:8] = np.asarray(image.dataobj)[18:30, 18:30, 4:8]
            image = nib.Nifti1Image(part, image.affine)
        image = image.as_reoriented(change)
        nib.save(image, folder / name)
    turn = np.zeros((3, 3))
    turn[change[:, 0].astype(int), np.arange(3)] = change[:, 1]
    fsl = [np.diag([-1.0 if np.linalg.det(a[:3, :3]) > 0 else 1.0, 1, 1]) for a in (start, image.affine)]
    bvecs = np.loadtxt(source / "bvecs")
    np.savetxt(folder / "bvecs", fsl[1] @ turn @ fsl[0] @ (bvecs if bvecs.shape[0] == 3 else bvecs.T))
    (folder / "bvals").write_bytes((source / "bvals").read_bytes())
    lines = nib.streamlines.load(source / "tractogram.trk").streamlines[::35 if small else 1]
    header = {"voxel_to_rasmm": image.affine, "dimensions": image.shape[:3],
              "voxel_sizes": image.header.get_zooms()[:3],
              "voxel_order": orientation}
    nib.streamlines.save(nib.streamlines.Tractogram(lines, affine_to_rasmm=np.eye(4)), folder / "tractogram.trk",
                         header=header)
    return SubjectFiles.find(folder)


@pytest.fixture
def until_training(monkeypatch):
    """Run a demo as far as its training."""
    def stopped(*args):
        raise KeyboardInterrupt

    def run(out: Path, subjects, **options) -> list[str]:
        said: list[str] = []
        with pytest.raises(KeyboardInterrupt):
            run_demo(out, subjects=subjects, quick=True, html=False, say=said.append, progress=False,
                     accept_wrong_space=True, **options)
        return said

    monkeypatch.setattr(pipeline, "train", stopped)
    return run


def test_subjects_in_several_orientations_are_brought_to_one(tmp_path, until_training, monkeypatch):
    """One brain written three times is three times the same in the data file and in what the trackers read."""
    monkeypatch.setattr("tractkit.hdf5.create.check_twins", lambda *args: None)  # one brain in all splits is refused
    source = sample_subjects(3, progress=False) / "sub-01"
    subjects = [write_turned(source, tmp_path / "study" / o, o) for o in ("RAS", "LPI", "SRP")]
    said = until_training(tmp_path / "out", subjects)
    assert any("RAS in RAS; LPI in LPI; SRP in SRP" in text and "brought to RAS" in text for text in said), said
    dataset = MultiSubjectDataset(tmp_path / "out" / "data.hdf5").load_data()
    first, *others = dataset.subjects()
    work = tmp_path / "out" / "subjects"
    for subject in (first, *others):
        volume, lines = subject.volumes["input"].volume, subject.streamlines["streamlines"].as_tractogram()
        assert voxel_order(volume.affine) == "RAS" and same_grid(
            (volume.affine, volume.shape3d), (lines.affine, lines.dimensions))
        np.testing.assert_allclose(volume.data, first.volumes["input"].volume.data, atol=1e-3)
        expected = first.streamlines["streamlines"].as_tractogram()
        np.testing.assert_allclose(lines.rasmm().points, expected.rasmm().points, atol=1e-3)
        for name in ("mask", "wm_mask", "sh") + (("fodf",) if subject is not first else ()):
            one, same = (Volume.load(work / n / f"{name}.nii.gz") for n in (subject.name, "LPI"))
            volume.check_same_grid(one)
            np.testing.assert_allclose(one.data, same.data, atol=1e-3)
        record = subject.volumes["input"].record
        assert record.orientation == "RAS" and record.features == ("sh:descoteaux07_legacy",)
    recipe = SimpleNamespace(input_recipe={"input": recipe_of([s.volumes["input"].record for s in dataset.subjects()])})
    for name in ("SRP", "LPI"):  # as the tracker takes it
        made = prepare_input(recipe, work / name)
        check_input(recipe, made)
        np.testing.assert_array_equal(made.data, dataset.subject(name).volumes["input"].volume.data)


def test_options_of_ones_own_data(tmp_path, until_training):
    """Points outside are left out, single points are counted, and a shell is chosen by name."""
    source = sample_subjects(3, progress=False) / "sub-01"
    files = write_turned(source, tmp_path / "study" / "one", "LAS")
    t = Tractogram.load(files.tractogram)
    lines = [t.streamlines[i] for i in range(len(t))]
    lines[:3] = [line + np.float32([100, 0, 0]) for line in lines[:3]]
    lines += [line[:1] for line in lines[3:8]]
    replace(t, streamlines=Streamlines.from_list(lines)).save(files.tractogram)
    bvals = np.loadtxt(files.bvals).ravel()
    bvals[np.flatnonzero(bvals)[:10]] = 1000
    np.savetxt(files.bvals, np.where(bvals == 0, 60, bvals)[None])
    with pytest.raises(DataError, match="no volume has b of at most 50"):
        run_demo(tmp_path / "out", subjects=[files], html=False)
    with pytest.raises(DataError, match="3 of 29 streamlines leave the volume") as e:
        run_demo(tmp_path / "out", subjects=[files], html=False, b0_threshold=100)
    assert "remove_invalid=True" in str(e.value)
    with pytest.raises(DataError, match="have b = 3000"):
        run_demo(tmp_path / "out", subjects=[files], html=False, b0_threshold=100, remove_invalid=True, shell=3000)
    assert not (tmp_path / "out").exists()
    said = until_training(tmp_path / "out", [files], remove_invalid=True, b0_threshold=100, shell=1000)
    text = "\n".join(said)
    assert "one: 3 streamlines leave the volume and are left out" in text, text
    assert "one: 5 of 26 streamlines are single points" in text and "several shells" not in text
    assert Volume.load(tmp_path / "out" / "subjects" / "one" / "sh.nii.gz").nb_features == 6  # ten directions


@pytest.mark.parametrize("words, named", [
    (["--step-size", "0"], "step_size"), (["--theta", "200"], "angles"), (["--min-length", "-1"], "min_length"),
    (["--shell", "20"], "shell"), (["--b0-threshold", "nan"], "b0_threshold")])
def test_numbers_that_make_no_sense_leave_no_folder(tmp_path, capsys, words, named):
    assert main(["demo", "--quick", "--out", str(tmp_path / "out"), *words]) == 2
    out, err = capsys.readouterr()
    assert named in err and err.count("\n") == 1 and not out and not (tmp_path / "out").exists()


def test_a_folder_of_an_earlier_version_opens(tmp_path):
    """New settings are as by default; other values, and what cannot be read, are another run."""
    settings = demo_settings(quick=True)
    pipeline.open_folder(tmp_path / "demo", settings, False)
    card = tmp_path / "demo" / "demo.json"
    old = json.loads(card.read_text())
    for name in ("remove_invalid", "step_size", "theta", "shell", "b0_threshold"):
        del old[name]
    card.write_text(json.dumps(old))
    pipeline.open_folder(tmp_path / "demo", settings, False)
    for other in (replace(settings, theta=30.0), replace(settings, shell=1000.0), replace(settings, seed=3)):
        with pytest.raises(DataError, match="other settings"):
            pipeline.open_folder(tmp_path / "demo", other, False)
    for damaged in ("", "[]", '{"files": 3}'):
        card.write_text(damaged)
        with pytest.raises(DataError, match="other settings"):
            pipeline.open_folder(tmp_path / "demo", settings, False)


def test_the_command_gives_its_options_to_the_demo(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(pipeline, "open_folder", lambda folder, settings, fresh: seen.append(settings) or exit(5))
    with pytest.raises(SystemExit):
        main(["demo", "--quick", "--min_length", "7", "--step-size", "0.7", "--theta", "20", "--seeds", "90",
              "--remove-invalid", "--shell", "1000", "--b0-threshold", "60", "--out", str(tmp_path / "x")])
    expected = replace(demo_settings(quick=True), min_length=7.0, step_size=0.7, theta=20.0, max_seeds=90,
                       remove_invalid=True, shell=1000.0, b0_threshold=60.0)
    assert seen == [expected]


def test_white_matter_outside_the_brain_mask_gets_no_seed(tmp_path):
    white, brain = np.zeros((6, 6, 6), np.uint8), np.ones((6, 6, 6), np.uint8)
    white[1:4, 2, 2] = 1
    brain[3:] = 0
    for name, data in (("wm_mask", white), ("mask", brain)):
        Volume(data, np.eye(4)).save(tmp_path / f"{name}.nii.gz")
    seeds, mask = seeds_and_mask(tmp_path, 0, 100)
    assert len(seeds) == 2 and len(check_seeds(seeds, mask)) == 2
