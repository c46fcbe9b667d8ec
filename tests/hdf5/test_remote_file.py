"""A dataset at a URL: from a real S3 API and a web server on this machine, what is read is what is in the file, from
any process and thread."""

import hashlib
import http.server
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import h5py
import numpy as np
import pytest
from helpers_data import make_file
from helpers_loading import Collate, loaded_beside
from moto import server as moto_server

from tractkit.core.files import DataError
from tractkit.data.dataset import MultiSubjectDataset
from tractkit.hdf5.remote_file import RemoteFile


def split_file(path: Path, folder: Path) -> Path:
    """The same data, one file per subject and a small master of external links."""
    (folder / "data_subjects").mkdir(parents=True)
    with h5py.File(path) as whole, h5py.File(folder / "data.hdf5", "w") as master:
        master.attrs.update(whole.attrs)
        for name in whole:
            with h5py.File(folder / f"data_subjects/{name}.hdf5", "w") as one:
                whole.copy(name, one)
            master[name] = h5py.ExternalLink(f"data_subjects/{name}.hdf5", f"/{name}")
    return folder / "data.hdf5"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One file, and the same split by subject; 3 subjects of some 300 kB."""
    root = tmp_path_factory.mktemp("made")
    path, _ = make_file(root, n=300)
    with h5py.File(path, "a") as h5:
        for i in range(3):
            g = h5[f"sub-{i}/streamlines"]
            g["data_per_point/fa"] = np.arange(len(g["data"]), dtype=np.float32)[:, None] / 7
            v = h5[f"sub-{i}/input/data"][()]
            zipped = h5.create_group(f"sub-{i}/zipped")
            zipped.attrs.update(h5[f"sub-{i}/input"].attrs)
            zipped.create_dataset("data", data=v, chunks=(4, 4, 4, 3), compression="gzip")
    split_file(path, root / "split")
    return root


class Ranges(http.server.BaseHTTPRequestHandler):
    """Files of a folder, by ranges, with ETags."""

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, body):
        path = Path(self.server.folder) / self.path.partition("?")[0].lstrip("/")
        self.server.log.append((self.command, self.path, self.headers.get("Range")))
        if not path.is_file():
            return self.send_error(404)
        data, code = path.read_bytes(), 200
        tag = hashlib.md5(data).hexdigest()
        if (wanted := self.headers.get("Range")) and self.server.ranges:
            a, b = wanted.removeprefix("bytes=").split("-")
            whole, data, code = len(data), data[int(a):int(b) + 1], 206
        self.send_response(code)
        if code == 206:
            self.send_header("Content-Range", f"bytes {a}-{b}/{whole}")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{tag}"')
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def web(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("www")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges)
    server.folder, server.ranges, server.log = folder, True, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for p in made.rglob("*.hdf5"):
        target = folder / p.relative_to(made)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(p.read_bytes())
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def s3(made):
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {
        "key": "who",
        "secret": "what",
        "client_kwargs": {"endpoint_url": f"http://{host}:{port}", "region_name": "us-east-1"},
    }
    fs = fsspec.filesystem("s3", **options)
    fs.call_s3("create_bucket", Bucket="bucket")
    for p in made.rglob("*.hdf5"):
        fs.pipe(f"bucket/{p.relative_to(made).as_posix()}", p.read_bytes())
    yield fs, options
    server.stop()


@pytest.fixture(params=["s3", "http", "memory"])
def place(request, made):
    """The base of a URL, and what it takes to open it."""
    if request.param == "s3":
        return "s3://bucket", {"storage_options": request.getfixturevalue("s3")[1]}
    if request.param == "http":
        return f"http://127.0.0.1:{request.getfixturevalue('web').server_address[1]}", {}
    fs = fsspec.filesystem("memory")
    for p in made.rglob("*.hdf5"):
        fs.pipe(f"/room/{p.relative_to(made).as_posix()}", p.read_bytes())
    return "memory://room", {}


@pytest.fixture(scope="module")
def here(made):
    return MultiSubjectDataset(made / "data.hdf5").load_data()


def equal(a, b, ids):
    """Whether two subjects hold the same."""
    s, t = a.streamlines["streamlines"], b.streamlines["streamlines"]
    return (
        np.array_equal(s.get(ids).points, t.get(ids).points)
        and np.array_equal(s.get_dpp(ids)["fa"], t.get_dpp(ids)["fa"])
        and np.array_equal(s.dps["bundle"], t.dps["bundle"])
        and np.array_equal(s.lengths_mm, t.lengths_mm)
        and all(np.array_equal(a.volumes[k].volume.data, b.volumes[k].volume.data) for k in ("input", "zipped"))
    )


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("file", ["data.hdf5", "split/data.hdf5"])
def test_reads_what_is_there(place, here, file, lazy):
    base, options = place
    there = MultiSubjectDataset(f"{base}/{file}", lazy=lazy, block_size=4096, **options).load_data()
    assert there.fingerprint() == here.fingerprint() and [
        s.subjects for s in (there.training_set, there.validation_set)
    ] == [["sub-0"], ["sub-1"]]
    for i in range(3):
        assert equal(there.subject(f"sub-{i}"), here.subject(f"sub-{i}"), [250, 3, 3, 299, -1])
    assert there.subject("sub-0").streamlines["streamlines"].is_lazy == lazy


def test_only_what_is_needed_comes_over_the_network(web):
    web.log.clear()
    there = MultiSubjectDataset(
        f"http://127.0.0.1:{web.server_address[1]}/data.hdf5", lazy=True, block_size=1024
    ).load_data(subj_id="sub-1")
    there.validation_set[0].streamlines["streamlines"].get([5, 200])
    fetched = 0
    for method, _, wanted in web.log:
        if method == "GET":
            a, b = wanted.removeprefix("bytes=").split("-")
            fetched += int(b) + 1 - int(a)
    assert fetched < there._file.size / 4


def test_kept_blocks_are_bounded(place, here):
    base, options = place
    there = MultiSubjectDataset(
        f"{base}/data.hdf5", lazy=True, block_size=1024, block_bytes=20_000, cache_size=0, **options
    ).load_data()
    for i in (0, 1, 2, 0):
        assert equal(there.subject(f"sub-{i}"), here.subject(f"sub-{i}"), None)
        assert there._file.cache.nbytes <= 20_000 and len(there._cache) == 0


def test_folder_serves_the_next_run(web, here, tmp_path):
    url = f"http://127.0.0.1:{web.server_address[1]}/split/data.hdf5"
    for run in range(2):
        web.log.clear()
        there = MultiSubjectDataset(url, lazy=True, cache_folder=tmp_path).load_data()
        assert equal(there.subject("sub-2"), here.subject("sub-2"), [7, 8, 200])
        assert ("GET" in {method for method, _, _ in web.log}) == (run == 0)


@pytest.mark.parametrize(
    "kind, method, workers", [("s3", "fork", 2), ("http", "fork", 1), ("s3", "spawn", 1), ("http", "forkserver", 1)]
)
def test_dataloader_workers(request, here, kind, method, workers):
    """Also while a thread of this process reads: what it holds at the time of a fork is not waited for."""
    base, options = ("s3://bucket", {"storage_options": request.getfixturevalue("s3")[1]}) if kind == "s3" else \
        (f"http://127.0.0.1:{request.getfixturevalue('web').server_address[1]}", {})
    there = MultiSubjectDataset(
        f"{base}/split/data.hdf5", lazy=True, block_size=2048, cache_size=0, **options
    ).load_data()
    there.subject("sub-0").streamlines["streamlines"].get([0])  # the filesystem is in use here
    rng = np.random.default_rng(0)
    items = [(f"sub-{i % 3}", rng.integers(0, 300, 20)) for i in range(12)]
    got = loaded_beside(
        lambda: equal(there.subject("sub-1"), here.subject("sub-1"), [1, 2, 250]),
        items,
        Collate(there),
        pause=0 if method == "fork" else 0.5,  # only a fork is of what this thread holds
        batch_size=3,
        num_workers=workers,
        multiprocessing_context=method,
    )
    for (points, _), (name, ids) in zip(got, items, strict=True):
        assert np.array_equal(np.asarray(points), here.subject(name).streamlines["streamlines"].get(ids).points)


def test_two_threads(place, here):
    base, options = place
    there = MultiSubjectDataset(
        f"{base}/split/data.hdf5", lazy=True, block_size=1024, block_bytes=8192, cache_size=0, **options
    ).load_data()

    def work(seed):
        rng = np.random.default_rng(seed)
        return all(
            equal(there.subject(f"sub-{i}"), here.subject(f"sub-{i}"), rng.integers(0, 300, 9))
            for i in rng.integers(0, 3, 4)
        )

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(4), timeout=200))


def test_changed_object(s3):
    fs, options = s3
    content = fs.cat_file("bucket/data.hdf5")
    fs.pipe("bucket/other.hdf5", content)
    there = MultiSubjectDataset(
        "s3://bucket/other.hdf5", lazy=True, storage_options=options, block_size=1024
    ).load_data()
    parcel, sft = pickle.dumps(there), there.training_set[0].streamlines["streamlines"]
    before = sft.get([0]).points
    time.sleep(1)
    fs.pipe("bucket/other.hdf5", content[:-1] + bytes([content[-1] ^ 1]))  # as long as before: the ETag tells
    assert np.array_equal(sft.get([0]).points, before)  # from the cache
    for dataset in (there, pickle.loads(parcel)):
        with pytest.raises(DataError, match="changed since") as e:
            dataset.training_set[0].streamlines["streamlines"].get()
        assert (
            e.value.file == "s3://bucket/other.hdf5" and e.value.subject == "sub-0" and e.value.group == "streamlines"
        )


def test_truncated_object(web, made):
    target = Path(web.folder) / "cut.hdf5"
    target.write_bytes((made / "data.hdf5").read_bytes())
    there = MultiSubjectDataset(
        f"http://127.0.0.1:{web.server_address[1]}/cut.hdf5", lazy=True, block_size=1024
    ).load_data()
    target.write_bytes(target.read_bytes()[:40_000])
    with pytest.raises(DataError):
        there.testing_set[0].streamlines["streamlines"].get()
    with pytest.raises(DataError, match="truncated or no HDF5"):
        MultiSubjectDataset(f"http://127.0.0.1:{web.server_address[1]}/cut.hdf5")


def test_server_without_ranges(web):
    web.ranges = False
    try:
        with pytest.raises(DataError, match="does not answer range requests"):
            MultiSubjectDataset(f"http://127.0.0.1:{web.server_address[1]}/data.hdf5", lazy=True, block_size=1024)
    finally:
        web.ranges = True


def test_what_is_not_there(s3, web):
    for url, options in (
        ("s3://bucket/none.hdf5", {"storage_options": s3[1]}),
        ("s3://nobucket/x.hdf5", {"storage_options": s3[1]}),
        (f"http://127.0.0.1:{web.server_address[1]}/none.hdf5", {}),
        ("http://127.0.0.1:9/x.hdf5", {}),
    ):
        with pytest.raises(DataError, match="Check the URL") as e:
            MultiSubjectDataset(url, **options)
        assert e.value.file == url


def test_link_to_a_missing_file(s3):
    fs, options = s3
    fs.pipe("bucket/alone.hdf5", fs.cat_file("bucket/split/data.hdf5"))
    with pytest.raises(DataError, match="alone|data_subjects") as e:
        MultiSubjectDataset("s3://bucket/alone.hdf5", storage_options=options).load_data()
    assert e.value.subject == "sub-0" and e.value.file == "s3://bucket/data_subjects/sub-0.hdf5"


def test_query_goes_along(web, here):
    """A signed URL: what follows the question mark belongs to every file."""
    url = f"http://127.0.0.1:{web.server_address[1]}/split/data.hdf5?signature=abc"
    web.log.clear()
    there = MultiSubjectDataset(url, lazy=True).load_data()
    assert equal(there.subject("sub-2"), here.subject("sub-2"), [0])
    assert all(path.endswith("?signature=abc") for _, path, _ in web.log)


def test_a_reply_with_other_bytes_than_were_asked_for(web, monkeypatch):
    class Moved(Ranges):
        def send_header(self, name, value):
            super().send_header(name, "bytes 7-9/100" if name == "Content-Range" else value)

    monkeypatch.setattr(web, "RequestHandlerClass", Moved)
    url = f"http://127.0.0.1:{web.server_address[1]}/data.hdf5"
    with pytest.raises(DataError, match=r"the server sent 'bytes 7-9/100' where bytes 0-\d+ were asked for"):
        MultiSubjectDataset(url)


def test_a_server_that_is_too_slow_is_said_in_words(monkeypatch):
    from fsspec.exceptions import FSTimeoutError

    def slow(self):
        self._try(lambda: (_ for _ in ()).throw(FSTimeoutError()))

    monkeypatch.setattr("tractkit.hdf5.remote_file._PAUSE", 0.0)
    monkeypatch.setattr(RemoteFile, "_look", slow)
    with pytest.raises(DataError, match=r"slow.hdf5: cannot be read \(the server sends nothing, or too slowly\)"):
        RemoteFile("http://127.0.0.1:9/slow.hdf5")
