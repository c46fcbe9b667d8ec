"""From a diffusion series to coefficients and peaks: against DIPY, against known directions, against bad files."""

import json
import os
import time
from importlib.resources import files

import nibabel as nib
import numpy as np
import pytest
from dipy.core.geometry import vec2vec_rotmat
from dipy.core.sphere import Sphere
from dipy.data import get_sphere
from dipy.direction import peaks_from_model
from dipy.reconst.csdeconv import ConstrainedSphericalDeconvModel, auto_response_ssst
from dipy.reconst.shm import sh_to_sf
from dipy.sims.voxel import multi_tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import label

from tractkit.core.files import DataError
from tractkit.dwi.fodf import Response, compute_fodf, estimate_response, fodf_peaks
from tractkit.dwi.gradients import DWI, load_dwi, select_shell
from tractkit.dwi.prepare import prepare_subject
from tractkit.dwi.sh import ShInfo, compute_sh, largest_sh_order, load_sh, save_sh
from tractkit.dwi.space_check import _dwi_of
from tractkit.spatial.resample import resample_step
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
FIBRE, TISSUE = (1.7e-3, 0.3e-3, 0.3e-3), (0.8e-3,) * 3
LAS = np.diag([-2.0, 2, 2, 1])
SHAPE = (5, 4, 3)


def gradients(n=32, bval=2000.0, seed=0):
    """One b0, then n directions spread by DIPY's repulsion724."""
    v = get_sphere(name="repulsion724").vertices
    v = v[v[:, 2] > 0]
    v = v[np.random.default_rng(seed).permutation(len(v))]
    chosen = [v[0]]
    for _ in range(n - 1):  # furthest from those chosen
        chosen.append(v[np.abs(v @ np.array(chosen).T).max(axis=1).argmin()])
    return np.r_[0.0, np.full(n, bval)], np.vstack([np.zeros(3), chosen])


def simulated(bvals, bvecs, directions, s0=100.0, fraction=80):
    """A series whose voxel k (in C order) holds fibres along directions[k] (a list of vectors) in grey tissue."""
    dwi = DWI(Volume(np.ones((*SHAPE, len(bvals)), np.float32), LAS), bvals, bvecs, np.ones(SHAPE))
    data = np.empty((int(np.prod(SHAPE)), len(bvals)), np.float32)
    for k in range(len(data)):
        axes = directions[k % len(directions)]
        data[k], _ = multi_tensor(dwi.gtab, np.array([FIBRE] * len(axes) + [TISSUE]), S0=s0, snr=None,
                                  angles=[*map(tuple, axes), (0, 0, 1)],
                                  fractions=[fraction / len(axes)] * len(axes) + [100 - fraction])
    return DWI(Volume(data.reshape(*SHAPE, -1), LAS), bvals, bvecs, np.ones(SHAPE))


def write(folder, dwi, affine=LAS, columns=False):
    nib.save(nib.Nifti1Image(dwi.volume.data, affine), folder / "dwi.nii.gz")
    nib.save(nib.Nifti1Image(dwi.mask.astype(np.uint8), affine), folder / "mask.nii.gz")
    np.savetxt(folder / "bvals", dwi.bvals[None])
    np.savetxt(folder / "bvecs", dwi.bvecs if columns else dwi.bvecs.T)


def load(folder, **options):
    return load_dwi(*(folder / f for f in ("dwi.nii.gz", "bvals", "bvecs", "mask.nii.gz")), **options)


