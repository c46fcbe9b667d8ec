"""The files of subjects in the folders that BIDS, QSIPrep, TractoFlow, TractoInferno and HCP make; empty files do."""

import os

import pytest

from tractkit.core.files import DataError
from tractkit.dwi.find_files import candidates, find_subjects, gradient_files


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def chosen(found, what, *patterns):
    """The paths of the best candidates, from the study on."""
    return [str(file.relative_to(found.root)) for file in candidates(found, what, patterns)]


def bids(root, sub="sub-01", ses="", ends=("nii.gz", "bval", "bvec")):
    folder, name = (f"{sub}/{ses}/dwi", f"{sub}_{ses}") if ses else (f"{sub}/dwi", sub)
    touch(root, *(f"{folder}/{name}_dwi.{end}" for end in ends), f"{sub}/anat/{sub}_T1w.nii.gz")


def qsiprep(root, sub="sub-01", ses="", space="T1w", folder="derivatives/qsiprep"):
    where, name = (f"{folder}/{sub}/{ses}/dwi", f"{sub}_{ses}") if ses else (f"{folder}/{sub}/dwi", sub)
    touch(root, *(f"{where}/{name}_space-{space}_desc-preproc_dwi.{end}" for end in ("nii.gz", "bval", "bvec", "b")),
          f"{where}/{name}_space-{space}_desc-brain_mask.nii.gz", f"{where}/{name}_space-{space}_dwiref.nii.gz",
          f"{folder}/{sub}/anat/{sub}_desc-brain_mask.nii.gz", f"{folder}/{sub}/figures/{sub}_dwi.nii.gz",
          f"{folder}/{sub}/anat/{sub}_space-MNI152NLin2009cAsym_desc-brain_mask.nii.gz")


def test_raw_bids_with_derivatives(tmp_path):
    bids(tmp_path)
    qsiprep(tmp_path)
    touch(tmp_path, "derivatives/bundles/sub-01/dwi/sub-01_bundle-AF_tractogram.trk", "sourcedata/sub-01/dwi.nii.gz",
          "derivatives/qsirecon/derivatives/qsirecon-x/sub-01/dwi/sub-01_space-ACPC_bundle-CST_streamlines.tck.gz")
    (found,) = find_subjects(tmp_path)
    there = "derivatives/qsiprep/sub-01/dwi/sub-01_space-T1w_desc-"
    assert (found.name, found.session, found.split) == ("sub-01", None, None)
    assert chosen(found, "dwi") == [f"{there}preproc_dwi.nii.gz"]
    assert chosen(found, "bvals") == [f"{there}preproc_dwi.bval"]
    assert chosen(found, "bvecs") == [f"{there}preproc_dwi.bvec"]
    assert chosen(found, "mask") == [f"{there}brain_mask.nii.gz"]
    assert len(chosen(found, "tractogram")) == 2
    assert chosen(found, "dwi", "sub-01_dwi*") == ["sub-01/dwi/sub-01_dwi.nii.gz"]
    assert chosen(found, "dwi", "*nothing*", "*/sub-01_dwi.nii.gz") == ["sub-01/dwi/sub-01_dwi.nii.gz"]


@pytest.mark.parametrize("place", ["", "sub-02", "sub-02/ses-a/dwi", "sub-02/ses-a",
                                   "derivatives/qsiprep/sub-02", "derivatives/qsiprep/sub-02/ses-a/dwi"])
def test_from_any_folder_of_the_study(tmp_path, place):
    for sub in ("sub-01", "sub-02"):
        for ses in ("ses-a", "ses-b"):
            bids(tmp_path, sub, ses)
            qsiprep(tmp_path, sub, ses, "ACPC")
    found = find_subjects(tmp_path / place)
    every = [f"{sub}_{ses}" for sub in ("sub-01", "sub-02") for ses in ("ses-a", "ses-b")]
    assert [f.name for f in found] == [name for name in every if not place or name.startswith("sub-02")
                                       and ("ses-a" not in place or name.endswith("ses-a"))]
    assert all(f.root == tmp_path for f in found)
    for f in found:
        assert chosen(f, "dwi") == [f"derivatives/qsiprep/{f.subject}/{f.session}/dwi/{f.name}_space-ACPC_"
                                    "desc-preproc_dwi.nii.gz"]
        assert len(chosen(f, "mask")) == len(chosen(f, "bvals")) == 1


def test_relative_places(tmp_path, monkeypatch):
    bids(tmp_path)
    monkeypatch.chdir(tmp_path / "sub-01" / "dwi")
    assert [f.name for f in find_subjects(".")] == [f.name for f in find_subjects("../..")] == ["sub-01"]
    assert [f.root for f in find_subjects("..")] == [tmp_path]


