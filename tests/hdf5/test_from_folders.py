"""From the folders of a study to one data file: tiny subjects in the layouts of BIDS, TractoInferno and MRtrix."""

import gzip
import json
import shutil
from dataclasses import replace

import h5py
import nibabel as nib
import numpy as np
import pytest

import tractkit.hdf5.from_folders as module
from tractkit.cli.commands import main
from tractkit.core.files import DataError
from tractkit.dwi.gradients import load_dwi, select_shell
from tractkit.dwi.sh import compute_sh
from tractkit.dwi.space_check import check_subjects
from tractkit.hdf5.config import SPLITS
from tractkit.hdf5.create import create_hdf5
from tractkit.hdf5.from_folders import from_bids
from tractkit.hdf5.study import Choices
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram

SHAPE, AFFINE = (6, 5, 4), np.diag([-2.0, 2, 2, 1])


def series(shells=((2000, 15),), seed=0):
    rng = np.random.default_rng(seed)
    bvals = np.repeat([0, *[b for b, _ in shells]], [1, *[n for _, n in shells]])
    v = rng.normal(size=(len(bvals), 3))
    return (rng.uniform(50, 100, (*SHAPE, len(bvals))).astype(np.float32), bvals,
            v / np.linalg.norm(v, axis=1, keepdims=True))


def lines(n, seed=0):
    rng = np.random.default_rng(seed)
    return Tractogram(Streamlines.from_list([rng.uniform(0, 3, (5, 3)) for _ in range(n)]), AFFINE, SHAPE)


def save(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, AFFINE), path)


def bids_subject(root, sub, shells=((2000, 15),), ses="", tracts=("AF", "CST"), seed=0):
    where, name = (f"{sub}/{ses}/dwi", f"{sub}_{ses}") if ses else (f"{sub}/dwi", sub)
    data, bvals, bvecs = series(shells, seed)
    save(root / where / f"{name}_dwi.nii.gz", data)
    np.savetxt(root / where / f"{name}_dwi.bval", bvals[None], fmt="%g")
    np.savetxt(root / where / f"{name}_dwi.bvec", bvecs.T)
    more = root / "derivatives" / "x" / where
    save(more / f"{name}_desc-brain_mask.nii.gz", np.ones(SHAPE, np.uint8))
    for k, tract in enumerate(tracts):
        lines(3 + k, seed).save(more / f"{name}_bundle-{tract}_tractogram.trk")
    return root / where / f"{name}_dwi"


@pytest.fixture
def study(tmp_path):
    for k in range(1, 6):
        shells = ((1000, 30), (2000, 15), (3000, 30)) if k == 4 else ((2000, 15),)
        bids_subject(tmp_path / "study", f"sub-0{k}", shells, seed=k)
    return tmp_path / "study"


def quiet(*args, **options):
    return from_bids(*args, say=str, progress=False, **options)


def computed(monkeypatch, stop_at=None):
    """The subjects for which coefficients are computed, as they come; Ctrl-C at one of them."""
    names, real = [], module.prepare_subject

    def prepare(folder, **options):
        if folder.name == stop_at:
            raise KeyboardInterrupt
        before = (folder / "sh.nii.gz").exists()
        result = real(folder, **options)
        names.extend([] if before else [folder.name])
        return result

    monkeypatch.setattr(module, "prepare_subject", prepare)
    return names


def same(a, b):
    with h5py.File(a) as x, h5py.File(b) as y:
        names = []
        x.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        assert names and all(np.array_equal(x[name][()], y[name][()]) for name in names)
        assert x.attrs["tractkit_config"] == y.attrs["tractkit_config"]
        return names