def random_axes(n, seed=1):
    v = np.random.default_rng(seed).normal(size=(n, 3))
    return v / np.linalg.norm(v, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def series():
    return simulated(*gradients(), [[v] for v in random_axes(60)])


# orders -----------------------------------------------------------------------------------------------------------

@given(st.integers(6, 400), st.integers(2, 16))
def test_largest_order_is_the_largest(n, most):
    order = largest_sh_order(n, most)
    assert order % 2 == 0 and order <= most and (order + 1) * (order + 2) // 2 <= n
    assert order + 2 > most or (order + 3) * (order + 4) // 2 > n


def test_orders_of_the_issue():
    assert largest_sh_order(20) == 4 and largest_sh_order(34) == 6 and largest_sh_order(300) == 8
    with pytest.raises(ValueError, match="too few"):
        largest_sh_order(5)


# spherical harmonics ----------------------------------------------------------------------------------------------

@settings(max_examples=15, deadline=None)
@given(st.sampled_from([2, 4, 6]), st.booleans(), st.integers(0, 10**6))
def test_known_coefficients_come_back(order, legacy, seed):
    bvals, bvecs = gradients(32)
    rng = np.random.default_rng(seed)
    known = rng.normal(0, 0.02, (*SHAPE, (order + 1) * (order + 2) // 2))
    known[..., 0] = 1.5  # keeps the share of signal within 0 and 1
    share = sh_to_sf(known, Sphere(xyz=bvecs[1:]), sh_order_max=order, basis_type="descoteaux07", legacy=legacy)
    assert 0 < share.min() and share.max() < 1
    data = np.concatenate([np.full((*SHAPE, 1), 700.0), 700 * share], axis=-1).astype(np.float32)
    back = compute_sh(DWI(Volume(data, LAS), bvals, bvecs, np.ones(SHAPE)), order, smooth=0, legacy=legacy)
    np.testing.assert_allclose(back.data, known, atol=2e-5)


def test_order_of_volumes_and_scale_of_signal_do_not_matter(series):
    mixed = np.random.default_rng(0).permutation(len(series.bvals))
    other = DWI(Volume(3 * series.volume.data[..., mixed], LAS), series.bvals[mixed], series.bvecs[mixed], series.mask)
    np.testing.assert_allclose(compute_sh(other).data, compute_sh(series).data, atol=1e-5)


def test_signal_above_b0_counts_as_b0_and_dead_voxels_are_told():
    bvals, bvecs = gradients()
    data = np.full((*SHAPE, 33), 250.0, np.float32)
    data[..., 0] = 100
    data[0, 0, 0] = 0
    mask = np.ones(SHAPE)
    mask[1, 1, 1] = 0
    with pytest.warns(UserWarning, match="1 voxels of the mask have no b0 signal"):
        sh = compute_sh(DWI(Volume(data, LAS), bvals, bvecs, mask), 4)
    assert not sh.data[0, 0, 0].any() and not sh.data[1, 1, 1].any()
    np.testing.assert_allclose(sh.data[2, 2, 2, 0], np.sqrt(4 * np.pi), rtol=1e-4)  # a constant 1
    np.testing.assert_allclose(sh.data[2, 2, 2, 1:], 0, atol=1e-4)


def test_order_as_asked(series):
    assert compute_sh(series).nb_features == 28 and compute_sh(series, 8).nb_features == 45
    assert compute_fodf(series, 4).nb_features == 15
    for order in (5, -2):
        with pytest.raises(ValueError, match="even orders only"):
            compute_sh(series, order)


# fibre orientations -----------------------------------------------------------------------------------------------

def test_fodf_is_dipys(series):
    evals, s0 = auto_response_ssst(series.gtab, series.volume.data, roi_radii=10, fa_thr=0.3)[0]
    response = Response(tuple(evals), float(s0), 1, "given")
    ours = compute_fodf(series, response=response)
    model = ConstrainedSphericalDeconvModel(series.gtab, (evals, s0), sh_order_max=6)
    np.testing.assert_allclose(ours.data, model.fit(series.volume.data).shm_coeff, atol=1e-5)
    some = np.zeros(SHAPE, bool)
    some[2] = True
    part = compute_fodf(series, response=response, mask=some)
    assert np.array_equal(part.data[some], ours.data[some]) and not part.data[~some].any()
    with pytest.raises(ValueError, match="shape"):
        compute_fodf(series, response=response, mask=some[:-1])


def test_peaks_are_dipys(series):
    response = Response((1.5e-3, 0.4e-3, 0.4e-3), 100.0, 1, "given")
    model = ConstrainedSphericalDeconvModel(series.gtab, (np.array(response.evals), response.s0), sh_order_max=6)
    theirs = peaks_from_model(model, series.volume.data, get_sphere(name="repulsion724"), relative_peak_threshold=0.5,
                              min_separation_angle=25, npeaks=3, normalize_peaks=False)
    ours = fodf_peaks(compute_fodf(series, response=response)).data.reshape(*SHAPE, 3, 3)
    assert np.array_equal(ours.any(-1), theirs.peak_dirs.any(-1))
    np.testing.assert_allclose(np.abs((ours * theirs.peak_dirs).sum(-1)), ours.any(-1), atol=1e-5)


def test_peaks_point_along_the_fibres():
    axes = random_axes(60, seed=3)
    crossing = [vec2vec_rotmat(np.array([0.0, 0, 1]), a) @ np.array([1.0, 0, 0]) for a in axes]  # square to the first
    dwi = simulated(
        *gradients(64, 3000.0), [[a, b] if k % 2 else [a] for k, (a, b) in enumerate(zip(axes, crossing, strict=True))]
    )
    peaks = fodf_peaks(compute_fodf(dwi, response=Response(FIBRE, 100.0, 1, "known"))).data.reshape(60, 3, 3)
    np.testing.assert_allclose(np.linalg.norm(peaks, axis=-1).round(4) % 1, 0)  # unit vectors or none
    for k in range(60):
        wanted = [axes[k], crossing[k]] if k % 2 else [axes[k]]
        assert peaks[k].any(-1).sum() == len(wanted)
        for w in wanted:
            assert np.degrees(np.arccos(min(1, np.abs(peaks[k] @ w).max()))) < 6


def test_peaks_of_nothing_and_of_a_wrong_number_of_coefficients():
    assert not fodf_peaks(Volume(np.zeros((2, 2, 2, 15), np.float32), LAS), 2).data.any()
    with pytest.raises(ValueError, match="16 coefficients fit no even order"):
        fodf_peaks(Volume(np.zeros((2, 2, 2, 16), np.float32), LAS))


def test_response_of_a_single_fibre_and_its_fallback():
    pure = simulated(*gradients(), [[v] for v in random_axes(60)], fraction=100)
    r = estimate_response(pure)
    np.testing.assert_allclose(r.evals, FIBRE, rtol=0.02)
    assert r.n_voxels == 60 and r.source.startswith("FA above 0.7") and abs(r.s0 - 100) < 1e-3
    thin = simulated(*gradients(), [[v] for v in random_axes(60)], fraction=60)
    assert estimate_response(thin, min_voxels=5).source == "the 6 voxels of highest FA"  # inside the rim of the mask
    empty = DWI(Volume(np.full((*SHAPE, 33), 5, np.float32), LAS), *gradients(), np.ones(SHAPE))
    with pytest.raises(DataError, match="no response of a single fibre"):
        estimate_response(empty)


# reading ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("columns", [False, True])
def test_rows_or_columns(tmp_path, series, columns):
    write(tmp_path, series, columns=columns)
    dwi = load(tmp_path)
    np.testing.assert_allclose(dwi.bvecs, series.bvecs, atol=1e-12)
    assert (
        np.array_equal(dwi.volume.data, series.volume.data)
        and dwi.nb_directions == 32
        and "32 at b = 2000" in repr(dwi)
    )


@pytest.mark.parametrize("way", [
    "mark", "utf-16", "comments", "tabs", "commas", "commas and spaces", "semicolons", "windows", "old mac", "column"])
def test_gradients_as_editors_and_scanners_write_them(tmp_path, series, way):
    write(tmp_path, series)
    for name in ("bvals", "bvecs"):
        text = (tmp_path / name).read_text()
        if way == "column":
            text = "\n".join(" ".join(row) for row in zip(*map(str.split, text.splitlines()), strict=True))
        text = {"comments": "# of the scanner\n% and of MATLAB\n" + text.replace("\n", "  # end\n"),
                "tabs": text.replace(" ", "\t"), "commas": text.replace(" ", ","), "old mac": text.replace("\n", "\r"),
                "commas and spaces": text.replace(" ", ", "), "semicolons": text.replace(" ", ";"),
                "windows": text.replace("\n", "\r\n") + "\r\n\r\n"}.get(way, text)
        kind = {"mark": "utf-8-sig", "utf-16": "utf-16"}.get(way, "utf-8")
        (tmp_path / name).write_bytes(text.encode(kind))
    files = [tmp_path / name for name in ("dwi.nii.gz", "bvals", "bvecs")]
    for dwi in (load(tmp_path), _dwi_of(*files, None, "fsl")):  # with a mask, and without
        np.testing.assert_allclose(dwi.bvals, series.bvals)
        np.testing.assert_allclose(dwi.bvecs, series.bvecs, atol=1e-12)


@pytest.mark.parametrize(("text", "said"), [
    ("0 1000 abc", "line 1 has 'abc'"), ("0 1000\n# so\n0 1e", "line 3 has '1e'"), ("0,5 1000,0", "commas"),
    ("0,5;1000,0", "commas"), ("1 2 3\n1 2", "row 2 has 2 numbers, row 1 has 3"), ("# nothing", "no numbers"),
    (b"\x1f\x8b\x08\xff\xfe", "no text"), (b"0 1000\x00", "line 1 has"), (None, "more than")])
def test_a_text_that_is_no_table_is_named_with_its_line(tmp_path, series, text, said, monkeypatch):
    write(tmp_path, series)
    file = tmp_path / "bvals"
    if text is None:
        monkeypatch.setattr("tractkit.core.text._MOST_TEXT", 100)
    else:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    files = [tmp_path / name for name in ("dwi.nii.gz", "bvals", "bvecs")]
    for read in (lambda: load(tmp_path), lambda: _dwi_of(*files, None, "fsl")):
        with pytest.raises(DataError, match=said) as e:
            read()
        assert e.value.file == str(file)


def test_fsl_reverses_the_first_axis_if_the_determinant_is_positive(tmp_path, series):
    write(tmp_path, series, affine=np.diag([2.0, 2, 2, 1]))
    np.testing.assert_allclose(load(tmp_path).bvecs, series.bvecs * [-1, 1, 1], atol=1e-12)
    np.testing.assert_allclose(load(tmp_path, bvecs_axes="voxel").bvecs, series.bvecs, atol=1e-12)
    with pytest.raises(ValueError, match="bvecs_axes"):
        load(tmp_path, bvecs_axes="world")


def damage(name):
    """What is wrong, how to make it so, the file that must be named and what must be said of it."""
    def cut(f, at):
        f.write_bytes(f.read_bytes()[:at])

    def data(f, change):
        image = nib.load(f)
        nib.save(nib.Nifti1Image(change(np.array(image.get_fdata(dtype=np.float32))), image.affine), f)

    def nan(a):
        a[1, 1, 1, 3] = np.nan
        return a

    def moved(folder):
        image = nib.load(folder / "mask.nii.gz")
        nib.save(
            nib.Nifti1Image(np.asarray(image.dataobj), LAS + np.eye(4)[:, [3, 0, 1, 2]] * 0.5), folder / "mask.nii.gz"
        )

    b, v = gradients()
    return {
        "no dwi": (lambda d: (d / "dwi.nii.gz").unlink(), "dwi.nii.gz", "no such file"),
        "no bvals": (lambda d: (d / "bvals").unlink(), "bvals", "no such file"),
        "no bvecs": (lambda d: (d / "bvecs").unlink(), "bvecs", "no such file"),
        "no mask": (lambda d: (d / "mask.nii.gz").unlink(), "mask.nii.gz", "no such file"),
        "truncated": (lambda d: cut(d / "dwi.nii.gz", 900), "dwi.nii.gz", "NIfTI|its data|truncated"),
        "3D": (lambda d: data(d / "dwi.nii.gz", lambda a: a[..., 0]), "dwi.nii.gz", "four dimensions"),
        "NaN": (lambda d: data(d / "dwi.nii.gz", nan), "dwi.nii.gz", r"1 of \d+ values are NaN"),
        "too few bvals": (lambda d: np.savetxt(d / "bvals", b[None, :-1]), "bvals", "32 b-values for 33 volumes"),
        "words": (lambda d: (d / "bvals").write_text("a b c"), "bvals", "no table of numbers"),
        "empty": (lambda d: (d / "bvals").write_text(""), "bvals", "no numbers"),
        "ragged": (lambda d: (d / "bvecs").write_text("1 2 3\n1 2\n"), "bvecs", "no table of numbers"),
        "negative": (lambda d: np.savetxt(d / "bvals", -b[None]), "bvals", "not negative"),
        "no b0": (lambda d: np.savetxt(d / "bvals", b[None] + 100), "bvals", "no volume has b of at most 50"),
        "all b0": (lambda d: np.savetxt(d / "bvals", 0 * b[None]), "bvals", "at least 6"),
        "too few bvecs": (
            lambda d: np.savetxt(d / "bvecs", v[:-1].T),
            "bvecs",
            r"directions of shape \(32, 3\) for 33",
        ),
        "long bvecs": (lambda d: np.savetxt(d / "bvecs", 1.1 * v.T), "bvecs", "32 directions are no unit vectors"),
        "zero bvec": (
            lambda d: np.savetxt(d / "bvecs", np.vstack([v[:-1], 0 * v[:1]]).T),
            "bvecs",
            "1 directions are no unit",
        ),
        "NaN bvec": (
            lambda d: np.savetxt(d / "bvecs", np.vstack([v[:-1], np.nan * v[:1]]).T),
            "bvecs",
            "1 directions are no",
        ),
        "mask shape": (lambda d: data(d / "mask.nii.gz", lambda a: a[:-1]), "mask.nii.gz", "shape"),
        "mask 4D": (lambda d: data(d / "mask.nii.gz", lambda a: np.stack([a, a], -1)), "mask.nii.gz", "shape"),
        "mask place": (moved, "mask.nii.gz", "apart"),
        "mask empty": (lambda d: data(d / "mask.nii.gz", lambda a: 0 * a), "mask.nii.gz", "the mask is empty"),
    }[name]


NAMES = [
    "no dwi",
    "no bvals",
    "no bvecs",
    "no mask",
    "truncated",
    "3D",
    "NaN",
    "too few bvals",
    "words",
    "empty",
    "ragged",
    "negative",
    "no b0",
    "all b0",
    "too few bvecs",
    "long bvecs",
    "zero bvec",
    "NaN bvec",
    "mask shape",
    "mask 4D",
    "mask place",
    "mask empty",
]


@pytest.mark.parametrize("name", NAMES)
def test_bad_files_are_named(tmp_path, series, name):
    write(tmp_path, series)
    load(tmp_path)
    make, file, said = damage(name)
    make(tmp_path)
    with pytest.raises(DataError, match=said) as e:
        load(tmp_path)
    assert str(tmp_path / file) in str(e.value)


def test_a_mask_with_a_fourth_axis_of_one(tmp_path, series):
    write(tmp_path, series)
    nib.save(nib.Nifti1Image(np.ones((*SHAPE, 1), np.uint8), LAS), tmp_path / "mask.nii.gz")
    assert load(tmp_path).mask.shape == SHAPE


def test_shells(series):
    b, v = gradients(12, 1000.0)
    two = DWI(Volume(np.concatenate([series.volume.data, series.volume.data[..., 1:13]], -1), LAS),
              np.r_[series.bvals, b[1:]], np.vstack([series.bvecs, v[1:]]), series.mask)
    for function in (compute_sh, compute_fodf, estimate_response):
        with pytest.raises(DataError, match="b goes from 1000 to 2000: this is more than one shell"):
            function(two)
    one = select_shell(two, 1000)
    assert one.nb_directions == 12 and one.is_b0.sum() == 1 and one.volume.nb_features == 13
    np.testing.assert_allclose(compute_sh(select_shell(two, 2000)).data, compute_sh(series).data)
    with pytest.raises(ValueError, match="0 volumes have b = 500"):
        select_shell(two, 500)


# files ------------------------------------------------------------------------------------------------------------

def test_coefficients_keep_their_basis(tmp_path, series):
    sh = compute_sh(series, legacy=False)
    save_sh(sh, tmp_path / "sh.nii.gz", ShInfo("signal", 6, legacy=False, details={"smooth": 0.006}))
    volume, info = load_sh(tmp_path / "sh.nii.gz")
    assert np.array_equal(volume.data, sh.data) and info == ShInfo("signal", 6, legacy=False, details={"smooth": 0.006})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sh.json", "sh.nii.gz"]
    with pytest.raises(ValueError, match="order 4 has 15 coefficients, not 28"):
        save_sh(sh, tmp_path / "other.nii", ShInfo("signal", 4))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "sidecar is missing"),
        ("{", "is no sidecar"),
        ("[]", "is no sidecar"),
        ('{"kind": "signal"}', "is no sidecar"),
        ('{"kind": "signal", "sh_order": 6, "colour": 1}', "is no sidecar"),
        ('{"kind": "signal", "sh_order": 4}', "has 28"),
    ],
)
def test_bad_sidecars(tmp_path, series, text, said):
    save_sh(compute_sh(series), tmp_path / "sh.nii.gz", ShInfo("signal", 6))
    (tmp_path / "sh.json").unlink() if text is None else (tmp_path / "sh.json").write_text(text)
    with pytest.raises(DataError, match=said) as e:
        load_sh(tmp_path / "sh.nii.gz")
    assert str(tmp_path / "sh") in str(e.value)


