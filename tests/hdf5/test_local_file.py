"""storage: bytes come as they are in the file, from any process and thread; what is kept is bounded; a file that
changed is an error."""

import multiprocessing as mp
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest

from tractkit.core.files import DataError
from tractkit.hdf5.local_file import ByteCache, LocalFile, chunk_ranges, open_unlocked, place_of, reading
from tractkit.hdf5.remote_file import RemoteFile, data_file

N = 5000


@pytest.fixture
def made(tmp_path):
    """A file with an array at an uneven place, and the array."""
    array = np.random.default_rng(0).normal(size=(N, 3)).astype(np.float32)
    with h5py.File(tmp_path / "x.h5", "w") as h5:
        h5["odd"] = np.arange(7, dtype=np.uint8)
        h5["rows"] = array
        h5["swapped"] = array.astype(">f4")
        h5.create_dataset("chunked", data=array, chunks=(100, 3), compression="gzip")
        h5["empty"] = np.zeros((0, 3), np.float32)
        h5["scalar"] = 3.0
    return tmp_path / "x.h5", array


def random_ranges(rng, n=N):
    """Ranges as streamlines give them: any order, repeated, empty, neighbours."""
    starts = rng.integers(0, n, 40)
    stops = np.minimum(starts + rng.integers(0, 50, 40), n)
    starts[5:10], stops[5:10] = np.arange(50, 100, 10), np.arange(60, 110, 10)
    stops[12] = starts[12]
    return starts, stops


def expected(array, starts, stops):
    return np.concatenate([array[a:b] for a, b in zip(starts, stops, strict=True)])


# ---- caches ---------------------------------------------------------------------------------------------------


def test_cache_forgets_what_was_used_longest_ago():
    cache = ByteCache(100)
    for key in ("a", "b"):
        cache.put(key, key.upper(), 40)
    assert cache.get("a", lambda: pytest.fail("it is there")) == "A"
    cache.put("c", "C", 40)
    assert list(cache) == ["a", "c"] and cache.nbytes == 80 and cache.peek("b") is None
    cache.put("a", "new", 10)
    assert cache.nbytes == 50 and cache.peek("a") == "new"
    cache.put("huge", "H", 1000)
    assert list(cache) == ["huge"]  # alone


def test_cache_of_nothing():
    cache, made = ByteCache(100, 0), []
    for _ in range(3):
        assert cache.get("a", lambda: (made.append(1) or "A", 40)) == "A"
    assert len(cache) == 0 and cache.nbytes == 0 and len(made) == 3


def test_cache_of_so_many_items():
    cache = ByteCache(100, 2)
    for key in "abc":
        cache.put(key, key, 1)
    assert list(cache) == ["b", "c"]


def test_cache_makes_nothing_twice():
    cache, made = ByteCache(100), []

    def make():
        made.append(1)
        return "A", 1

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: cache.get("a", make), range(50))) == {"A"}
    assert len(made) == 1


# ---- places and ranges ----------------------------------------------------------------------------------------


def test_places(made):
    with open_unlocked(made[0]) as h5:
        assert [place_of(h5[k]) is None for k in ("odd", "rows", "swapped", "chunked", "empty", "scalar")] == [
            False,
            False,
            True,
            True,
            True,
            True,
        ]
        assert len(chunk_ranges(h5["chunked"])) == 50 and chunk_ranges(h5["rows"]) == []
        place = place_of(h5["rows"])
    assert place.row_bytes == 12 and place.stop - place.start == 12 * N
    assert made[0].read_bytes()[place.start:place.stop] == made[1].tobytes()


@pytest.mark.parametrize("seed", range(5))
def test_rows(made, seed):
    file = data_file(made[0])
    place = file.ask(lambda h5: place_of(h5["rows"]))
    starts, stops = random_ranges(np.random.default_rng(seed))
    got = file.rows(place, starts, stops)
    assert got.dtype == np.float32 and np.array_equal(got, expected(made[1], starts, stops))
    none = np.zeros(0, np.int64)
    assert file.rows(place, none, none).shape == (0, 3)


def test_without_pread(made, monkeypatch):
    """As on Windows."""
    monkeypatch.delattr(os, "pread")
    file = data_file(made[0])
    starts, stops = random_ranges(np.random.default_rng(0))
    assert np.array_equal(
        file.rows(file.ask(lambda h5: place_of(h5["rows"])), starts, stops), expected(made[1], starts, stops)
    )


def test_paths_and_urls(made):
    assert isinstance(data_file(made[0]), LocalFile) and isinstance(data_file(f"file://{made[0]}"), LocalFile)
    assert data_file(f"file://{made[0]}").path == str(made[0])
    with pytest.raises(DataError, match="No such file"):
        data_file(made[0].with_name("none.h5"))
    with pytest.raises(DataError, match=r"FileNotFoundError.*Check the URL"):
        data_file("memory://no/such.h5")
    with pytest.raises(DataError, match="nosuchprotocol"):
        data_file("nosuchprotocol://x/y.h5")


