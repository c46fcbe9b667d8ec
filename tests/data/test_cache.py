"""Volumes beyond the cache: what fits is kept, the next one is fetched, the wait is counted, and the user is told."""

import pickle
import threading
import time

import numpy as np
import pytest
import torch
from helpers_data import make_file
from helpers_training import same_states, streamline_trainer
from helpers_waiting import until

from tractkit.data.cache import LoopCache, free_memory, share_of_memory
from tractkit.data.dataset import MultiSubjectDataset
from tractkit.data.interpolation import GroupInputs
from tractkit.data.loader import BatchLoaderOneInput
from tractkit.data.sampler import BatchIDSampler


def share_found(cache, uses):
    made = []
    for key in uses:
        assert cache.get(key, lambda key=key: (made.append(key) or key, 1)) == key
        assert cache.nbytes <= max(cache.limit(), 1)
    return 1 - len(made) / len(uses)


@pytest.mark.parametrize("n", [5, 20, 39])
def test_of_a_round_larger_than_the_cache_what_fits_is_kept(n):
    assert share_found(LoopCache(n), list(range(40)) * 50) > 0.9 * n / 40
    assert share_found(LoopCache(2**30, n), list(range(40)) * 50) > 0.9 * n / 40


def test_what_is_needed_for_a_while_is_kept_for_a_while():
    pairs = [k for pair in np.random.default_rng(0).integers(0, 40, (200, 2)).tolist() for k in pair * 10]
    assert share_found(LoopCache(5), pairs) > 0.85
    validation = [k for _ in range(5) for k in list(range(30)) * 10 + list(range(30, 40)) * 10]
    assert share_found(LoopCache(20), validation) > 0.5


def test_an_item_too_large_is_kept_alone_and_nothing_with_no_items():
    cache = LoopCache(10)
    assert cache.get("a", lambda: ("A", 100)) == "A" and list(cache) == ["a"]
    assert cache.get("b", lambda: ("B", 100)) == "B" and len(cache) == 1
    assert share_found(LoopCache(10, 0), [1, 1, 1]) == 0


