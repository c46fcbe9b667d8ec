"""Checkpoints: every tree comes back as it was, and no damage goes unnoticed."""

import errno
import math
import os
import pickle
import struct
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tractkit.core import files
from tractkit.core.files import DataError
from tractkit.runs import checkpoint
from tractkit.runs.checkpoint import Checkpoints, load_checkpoint, pack_tree, save_checkpoint, unpack_tree

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
keys = st.text(max_size=4) | st.integers() | st.booleans() | st.none() | st.tuples(st.integers(), st.text(max_size=2)) \
    | st.sampled_from(["tuple", "dict", "tensor", "float", "array", "a/b", "0"])
tensors = st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16, torch.uint8]).flatmap(
    lambda d: st.lists(st.integers(0, 3), max_size=3).map(lambda shape: torch.ones(shape).to(d)))
trees = st.recursive(
    scalars | tensors | tensors.map(lambda t: t.float().numpy()),
    lambda t: st.lists(t, max_size=3) | st.tuples(t, t) | st.dictionaries(keys, t, max_size=3),
    max_leaves=12,
)


def same(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return (
            list(a) == list(b)
            and all(type(x) is type(y) for x, y in zip(a, b, strict=True))
            and all(same(a[k], b[k]) for k in a)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b) or (math.isnan(a) and math.isnan(b))
    return a == b


@given(trees)
@settings(max_examples=150, deadline=None)
def test_any_tree_comes_back(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp() / "tree.ckpt"
    save_checkpoint(path, tree)
    assert same(load_checkpoint(path), tree)


def test_names_that_collide():
    tree = {0: torch.zeros(1), "0": torch.ones(1), "a/b": torch.zeros(2), "a": {"b": torch.ones(2)}}
    packed, found = pack_tree(tree)
    assert len(found) == 4 and same(unpack_tree(packed, found), tree)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RAdam", "SGD"])
def test_optimizers_come_back(tmp_path, name):
    model = nn.Linear(3, 2)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    save_checkpoint(tmp_path / "o", optimizer.state_dict())
    assert same(load_checkpoint(tmp_path / "o"), optimizer.state_dict())


def test_views_and_strides(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tree = {"t": base.T, "row": base[1], "all": base, "again": base, "expanded": torch.ones(1).expand(5)}
    save_checkpoint(tmp_path / "v", tree)
    back = load_checkpoint(tmp_path / "v")
    assert same(back, tree) and back["again"] is back["all"] and back["t"] is not back["all"]


def test_what_cannot_be_saved_is_named():
    with pytest.raises(TypeError, match="/names: an array of <U1"):
        pack_tree({"names": np.array(["a"])})
    with pytest.raises(TypeError, match="/a/1: a set"):
        pack_tree({"a": [1, {2}]})
    with pytest.raises(TypeError, match="a Linear"):
        pack_tree({"m": nn.Linear(1, 1)})


def test_every_damage_is_noticed(tmp_path):
    path, tree = tmp_path / "c", {"w": torch.arange(20.0), "n": {1: (2, "x")}}
    save_checkpoint(path, tree)
    good = path.read_bytes()
    for where in range(0, len(good), 3):
        for bit in (0, 6):
            bad = bytearray(good)
            bad[where] ^= 1 << bit
            path.write_bytes(bad)
            try:
                assert same(load_checkpoint(path), tree), f"bit {bit} of byte {where}"  # white space in the header
            except DataError:
                pass
    for size in range(0, len(good), 7):
        path.write_bytes(good[:size])
        with pytest.raises(DataError, match="damaged"):
            load_checkpoint(path)
    path.write_bytes(good + b"x")
    with pytest.raises(DataError):
        load_checkpoint(path)


def test_no_code_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    for data in (pickle.dumps(Evil()), (lambda p: (torch.save(Evil(), p), p.read_bytes())[1])(tmp_path / "t.pth")):
        (tmp_path / "evil.ckpt").write_bytes(data)
        with pytest.raises(DataError, match="not a checkpoint"):
            load_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("where", ["write", "fsync", "rename"])
def test_a_full_disk_leaves_the_old_one(tmp_path, monkeypatch, where):
    saved = Checkpoints(tmp_path, keep=2)
    saved.save(1, {"x": 1})

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    write = checkpoint.Path.write_bytes

    def half(path, data):
        write(path, data[:len(data) // 2])
        full()

    with monkeypatch.context() as m:
        if where == "write":
            m.setattr(checkpoint.Path, "write_bytes", half)
        else:
            m.setattr(files.os, {"fsync": "fsync", "rename": "replace"}[where], full)
        with pytest.raises(
            OSError, match=r"No space.*was not written, earlier ones are as they were.*step-00000002.ckpt"
        ) as told:
            saved.save(2, {"x": 2})
        assert told.value.errno == errno.ENOSPC
    assert saved.newest()[0] == {"x": 1} and [p.name for p in tmp_path.iterdir()] == ["step-00000001.ckpt"]


def test_what_a_killed_writer_left_is_removed(tmp_path):
    (tmp_path / ".step-00000001.ckpt.ab12.ckpt").write_bytes(b"half")
    saved = Checkpoints(tmp_path)
    assert saved.newest() is None
    saved.save(1, {})
    assert len(list(tmp_path.iterdir())) == 1


def test_damaged_ones_are_passed_over_and_said(tmp_path):
    saved = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        saved.save(step, {"step": step})
    saved.path(3).write_bytes(b"")
    saved.path(2).write_bytes(saved.path(2).read_bytes()[:-1])
    with pytest.warns(UserWarning, match="damaged") as said:
        assert saved.newest()[0] == {"step": 1}
    assert len(said) == 2
    saved.path(1).unlink()
    with pytest.raises(DataError, match="all checkpoints are damaged"), pytest.warns(UserWarning):
        saved.newest()
    with pytest.raises(DataError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "nothing")


# -- the best, and the background

def test_the_best_is_kept_beside_the_last(tmp_path):
    saved = Checkpoints(tmp_path, keep=2)
    for step, best in ((1, None), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5), (7, 5)):
        saved.save(step, {"x": step}, best)
    assert saved.steps() == [5, 6, 7]
    assert load_checkpoint(saved.path(5)) == {"x": 5}


def test_saving_in_the_background_takes_the_tree_as_it_was(tmp_path, monkeypatch):
    """While a save is being written, the tree changes; the next one waits for it; the order stays."""
    held, begun, write = threading.Event(), threading.Event(), checkpoint.Path.write_bytes

    def slow(path, data):
        begun.set()
        assert held.wait(10)
        return write(path, data)

    monkeypatch.setattr(checkpoint.Path, "write_bytes", slow)
    saved, tree = (
        Checkpoints(tmp_path, keep=9, background=True),
        {"w": torch.zeros(4), "losses": [0.0], "n": np.zeros(2)},
    )
    path = saved.save(1, tree)
    assert begun.wait(10) and not path.exists()  # and yet save has returned
    tree["w"] += 1
    tree["n"] += 1
    tree["losses"].append(1.0)
    held.set()
    saved.save(2, tree)
    saved.wait()
    first, second = (load_checkpoint(saved.path(k)) for k in (1, 2))
    assert first["w"].sum() == 0 and first["losses"] == [0.0] and first["n"].sum() == 0
    assert second["w"].sum() == 4 and second["losses"] == [0.0, 1.0] and second["n"].sum() == 2


@pytest.mark.parametrize("then", ["wait", "save", "newest", "drop_after", "pickle"])
def test_what_goes_wrong_in_the_background_is_raised_once(tmp_path, monkeypatch, then):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    saved = Checkpoints(tmp_path, background=True)
    with monkeypatch.context() as m:
        m.setattr(checkpoint.Path, "write_bytes", full)
        saved.save(1, {})
        with pytest.raises(OSError, match="No space"):
            {
                "wait": saved.wait,
                "save": lambda: saved.save(2, {}),
                "newest": saved.newest,
                "drop_after": lambda: saved.drop_after(0),
                "pickle": lambda: pickle.dumps(saved),
            }[then]()
    saved.wait()
    saved.save(3, {"x": 3})
    assert pickle.loads(pickle.dumps(saved)).newest()[0] == {"x": 3}


def test_what_cannot_be_saved_in_the_background_is_said_at_once(tmp_path):
    with pytest.raises(TypeError, match="a set"):
        Checkpoints(tmp_path, background=True).save(1, {"a": {1}})
