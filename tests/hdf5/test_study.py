"""What a study has and what it lacks: seen from names and b-values, before anything is computed."""

import numpy as np
import pytest

from tractkit.core.files import DataError
from tractkit.hdf5.study import Choices, plan_study, study_table


def touch(root, *names, text=""):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def subject(root, k, shells, tracts=("AF", "CST"), missing=(), b0=0):
    there = f"sub-{k}/dwi/sub-{k}_"
    bvals = np.repeat([b0, *[b for b, _ in shells]], [1, *[n for _, n in shells]])
    for end in {"dwi.nii.gz", "dwi.bvec", "desc-brain_mask.nii.gz"} - set(missing):
        touch(root, there + end)
    if "dwi.bval" not in missing:
        touch(root, there + "dwi.bval", text=" ".join(map(str, bvals)))
    touch(root, *(f"derivatives/t/sub-{k}/sub-{k}__{name}.trk" for name in tracts))


def problems(study):
    return {p.name: list(p.problems) for p in study.subjects if p.problems}


def test_all_have_one_shell_and_one_order(tmp_path):
    subject(tmp_path, 1, [(2000, 60)])
    subject(tmp_path, 2, [(1000, 90), (1995, 40), (3000, 90)])
    subject(tmp_path, 3, [(2005, 32)])
    study = plan_study(tmp_path)
    assert not problems(study) and study.input == "sh" and study.sh_order == 6  # 32 directions
    assert [p.shell for p in study.subjects] == [None, 1995, None]
    assert list(study.subjects[0].tractograms) == ["AF", "CST"]
    assert "40 at 1995*" in study_table(study) and "order 6" in study_table(study)
    alone = plan_study(tmp_path, subjects=["sub-2"])
    assert alone.shell == 3000 and alone.sh_order == 8  # of two with most directions the higher
    said = plan_study(tmp_path, Choices(shell=1000, sh_order=4))
    assert said.sh_order == 4 and set(problems(said)) == {"sub-1", "sub-3"}
    assert "no shell at b = 1000" in problems(said)["sub-1"][0]


def test_one_shell_each_of_two_scanners(tmp_path):
    subject(tmp_path, 1, [(1000, 30)])
    subject(tmp_path, 2, [(1300, 30)])
    subject(tmp_path, 3, [(700, 30), (3000, 60)])
    study = plan_study(tmp_path)
    assert not problems(study) and [p.shell for p in study.subjects] == [None, None, 3000]
    assert "note: sub-1, sub-2 have no such shell; theirs is used in its place" in study_table(study)


def test_everything_that_is_missing_is_listed_at_once(tmp_path):
    subject(tmp_path, 1, [(1000, 30)])
    subject(tmp_path, 2, [(1000, 30)], missing=["desc-brain_mask.nii.gz", "dwi.bval"])
    subject(tmp_path, 3, [(1000, 30)], tracts=())
    subject(tmp_path, 4, [(1000, 30)], b0=60)
    touch(tmp_path, "sub-5/dwi/sub-5_run-1_dwi.nii.gz", "sub-5/dwi/sub-5_run-2_dwi.nii.gz",
          "sub-5/dwi/sub-5_desc-brain_mask.nii.gz", "sub-5/a/AF.trk", "sub-5/a/CST.trk", "sub-5/b/AF.trk")
    subject(tmp_path, 6, [(1000, 30)], missing=["dwi.bvec"])
    (tmp_path / "sub-6/dwi/sub-6_dwi.bvec").symlink_to("annex/objects")
    touch(tmp_path, "sub-7/dwi/sub-7_dwi.nii.gz", "sub-7/dwi/sub-7_dwi.bvec")
    touch(tmp_path, "sub-7/dwi/sub-7_dwi.bval", text="0 a b")
    study = plan_study(tmp_path)
    said = problems(study)
    assert set(said) == {f"sub-{k}" for k in range(2, 8)}
    assert said["sub-2"] == ["no brain mask on the grid of the series (if there is one, say which: mask='NAME')",
                             "no b-values (.bval) beside its series"]
    assert said["sub-3"] == ["no tractogram (.trk, .trx, .tck)"]
    assert "no volume has b of at most 50; the lowest is 60: b0_threshold=60" in said["sub-4"][0]
    assert "2 files could be its dwi: sub-5_run-1_dwi.nii.gz, sub-5_run-2_dwi.nii.gz; say which" in said["sub-5"][0]
    assert said["sub-6"] == ["sub-6_dwi.bvec is a link, and its file is not here; fetch it (datalad get)"]
    assert any("is no table of numbers" in problem for problem in said["sub-7"])
    table = study_table(study)
    assert all(f"  {name}: {problem}" in table for name, of_one in said.items() for problem in of_one)
    assert list(study.subjects[4].tractograms) == ["a_AF", "CST", "b_AF"]


