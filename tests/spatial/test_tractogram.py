"""Tractogram files against nibabel, DIPY and trx-python, on rotated, flipped and anisotropic grids."""

import pickle
import sys
import warnings
import zipfile

import nibabel as nib
import numpy as np
import pytest
import trx.trx_file_memmap as tmm
from dipy.data import get_fnames
from dipy.io.stateful_tractogram import Origin, Space, StatefulTractogram
from dipy.io.streamline import load_tractogram, save_tractogram

from tractkit.core.files import DataError
from tractkit.spatial.rearrange import split
from tractkit.spatial.resample import compress, resample_step
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram, concatenate_tractograms

GRIDS = {
    "2 mm RAS": np.array([[2.0, 0, 0, -80], [0, 2, 0, -120], [0, 0, 2, -60], [0, 0, 0, 1]]),
    "LAS": np.array([[-3.0, 0, 0, 106.5], [0, 3, 0, -106.5], [0, 0, 3, -52.5], [0, 0, 0, 1]]),
    "anisotropic": np.array([[1.0, 0, 0, 5], [0, 1.5, 0, -9], [0, 0, 4, 2], [0, 0, 0, 1]]),
    "permuted": np.array([[0, 0, 2.0, -30], [-1.5, 0, 0, 44], [0, 3, 0, -7], [0, 0, 0, 1]]),
    "oblique": np.array([[-1.6, 0.3, 0, 70], [0.3, 1.6, -0.4, -90], [0, 0.4, 2.9, -30], [0, 0, 0, 1]]),
}
KINDS = ["trk", "tck", "trx"]
pytestmark = pytest.mark.filterwarnings("error::UserWarning")


@pytest.fixture(params=GRIDS, ids=list(GRIDS))
def affine(request):
    return GRIDS[request.param]


def make(affine, counts=(5, 1, 9, 30), bare=False, **kwargs):
    rng = np.random.default_rng(len(counts))
    s = Streamlines.from_list([rng.uniform([0, 0, 0], [39, 44, 29], (k, 3)) for k in counts])
    if not bare:
        kwargs = {"dps": {"bundle": np.arange(len(s)), "ends": rng.random((len(s), 2)).astype("f4")},
                  "dpp": {"fa": rng.random(len(s.points)).astype("f4"),
                          "peak": rng.random((len(s.points), 3)).astype("f4")},
                  "groups": {"CST_L": [0, 3], "none": []}} | kwargs
    return Tractogram(s, affine, (40, 45, 30), **kwargs)


def same(a, b, atol=2e-5, data=True, groups=True):
    np.testing.assert_array_equal(a.streamlines.offsets, b.streamlines.offsets)
    np.testing.assert_allclose(a.streamlines.points, b.streamlines.points, atol=atol)
    np.testing.assert_allclose(a.affine, b.affine, atol=1e-5)
    assert a.dimensions == b.dimensions
    for what in ("dps", "dpp") * data + ("groups",) * groups:
        x, y = getattr(a, what), getattr(b, what)
        assert x.keys() == y.keys()
        for k in x:
            np.testing.assert_array_equal(x[k], y[k])


def nibabel_tractogram(t):
    r = t.rasmm()
    return nib.streamlines.Tractogram(
        r.to_list(), affine_to_rasmm=np.eye(4), data_per_streamline=dict(t.dps),
        data_per_point={k: [v[a:b] for a, b in zip(r.offsets[:-1], r.offsets[1:], strict=True)]
                        for k, v in t.dpp.items()})


# ---- files against other programs


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(tmp_path, affine, kind):
    t, path = make(affine), tmp_path / f"a.{kind}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if kind != "trx" else "error")
        t.save(path)
    back = Tractogram.load(path, reference=t)
    same(t, back, data=kind != "tck", groups=kind == "trx")
    assert list(tmp_path.iterdir()) == [path]


def test_read_trk_of_nibabel(tmp_path, affine):
    t, path = make(affine, groups={}), tmp_path / "a.trk"
    sft = t.to_sft()
    header = nib.streamlines.TrkFile.create_empty_header()
    header |= {"voxel_to_rasmm": affine, "dimensions": t.dimensions, "voxel_sizes": t.voxel_sizes,
               "voxel_order": sft.voxel_order}
    nib.streamlines.save(nib.streamlines.TrkFile(nibabel_tractogram(t), header), path)
    same(t, Tractogram.load(path))


