"""dataset: what was written is what is read, in memory and from disk, in any process; damage is an error."""

import hashlib
import multiprocessing as mp
import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
from helpers_data import CONFIG, SHAPE, make_file, make_subject, world_volume

from tractkit.dataset import ByteCache, MultiSubjectDataset
from tractkit.files import DataError, data_folder
from tractkit.hdf5 import create_hdf5
from tractkit.streamlines import Streamlines
from tractkit.tractogram import Tractogram


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_file(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("lazy", [False, True])
def test_reads_what_was_written(made, lazy):
    path, sources = made
    dataset = MultiSubjectDataset(path, lazy=lazy).load_data()
    assert dataset.training_set.subjects == ["sub-0"] and dataset.testing_set[0].name == "sub-2"
    for name, t in sources.items():
        sft = dataset.subject(name).streamlines["streamlines"]
        assert sft.is_lazy == lazy and len(sft) == len(t)
        assert np.array_equal(sft.nb_points, t.streamlines.nb_points) and sft.nb_points.dtype == np.int64
        assert np.allclose(sft.lengths_mm, t.lengths_mm, atol=1e-3)
        assert np.allclose(sft.affine, t.affine) and tuple(sft.dimensions) == SHAPE
        for ids in (None, 3, [5, 0, 5], slice(2, 20, 3), np.arange(len(t)) % 3 == 0, np.array([], int), [], -1):
            got = sft.get(ids)
            rows = np.atleast_1d(np.arange(len(t))[ids if not (isinstance(ids, list) and not ids) else slice(0)]) if ids is not None else slice(None)
            expected = t.streamlines[rows]
            assert got.points.dtype == np.float32 and len(got) == len(expected)
            assert np.allclose(got.points, expected.points, atol=1e-4)
        back = sft.as_tractogram([4, 2])
        assert back.dps["bundle"][:, 0].tolist() == [4, 2] and np.allclose(back.rasmm()[1], t.rasmm()[2], atol=1e-3)
        assert np.allclose(sft.as_sft([4, 2]).streamlines[1], t.rasmm()[2], atol=1e-3)
        with pytest.raises(IndexError):
            sft.get([len(t)])
        mri = dataset.subject(name).volumes["input"]
        assert np.allclose(mri.volume.data, world_volume(t.affine).data, atol=1e-3) and mri.nb_features == 3
        # half a voxel off anywhere would show: the value under a point is where the point is
        assert np.allclose(mri.volume.sample(sft.get().points), t.rasmm().points, atol=2e-3)


def test_lazy_equals_eager_bitwise(made):
    eager, lazy = (MultiSubjectDataset(made[0], lazy=b).load_data().subject("sub-1").streamlines["streamlines"] for b in (False, True))
    ids = np.random.default_rng(0).permutation(len(eager))
    assert np.array_equal(eager.get(ids).points, lazy.get(ids).points)


def test_lengths_beyond_int16(tmp_path):
    """A streamline of 40,000 points: dwi_ml's int16 lengths would be negative."""
    t = make_subject(tmp_path / "a", np.random.default_rng(0), n=3)
    line = np.linspace([0, 0, 0], [9, 9, 7], 40_000)
    Tractogram(Streamlines.from_list([line, *t.streamlines]), t.affine, SHAPE, dps={"bundle": np.zeros(4)}).save(tmp_path / "a/lines.trk")
    path = create_hdf5(tmp_path, tmp_path / "x.hdf5", CONFIG, {"training": ["a"]}, progress=False)
    for lazy in (False, True):
        sft = MultiSubjectDataset(path, lazy=lazy).load_data().training_set[0].streamlines["streamlines"]
        assert sft.nb_points[0] == 40_000 and sft.nb_points.sum() == 40_000 + len(t.streamlines.points)
        assert len(sft.get(0)[0]) == 40_000
        assert sft.lengths_mm[0] == pytest.approx(np.linalg.norm(t.affine[:3, :3] @ [9, 9, 7]), rel=1e-4)


def test_load_only_some(made):
    dataset = MultiSubjectDataset(made[0])
    with pytest.raises(RuntimeError, match="load_data"):
        dataset.training_set  # noqa: B018
    dataset.load_data(load_testing=False, volume_groups=[], subj_id=["sub-0", "sub-1"])
    assert len(dataset.testing_set) == 0 and dataset.training_set[0].volumes == {}
    assert list(dataset.training_set[0].streamlines) == ["streamlines"]
    with pytest.raises(DataError, match="no such subject"):
        dataset.load_data(subj_id="sub-9")
    with pytest.raises(DataError, match="no such group; there are input, streamlines"):
        dataset.load_data(volume_groups=["inputs"])
    with pytest.raises(KeyError, match="no subject 'sub-1' in the training set"):
        dataset.training_set["sub-1"]


def test_settings_of_the_file(tmp_path):
    path, _ = make_file(tmp_path, step_size=1.5)
    dataset = MultiSubjectDataset(path)
    assert (dataset.step_size, dataset.nb_points, dataset.compress) == (1.5, None, None)


def test_linked_volumes_are_one_array(tmp_path):
    path, _ = make_file(tmp_path, splits={"training": ["sub-0 0.8"], "validation": ["sub-0 0.2"]})
    for lazy in (False, True):
        dataset = MultiSubjectDataset(path, lazy=lazy).load_data()
        a, b = (s[0].volumes["input"].volume for s in (dataset.training_set, dataset.validation_set))
        assert a is b


def test_cache_is_bounded(made):
    one = 4 * 3 * int(np.prod(SHAPE))
    dataset = MultiSubjectDataset(made[0], lazy=True, cache_bytes=int(2.5 * one)).load_data()
    volumes = [dataset.subject(f"sub-{i}").volumes["input"] for i in range(3)]
    first = volumes[0].volume
    assert volumes[0].volume is first
    volumes[1].volume, volumes[0].volume, volumes[2].volume  # noqa: B018
    assert dataset._cache.nbytes == 2 * one
    assert volumes[0].volume is first  # used after sub-1, which went
    small = MultiSubjectDataset(made[0], lazy=True, cache_size=1).load_data()
    for i in range(3):
        small.subject(f"sub-{i}").volumes["input"].volume  # noqa: B018
    assert len(small._cache) == 1
    cache = ByteCache(10)
    assert cache.get("big", lambda: ("x", 100)) == "x" and len(cache) == 1


def _read(dataset, ids, queue):
    s = dataset.training_set[0]
    queue.put((s.streamlines["streamlines"].get(ids).points, float(s.volumes["input"].volume.data.sum())))


@pytest.mark.parametrize("lazy, method", [(False, "fork"), (True, "fork"), (True, "spawn"), (True, "forkserver")])
def test_in_another_process(made, lazy, method):
    dataset = MultiSubjectDataset(made[0], lazy=lazy).load_data()
    ids = [3, 1, 20]
    here = dataset.training_set[0].streamlines["streamlines"].get(ids).points
    context = mp.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_read, args=(dataset, ids, queue))
    process.start()
    there, total = queue.get(timeout=60)
    process.join(60)
    assert process.exitcode == 0 and np.array_equal(here, there)
    assert total == float(dataset.training_set[0].volumes["input"].volume.data.sum())


