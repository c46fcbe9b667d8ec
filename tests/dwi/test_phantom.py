"""The phantom: its signal against DIPY, its truth against the scores, its files against interruptions."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from dipy.sims.voxel import multi_tensor
from scipy.ndimage import binary_dilation

from tractkit.core.files import DataError
from tractkit.dwi import anatomy as geometry
from tractkit.dwi import phantom, simulate
from tractkit.dwi.anatomy import BUNDLES, LAYOUTS, Layout, PhantomSettings
from tractkit.dwi.phantom import make_phantom, sample_subjects
from tractkit.dwi.simulate import simulate_subject
from tractkit.evaluation.scoring import GroundTruth, score_tractogram
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume

STANDARD = PhantomSettings()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom")
    make_phantom(root, 2, progress=False)
    return root


@pytest.fixture(scope="module")
def subject():
    return simulate_subject("sub-01", STANDARD)


def same(a, b):
    return (np.array_equal(a.dwi.data, b.dwi.data) and np.array_equal(a.dwi.affine, b.dwi.affine)
            and all(np.array_equal(a.bundles[k].streamlines.points, b.bundles[k].streamlines.points) for k in BUNDLES))


def every_file(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# what it is made of -----------------------------------------------------------------------------------------------

def test_a_subject_is_a_function_of_settings_and_name(subject, root):
    assert same(subject, simulate_subject("sub-01", PhantomSettings()))
    for other in (simulate_subject("sub-02", STANDARD), simulate_subject("sub-01", PhantomSettings(seed=1))):
        assert not np.array_equal(subject.dwi.affine, other.dwi.affine)
        assert not np.array_equal(subject.wm_mask.data, other.wm_mask.data)
    assert np.array_equal(Volume.load(root / "sub-01" / "dwi.nii.gz").data, subject.dwi.data)


def test_other_settings_keep_the_anatomy(subject):
    other = simulate_subject("sub-01", PhantomSettings(snr=10, bval=1000, n_directions=20))
    assert np.array_equal(other.wm_mask.data, subject.wm_mask.data)
    assert other.dwi.nb_features == 22 and set(other.bvals) == {0, 1000}


def test_signal_is_multi_tensors(subject):
    anatomy, gtab = geometry.anatomy_of("sub-01", STANDARD), simulate.gradients_of(STANDARD)
    depth = np.full(np.prod(STANDARD.shape), 20.0)
    fast = simulate._clean_signal(anatomy, depth, gtab)
    pieces = anatomy.pieces.tocsr()
    for voxel in np.argsort(-np.diff(pieces.indptr))[[0, 5, 50, 500, 1500, 3000, -1]]:
        parts = pieces[[voxel]].toarray()[0]
        used = parts > 0
        parts = parts[used] * 0.9 / max(1, parts.sum())
        fractions = 100 * np.r_[parts, 0.05, 0.95 - parts.sum()]
        tensors = np.array([simulate._FIBRE] * used.sum() + [simulate._WATER, simulate._TISSUE])
        slow, _ = multi_tensor(gtab, tensors, S0=1000, snr=None, fractions=fractions,
                               angles=[*anatomy.angles[used], (0, 0), (0, 0)])
        np.testing.assert_allclose(fast[voxel], slow, rtol=1e-10)


def test_directions_are_rounded_to_within_two_degrees():
    v = np.random.default_rng(0).normal(size=(5000, 3))
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    v = v[np.abs(v[:, 2]) < 0.8]  # bundles lie in the slab; close to the pole azimuths crowd
    for sign in (1, -1):
        theta, phi = np.radians(np.divmod(geometry._rounded(sign * v), 180))
        back = np.stack([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)], 1)
        assert np.degrees(np.arccos(np.minimum(np.abs((back * v).sum(1)), 1))).max() < 1.5


def test_noise_is_rician_at_the_snr_asked_for():
    quiet, loud = (simulate_subject("sub-03", replace(STANDARD, snr=snr)) for snr in (None, 20))
    brain = quiet.mask.data > 0
    assert (quiet.dwi.data[~brain] == 0).all() and (quiet.dwi.data[brain][:, quiet.bvals == 0] == 1000).all()
    b0 = loud.dwi.data[brain][:, loud.bvals == 0]
    assert abs(b0.std() - 50) < 1 and abs(b0.mean() - 1000 - 50**2 / 2000) < 1
    air = loud.dwi.data[~brain]
    assert abs(air.mean() - 50 * np.sqrt(np.pi / 2)) < 0.5  # Rayleigh
    assert abs(np.corrcoef((loud.dwi.data - quiet.dwi.data)[brain][:, :8].T)[0, 1:]).max() < 0.05


def test_gradients_are_spread_and_volumes_ordered():
    gtab = simulate.gradients_of(STANDARD)
    assert np.flatnonzero(gtab.bvals == 0).tolist() == [0, 17]
    v = gtab.bvecs[gtab.bvals > 0]
    np.testing.assert_allclose(np.linalg.norm(v, axis=1), 1)
    nearest = np.sort(np.abs(v @ v.T), axis=1)[:, -2]
    assert np.degrees(np.arccos(nearest)).min() > 15
    from dipy.core.sphere import Sphere
    from dipy.reconst.shm import real_sh_descoteaux
    s = Sphere(xyz=v)
    assert np.linalg.cond(real_sh_descoteaux(6, s.theta, s.phi)[0]) < 3


def test_crossings_and_kisses(subject):
    masks = {b: v.data > 0 for b, v in subject.bundle_masks.items()}
    for pair in (("beam", "kiss_left"), ("beam", "kiss_right"), ("beam", "arch"), ("beam", "bend"), ("fan", "arch"),
                 ("fan", "kiss_left"), ("arch", "oblique"), ("kiss_left", "oblique")):
        assert (masks[pair[0]] & masks[pair[1]]).sum() >= 30, pair
    assert 5 <= (masks["kiss_left"] & masks["kiss_right"]).sum() < 30
    assert np.array_equal(np.any(list(masks.values()), axis=0), subject.wm_mask.data > 0)
    fan = subject.bundles["fan"].streamlines
    first, last = fan.points[fan.offsets[:-1]], fan.points[fan.offsets[1:] - 1]
    assert np.linalg.norm(last.std(0)[:2]) > 1.6 * np.linalg.norm(first.std(0)[:2])


# the truth passes its own test ------------------------------------------------------------------------------------

def assert_true(subject):
    ends = np.array([[e.data > 0 for e in pair] for pair in subject.bundle_ends.values()])
    wide = binary_dilation(ends, np.ones((1, 1, 3, 3, 3)))
    assert wide.sum(axis=(0, 1)).max() == 1, "end regions meet"
    truth = GroundTruth(subject.wm_mask.affine, BUNDLES, np.array([v.data > 0 for v in subject.bundle_masks.values()]),
                        ends, subject.wm_mask.data > 0)
    everything = phantom.concatenate_tractograms(list(subject.bundles.values()))
    scores = score_tractogram(everything, truth)
    assert scores.share("valid") >= 0.99 and scores.bundles_found == 7
    assert everything.inside().all()
    assert 20 < everything.lengths_mm.min() and everything.lengths_mm.max() < 120
    steps = np.linalg.norm(np.diff(everything.streamlines[0], axis=0) * everything.voxel_sizes, axis=1)
    np.testing.assert_allclose(steps, 1, atol=0.02)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_truth_scores(layout):
    assert_true(simulate_subject("sub-01", PhantomSettings(layout=layout, snr=None)))


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
def test_truth_scores_in_many_subjects(layout):
    for k in range(12):
        assert_true(simulate_subject(f"sub-{k:02}", PhantomSettings(seed=5, layout=layout, snr=None)))


def test_other_grids():
    assert_true(simulate_subject("sub-01", PhantomSettings(shape=(48, 50, 9), voxel_size=(2, 2, 3), snr=None)))
    with pytest.raises(ValueError, match="use smaller voxels"):
        simulate_subject("sub-01", PhantomSettings(shape=(24, 24, 6), voxel_size=4))
    with pytest.raises(ValueError, match="leaves the grid"):
        simulate_subject("sub-01", PhantomSettings(layout=Layout("far", shift=(12, 0, 0))))


def test_layouts_do_what_they_say():
    def middle(layout):
        points = geometry.own_points("sub-01", PhantomSettings(layout=layout), 0)
        return np.concatenate(list(points.values()))

    here = middle("standard")
    np.testing.assert_allclose(middle("shifted") - here, np.broadcast_to([6, -6, 0], here.shape), atol=1e-9)
    turned = middle("rotated")
    angle = np.degrees(np.arctan2(turned[:, 1], turned[:, 0]) - np.arctan2(here[:, 1], here[:, 0])) % 360
    np.testing.assert_allclose(angle, 15, atol=1e-6)
    # the mirror image, turned by the subject's own small angle (the same in both)
    assert np.linalg.norm(middle("mirrored") - here * [-1, 1, 1], axis=1).max() < 2 * np.radians(4) * 45 + 1e-9


@pytest.mark.parametrize(
    "wrong",
    [
        {"snr": 0},
        {"bval": 0},
        {"n_directions": 5},
        {"n_streamlines": 0},
        {"voxel_size": 0},
        {"shape": (48, 48)},
        {"shape": (48, 48, 2)},
        {"layout": "sideways"},
    ],
)
def test_wrong_settings(wrong):
    with pytest.raises(ValueError):
        PhantomSettings(**wrong)


# on disk ----------------------------------------------------------------------------------------------------------

def test_files(root):
    folder = root / "sub-02"
    dwi = Volume.load(folder / "dwi.nii.gz")
    assert dwi.data.shape == (48, 48, 12, 34) and np.allclose(dwi.voxel_sizes, 2, atol=1e-5)
    assert np.linalg.det(dwi.affine) < 0 and np.abs(dwi.affine[:3, :3]).round(3).astype(bool).sum() == 9  # LAS, oblique
    bvals, bvecs = np.loadtxt(folder / "bvals"), np.loadtxt(folder / "bvecs")
    assert bvals.shape == (34,) and bvecs.shape == (3, 34)
    np.testing.assert_allclose(np.linalg.norm(bvecs, axis=0), bvals > 0, atol=1e-7)
    truth = GroundTruth.load(folder)
    assert set(truth.names) == set(BUNDLES) and truth.masks.any((1, 2, 3)).all() and truth.ends.any((2, 3, 4)).all()
    everything = Tractogram.load(folder / "tractogram.trk", reference=folder / "dwi.nii.gz")
    index = everything.dps["bundle"][:, 0]
    assert np.bincount(index.astype(int)).tolist() == [120] * 7
    for k, name in enumerate(BUNDLES):
        one = Tractogram.load(folder / "bundles" / f"{name}.trk")
        np.testing.assert_allclose(one.streamlines.points, everything[index == k].streamlines.points, atol=1e-4)
    assert score_tractogram(everything, truth).share("valid") >= 0.99
    for mask in ("mask", "wm_mask"):
        dwi.check_same_grid(Volume.load(folder / f"{mask}.nii.gz"))


def test_more_subjects_add_to_those_there(root, tmp_path):
    (tmp_path / "sub-01").mkdir()  # whatever is there stays
    folders = make_phantom(tmp_path, 2, progress=False)
    assert [f.name for f in folders] == ["sub-01", "sub-02"] and not any(folders[0].iterdir())
    assert every_file(folders[1]) == every_file(root / "sub-02")  # to the byte
    assert [f.name for f in make_phantom(tmp_path, 1, progress=False)] == ["sub-01"]


def test_another_phantom_in_the_folder_is_refused(root):
    with pytest.raises(
        DataError, match=r"phantom.json: the folder holds another phantom: bval = 2000, not 1000, seed = 0, not 3"
    ):
        make_phantom(root, 1, 3, bval=1000, progress=False)


def test_a_damaged_json_is_named(tmp_path):
    (tmp_path / "phantom.json").write_text('{"version": 1')
    with pytest.raises(DataError, match="phantom.json: cannot be read"):
        make_phantom(tmp_path, 1, progress=False)
    (tmp_path / "phantom.json").write_text("[1, 2]")
    with pytest.raises(DataError, match="phantom.json"):
        make_phantom(tmp_path, 1, progress=False)


def test_json_has_every_setting(root):
    said = json.loads((root / "phantom.json").read_text())
    assert set(PhantomSettings.__dataclass_fields__) < set(said)
    assert said["layout"] == {"name": "standard", "mirror": False, "rotation": 0, "shift": [0, 0, 0]}
    assert said["bundles"] == list(BUNDLES) and said["version"] == phantom.PHANTOM_VERSION


def test_an_error_leaves_nothing_half_written(tmp_path, monkeypatch, subject):
    def burn(subject, folder):
        (folder / "dwi.nii.gz").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(phantom, "simulate_subject", lambda name, settings: subject)
    monkeypatch.setattr(phantom, "_write_subject", burn)
    with pytest.raises(KeyboardInterrupt):
        make_phantom(tmp_path, 1, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["phantom.json"]


def test_who_comes_second_keeps_the_first_ones_files(tmp_path, monkeypatch, subject):
    def slow(subject, folder):
        (folder / "mine").touch()
        (tmp_path / "sub-01").mkdir()  # meanwhile, another process
        (tmp_path / "sub-01" / "theirs").touch()

    monkeypatch.setattr(phantom, "simulate_subject", lambda name, settings: subject)
    monkeypatch.setattr(phantom, "_write_subject", slow)
    folder, = make_phantom(tmp_path, 1, progress=False)
    assert [p.name for p in folder.iterdir()] == ["theirs"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["phantom.json", "sub-01"]


def test_old_leftovers_are_swept_and_fresh_ones_not(root):
    old, fresh = root / ".sub-07.aa.part", root / ".sub-08.bb.part"
    for p in (old, fresh):
        p.mkdir()
        (p / "dwi.nii.gz").touch()
    hour_ago = time.time() - 4000
    os.utime(old, (hour_ago, hour_ago))
    make_phantom(root, 2, progress=False)
    assert not old.exists() and fresh.exists()


def test_sample_subjects(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACTKIT_CACHE", str(tmp_path))
    made = []

    def write(subject, folder):
        made.append(subject)
        (folder / "dwi.nii.gz").touch()

    monkeypatch.setattr(phantom, "simulate_subject", lambda name, settings: (name, settings))
    monkeypatch.setattr(phantom, "_write_subject", write)
    root = sample_subjects(2, progress=False)
    assert root == sample_subjects(2, progress=False) == sample_subjects(1, snr=20, voxel_size=2, progress=False)
    assert [name for name, _ in made] == ["sub-01", "sub-02"] and root.parent == tmp_path
    others = {root, sample_subjects(1, snr=10, progress=False), sample_subjects(1, seed=1, progress=False),
              sample_subjects(1, layout="mirrored", progress=False)}
    assert len(others) == 4


@pytest.mark.full
def test_processes_make_the_same(root, tmp_path):
    for folder in make_phantom(tmp_path, 2, processes=2, progress=False):
        assert every_file(folder) == every_file(root / folder.name)


@pytest.mark.full
def test_a_kill_leaves_whole_subjects(root, tmp_path):
    code = (f"from tractkit.dwi.phantom import make_phantom; print(1, flush=True); make_phantom({str(tmp_path)!r}, 2, "
            f"progress=False)")
    for wait in (0.5, 1.0, 1.5, 2.0):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as p:
            p.stdout.readline()
            time.sleep(wait)
            p.send_signal(signal.SIGKILL)
        for folder in tmp_path.glob("sub-*"):
            assert every_file(folder) == every_file(root / folder.name)
    make_phantom(tmp_path, 2, progress=False)
    assert every_file(tmp_path / "sub-02") == every_file(root / "sub-02")


@pytest.mark.full
def test_two_processes_at_once(root, tmp_path):
    code = "from tractkit.dwi.phantom import sample_subjects; print(sample_subjects(2, progress=False))"
    env = os.environ | {"TRACTKIT_CACHE": str(tmp_path)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    places = {p.communicate()[0].strip() for p in both}
    assert [p.returncode for p in both] == [0, 0] and len(places) == 1
    made = places.pop()
    assert sorted(os.listdir(made)) == ["phantom.json", "sub-01", "sub-02"]
    for name in ("sub-01", "sub-02"):
        assert every_file(tmp_path / os.path.basename(made) / name) == every_file(root / name)
