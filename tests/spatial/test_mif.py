"""Images of MRtrix: any order of axes and any type against numbers written by hand, real ones, damaged ones."""

import gzip
import itertools
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_space import any_affine

from tractkit.core.files import DataError
from tractkit.spatial.mif import mif_gradients, read_mif, read_mif_header
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume

SHAPE = (4, 3, 5)
TRANSFORM = ("transform: 0,-1,0,-10", "transform: 1,0,0,-20", "transform: 0,0,1,5")


def packed(data, layout, datatype):
    """The bytes of the numbers, voxel by voxel in a loop: the fastest axis of the layout first."""
    ranks = [abs(int(w)) for w in layout]
    axes = sorted(range(data.ndim), key=lambda a: ranks[a])  # the fastest first
    runs = [range(data.shape[a])[::-1 if layout[a][0] == "-" else 1] for a in reversed(axes)]
    flat = []
    for index in itertools.product(*runs):
        place = dict(zip(reversed(axes), index, strict=True))
        flat.append(data[tuple(place[a] for a in range(data.ndim))])
    if datatype.lower() == "bit":
        return np.packbits(np.array(flat, bool)).tobytes()
    return np.array(flat).astype({"BE": ">", "LE": "<"}.get(datatype[-2:], "=") + kind(datatype)).tobytes()


