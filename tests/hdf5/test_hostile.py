"""Files and servers that were made to do harm: each is one error that names the file and the entry, nothing else is
read, and nothing waits or grows without bound."""

import http.server
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import h5py
import numpy as np
import pytest
from helpers_data import make_file

from tractkit.core.files import DataError
from tractkit.data.dataset import MultiSubjectDataset
from tractkit.hdf5 import remote_file
from tractkit.hdf5.describe import describe_hdf5
from tractkit.hdf5.extract import extract_hdf5
from tractkit.hdf5.layout import hdf5_fingerprint
from tractkit.hdf5.validate import validate_hdf5
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_file(tmp_path_factory.mktemp("made"), n=20)[0]


SECRET = b"root:x:0:0:root:/root:/bin/bash\n" * 100

SLOW = "sends nothing, or too slowly.*Check the URL, the connection"


def swapped(group: h5py.Group, how: str) -> None:
    """Keep the volume of a group elsewhere."""
    data = group["data"]
    shape = data.shape
    del group["data"]
    if how == "external storage":
        nbytes = int(np.prod(shape))
        Path(group.file.filename).with_name("secret").write_bytes((SECRET * (nbytes // len(SECRET) + 1))[:nbytes])
        group.create_dataset("data", shape, np.uint8,
                             external=[(str(Path(group.file.filename).with_name("secret")), 0, nbytes)])
        return
    layout = h5py.VirtualLayout(shape, np.float32)
    if how == "a virtual dataset":
        other = Path(group.file.filename).with_name("other.h5")
        with h5py.File(other, "w") as h5:
            h5["x"] = np.ones(shape, np.float32)
        layout[:] = h5py.VirtualSource(str(other), "x", shape)
    else:
        layout[:] = h5py.VirtualSource(".", f"{group.name}/data", shape)
    group.create_virtual_dataset("data", layout)


WAYS = ["external storage", "a virtual dataset", "a virtual dataset of itself"]


def hostile(made, tmp_path, how, group="input"):
    path = Path(shutil.copy(made, tmp_path / "x.hdf5"))
    with h5py.File(path, "a") as h5:
        swapped(h5["sub-0"][group], how)
    return path


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("where", ["here", "url"])
def test_a_dataset_that_is_kept_elsewhere_is_refused(made, tmp_path, how, lazy, where):
    path = hostile(made, tmp_path, how)
    url = str(path)
    if where == "url":
        fsspec.filesystem("memory").pipe("/hostile/x.hdf5", path.read_bytes())
        url = "memory://hostile/x.hdf5"
    with pytest.raises(DataError, match=r"input.*data .*(other file|virtual)") as e:
        MultiSubjectDataset(url, lazy=lazy).load_data()
    assert (e.value.file, e.value.subject) == (url, "sub-0")


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("group", ["input", "streamlines"])
def test_no_reader_reads_what_is_kept_elsewhere(made, tmp_path, how, group):
    path = hostile(made, tmp_path, how, group)
    for read in (describe_hdf5, hdf5_fingerprint, lambda p: extract_hdf5(p, tmp_path / "out", progress=False)):
        if read is hdf5_fingerprint:
            with h5py.File(path, "a") as h5:
                h5.attrs.pop("tractkit_fingerprint")  # known without reading, else
        with pytest.raises(DataError, match=f"{group}.*(other file|virtual)") as e:
            read(path)
        assert e.value.file == str(path)
    (found,) = validate_hdf5(path, progress=False).errors
    assert (found.subject, found.group) == ("sub-0", f"{group}/data")
    assert not (tmp_path / "out").exists()


def linked(made, folder: Path, target: str, at: str = "sub-0") -> Path:
    """A data file, one of whose entries is a link."""
    folder.mkdir(parents=True, exist_ok=True)
    path = Path(shutil.copy(made, folder / "x.hdf5"))
    with h5py.File(path, "a") as h5:
        del h5[at]
        h5[at] = h5py.ExternalLink(target, f"/{at}")
    return path


READERS = [lambda p: MultiSubjectDataset(p).load_data(), lambda p: MultiSubjectDataset(p, lazy=True).load_data(),
           describe_hdf5, lambda p: extract_hdf5(p, p.with_name("out"), progress=False)]


@pytest.mark.parametrize("at", ["sub-0", "sub-0/input", "sub-0/input/data"])
@pytest.mark.parametrize("target", ["{outside}", "../outside.h5", "below/../../outside.h5"])
def test_a_link_out_of_the_folder_is_refused(made, tmp_path, at, target):
    outside = shutil.copy(made, tmp_path / "outside.h5")
    (tmp_path / "in/below").mkdir(parents=True)
    path = linked(made, tmp_path / "in", target.format(outside=outside), at)
    for read in READERS:
        with pytest.raises(DataError, match="leads out of its folder|in another file") as e:
            read(path)
        assert e.value.file == str(path) and e.value.subject == "sub-0"
    assert not validate_hdf5(path, progress=False).ok


def test_a_link_is_not_found_in_the_current_folder(made, tmp_path, monkeypatch):
    """HDF5 looks there, too."""
    path = linked(made, tmp_path / "in", "near.h5")
    shutil.copy(made, tmp_path / "near.h5")
    monkeypatch.chdir(tmp_path)
    for read in READERS:
        with pytest.raises(DataError, match=r"near\.h5"):
            read(path)
    assert not validate_hdf5(path, progress=False).ok


def test_a_link_beside_the_file_is_followed_where_the_file_itself_is_a_symbolic_link(made, tmp_path):
    path = linked(made, tmp_path / "in", "below/near.h5")
    (tmp_path / "in/below").mkdir()
    shutil.copy(made, tmp_path / "in/below/near.h5")
    (tmp_path / "link.hdf5").symlink_to(path)
    for read in READERS:
        read(tmp_path / "link.hdf5")
    assert validate_hdf5(tmp_path / "link.hdf5", progress=False).ok
    (tmp_path / "in/below/near.h5").unlink()
    assert not validate_hdf5(tmp_path / "link.hdf5", progress=False).ok


@pytest.mark.parametrize("how", WAYS)
def test_a_linked_file_is_looked_at_too(made, tmp_path, how):
    near = hostile(made, tmp_path, how)
    near.rename(tmp_path / "near.h5")
    path = linked(made, tmp_path, "near.h5")
    for read in READERS:
        with pytest.raises(DataError, match="other file|virtual") as e:
            read(path)
        assert e.value.file == str(tmp_path / "near.h5")
    assert not validate_hdf5(path, progress=False).ok


def test_links_that_go_round_end(made, tmp_path):
    path = linked(made, tmp_path, "y.hdf5")
    with h5py.File(tmp_path / "y.hdf5", "w") as h5:
        h5["sub-0"] = h5py.ExternalLink("x.hdf5", "/sub-0")
    for read in (*READERS[:2], READERS[3]):
        with pytest.raises(DataError):
            read(path)
    with h5py.File(path, "a") as h5:  # soft ones, and one that leads through another file
        del h5["sub-0"]
        h5["sub-0"], h5["a"] = h5py.SoftLink("/a"), h5py.SoftLink("/sub-0")
    with pytest.raises(DataError, match="links to itself"):
        MultiSubjectDataset(path).load_data()


def test_a_soft_link_through_another_file_is_that_files(made, tmp_path):
    """What lies behind it is read from the file that has it, and looked at first."""
    shutil.copy(made, tmp_path / "near.h5")
    path = linked(made, tmp_path, "near.h5")
    with h5py.File(path, "a") as h5:
        h5["all"] = h5py.ExternalLink("near.h5", "/")
        del h5["sub-0"], h5["sub-1"]
        h5["sub-0"], h5["sub-1"] = h5py.SoftLink("/all/sub-0"), h5py.SoftLink("all/sub-1")
    whole = MultiSubjectDataset(made).load_data()
    for lazy in (False, True):
        data = MultiSubjectDataset(path, lazy=lazy).load_data()
        for name in ("sub-0", "sub-1"):
            a, b = (d.subject(name).streamlines["streamlines"].get([2]).points for d in (data, whole))
            assert np.array_equal(a, b)


def test_a_group_of_very_many_names_for_few_arrays_is_refused(made, tmp_path):
    path = Path(shutil.copy(made, tmp_path / "x.hdf5"))
    with h5py.File(path, "a") as h5:
        g = h5["sub-0/streamlines"].create_group("deep")
        for _ in range(40):
            g["a"] = g.create_group("b")
            g = g["a"]
        g["x"] = np.zeros(1)
    with pytest.raises(DataError, match="more than"):
        MultiSubjectDataset(path).load_data()


def test_a_dpy_keeps_its_points_itself(made, tmp_path):
    from dipy.io.streamline import save_tractogram

    t = Tractogram(Streamlines.from_list([np.ones((3, 3))]), np.eye(4), (5, 5, 5))
    save_tractogram(t.to_sft(), str(tmp_path / "a.dpy"), bbox_valid_check=False)
    with h5py.File(tmp_path / "a.dpy", "a") as h5:
        n = h5["streamlines/tracks"].size
        del h5["streamlines/tracks"]
        (tmp_path / "secret").write_bytes(SECRET)
        h5["streamlines"].create_dataset(
            "tracks", (n // 3, 3), np.float32, external=[(str(tmp_path / "secret"), 0, 4 * n)]
        )
    with pytest.raises(DataError, match=r"a\.dpy: streamlines/tracks keeps its values in other files"):
        Tractogram.load(tmp_path / "a.dpy", reference=t)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_is_no_data_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.hdf5")
    for read in (MultiSubjectDataset, describe_hdf5):
        with pytest.raises(DataError, match="pipe.hdf5.*no regular file"):
            read(tmp_path / "pipe.hdf5")


# ---- servers ---------------------------------------------------------------------------------------------------


class Web(http.server.ThreadingHTTPServer):
    """A server on this machine that answers as a test wants it to."""

    daemon_threads = True

    def __init__(self, data: bytes, answer: Callable[["Reply"], None]):
        super().__init__(("127.0.0.1", 0), Reply)
        self.data, self.respond, self.asked, self.sent, self.over = data, answer, 0, 0, threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/x.hdf5"


class Reply(http.server.BaseHTTPRequestHandler):
    server: Web

    def do_HEAD(self) -> None:
        self.start(200, len(self.server.data))

    def do_GET(self) -> None:
        self.server.asked += 1
        try:
            self.server.respond(self)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def start(self, code: int, length: int | None = None, **headers: str) -> None:
        self.send_response(code)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def range(self) -> bytes:
        a, b = self.headers["Range"].removeprefix("bytes=").split("-")
        return self.server.data[int(a):int(b) + 1]

    def well(self) -> None:
        self.start(206, len(self.range()))
        self.wfile.write(self.range())

    def log_message(self, *args) -> None:
        pass


@contextmanager
def serving(data: bytes, answer: Callable[[Reply], None]) -> Iterator[Web]:
    web = Web(data, answer)
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        web.over.set()
        web.shutdown()
        web.server_close()
        thread.join(10)


def endless(reply: Reply) -> None:
    reply.start(206)  # no length: until the connection ends
    piece = bytes(2**16)
    while reply.server.sent < 2**30 and not reply.server.over.is_set():
        reply.wfile.write(piece)
        reply.server.sent += len(piece)


def silent(reply: Reply) -> None:
    reply.server.over.wait(60)


def half(reply: Reply) -> None:
    reply.start(206, len(reply.range()))
    reply.wfile.write(reply.range()[:10])
    reply.server.over.wait(60)


@pytest.fixture
def quick(monkeypatch):
    for name, value in (("_SILENCE", 0.3), ("_PAUSE", 0.01)):
        monkeypatch.setattr(remote_file, name, value)


def test_an_endless_reply_is_read_no_further_than_asked_for(made, quick):
    with serving(made.read_bytes(), endless) as web:
        with pytest.raises(DataError, match=r"or more came where \d+ were asked for.*range requests") as e:
            MultiSubjectDataset(web.url, block_size=2**12)
        assert e.value.file == web.url and web.asked == 1
        assert web.sent < 2**26  # what the buffers of both sockets hold


@pytest.mark.parametrize("answer", [silent, half])
def test_silence_ends_and_is_tried_again(made, quick, answer):
    with serving(made.read_bytes(), answer) as web:
        with pytest.raises(DataError, match=SLOW) as e:
            MultiSubjectDataset(web.url)
        assert e.value.file == web.url and web.asked == 3


def test_a_server_that_does_not_even_say_how_large_the_file_is(quick, monkeypatch):
    monkeypatch.setattr(Reply, "do_HEAD", silent)
    with serving(b"", silent) as web, pytest.raises(DataError, match=SLOW):
        MultiSubjectDataset(web.url)


@pytest.mark.parametrize("fault", ["silence", "break", "error"])
def test_a_fault_that_passes_is_not_noticed(made, quick, fault):
    def answer(reply: Reply) -> None:
        if reply.server.asked % 2 == 0:
            reply.well()
        elif fault == "silence":
            reply.server.over.wait(1)
        elif fault == "error":
            reply.start(503, 0)
        else:
            reply.start(206, len(reply.range()))
            reply.wfile.write(reply.range()[:5])
            reply.close_connection = True

    with serving(made.read_bytes(), answer) as web:
        data = MultiSubjectDataset(web.url).load_data()
        assert web.asked >= 2
    points = (
        d.subject("sub-1").streamlines["streamlines"].get().points
        for d in (data, MultiSubjectDataset(made).load_data())
    )
    assert np.array_equal(*points)


def test_a_small_compressed_reply_is_not_unpacked(made, quick):
    import gzip

    packed = gzip.compress(bytes(2**26))

    def answer(reply: Reply) -> None:
        reply.start(206, len(packed), Content_Encoding="gzip")
        reply.wfile.write(packed)

    with serving(made.read_bytes(), answer) as web, pytest.raises(DataError, match="came where|cannot be opened"):
        MultiSubjectDataset(web.url, block_size=2**12)
