"""Volumes: sampling against SciPy and against linear ramps; NIfTI round trips; damaged files."""

import gzip
import pickle
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from test_space import any_affine

from tractkit.core.files import DataError
from tractkit.core.rng import fold, normal, uniform
from tractkit.spatial.space import apply_affine, convert_points
from tractkit.spatial.volume import Volume, neighborhood_vectors


def volume_of(shape, dtype=np.float32, seed=0):
    values = 100 * uniform(fold("values", seed), np.arange(np.prod(shape))).reshape(shape)
    return Volume(values.astype(dtype), np.diag([2, 2.5, 3, 1]))


def points_in(shape, n=300, margin=0.0, seed=0, dtype=np.float32):
    u = uniform(fold("points", seed), np.arange(3 * n), np.float64).reshape(n, 3)
    return (u * (np.array(shape[:3]) - 1 + 2 * margin) - margin).astype(dtype)


def scipy_sample(volume, points, order):
    data = volume.data.reshape(*volume.shape3d, -1).astype(np.float64)
    return np.stack([ndimage.map_coordinates(data[..., c], points.T.astype(np.float64), order=order, mode="nearest")
                     for c in range(data.shape[3])], axis=1)


@given(any_affine(), st.tuples(*[st.integers(2, 9)] * 3), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_exact_on_ramps_of_world_position(affine, shape, seed):
    """A volume that holds its own rasmm coordinates gives the rasmm coordinates of any point inside."""
    centres = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, 3)
    ramp = Volume(apply_affine(affine, centres).reshape(*shape, 3), affine)
    points = points_in(shape, 50, seed=seed)
    world = apply_affine(affine, points)
    np.testing.assert_allclose(ramp.sample(points), world, atol=3e-4)  # float32 values of up to 250 mm
    corner = convert_points(world, affine, source=("rasmm", "center"), target=("vox", "corner"))
    np.testing.assert_allclose(ramp.sample(corner - 0.5), world, atol=5e-4)


@pytest.mark.parametrize("features", [1, 2, 3, 4, 5, 7, 8, 11, 15, 16, 17, 28, 31, 32, 45, 64])
def test_trilinear_is_scipys_for_any_number_of_features(features):
    volume = volume_of((7, 6, 5, features))
    points = points_in(volume.shape3d, margin=2)
    ours = volume.sample(points)
    assert ours.dtype == np.float32 and ours.shape == (300, features) and ours.flags.c_contiguous
    np.testing.assert_allclose(ours, scipy_sample(volume, points, 1), atol=2e-4)
    guarded = np.full((302, features), -7, np.float32)  # vectors overlap: nothing beyond the row is touched
    volume.sample(points, out=guarded[1:-1])
    np.testing.assert_array_equal(guarded[1:-1], ours)
    assert (guarded[[0, -1]] == -7).all()


@pytest.mark.parametrize(
    "dtype, point_type",
    [
        (bool, np.float32),
        (np.int16, np.float32),
        (np.float32, np.float32),
        (np.float32, np.float64),
        (np.float32, np.int64),
    ],
)
def test_number_types(dtype, point_type):
    volume = volume_of((6, 5, 7), dtype)
    assert volume.data.dtype == dtype
    points = points_in(volume.shape3d, margin=1, dtype=point_type)
    np.testing.assert_allclose(volume.sample(points), scipy_sample(volume, points, 1), atol=1e-4)
    np.testing.assert_allclose(volume.sample(points, "nearest"), scipy_sample(volume, points, 0), rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 5, 5, 2), (5, 1, 5, 20), (5, 5, 1, 2), (1, 1, 1, 9), (2, 1, 1, 1)])
def test_thin_volumes(shape):
    volume = volume_of(shape)
    fenced = np.full(3 * volume.data.size, np.nan, np.float32)  # NaN before and behind: 0 * NaN would show
    inner = fenced[volume.data.size:-volume.data.size].reshape(shape)
    inner[:] = volume.data
    volume = Volume(inner, volume.affine)
    assert np.shares_memory(volume.data, fenced)
    points = points_in(shape, margin=1.5)
    for order, how in (1, "trilinear"), (0, "nearest"):
        np.testing.assert_allclose(volume.sample(points, how), scipy_sample(volume, points, order), atol=1e-4)