def test_nibabel_reads_our_trk(tmp_path, affine):
    t, path = make(affine, groups={}), tmp_path / "a.trk"
    t.save(path)
    theirs = nib.streamlines.load(path)
    np.testing.assert_allclose(theirs.streamlines.get_data(), t.rasmm().points, atol=1e-4)
    assert [len(p) for p in theirs.streamlines] == t.streamlines.nb_points.tolist()
    assert tuple(theirs.header["dimensions"]) == t.dimensions and int(theirs.header["nb_streamlines"]) == len(t)
    np.testing.assert_allclose(theirs.header["voxel_sizes"], t.voxel_sizes, rtol=1e-6)
    for k, v in t.dps.items():
        np.testing.assert_array_equal(theirs.tractogram.data_per_streamline[k], v)
    for k, v in t.dpp.items():
        np.testing.assert_array_equal(theirs.tractogram.data_per_point[k].get_data(), v)


@pytest.mark.parametrize("kind", KINDS)
def test_dipy_reads_ours_and_we_read_dipys(tmp_path, affine, kind):
    t = make(affine, bare=True)
    t.save(tmp_path / f"ours.{kind}")
    reference = nib.Nifti1Image(np.zeros(t.dimensions, np.uint8), affine)
    sft = load_tractogram(str(tmp_path / f"ours.{kind}"), reference, bbox_valid_check=False, to_space=Space.VOX)
    np.testing.assert_allclose(sft.streamlines.get_data(), t.streamlines.points, atol=1e-4)
    save_tractogram(sft, str(tmp_path / f"theirs.{kind}"), bbox_valid_check=False)
    same(t, Tractogram.load(tmp_path / f"theirs.{kind}", reference=reference), atol=1e-4)


def test_trx_python(tmp_path, affine):
    t = make(affine)
    t.save(tmp_path / "ours.trx")
    theirs = tmm.load(str(tmp_path / "ours.trx"))
    np.testing.assert_allclose(theirs.streamlines._data, t.rasmm().points)
    np.testing.assert_array_equal(theirs.groups["CST_L"], [0, 3])
    np.testing.assert_array_equal(theirs.data_per_streamline["ends"], t.dps["ends"])
    np.testing.assert_array_equal(theirs.data_per_vertex["peak"]._data, t.dpp["peak"])
    assert theirs.data_per_streamline["bundle"].dtype == np.int64
    for name, compression in (("stored", zipfile.ZIP_STORED), ("small", zipfile.ZIP_DEFLATED)):
        tmm.save(theirs, str(tmp_path / f"{name}.trx"), compression)
        same(t, Tractogram.load(tmp_path / f"{name}.trx"))
    with zipfile.ZipFile(tmp_path / "ours.trx") as z:
        z.extractall(tmp_path / "folder.trx")
    same(t, Tractogram.load(tmp_path / "folder.trx"))


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_trx_of_other_types(tmp_path, dtype):
    t = make(GRIDS["2 mm RAS"], bare=True)
    positions = t.rasmm().points.astype(dtype)
    with zipfile.ZipFile(tmp_path / "a.trx", "w") as z:
        z.writestr("header.json", '{"DIMENSIONS": [40, 45, 30], "NB_VERTICES": 45, "NB_STREAMLINES": 4, '
                                  f'"VOXEL_TO_RASMM": {t.affine.tolist()}}}')
        z.writestr(f"positions.3.{np.dtype(dtype).name}", positions.tobytes())
        z.writestr("offsets.uint32", t.streamlines.offsets[:-1].astype("u4").tobytes())  # without the last
        z.writestr("dps/keep.bit", np.array([1, 0, 1, 1], bool).tobytes())
        z.writestr("dpg/CST/color.3.uint8", bytes(3))
    with pytest.warns(UserWarning, match="data per group is not read: color"):
        back = Tractogram.load(tmp_path / "a.trx")
    expected = np.linalg.inv(t.affine)[:3] @ np.c_[positions.astype(float), np.ones(45)].T
    np.testing.assert_allclose(back.streamlines.points, expected.T, atol=1e-5)
    assert back.streamlines.points.dtype == np.float32
    assert back.dps["keep"].dtype == bool and back.dps["keep"].ravel().tolist() == [True, False, True, True]


