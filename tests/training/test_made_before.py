"""What was written before the redraw opens as it did, and a training that was stopped then ends in the same bits.

The files in `tests/data/before_redraw` were written by commit 1ac7f91; `make.py` beside them has the trainings, as a
person's own script would have them, and says how they were stopped. Here they are copied to another place, looked at
and gone on with; the data file, the states, the listing and how each training ended are compared with what that
commit found.

Bits depend on torch and the processor, too. Where `make.arithmetic()` finds another torch, other instructions or other
last bits in sums of torch alone, numbers are compared by their size; where torch draws other numbers as well, only
where the trainings end. A warning says so."""

import importlib.util
import json
import re
import runpy
import shutil
import struct
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import tractkit as tk

FOLDER = Path(__file__).resolve().parents[1] / "data/before_redraw"
MADE = json.loads((FOLDER / "made.json").read_text(encoding="utf-8"))
SAID = ("the result may differ in its last bits", "Dropout draws from torch's global generator")  # and nothing else


def _import_make():
    spec = importlib.util.spec_from_file_location("made_before_redraw", FOLDER / "make.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = _import_make()
NAMES = list(make.RUNS)


# ---- comparing -----------------------------------------------------------------------------------------------


def flat(node, path="") -> dict:
    """The leaves of a tree by their paths; of an empty branch nothing."""
    if isinstance(node, dict):
        return {k: v for key, child in node.items() for k, v in flat(child, f"{path}/{key}").items()}
    if isinstance(node, (list, tuple)):
        return flat(dict(enumerate(node)), path)
    return {path: node}


def check_tree(found, expected) -> None:
    """Every leaf is there and equal, to the last bit; of weights, optimizer and policies there are no others."""
    found, expected = flat(found), flat(expected)
    differ = {k: (v, found.get(k, "missing")) for k, v in expected.items() if found.get(k, "missing") != v}
    assert not differ, f"path: (before, now): {differ}"
    more = [k for k in found if k not in expected and k.startswith(("/model/weights", "/optimizer/state", "/policies"))]
    assert not more


MARK = re.compile(r"(\w+) \[([\d, ]*)\] [0-9a-f]{16}")  # of an array: type, shape, digest


def stored_arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of the state in which a training ended, by their paths."""
    data, at, arrays = np.load(FOLDER / "ended.npz")[name], 0, {}
    for path, value in flat(MADE["runs"][name]["ended state"]).items():
        if isinstance(value, str) and (m := MARK.fullmatch(value)):
            shape = [int(n) for n in m[2].split(",") if n]
            size = np.dtype(m[1]).itemsize * int(np.prod(shape))
            arrays[path], at = data[at:at + size].view(m[1]).reshape(shape), at + size
    assert at == len(data)
    return arrays


def how_alike() -> str:
    """What can be asked of this machine: equal "bits", "close" numbers, or only the "place" where a training ends."""
    here, there = make.arithmetic(), MADE["arithmetic"]
    if here == there:
        return "bits"
    alike = "close" if here["draws"] == there["draws"] else "place"
    differ = ", ".join(f"{k}: {v} -> {here[k]}" for k, v in there.items() if here[k] != v)
    warnings.warn(f"not compared to the bit ({alike} only), this machine reckons otherwise: {differ}", stacklevel=2)
    return alike


def check_ended(name: str, ended: dict, arrays: dict) -> None:
    """A training has ended as it did before the redraw."""
    run, alike = MADE["runs"][name], how_alike()
    expected = {k.removeprefix("ended "): v for k, v in run.items() if k.startswith("ended ")}
    if alike == "bits":
        check_tree(ended["state"], expected["state"])
        assert ended["log"] == expected["log"]
        assert ended["best_model"] == expected["best_model"]
        return
    place = ("kind", "epoch", "batch", "step", "n", "name")
    kept = [[{k: v for k, v in r.items() if k in place} for r in log] for log in (ended["log"], expected["log"])]
    assert kept[0] == kept[1]
    for key in ("epoch", "batch", "global_step", "finished"):
        assert ended["state"][key] == expected["state"][key]
    if alike == "close":
        numbers = flat([ended["log"], ended["state"]]), flat([expected["log"], expected["state"]])
        for path, value in numbers[1].items():
            if isinstance(value, float) and path in numbers[0]:
                assert numbers[0][path] == pytest.approx(value, rel=1e-2, abs=1e-3), path
        for path, array in stored_arrays(name).items():
            np.testing.assert_allclose(arrays[path], array, rtol=1e-2, atol=1e-3, err_msg=path)


SCALAR = re.compile(rb"\x0a.((?:batch|epoch|change)/\w+)\x15(.{4})", re.DOTALL)  # in an event: its name, its value


def read_events(path: Path) -> list[tuple[str, int, float]]:
    """Name, step and value of each scalar of a TensorBoard file, of steps below 128."""
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        event = data[at + 12:at + 12 + size]  # begins with nine bytes of time, one that says "step", the step
        found += [(name.decode(), event[10], struct.unpack("<f", value)[0]) for name, value in SCALAR.findall(event)]
        at += 16 + size
    return found


def check_views(folder: Path) -> None:
    """TensorBoard's files, which the version before began, hold each number of the log once."""
    files = sorted((folder / "tensorboard").glob("events*"))
    scalars = [scalar for path in files for scalar in read_events(path)]
    assert max(Counter((tag, step) for tag, step, _ in scalars).values()) == 1
    losses = {r["step"]: np.float32(r["loss"]) for r in make.log_without_time(folder) if r["kind"] == "batch"}
    assert {step: value for tag, step, value in scalars if tag == "batch/loss"} == losses


# ---- looking at it -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A copy of the trainings, in a place that their files know nothing of."""
    return Path(shutil.copytree(FOLDER / "trainings", tmp_path / "elsewhere"))


def test_what_is_stored_fits_together():
    for name in NAMES:
        state = flat(MADE["runs"][name]["ended state"])
        assert {k: make.mark(v) for k, v in stored_arrays(name).items()}.items() <= state.items()


@pytest.mark.parametrize("lazy", [False, True])
def test_the_data_file_has_the_same_numbers(lazy):
    check_tree(make.data_contents(FOLDER / "data.h5", lazy), MADE["data"])


@pytest.mark.parametrize("name", NAMES)
def test_a_training_stands_where_it_was_stopped(folder, name):
    """State, history, best model; and looking at them changes no file."""
    def files():
        return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    before, found = files(), make.standing(folder, name)
    expected = {k.removeprefix("stopped "): v for k, v in MADE["runs"][name].items() if k.startswith("stopped ")}
    check_tree(found.pop("state"), expected.pop("state"))
    assert json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)  # NaN included
    assert files() == before