def kind(datatype):
    name = datatype.removesuffix("LE").removesuffix("BE").lower()
    return {"u": "u", "i": "i", "f": "f"}[name[0]] + str(int("".join(c for c in name if c.isdigit())) // 8)


def write(path, data, layout="+0,+1,+2", datatype="Float32LE", lines=TRANSFORM, vox="2,2.5,3", beside=None, **other):
    layout = layout.split(",")
    entries = {"dim": ",".join(map(str, data.shape)), "vox": vox, "layout": ",".join(layout), "datatype": datatype}
    text = "\n".join(["mrtrix image", *(f"{k}: {v}" for k, v in (entries | other).items() if v is not None), *lines])
    raw = packed(data, layout, datatype)
    if beside:
        (path.parent / beside).write_bytes(b"\0" * 7 + raw)
        whole = f"{text}\nfile: {beside} 7\nEND\n".encode()
    else:
        first = len(text) + 30
        whole = f"{text}\nfile: . {first}\nEND\n".encode().ljust(first, b"\0") + raw
    path.write_bytes(gzip.compress(whole) if path.suffix == ".gz" else whole)
    return path


def numbers(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).integers(0, 100, shape)


LAYOUTS = [",".join(s + str(r) for s, r in zip(signs, ranks, strict=True))
           for ranks in itertools.permutations(range(3)) for signs in itertools.product("+-", repeat=3)]


def test_every_order_of_axes(tmp_path):
    data = numbers()
    for layout in LAYOUTS:
        read = Volume.load(write(tmp_path / "a.mif", data, layout))
        assert read.data.dtype == np.float32 and np.array_equal(read.data, data), layout
        np.testing.assert_allclose(read.affine, [[0, -2.5, 0, -10], [2, 0, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1]])


@pytest.mark.parametrize("layout", ["+1,+2,+3,+0", "-3,+0,-1,+2", "+10,+5,+7,+9", " +0, +1, -2, +3"])
def test_four_dimensions(tmp_path, layout):
    data = numbers((*SHAPE, 6))
    read = Volume.load(write(tmp_path / "a.mif", data, layout.replace(" ", ""), vox="2,2,2,nan"))
    assert np.array_equal(read.data, data) and read.nb_features == 6


@pytest.mark.parametrize("datatype", ["Bit", "Int8", "UInt8", "Int16LE", "UInt16BE", "Int32BE", "UInt32LE", "Int32",
                                      "Float32LE", "Float32BE", "Float32", "Float64LE", "Float64BE", "UInt64BE"])
@pytest.mark.parametrize("ending", ["mif", "mif.gz", "mih"])
def test_every_type_in_every_kind_of_file(tmp_path, datatype, ending):
    data = numbers() % 2 if datatype == "Bit" else numbers()
    path = write(tmp_path / f"a.{ending}", data, "-2,+0,+1", datatype, beside="a.dat" if ending == "mih" else None)
    as_stored = read_mif(path).data
    assert np.array_equal(as_stored, data) and as_stored.dtype.isnative
    assert as_stored.dtype.kind == {"B": "b", "I": "i", "U": "u", "F": "f"}[datatype[0]]
    assert np.array_equal(Volume.load(path).data, data.astype(np.float32))
    assert np.array_equal(Volume.load(path, dtype=bool).data, data != 0)
    assert np.array_equal(Volume.load(path, dtype=np.int32).data, data)


def test_the_same_as_nifti(tmp_path):
    data = numbers((*SHAPE, 2)).astype(np.float32)
    mif = Volume.load(write(tmp_path / "a.mif.gz", data, "+0,+1,+2,+3", vox="2,2.5,3,1"))
    nifti = Volume.load(mif.save(tmp_path / "a.nii.gz"))
    assert np.array_equal(mif.data, nifti.data) and nifti.same_grid(mif)
    t = Tractogram(Streamlines.from_list([np.ones((3, 3))]), mif.affine, SHAPE)
    t.save(tmp_path / "t.tck")
    np.testing.assert_allclose(Tractogram.load(tmp_path / "t.tck", tmp_path / "a.mif.gz").streamlines.points, 1,
                               atol=1e-5)


def test_scaling_and_a_missing_transform(tmp_path):
    data = numbers()
    read = Volume.load(write(tmp_path / "a.mif", data, datatype="Int16LE", lines=(), scaling="-1,0.5"))
    np.testing.assert_allclose(read.data, -1 + 0.5 * data)
    np.testing.assert_allclose(read.affine[:3, 3], -0.5 * (np.array(SHAPE) - 1) * [2, 2.5, 3])  # as MRtrix
    text = (tmp_path / "a.mif").read_bytes()
    end = text.index(b"END\n")
    windows = text[:end].replace(b"\n", b"\r\n") + text[end:]
    longer = text[:end].count(b"\n")  # so much less is between the text and the numbers
    (tmp_path / "w.mif").write_bytes(windows[:end + longer + 4] + windows[end + 2 * longer + 4:])
    assert np.array_equal(Volume.load(tmp_path / "w.mif").data, read.data)


def test_numbers_in_several_files(tmp_path):
    data = numbers((4, 3, 4))
    path = write(tmp_path / "a.mih", data, beside="whole.dat")
    raw = (tmp_path / "whole.dat").read_bytes()[7:]
    for k in range(4):
        (tmp_path / f"part {k}.dat").write_bytes(raw[k * 48:(k + 1) * 48])
    text = path.read_text().replace("file: whole.dat 7", "\n".join(f"file: part {k}.dat" for k in range(4)))
    path.write_text(text)
    assert np.array_equal(Volume.load(path).data, data)


@given(any_affine(), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_directions_turn_with_the_image(tmp_path_factory, affine, seed):
    """A direction that is (x, y, z) in voxel axes is found whatever the image's own axes are."""
    voxels = np.linalg.norm(affine[:3, :3], axis=0)
    rotation = affine[:3, :3] / voxels
    if not np.allclose(rotation.T @ rotation, np.eye(3), atol=1e-8):
        return  # sheared: directions have no unit length in its axes
    known = np.random.default_rng(seed).normal(size=(7, 3))
    known = np.vstack([np.zeros(3), known / np.linalg.norm(known, axis=1, keepdims=True)])
    rows = [f"dw_scheme: {','.join(map(repr, map(float, v)))},{b}"
            for v, b in zip(known @ rotation.T, [0, *[1000] * 7], strict=True)]
    transform = [f"transform: {','.join(map(repr, map(float, row)))}" for row in np.c_[rotation, affine[:3, 3]]]
    path = write(tmp_path_factory.mktemp("mif") / "a.mif", np.zeros((2, 2, 2, 8)), "+0,+1,+2,+3",
                 lines=(*transform, *rows), vox=",".join(map(str, voxels)))
    bvals, bvecs = mif_gradients(path)
    np.testing.assert_allclose(bvecs, known, atol=1e-6)
    np.testing.assert_allclose(bvals, [0, *[1000] * 7])
    np.testing.assert_allclose(read_mif_header(path).affine, affine, atol=1e-6)


BAD = {
    "no file": (None, "no such file"),
    "nifti": (lambda d: b"\x5c\x01\0\0" * 100, "is no MRtrix image"),
    "empty": (lambda d: b"", "is no MRtrix image"),
    "no end": (lambda d: d[:d.index(b"END")], "its header has no END"),
    "cut": (lambda d: d[:-1], "needs .* bytes and a.mif has"),
    "no dim": (lambda d: d.replace(b"dim:", b"din:"), "0 numbers for 'dim'"),
    "dim of words": (lambda d: d.replace(b"dim: 4,", b"dim: a,"), "which are no numbers"),
    "dim 0": (lambda d: d.replace(b"dim: 4,", b"dim: 0,"), "not 3 or 4 numbers above 0"),
    "dim -4": (lambda d: d.replace(b"dim: 4,", b"dim:-4,"), "not 3 or 4 numbers above 0"),
    "dim 1.5": (lambda d: d.replace(b"dim: 4,", b"dim: 1.5,"), "not 3 or 4 numbers above 0"),
    "dim nan": (lambda d: d.replace(b"dim: 4,", b"dim: nan,"), "not 3 or 4 numbers above 0"),
    "dim huge": (lambda d: d.replace(b"dim: 4,", b"dim: 99999999999,"), "needs .* bytes and a.mif has"),
    "vox 0": (lambda d: d.replace(b"vox: 2,", b"vox: 0,"), "has voxels of 0 x 2.5 x 3 mm"),
    "layout": (lambda d: d.replace(b"layout: +0,", b"layout: +1,"), "no order of 3 axes"),
    "layout of words": (lambda d: d.replace(b"layout: +0,", b"layout: x,"), "no order of 3 axes"),
    "complex": (lambda d: d.replace(b"Float32LE", b"CFloat32LE"), "holds CFloat32LE, not real numbers"),
    "flat": (lambda d: d.replace(b"transform: 0,0,1", b"transform: 1,0,0"), "affine"),
    "transform": (lambda d: d.replace(b"transform: 0,0,1,5", b""), "8 numbers for 'transform' and needs 12"),
    "no file entry": (lambda d: d.replace(b"file:", b"life:"), "does not say where the numbers are"),
    "passwords": (lambda d: d.replace(b"file: . ", b"file: /etc/passwd "), "which is not beside it"),
    "above": (lambda d: d.replace(b"file: . ", b"file: ../b.dat "), "which is not beside it"),
    "not there": (lambda d: d.replace(b"file: . ", b"file: b.dat "), "in b.dat, which is not there"),
    "place": (lambda d: d.replace(b"file: . ", b"file: . -"), "which is not|which is not there|name and the place"),
    "parts": (lambda d: d.replace(b"file: ", b"file: . 0\n" * 6 + b"file: "), "not shared equally by 7 files"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("load", [Volume.load, read_mif])
def test_bad_files_are_named(tmp_path, name, load):
    make, said = BAD[name]
    path = write(tmp_path / "a.mif", numbers())
    whole = path.read_bytes()
    path.unlink() if make is None else path.write_bytes(make(whole))
    with pytest.raises(DataError, match=said) as e:
        load(path)
    assert str(path) in str(e.value)


def test_a_link_to_another_folder_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in" / "a.mih", numbers(), beside="a.dat")
    (tmp_path / "in" / "a.dat").rename(tmp_path / "b.dat")
    (tmp_path / "in" / "a.dat").symlink_to(tmp_path / "b.dat")
    with pytest.raises(DataError, match="a.dat, which is not beside it"):
        Volume.load(path)


@pytest.mark.parametrize("change", [lambda d: d[:-9], lambda d: d[:-9] + b"\1" + d[-8:], lambda d: d[:40]])
def test_damaged_gzip(tmp_path, change):
    path = write(tmp_path / "a.mif.gz", numbers())
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match="a.mif.gz"):
        Volume.load(path)


def test_a_small_file_takes_little_memory(tmp_path):
    text = "mrtrix image\ndim: 40000,40000,100\nvox: 1,1,1\nlayout: +0,+1,+2\ndatatype: Float32LE\nfile: . 200\nEND\n"
    (tmp_path / "a.mif.gz").write_bytes(gzip.compress(text.encode().ljust(1 << 20, b"\0")))
    (tmp_path / "b.mif.gz").write_bytes(gzip.compress(b"mrtrix image\n" + b"a" * (1 << 26)))
    tracemalloc.start()
    for name, said in (("a", "needs"), ("b", "no END")):
        with pytest.raises(DataError, match=said):
            Volume.load(tmp_path / f"{name}.mif.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


SCHEMES = {
    "none": ((), "has no dw_scheme"),
    "short": (("dw_scheme: 0,0,0,0",), "1 rows for 2 volumes"),
    "ragged": (("dw_scheme: 0,0,0", "dw_scheme: 1,0,0,9"), "7 numbers in 2 rows"),
    "nan": (("dw_scheme: 0,0,0,0", "dw_scheme: nan,0,0,9"), "8 numbers in 2 rows"),
    "words": (("dw_scheme: 0,0,0,0", "dw_scheme: x,0,0,9"), "which are no numbers"),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_bad_gradients_are_named_where_they_are_asked_for(tmp_path, name):
    lines, said = SCHEMES[name]
    path = write(tmp_path / "a.mif", numbers((*SHAPE, 2)), "+0,+1,+2,+3", lines=(*TRANSFORM, *lines))
    assert Volume.load(path).nb_features == 2  # a map keeps the gradients of the series that it is from
    with pytest.raises(DataError, match=said) as e:
        mif_gradients(path)
    assert str(path) in str(e.value)


@pytest.mark.real
def test_real_images_of_mrtrix(real_data):
    folder = real_data / "mrtrix" / "msmt"
    dwi, mask = Volume.load(folder / "dwi.mif"), Volume.load(folder / "mask.mif", dtype=bool)
    fa = nib.load(folder / "derived_FA.nii.gz")
    assert dwi.same_grid(mask) and dwi.same_grid(Volume.load(folder / "derived_FA.nii.gz"))
    assert dwi.nb_features == 102 and 0 < mask.data.sum() < mask.data.size
    bvals, bvecs = mif_gradients(folder / "dwi.mif")
    assert sorted(set(bvals.round(-2))) == [0, 700, 1200, 2800]
    np.testing.assert_allclose(np.linalg.norm(bvecs[bvals > 50], axis=1), 1, atol=1e-5)
    fodf = Volume.load(folder / "wm.mif")
    assert fodf.nb_features == 45 and dwi.same_grid(fodf) and fa.shape == dwi.shape3d
    assert np.median(fodf.data[mask.data][:, 0]) > 0.01  # the first coefficient: how much white matter
    parcels = Volume.load(real_data / "mrtrix" / "SIFT_phantom" / "parc.mif", dtype=np.int32)
    assert parcels.data.min() == 0 and len(np.unique(parcels.data)) > 2
    series = Volume.load(real_data / "mrtrix" / "SIFT_phantom" / "dwi.mif")
    inside = Volume.load(real_data / "mrtrix" / "SIFT_phantom" / "mask.mif", dtype=bool).data
    b0 = series.data[..., mif_gradients(real_data / "mrtrix" / "SIFT_phantom" / "dwi.mif")[0] == 0].mean(-1)
    assert b0[inside].mean() > 2 * b0[~inside].mean()