def test_from_many_threads(made):
    dataset = MultiSubjectDataset(made[0], lazy=True, cache_size=1).load_data()
    eager = MultiSubjectDataset(made[0]).load_data()

    def work(i):
        name, ids = f"sub-{i % 3}", np.random.default_rng(i).integers(0, 30, 10)
        a, b = dataset.subject(name), eager.subject(name)
        return (np.array_equal(a.streamlines["streamlines"].get(ids).points, b.streamlines["streamlines"].get(ids).points)
                and np.array_equal(a.volumes["input"].volume.data, b.volumes["input"].volume.data))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(60)))


def test_forked_while_another_thread_reads(made):
    """No lock that a thread held at the time of the fork is waited for in the child."""
    dataset = MultiSubjectDataset(made[0], lazy=True, cache_size=1).load_data()
    stop = threading.Event()

    def keep_reading():
        while not stop.is_set():
            for i in range(3):
                s = dataset.subject(f"sub-{i}")
                s.streamlines["streamlines"].get([0])
                s.volumes["input"].volume.data.sum()

    thread = threading.Thread(target=keep_reading)
    thread.start()
    try:
        expected = None
        for _ in range(5):
            queue = mp.get_context("fork").Queue()
            process = mp.get_context("fork").Process(target=_read, args=(dataset, [3, 1], queue))
            process.start()
            points, total = queue.get(timeout=60)
            process.join(60)
            expected = points if expected is None else expected
            assert process.exitcode == 0 and np.array_equal(points, expected)
    finally:
        stop.set()
        thread.join()