def test_it_is_safe_in_threads_processes_and_after_errors():
    cache, made = LoopCache(100), []
    threads = [threading.Thread(target=cache.get, args=("x", lambda: (made.append(1) or time.sleep(0.05) or "X", 1)))
               for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert made == [1]
    with pytest.raises(OSError):
        cache.get("y", lambda: open("/nonexistent/file"))
    assert cache.get("y", lambda: ("Y", 1)) == "Y"
    there = pickle.loads(pickle.dumps(cache))
    assert len(there) == 0 and there.limit() == 100


def test_items_are_fetched_ahead_while_there_is_room_and_in_place_of_what_is_overdue():
    cache, made, over = LoopCache(4), [], threading.Event()

    def read():
        for k in [0, 1, 2, 3, 4, 5]:
            cache.fetch(k, lambda k=k: (made.append(k) or k, 1), 1, over.is_set)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    until(lambda: len(made) == 4)
    for _ in range(3):
        for k in range(4):
            assert cache.get(k, lambda: pytest.fail("it was fetched")) == k
    assert cache.get(9, lambda: (9, 1)) == 9 and made == [0, 1, 2, 3]  # full, and all are needed again soon
    for _ in range(6):
        for k in (0, 1, 9):  # 2 and 3 are needed no longer
            cache.get(k, lambda k=k: (k, 1))
    until(lambda: 4 in made)
    assert cache.nbytes + len(cache._ready) <= 4
    over.set()
    cache.drop_ready()
    thread.join(60)
    assert not thread.is_alive()


def test_the_memory_of_a_control_group_bounds_the_default(tmp_path, monkeypatch):
    machine, process = tmp_path / "meminfo", tmp_path / "cgroup"
    machine.write_text("MemTotal: 100 kB\nMemFree: 1 kB\nMemAvailable:    80 kB\n")
    process.write_text("0::/job/step\n")
    assert free_memory(tmp_path, process, machine) == 80 * 1024
    (tmp_path / "job/step").mkdir(parents=True)
    (tmp_path / "job/step/memory.max").write_text("max\n")
    (tmp_path / "job/memory.max").write_text("50000\n")
    (tmp_path / "job/memory.current").write_text("30000\n")
    (tmp_path / "job/memory.stat").write_text("anon 1\ninactive_file 5000\n")
    assert free_memory(tmp_path, process, machine) == 25000
    process.write_text("4:memory:/old\n0::/\n")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text("20000\n")
    (tmp_path / "memory/memory.usage_in_bytes").write_text("8000\n")
    assert free_memory(tmp_path, process, machine) == 12000
    assert free_memory(tmp_path, tmp_path / "none", tmp_path / "none") == 2**32
    assert share_of_memory() <= free_memory() // 2 + 2**28
    whole = share_of_memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert share_of_memory() < whole / 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_file(tmp_path_factory.mktemp("data"), n_subjects=5, n=30, points=(12, 20))[0]


def lazy_trainer(data, folder, name, volumes, **options):
    trainer = streamline_trainer(data, folder, name, max_epochs=2, progress=False, **options)
    dataset = MultiSubjectDataset(data, lazy=True, cache_bytes=volumes * one_volume(data)).load_data()
    trainer.batch_loader.dataset = dataset
    for inputs in trainer.batch_loader.inputs.values():
        inputs.dataset = dataset
    return trainer


def one_volume(data):
    return MultiSubjectDataset(data, lazy=True).load_data().subject("sub-0").volumes["input"].nbytes


def test_bits_do_not_depend_on_the_cache_and_the_user_is_told(data, tmp_path):
    states, told = {}, {}
    for volumes in (3, 100):
        trainer = lazy_trainer(data, tmp_path, f"run-{volumes}", volumes, max_batches_per_epoch_training=3)
        states[volumes] = trainer.train_and_validate()
        told[volumes] = [text for text in trainer.messages if "cache_bytes" in text]
        assert trainer.batch_loader.dataset.volume_cache.nbytes <= volumes * one_volume(data)
    assert same_states(states[3], states[100]) == []
    assert told[100] == []
    assert "of which 3 can be kept in memory" in told[3][0] and "nb_subjects_per_batch" in told[3][0]


def test_on_a_device_too(data, tmp_path, monkeypatch):
    """The way of a device, on the CPU."""
    loader = streamline_trainer(data, tmp_path, "run", device_bytes=2 * one_volume(data) + 1).batch_loader
    (text,) = loader.explain_caches(torch.device("cuda"))
    assert "of which 2 can be kept on cuda" in text and "larger device_bytes" in text
    assert loader.explain_caches(torch.device("cpu")) == []  # it is in memory
    left_open = BatchLoaderOneInput(loader.dataset, None, "input", "streamlines")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 2**30, 80 * 2**30))
    assert left_open.explain_caches(torch.device("cuda")) == []
    assert left_open.device_cache.limit() == 2 * 2**30 and left_open.settings()["device_bytes"] is None


def test_volumes_are_fetched_ahead_of_the_batches_and_the_wait_is_counted(data, monkeypatch):
    dataset = MultiSubjectDataset(data, lazy=True, cache_bytes=2 * one_volume(data)).load_data()
    loader = BatchLoaderOneInput(dataset, None, "input", "streamlines")
    plan, cpu, cache = BatchIDSampler(dataset, "streamlines", 40).plan(0), torch.device("cpu"), dataset.volume_cache
    batches = [loader.load_batch_streamlines(ids) for ids in plan]
    expected = [loader.load_batch_inputs(b.points, b) for b in batches]
    assert loader.take_waited() > 0 and loader.take_waited() == 0
    readers, read = set(), type(dataset.subject("sub-0").volumes["input"].source).load
    monkeypatch.setattr(type(dataset.subject("sub-0").volumes["input"].source), "load",
                        lambda self: (readers.add(threading.current_thread().name), read(self))[1])
    cache.clear()
    first = plan[0][0][0]
    with loader.fetching(plan, 0, len(plan), cpu):
        until(lambda: dataset.subject(first).volumes["input"].key in cache._ready)  # before it is asked for
        found = [loader.load_batch_inputs(b.points, b) for b in batches]
    assert "tractkit-volumes" in readers and not cache._ready
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not [t for t in threading.enumerate() if t.name == "tractkit-volumes"]


def test_the_wait_for_volumes_is_shown(data, tmp_path, monkeypatch):
    def slowly(self, get):
        self.waited += 3600
        return get()

    monkeypatch.setattr(GroupInputs, "_wait_for", slowly)
    trainer = lazy_trainer(data, tmp_path, "run", 1)
    trainer.train_and_validate()
    assert trainer.status.waiting > 0.9