def test_prepare_does_only_what_is_needed(tmp_path, series):
    def times():
        return {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}

    def changed(before):
        return {name for name, t in times().items() if t != before.get(name)}

    write(tmp_path, series)
    old = time.time() - 100
    for p in tmp_path.iterdir():
        os.utime(p, (old, old))
    out = prepare_subject(tmp_path)
    assert set(out) == {"sh", "fodf"} and all(p.is_file() for p in out.values())
    info = load_sh(out["fodf"])[1]
    assert info.kind == "fodf" and info.sh_order == 6 and info.details["response"]["n_voxels"] == 60
    np.testing.assert_array_equal(load_sh(out["sh"])[0].data, compute_sh(series).data)
    before = times()
    assert prepare_subject(tmp_path) == out and not changed(before)
    prepare_subject(tmp_path, sh_order=4, fodf=False)
    assert changed(before) == {"sh.nii.gz", "sh.json"} and load_sh(out["sh"])[1].sh_order == 4
    prepare_subject(tmp_path)
    before = times()
    os.utime(tmp_path / "bvecs", (time.time() + 5,) * 2)  # a new bvecs
    prepare_subject(tmp_path)
    assert changed(before) >= {"sh.nii.gz", "sh.json", "fodf.nii.gz", "fodf.json"}
    os.utime(tmp_path / "bvecs", (old, old))
    (tmp_path / "sh.json").write_text("{")
    before = times()
    prepare_subject(tmp_path)
    assert changed(before) == {"sh.nii.gz", "sh.json"}
    before = times()
    prepare_subject(tmp_path, force=True)
    assert changed(before) == {"sh.nii.gz", "sh.json", "fodf.nii.gz", "fodf.json"}
    (tmp_path / "bvals").unlink()
    with pytest.raises(DataError, match="bvals: no such file"):
        prepare_subject(tmp_path)