def test_five_subjects_one_with_several_shells(study, tmp_path):
    texts = []
    out = from_bids(study, tmp_path / "out" / "data.hdf5", say=texts.append, progress=False)
    assert "15 at 2000*" in texts[0] and "order 4" in texts[0]
    with h5py.File(out) as h5:
        assert [list(h5.attrs[f"{s}_subjs"]) for s in SPLITS] == [
            ["sub-01", "sub-02", "sub-03"],
            ["sub-04"],
            ["sub-05"],
        ]
        assert {h5[f"sub-0{k}/input/data"].shape for k in range(1, 6)} == {(*SHAPE, 15)}
        assert sorted(h5["sub-02/streamlines/groups"]) == ["AF", "CST"]
    prepared = tmp_path / "out" / "data_prepared"
    four = load_dwi(*(prepared / "sub-04" / f for f in ("dwi.nii.gz", "bvals", "bvecs", "mask.nii.gz")))
    sh = nib.load(prepared / "sub-04" / "sh.nii.gz").get_fdata()
    np.testing.assert_allclose(sh, compute_sh(select_shell(four, 2000), 4).data, atol=1e-6)
    again = create_hdf5(prepared, tmp_path / "again.hdf5", tmp_path / "out" / "data.json",
                        {s: prepared / f"{s}.txt" for s in SPLITS}, progress=False)
    same(out, again)
    words = texts[-1].splitlines()[-1].split()
    assert words[:3] == ["tractkit", "hdf5", "create"] and words[5].endswith("data.json")
    assert main([*words[1:4], str(tmp_path / "c.hdf5"), *words[5:], "--no-progress"]) == 0
    same(out, tmp_path / "c.hdf5")


def test_interrupted_it_goes_on_with_what_was_not_done(study, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        names = computed(patch, stop_at="sub-03")
        with pytest.raises(KeyboardInterrupt):
            quiet(study, tmp_path / "data.hdf5")
        assert names == ["sub-01", "sub-02"] and not (tmp_path / "data.hdf5").exists()
    names = computed(monkeypatch)
    quiet(study, tmp_path / "data.hdf5")
    assert names == ["sub-03", "sub-04", "sub-05"]
    data, bvals, bvecs = series(seed=9)
    save(study / "sub-02" / "dwi" / "sub-02_desc-preproc_dwi.nii.gz", data)  # another file is now the best
    for end, table in (("bval", bvals[None]), ("bvec", bvecs.T)):
        np.savetxt(study / "sub-02" / "dwi" / f"sub-02_desc-preproc_dwi.{end}", table)
    names.clear()
    quiet(study, tmp_path / "data.hdf5", overwrite=True)
    assert names == ["sub-02"]


def test_nothing_is_made_where_something_is_missing(study, tmp_path, monkeypatch):
    names = computed(monkeypatch)
    (study / "derivatives/x/sub-02/dwi/sub-02_desc-brain_mask.nii.gz").unlink()
    shutil.rmtree(study / "derivatives/x/sub-05")
    texts = []
    with pytest.raises(DataError, match="2 of 5 subjects lack something.*skip_incomplete=True"):
        from_bids(study, tmp_path / "data.hdf5", say=texts.append)
    assert "  sub-02: no brain mask" in texts[0] and "  sub-05: no tractogram" in texts[0]
    assert quiet(study, tmp_path / "data.hdf5", dry_run=True, skip_incomplete=True) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["study"] and names == []
    quiet(study, tmp_path / "data.hdf5", skip_incomplete=True)
    with h5py.File(tmp_path / "data.hdf5") as h5:
        assert [list(h5.attrs[f"{s}_subjs"]) for s in SPLITS] == [["sub-01"], ["sub-03"], ["sub-04"]]
    quiet(study, tmp_path / "b.hdf5", splits={"training": ["sub-01"], "validation": ["sub-03"]})  # others: not needed


def test_files_that_do_not_fit_are_listed_before_anything_is_computed(study, tmp_path, monkeypatch):
    names = computed(monkeypatch)
    nib.save(nib.Nifti1Image(np.ones((6, 5, 3), np.uint8), AFFINE),
             study / "derivatives/x/sub-01/dwi/sub-01_desc-brain_mask.nii.gz")
    np.savetxt(study / "sub-03/dwi/sub-03_dwi.bval", np.r_[0, [2000] * 14][None])
    (study / "derivatives/x/sub-05/dwi/sub-05_bundle-AF_tractogram.trk").write_bytes(b"no")
    with pytest.raises(DataError) as e:
        quiet(study, tmp_path / "data.hdf5")
    assert "sub-01/input: its grid is not that of" in str(e.value) and "15 b-values for 16 volumes" in str(e.value)
    assert "sub-05_bundle-AF_tractogram.trk" in str(e.value) and names == []


def test_a_subject_that_cannot_be_computed_does_not_hold_up_the_others(study, tmp_path, monkeypatch):
    names = computed(monkeypatch)
    data, _, _ = series(seed=2)
    data[1, 1, 1, 1] = np.nan
    save(study / "sub-02/dwi/sub-02_dwi.nii.gz", data)
    with pytest.raises(DataError, match="1 of 1920 values are NaN"):
        quiet(study, tmp_path / "data.hdf5")
    assert names == ["sub-01", "sub-03", "sub-04", "sub-05"]


def test_sessions_of_a_subject_stay_together(tmp_path):
    for k, ses in ((1, "ses-a"), (1, "ses-b"), (2, "ses-a"), (3, "ses-a")):
        bids_subject(tmp_path / "study", f"sub-{k}", ses=ses, tracts=("AF",), seed=k)
    texts = []
    from_bids(tmp_path / "study", tmp_path / "data.hdf5", say=texts.append, dry_run=True)
    assert texts[-1].split() == ["training:", "sub-1_ses-a", "sub-1_ses-b", "validation:", "sub-2_ses-a", "testing:",
                                 "sub-3_ses-a"]
    from_bids(tmp_path / "study", tmp_path / "data.hdf5", say=texts.append, dry_run=True,
              splits={"training": ["sub-2"], "validation": ["sub-1"]})
    assert texts[-1].split() == ["training:", "sub-2_ses-a", "validation:", "sub-1_ses-a", "sub-1_ses-b", "testing:",
                                 "none"]
    from_bids(tmp_path / "study/sub-1/ses-b/dwi", tmp_path / "data.hdf5", say=texts.append, dry_run=True)
    assert "sub-1_ses-b 0.8" in texts[-1] and "ses-a" not in texts[-1]
    with pytest.raises(DataError, match="sub-7: no such subject in the study"):
        quiet(tmp_path / "study", tmp_path / "data.hdf5", splits={"training": ["sub-7"]})


def write_mif(path, data, extra=()):
    text = "\n".join(["mrtrix image", f"dim: {','.join(map(str, data.shape))}", "vox: 2,2,2,1", "datatype: Float32LE",
                      f"layout: {','.join(f'+{k}' for k in range(data.ndim))}", *extra])
    head = f"{text}\nfile: . {len(text) + 40}\nEND\n".encode().ljust(len(text) + 40, b"\0")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + data.astype("<f4").tobytes(order="F"))