@pytest.mark.parametrize("how", ["trilinear", "nearest"])
def test_outside(how):
    volume = volume_of((5, 4, 3, 20))
    points = points_in(volume.shape3d, 1000, margin=1.2)
    box = np.array(volume.shape3d) - 0.5
    inside = ((points >= -0.5) & (points <= box)).all(axis=1)
    assert 100 < inside.sum() < 900
    clamped, zeroed = (volume.sample(points, how, outside=o) for o in ("clamp", "zero"))
    np.testing.assert_array_equal(zeroed[inside], clamped[inside])
    assert (zeroed[~inside] == 0).all() and (clamped[~inside] != 0).any(axis=1).all()
    np.testing.assert_array_equal(clamped, volume.sample(np.clip(points, 0, np.array(volume.shape3d) - 1), how))
    np.testing.assert_array_equal(volume.sample(points[inside], how, "error"), clamped[inside])
    first = int(np.flatnonzero(~inside)[0])
    with pytest.raises(DataError, match=f"point {first} of 1000.*outside the box of \\(5, 4, 3\\)"):
        volume.sample(points, how, "error")
    for far in (1e9, -1e9, 3e38):  # beyond any integer
        np.testing.assert_array_equal(volume.sample([[far, 0, 0]], how), volume.sample([[np.sign(far) * 9, 0, 0]], how))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("outside", ["clamp", "zero", "error"])
@pytest.mark.parametrize("how", ["trilinear", "nearest"])
def test_points_that_are_nowhere(bad, outside, how):
    volume = volume_of((5, 4, 3))
    for axis in range(3):
        points = np.ones((40_000, 3), np.float32)
        points[33_333, axis] = bad
        for threads in (1, 2):
            with pytest.raises(DataError, match="point 33333 of 40000.*not finite"):
                volume.sample(points, how, outside, threads=threads)


def test_threads_and_out_change_nothing():
    volume = volume_of((9, 8, 7, 28))
    points = points_in(volume.shape3d, 70_001)
    alone = volume.sample(points)
    out = np.empty_like(alone)
    assert volume.sample(points, threads=3, out=out) is out
    np.testing.assert_array_equal(out, alone)
    np.testing.assert_array_equal(volume.sample(points[::-1], threads=2), alone[::-1])
    assert volume.sample(points[:0]).shape == (0, 28)
    frozen = Volume(volume.data.copy(), volume.affine)
    frozen.data.flags.writeable = False
    np.testing.assert_array_equal(frozen.sample(points[:9]), alone[:9])


