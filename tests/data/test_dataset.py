"""dataset: what was written is what is read, in memory and from disk, in any process; damage is an error."""

import hashlib
import multiprocessing as mp
import os
import pickle
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
from helpers_data import CONFIG, SHAPE, make_file, make_subject, random_lines, world_volume
from helpers_loading import Collate, loaded_beside

from tractkit.core.files import DataError
from tractkit.data.dataset import MultiSubjectDataset
from tractkit.hdf5.create import add_subject, create_hdf5
from tractkit.hdf5.local_file import ByteCache
from tractkit.spatial.streamlines import Streamlines
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume


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
            rows = (
                np.atleast_1d(np.arange(len(t))[ids if not (isinstance(ids, list) and not ids) else slice(0)])
                if ids is not None
                else slice(None)
            )
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
    eager, lazy = (
        MultiSubjectDataset(made[0], lazy=b).load_data().subject("sub-1").streamlines["streamlines"]
        for b in (False, True)
    )
    ids = np.random.default_rng(0).permutation(len(eager))
    assert np.array_equal(eager.get(ids).points, lazy.get(ids).points)


def test_lengths_beyond_int16(tmp_path):
    """A streamline of 40,000 points: dwi_ml's int16 lengths would be negative."""
    t = make_subject(tmp_path / "a", np.random.default_rng(0), n=3)
    line = np.linspace([0, 0, 0], [9, 9, 7], 40_000)
    Tractogram(Streamlines.from_list([line, *t.streamlines]), t.affine, SHAPE, dps={"bundle": np.zeros(4)}).save(
        tmp_path / "a/lines.trk"
    )
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
    there, total = queue.get(timeout=240)
    process.join(60)
    assert process.exitcode == 0 and np.array_equal(here, there)
    assert total == float(dataset.training_set[0].volumes["input"].volume.data.sum())


def test_from_many_threads(made):
    dataset = MultiSubjectDataset(made[0], lazy=True, cache_size=1).load_data()
    eager = MultiSubjectDataset(made[0]).load_data()

    def work(i):
        name, ids = f"sub-{i % 3}", np.random.default_rng(i).integers(0, 30, 10)
        a, b = dataset.subject(name), eager.subject(name)
        return np.array_equal(
            a.streamlines["streamlines"].get(ids).points, b.streamlines["streamlines"].get(ids).points
        ) and np.array_equal(a.volumes["input"].volume.data, b.volumes["input"].volume.data)

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
            points, total = queue.get(timeout=240)
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
    assert np.array_equal(
        dataset.training_set[0].streamlines["streamlines"].get().points, points
    )  # the open file is the old one
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
    assert np.allclose(
        got.points, made[1]["sub-0"].streamlines[[9, 2, 3, 4]].points, atol=1e-2 if how == "float16" else 1e-4
    )


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


@pytest.mark.parametrize(
    "what",
    [
        "offset negative",
        "offsets decrease",
        "offset past the end",
        "lengths do not add up",
        "more points than lengths say",
        "length negative",
        "nan",
        "infinite",
        "offsets are floats",
        "no lengths",
        "no origin",
        "unknown space",
        "singular affine",
        "singular affine of the volume",
        "type",
        "no type",
        "points of shape (N, 2)",
        "volume of text",
        "no data",
        "dps rows",
        "subject missing",
    ],
)
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
    assert "not loaded" in repr(dataset) and "not loaded" in dataset._repr_html_()
    dataset.load_data()
    assert "30 streamlines" in repr(dataset) and "<td" in dataset._repr_html_()
    words = repr(dataset.training_set[0])
    assert (
        "MRIData(sub-0/input: 14 × 11 × 9 × 3, voxels of " in words
        and "mm, in memory)" in words
        and "array" not in words
    )


