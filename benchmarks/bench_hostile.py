"""Files and servers that were made to do harm, each read in a process of its own.

*Held* is one DataError that names the file; seconds and memory are those of the reading alone, memory at its most,
above what the process had before. A server that is silent is waited for 2 seconds here, in place of 20, three times.
"""

import gzip
import http.server
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np

SECRET = "/etc/passwd" if os.path.exists("/etc/passwd") else sys.executable


def data_file(folder: Path, fill: Callable[[h5py.Group], object]) -> Path:
    """A data file of one subject whose volume is filled by `fill`."""
    path = folder / "x.hdf5"
    with h5py.File(path, "w") as h5:
        for split in ("training", "validation", "testing"):
            h5.attrs[f"{split}_subjs"] = np.array(["s"] * (split == "training"), h5py.string_dtype())
        group = h5.create_group("s/input")
        group.attrs.update({"type": "volume", "affine": np.eye(4)})
        fill(group)
    return path


def virtual(source: str) -> Callable[[h5py.Group], object]:
    layout = h5py.VirtualLayout((8, 8, 8), np.float32)
    layout[:] = h5py.VirtualSource(source, "s/input/data", (8, 8, 8))
    return lambda group: group.create_virtual_dataset("data", layout)


def external(group: h5py.Group) -> None:
    size = os.path.getsize(SECRET)
    group.create_dataset("data", (size, 1, 1), np.uint8, external=[(SECRET, 0, size)])


def absolute_link(folder: Path) -> Path:
    data_file(folder, lambda group: group.create_dataset("data", data=np.ones((8, 8, 8), np.float32)))
    (folder / "x.hdf5").rename(folder / "outside.h5")
    (folder / "in").mkdir()
    path = data_file(folder / "in", lambda group: None)
    with h5py.File(path, "a") as h5:
        del h5["s"]
        h5["s"] = h5py.ExternalLink(str(folder / "outside.h5"), "/s")
    return path


def nested(folder: Path) -> Path:
    def fill(group: h5py.Group) -> None:
        group["data"] = np.ones((8, 8, 8), np.float32)
        for _ in range(40):
            group["a"] = group.create_group("b")
            group = group["a"]
    return data_file(folder, fill)


