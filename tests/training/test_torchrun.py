"""Several processes end where one does; one that is killed is started again; and they are told apart from nothing but
their speed."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from draws_child import KINDS, DrawingNet
from helpers_data import make_file
from helpers_training import FitBreaks, SlowPoints, fit, log_without_time, same_states, toy_model
from helpers_waiting import until
from ranks_child import CASES, TOGETHER, FitAgrees

from tractkit.data.plan import Plan
from tractkit.lab.panel import TrainerPanel
from tractkit.runs.log import RunLog
from tractkit.training.process import attach
from tractkit.training.ranks import Ranks, RankSampler
from tractkit.training.state import TrainerState
from tractkit.training.torchrun import launch, write_module

CHILD = Path(__file__).parent.with_name("ranks_child.py")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    make_file(folder, n=12, points=(2, 60))
    return folder


@pytest.fixture(scope="module")
def together(root):
    """Every case, trained by two processes that met without torchrun."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    both = [
        subprocess.Popen(
            [sys.executable, str(CHILD), str(root)], env={**env, "RANK": str(r)}, stderr=subprocess.PIPE, text=True
        )
        for r in range(2)
    ]
    errors = [p.communicate(timeout=120)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], "\n".join(errors)
    return root


def weights(folder):
    return TrainerState.load(
        folder, toy_model(0) if "Learn2Track" not in (folder / "config.yaml").read_text() else None
    ).model.state_dict()


def furthest(a, b) -> float:
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_end_where_one_does(together, name):
    one = CASES[name](together, f"{name}-1")
    one.train_and_validate()
    a, b = one.log.records(), RunLog(together / f"{name}-2").records()
    assert [(r["kind"], r["step"], r.get("n"), r.get("left_out", "")) for r in a] == [
        (r["kind"], r["step"], r.get("n"), r.get("left_out", "")) for r in b
    ]
    for key in ("loss", "grad_norm", "train_loss", "valid_loss", "learning_rate", "twice"):
        x, y = ([np.nan if r.get(key) is None else r[key] for r in records if key in r] for records in (a, b))
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6, err_msg=key)
    tree = TrainerState.load(together / f"{name}-2", CASES[name](together, "as it was").model)
    assert furthest(one.state.model.state_dict(), tree.model.state_dict()) < 1e-5
    assert (
        tree.epoch == one.state.epoch
        and tree.finished == one.state.finished
        and tree.fingerprints["plan"] == one.state.fingerprints["plan"]
    )


def test_what_the_first_rank_is_told_all_do(together):
    changes = RunLog(together / "changed-2").records("change")
    assert [(r["step"], r["name"], r["to"]) for r in changes] == [
        (4, "learning_rate", 0.02),
        (4, "clip_grad", 0.5),
        (4, "max_epochs", 2),
        (4, "reverse_ratio", 0.0),
        (4, "batch_size_training", 6),
    ]


def test_draws_of_ones_own_stopped_and_resumed(together):
    """From global generators, in model, loss, loader, sampler and a validation's loss: two processes that were stopped
    in the midst of an epoch end as two that were not."""
    whole, parts = (TrainerState.load(together / name, DrawingNet(KINDS)) for name in ("draws", "draws-parts"))
    assert whole.global_step == 12 and same_states(whole, parts) == []


def test_one_rank_writes(together):
    for name in CASES | TOGETHER:
        steps = [r["step"] for r in RunLog(together / f"{name}-2").records("batch")]
        assert steps == list(range(1, len(steps) + 1)), name
        assert (together / f"{name}-2/config.yaml").exists() and (
            together / f"{name}-2/best_model/model.safetensors"
        ).exists()


def test_a_rank_without_points_counts_for_nothing(together):
    assert {r["n"] for r in RunLog(together / "last-2").records("batch")} == {1}
    assert all(np.isfinite(r["loss"]) for r in RunLog(together / "last-2").records("batch"))


def test_the_limit_of_the_validation_is_one_for_all(together):
    state = TrainerState.load(together / "limit-2", toy_model(0))
    assert 1 <= state.validation["batches"] < 6


def test_parts_are_the_batch():
    lengths = np.random.default_rng(0).integers(1, 500, 64).astype(float)
    plan = Plan(
        ["a", "b"],
        np.array([0, 40, 64]),
        np.random.default_rng(1).permutation(64),
        np.array([0, 1, 3, 20, 64]),
        sizes=lengths,
    )
    sampler = SimpleNamespace(plan=lambda epoch, subset: plan)
    for size in (1, 2, 3, 5):
        parts = [RankSampler(sampler, r, size).plan(0, "training") for r in range(size)]
        for i, batch in enumerate(plan):
            pieces = [(name, int(k)) for part in parts for name, ids in part[i] for k in ids]
            assert pieces == [(name, int(k)) for name, ids in batch for k in ids]
        assert {p.fingerprint for p in parts} == {plan.fingerprint}


