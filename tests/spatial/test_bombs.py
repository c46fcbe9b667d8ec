"""Files that claim more than they hold: what they claim is compared before memory is taken, and one error names the
file and the entry."""

import gzip
import json
import struct
import tracemalloc
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tractkit.core.files import DataError
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume


def refused(path: Path, match: str, read=Tractogram.load, **kwargs) -> None:
    """Reading is one DataError that names the file, and takes little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=match) as e:
            read(path, **kwargs)
        assert e.value.file == str(path)
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()


# ---- .trx


def zipped(path: Path, n: int, n_points: int, arrays: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    header = {
        "DIMENSIONS": [9, 9, 9],
        "VOXEL_TO_RASMM": np.eye(4).tolist(),
        "NB_STREAMLINES": n,
        "NB_VERTICES": n_points,
    }
    with zipfile.ZipFile(path, "w", method) as z:
        z.writestr("header.json", json.dumps(header))
        for name, data in arrays.items():
            z.writestr(name, data)
    return path


def line(**more: bytes) -> dict[str, bytes]:
    """The arrays of one streamline of two points."""
    return {"positions.3.float32": bytes(24), "offsets.uint64": np.array([0, 2], "<u8").tobytes(), **more}


@pytest.mark.parametrize(
    "entry, says",
    [
        ("positions.3.float32", "the header counts"),
        ("offsets.uint64", "the header counts"),
        ("dps/a.float32", "rows for 1"),
        ("dpv/a.float32", "rows for 2"),
        ("groups/g.uint32", "ids of 1"),
    ],
)
def test_a_trx_that_unpacks_to_much_more_than_it_counts(tmp_path, entry, says):
    path = zipped(tmp_path / "a.trx", 1, 2, line() | {entry: bytes(12 * 2**22)})
    assert path.stat().st_size < 2**18
    refused(path, rf"a\.trx: .*{says}")
    refused(path, entry)


def test_a_trx_whose_directory_claims_more_than_a_zip_can_hold(tmp_path):
    path = zipped(tmp_path / "a.trx", 1, 10**9, line())
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"positions") - 46  # in the directory
    raw[at + 24:at + 28] = struct.pack("<I", 4_200_000_000)
    path.write_bytes(raw)
    refused(path, "claim 4,200,000,.* bytes")
    refused(zipped(tmp_path / "b.trx", 1, 2, line(), zipfile.ZIP_LZMA), "in a way that .trx does not have")


def test_what_nobody_reads_of_a_trx_is_not_unpacked(tmp_path):
    path = zipped(
        tmp_path / "a.trx", 1, 2, line() | {"dpg/CST_L/a.float32": bytes(2**25), "notes/x.1.float32": bytes(2**25)}
    )
    tracemalloc.start()
    with pytest.warns(UserWarning, match="data per group"):
        assert len(Tractogram.load(path)) == 1
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


@pytest.mark.parametrize(
    "entry, says",
    [("dps/a.float33", "is no type"), ("dps/a.object", "is no type"), ("dps/a.0.float32", "is no type"),
     ("dpv/a.x.float32", "is no type"), ("dps/a.S4", "is no type"), ("dps/a.3.float32", "no whole rows of 3 float32"),
     ("dps/a.float16", "2 rows for 1 streamlines"), ("dpv/a.float32", "1 rows for 2 points")],
)
def test_entries_of_a_trx_are_named(tmp_path, entry, says):
    refused(zipped(tmp_path / "a.trx", 1, 2, line() | {entry: bytes(4)}), f"{entry}.*{says}")


@pytest.mark.parametrize("text", ["[" * 10**5, " " * (2**20 + 1), '{"NB_STREAMLINES": 1e999, "NB_VERTICES": 2}'])
def test_headers_of_a_trx_that_are_none(tmp_path, text):
    with zipfile.ZipFile(tmp_path / "a.trx", "w") as z:
        z.writestr("header.json", text)
    refused(tmp_path / "a.trx", r"a\.trx: ")


# ---- .trk, .tck


@pytest.mark.parametrize(
    "field, value",
    [("nb_streamlines", 2**31 - 1), ("nb_properties_per_streamline", 32767), ("nb_scalars_per_point", 32767),
     ("nb_properties_per_streamline", -1), ("nb_scalars_per_point", -3), ("nb_scalars_per_point", -4)],
)
@pytest.mark.parametrize("first", [None, 2**31 - 1, 0])
def test_a_trk_that_counts_what_is_not_there(tmp_path, field, value, first):
    Tractogram(Streamlines.from_list([np.ones((3, 3))] * 4), np.eye(4), (9, 9, 9)).save(tmp_path / "a.trk")
    raw = bytearray((tmp_path / "a.trk").read_bytes())
    np.frombuffer(raw, nib.streamlines.trk.header_2_dtype, count=1)[field] = value
    if first is not None:
        raw[1000:1004] = struct.pack("<i", first)
    (tmp_path / "a.trk").write_bytes(raw)
    refused(tmp_path / "a.trk", r"a\.trk: ")


@pytest.mark.parametrize(
    "text, says",
    [("file: . 99999999999999", "behind its end"), ("file: /etc/passwd 0", "file: /etc/passwd 0"), ("file: . -5", "-5"),
     ("count: " + "9" * 5000, "cannot be read"), ("datatype: Float16LE", "Float16LE"), ("x" * 2**21, "no END")],
)
def test_a_tck_whose_text_cannot_be(tmp_path, text, says):
    (tmp_path / "a.tck").write_bytes(
        f"mrtrix tracks\n{text}\nEND\n".encode() + np.array([[1, 1, 1], [np.nan] * 3, [np.inf] * 3], "<f4").tobytes()
    )
    refused(tmp_path / "a.tck", rf"a\.tck: .*({says})", reference=(np.eye(4), (9, 9, 9)))


@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8", ">f8"])
def test_tck_of_either_width_and_byte_order(tmp_path, kind):
    t = Tractogram(Streamlines.from_list([np.eye(3), np.ones((2, 3))]), np.diag([2.0, 2, 2, 1]), (9, 9, 9))
    t.save(tmp_path / "a.tck")
    raw = (tmp_path / "a.tck").read_bytes()
    at = int(raw.partition(b"file: . ")[2][:3])
    name = f"Float{8 * int(kind[2])}{'LE' if kind[0] == '<' else 'BE'}"
    points = np.frombuffer(raw[at:], "<f4").astype(kind).tobytes()
    (tmp_path / "b.tck").write_bytes(
        f"mrtrix tracks\ndatatype: {name}\ncount: 2\nfile: . 200\nEND\n".encode().ljust(200) + points
    )
    np.testing.assert_array_equal(
        Tractogram.load(tmp_path / "b.tck", reference=t).streamlines.points, t.streamlines.points
    )


@pytest.mark.parametrize("kind", ["trk", "tck"])
def test_a_header_that_counts_fewer(tmp_path, kind):
    """One rule: what is counted is read, with a warning; zero means that nobody counted."""
    t = Tractogram(Streamlines.from_list([np.eye(3) * k for k in (1, 2, 3, 4)]), np.eye(4), (9, 9, 9))
    t.save(tmp_path / f"a.{kind}")
    raw = (tmp_path / f"a.{kind}").read_bytes()
    for n in (2, 0):
        changed = raw.replace(b"count: 0000000004", f"count: {n:010}".encode())
        changed = raw[:988] + struct.pack("<i", n) + raw[992:] if kind == "trk" else changed
        (tmp_path / f"a.{kind}").write_bytes(changed)
        if n:
            with pytest.warns(UserWarning, match=r"counts 2 streamlines but more data"):
                back = Tractogram.load(tmp_path / f"a.{kind}", reference=t)
        else:
            back = Tractogram.load(tmp_path / f"a.{kind}", reference=t)
        assert len(back) == (n or 4)
        np.testing.assert_allclose(back.streamlines[1], t.streamlines[1], atol=1e-6)


# ---- volumes


def header_of(shape: tuple[int, ...], kind: type = np.float32, start: float = 352, two: bool = False) -> bytes:
    header = (nib.Nifti2Header if two else nib.Nifti1Header)()
    header.set_data_dtype(kind)
    header.set_sform(np.eye(4), 1)
    raw = np.array(header.structarr)
    raw["dim"][:1 + len(shape)] = [len(shape), *shape]
    raw["vox_offset"], raw["magic"] = start, b"n+2" if two else b"n+1"
    return raw.tobytes() + bytes(4)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [np.float32, np.int16, np.uint8])
def test_a_volume_that_claims_what_its_file_cannot_hold(tmp_path, ending, kind):
    path = tmp_path / f"a{ending}"
    for shape, two in (
        ((32767, 32767, 32767), False),
        ((32767,) * 4, False),
        ((2**40, 2**20, 4), True),
        ((-3, 5, 5), False),
    ):
        raw = header_of(shape, kind, 544 if two else 352, two) + bytes(1000)
        path.write_bytes(gzip.compress(raw) if ending == ".nii.gz" else raw)
        for dtype in (np.float32, bool, None):
            refused(path, "cannot be read", Volume.load, dtype=dtype)


@pytest.mark.parametrize("start", [1e30, -1e30, np.nan, 2.0**31])
@pytest.mark.parametrize("kind", [np.float32, np.int16])
def test_numbers_that_begin_nowhere(tmp_path, start, kind):
    """All before them is read: the extensions of the header."""
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(header_of((2, 2, 2), kind, start)[:348] + b"\1\0\0\0" + bytes(2**26)))
    refused(path, "cannot be read", Volume.load)


@pytest.mark.parametrize("kind", [np.float32, np.int16])
def test_what_follows_the_numbers_is_not_unpacked_for_ever(tmp_path, kind):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(header_of((2, 2, 2), kind) + bytes(8 * np.dtype(kind).itemsize + 2**26)))
    refused(path, "much more follows its numbers", Volume.load)


def test_too_little_memory_is_an_error_that_says_so(tmp_path, monkeypatch):
    path = tmp_path / "a.nii"
    path.write_bytes(header_of((2, 2, 2)) + bytes(32))

    def full(*args):
        raise MemoryError("Unable to allocate")

    monkeypatch.setattr("tractkit.spatial.nifti._numbers", full)
    refused(path, "2 × 2 × 2 numbers need more memory than there is", Volume.load)


@pytest.mark.parametrize("ending", [".mgz", ".mif", ".mif.gz"])
def test_volumes_of_other_formats(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    if ending == ".mgz":
        raw = struct.pack(">7i", 1, 2**20, 2**20, 2**20, 1, 3, 0) + bytes(2000)
    else:
        raw = (b"mrtrix image\ndim: 99999,99999,99999\nvox: 1,1,1\nlayout: +0,+1,+2\n"
               b"datatype: Float32LE\nfile: . 200\nEND\n")
    path.write_bytes(raw if ending == ".mif" else gzip.compress(raw))
    refused(path, "cannot|claims|NIfTI|holds|bytes", Volume.load)


def test_a_compressed_nifti_with_a_tail_is_counted_before_memory_is_taken(tmp_path):
    shape = (300, 300, 200)  # 72 MB of zeros
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.float32)
    header["magic"], header["vox_offset"] = b"n+1", 352
    header.set_sform(np.eye(4), code=1)
    for size, says in ((72_000_000 + 2**24, "much more follows"), (72_000_000 - 9, "bytes of data are missing")):
        path = tmp_path / "a.nii.gz"
        with gzip.open(path, "wb", 1) as f:
            f.write(header.binaryblock + bytes(4))
            f.write(bytes(size))
        refused(path, says, Volume.load)


def test_a_streamline_that_is_twice_in_a_group_of_a_trx_counts_once(tmp_path):
    path = zipped(tmp_path / "a.trx", 3, 6, {
        "positions.3.float32": bytes(72), "offsets.uint64": np.array([0, 2, 4, 6], "<u8").tobytes(),
        "groups/g.uint32": np.array([1, 1, 1], "<u4").tobytes()})
    assert Tractogram.load(path).groups["g"].tolist() == [1]