@pytest.mark.real
@pytest.mark.parametrize("lazy", [False, True])
def test_file_of_dwi_ml(lazy, real_data):
    sample = real_data / "dwi_ml_sample"
    dataset = MultiSubjectDataset(sample / "data.hdf5", lazy=lazy).load_data()
    assert [s.subjects for s in (dataset.training_set, dataset.validation_set, dataset.testing_set)] == [
        ["sub-1"],
        ["sub-2"],
        ["sub-3"],
    ]
    for i in (1, 2, 3):
        sft, source = (
            dataset.subject(f"sub-{i}").streamlines["streamlines"],
            Tractogram.load(sample / f"source/ready/sub-{i}/bundle.trk"),
        )
        got = sft.get()
        assert got.points.dtype == np.float32 and np.allclose(got.points, source.streamlines.points, atol=1e-4)
        assert np.allclose(sft.lengths_mm, source.lengths_mm, rtol=1e-4)
        assert np.allclose(sft.dps["weight"], source.dps["weight"], atol=1e-6)
        connectivity = sft.connectivity
        assert (connectivity.type, connectivity.nb_blocs.tolist()) == (
            "from_blocs",
            [4, 4, 4],
        ) and connectivity.matrix.shape == (64, 64)
        assert np.array_equal(connectivity.matrix, np.load(sample / f"source/ready/sub-{i}/conn.npy"))
        assert np.array_equal(sft.nb_points, source.streamlines.nb_points) and sft.dps["weight"].shape == (60, 1)
        ids = [7, 50, 7, 0]  # lazy, dps and a list of ids: an error in dwi_ml
        dipy = sft.as_sft(ids)
        assert np.allclose(dipy.data_per_streamline["weight"], source.dps["weight"][ids], atol=1e-6)
        assert np.allclose(dipy.streamlines.get_data(), source[ids].rasmm().points, atol=1e-3)
        mask = dataset.subject(f"sub-{i}").volumes["wm_mask"].volume
        assert np.array_equal(mask.data[..., 0] > 0, Volume.load(sample / f"source/ready/sub-{i}/wm.nii.gz").data > 0)
        stored = h5py.File(sample / "data.hdf5")[f"sub-{i}/input/data"][()]
        assert np.array_equal(dataset.subject(f"sub-{i}").volumes["input"].volume.data, stored)
    assert len(dataset.fingerprint()) == 32


# ---- what goes with streamlines --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rich(made, tmp_path_factory):
    """The file with data per point, groups, two kinds of connectivity, a second and a compressed volume group."""
    path = shutil.copy(made[0], tmp_path_factory.mktemp("rich") / "rich.hdf5")
    with h5py.File(path, "a") as h5:
        for i, name in enumerate(("sub-0", "sub-1", "sub-2")):
            g, n = h5[f"{name}/streamlines"], len(made[1][name])
            points = made[1][name].streamlines.points
            g["data_per_point/x"], g["data_per_point/xyz"] = points[:, :1], points.astype(np.float32)
            g["groups/left"], g["groups/none"] = np.arange(0, n, 3), np.zeros(0, np.int64)
            g["connectivity_matrix"] = np.eye(8, dtype=bool)
            g.attrs["connectivity_matrix_type"] = "from_labels" if i else "from_blocs"
            if i:
                g["connectivity_label_volume"] = np.full(SHAPE, i, np.int16)
            else:
                g.attrs["connectivity_nb_blocs"] = [2, 2, 2]
            for copy, options in (
                ("mask", {}),
                ("gzip", {"compression": "gzip"}),
                ("lzf", {"compression": "lzf", "shuffle": True}),
            ):
                v = h5.create_group(f"{name}/{copy}")
                v.attrs.update(h5[f"{name}/input"].attrs)
                v.create_dataset(
                    "data",
                    data=h5[f"{name}/input/data"][..., :1] if copy == "mask" else h5[f"{name}/input/data"][()],
                    **options,
                )
    return path, made[1]


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("ids", [None, 4, [9, 2, 2, -1], slice(1, 9, 2), []])
def test_all_that_goes_with_streamlines(rich, lazy, ids):
    dataset = MultiSubjectDataset(rich[0], lazy=lazy).load_data()
    for name, source in rich[1].items():
        sft = dataset.subject(name).streamlines["streamlines"]
        rows = np.arange(len(source))[slice(None) if ids is None else slice(0) if ids == [] else ids].reshape(-1)
        assert sft.dpp_keys == ("x", "xyz") and sft.dps["bundle"].shape == (len(source), 1)
        dpp, points = sft.get_dpp(ids), sft.get(ids).points
        assert np.allclose(dpp["xyz"], points, atol=1e-4) and np.array_equal(dpp["x"], dpp["xyz"][:, :1])
        t = sft.as_tractogram(ids)
        assert t.dps["bundle"][:, 0].tolist() == rows.tolist() and np.array_equal(t.dpp["xyz"], dpp["xyz"])
        assert sft.groups["left"].dtype == np.int64 and sft.groups["left"].tolist() == list(range(0, len(source), 3))
        assert t.groups["left"].tolist() == [i for i, r in enumerate(rows) if r % 3 == 0] and len(t.groups["none"]) == 0
        if len(rows):
            with pytest.warns(UserWarning, match="cannot hold groups"):
                dipy = sft.as_sft(ids)
            assert np.allclose(dipy.data_per_streamline["bundle"][:, 0], rows) and np.allclose(
                dipy.data_per_point["x"].get_data(), dpp["x"]
            )
            assert np.allclose(dipy.streamlines.get_data(), source[rows].rasmm().points, atol=1e-3)
            dipy.to_vox(), dipy.to_center()
            assert np.allclose(dipy.streamlines.get_data(), points, atol=1e-3)