# ---- a file that changes --------------------------------------------------------------------------------------


def test_truncated_while_open(made):
    file = data_file(made[0])
    place = file.ask(lambda h5: place_of(h5["rows"]))
    all_rows = np.array([0]), np.array([N])
    file.rows(place, *all_rows)
    os.truncate(made[0], place.start + 100)
    with pytest.raises(DataError, match="truncated from"):
        file.rows(place, *all_rows)
    with pytest.raises(DataError, match="changed since"):
        file.ask(lambda h5: 1)


def test_overwritten_in_place_while_open(made):
    file = data_file(made[0])
    place = file.ask(lambda h5: place_of(h5["rows"]))
    file.rows(place, np.array([0]), np.array([1]))
    with open(made[0], "r+b") as f:
        f.seek(place.start)
        f.write(bytes(1000))
    os.utime(made[0], ns=(0, 0))
    with pytest.raises(DataError, match="changed since"):
        file.rows(place, np.array([0]), np.array([1]))


def test_replaced_while_open(made, tmp_path):
    """The open file is the old one; opened anew, it is another."""
    file = data_file(made[0])
    place = file.ask(lambda h5: place_of(h5["rows"]))
    before = file.rows(place, np.array([0]), np.array([N]))
    parcel = pickle.dumps(file)
    (tmp_path / "new").write_bytes(bytes(file.size))
    os.replace(tmp_path / "new", made[0])
    assert np.array_equal(file.rows(place, np.array([0]), np.array([N])), before)
    with pytest.raises(DataError, match="changed since"):
        file.ask(lambda h5: 1)
    with pytest.raises(DataError, match="changed since"):
        pickle.loads(parcel).rows(place, np.array([0]), np.array([N]))


def test_ends_before_its_data_does(made):
    file = data_file(made[0])
    place = file.ask(lambda h5: place_of(h5["rows"]))
    with pytest.raises(DataError, match="ends before its data"):
        file.rows(place, np.array([N - 1]), np.array([N + 10**6]))


