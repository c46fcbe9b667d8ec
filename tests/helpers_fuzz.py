"""Damaged data files, and a child process for each that reads it under a time limit.

`Server` starts one process that has everything imported; it forks a child for each file, so that a crash or a hang of
the child is seen and charged to the file, and costs milliseconds. `HDF5_DAMAGE` and the functions below it make the
files from good ones; all are functions of their arguments alone."""

import hashlib
import json
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path

LIMIT = 30  # seconds for one file, on a machine that does other things too
MEMORY = 4 << 30  # bytes a child may ask for beyond what it starts with


# ---- the good files ------------------------------------------------------------------------------------------


def sample_file(folder: Path) -> Path:
    """A small data file of three subjects that holds everything the layout knows."""
    import h5py
    import numpy as np
    from helpers_data import SHAPE, make_file

    from tractkit.hdf5.layout import group_checksum, hdf5_fingerprint

    path, _ = make_file(folder, n=6, points=(2, 9))
    rng = np.random.default_rng(0)
    with h5py.File(path, "a") as h5:
        for k, subject in enumerate(h5.values()):
            g = subject["streamlines"]
            n, n_points = len(g["lengths"]), len(g["data"])
            for name, values in {
                "data_per_point/fa": rng.random((n_points, 1), np.float32),
                "groups/left": np.arange(0, n, 2),
                "groups/none": np.zeros(0, np.int64),
                "connectivity_matrix": rng.random((8, 8)).astype(np.float32),
                "data_per_streamline/weight": rng.random((n, 2), np.float32),
                "source_ids": np.arange(n),
            }.items():
                if name not in g:
                    g[name] = values
            if k < 2:
                g.attrs.update({"connectivity_matrix_type": "from_blocs", "connectivity_nb_blocs": 2})
            else:
                g.attrs["connectivity_matrix_type"] = "from_labels"
                g["connectivity_label_volume"] = rng.integers(0, 9, SHAPE).astype(np.int16)
            g.attrs["tractkit_checksum"] = group_checksum(g)
        del h5.attrs["tractkit_fingerprint"]
    fingerprint = hdf5_fingerprint(path)
    with h5py.File(path, "a") as h5:
        h5.attrs["tractkit_fingerprint"] = fingerprint
    return path


# ---- damage to an HDF5, by name ------------------------------------------------------------------------------
# Each gets the file open for writing and a subject, and damages one thing. `expect` is what a reader does with it:
# "error" (at the subject and group named), "same" (loads as if nothing were), "loads" (loads, with other values) or
# "any" of those.

HDF5_DAMAGE: dict[
    str, tuple[str, str, Callable]
] = {}  # name -> (expect, group: "streamlines", "input", "subject", "root"; function)


def damage(name: str, expect: str, group: str = "streamlines"):
    def keep(function):
        HDF5_DAMAGE[name] = expect, group, function
        return function

    return keep


def replace(group, name, values, **how):
    del group[name]
    return group.create_dataset(name, data=values, **how)