def trx(folder: Path, nb_points: int, claimed: int | None = None) -> Path:
    path = folder / "x.trx"
    header = {"DIMENSIONS": [9, 9, 9], "VOXEL_TO_RASMM": np.eye(4).tolist(), "NB_STREAMLINES": 1, "NB_VERTICES": 2}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("header.json", json.dumps(header))
        with z.open("positions.3.float32", "w", force_zip64=True) as f:
            for _ in range(nb_points // 2**18):
                f.write(bytes(12 * 2**18))
        z.writestr("offsets.uint64", np.array([0, 2], "<u8").tobytes())
    if claimed:
        raw = bytearray(path.read_bytes())
        at = raw.rindex(b"offsets") - 46  # in the directory
        raw[at + 24:at + 28] = struct.pack("<I", claimed)
        path.write_bytes(raw)
    return path


def nifti(folder: Path, shape: tuple[int, ...], more: int = 0) -> Path:
    header = nib.Nifti1Header()
    header.set_data_dtype(np.float32)
    header.set_sform(np.eye(4), 1)
    raw = np.array(header.structarr)
    raw["dim"][:1 + len(shape)] = [len(shape), *shape]
    raw["vox_offset"], raw["magic"] = 352, b"n+1"
    with gzip.open(folder / "x.nii.gz", "wb", 6) as f:
        f.write(raw.tobytes() + bytes(4 + 4 * 1000))
        for _ in range(more):
            f.write(bytes(2**20))
    return folder / "x.nii.gz"


def trk(folder: Path) -> Path:
    header = np.zeros(1, nib.streamlines.trk.header_2_dtype)
    values = {**nib.streamlines.TrkFile.create_empty_header(), "nb_streamlines": 2**31 - 1,
              "nb_properties_per_streamline": -1, "voxel_to_rasmm": np.eye(4), "dimensions": (9, 9, 9)}
    for name in values.keys() & set(header.dtype.names or ()):
        header[name] = values[name]
    (folder / "x.trk").write_bytes(header.tobytes() + bytes(4000))
    return folder / "x.trk"


def laughs(folder: Path) -> Path:
    text = "a0: &a0 [ha]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(9))
    (folder / "config.yaml").write_text(text)
    return folder / "config.yaml"


def brackets(folder: Path, name: str) -> Path:
    (folder / name).write_text("[" * 100_000)
    return folder / name


class Reply(http.server.BaseHTTPRequestHandler):
    endless = True

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()

    def do_GET(self) -> None:
        if not self.endless:
            time.sleep(60)
        self.send_response(206)
        self.end_headers()
        try:
            while True:
                self.wfile.write(bytes(2**16))
        except OSError:
            pass

    def log_message(self, *args: object) -> None:
        pass


def server(endless: bool) -> http.server.ThreadingHTTPServer:
    kind = type("OneReply", (Reply,), {"endless": endless})
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    web.daemon_threads = True
    threading.Thread(target=web.serve_forever, daemon=True).start()
    return web


CASES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "HDF5, external storage: /etc/passwd as voxels": ("data", lambda f: data_file(f, external)),
    "HDF5, virtual dataset of another file": ("data", lambda f: data_file(f, virtual("/tmp/other.h5"))),
    "HDF5, virtual dataset of itself (was SIGSEGV)": ("data", lambda f: data_file(f, virtual("."))),
    "HDF5, link to a file by its absolute path": ("data", absolute_link),
    "HDF5, 2^40 names for 40 groups": ("data", nested),
    "HDF5, external storage, by `validate_hdf5`": ("validate", lambda f: data_file(f, external)),
    ".trx of 3 MB that unpacks to 3 GB, for 2 points": ("tractogram", lambda f: trx(f, 2**28)),
    ".trx whose directory claims 4.2 GB": ("tractogram", lambda f: trx(f, 2**18, 4_200_000_000)),
    ".trk of 2^31 - 1 streamlines, -1 properties each": ("tractogram", trk),
    "NIfTI of 32,767 voxels along each axis in 4 kB": ("volume", lambda f: nifti(f, (32767,) * 3)),
    "NIfTI of 1,000 voxels, and 1 GB of zeros behind them": ("volume", lambda f: nifti(f, (10,) * 3, 1024)),
    "YAML, 340 bytes for 10^9 values": ("config", laughs),
    "YAML, 100,000 brackets (was SIGSEGV)": ("config", lambda f: brackets(f, "config.yaml")),
    "JSON, 100,000 brackets": ("groups", lambda f: brackets(f, "config.json")),
}

READ = """
import json, resource, sys, time
from tractkit.core.files import DataError
from tractkit.data.dataset import MultiSubjectDataset
from tractkit.hdf5 import remote_file
from tractkit.hdf5.config import load_config
from tractkit.hdf5.validate import validate_hdf5
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume
from tractkit.training.config import read_run_config
import aiohttp, fsspec.implementations.http

def validate(path):
    report = validate_hdf5(path, progress=False)
    if not report.ok:
        raise DataError(report.errors[0].problem, file=path)

kind, path = sys.argv[1:]
remote_file._SILENCE = 2.0
read = {"data": lambda p: MultiSubjectDataset(p).load_data(), "validate": validate, "tractogram": Tractogram.load,
        "volume": Volume.load, "config": read_run_config, "groups": load_config}[kind]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
before, began = peak(), time.perf_counter()
try:
    read(path)
    ending = "read"
except DataError as e:
    ending = "held" if e.file == path else "another file"
except BaseException as e:
    ending = type(e).__name__
print(json.dumps([ending, time.perf_counter() - began, peak() - before]))
"""


def outcome(kind: str, path: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", READ, kind, path], capture_output=True, text=True, timeout=300)
    if done.returncode:
        return [f"ended by signal {-done.returncode}", "", ""]
    ending, seconds, megabytes = json.loads(done.stdout.splitlines()[-1])
    return [ending, f"{seconds:.2f}", f"{megabytes:.0f}"]


def table() -> str:
    lines = []
    for what, (kind, make) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            lines.append([what, *outcome(kind, str(make(Path(folder))))])
    for what, endless in (("server, an endless reply to a request for 64 kB", True), ("server, silent", False)):
        web = server(endless)
        lines.append([what, *outcome("data", f"http://127.0.0.1:{web.server_address[1]}/x.hdf5")])
        web.shutdown()
        web.server_close()
    rows = [["what", "", "seconds", "memory, MB"], ["---"] * 4, *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