@pytest.mark.parametrize("lazy", [False, True])
def test_connectivity(rich, made, lazy):
    dataset = MultiSubjectDataset(rich[0], lazy=lazy).load_data()
    blocs, labels = (dataset.subject(f"sub-{i}").streamlines["streamlines"].connectivity for i in (0, 1))
    assert (blocs.type, blocs.nb_blocs.tolist(), blocs.labels) == ("from_blocs", [2, 2, 2], None)
    assert (
        (labels.type, labels.nb_blocs) == ("from_labels", None)
        and labels.labels.shape == SHAPE
        and (labels.labels == 1).all()
    )
    assert blocs.matrix.dtype == bool and blocs.matrix.sum() == 8
    assert MultiSubjectDataset(made[0]).load_data().training_set[0].streamlines["streamlines"].connectivity is None


@pytest.mark.parametrize("lazy", [False, True])
def test_points_are_no_millimetres(tmp_path, lazy):
    """dwi_ml's lazy lengths are mm, and the number of points is counted from them."""
    path, sources = make_file(tmp_path, points=(20, 60))
    for name, t in sources.items():
        sft = MultiSubjectDataset(path, lazy=lazy).load_data().subject(name).streamlines["streamlines"]
        assert sft.nb_points.tolist() == [len(s) for s in t.streamlines] and sft.nb_points.sum() == len(
            sft.get().points
        )
        world = [np.linalg.norm(np.diff(s, axis=0), axis=1).sum() for s in t.rasmm()]
        assert np.allclose(sft.lengths_mm, world, rtol=1e-3) and not np.allclose(
            sft.lengths_mm, sft.nb_points, rtol=0.05
        )


def test_lengths_are_counted_where_the_file_has_none(tmp_path, made):
    path = shutil.copy(made[0], tmp_path / "x.hdf5")
    with h5py.File(path, "a") as h5:
        del h5["sub-0/streamlines/euclidean_lengths"]
    for lazy in (False, True):
        sft = MultiSubjectDataset(path, lazy=lazy).load_data().training_set[0].streamlines["streamlines"]
        assert np.allclose(sft.lengths_mm, made[1]["sub-0"].lengths_mm, atol=1e-3)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("cache_size", [None, 0, 1])