def test_the_runs_are_listed(folder):
    assert make.table(folder) == MADE["table"]


# ---- going on with it ----------------------------------------------------------------------------------------


def go_on(folder: Path, name: str) -> tk.TrainerState:
    """The person's script is run once more."""
    if name == "streamlines":
        return make.streamline_trainer(FOLDER / "data.h5", folder).train_and_validate()
    if name == "points":
        return make.point_trainer(folder).train_and_validate()
    return make.functional_training(folder)


@pytest.mark.parametrize("name", ["streamlines", "points", "functional"])
def test_a_stopped_training_ends_in_the_same_bits(folder, name):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        state = go_on(folder, name)
    assert not [str(w.message) for w in said if not str(w.message).startswith(SAID)]
    check_ended(name, *make.ending(state, folder, name))
    check_ended(name, *make.ending(make.load(folder, name), folder, name))  # as it is on the disk
    assert state.run_id == MADE["runs"][name]["stopped run_id"]
    assert state.history.batches["step"].tolist() == list(range(1, state.global_step + 1))
    check_views(make.log_folder(folder, name))
    if name == "streamlines":
        losses = np.load(folder / name / "logs/train_loss_monitor_per_epoch.npy")
        assert losses.tolist() == state.history["train_loss"].tolist()
    row = next(row for row in make.table(folder) if row["name"] == name)
    assert (row["status"], row["step"], row["epochs"]) == ("finished", state.global_step, state.epoch)


def test_the_command_line_goes_on_with_it(folder, monkeypatch):
    """`python -m tractkit resume`, from its `config.yaml`; that names a data file which has moved."""
    words = ["resume", str(folder / "streamlines"), "--path", str(FOLDER / "data.h5")]
    monkeypatch.setattr(sys, "argv", ["tractkit", *words])
    with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_module("tractkit", run_name="__main__")
    assert not ended.value.code
    check_ended("streamlines", *make.ending(make.load(folder, "streamlines"), folder, "streamlines"))


def test_a_finished_training_is_given_more_epochs(folder):
    name = "finished"
    before = make.log_without_time(folder / name)
    done = make.finished_trainer(folder).train_and_validate()  # nothing is left to do
    check_tree(make.content(done)[0], MADE["runs"][name]["stopped state"])
    assert make.log_without_time(folder / name) == before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = make.finished_trainer(folder, max_epochs=4).train_and_validate()
    check_ended(name, *make.ending(state, folder, name))
    check_views(folder / name)