def hcp(folder, series):
    """Three shells and b0 at 5, as HCP has them: 1000 with 12 directions, 2000 with 32, 3000 with 12."""
    b, v = gradients(12, 1000.0)
    near = np.where(np.arange(33) % 2, 1995.0, 2005.0)
    near[0] = 5
    few = series.volume.data[..., 1:13]
    several = DWI(Volume(np.concatenate([series.volume.data, few, few], -1), LAS),
                  np.r_[near, b[1:], b[1:] * 3], np.vstack([series.bvecs, v[1:], v[1:]]), series.mask)
    write(folder, several)
    return several


def test_several_shells_are_prepared_by_the_one_that_is_named(tmp_path, series):
    hcp(tmp_path, series)
    with pytest.raises(DataError, match=r"12 at b = 1000, 32 at b = 2005, 12 at b = 3000.*shell=2005") as e:
        prepare_subject(tmp_path)
    assert "select_shell" not in str(e.value) and str(tmp_path / "bvals") in str(e.value)
    out = prepare_subject(tmp_path, shell=2000)
    volume, info = load_sh(out["sh"])
    np.testing.assert_array_equal(volume.data, compute_sh(select_shell(load(tmp_path), 2000)).data)
    assert info.details["asked"]["shell"] == 2000 and load_sh(out["fodf"])[1].sh_order == 6
    written = out["sh"].stat().st_mtime_ns
    prepare_subject(tmp_path, shell=2000)
    assert out["sh"].stat().st_mtime_ns == written
    prepare_subject(tmp_path, shell=1000, fodf=False)
    assert load_sh(out["sh"])[1].sh_order == 2  # 12 directions
    with pytest.raises(DataError, match=r"0 volumes have b = 700 ± 100.*It has 12 at b = 1000, 32 at"):
        prepare_subject(tmp_path, shell=700)