def test_several_volume_groups(rich, lazy, cache_size):
    dataset = MultiSubjectDataset(rich[0], lazy=lazy, cache_size=cache_size).load_data(
        volume_groups=["input", "gzip", "lzf", "mask"]
    )
    for name, source in rich[1].items():
        v = dataset.subject(name).volumes
        assert np.allclose(v["input"].volume.data, world_volume(source.affine).data, atol=1e-3)
        for copy in ("gzip", "lzf"):
            assert np.array_equal(v[copy].volume.data, v["input"].volume.data) and v[copy].key != v["input"].key
        assert v["mask"].shape == (*SHAPE, 1) and np.array_equal(v["mask"].volume.data, v["input"].volume.data[..., :1])
    assert len(dataset._cache) == (0 if not lazy else {None: 12, 0: 0, 1: 1}[cache_size])
    only = MultiSubjectDataset(rich[0], lazy=lazy).load_data(
        load_training=False, subj_id="sub-1", volume_groups="mask", streamline_groups=[]
    )
    assert [len(s) for s in (only.training_set, only.validation_set, only.testing_set)] == [0, 1, 0]
    assert list(only.validation_set[0].volumes) == ["mask"] and only.validation_set[0].streamlines == {}


@pytest.mark.parametrize(
    "what",
    [
        "x rows",
        "x of text",
        "left past the end",
        "left negative",
        "left of floats",
        "no blocs",
        "no labels",
        "type",
        "lengths nan",
        "dimensions",
    ],
)
@pytest.mark.parametrize("lazy", [False, True])
def test_damage_beside_streamlines(tmp_path, rich, what, lazy):
    path = shutil.copy(rich[0], tmp_path / "x.hdf5")
    with h5py.File(path, "a") as h5:
        name = "sub-1" if what == "no labels" else "sub-0"
        g = h5[f"{name}/streamlines"]
        new = {
            "x rows": np.zeros((5, 1)),
            "x of text": "text",
            "left past the end": [30],
            "left negative": [-1],
            "left of floats": [0.5],
        }
        if what in new:
            key = f"data_per_point/{what[0]}" if what[0] == "x" else "groups/left"
            del g[key]
            g[key] = new[what]
        elif what == "lengths nan":
            g["euclidean_lengths"][3] = np.nan
        elif what == "no labels":
            del g["connectivity_label_volume"]
        elif what == "no blocs":
            del g.attrs["connectivity_nb_blocs"]
        elif what == "type":
            g.attrs["connectivity_matrix_type"] = "from_nowhere"
        else:
            g.attrs["dimensions"] = [14, 11]
    with pytest.raises(DataError) as e:
        MultiSubjectDataset(path, lazy=lazy).load_data()
    assert (e.value.file, e.value.subject, e.value.group) == (str(path), name, "streamlines")


# ---- a file for each subject -----------------------------------------------------------------------------------


def split_file(path, folder, how="subject"):
    """The same data, with links: to a file for each subject, or for each group, or to a file at its root."""
    (folder / "parts").mkdir(parents=True)
    with h5py.File(path) as whole, h5py.File(folder / "data.hdf5", "w") as master:
        master.attrs.update(whole.attrs)
        for name in whole:
            if how == "subject":
                with h5py.File(folder / f"parts/{name}.hdf5", "w") as one:
                    whole.copy(name, one)
                master[name] = h5py.ExternalLink(f"parts/{name}.hdf5", f"/{name}")
            elif how == "root":
                with h5py.File(folder / f"parts/{name}.hdf5", "w") as one:
                    for group in whole[name]:
                        whole[name].copy(group, one)
                master[name] = h5py.ExternalLink(f"parts/{name}.hdf5", "/")
            else:
                for group in whole[name]:
                    with h5py.File(folder / f"parts/{name}-{group}.hdf5", "w") as one:
                        whole[name].copy(group, one, "here")
                    master.require_group(name)[group] = h5py.ExternalLink(f"parts/{name}-{group}.hdf5", "/here")
    return folder / "data.hdf5"