def test_few_open_files(made):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    datasets = [MultiSubjectDataset(made[0], lazy=True).load_data() for _ in range(5)]
    for d in datasets:
        for name in ("sub-0", "sub-1", "sub-2"):
            d.subject(name).streamlines["streamlines"].get([0])
    if before:
        assert len(os.listdir("/proc/self/fd")) - before <= 10  # two for each dataset, however many subjects
        del datasets, d
        assert len(os.listdir("/proc/self/fd")) <= before


def test_truncated_under_an_open_reader(tmp_path):
    path, _ = make_file(tmp_path)
    sft = MultiSubjectDataset(path, lazy=True).load_data().subject("sub-2").streamlines["streamlines"]
    os.truncate(path, 1000)
    with pytest.raises(DataError, match="truncated"):
        sft.get()


def test_replaced_under_a_reader(tmp_path):
    path, _ = make_file(tmp_path)
    dataset = MultiSubjectDataset(path, lazy=True).load_data()
    points = dataset.training_set[0].streamlines["streamlines"].get().points
    parcel = pickle.dumps(dataset)
    create_hdf5(tmp_path, path, CONFIG, {"training": ["sub-1"]}, overwrite=True, progress=False)
    assert np.array_equal(dataset.training_set[0].streamlines["streamlines"].get().points, points)  # the open file is the old one
    with pytest.raises(DataError, match="changed since"):
        pickle.loads(parcel).training_set[0].streamlines["streamlines"].get()


@pytest.mark.parametrize("how", ["big-endian", "float64", "float16", "chunked", "gzip", "center"])
@pytest.mark.parametrize("lazy", [False, True])
def test_other_ways_to_store_points(tmp_path, made, how, lazy):
    path = shutil.copy(made[0], tmp_path / "x.hdf5")
    with h5py.File(path, "a") as h5:
        g = h5["sub-0/streamlines"]
        data = g["data"][:]
        del g["data"]
        if how == "center":
            g.attrs["origin"] = "Origin.NIFTI"
            data = data - np.float32(0.5)
        kind = {"big-endian": ">f4", "float64": "<f8", "float16": "<f2"}.get(how, "<f4")
        g.create_dataset("data", data=data.astype(kind), chunks=(50, 3) if how in ("chunked", "gzip") else None,
                         compression="gzip" if how == "gzip" else None)
    got = MultiSubjectDataset(path, lazy=lazy).load_data().subject("sub-0").streamlines["streamlines"].get([9, 2, 3, 4])
    assert got.points.dtype == np.float32 and got.points.dtype.isnative
    assert np.allclose(got.points, made[1]["sub-0"].streamlines[[9, 2, 3, 4]].points, atol=1e-2 if how == "float16" else 1e-4)


def _damage(h5, what):
    g, v = h5["sub-0/streamlines"], h5["sub-0/input"]
    if what == "offset negative":
        g["offsets"][1] = -5
    elif what == "offsets decrease":
        g["offsets"][3] = g["offsets"][2] - 1
    elif what == "offset past the end":
        g["offsets"][-1] = 10**9
    elif what == "lengths do not add up":
        g["lengths"][4] += 1
    elif what == "more points than lengths say":
        d = g["data"][:]
        del g["data"]
        g["data"] = np.concatenate([d, d[:3]])
    elif what == "length negative":
        g["lengths"][4] = -1
    elif what == "nan":
        g["data"][5, 1] = np.nan
    elif what == "infinite":
        g["data"][5, 1] = np.inf
    elif what == "offsets are floats":
        o = g["offsets"][:]
        del g["offsets"]
        g["offsets"] = o.astype(float)
    elif what == "no lengths":
        del g["lengths"]
    elif what == "no origin":
        del g.attrs["origin"]
    elif what == "unknown space":
        g.attrs["space"] = "Space.RASMM"
    elif what == "singular affine":
        g.attrs["affine"] = np.zeros((4, 4))
    elif what == "singular affine of the volume":
        v.attrs["affine"] = np.diag([1.0, 1, 0, 1])
    elif what == "type":
        v.attrs["type"] = "tensor"
    elif what == "no type":
        del v.attrs["type"]
    elif what == "points of shape (N, 2)":
        d = g["data"][:, :2]
        del g["data"]
        g["data"] = d
    elif what == "volume of text":
        del v["data"]
        v["data"] = "voxels"
    elif what == "no data":
        del v["data"]
    elif what == "dps rows":
        d = g["data_per_streamline/bundle"][:-1]
        del g["data_per_streamline/bundle"]
        g["data_per_streamline/bundle"] = d
    elif what == "subject missing":
        del h5["sub-0"]