def test_truncation_kills_no_process(made):
    """A mapped file would: the signal is SIGBUS. In a child, so that this would be a failure and not the end."""
    code = f"""
import numpy as np, os
from tractkit.hdf5.local_file import LocalFile, place_of
file = LocalFile({str(made[0])!r})
place = file.ask(lambda h5: place_of(h5["rows"]))
file.rows(place, np.array([0]), np.array([10]))
os.truncate(file.path, 3000)
try: file.rows(place, np.array([0]), np.array([{N}]))
except ValueError as e: print(type(e).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "DataError"), done.stderr


# ---- locks and handles ----------------------------------------------------------------------------------------

READ_LOCKED = """
from tractkit.hdf5.local_file import LocalFile
try: print(LocalFile({path!r}).ask(lambda h5: list(h5)))
except ValueError as e: print(e)
"""


def test_lock_of_another_process(made):
    """Read without a lock; where the environment insists on one, the error says what to do."""
    writer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import h5py; f = h5py.File({str(made[0])!r}, 'a', locking=True); print(1, flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert writer.stdout.readline() == b"1\n"
        code = READ_LOCKED.format(path=str(made[0]))
        environments = {value: {**os.environ, "HDF5_USE_FILE_LOCKING": value} for value in ("TRUE", "FALSE")}
        environments["unset"] = {k: v for k, v in os.environ.items() if k != "HDF5_USE_FILE_LOCKING"}
        said = {
            k: subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout
            for k, env in environments.items()
        }
    finally:
        writer.communicate(b"\n")
    assert "unable to lock file" in said["TRUE"] and "set HDF5_USE_FILE_LOCKING=FALSE" in said["TRUE"]
    assert "rows" in said["unset"] and "rows" in said["FALSE"]


def open_files():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.linux
def test_few_handles_however_many_files(made, tmp_path):
    paths = [tmp_path / f"{i}.h5" for i in range(60)]
    for path in paths:
        path.write_bytes(made[0].read_bytes())
    before, files = open_files(), [data_file(p) for p in paths]
    place = files[0].ask(lambda h5: place_of(h5["rows"]))
    for _ in range(2):
        for file in files:
            assert np.array_equal(file.rows(place, np.array([3]), np.array([5])), made[1][3:5])
            assert open_files() <= before + 16
    del files, file
    assert open_files() <= before


def test_closed_only_after_the_reads_on_it(made, tmp_path):
    """Many threads, more files than may be open: a number that was closed and given away would read another file."""
    rng, files, arrays = np.random.default_rng(1), [], []
    for i in range(40):
        arrays.append(rng.normal(size=(2000, 3)).astype(np.float32))
        with h5py.File(tmp_path / f"{i}.h5", "w") as h5:
            h5["rows"] = arrays[-1]
        files.append(data_file(tmp_path / f"{i}.h5"))
    place = files[0].ask(lambda h5: place_of(h5["rows"]))

    def work(seed):
        rng = np.random.default_rng(seed)
        for i in rng.integers(0, 40, 150):
            starts, stops = random_ranges(rng, 2000)
            if not np.array_equal(files[i].rows(place, starts, stops), expected(arrays[i], starts, stops)):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def _child(file, place, queue):
    queue.put(file.rows(place, np.array([7]), np.array([20])))


@pytest.mark.parametrize("method", ["fork", "spawn", pytest.param("forkserver", marks=pytest.mark.full)])
def test_in_another_process(made, method):
    file = data_file(made[0])
    place = file.ask(lambda h5: place_of(h5["rows"]))
    file.rows(place, np.array([0]), np.array([1]))  # it is open here
    context, stop = mp.get_context(method), threading.Event()

    def keep_reading():
        while not stop.is_set():
            file.rows(place, np.array([0]), np.array([N]))

    thread = threading.Thread(target=keep_reading)
    thread.start()
    try:
        for _ in range(3):
            queue = context.Queue()
            process = context.Process(target=_child, args=(file, place, queue))
            process.start()
            assert np.array_equal(queue.get(timeout=240), made[1][7:20])
            process.join(60)
            assert process.exitcode == 0
    finally:
        stop.set()
        thread.join()


# ---- a damaged file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remote", [False, True])
def test_no_hdf5(tmp_path, made, remote):
    import fsspec

    for size in (0, 7, 500, 5000, os.path.getsize(made[0]) - 100):
        content = made[0].read_bytes()[:size]
        (tmp_path / "cut.h5").write_bytes(content)
        fsspec.filesystem("memory").pipe("/cut.h5", content)
        with pytest.raises(DataError, match="truncated or no HDF5"):
            data_file("memory://cut.h5" if remote else tmp_path / "cut.h5").ask(list)


@pytest.mark.parametrize("remote", [False, True])
def test_whatever_goes_wrong_inside_names_the_file(made, remote):
    import fsspec

    fsspec.filesystem("memory").pipe("/whole.h5", made[0].read_bytes())
    file = data_file("memory://whole.h5" if remote else made[0])
    with pytest.raises(DataError, match="cannot be read.*KeyError") as e:
        file.ask(lambda h5: h5["nothing"])
    assert e.value.file == file.path and isinstance(e.value.__cause__, KeyError)


def test_an_error_keeps_the_place_it_knows():
    with pytest.raises(DataError) as e, reading("f", "s", "g"):
        raise DataError("problem", subject="other", fix="do")
    assert (e.value.problem, e.value.file, e.value.subject, e.value.group, e.value.fix) == (
        "problem",
        "f",
        "other",
        "g",
        "do",
    )


# ---- blocks of a remote file ----------------------------------------------------------------------------------


class Counting:
    """A filesystem's cat_ranges, with what was asked of it."""

    def __init__(self, file):
        self.fs, self.path = file._open()
        self.asked = []
        original = self.fs.cat_ranges

        def cat_ranges(paths, starts, ends, **options):
            self.asked.append(list(zip(starts, ends, strict=True)))
            return original(paths, starts, ends, **options)

        file._fs = (
            type(
                "Fs",
                (),
                {
                    "cat_ranges": staticmethod(cat_ranges),
                    "info": self.fs.info,
                    "invalidate_cache": self.fs.invalidate_cache,
                },
            )(),
            self.path,
        )


@pytest.fixture
def remote(made):
    import fsspec

    fsspec.filesystem("memory").pipe("/bucket/x.h5", made[0].read_bytes())
    return "memory://bucket/x.h5", made[1]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("block_size", [512, 2**12, 2**16, 2**20])
def test_remote_rows(remote, seed, block_size):
    file = data_file(remote[0], block_size=block_size, cache_bytes=20_000)
    place = file.ask(lambda h5: place_of(h5["rows"]))
    starts, stops = random_ranges(np.random.default_rng(seed))
    for _ in range(2):
        assert np.array_equal(file.rows(place, starts, stops), expected(remote[1], starts, stops))
    assert file.cache.nbytes <= max(20_000, block_size)
    for name in ("chunked", "swapped", "rows"):
        assert np.array_equal(file.ask(lambda h5, name=name: h5[name][()]), remote[1])