def test_derivatives_that_are_elsewhere(tmp_path):
    bids(tmp_path / "raw")
    qsiprep(tmp_path, folder="prepared/qsiprep")
    assert chosen(find_subjects(tmp_path / "raw")[0], "mask") == []
    (found,) = find_subjects(tmp_path / "raw", [tmp_path / "prepared"])
    assert [p.name for p in candidates(found, "dwi")] == ["sub-01_space-T1w_desc-preproc_dwi.nii.gz"]
    assert [p.name for p in candidates(found, "bvecs")] == ["sub-01_space-T1w_desc-preproc_dwi.bvec"]


@pytest.mark.parametrize("bval", ["dwi.bval", "sub-01/sub-01_dwi.bval", "sub-01/ses-1/dwi/sub-01_ses-1_dwi.bval"])
def test_gradients_of_several_series_are_in_a_folder_above(tmp_path, bval):
    """The inheritance principle of BIDS: the file fits if it says nothing that the series does not say."""
    touch(tmp_path, "sub-01/ses-1/dwi/sub-01_ses-1_run-1_dwi.nii.gz", bval, "acq-x_dwi.bval", "sub-02_dwi.bval")
    (found,) = find_subjects(tmp_path)
    assert chosen(found, "bvals") == [bval] and chosen(found, "bvecs") == []
    touch(tmp_path, "sub-01/ses-1/dwi/sub-01_ses-1_run-1_dwi.bval")
    assert chosen(found, "bvals") == ["sub-01/ses-1/dwi/sub-01_ses-1_run-1_dwi.bval"]


@pytest.mark.parametrize("eddy", ["Eddy", "Eddy_Topup"])
@pytest.mark.parametrize("name", ["S1", "sub-01"])
def test_tractoflow(tmp_path, eddy, name):
    t = f"{name}/{{}}/{name}__{{}}"
    there = {"Bet_DWI": ["b0_bet_mask.nii.gz", "dwi_bet.nii.gz"], "Crop_DWI": ["b0_mask_cropped.nii.gz"],
             eddy: ["bval_eddy", "dwi_eddy_corrected.bvec", "dwi_corrected.nii.gz"], "DTI_Metrics": ["fa.nii.gz"],
             "Denoise_DWI": ["dwi_denoised.nii.gz"], "FODF_Metrics": ["fodf.nii.gz", "peaks.nii.gz"],
             "Resample_B0": ["b0_mask_resampled.nii.gz", "b0_resampled.nii.gz"],
             "Resample_DWI": ["dwi_resampled.nii.gz"], "Extract_DTI_Shell": ["bval_dti", "bvec_dti", "dwi_dti.nii.gz"],
             "Segment_Tissues": ["mask_wm.nii.gz"], "PFT_Tracking": ["pft_tracking_prob_wm_seed_0.trk"],
             "Register_T1": ["t1_warped.nii.gz", "t1_mask_warped.nii.gz"], "Local_Tracking": ["local_tracking.trk"]}
    touch(tmp_path, *(t.format(folder, file) for folder, files in there.items() for file in files))
    (found,) = find_subjects(tmp_path)
    assert found.name == name
    for what, folder, file in (("dwi", "Resample_DWI", "dwi_resampled.nii.gz"), ("bvals", eddy, "bval_eddy"),
                               ("bvecs", eddy, "dwi_eddy_corrected.bvec"), ("fodf", "FODF_Metrics", "fodf.nii.gz"),
                               ("mask", "Resample_B0", "b0_mask_resampled.nii.gz")):
        assert chosen(found, what) == [t.format(folder, file)], what
    assert [p.parent.name for p in candidates(found, "tractogram")] == ["Local_Tracking", "PFT_Tracking"]


@pytest.mark.parametrize("root", ["", "derivatives"])
def test_tractoinferno(tmp_path, root):
    for split, sub in (("trainset", "sub-1005"), ("validset", "sub-1046"), ("testset", "sub-1006")):
        t = f"derivatives/{split}/{sub}/{{}}/{sub}__{{}}"
        touch(tmp_path, *(t.format("dwi", f"dwi.{end}") for end in ("nii.gz", "bval", "bvec")),
              *(t.format("mask", f"mask_{m}.nii.gz") for m in ("wm", "gm", "csf")), t.format("anat", "T1w.nii.gz"),
              t.format("fodf", "fodf.nii.gz"), t.format("tractography", "AF_left.trk"),
              t.format("tractography", "CC_Pa.trk"), t.format("dti", "fa.nii.gz"))
    found = find_subjects(tmp_path / root)
    assert [(f.name, f.split) for f in found] == [("sub-1005", "training"), ("sub-1006", "testing"),
                                                  ("sub-1046", "validation")]
    assert [p.name for p in candidates(found[1], "fodf")] == ["sub-1006__fodf.nii.gz"]
    assert [p.name for p in candidates(found[1], "dwi")] == ["sub-1006__dwi.nii.gz"]
    assert [p.name for p in candidates(found[1], "bvecs")] == ["sub-1006__dwi.bvec"]
    assert candidates(found[1], "mask") == [] and len(candidates(found[1], "tissues")) == 3
    assert len(candidates(found[1], "tractogram")) == 2
    (one,) = find_subjects(tmp_path / "derivatives" / "testset" / "sub-1006" / "dwi")
    assert one.name == "sub-1006" and one.split == "testing"