def test_b0_volumes_that_are_not_quite_0(tmp_path, series):
    write(tmp_path, DWI(series.volume, np.where(series.bvals == 0, 70, series.bvals), series.bvecs, series.mask, 100))
    with pytest.raises(DataError, match="no volume has b of at most 50; the lowest is 70. Raise b0_threshold"):
        prepare_subject(tmp_path)
    out = prepare_subject(tmp_path, b0_threshold=80, fodf=False)
    np.testing.assert_array_equal(load_sh(out["sh"])[0].data, compute_sh(series).data)


@pytest.mark.parametrize("wrong", [{"shell": 0}, {"shell": -1000}, {"shell": float("nan")}, {"b0_threshold": -1},
                                   {"b0_threshold": float("nan")}, {"shell": 50}])
def test_numbers_that_are_no_b_values(tmp_path, wrong):
    with pytest.raises(ValueError, match=f"{list(wrong)[0]} is a b-value"):
        prepare_subject(tmp_path, **wrong)


def test_prepared_before_is_not_prepared_again(tmp_path, series):
    """A sidecar written before `shell` and `b0_threshold` were there says nothing of them."""
    write(tmp_path, series)
    out = prepare_subject(tmp_path, fodf=False)
    asked = load_sh(out["sh"])[1].details["asked"]
    assert set(asked) == {"sources", "sh_order", "bvecs_axes"}