def test_fodf_where_all_have_it(tmp_path):
    for sub in ("sub-1", "sub-2"):
        touch(tmp_path, f"{sub}/FODF_Metrics/{sub}__fodf.nii.gz", f"{sub}/Tracking/{sub}__tracking.trk")
    study = plan_study(tmp_path)
    assert (study.input, study.features, study.axes) == ("fodf", "sh:descoteaux07_legacy", "voxel")
    assert not problems(study) and "fibre orientations as they are (descoteaux07_legacy)" in study_table(study)
    touch(tmp_path, "sub-3/dwi/sub-3_dwi.nii.gz")
    assert plan_study(tmp_path).input == "sh"
    forced = plan_study(tmp_path, Choices(input="fodf"))
    assert "no fibre orientations (fodf)" in problems(forced)["sub-3"][0]
    touch(tmp_path, *(f"m/s{k}/{file}" for k in (1, 2) for file in ("dwi.mif", "wmfod.mif", "mask.mif", "t.tck")))
    of_mrtrix = plan_study(tmp_path / "m")
    assert (of_mrtrix.input, of_mrtrix.features, of_mrtrix.axes) == ("fodf", "sh:tournier07", "scanner")


def test_fodf_of_mrtrix_chosen_by_name_have_its_basis(tmp_path):
    touch(tmp_path, *(f"s{k}/{file}" for k in (1, 2) for file in ("dwi.mif", "my_fods.mif", "wmfod.nii.gz", "t.tck")),
          "s1/fodf.nii.gz")
    for name in ("*fods.mif", "my_fods.mif", "wmfod.nii.gz"):
        chosen = plan_study(tmp_path, Choices(input="fodf", fodf=(name,)))
        assert (chosen.features, chosen.axes) == ("sh:tournier07", "scanner")
    said = plan_study(tmp_path, Choices(fodf=("*fods.mif",), basis="descoteaux07", axes="voxel"))
    assert (said.features, said.axes) == ("sh:descoteaux07", "voxel")
    assert plan_study(tmp_path, Choices(fodf=("fodf.nii.gz",)), subjects=["s1"]).features == "sh:descoteaux07_legacy"
    with pytest.raises(DataError, match="my_fods.mif: is of MRtrix by its name, and fodf.nii.gz is not"):
        plan_study(tmp_path, Choices(fodf=("/fodf.nii.gz", "fodf.nii.gz", "*fods.mif")))


NAMES = {"sub-1__AF_left.trk": "AF_left", "sub-1_bundle-AF_tractogram.trk": "AF", "sub-1_ses-2_tractogram.trx":
         "tractogram", "sub-1_space-ACPC_model-x_bundle-CSTL_streamlines.tck.gz": "CSTL", "CC_1.tck": "CC_1",
         "sub-1__pft_tracking_prob_wm_seed_0.trk": "pft_tracking_prob_wm_seed_0",
         "sub-1_bundle-AF_L_tractogram.trk": "AF_L", "sub-1_bundle-CST_L.trk": "CST_L",
         "sub-1_hemi-L_bundle-AF_tractogram.trk": "AF_L", "sub-1_desc-AF_left_tractogram.trk": "AF_left",
         "sub-1_coordsys-RASMM_trkmethod-probCSD_recogmethod-AFQ_desc-ArcLeft_tractography.trk": "ArcLeft"}