def test_big_endian_trk(tmp_path):
    t = make(GRIDS["LAS"], groups={})
    t.save(tmp_path / "a.trk")
    raw = (tmp_path / "a.trk").read_bytes()
    header = np.frombuffer(raw[:1000], nib.streamlines.trk.header_2_dtype)
    swapped = header.astype(header.dtype.newbyteorder(">")).tobytes()
    (tmp_path / "b.trk").write_bytes(swapped + np.frombuffer(raw[1000:], "<i4").astype(">i4").tobytes())
    same(t, Tractogram.load(tmp_path / "b.trk"))


def test_trk_axes_need_not_follow_the_affine(tmp_path):
    """The voxel order of a .trk header may turn the stored axes against the affine; nibabel is the oracle."""
    t, path = make(GRIDS["2 mm RAS"], bare=True), tmp_path / "a.trk"
    t.save(path)
    raw = bytearray(path.read_bytes())
    header = np.frombuffer(raw, nib.streamlines.trk.header_2_dtype, count=1)
    header["voxel_order"] = b"LPS"
    path.write_bytes(raw)
    back = Tractogram.load(path)
    np.testing.assert_allclose(back.rasmm().points, nib.streamlines.load(path).streamlines.get_data(), atol=1e-4)
    assert np.abs(back.streamlines.points - t.streamlines.points).max() > 1


def test_trk_without_count_and_with_more_than_counted(tmp_path):
    t = make(GRIDS["LAS"], groups={})
    t.save(tmp_path / "a.trk")
    raw = bytearray((tmp_path / "a.trk").read_bytes())
    header = np.frombuffer(raw, nib.streamlines.trk.header_2_dtype, count=1)
    header["nb_streamlines"] = 0  # TrackVis: unknown, read to the end
    (tmp_path / "a.trk").write_bytes(raw)
    same(t, Tractogram.load(tmp_path / "a.trk"))
    header["nb_streamlines"] = 2
    (tmp_path / "a.trk").write_bytes(raw)
    with pytest.warns(UserWarning, match="counts 2 streamlines but more data"):
        assert len(Tractogram.load(tmp_path / "a.trk")) == 2


def test_unnamed_columns(tmp_path):
    t = make(GRIDS["LAS"], groups={})
    t.save(tmp_path / "a.trk")
    raw = bytearray((tmp_path / "a.trk").read_bytes())
    header = np.frombuffer(raw, nib.streamlines.trk.header_2_dtype, count=1)
    header["scalar_name"] = b""
    header["property_name"][0, 1] = b""
    (tmp_path / "a.trk").write_bytes(raw)
    back, theirs = Tractogram.load(tmp_path / "a.trk"), nib.streamlines.load(tmp_path / "a.trk").tractogram
    assert set(back.dps) == {"bundle", "properties"} == set(theirs.data_per_streamline)
    np.testing.assert_array_equal(back.dps["properties"], t.dps["ends"])
    np.testing.assert_array_equal(back.dpp["scalars"], theirs.data_per_point["scalars"].get_data())


# ---- little and odd


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [(), (0,), (0, 0, 0), (1,), (0, 5, 0), (2, 0, 1)])
def test_empty_and_short(tmp_path, kind, counts):
    t = make(GRIDS["oblique"], counts, bare=True)
    if kind != "tck":
        t = make(GRIDS["oblique"], counts, groups={})
    t.save(tmp_path / f"a.{kind}")
    same(t, Tractogram.load(tmp_path / f"a.{kind}", reference=t))
    same(t, Tractogram.from_sft(t.to_sft()), atol=1e-4) if counts else None
    assert t.inside().all() and "streamlines" in repr(t)