@pytest.mark.parametrize("what", [
    "offset negative", "offsets decrease", "offset past the end", "lengths do not add up", "more points than lengths say",
    "length negative", "nan", "infinite",
    "offsets are floats", "no lengths", "no origin", "unknown space", "singular affine", "singular affine of the volume", "type",
    "no type", "points of shape (N, 2)", "volume of text", "no data", "dps rows", "subject missing"])
@pytest.mark.parametrize("lazy", [False, True])
def test_damaged_files(tmp_path, made, what, lazy):
    path = shutil.copy(made[0], tmp_path / "x.hdf5")
    with h5py.File(path, "a") as h5:
        _damage(h5, what)
    before = hashlib.blake2b(path.read_bytes()).digest()
    with pytest.raises(DataError) as e:
        dataset = MultiSubjectDataset(path, lazy=lazy).load_data()
        dataset.subject("sub-0").streamlines["streamlines"].get()
    assert e.value.file == str(path) and e.value.subject == "sub-0"
    assert what == "subject missing" or e.value.group in ("streamlines", "input")
    assert hashlib.blake2b(path.read_bytes()).digest() == before


def test_truncated_file(tmp_path, made):
    for size in (0, 7, 500, 5000, os.path.getsize(made[0]) - 100):
        path = tmp_path / f"{size}.hdf5"
        path.write_bytes(made[0].read_bytes()[:size])
        with pytest.raises(DataError, match="truncated or no HDF5"):
            MultiSubjectDataset(path).load_data()


@pytest.mark.parametrize("locking", [None, True, False])
def test_readable_while_open_in_this_process(made, locking):
    """HDF5 refuses a second handle with another locking flag."""
    with h5py.File(made[0], "r", locking=locking):
        assert len(MultiSubjectDataset(made[0]).load_data().training_set) == 1


def test_reprs(made):
    dataset = MultiSubjectDataset(made[0])
    assert "not loaded" in repr(dataset) and "<pre>" in dataset._repr_html_()
    dataset.load_data()
    assert "30 streamlines" in repr(dataset) and "<td" in dataset._repr_html_()


@pytest.mark.real
@pytest.mark.skipif(data_folder() is None, reason="TRACTKIT_DATA is not set")
@pytest.mark.parametrize("lazy", [False, True])
def test_file_of_dwi_ml(lazy):
    sample = data_folder() / "dwi_ml_sample"
    dataset = MultiSubjectDataset(sample / "data.hdf5", lazy=lazy).load_data()
    assert [s.subjects for s in (dataset.training_set, dataset.validation_set, dataset.testing_set)] == [["sub-1"], ["sub-2"], ["sub-3"]]
    for i in (1, 2, 3):
        sft, source = dataset.subject(f"sub-{i}").streamlines["streamlines"], Tractogram.load(sample / f"source/ready/sub-{i}/bundle.trk")
        got = sft.get()
        assert got.points.dtype == np.float32 and np.allclose(got.points, source.streamlines.points, atol=1e-4)
        assert np.allclose(sft.lengths_mm, source.lengths_mm, rtol=1e-4)
        assert np.allclose(sft.dps["weight"], source.dps["weight"], atol=1e-6)
    assert len(dataset.fingerprint()) == 32