@pytest.mark.parametrize("flip", [1, -1])
@pytest.mark.parametrize("axes", ["fsl", "voxel"])
def test_images_of_mrtrix_give_the_same_as_nifti(tmp_path, flip, axes):
    """The same subject twice: NIfTI with FSL's text files, and .mif with its own gradients, in scanner axes."""
    affine = np.diag([2.0 * flip, 2, 2, 1])
    data, bvals, bvecs = series()
    nifti, mrtrix = tmp_path / "study" / "a", tmp_path / "study" / "b"
    nifti.mkdir(parents=True)
    for name, array in (("dwi", data), ("mask", np.ones(SHAPE, np.float32))):
        nib.save(nib.Nifti1Image(array, affine), nifti / f"{name}.nii.gz")
    np.savetxt(nifti / "bvals", bvals[None])
    np.savetxt(nifti / "bvecs", (bvecs * ([-1, 1, 1] if flip == 1 and axes == "fsl" else 1)).T)
    place = [f"transform: {flip},0,0,0", "transform: 0,1,0,0", "transform: 0,0,1,0"]
    rows = [f"dw_scheme: {','.join(map(repr, map(float, v * [flip, 1, 1])))},{b}"
            for v, b in zip(bvecs, bvals, strict=True)]
    write_mif(mrtrix / "dwi.mif", data, [*place, *rows])
    write_mif(mrtrix / "mask.mif", np.ones(SHAPE), place)
    t = Tractogram(lines(4).streamlines, affine, SHAPE)
    t.save(nifti / "t.trk")
    t.save(tmp_path / "t.tck")
    (mrtrix / "t.tck.gz").write_bytes(gzip.compress((tmp_path / "t.tck").read_bytes()))
    out = quiet(tmp_path / "study", tmp_path / "data.hdf5", Choices(bvecs_axes=axes))
    with h5py.File(out) as h5:
        np.testing.assert_allclose(h5["a/input/data"][:], h5["b/input/data"][:], atol=1e-4)
        np.testing.assert_allclose(h5["a/streamlines/data"][:], h5["b/streamlines/data"][:], atol=1e-4)