def test_what_cannot_be_cut_is_said():
    with pytest.raises(TypeError, match=r"a int, which cannot be cut.*shard\(rank, size\)"):
        RankSampler(SimpleNamespace(plan=lambda *_: [7]), 0, 2).plan(0, "training")[0]


def test_a_step_of_ones_own_is_refused_in_several_processes(tmp_path):
    class Own(type(fit(tmp_path))):
        def back_propagation(self, loss):
            self.state.optimizer.zero_grad()
            loss.backward()
            self.state.optimizer.step()
            return 0.0

    class Pair(Ranks):  # the other one has nothing to say
        def sum(self, *values):
            return list(values)

        def share(self, value):
            return value

    trainer = fit(tmp_path, kind=Own)
    trainer.ranks = Pair(0, 2)
    with pytest.raises(TypeError, match=r"Own must call super\(\).back_propagation"):
        trainer.train_and_validate()


def workers(run) -> list[int]:
    """The process ids of the ranks of a run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == run._process.pid and "main_of_worker" in (folder / "cmdline").read_text():
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            pass
    return sorted(found)


def slow(folder, name, **options):
    return fit(
        folder, name, points=SlowPoints(), **dict(max_epochs=4, prefetch=0, checkpoint_every_batches=2) | options
    )


@pytest.mark.full
def test_killed_it_is_started_again_and_finishes(tmp_path):
    """SIGKILL to one of two: all go on from the last checkpoint, and end where one process does; the notebook
    follows."""
    options = dict(model=toy_model(0), optimizer="SGD", learning_rate=.1)
    trainer = slow(tmp_path, "two", **options)
    run = launch(trainer, 2)
    until(lambda: run.status.global_step >= 5)
    victims = workers(run)
    assert len(victims) == 2
    os.kill(victims[-1], signal.SIGKILL)
    one = fit(tmp_path, "one", max_epochs=4, **options | {"model": toy_model(0)})
    one.train_and_validate()
    trainer.wait()
    assert run.status.phase == "finished" and trainer.state.global_step == 24 and workers(run) == []
    assert [r["step"] for r in trainer.log.records("batch")] == list(range(1, 25))
    assert furthest(one.state.model.state_dict(), trainer.state.model.state_dict()) < 1e-5


@pytest.mark.full
def test_killed_the_same_bits(tmp_path):
    """With dropout: two processes of which one was killed, and that were paused, end as two that were not."""
    whole = slow(tmp_path, "whole")
    calm = launch(whole, 2)
    trainer = slow(tmp_path, "killed")
    run = launch(trainer, 2, paused=True)
    trainer.step(3)
    assert run.status.global_step == 3 and run.status.phase == "paused" and trainer.state.snapshot().global_step == 3
    other = attach(trainer.folder)  # as another kernel does
    other.resume()
    until(lambda: run.status.global_step >= 6)
    os.kill(workers(run)[0], signal.SIGKILL)  # perhaps the one that writes
    assert other.running and run.status.phase != "failed"
    trainer.wait()
    calm.wait()
    whole.wait()
    assert same_states(trainer.state, whole.state) == []
    assert log_without_time(trainer.log) == log_without_time(whole.log)


@pytest.mark.full
def test_a_panel_by_its_folder_drives_all_ranks(tmp_path):
    """Each wish comes true on both, and is confirmed; the ranks compare their bits and their rates before each
    batch."""
    launch(slow(tmp_path, "run", kind=FitAgrees, max_epochs=500), 2)
    until((tmp_path / "run/process/status.json").exists)
    p = TrainerPanel(tmp_path / "run")

    def step():
        return p.trainer.status.global_step

    def wish(verb, said, **setting):
        p.set(**setting, wait=False) if setting else p.press(verb, wait=False)
        until(lambda: p.readout.readout["message"].startswith(said), 20)

    try:
        until(
            lambda: (
                step() >= 2
                and p.readout.readout["measures"].get("step", "0") >= "2"
                and len(p.source.curves()["training"][0]) >= 2
            )
        )
        wish("pause", "Paused after batch")
        at = step()
        wish("step", "One batch done; paused after batch")
        assert step() == at + 1
        wish("", "learning_rate: 0.01 -> 0.003, from the next batch.", name="learning_rate", value=.003)
        time.sleep(.2)
        assert step() == at + 1
        wish("resume", "Resumed.")
        wish("save", "Saved: step")
        assert p.trainer.checkpoints.steps()[-1] > at
        wish("", "clip_grad: None -> 0.5, from the next batch.", name="clip_grad", value=.5)
        wish("epoch", f"Epoch {p.trainer.status.epoch + 1} done; paused.")
        kept = p.trainer.checkpoints.steps()[0]
        p.press("rewind", to=p.trainer.checkpoints.path(kept))
        assert (
            p.readout.readout["message"] == f"Went back to step {kept}; paused."
            and step() == kept
            and p.readout.readout["phase"] == "paused"
        )
        wish("step", "One batch done; paused after batch")
        wish("fork", f"A branch of step {kept + 1}, for")
        wish("resume", "Resumed.")
        wish("", "ValueError: clip_grad must be a positive number", name="clip_grad", value=-1)
        wish("stop", "Stopped in epoch")
        until(lambda: p.trainer.commands == set() and all(b.disabled for b in p.buttons.values()))
        until(lambda: not p.trainer._process.running)
        p.refresh()
        assert p.readout.readout["phase"] == "stopped" and p.readout.readout["message"].startswith("Stopped in epoch")
        with pytest.raises(RuntimeError, match="nothing trains in"):
            p.trainer.pause()
    finally:
        p.press("stop")
        p.close()
    log = RunLog(tmp_path / "run").records()
    rates = {r["step"]: r["learning_rate"] for r in log if r["kind"] == "batch"}
    assert rates == {s: .01 if s <= at + 1 else .003 for s in range(1, len(rates) + 1)}
    assert [(r["step"], r["name"]) for r in log if r["kind"] == "change"][0] == (at + 1, "learning_rate")


@pytest.mark.full
def test_an_error_is_told_and_not_repeated(tmp_path):
    trainer = fit(tmp_path, kind=FitBreaks)
    launch(trainer, 2)
    with pytest.raises(RuntimeError, match="OSError: the disk is gone[^$]*compute_batch_loss"):
        trainer.wait()
    assert trainer.status.phase == "failed" and trainer.state.global_step == 7
    text = (trainer.folder / "process/output.txt").read_text()
    assert text.count("OSError: the disk is gone") <= 4  # not max_restarts times
    assert fit(tmp_path).train_and_validate().global_step == 18


def test_what_cannot_be_launched_is_said(tmp_path):
    trainer = fit(tmp_path)
    for options, text in (
        (dict(nproc_per_node=0), "at least 1"),
        (dict(nnodes=2), "host:port"),
        (dict(nnodes=2, rdzv_endpoint="a:1"), r"tractkit train .*config.yaml --nnodes 2 --rdzv-endpoint a:1"),
    ):
        with pytest.raises(ValueError, match=text):
            launch(trainer, **options)
    trainer = fit(tmp_path, kind=type("FitOfACell", (type(trainer),), {"__module__": "__main__"}))
    with pytest.raises(ValueError, match="FitOfACell is defined in this notebook.*write_module"):
        launch(trainer, 2)
    assert not trainer.running and not (tmp_path / "run/checkpoints").exists()


CELLS = '''
import math
import numpy as np
from torch import nn
from tractkit.core.rng import fold as f
SIZE, NAMES, table = 4, ("a", "b"), np.zeros(3)

def double(x):
    return 2 * x * len(NAMES)

class Model(nn.Linear):
    def __init__(self):
        super().__init__(SIZE, SIZE)
        self.scale = math.pi * double(f(1))

class Bad:
    def get(self):
        return table
'''


def test_classes_of_cells_become_a_module(tmp_path, monkeypatch):
    import linecache

    monkeypatch.setattr(sys, "path", [*sys.path])
    cells = type(sys)("cells_of_a_notebook")
    monkeypatch.setitem(sys.modules, cells.__name__, cells)
    linecache.cache["<cell>"] = (len(CELLS), None, CELLS.splitlines(True), "<cell>")
    exec(compile(CELLS, "<cell>", "exec"), vars(cells))
    module = write_module(tmp_path / "mine_written.py", cells.Model)
    assert (
        module.Model is not cells.Model
        and module.Model().scale == cells.Model().scale
        and module.__name__ == "mine_written"
    )
    code = (f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import pickle; "
            f"print(pickle.loads(pickle.dumps(__import__('mine_written').Model())).scale)")
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert float(out.stdout) == cells.Model().scale, out.stderr
    write_module(tmp_path / "mine_written.py", cells.double)
    with pytest.raises(ValueError, match="Bad uses table, a ndarray"):
        write_module(tmp_path / "other.py", cells.Bad)
    (tmp_path / "mine.py").write_text("years = 'of work'\n")
    with pytest.raises(ValueError, match="was not written by write_module"):
        write_module(tmp_path / "mine.py", cells.double)


@pytest.mark.gpu
def test_gradients_are_summed_by_nccl(tmp_path):
    code = (
        "import torch; from tractkit.training.ranks import Ranks; r = Ranks.join(); r.size = 2  # so that it asks the "
        "others, who are none\n"
        "p = torch.nn.Parameter(torch.ones(3, device='cuda')); p.grad = torch.arange(3., device='cuda'); q = "
        "torch.nn.Parameter(p.detach().clone())\n"
        "r.sum_gradients([p, q]); assert p.grad.tolist() == [0, 1, 2] and q.grad is None and r.mean(.5, 4) == (.5, 4); "
        "r.leave(); print('good')"
    )
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29533",
    }
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout == "good\n"