def test_requests_are_few(remote):
    file = data_file(remote[0], block_size=512)
    place = file.ask(lambda h5: place_of(h5["rows"]))
    counting = Counting(file)
    starts = np.arange(0, N, 200)
    file.rows(place, starts, starts + 1)
    assert len(counting.asked) == 1  # all ranges in one call
    ranges = counting.asked[0]
    assert len(ranges) <= 25 and sum(b - a for a, b in ranges) <= 25 * 2 * 512
    file.rows(place, starts, starts + 1)
    assert len(counting.asked) == 1  # from the cache
    file.rows(place, np.array([0]), np.array([N]))
    assert len(counting.asked) == 2 and len(counting.asked[1]) <= 24  # what is missing, neighbours in one


def test_large_reads_hold_few_blocks(remote, monkeypatch):
    import tractkit.hdf5.remote_file

    monkeypatch.setattr(tractkit.hdf5.remote_file, "_AT_ONCE", 8)
    file = data_file(remote[0], block_size=512, cache_bytes=4096)
    place = file.ask(lambda h5: place_of(h5["rows"]))
    counting = Counting(file)
    assert np.array_equal(file.rows(place, np.array([0]), np.array([N])), remote[1])
    assert max(sum(b - a for a, b in ranges) for ranges in counting.asked) <= 8 * 512


def test_folder_of_blocks(remote, tmp_path):
    folder = tmp_path / "blocks"
    options = dict(block_size=512, cache_folder=folder, cache_bytes=1000)
    all_rows = np.array([0]), np.array([N])
    first = data_file(remote[0], **options)
    place = first.ask(lambda h5: place_of(h5["rows"]))
    first.rows(place, *all_rows)
    second = data_file(remote[0], **options)  # as another process would
    counting = Counting(second)
    assert np.array_equal(second.rows(place, *all_rows), remote[1]) and counting.asked == []
    next(folder.iterdir()).write_bytes(b"half")  # a block that is no block is fetched again
    third = data_file(remote[0], **options)
    assert np.array_equal(third.rows(place, *all_rows), remote[1])


def test_folder_is_bounded(remote, tmp_path):
    folder = tmp_path / "blocks"
    file = data_file(remote[0], block_size=512, cache_folder=folder, folder_bytes=8000, cache_bytes=0)
    place = file.ask(lambda h5: place_of(h5["rows"]))
    for _ in range(2):
        assert np.array_equal(file.rows(place, np.array([0]), np.array([N])), remote[1])
        assert sum(p.stat().st_size for p in folder.iterdir()) <= 8000 * 9 / 8 + 512


def test_changed_at_the_url(remote):
    import fsspec

    file = data_file(remote[0], block_size=512, cache_bytes=0)
    place = file.ask(lambda h5: place_of(h5["rows"]))
    parcel = pickle.dumps(file)
    fsspec.filesystem("memory").pipe("/bucket/x.h5", bytes(file.size))
    for f in (file, pickle.loads(parcel)):
        with pytest.raises(DataError, match="changed since"):
            f.rows(place, np.array([0]), np.array([N]))


def test_a_server_without_ranges(remote, monkeypatch):
    file = data_file(remote[0], block_size=512)
    whole = file._open()[0].cat_file("/bucket/x.h5")
    monkeypatch.setattr(
        type(file._open()[0]), "cat_ranges", lambda self, paths, starts, ends, **k: [whole] * len(paths)
    )
    with pytest.raises(DataError, match="does not answer range requests"):
        file.ask(list)


def test_links_stay_in_their_folder(remote):
    file = data_file(remote[0])
    assert file.sibling("x.h5").path == remote[0]
    for name in ("../x.h5", "/etc/passwd", "s3://other/x.h5", "a/../../x.h5"):
        with pytest.raises(DataError, match="leads out of its folder"):
            file.sibling(name)
    assert isinstance(file, RemoteFile)


def test_a_question_may_swallow_errors(remote):
    """What it made of a block that was not there is no answer."""
    def question(h5):
        try:
            return h5["rows"][4000].tolist()
        except OSError:
            return None

    assert data_file(remote[0], block_size=512).ask(question) == remote[1][4000].tolist()


def test_hdf5_never_waits_for_the_network(remote, monkeypatch):
    """While blocks are fetched another thread can use h5py, and this one holds none of its locks."""
    file = data_file(remote[0], block_size=512)
    fs = type(file._open()[0])
    original, free = fs.cat_ranges, []

    def cat_ranges(self, *args, **kwargs):
        thread = threading.Thread(target=lambda: free.append(bool(h5py.h5p.create(h5py.h5p.FILE_ACCESS).id)))
        thread.start()
        thread.join(20)
        assert not thread.is_alive(), "h5py's lock is held"
        return original(self, *args, **kwargs)

    monkeypatch.setattr(fs, "cat_ranges", cat_ranges)
    assert "rows" in file.ask(list) and free and all(free)