@pytest.mark.parametrize("file", NAMES)
def test_names_of_bundles(tmp_path, file):
    touch(tmp_path, "sub-1/dwi/sub-1_dwi.nii.gz", f"sub-1/{file}")
    assert list(plan_study(tmp_path).subjects[0].tractograms) == [NAMES[file]]


def test_what_differs_between_files_stays_in_their_names(tmp_path):
    touch(tmp_path, "sub-1/dwi/sub-1_dwi.nii.gz", "sub-1/sub-1_desc-raw_bundle-AF_L_tractogram.trk",
          *(f"sub-1/sub-1_desc-{d}_bundle-AF_{side}_tractogram.trk" for d in ("a", "b") for side in "LR"),
          "sub-1/sub-1_hemi-L_bundle-CST_tractogram.trk", "sub-1/sub-1_hemi-R_bundle-CST_tractogram.trk",
          "sub-1/CC_run-1.trk", "sub-1/CC_run-2.trk")
    (plan,) = plan_study(tmp_path).subjects
    assert not any("would be called" in problem for problem in plan.problems)
    assert set(plan.tractograms) == {"CC_run-1", "CC_run-2", "AF_L_desc-a", "AF_R_desc-a", "AF_L_desc-b",
                                     "AF_R_desc-b", "AF_L_desc-raw", "CST_L", "CST_R"}


def test_subjects_with_other_letters_in_their_names(tmp_path):
    names = ["sub-A b", "sub-P-002", "sub-P.003", "sub-P_001", "sub-Ünï"]
    for name in names:
        touch(tmp_path, *(f"{name}/dwi/{name}_{end}" for end in ("dwi.nii.gz", "bundle-AF_tractogram.trk")),
              f"derivatives/x/{name}/dwi/{name}_desc-brain_mask.nii.gz")
    plans = plan_study(tmp_path).subjects
    assert [plan.name for plan in plans] == names
    assert all(list(plan.tractograms) == ["AF"] and len(plan.masks) == 1 for plan in plans)
    (tmp_path / "sub-P_001" / "dwi" / "sub-P_001_dwi.bedpostX").mkdir()
    inner = plan_study(tmp_path / "sub-P_001" / "dwi" / "sub-P_001_dwi.bedpostX")
    assert [plan.name for plan in inner.subjects] == ["sub-P_001"]


def test_advice_names_a_shell_that_is_there(tmp_path):
    subject(tmp_path, 1, [(700, 30), (1200, 30), (2800, 60)])
    subject(tmp_path, 2, [(1000, 30), (3000, 60)])
    table = study_table(plan_study(tmp_path))
    assert "no shell is common to all" in table and "1000" not in table.split("missing:")[1] and "note:" not in table
    subject(tmp_path, 3, [(1000, 30), (2000, 60)])
    said = plan_study(tmp_path, Choices(shell=2000), subjects=["2", "sub-3"])
    assert "say one that all have: shell=1000" in problems(said)["sub-2"][0]


def test_a_word_that_is_part_of_a_name(tmp_path):
    subject(tmp_path, "003", [(1000, 30)])
    touch(tmp_path, "sub-003/anat/sub-003_label-WM_mask.nii.gz")
    study = plan_study(tmp_path, Choices(mask=("label-WM",)), subjects=["003"])
    assert not problems(study) and study.subjects[0].masks[0].name == "sub-003_label-WM_mask.nii.gz"
    assert plan_study(tmp_path, Choices(mask=("desc-brain_mask.nii.gz",))).subjects[0].masks


def test_some_tractograms_and_some_subjects(tmp_path):
    for k in (1, 2):
        subject(tmp_path, k, [(1000, 30)], tracts=("AF", "CST", "whole"))
    study = plan_study(tmp_path, Choices(tractograms=("*AF*", "*CST*", "*UF*")), subjects=["sub-2"])
    assert list(study.subjects[0].tractograms) == ["AF", "CST"]
    assert problems(study) == {"sub-2": ["no tractogram that fits '*UF*'"]}
    with pytest.raises(DataError, match="sub-9: no such subject. There are sub-1, sub-2"):
        plan_study(tmp_path, subjects=["sub-9"])