def _register() -> None:
    import h5py
    import numpy as np

    def put(name, at, value):
        def function(h5, subject):
            h5[subject]["streamlines"][name][at] = value
        return function

    def change(name, make, group="streamlines", **how):
        def function(h5, subject):
            g = h5[subject][group]
            replace(g, name, make(g[name][()]), **how)
        return function

    def attribute(group, name, value):
        def function(h5, subject):
            g = h5[subject][group]
            if value is None:
                del g.attrs[name]
            else:
                g.attrs[name] = value
        return function

    def remove(path):
        def function(h5, subject):
            del h5[subject][path]
        return function

    # offsets and lengths
    for name, function in {
        "an offset is negative": put("offsets", 1, -5),
        "the first offset is not 0": put("offsets", 0, 2),
        "an offset is past the end": put("offsets", -1, 10**9),
        "an offset is huge": put("offsets", 2, 2**63 - 1),
        "offsets decrease": put("offsets", 3, 1),
        "offsets are missing": remove("streamlines/offsets"),
        "offsets are floats": change("offsets", lambda o: o.astype(float)),
        "offsets are too few": change("offsets", lambda o: o[:-1]),
        "offsets have n + 1": change("offsets", lambda o: np.append(o, 99)),
        "offsets are 2-D": change("offsets", lambda o: o[:, None]),
        "offsets are wide unsigned": change("offsets", lambda o: o.astype(np.uint64) + np.uint64(2**63)),
        "a length is one more": put("lengths", 2, 99),
        "a length is negative": put("lengths", 0, -1),
        "a length is huge": put("lengths", 1, 2**62),
        "two lengths cancel": change("lengths", lambda n: np.r_[2**62, -(2**62), n[2:]]),
        "lengths are missing": remove("streamlines/lengths"),
        "lengths are text": change("lengths", lambda n: np.array([b"three"] * len(n))),
        "lengths are empty": change("lengths", lambda n: n[:0]),
        "lengths are a scalar": change("lengths", lambda n: n[0]),
    }.items():
        damage(name, "error")(function)
    for kind in (">i8", "<i4", ">u4", "<u8"):
        damage(f"offsets are {kind}", "same")(change("offsets", lambda o, kind=kind: o.astype(kind)))
        damage(f"lengths are {kind}", "same")(change("lengths", lambda n, kind=kind: n.astype(kind)))

    # points
    for value in (np.nan, np.inf, -np.inf):
        damage(f"a point is {value}", "error")(put("data", (3, 1), value))
    for name, make in {
        "points are 2-D only": lambda d: d[:, :2],
        "points are flat": lambda d: d.ravel(),
        "points are whole numbers": lambda d: d.astype(int),
        "points are complex": lambda d: d.astype(complex),
        "points are text": lambda d: np.array([b"x"] * len(d)),
        "points are too many": lambda d: np.concatenate([d, d[:3]]),
        "points are too few": lambda d: d[:-2],
        "there are no points": lambda d: d[:0],
        "points are pairs of names": lambda d: np.zeros(len(d), [("x", "f4"), ("y", "f4")]),
        "points are of huge doubles": lambda d: d.astype("f8") * 1e300,
    }.items():
        damage(name, "error")(change("data", make))
    for kind in (">f4", "<f8", ">f8"):
        damage(f"points are {kind}", "same")(change("data", lambda d, kind=kind: d.astype(kind)))
    damage("points are <f2", "loads")(change("data", lambda d: d.astype("<f2")))
    damage("points are chunked", "same")(change("data", lambda d: d, chunks=(4, 3)))
    damage("points are gzip", "same")(change("data", lambda d: d, chunks=(4, 3), compression="gzip"))
    damage("points are missing", "error")(remove("streamlines/data"))

    @damage("points are a group", "error")
    def _(h5, subject):
        del h5[subject]["streamlines/data"]
        h5[subject]["streamlines"].create_group("data")

    @damage("points were never written", "any")  # HDF5 says they are zeros
    def _(h5, subject):
        shape = h5[subject]["streamlines/data"].shape
        del h5[subject]["streamlines/data"]
        h5[subject]["streamlines"].create_dataset("data", shape, np.float32)

    for name, how in {
        "a terabyte of points that is not there": {},
        "a terabyte of points in empty chunks": {"chunks": (1000, 3)},
    }.items():

        @damage(name, "error")
        def _(h5, subject, how=how):
            g = h5[subject]["streamlines"]
            del g["data"]
            g.create_dataset("data", (10**11, 3), np.float32, **how)

    @damage("a terabyte of points with lengths to match", "error")
    def _(h5, subject):
        g = h5[subject]["streamlines"]
        n = g["lengths"][()]
        del g["data"]
        g.create_dataset("data", (10**11, 3), np.float32, chunks=(1000, 3))
        n[-1] = 10**11 - n[:-1].sum()
        g["lengths"][()] = n

    @damage("a streamline has no point", "loads")
    def _(h5, subject):
        g = h5[subject]["streamlines"]
        n, o = g["lengths"][()], g["offsets"][()]
        n[1], n[2], o[2] = 0, n[1] + n[2], o[1]
        g["lengths"][()], g["offsets"][()] = n, o

    @damage("a streamline has one point", "loads")
    def _(h5, subject):
        g = h5[subject]["streamlines"]
        n, o = g["lengths"][()], g["offsets"][()]
        n[1], n[2], o[2] = 1, n[1] + n[2] - 1, o[1] + 1
        g["lengths"][()], g["offsets"][()] = n, o

    @damage("there is no streamline", "loads")
    def _(h5, subject):
        g = h5[subject]["streamlines"]
        for name in ("data", "offsets", "lengths", "euclidean_lengths", "source_ids"):
            replace(g, name, g[name][:0])
        for folder in ("data_per_streamline", "data_per_point", "groups"):
            for key in list(g[folder]):
                replace(g[folder], key, g[folder][key][:0])

    damage("points are moved far outside", "loads")(change("data", lambda d: d + np.float32(1e4)))
    damage("points are moved below zero", "loads")(change("data", lambda d: d - np.float32(1e6)))

    # attributes
    for group in ("streamlines", "input"):
        damage(f"{group} has no type", "error", group)(attribute(group, "type", None))
        for value in ("tensor", 3, b"\xff\xfe", h5py.Empty("f4")):
            damage(f"{group} has type {value!r}", "error", group)(attribute(group, "type", value))
        damage(f"{group} has type bytes", "any", group)(
            attribute(group, "type", np.bytes_({"input": "volume"}.get(group, group)))
        )
        damage(f"{group} has no affine", "error", group)(attribute(group, "affine", None))
        for name, value in {
            "singular": np.zeros((4, 4)),
            "flat": np.diag([1.0, 1, 0, 1]),
            "NaN": np.full((4, 4), np.nan),
            "of shape (3, 4)": np.eye(4)[:3],
            "text": "affine",
            "a scalar": 3.0,
            "not affine": np.ones((4, 4)),
            "empty": h5py.Empty("f8"),
        }.items():
            damage(f"{group} has an affine that is {name}", "error", group)(attribute(group, "affine", value))
        damage(f"{group} has an affine of huge voxels", "any", group)(
            attribute(group, "affine", np.diag([1e12, 1e12, 1e12, 1]))
        )
        damage(f"{group} has an affine of tiny voxels", "any", group)(
            attribute(group, "affine", np.diag([1e-12, 1e-12, 1e-12, 1]))
        )
        damage(f"{group} is the other kind", "error", group)(
            attribute(group, "type", "volume" if group == "streamlines" else "streamlines")
        )
    for name in ("space", "origin"):
        damage(f"no {name}", "error")(attribute("streamlines", name, None))
        for value in ("Space.RASMM", 3, np.eye(2), h5py.Empty("f4")):
            damage(f"{name} is {np.shape(value)} {value!r:.12}", "error")(attribute("streamlines", name, value))
    damage("no dimensions", "error")(attribute("streamlines", "dimensions", None))
    for value in ([14, 11], [0, 11, 9], [-3, 11, 9], [np.nan] * 3, [1.5, 2, 3], "14 11 9", 14, [2**60] * 3):
        damage(f"dimensions are {value}", "any" if value == [2**60] * 3 else "error")(
            attribute("streamlines", "dimensions", value)
        )
    for name in ("voxel_sizes", "voxel_order", "tractkit_checksum", "tractkit_removed"):
        damage(f"no {name}", "same")(attribute("streamlines", name, None))
        damage(f"{name} is text", "same")(attribute("streamlines", name, "none"))
    damage("no nb_features", "same", "input")(attribute("input", "nb_features", None))
    damage("nb_features is wrong", "same", "input")(attribute("input", "nb_features", 99))

    # what goes with streamlines
    for folder, key, what in (("data_per_streamline", "bundle", "dps"), ("data_per_point", "fa", "dpp")):
        path = f"{folder}/{key}"
        damage(f"{what} has too few rows", "error")(change(path, lambda v: v[:-1]))
        damage(f"{what} is text", "error")(change(path, lambda v: np.array([b"x"] * len(v))))
        damage(f"{what} is 3-D", "error")(change(path, lambda v: v[..., None]))
        damage(f"{what} is a scalar", "error")(change(path, lambda v: v[0, 0]))
        damage(f"{what} is NaN", "loads" if what == "dps" else "any")(change(path, lambda v: v * np.nan))
        damage(f"{what} is flat", "same" if what == "dps" else "any")(change(path, lambda v: v[:, 0]))
        damage(f"{what} is big-endian", "same")(change(path, lambda v: v.astype(">f4")))

        @damage(f"{what} is a group", "error")
        def _(h5, subject, path=path):
            del h5[subject]["streamlines"][path]
            h5[subject]["streamlines"].create_group(path)

        @damage(f"all {what} is a dataset", "error")
        def _(h5, subject, folder=folder):
            del h5[subject]["streamlines"][folder]
            h5[subject]["streamlines"][folder] = np.zeros(3)

    for name, ids in {"past the end": [0, 10**6], "negative": [-1, 2], "floats": [0.5], "text": [b"x"]}.items():
        damage(f"ids of a group are {name}", "error")(change("groups/left", lambda v, ids=ids: np.array(ids)))
    damage("ids of a group do not increase", "any")(change("groups/left", lambda v: v[::-1].copy()))
    for name, values in {"NaN": np.nan, "negative": -1, "too long": 1e6}.items():
        damage(f"lengths in mm are {name}", "any")(put("euclidean_lengths", 1, values))
    damage("lengths in mm are missing", "same")(remove("streamlines/euclidean_lengths"))
    damage("lengths in mm are too few", "any")(change("euclidean_lengths", lambda v: v[:-1]))
    damage("lengths in mm are text", "any")(change("euclidean_lengths", lambda v: np.array([b"x"] * len(v))))
    damage("a connectivity matrix is flat", "any")(change("connectivity_matrix", lambda m: m.ravel()))
    damage("a connectivity matrix is not square", "any")(change("connectivity_matrix", lambda m: m[:3]))
    damage("a connectivity matrix is text", "any")(change("connectivity_matrix", lambda m: np.array([b"x"])))
    damage("a connectivity matrix has no type", "any")(attribute("streamlines", "connectivity_matrix_type", None))
    damage("a connectivity matrix is of other blocs", "any")(
        attribute("streamlines", "connectivity_nb_blocs", [3, 3, 3])
    )
    damage("source ids are too few", "any")(change("source_ids", lambda v: v[:-1]))

    for path in (
        "offsets",
        "lengths",
        "euclidean_lengths",
        "data_per_streamline/bundle",
        "data_per_point/fa",
        "groups/left",
        "connectivity_matrix",
    ):
        for what, value in {
            "a word": "word",
            "empty": h5py.Empty("f4"),
            "a table of words": [["a", "b"]],
            "a date": np.zeros(3, "V8"),
        }.items():
            damage(f"{path} is {what}", "error")(change(path, lambda v, value=value: value))

        @damage(f"{path} is a terabyte that is not there", "error")
        def _(h5, subject, path=path):
            g = h5[subject]["streamlines"]
            shape, kind = g[path].shape, g[path].dtype
            del g[path]
            g.create_dataset(path, (10**12 // kind.itemsize, *shape[1:]), kind, chunks=(1000, *shape[1:]))

    # volumes
    for name, make in {
        "text": lambda d: "voxels",
        "2-D": lambda d: d[0, 0],
        "5-D": lambda d: d[..., None],
        "complex": lambda d: d.astype(complex),
        "empty": lambda d: d[:0],
        "without features": lambda d: d[..., :0],
        "pairs of names": lambda d: np.zeros(3, [("x", "f4"), ("y", "f4")]),
    }.items():
        damage(f"the volume is {name}", "error", "input")(change("data", make, "input"))
    for value in (np.nan, np.inf):
        damage(f"a voxel is {value}", "any", "input")(
            change("data", lambda d, value=value: np.where(d == d.max(), np.float32(value), d), "input")
        )
    for kind in (">f4", "<f8"):
        damage(f"the volume is {kind}", "same", "input")(change("data", lambda d, kind=kind: d.astype(kind), "input"))
    damage("the volume is gzip", "same", "input")(
        change("data", lambda d: d, "input", chunks=(5, 5, 5, 3), compression="gzip")
    )
    damage("the volume is 3-D", "any", "input")(change("data", lambda d: d[..., 0], "input"))
    damage("the volume has a feature less", "any", "input")(change("data", lambda d: d[..., :2], "input"))
    damage("the volume is missing", "error", "input")(remove("input/data"))

    @damage("a terabyte of voxels that is not there", "error", "input")
    def _(h5, subject):
        del h5[subject]["input/data"]
        h5[subject]["input"].create_dataset("data", (10**4, 10**4, 10**4, 3), np.float32, chunks=(100, 100, 100, 3))

    @damage("the volume is a group", "error", "input")
    def _(h5, subject):
        del h5[subject]["input/data"]
        h5[subject]["input"].create_group("data")

    # links and groups
    for group in ("streamlines", "input"):
        @damage(f"{group} is a dataset", "error", group)
        def _(h5, subject, group=group):
            del h5[subject][group]
            h5[subject][group] = np.zeros(3)

        for what, link in {
            "a soft link to nothing": h5py.SoftLink("/nowhere"),
            "a soft link to itself": h5py.SoftLink(f"{group}"),
            "an external link to nothing": h5py.ExternalLink("gone.hdf5", "/x"),
            "an external link to a folder": h5py.ExternalLink("..", "/x"),
        }.items():
            @damage(f"{group} is {what}", "error", group)
            def _(h5, subject, group=group, link=link):
                del h5[subject][group]
                h5[subject][group] = link

    @damage("streamlines hold themselves", "any")
    def _(h5, subject):
        h5[subject]["streamlines/data_per_streamline/loop"] = h5[subject]["streamlines"]

    damage("streamlines are missing", "any", "subject")(remove("streamlines"))
    damage("the input is missing", "any", "subject")(remove("input"))

    @damage("the subject is missing", "error", "subject")
    def _(h5, subject):
        del h5[subject]

    @damage("the subject is a dataset", "error", "subject")
    def _(h5, subject):
        del h5[subject]
        h5[subject] = np.zeros(3)

    @damage("the subject is in a file that is gone", "error", "root")
    def _(h5, subject):
        del h5[subject]
        h5[subject] = h5py.ExternalLink("gone/x.hdf5", f"/{subject}")

    # the root
    def root(name, value):
        def function(h5, subject):
            if value is None:
                del h5.attrs[name]
            else:
                h5.attrs[name] = value
        return function

    for split in ("training", "validation", "testing"):
        damage(f"no {split}_subjs", "error", "root")(root(f"{split}_subjs", None))
        damage(f"{split}_subjs are numbers", "error", "root")(root(f"{split}_subjs", np.arange(3)))
        damage(f"{split}_subjs is a scalar", "any", "root")(root(f"{split}_subjs", "sub-0"))
        damage(f"{split}_subjs name a stranger", "error", "root")(root(f"{split}_subjs", ["sub-0", "nobody"]))
        damage(f"{split}_subjs are empty", "any", "root")(root(f"{split}_subjs", h5py.Empty("f4")))
        damage(f"{split}_subjs are 2-D", "error", "root")(root(f"{split}_subjs", np.array([[b"sub-0"], [b"sub-1"]])))
    damage("the format is later", "error", "root")(root("tractkit_format", 99))
    for value in ("one", np.eye(2), h5py.Empty("i4"), np.nan):
        damage(f"the format is {np.shape(value)} {value!r:.9}", "error", "root")(root("tractkit_format", value))
    for value in (np.arange(3), np.nan, b"\xff", h5py.Empty("f4"), -1.0):
        damage(f"the step size is {np.shape(value)} {value!r:.9}", "any", "root")(root("step_size", value))
    damage("the fingerprint is another", "same", "root")(root("tractkit_fingerprint", "0" * 32))
    damage("the config is no dict", "same", "root")(root("groups_config", "(" * 10_000))


_register()


# ---- damage to bytes -----------------------------------------------------------------------------------------


def cut(raw: bytes, share: float) -> bytes:
    """The first part of a file."""
    return raw[:int(len(raw) * share)]


def flip(raw: bytes, places: list[tuple[int, int]]) -> bytes:
    """Some bits of some bytes turned over."""
    out = bytearray(raw)
    for at, bits in places:
        out[at] ^= bits
    return bytes(out)


def blank(raw: bytes, at: int, length: int, value: int) -> bytes:
    """A stretch of one value, as a disk that lost a sector."""
    return raw[:at] + bytes([value]) * len(raw[at:at + length]) + raw[at + length:]


def number(raw: bytes, at: int, value: int, size: int) -> bytes:
    """Another number in a header."""
    at = min(at, len(raw) - size)
    return raw[:at] + struct.pack({4: "<i", 8: "<q", 2: "<h"}[size], value) + raw[at + size:]


def rezip(raw: bytes, name: str, change: Callable[[bytes], bytes]) -> bytes:
    """A .trx with another content of one entry (with the right CRC)."""
    import io

    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, change(old.read(entry)) if entry == name else old.read(entry))
    return out.getvalue()


# ---- what a child does with a file ---------------------------------------------------------------------------


def attempt(work: Callable[[], str]) -> dict:
    """What came of it: a digest, an error of the package, or another error, which is a fault."""
    from tractkit.core.files import DataError

    try:
        return {"end": "ok", "digest": work()}
    except DataError as e:
        return {"end": "error", "file": e.file, "subject": e.subject, "group": e.group, "text": str(e)}
    except Exception:
        return {"end": "fault", "text": traceback.format_exc(limit=-6)}


def use_dataset(path: str, lazy: bool) -> str:
    """Everything training does with a file, and a digest of what it got."""
    from tractkit.data.dataset import MultiSubjectDataset
    from tractkit.data.loader import BatchLoaderOneInput
    from tractkit.data.sampler import BatchIDSampler

    digest = hashlib.blake2b(digest_size=8)
    dataset = MultiSubjectDataset(path, lazy=lazy).load_data()
    subsets = [dataset.training_set, dataset.validation_set, dataset.testing_set]
    for subject in (s for subset in subsets for s in subset):
        for name, sft in subject.streamlines.items():
            s = sft.get()
            digest.update(
                f"{subject.name} {name} {sft.nb_points.tolist()}".encode() + s.points.tobytes() + sft.affine.tobytes()
            )
            sft.get([len(sft) - 1, 0] if len(sft) else [])
            t = sft.as_tractogram(slice(0, 3))
            if getattr(sft, "dpp_keys", ()):
                sft.get_dpp([0] if len(sft) else [])
            for key, values in sorted(t.dps.items()):
                digest.update(key.encode() + values.astype("<f4").tobytes())
            for mri in subject.volumes.values():
                mri.volume.sample(s.points)
        for name, mri in subject.volumes.items():
            digest.update(f"{name} {mri.shape}".encode() + mri.volume.data.tobytes() + mri.affine.tobytes())
    if all("streamlines" in s.streamlines and "input" in s.volumes for subset in subsets for s in subset):
        plan = BatchIDSampler(dataset, "streamlines", 4, 4, rng=1).plan(0)
        loader = BatchLoaderOneInput(
            dataset, None, "input", "streamlines", rng=1, step_size=2.0, split_ratio=0.5, reverse_ratio=0.5
        )
        if len(plan):
            batch = loader.load_batch_streamlines(plan[0], epoch=0)
            loader.load_batch_inputs(batch.points, batch)
    return digest.hexdigest()


def use_tools(path: str) -> dict:
    from tractkit.hdf5.describe import describe_hdf5
    from tractkit.hdf5.extract import extract_hdf5
    from tractkit.hdf5.validate import validate_hdf5

    def extract() -> str:
        with tempfile.TemporaryDirectory() as out:
            return str(len(extract_hdf5(path, out, progress=False)))

    def describe() -> str:
        page = describe_hdf5(path)
        return str(len(repr(page)) + len(page._repr_html_()))

    def validate() -> str:
        report = validate_hdf5(path, progress=False)
        repr(report), report._repr_html_()
        return json.dumps(
            [report.ok, [[f.severity, f.subject, f.group, f"{f.place} {f.problem}"] for f in report.findings]]
        )

    return {"describe": attempt(describe), "extract": attempt(extract), "validate": attempt(validate)}


def use_tractogram(path: str, reference: str) -> str:
    import numpy as np

    from tractkit.spatial.tractogram import Tractogram

    t = Tractogram.load(path, reference if path.endswith(".tck") else None)
    t.inside(), t[:2], t.lengths_mm, repr(t)
    return hashlib.blake2b(t.rasmm().points.tobytes() + np.asarray(t.affine).tobytes(), digest_size=8).hexdigest()


def use_source(root: str) -> str:
    """A data file from a folder with one subject, `a`, whose tractogram may be damaged."""
    from tractkit.hdf5.create import create_hdf5
    from tractkit.hdf5.validate import validate_hdf5

    config = {
        "input": {"type": "volume", "files": ["xyz.nii.gz"], "standardization": "none"},
        "streamlines": {"type": "streamlines", "files": ["lines.*"]},
    }
    with tempfile.TemporaryDirectory() as out:
        made = create_hdf5(root, Path(out) / "x.hdf5", config, {"training": ["a"]}, remove_invalid=True, progress=False)
        report = validate_hdf5(made, progress=False)
        assert report.ok, f"created from a damaged source, and damaged itself: {report}"
    return "created"


def exercise(job: dict) -> dict:
    path = job["path"]
    if job["kind"] == "hdf5":
        return {
            "eager": attempt(lambda: use_dataset(path, False)),
            "lazy": attempt(lambda: use_dataset(path, True)),
            **use_tools(path),
        }
    return {
        "load": attempt(lambda: use_tractogram(path, job["reference"])),
        "create": attempt(lambda: use_source(job["root"])),
    }


# ---- the process that forks ----------------------------------------------------------------------------------


def serve() -> None:
    """Read jobs from stdin, a line each; fork a child for each; write what came of it."""
    import resource
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:  # compile and import what children would otherwise do one by one
        path = sample_file(Path(folder))
        exercise({"kind": "hdf5", "path": str(path)})
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        if sys.platform == "linux"
        else 0
    )
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(read)
            if used:
                resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            with open(write, "w") as out:
                json.dump(exercise(job), out)
            os._exit(0)
        os.close(write)
        print(json.dumps(_wait(child, read, job.get("limit", LIMIT))), flush=True)


def _wait(child: int, read: int, limit: float) -> dict:
    text, end = b"", time.monotonic() + limit
    while (left := end - time.monotonic()) > 0:
        if select.select([read], [], [], left)[0]:
            part = os.read(read, 1 << 16)
            if not part:
                break
            text += part
    else:
        os.kill(child, signal.SIGKILL)
    os.close(read)
    _, status = os.waitpid(child, 0)
    if left <= 0:
        return {"fate": f"hangs: not done after {limit} s"}
    return (
        json.loads(text)
        if os.WIFEXITED(status) and not os.WEXITSTATUS(status)
        else {"fate": f"crashes: status {status}, signal {status & 127}"}
    )


class Server:
    """The process above, from outside."""

    def __init__(self):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import helpers_fuzz; helpers_fuzz.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parent.parent,
        )
        assert self._process.stdout.readline().strip() == "ready"

    def ask(self, **job) -> dict:
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)