def test_errors_of_prepare_advise_what_it_has(tmp_path):
    write(tmp_path, DWI(Volume(np.full((*SHAPE, 33), 5, np.float32), LAS), *gradients(), np.ones(SHAPE)))
    with pytest.raises(DataError, match="no response of a single fibre.*fodf=False") as e:
        prepare_subject(tmp_path)
    assert "response=" not in str(e.value)


# data of others ---------------------------------------------------------------------------------------------------

def test_small_64d_of_the_dipy_wheel(tmp_path):
    there = files("dipy") / "data" / "files"
    image = nib.load(there / "small_64D.nii")
    nib.save(nib.Nifti1Image(np.ones(image.shape[:3], np.uint8), image.affine), tmp_path / "mask.nii.gz")
    dwi = load_dwi(
        there / "small_64D.nii", there / "small_64D.bval", there / "small_64D.bvec", tmp_path / "mask.nii.gz"
    )
    assert dwi.nb_directions == 64 and compute_sh(dwi).nb_features == 45
    fodf = compute_fodf(dwi)
    assert np.isfinite(fodf.data).all() and fodf_peaks(fodf).data.any(-1).mean() > 0.9


@pytest.mark.real
def test_real_peaks_follow_the_reference_and_the_callosum_crosses(real_data):
    folder = real_data / "real_dwi_3mm"
    dwi = load_dwi(folder / "dwi.nii.gz", folder / "dwi.bval", folder / "dwi.bvec", folder / "mask.nii.gz")
    with pytest.warns(UserWarning, match="4 voxels of the mask have no b0 signal"):
        assert dwi.nb_directions == 20 and compute_sh(dwi).nb_features == 15
    fa = Volume.load(folder / "dsi_FA.nii.gz")
    strong = dwi.mask & (np.nan_to_num(fa.data) > 0.5)
    peaks = fodf_peaks(compute_fodf(dwi, mask=strong))
    reference = Tractogram.load(folder / "csd_det_compressed.trk")
    s, _ = resample_step(reference.streamlines, 1.0, reference.affine)
    a, b = np.delete(s.points, s.offsets[1:] - 1, 0), np.delete(s.points, s.offsets[:-1], 0)
    at, way = tuple(np.rint((a + b) / 2).astype(int).T), (b - a) / np.linalg.norm(b - a, axis=1, keepdims=True)
    known = peaks.data[at].any(-1)
    candidates, way = peaks.data[at][known].reshape(-1, 3, 3), way[known]

    def agreement(flip):
        return np.abs((candidates * flip * way[:, None]).sum(-1)).max(1).mean()

    right = agreement([1, 1, 1])
    assert known.sum() > 10_000 and right > 0.95
    assert all(agreement(flip) < right - 0.15 for flip in ([-1, 1, 1], [1, -1, 1], [1, 1, -1]))
    # the corpus callosum: the largest connected body of left-right fibres reaches far into both hemispheres
    body, n = label(np.abs(peaks.data[..., 0]) > 0.8)
    x, y, _ = np.argwhere(body == np.bincount(body.ravel())[1:].argmax() + 1).T
    assert n > 1 and len(x) > 200 and x.min() < 31 and x.max() > 41 and 50 < 3 * np.ptp(y) < 100  # mm, front to back


@pytest.mark.real
def test_real_mask_of_another_shape(real_data, tmp_path):
    folder = real_data / "real_dwi_3mm"
    nib.save(
        nib.Nifti1Image(np.ones((70, 72, 36), np.uint8), nib.load(folder / "mask.nii.gz").affine), tmp_path / "m.nii.gz"
    )
    with pytest.raises(DataError, match="m.nii.gz"):
        load_dwi(folder / "dwi.nii.gz", folder / "dwi.bval", folder / "dwi.bvec", tmp_path / "m.nii.gz")


def test_sidecars_are_plain_json(tmp_path, series):
    write(tmp_path, series)
    prepare_subject(tmp_path, fodf=False)
    said = json.loads((tmp_path / "sh.json").read_text())
    assert (
        said["basis"] == "descoteaux07"
        and said["legacy"] is True
        and said["sh_order"] == 6
        and said["kind"] == "signal"
    )