def test_hcp(tmp_path):
    touch(tmp_path, *(f"{sub}/T1w/{file}" for sub in ("100307", "992774") for file in (
        "Diffusion/data.nii.gz", "Diffusion/bvals", "Diffusion/bvecs", "Diffusion/nodif_brain_mask.nii.gz",
        "Diffusion/eddylogs/x.txt", "T1w_acpc_dc_restore_brain.nii.gz", "brainmask_fs.nii.gz")))
    touch(tmp_path, "tracts/100307/tracts/CA.trk", "100307/tracts/CA.trk")
    found = find_subjects(tmp_path)
    assert [f.name for f in found] == ["100307", "992774"]
    assert chosen(found[0], "dwi") == ["100307/T1w/Diffusion/data.nii.gz"]
    assert chosen(found[0], "mask") == ["100307/T1w/Diffusion/nodif_brain_mask.nii.gz"]
    assert chosen(found[0], "bvals") == ["100307/T1w/Diffusion/bvals"]
    assert chosen(found[0], "tractogram") == ["100307/tracts/CA.trk"]


def test_plain_folders_and_images_of_mrtrix(tmp_path):
    touch(tmp_path, *(f"a/{file}" for file in ("dwi.nii.gz", "bvals", "bvecs", "mask.nii.gz", "tractogram.trk")),
          *(f"b/{file}" for file in ("dwi.mif", "mask.mif", "wmfod.mif.gz", "tracks.tck")), "notes/readme.txt")
    a, b = find_subjects(tmp_path)
    assert [chosen(a, what) for what in ("dwi", "bvals", "mask")] == [["a/dwi.nii.gz"], ["a/bvals"], ["a/mask.nii.gz"]]
    assert [chosen(b, what) for what in ("dwi", "bvals", "mask", "mrtrix_fodf", "tractogram")] == [
        ["b/dwi.mif"], [], ["b/mask.mif"], ["b/wmfod.mif.gz"], ["b/tracks.tck"]]
    assert [f.name for f in find_subjects(tmp_path / "a")] == ["a"]


def test_links(tmp_path):
    """A folder that is linked twice, or around in a circle, is one folder; a broken link is found, and not read."""
    bids(tmp_path / "real")
    (tmp_path / "real" / "again").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "sub-01" / "dwi" / "sub-01_dwi.bvec").unlink()
    (tmp_path / "real" / "sub-01" / "dwi" / "sub-01_dwi.bvec").symlink_to("annex")
    (found,) = find_subjects(tmp_path / "real")
    assert chosen(found, "bvecs") == ["sub-01/dwi/sub-01_dwi.bvec"]
    assert len({os.path.realpath(file) for _, file in found.files}) == len(found.files)


def test_what_cannot_be_read_is_left_out_and_reported_once(tmp_path, monkeypatch):
    bids(tmp_path)
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "sub-01" / "dwi" / "self").symlink_to("self")
    (tmp_path / "sub-01" / "closed").mkdir()
    (tmp_path / "closed").mkdir()
    real = os.scandir

    def scandir(folder):
        if os.path.basename(folder) == "closed":
            raise PermissionError(13, "Permission denied", os.fspath(folder))
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.warns(UserWarning, match="4 places cannot be read and are left out: .*closed.*Permission") as said:
        (found,) = find_subjects(tmp_path)
    assert len(said) == 1
    assert chosen(found, "bvals") == ["sub-01/dwi/sub-01_dwi.bval"]


def test_several_and_none(tmp_path):
    touch(tmp_path, *(f"sub-01/dwi/sub-01_run-{k}_dwi.nii.gz" for k in (1, 2)), "sub-01/dwi/sub-01_run-1_sbref.nii.gz")
    (found,) = find_subjects(tmp_path)
    assert len(candidates(found, "dwi")) == 2 and candidates(found, "bvals") == []
    assert gradient_files(found, candidates(found, "dwi")[0], "bvals") == []
    assert chosen(found, "dwi", "*run-2*") == ["sub-01/dwi/sub-01_run-2_dwi.nii.gz"]
    with pytest.raises(DataError, match="no such folder"):
        find_subjects(tmp_path / "x")
    with pytest.raises(DataError, match="is no folder"):
        find_subjects(tmp_path / "sub-01/dwi/sub-01_run-1_dwi.nii.gz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no subject. A subject's folder is called sub-"):
        find_subjects(tmp_path / "empty")