def test_equal_tractograms_make_equal_files(tmp_path):
    for kind in KINDS:
        t = make(GRIDS["LAS"], bare=True)
        t.save(tmp_path / f"a.{kind}")
        t.save(tmp_path / f"b.{kind}")
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_points_outside_are_kept_and_reported(tmp_path):
    points = np.array([[0, 0, 0], [-0.5, 44.5, 29.5], [39.5, 0, 0], [39.6, 0, 0], [0, -0.6, 0], [0, 0, 99]])
    t = Tractogram(Streamlines(points, [0, 1, 2, 3, 4, 5, 6]), GRIDS["oblique"], (40, 45, 30))
    for kind in KINDS:
        t.save(tmp_path / f"a.{kind}")
        back = Tractogram.load(tmp_path / f"a.{kind}", reference=t)
        assert back.inside().tolist() == [True, True, True, False, False, False]
    assert "outside the grid: 3 streamlines" in repr(t)
    within = t[[0, 3, 4, 5]]  # DIPY counts the border itself as outside
    sft = within.to_sft()
    sft.remove_invalid_streamlines()
    assert len(sft) == within.inside().sum() == 1


def test_packaged_file_of_dipy():
    path = get_fnames(name="fornix")
    t = Tractogram.load(path)
    theirs = nib.streamlines.load(path)
    np.testing.assert_allclose(t.rasmm().points, theirs.streamlines.get_data(), atol=1e-4)
    assert len(t) == 300 and t.dimensions == (50, 50, 50) and not t.inside().any()


# ---- references


def test_reference_of_every_kind(tmp_path):
    t = make(GRIDS["oblique"], bare=True)
    image = nib.Nifti1Image(np.zeros((*t.dimensions, 7), np.uint8), t.affine)
    nib.save(image, tmp_path / "grid.nii.gz")
    for kind in KINDS:
        t.save(tmp_path / f"a.{kind}")

    class Box:
        affine, shape3d = t.affine, t.dimensions

    for reference in (t, image, Box(), (t.affine, t.dimensions), str(tmp_path / "grid.nii.gz"),
                      tmp_path / "a.trk", tmp_path / "a.trx", t.to_sft()):
        same(t, Tractogram.load(tmp_path / "a.tck", reference=reference))
    with pytest.raises(TypeError, match="ndarray has no affine"):
        Tractogram.load(tmp_path / "a.tck", reference=t.affine)
    with pytest.raises(DataError, match="a.tck: a .tck does not know its grid"):
        Tractogram.load(tmp_path / "a.tck")
    with pytest.raises(DataError, match="nope.nii: the reference does not exist"):
        Tractogram.load(tmp_path / "a.tck", reference=tmp_path / "nope.nii")


@pytest.mark.parametrize("kind", ["trk", "trx"])
def test_reference_must_agree(tmp_path, kind):
    t = make(GRIDS["oblique"], bare=True)
    t.save(tmp_path / f"a.{kind}")
    moved = t.affine + np.eye(4)[:, 3:] @ [[0, 0, 0, 0]]
    moved[0, 3] += 1
    for other in ((moved, t.dimensions), (t.affine, (40, 45, 31))):
        with pytest.raises(DataError, match="is not the reference's"):
            Tractogram.load(tmp_path / f"a.{kind}", reference=other)


@pytest.mark.parametrize("kind", ["trk", "trx"])
def test_header_without_a_grid(tmp_path, kind):
    """Dimensions 1×1×1 and an identity affine are what writers leave who do not know the grid."""
    t = make(GRIDS["oblique"], bare=True)
    Tractogram(t.rasmm(), np.eye(4), (1, 1, 1)).save(tmp_path / f"a.{kind}")
    alone = Tractogram.load(tmp_path / f"a.{kind}")
    assert alone.dimensions == (1, 1, 1) and not alone.inside().any()
    same(t, Tractogram.load(tmp_path / f"a.{kind}", reference=t), atol=1e-4)


# ---- bad files