@pytest.mark.parametrize("how", ["subject", "root", "group"])
@pytest.mark.parametrize("lazy", [False, True])
def test_linked_files(rich, tmp_path, how, lazy, monkeypatch):
    path = split_file(rich[0], tmp_path / "split", how)
    monkeypatch.chdir(tmp_path)
    dataset = MultiSubjectDataset(os.path.relpath(path), lazy=lazy).load_data(volume_groups=["input", "gzip"])
    whole = MultiSubjectDataset(rich[0]).load_data()
    monkeypatch.chdir("/")
    shutil.copytree(tmp_path / "split", tmp_path / "moved")  # links are relative
    for data in (dataset, MultiSubjectDataset(tmp_path / "moved/data.hdf5", lazy=lazy).load_data()):
        keys = set()
        for name in rich[1]:
            a, b = data.subject(name), whole.subject(name)
            assert np.array_equal(
                a.streamlines["streamlines"].get([3, 1]).points, b.streamlines["streamlines"].get([3, 1]).points
            )
            assert np.array_equal(
                a.streamlines["streamlines"].get_dpp()["x"], b.streamlines["streamlines"].get_dpp()["x"]
            )
            for group in ("input", "gzip"):
                assert np.array_equal(a.volumes[group].volume.data, b.volumes[group].volume.data)
                keys.add(a.volumes[group].key)
        assert len(keys) == 6  # equal places of different files are different volumes
    assert set(dataset.training_set[0].volumes) == {"input", "gzip"}
    assert dataset.fingerprint() == whole.fingerprint()


def test_linked_file_missing_or_damaged(rich, tmp_path):
    path = split_file(rich[0], tmp_path / "split")
    dataset = MultiSubjectDataset(path, lazy=True).load_data()
    part = tmp_path / "split/parts/sub-1.hdf5"
    os.truncate(part, 3000)
    with pytest.raises(DataError, match="changed since|truncated") as e:
        dataset.subject("sub-1").streamlines["streamlines"].get()
    assert (e.value.file, e.value.subject) == (str(part), "sub-1")
    dataset.subject("sub-0").streamlines["streamlines"].get()  # the others are well
    for happens, problem in ((lambda: None, "truncated or no HDF5"), (part.unlink, "cannot be opened")):
        happens()
        with pytest.raises(DataError, match=problem) as e:
            MultiSubjectDataset(path).load_data()
        assert (e.value.file, e.value.subject) == (str(part), "sub-1")
        MultiSubjectDataset(path).load_data(load_validation=False)


MANY_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
import numpy as np
from tractkit.data.dataset import MultiSubjectDataset
from torch.utils.data import DataLoader

dataset = MultiSubjectDataset(sys.argv[1], lazy=True, cache_size=2).load_data()
names = dataset.training_set.subjects

def points(name):
    s = dataset.subject(name)
    s.volumes["input"].volume
    return float(s.streamlines["streamlines"].get([1, 3]).points.sum())

for workers in (0, 2):
    found = {name: points(name) for name in names}
    batches = DataLoader(names, batch_size=7, num_workers=workers, collate_fn=lambda b: [points(n) for n in b])
    loaded = [x for batch in batches for x in batch]
    assert loaded == [found[n] for n in names]
print(len(found), len(set(found.values())))
"""


def test_two_hundred_files_with_64_handles(made, tmp_path):
    parts = tmp_path / "parts"
    parts.mkdir()
    names = [f"many-{i}" for i in range(200)]
    with h5py.File(made[0]) as whole, h5py.File(tmp_path / "data.hdf5", "w") as master:
        master.attrs.update(whole.attrs)
        master.attrs["training_subjs"] = np.array(names, dtype=h5py.string_dtype())
        master.attrs["validation_subjs"] = master.attrs["testing_subjs"] = np.array([], dtype=h5py.string_dtype())
        with h5py.File(tmp_path / "one.hdf5", "w") as one:
            whole.copy("sub-0", one, "s")
        for i, name in enumerate(names):
            shutil.copy(tmp_path / "one.hdf5", parts / f"{name}.hdf5")
            with h5py.File(parts / f"{name}.hdf5", "a") as one:
                one["s/streamlines/data"][0:] += np.float32(i / 1000)
            master[name] = h5py.ExternalLink(f"parts/{name}.hdf5", "/s")
    done = subprocess.run(
        [sys.executable, "-c", MANY_FILES, str(tmp_path / "data.hdf5")], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["200", "200"], done.stderr[-2000:]


# ---- workers and threads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, workers", [("fork", 1), ("fork", 2), ("spawn", 1), ("forkserver", 2)])
def test_dataloader_workers_beside_a_reading_thread(rich, method, workers):
    dataset, eager = (MultiSubjectDataset(rich[0], lazy=lazy, cache_size=0).load_data() for lazy in (True, False))
    rng = np.random.default_rng(0)
    items = [(f"sub-{i % 3}", rng.integers(0, 30, 10)) for i in range(24)]
    read, expected = Collate(dataset, "gzip"), Collate(eager, "gzip")(items)

    def same(some, others):
        return all(np.array_equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(some, others, strict=True))

    got = loaded_beside(
        lambda: same(read(items[:3]), expected[:3]),
        items,
        read,
        batch_size=4,
        num_workers=workers,
        multiprocessing_context=method,
    )
    assert same(got, expected)


EPOCH = """
import os, sys
import numpy as np
from tractkit.data.dataset import MultiSubjectDataset