def test_tractoinferno(tmp_path):
    for k, split in enumerate(("trainset", "trainset", "validset", "testset")):
        folder, sub = tmp_path / "derivatives" / split / f"sub-{k}", f"sub-{k}"
        save(folder / "fodf" / f"{sub}__fodf.nii.gz", np.random.default_rng(k).random((*SHAPE, 15), np.float32))
        for x, tissue in (([0, 5], "wm"), ([2], "gm"), ([3], "csf")):  # the same with the first axis turned
            mask = np.zeros(SHAPE, np.uint8)
            mask[x] = 1
            save(folder / "mask" / f"{sub}__mask_{tissue}.nii.gz", mask)
        (folder / "tractography").mkdir()
        for name in ("AF_left", "CC_Pa"):
            lines(3, k).save(folder / "tractography" / f"{sub}__{name}.trk")
    out = quiet(tmp_path, tmp_path / "data.hdf5", compress=0.1)
    with h5py.File(out) as h5:
        assert [list(h5.attrs[f"{s}_subjs"]) for s in SPLITS] == [["sub-0", "sub-1"], ["sub-2"], ["sub-3"]]
        inside = h5["sub-1/input/data"][()][[0, 2, 3, 5]]
        np.testing.assert_allclose([inside.mean(), inside.std()], [0, 1], atol=1e-5)
        assert sorted(h5["sub-3/streamlines/groups"]) == ["AF_left", "CC_Pa"]
    assert json.loads((tmp_path / "data.json").read_text())["input"]["files"] == ["fodf.nii.gz"]


def test_what_is_there_is_not_touched(study, tmp_path):
    out = tmp_path / "data.hdf5"
    (tmp_path / "data_prepared" / "sub-02").mkdir(parents=True)
    (tmp_path / "data_prepared" / "sub-02" / "mine.txt").touch()
    with pytest.raises(DataError, match="data_prepared/sub-02: holds other things"):
        quiet(study, out)
    shutil.rmtree(tmp_path / "data_prepared")
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(DataError, match=r"data.json: exists already, and is another config.*overwrite=True"):
        quiet(study, out)
    (tmp_path / "data.json").unlink()
    out.touch()
    with pytest.raises(DataError, match=r"data.hdf5: exists already. Give overwrite=True"):
        quiet(study, out)
    before = {p: p.stat().st_mtime_ns for p in study.rglob("*")}
    quiet(study, out, overwrite=True)
    assert before == {p: p.stat().st_mtime_ns for p in study.rglob("*")}


def test_bad_numbers_before_anything_is_read(tmp_path):
    for wrong in ({"choices": Choices(shell=-1)}, {"choices": Choices(b0_threshold=-1)}, {"step_size": -1},
                  {"step_size": 1, "nb_points": 3}):
        with pytest.raises(ValueError, match="shell|b0_threshold|step_size"):
            quiet(tmp_path / "none", tmp_path / "data.hdf5", **wrong)


def test_on_the_command_line(study, tmp_path, capsys):
    assert main(["hdf5", "from-bids", str(study), str(tmp_path / "data.hdf5"), "-n"]) == 0
    said = capsys.readouterr()
    assert "5 subjects in" in said.out and "validation: sub-04" in said.out and not said.err
    nib.save(nib.Nifti1Image(series()[0], AFFINE), study / "sub-01/dwi/sub-01_run-2_dwi.nii.gz")
    words = ["hdf5", "from-bids", str(study), str(tmp_path / "data.hdf5"), "--subjects", "sub-01", "sub-02"]
    assert main(words) == 2
    said = capsys.readouterr()
    assert "say which, with * for what differs: --dwi 'sub-01_dwi.nii.gz'" in said.out
    assert said.err.count("\n") == 1 and "--skip-incomplete to leave" in said.err
    assert (
        main([*words, "--dwi", "sub-0?_dwi.nii.gz", "--tractograms", "*AF*", "--sh_order", "2", "--no-progress"]) == 0
    )
    with h5py.File(tmp_path / "data.hdf5") as h5:
        assert sorted(h5) == ["sub-01", "sub-02"] and h5["sub-01/input/data"].shape[3] == 6
    assert main([*words, "--sh-order", "3", "-f", "--dwi", "sub-0?_dwi.nii.gz"]) == 2
    assert "sh_order cannot be 3" in capsys.readouterr().err