@pytest.mark.parametrize("kind", KINDS)
def test_cut_anywhere(tmp_path, kind):
    """No prefix of a file is taken for a whole one, also where it ends between two streamlines."""
    t = make(GRIDS["LAS"], bare=True)
    t.save(tmp_path / f"a.{kind}")
    raw = (tmp_path / f"a.{kind}").read_bytes()
    borders = [k for k in (1000, 1064, 1080) if k < len(raw)]  # of the first streamlines in a .trk
    for k in [0, 1, 10, *range(30, len(raw), 31), *borders, len(raw) - 12, len(raw) - 1]:
        (tmp_path / f"a.{kind}").write_bytes(raw[:k])
        with pytest.raises(DataError, match=f"a.{kind}"):
            Tractogram.load(tmp_path / f"a.{kind}", reference=t)


@pytest.mark.parametrize("kind", KINDS)
def test_not_a_tractogram(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    with pytest.raises(DataError, match="no such file"):
        Tractogram.load(path)
    for content in (b"", b"hello" * 1000, bytes(5000)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"a.{kind}"):
            Tractogram.load(path, reference=(np.eye(4), (2, 2, 2)))
    for name in ("a.ply", "a", "a.trk.gz"):
        with pytest.raises(DataError, match=".trk, .tck, .trx"):
            Tractogram.load(tmp_path / name)
        with pytest.raises(DataError, match=".trk, .tck, .trx"):
            make(np.eye(4)).save(tmp_path / name)


def test_flipped_bits_of_trx(tmp_path):
    make(GRIDS["LAS"]).save(tmp_path / "a.trx")
    raw = bytearray((tmp_path / "a.trx").read_bytes())
    raw[raw.index(b"positions") + 60] ^= 1
    (tmp_path / "a.trx").write_bytes(raw)
    with pytest.raises(DataError, match="CRC"):
        Tractogram.load(tmp_path / "a.trx")


def test_nan_names_the_file(tmp_path):
    t = make(GRIDS["LAS"], bare=True)
    t.save(tmp_path / "a.trk")
    raw = bytearray((tmp_path / "a.trk").read_bytes())
    raw[1004:1008] = np.float32(np.nan).tobytes()
    (tmp_path / "a.trk").write_bytes(raw)
    with pytest.raises(DataError, match="a.trk: 1 of 45 points are NaN"):
        Tractogram.load(tmp_path / "a.trk")


def test_wrong_count_of_tck(tmp_path):
    t = make(GRIDS["LAS"], bare=True)
    t.save(tmp_path / "a.tck")
    raw = (tmp_path / "a.tck").read_bytes()
    (tmp_path / "a.tck").write_bytes(raw.replace(b"count: 0000000004", b"count: 0000000005"))
    with pytest.raises(DataError, match="counts 0000000005 streamlines, the file holds 4"):
        Tractogram.load(tmp_path / "a.tck", reference=t)


def test_tck_that_ends_inside_a_streamline(tmp_path):
    t = make(GRIDS["LAS"], bare=True)
    t.save(tmp_path / "a.tck")
    raw = (tmp_path / "a.tck").read_bytes()
    (tmp_path / "a.tck").write_bytes(raw[:-24].replace(b"0000000004", b"0000000003") + raw[-12:])
    with pytest.raises(DataError, match="truncated"):
        Tractogram.load(tmp_path / "a.tck", reference=t)


# ---- saving what a format cannot hold


def test_names_that_do_not_fit(tmp_path):
    s = make(GRIDS["LAS"], bare=True)

    def with_dps(name, width=1):
        return Tractogram(s.streamlines, s.affine, s.dimensions, dps={name: np.ones((4, width), "f4")})

    for name, width in (("a" * 20, 1), ("a" * 18, 2), ("a" * 17, 10)):
        with_dps(name, width).save(tmp_path / "ok.trk")
        assert list(Tractogram.load(tmp_path / "ok.trk").dps) == [name]
        with pytest.raises(DataError, match=f"bad.trk: .*at most {len(name)} latin"):
            with_dps(name + "a", width).save(tmp_path / "bad.trk")
    with pytest.raises(DataError, match="latin"):
        with_dps("λ").save(tmp_path / "bad.trk")
    with pytest.raises(DataError, match="holds 10 dpp but there are 11"):
        Tractogram(s.streamlines, s.affine, s.dimensions,
                   dpp={str(k): np.zeros(45) for k in range(11)}).save(tmp_path / "bad.trk")
    for name in ("a.b", "a/b", ""):
        with pytest.raises(DataError, match="bad.trx: .*file name"):
            with_dps(name).save(tmp_path / "bad.trx")
    assert not list(tmp_path.glob("*bad*"))


def test_what_is_left_out_is_said(tmp_path):
    t = make(GRIDS["LAS"])
    with pytest.warns(UserWarning, match=r"a.trk: .trk cannot hold groups, left out: CST_L, none"):
        t.save(tmp_path / "a.trk")
    with pytest.warns(UserWarning) as said:
        t.save(tmp_path / "a.tck")
    assert [str(w.message).split("out: ")[1].split(".")[0] for w in said] == ["bundle, ends", "fa, peak", "CST_L, none"]
    with pytest.warns(UserWarning, match="cannot hold groups"):
        t.to_sft()
    big = Tractogram(t.streamlines, t.affine, t.dimensions, dps={"id": np.array([0, 1, 2, 2**24 + 1])})
    with pytest.warns(UserWarning, match="'id': whole numbers over 2"):
        big.save(tmp_path / "a.trk")
    big.save(tmp_path / "a.trx")
    assert Tractogram.load(tmp_path / "a.trx").dps["id"][3, 0] == 2**24 + 1


@pytest.mark.parametrize("kind", KINDS)
def test_save_cut_short_leaves_the_old_file(tmp_path, kind, monkeypatch):
    t, path = make(GRIDS["LAS"], bare=True), tmp_path / f"a.{kind}"
    t.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        t[:2].save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_failed_save_leaves_the_old_file(tmp_path):
    t = make(GRIDS["LAS"], bare=True)
    t.save(tmp_path / "a.trk")
    before = (tmp_path / "a.trk").read_bytes()
    with pytest.raises(DataError):
        Tractogram(t.streamlines, t.affine, t.dimensions, dps={"x" * 30: np.ones(4)}).save(tmp_path / "a.trk")
    assert (tmp_path / "a.trk").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# ---- DIPY


@pytest.mark.parametrize("space", list(Space))
@pytest.mark.parametrize("origin", list(Origin))
def test_sft_in_any_state(affine, space, origin):
    t = make(affine, groups={})
    sft = t.to_sft()
    assert sft.space == Space.RASMM and sft.origin == Origin.NIFTI
    sft.to_space(space)
    sft.to_origin(origin)
    before = sft.streamlines.get_data().copy()
    same(t, Tractogram.from_sft(sft), atol=1e-4)
    assert sft.space == space and np.array_equal(sft.streamlines.get_data(), before)
    part = Tractogram.from_sft(sft[[3, 0]])
    same(part, t[[3, 0]], atol=1e-4)


def test_to_sft_does_not_share_memory():
    t = make(GRIDS["LAS"], groups={})
    before = t.streamlines.points.copy(), t.dpp["fa"].copy()
    sft = t.to_sft()
    sft.to_vox()
    sft.data_per_point["fa"]._data += 1
    sft.data_per_streamline["ends"] += 1
    np.testing.assert_array_equal(t.streamlines.points, before[0])
    np.testing.assert_array_equal(t.dpp["fa"], before[1])
    same(t, make(GRIDS["LAS"], groups={}))


def test_sft_of_dipy():
    points = [np.random.default_rng(0).uniform(1, 9, (k, 3)) for k in (4, 7)]
    image = nib.Nifti1Image(np.zeros((10, 10, 10), np.uint8), GRIDS["oblique"])
    sft = StatefulTractogram(points, image, Space.VOX, origin=Origin.TRACKVIS)
    t = Tractogram.from_sft(sft)
    np.testing.assert_allclose(t.streamlines.points, np.concatenate(points) - 0.5, atol=1e-5)
    assert t.dimensions == (10, 10, 10)


# ---- the value


def test_construction_is_checked():
    s = make(np.eye(4), bare=True).streamlines
    for kwargs, problem in [
        ({"dps": {"x": np.ones(3)}}, r"dps 'x' must be numbers of shape \(4,\)"),
        ({"dps": {"x": np.ones((4, 2, 2))}}, "dps 'x'"),
        ({"dps": {"x": np.array(list("abcd"))}}, "dps 'x'"),
        ({"dpp": {"x": np.ones(4)}}, r"dpp 'x' must be numbers of shape \(45,\)"),
        ({"groups": {"x": [4]}}, "ids from 4 to 4 but there are 4"),
        ({"groups": {"x": [-1]}}, "ids from -1"),
        ({"groups": {"x": [0.5]}}, "row of streamline ids"),
        ({"groups": {"x": [True] * 4}}, "row of streamline ids"),
        ({"dimensions": (4, 4)}, "dimensions must be"),
        ({"dimensions": (4, 4, 0)}, "dimensions must be"),
        ({"dimensions": (4, 4, 1.5)}, "dimensions must be"),
        ({"affine": np.diag([1.0, 1, 0, 1])}, "affine"),
        ({"affine": np.full((4, 4), np.nan)}, "affine"),
    ]:
        with pytest.raises(DataError, match=problem):
            Tractogram(**{"streamlines": s, "affine": np.eye(4), "dimensions": (4, 4, 4)} | kwargs)


def test_selection_and_operations_carry_data():
    t = make(GRIDS["anisotropic"])
    part = t[[3, 3, 1]]
    assert part.groups["CST_L"].tolist() == [0, 1] and part.dps["bundle"].ravel().tolist() == [3, 3, 1]
    a, b = t.streamlines.offsets[3:5]
    np.testing.assert_array_equal(part.dpp["peak"][:b - a], t.dpp["peak"][a:b])
    assert len(t[2]) == len(t[-2:-1]) == 1 and len(t[t.lengths_mm > 0]) == 3
    cut = t.moved(*split(t.streamlines, np.full(4, 2), np.array([True, False, True, False])))
    assert cut.dps["bundle"].ravel().tolist() == [0, 0, 1, 2, 2, 3] and cut.groups["CST_L"].tolist() == [0, 1, 5]
    even = t.moved(*resample_step(t.streamlines, 0.5, t.affine))
    assert len(even.dpp["peak"]) == len(even.streamlines.points) and even.dpp["fa"].dtype == np.float32
    few = t.moved(*compress(t.streamlines, 1.0, t.affine))
    assert len(few.dpp["fa"]) == len(few.streamlines.points)
    np.testing.assert_allclose(t.lengths_mm, t.rasmm().lengths(), rtol=1e-5)
    copy = pickle.loads(pickle.dumps(t))
    same(copy, t)


def test_concatenate():
    t, u = make(GRIDS["LAS"]), make(GRIDS["LAS"], counts=(2, 3), groups={"CST_L": [1], "FX": [0]})
    both = concatenate_tractograms([t, u])
    assert both.groups["CST_L"].tolist() == [0, 3, 5] and both.groups["FX"].tolist() == [4]
    same(both[:4], Tractogram(t.streamlines, t.affine, t.dimensions, t.dps, t.dpp, {**t.groups, "FX": []}))
    with pytest.raises(ValueError, match="nothing"):
        concatenate_tractograms([])
    with pytest.raises(DataError, match="part 1 is on another grid"):
        concatenate_tractograms([t, make(GRIDS["oblique"])])
    with pytest.raises(DataError, match="part 1 has dps"):
        concatenate_tractograms([t, make(GRIDS["LAS"], bare=True)])


def test_what_dipy_reads(tmp_path):
    t = make(GRIDS["oblique"], bare=True)
    save_tractogram(t.to_sft(), str(tmp_path / "a.dpy"), bbox_valid_check=False)
    back = Tractogram.load(tmp_path / "a.dpy", reference=t)
    assert np.array_equal(back.streamlines.offsets, t.streamlines.offsets) and back.dimensions == t.dimensions
    assert np.allclose(back.streamlines.points, t.streamlines.points, atol=1e-4)
    with pytest.raises(DataError, match="does not know its grid"):
        Tractogram.load(tmp_path / "a.dpy")
    (tmp_path / "b.dpy").write_bytes((tmp_path / "a.dpy").read_bytes()[:900])
    with pytest.raises(DataError, match="b.dpy: cannot be read as .dpy"):
        Tractogram.load(tmp_path / "b.dpy", reference=t)
    with pytest.raises(DataError, match="only read"):
        t.save(tmp_path / "c.dpy")


@pytest.mark.parametrize("kind", ["vtk", "vtp", "fib"])
def test_what_dipy_reads_only_with_vtk(tmp_path, kind):
    t = make(GRIDS["oblique"], bare=True)
    (tmp_path / f"a.{kind}").write_text("# vtk DataFile Version 3.0\n")
    with pytest.raises(DataError, match=f"a.{kind}: DIPY cannot read .{kind} with the packages that are installed"):
        Tractogram.load(tmp_path / f"a.{kind}", reference=t)


def test_html_is_safe_and_short():
    t = make(GRIDS["LAS"], groups={f"<b>{k}": [0] for k in range(40)})
    html = t._repr_html_()
    assert "<b>" not in html and "&lt;b&gt;0 (1)" in html and "and 34 more" in html and len(html) < 3000
    assert "3 × 3 × 3 mm, LAS" in repr(t)


# ---- real files


@pytest.mark.real
@pytest.mark.parametrize("name", ["formats/tract.IFOF_R.trk", "real_dwi_3mm/csd_det_compressed.trk",
                                  "stanford_bundles/hardi-lr-superiorfrontal.trk",
                                  "mni_bundles/Right_Uncinate.trk"])
def test_real_trk(real_data, tmp_path, name):
    theirs = nib.streamlines.load(real_data / name)
    t = Tractogram.load(real_data / name)
    np.testing.assert_allclose(t.rasmm().points, theirs.streamlines.get_data(), atol=1e-3)
    assert t.streamlines.nb_points.tolist() == [len(p) for p in theirs.streamlines]
    for kind in ("trk", "trx"):
        t.save(tmp_path / f"a.{kind}")
        same(t, Tractogram.load(tmp_path / f"a.{kind}"), atol=1e-4)


@pytest.mark.real
def test_real_tck(real_data):
    path = real_data / "formats" / "tract.SLF1_R.tck"
    t = Tractogram.load(path, reference=(np.diag([2.0, 2, 2, 1]), (9, 9, 9)))
    theirs = nib.streamlines.load(path).streamlines
    np.testing.assert_allclose(t.rasmm().points, theirs.get_data(), atol=1e-3)
    assert t.streamlines.nb_points.tolist() == [len(p) for p in theirs]


@pytest.mark.real
@pytest.mark.parametrize(
    "name",
    [
        "human_atlas/bundles.trx",
        "stanford_bundles/sub-01_ses-01_dwi_space-RASMM_model-probCSD_algo-AFQ_tractography.trx",
    ],
)
def test_real_trx(real_data, tmp_path, name):
    theirs = tmm.load(str(real_data / name))
    t = Tractogram.load(real_data / name)
    np.testing.assert_allclose(t.rasmm().points, theirs.streamlines._data.astype("f4"), atol=1e-3)
    assert t.groups.keys() == theirs.groups.keys() and len(t) == len(theirs.streamlines)
    for k, ids in theirs.groups.items():
        np.testing.assert_array_equal(t.groups[k], ids)
    t.save(tmp_path / "a.trx")
    same(t, Tractogram.load(tmp_path / "a.trx"), atol=1e-4)
    group = next(iter(t.groups))
    assert len(t[t.groups[group]]) == len(theirs.groups[group])


def test_reading_opens_nothing_for_writing(tmp_path, monkeypatch):
    """A shared archive may be read-only, also for a root user who would not notice."""
    t = make(GRIDS["LAS"], bare=True)
    modes = []

    def spy(event, args):
        if event == "open" and armed and str(args[0]).startswith(str(tmp_path)):
            modes.append(args[1] or "r" if args[2] is None else args[2] & 3)

    armed = False
    sys.addaudithook(spy)
    for kind in KINDS:
        t.save(tmp_path / f"a.{kind}")
    armed = True
    for kind in KINDS:
        Tractogram.load(tmp_path / f"a.{kind}", reference=t)
    armed = False
    assert modes and not any(m in (1, 2) or (isinstance(m, str) and set(m) & set("wa+x")) for m in modes)