def anonymous():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("RssAnon"))

dataset = MultiSubjectDataset(sys.argv[1], lazy=True, cache_size=1).load_data()
peak = 0
for name in dataset.training_set.subjects:
    s = dataset.subject(name)
    data = s.streamlines["streamlines"]
    for i in range(0, len(data), 200):
        s.volumes["input"].volume.data.sum() + data.get(np.arange(i, min(i + 200, len(data)))).points.sum()
        peak = max(peak, anonymous())
print(peak)
"""


@pytest.mark.linux
def test_memory_of_a_pass_does_not_grow_with_the_file(tmp_path):
    shape, peaks, sizes = (64, 64, 64, 8), [], []  # 8 MB a volume
    volume = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    lines = random_lines(np.random.default_rng(0), 1000, shape[:3], points=(50, 100))
    for n in (4, 12):
        with h5py.File(tmp_path / f"{n}.hdf5", "w") as h5:
            h5.attrs.update(
                {
                    f"{split}_subjs": np.array(
                        [f"s{i}" for i in range(n)] if split == "training" else [], dtype=h5py.string_dtype()
                    )
                    for split in ("training", "validation", "testing")
                }
            )
            for i in range(n):
                v, g = h5.create_group(f"s{i}/input"), h5.create_group(f"s{i}/streamlines")
                v["data"], g["data"], g["offsets"], g["lengths"] = (
                    volume,
                    lines.points + 0.5,
                    lines.offsets[:-1],
                    lines.nb_points,
                )
                g["euclidean_lengths"] = lines.lengths()
                v.attrs.update(type="volume", affine=np.eye(4))
                g.attrs.update(
                    type="streamlines",
                    affine=np.eye(4),
                    space="Space.VOX",
                    origin="Origin.TRACKVIS",
                    dimensions=shape[:3],
                )
        done = subprocess.run(
            [sys.executable, "-c", EPOCH, str(tmp_path / f"{n}.hdf5")], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
        sizes.append(os.path.getsize(tmp_path / f"{n}.hdf5") // 1024)
    assert peaks[1] - peaks[0] < 0.03 * (sizes[1] - sizes[0])


@pytest.mark.parametrize("symlink", [False, True])
def test_a_subject_is_added_under_an_open_dataset(tmp_path, symlink):
    """A file for each subject, as `create_hdf5` and `add_subject` write them; the master is replaced, the subjects are
    not."""
    path, sources = make_file(tmp_path, one_file_per_subject=True)
    dataset = MultiSubjectDataset(path, lazy=True).load_data()
    new = make_subject(tmp_path / "sub-9", np.random.default_rng(9))
    add_subject(path, tmp_path, "sub-9", "testing", progress=False)
    if symlink:
        (tmp_path / "elsewhere").mkdir()
        path = tmp_path / "elsewhere/link.hdf5"
        path.symlink_to(tmp_path / "data.hdf5")
    again = MultiSubjectDataset(path, lazy=True).load_data()
    assert again.testing_set.subjects == ["sub-2", "sub-9"] and dataset.testing_set.subjects == ["sub-2"]
    for data in (dataset, again, pickle.loads(pickle.dumps(dataset))):
        for name, source in sources.items():
            assert np.allclose(
                data.subject(name).streamlines["streamlines"].get([4]).points, source.streamlines[4], atol=1e-4
            )
    assert np.allclose(
        again.subject("sub-9").streamlines["streamlines"].get().points, new.streamlines.points, atol=1e-4
    )