@pytest.mark.parametrize("options, words", [
    ({"compresion": 1}, "no option 'compresion'. Did you mean 'compression'"), ({"processes": 0}, "at least 1, not 0"),
    ({"sh_order": 7}, r"give Choices\(sh_order"), ({"testing": ["x"]}, "give splits={'testing'")])
def test_wrong_options_are_refused_before_anything_is_computed(study, tmp_path, options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        quiet(study, tmp_path / "o.hdf5", **options)
    assert not (tmp_path / "o_prepared").exists()


def test_all_problems_of_the_headers_at_once_with_the_names_of_the_study(study, tmp_path):
    (study / "sub-01/dwi/sub-01_dwi.bvec").write_text("")
    (study / "derivatives/x/sub-02/dwi/sub-02_bundle-AF_tractogram.trk").write_bytes(b"")
    (study / "derivatives/x/sub-03/dwi/sub-03_desc-brain_mask.nii.gz").write_bytes(b"")
    with pytest.raises(DataError, match="^3 things are wrong") as e:
        quiet(study, tmp_path / "o.hdf5")
    for name in ("sub-01_dwi.bvec", "sub-02_bundle-AF_tractogram.trk", "sub-03_desc-brain_mask.nii.gz"):
        assert name in str(e.value)
    assert "o_prepared" not in str(e.value)


def test_directions_in_other_axes_are_named_by_the_studys_file(study, tmp_path, monkeypatch):
    wrong = module.field_of_dwi(load_dwi(*(bids_subject(tmp_path / "s", "sub-1").with_suffix(end) for end in (
        ".nii.gz", ".bval", ".bvec")), tmp_path / "s/derivatives/x/sub-1/dwi/sub-1_desc-brain_mask.nii.gz"))
    finding = replace(wrong.finding, status="wrong", fix="Give bvecs_axes='voxel'")
    monkeypatch.setattr(module, "field_of_dwi", lambda *_: replace(wrong, finding=finding))
    with pytest.raises(DataError, match="^1 thing is wrong:\n.*sub-1_dwi.bvec: sub-1: gradients.*bvecs_axes='voxel'"):
        quiet(tmp_path / "s", tmp_path / "o.hdf5", splits={"training": ["sub-1"]})
    assert not (tmp_path / "o_prepared/sub-1/sh.nii.gz").exists()
    quiet(tmp_path / "s", tmp_path / "o.hdf5", splits={"training": ["sub-1"]}, accept_wrong_space=True)


def test_nan_outside_the_mask_of_a_series_becomes_0(tmp_path):
    stem = bids_subject(tmp_path / "s", "sub-1")
    mask = tmp_path / "s/derivatives/x/sub-1/dwi/sub-1_desc-brain_mask.nii.gz"
    inside = np.ones(SHAPE, np.uint8)
    inside[0] = 0
    data = series()[0]
    data[0] = np.nan
    save(mask, inside)
    save(stem.with_name("sub-1_dwi.nii.gz"), data)
    with pytest.warns(UserWarning, match="320 values outside of the mask are NaN or infinite; replaced by 0"):
        quiet(tmp_path / "s", tmp_path / "o.hdf5", splits={"training": ["sub-1"]})
    sidecar = json.loads((tmp_path / "o_prepared/sub-1/sh.json").read_text())
    assert sidecar["details"]["replaced_outside_mask"] == 320
    with pytest.warns(UserWarning, match="320 values outside"):
        check_subjects(tmp_path / "s")
    data[3, 3, 3] = np.nan
    save(stem.with_name("sub-1_dwi.nii.gz"), data)
    with pytest.raises(DataError, match="16 of 1920 values are NaN"), pytest.warns(UserWarning):
        quiet(tmp_path / "s", tmp_path / "o2.hdf5", splits={"training": ["sub-1"]})