def test_memory_beyond_the_output():
    volume = volume_of((9, 8, 7, 4))
    points = points_in(volume.shape3d, 100_000)
    volume.sample(points[:10])
    tracemalloc.start()
    out = volume.sample(points, threads=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.1 * out.nbytes


def test_wrong_arguments():
    volume = volume_of((5, 4, 3, 2))
    points = np.zeros((4, 3), np.float32)
    for kwargs in (
        {"interpolation": "cubic"},
        {"outside": "wrap"},
        {"out": np.empty((4, 3), np.float32)},
        {"out": np.empty((4, 2))},
        {"out": np.empty((2, 4), np.float32).T},
        {"neighborhood": np.zeros(3)},
        {"neighborhood": np.zeros((0, 3))},
    ):
        with pytest.raises(ValueError, match="choose|out is|neighborhood"):
            volume.sample(points, **kwargs)
    for bad in (points[0], points[:, :2], np.zeros((2, 3), complex), [["a", "b", "c"]]):
        with pytest.raises(ValueError, match="points has shape"):
            volume.sample(bad)


@pytest.mark.parametrize("how", ["trilinear", "nearest"])
@pytest.mark.parametrize("kind, radius, count", [("axes", 1, 7), ("axes", 3, 19), ("grid", 1, 27), ("grid", 2, 125)])
def test_neighbourhoods(how, kind, radius, count):
    vectors = neighborhood_vectors(kind, radius, 0.6)
    assert vectors.shape == (count, 3) and vectors.dtype == np.float32
    assert (vectors[0] == 0).all() and len(np.unique(vectors, axis=0)) == count
    np.testing.assert_allclose(vectors.sum(axis=0), 0, atol=1e-5)
    assert np.abs(vectors).max() == pytest.approx(0.6 * radius)
    volume = volume_of((6, 5, 4, 5))
    points = points_in(volume.shape3d, 60, margin=1)
    for outside in ("clamp", "zero"):
        wide = volume.sample(points, how, outside, neighborhood=vectors)
        each = [volume.sample(points + v, how, outside) for v in vectors]
        np.testing.assert_array_equal(wide, np.concatenate(each, axis=1))
    with pytest.raises(DataError, match="point 0 of 1, .* or its neighborhood is outside"):
        volume.sample([[0, 0, 0]], outside="error", neighborhood=vectors * 2)


@pytest.mark.parametrize(
    "args", [("cube", 1, 1.0), ("axes", 0, 1.0), ("grid", 1.5, 1.0), ("grid", 1, 0.0), ("axes", 1, np.nan)]
)
def test_bad_neighbourhoods(args):
    with pytest.raises(ValueError, match="radius a positive integer"):
        neighborhood_vectors(*args)


def test_volume_checks_itself():
    data = np.zeros((3, 4, 5, 2), np.float32)
    volume = Volume(data, np.eye(4), file="a.nii.gz")
    assert volume.data is data and volume.shape3d == (3, 4, 5) and volume.nb_features == 2
    assert Volume(data[..., 0], np.eye(4)).nb_features == 1
    assert Volume(data.astype(np.float64), np.eye(4)).data.dtype == np.float32
    assert Volume(data.astype(">i2"), np.eye(4)).data.dtype == np.dtype("=i2")
    assert Volume(data.T, np.eye(4)).data.flags.c_contiguous
    for bad, says in (
        (data[0, 0], "shape"),
        (data[None], "shape"),
        (data[:0], "shape"),
        (data.astype(complex), "complex"),
    ):
        with pytest.raises(DataError, match=f"a.nii.gz: .*{says}"):
            Volume(bad, np.eye(4), file="a.nii.gz")
    with pytest.raises(DataError, match="a.nii.gz: affine cannot be inverted"):
        Volume(data, np.diag([0, 0, 0, 1]), file="a.nii.gz")
    data[1, 2, 3, 1] = np.nan
    with pytest.raises(DataError, match="a.nii.gz: 1 of 120 values are NaN or infinite, the first at \\(1, 2, 3, 1\\)"):
        volume.check_finite()
    data[1, 2, 3, 1] = 0
    assert volume.check_finite() is volume
    again = pickle.loads(pickle.dumps(volume))
    assert again.file == "a.nii.gz" and (again.data == data).all()


def test_same_grid():
    a = Volume(np.zeros((10, 10, 10), np.float32), np.diag([2, 2, 2, 1]), file="a.nii.gz")
    near, far = a.affine.copy(), a.affine.copy()
    near[0, 3], far[0, 3] = 1e-4, 0.1
    assert a.same_grid(Volume(np.zeros((10, 10, 10, 6)), near))
    for other, says in ((Volume(a.data, far, file="b.nii.gz"), "0.1 mm apart"),
                        (Volume(np.zeros((10, 10, 11)), a.affine, file="b.nii.gz"), "(10, 10, 11)")):
        assert not a.same_grid(other)
        with pytest.raises(DataError) as e:
            a.check_same_grid(other)
        assert "a.nii.gz" in str(e.value) and "b.nii.gz" in str(e.value) and says in str(e.value)
    scale = a.affine.copy()
    scale[2, 2] = 2.01  # same origin, but the far corner is 0.1 mm off
    assert not a.same_grid(Volume(a.data, scale))


@given(any_affine(), st.sampled_from([".nii", ".nii.gz"]), st.sampled_from([np.float32, np.int16, np.uint8, bool]))
@settings(max_examples=15, deadline=None)
def test_round_trip(tmp_path_factory, affine, suffix, dtype):
    path = tmp_path_factory.mktemp("v") / f"v{suffix}"
    volume = Volume(
        (volume_of((4, 3, 5, 2)).data > 50) if dtype is bool else volume_of((4, 3, 5, 2), dtype).data, affine
    )
    assert volume.save(path) == path
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing half-written beside it
    back = Volume.load(path, dtype=dtype)
    np.testing.assert_array_equal(back.data, volume.data)
    assert back.data.dtype == dtype and back.data.flags.c_contiguous and back.file == str(path)
    np.testing.assert_allclose(back.affine, affine, rtol=1e-6, atol=2e-5)  # NIfTI-1: float32
    assert volume.same_grid(back)
    plain = nib.load(path)
    np.testing.assert_array_equal(np.asarray(plain.dataobj).astype(dtype), volume.data)
    back.save(path)
    np.testing.assert_array_equal(Volume.load(path).affine, back.affine)  # from then on, exact


@pytest.mark.parametrize("q, s", [(1, 0), (0, 2), (1, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_qform_and_sform_survive(tmp_path, q, s, kind):
    t = 0.3
    affine = np.array([[-2 * np.cos(t), 2.5 * np.sin(t), 0, 17.1], [2 * np.sin(t), 2.5 * np.cos(t), 0, -3.3],
                       [0, 0, 3, 0.7], [0, 0, 0, 1]])
    image = kind(volume_of((4, 5, 6, 3)).data, affine)
    image.set_qform(affine, q)
    image.set_sform(affine, s)
    image.header.set_xyzt_units("mm", "sec")
    image.header["cal_max"] = 3
    nib.save(image, tmp_path / "a.nii.gz")
    volume = Volume.load(tmp_path / "a.nii.gz")
    mask = Volume(volume.data[..., 0] > 50, volume.affine, header=volume.header)
    mask.save(tmp_path / "b.nii.gz")
    a, b = nib.load(tmp_path / "a.nii.gz"), nib.load(tmp_path / "b.nii.gz")
    assert isinstance(b, kind)
    np.testing.assert_array_equal(a.affine, b.affine)
    for name in (
        "qform_code",
        "sform_code",
        "quatern_b",
        "quatern_c",
        "quatern_d",
        "qoffset_x",
        "srow_x",
        "srow_z",
        "xyzt_units",
    ):
        np.testing.assert_array_equal(a.header[name], b.header[name])
    assert b.header["cal_max"] == 0
    moved = Volume(volume.data, np.diag([3, 3, 3, 1]), header=volume.header)  # its affine rules, not the old header
    moved.save(tmp_path / "c.nii.gz")
    c = nib.load(tmp_path / "c.nii.gz")
    np.testing.assert_array_equal(c.affine, moved.affine)
    np.testing.assert_array_equal(c.get_qform(), moved.affine)


def test_a_sheared_affine_has_no_qform(tmp_path):
    sheared, square = np.eye(4), np.diag([2, -2.5, 3, 1])
    sheared[0, 1] = 0.2
    for affine, code in (sheared, 0), (square, 1):
        plain = nib.load(Volume(np.zeros((2, 2, 2)), affine).save(tmp_path / "s.nii"))
        np.testing.assert_allclose(plain.affine, affine, rtol=1e-7)
        assert (int(plain.header["qform_code"]), int(plain.header["sform_code"])) == (code, 1)
        assert plain.header.get_xyzt_units()[0] == "mm"


def test_scaled_integers_and_exact_types(tmp_path):
    image = nib.Nifti1Image(np.arange(8, dtype=np.int16).reshape(2, 2, 2), np.eye(4))
    image.header.set_slope_inter(0.5, 1)
    image.header.set_data_dtype(np.int16)
    nib.save(nib.Nifti1Image(np.array([[[0.25, np.nan], [2, 3]]], np.float32), np.eye(4)), tmp_path / "f.nii")
    assert Volume.load(tmp_path / "f.nii", dtype=bool).data.tolist() == [[[True, False], [True, True]]]
    with pytest.raises(DataError, match="f.nii: holds values that are no uint8"):
        Volume.load(tmp_path / "f.nii", dtype=np.uint8)
    with pytest.raises(DataError, match="f.nii: 1 of 4 values are NaN"):
        Volume.load(tmp_path / "f.nii", check_finite=True)
    assert np.isnan(Volume.load(tmp_path / "f.nii").data).sum() == 1
    nib.save(nib.Nifti1Image(np.full((2, 2, 2), 300, np.int32), np.eye(4)), tmp_path / "i.nii.gz")
    assert Volume.load(tmp_path / "i.nii.gz", dtype=None).data.dtype == np.int32
    assert Volume.load(tmp_path / "i.nii.gz", dtype=np.uint16).data.dtype == np.uint16
    with pytest.raises(DataError, match="no uint8"):
        Volume.load(tmp_path / "i.nii.gz", dtype=np.uint8)


def damaged(folder):
    """(name, what the message says) of files that cannot be volumes, written into `folder`."""
    good = folder / "good.nii.gz"
    # noise: compresses badly, so that a cut falls into the data and not behind it
    Volume(normal(1, np.arange(8000)).reshape(20, 20, 20), np.eye(4)).save(good)
    raw, plain = good.read_bytes(), gzip.decompress(good.read_bytes())
    (folder / "cut.nii.gz").write_bytes(raw[:len(raw) // 2])
    (folder / "cut_header.nii.gz").write_bytes(raw[:100])
    (folder / "cut.nii").write_bytes(plain[:9000])
    (folder / "cut_header.nii").write_bytes(plain[:200])
    (folder / "flipped.nii.gz").write_bytes(raw[:5000] + bytes(200) + raw[5200:])
    (folder / "empty.nii.gz").write_bytes(b"")
    (folder / "text.nii.gz").write_text("not a volume")
    (folder / "text.txt").write_text("not a volume")
    nib.save(nib.AnalyzeImage(np.zeros((2, 2, 2), np.float32), np.eye(4)), folder / "other.img")
    for name, data in (("five.nii", np.zeros((2, 2, 2, 1, 3), np.float32)), ("two.nii", np.zeros((2, 2), np.float32)),
                       ("complex.nii", np.zeros((2, 2, 2), np.complex64))):
        nib.save(nib.Nifti1Image(data, np.eye(4)), folder / name)
    rgb = np.zeros((2, 2, 2), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(rgb, np.eye(4)), folder / "rgb.nii")
    flat = nib.Nifti1Image(np.zeros((2, 2, 2), np.float32), np.eye(4))
    flat.header["sform_code"], flat.header["srow_x"] = 1, 0
    flat.header["qform_code"] = 0
    with open(folder / "flat.nii", "wb") as f:
        f.write(flat.header.binaryblock + bytes(4) + bytes(32))
    return [
        ("none.nii.gz", "no such file"),
        ("cut.nii.gz", "truncated"),
        ("cut_header.nii.gz", "cannot be read"),
        ("cut.nii", "truncated"),
        ("cut_header.nii", "cannot be read"),
        ("flipped.nii.gz", "damaged"),
        ("empty.nii.gz", "cannot be read"),
        ("text.nii.gz", "cannot be read"),
        ("text.txt", "cannot be read"),
        ("other.img", "not NIfTI"),
        ("five.nii", "5 dimensions (2, 2, 2, 1, 3)"),
        ("two.nii", "2 dimensions"),
        ("complex.nii", "not real numbers"),
        ("rgb.nii", "not real numbers"),
        ("flat.nii", "affine cannot be inverted"),
        ("", "no such file"),
    ]


def test_damaged_files(tmp_path):
    for name, says in damaged(tmp_path):
        for dtype in (np.float32, bool, None):
            with pytest.raises(DataError) as e:
                Volume.load(tmp_path / name, dtype=dtype)
            assert str(e.value).startswith(str(tmp_path / name)) and says in str(e.value), (name, str(e.value))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = volume_of((3, 3, 3)).save(tmp_path / "v.nii.gz")
    before = path.read_bytes()

    def half(image, target):
        with open(target, "wb") as f:
            f.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(nib, "save", half)
    with pytest.raises(OSError, match="disk full"):
        volume_of((3, 3, 3), seed=1).save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="written as .nii"):
        volume_of((3, 3, 3)).save(tmp_path / "v.mgz")


@pytest.mark.real
def test_real_volumes(tmp_path, real_data):
    files = [p for name in ("real_dwi_3mm", "human_atlas") for p in sorted((real_data / name).glob("*.nii.gz"))
             if p.stat().st_size < 1e6]
    assert files
    for file in files:
        volume, plain = Volume.load(file), nib.load(file)
        np.testing.assert_array_equal(volume.data, plain.get_fdata(dtype=np.float32))
        again = Volume.load(volume.save(tmp_path / file.name))
        np.testing.assert_array_equal(again.affine, plain.affine)
        np.testing.assert_array_equal(again.header.get_sform(), plain.get_sform())
        np.testing.assert_array_equal(again.data, volume.data)


@pytest.mark.parametrize("shape", [(5, 4, 3), (5, 4, 3, 1), (37, 18, 5, 7), (96, 96, 60, 5)])
def test_gzip_of_floats_as_nibabel_reads_it(tmp_path, shape):
    """Blocks of features (the last shape has several), several gzips in one file, zeros after the end, big-endian."""
    data = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / "a.nii.gz")
    raw = gzip.decompress((tmp_path / "a.nii.gz").read_bytes())
    (tmp_path / "parts.nii.gz").write_bytes(
        b"".join(gzip.compress(raw[a : a + len(raw) // 3 + 1]) for a in range(0, len(raw), len(raw) // 3 + 1))
    )
    (tmp_path / "zeros.nii.gz").write_bytes((tmp_path / "a.nii.gz").read_bytes() + bytes(2**19))
    nib.save(nib.Nifti1Image(data.astype(">f4"), np.eye(4), nib.Nifti1Header(endianness=">")), tmp_path / "big.nii.gz")
    for name in ("a", "parts", "zeros", "big"):
        v = Volume.load(tmp_path / f"{name}.nii.gz")
        assert v.data.flags.c_contiguous and v.data.dtype == np.float32 and np.array_equal(v.data, data), name
    whole = (tmp_path / "a.nii.gz").read_bytes()
    for bad in (
        whole[:-4],
        whole[:-9],
        whole[: len(whole) // 2],
        whole[:-8] + bytes(4) + whole[-4:],
        gzip.compress(raw[:-5]),
    ):
        (tmp_path / "bad.nii.gz").write_bytes(bad)
        with pytest.raises(DataError, match="bad.nii.gz: (its data cannot be read|cannot be read as NIfTI)"):
            Volume.load(tmp_path / "bad.nii.gz")
