"""Killed at any moment, and gone on with: Learn2Track with dropout and every augmentation ends in the same bits.

The reference is one undisturbed run on a phantom. Real processes are killed with SIGKILL, at random moments and at
named points of the checkpoint code; weights, optimizer, history, log (its clock left out) and every batch that was
given to the model must come out equal, bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_children import kill_after
from helpers_training import leaves, log_without_time, same_states
from resume_child import BATCHES, EPOCHS, POINTS, Core

from tractkit.core.files import DataError
from tractkit.dwi.phantom import make_phantom
from tractkit.hdf5.create import create_hdf5
from tractkit.models.base import build_model
from tractkit.runs.checkpoint import Checkpoints, load_checkpoint, save_checkpoint
from tractkit.runs.log import RunLog
from tractkit.training.state import TrainerState

STEPS = EPOCHS * BATCHES
FULL = os.environ.get("FULL") == "1"
CONFIG = {"input": {"type": "volume", "files": ["dwi.nii.gz"], "standardization": "all"},
          "streamlines": {"type": "streamlines", "files": ["tractogram.trk"]}}


class Children:
    """Starts trainings in processes of their own."""

    def __init__(self, data: Path, root: Path):
        self.data, self.root = data, root
        here = Path(__file__).parent.parent
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]),
        }
        self.errors = root / "errors.txt"
        with open(self.errors, "w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(here / "resume_child.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=env,
                cwd=root,
            )

    def start(self, name: str, **job) -> int:
        self.process.stdin.write(
            json.dumps({"data": str(self.data), "folder": str(self.root), "name": name, **job}) + "\n"
        )
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self) -> int:
        """The exit code; negative: the signal that killed it."""
        return os.waitstatus_to_exitcode(int(self.process.stdout.readline()))

    def run(self, name: str, **job) -> int:
        """Its exit code; what it says is in `said`."""
        before = self.errors.stat().st_size
        self.start(name, **job)
        code = self.end()
        self.said = self.errors.read_text()[before:]
        print(self.said)
        return code

    def log(self, name: str) -> RunLog:
        folder = self.root / name
        return RunLog(folder / "logs" if (folder / "logs").exists() else folder)

    def step(self, name: str) -> int:
        """The last step in the log of a run."""
        steps = [r["step"] for r in self.log(name).records("batch")]
        return steps[-1] if steps else 0

    def best(self, name: str) -> bytes:
        return next(p for p in self.root.glob(f"{name}/**/best_model/model.safetensors")).read_bytes()

    def batches(self, name: str) -> dict[int, set[str]]:
        """What the model was given, as text, by step; of a step that was done again, each time."""
        given: dict[int, set[str]] = {}
        path = self.root / name / "batches.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            step, *batch = json.loads(line)
            given.setdefault(step, set()).add(json.dumps(batch))
        return given


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    make_phantom(root / "phantom", 2, n_streamlines=7, n_directions=6, progress=False)
    data = create_hdf5(
        root / "phantom",
        root / "data.hdf5",
        config=CONFIG,
        splits={"training": ["sub-01"], "validation": ["sub-02"]},
        progress=False,
    )
    made = Children(data, root)
    assert made.run("whole") == 0
    assert made.step("whole") == STEPS and len(made.batches("whole")) == STEPS
    yield made
    made.process.stdin.close()
    made.process.wait(20)


def load(children, name: str) -> TrainerState:
    folder = children.root / name
    if not (folder / "logs").exists():
        return TrainerState.load(folder)
    tree = Checkpoints(folder / "checkpoints").newest()[0]
    return (
        TrainerState.load(
            folder / "checkpoints", Core(build_model("Learn2Track", inner_model(children))), torch.optim.Adam
        )
        if tree
        else None
    )


def inner_model(children) -> dict:
    return TrainerState.load(children.root / "whole").model.hyperparameters


def differences(children, name: str, whole: str = "whole") -> list[str]:
    found = same_states(load(children, name), load(children, whole))
    logs, best, batches = (
        [f(n) for n in (name, whole)]
        for f in (lambda n: log_without_time(children.log(n)), children.best, children.batches)
    )
    return (
        found
        + ["log"] * (logs[0] != logs[1])
        + ["best model"] * (best[0] != best[1])
        + ["batches"] * (batches[0] != batches[1])
    )


def finish(children, name: str, whole: str = "whole", **job) -> None:
    assert children.run(name, **job) == 0
    assert differences(children, name, whole) == []


def kill_at_random(children, name: str, rng, **job) -> None:
    """Start a training, kill it a while after a batch drawn at random."""
    pid = children.start(name, **job)
    until = children.step(name)
    until += rng.randint(0, max(0, (STEPS - until) // 2))
    kill_after(pid, lambda: children.step(name), until, rng.random() * 0.03)
    children.end()


def kill_many(
    children, title: str, kills: int, seed: int, whole: str = "whole", points=tuple(POINTS), **job
) -> list[str]:
    """At random moments, and at named points in more than a third; each run is gone on with until it is far enough to
    be finished."""
    rng = random.Random(seed)
    named = (kills + 2) * 2 // 5 if kills > 1 else 1
    plan = [points[(i + seed) % len(points)] for i in range(named)] + ["random"] * (kills - named)
    rng.shuffle(plan)
    hit, run = [], 0
    for what in plan:
        name = f"{title}-{run}"
        if what == "random":
            kill_at_random(children, name, rng, **job)
        else:
            assert children.run(name, point=what, count=rng.randint(1, 3), **job) == -signal.SIGKILL, (
                f"{what} was not reached"
            )
        step = children.step(name)
        torn = " with a torn file" if list((children.root / name).glob("checkpoints/.step-*")) else ""
        hit.append(f"{what}, epoch {step // BATCHES} batch {step % BATCHES}{torn}")
        if step > STEPS - 7:  # too near to the end for the next
            finish(children, name, whole, **job)
            run += 1
    if (children.root / f"{title}-{run}").exists():
        finish(children, f"{title}-{run}", whole, **job)
    print(f"{title}: killed at", *hit, sep="\n  ")
    assert sum(not h.startswith("random") for h in hit) * 3 >= len(hit)
    assert len({h.split(",")[0] for h in hit} - {"random"}) == min(named, len(points))
    assert len(set(hit)) * 2 >= len(hit), "too few distinct points were hit"
    return hit


def n(full: int, short: int) -> int:
    return full if FULL else short


def test_killed(children):
    hit = kill_many(children, "main", n(30, 3), 5)
    assert not FULL or {h.split(",")[0] for h in hit} == {*POINTS, "random"}


CASES = {
    "workers": dict(options={"num_workers": 2}),
    "in the background": dict(how="background"),
    "saved in the background": dict(options={"save_in_background": True}),
    "while others draw": dict(draw=True),
    "turned off and on": dict(how="pauses"),
}


@pytest.mark.parametrize("case", CASES)
def test_killed_otherwise(children, case):
    kill_many(children, case, n(6, 1), 1 + list(CASES).index(case), **CASES[case])


def test_killed_in_train_model(children):
    assert children.run("whole-functional", functional=True) == 0
    assert children.step("whole-functional") == STEPS
    kill_many(children, "functional", n(6, 2), 3, "whole-functional", functional=True)


@pytest.mark.parametrize("how", ["background", "pauses", "steps", "interrupts", "company"])
@pytest.mark.parametrize("draw", [False, True])
def test_interrupted_otherwise(children, how, draw):
    """By pauses, step by step, by Ctrl-C and a new trainer; and with copies, tracking and evaluation beside it."""
    name = f"{how}{'-drawn' * draw}"
    finish(children, name, how=how, draw=draw)
    if how == "company":
        assert same_states(load(children, name + "-branch"), load(children, "whole")) == []
        assert log_without_time(children.log(name + "-branch")) == log_without_time(children.log("whole"))


def test_killed_in_its_first_moments(children):
    """Nothing is in the folder but a first checkpoint; or not even that."""
    assert children.run("first", point="serialise", count=1) == -signal.SIGKILL
    assert Checkpoints(children.root / "first/checkpoints").steps() == []
    assert children.run("first", point="renamed", count=1) == -signal.SIGKILL
    assert Checkpoints(children.root / "first/checkpoints").steps() == [0] and children.step("first") == 0
    assert children.run("first", signal=signal.SIGKILL, step=1) == -signal.SIGKILL
    finish(children, "first")


# -- what must not be forgotten

# float16 (which torch's LSTM on a CPU lacks), a first validation cut short by time, a best epoch that is not the last:
# so that each field matters
EVERYTHING = dict(
    rnn="gru",
    slow=0.25,
    options={"amp": "fp16", "validation_time_limit": 0.2, "learning_rate": [0.01, 1.0, 0.5], "keep_checkpoints": 1},
)
OF_NO_MATTER = {"time", "run_id", "parent", "log_path", "finished"}  # `finished` has a test of its own


@pytest.fixture(scope="module")
def everything(children):
    """A run in which every field is alive, and one that was killed in its midst."""
    assert children.run("everything", **EVERYTHING) == 0
    assert children.run("killed", signal=signal.SIGKILL, step=15, **EVERYTHING) == -signal.SIGKILL
    finish(children, copy_of(children, "killed", "control"), "everything", **EVERYTHING)
    return children


def copy_of(children, name: str, new: str) -> str:
    shutil.copytree(children.root / name, children.root / new)
    return new


def changed(children, new: str, change, name: str = "killed") -> bool:
    """Whether a copy of a run whose newest checkpoint was changed goes on to another end, or to none."""
    saved = Checkpoints(children.root / copy_of(children, name, new) / "checkpoints")
    path = saved.path(saved.steps()[-1])
    tree = load_checkpoint(path)
    change(tree)
    save_checkpoint(path, tree)
    try:
        TrainerState.load(path)
    except DataError:
        return True
    return (
        children.run(new, **EVERYTHING) != 0
        or "result may differ" in children.said
        or differences(children, new, "everything") != []
    )


def paths_of(tree, above=()):
    """The way to each entry of each dict in a tree."""
    for key, value in (
        tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    ):
        if isinstance(tree, dict):
            yield (*above, key)
        yield from paths_of(value, (*above, key))


def matters(path) -> bool:
    """Whether what is one level further down decides on anything: options of an optimizer are completed by torch, and
    its rate is set in each step; of sampler and settings, a difference is only told. No layer is in eval mode here, so
    the rule of states without that list does the same (test_kept_as_given.py has one). The extremes of a curve's
    stretches follow from its points as long as a run is this short: so they do in states from before there were any."""
    if path in (("fingerprints", "in_eval"), ("curve", "extremes")):
        return False
    return (
        path[:2] not in (("fingerprints", "sampler"), ("fingerprints", "config"))
        and path[2:4] != ("param_groups", 0)
        or len(path) <= 2
    )


def remove(tree, path) -> None:
    for key in path[:-1]:
        tree = tree[key]
    del tree[path[-1]]


def killed_tree(children):
    return Checkpoints(children.root / "killed/checkpoints").newest()[0]


def test_nothing_may_be_missing(everything):
    """Each field of the state in turn is not in the file; in a full run, each of all that is in them, too."""
    tree = killed_tree(everything)
    paths = [p for p in paths_of(tree) if (FULL or len(p) == 1) and matters(p)]
    assert len(paths) >= (100 if FULL else 20)
    unnoticed = [p for i, p in enumerate(paths) if not changed(everything, f"missing-{i}", lambda t, p=p: remove(t, p))]
    print(len(paths), "fields removed one at a time; unnoticed:", unnoticed)
    assert unnoticed == []


def test_nothing_may_be_forgotten(everything):
    """Each field in turn is as in a new state: the end must be another."""
    tree = killed_tree(everything)
    fresh = TrainerState.create(
        build_model("Learn2Track", {**inner_model(everything), "rnn_key": "gru"}), seed=0
    ).state_dict()
    names = (
        sorted(set(tree) - OF_NO_MATTER - {"format"})
        if FULL
        else ["optimizer", "loss_sum", "curve", "best", "policies"]
    )
    dead = [name for name in names if name not in ("model", "optimizer") and leaves(tree[name]) == leaves(fresh[name])]
    assert dead == []
    forgotten = [
        name
        for name in names
        if not changed(everything, f"forgets-{name}", lambda t, k=name: t.__setitem__(k, fresh[k]))
    ]
    assert forgotten == []


def test_that_it_is_finished_may_not_be_forgotten(children):
    job = dict(options={"patience": 1, "learning_rate": [.01, 5.], "max_epochs": 9})
    assert children.run("early", **job) == 0
    ended = children.step("early")
    assert ended < 9 * BATCHES
    assert children.run("early", **job) == 0 and children.step("early") == ended
    saved = Checkpoints(children.root / "early/checkpoints")
    path = saved.path(saved.steps()[-1])
    save_checkpoint(path, {**load_checkpoint(path), "finished": None})
    assert children.run("early", **job) == 0 and children.step("early") > ended


def test_a_noise_that_goes_on_is_noticed(children):
    """Dropout whose generator is not a function of the step: the comparison must turn red."""
    assert children.run("noise", signal=signal.SIGKILL, step=9) == -signal.SIGKILL
    assert children.run("noise", forget="dropout") == 0 and differences(children, "noise") != []


# -- damage

@pytest.mark.parametrize("damage", ["truncated", "flipped", "half deleted", "empty", "pickle"])
def test_a_damaged_newest_one_costs_only_what_came_after_the_one_before(children, damage):
    name = f"damage-{damage}"
    assert children.run(name, signal=signal.SIGKILL, step=9) == -signal.SIGKILL
    saved = Checkpoints(children.root / name / "checkpoints")
    newest = saved.path(saved.steps()[-1])
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    owned = children.root / f"{name}-owned"
    newest.write_bytes(
        {
            "truncated": newest.read_bytes()[:-40],
            "flipped": bytes(data),
            "half deleted": data[: len(data) // 2],
            "empty": b"",
            "pickle": b"cposix\nsystem\n(S'touch " + str(owned).encode() + b"'\ntR.",
        }[damage]
    )
    finish(children, name)
    assert newest.name in children.said and "Going back to an earlier checkpoint" in children.said
    assert not owned.exists()


# -- a full disk

ON_A_SMALL_DISK = """
import shutil, sys
from pathlib import Path
from helpers_training import fit, log_without_time, same_states

disk, here = Path(sys.argv[1]), Path(sys.argv[2])
whole = fit(here, "whole").train_and_validate()
for how, left in [(how, left) for how in ("in turn", "background") for left in (0, 3000, 8000)]:
    trainer = fit(disk, "run", checkpoint_every_batches=2, save_in_background=how == "background")
    filler = disk / "filler"

    def fill(event, t):
        if event == "batch" and t.state.global_step == 7 and not filler.exists():
            try:
                with open(filler, "wb", buffering=0) as f:
                    while f.write(b"x" * 1000) == 1000: pass
            except OSError:
                pass
            with open(filler, "rb+") as f:
                f.truncate(max(0, filler.stat().st_size - left))

    trainer.listeners.append(fill)
    try:
        trainer.train_and_validate()
    except OSError as e:
        assert "No space left" in str(e), e
        assert trainer.status.phase == "failed" and "No space left" in trainer.status.message
        print("told:", how, left, e, flush=True)
    else:
        raise SystemExit("the disk was never full")
    last = trainer.checkpoints.newest()[0]["global_step"]
    assert last >= 4, last
    filler.unlink()
    again = fit(disk, "run")
    state = again.train_and_validate()
    assert same_states(state, whole) == [], left
    assert log_without_time(again.log) == log_without_time(fit(here, "whole").log), left
    print("equal:", how, flush=True)
    shutil.rmtree(disk / "run")
"""


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """What is said on a small tmpfs in a mount namespace of its own, with little or nothing left from step 7 on; one
    process for all."""
    root = tmp_path_factory.mktemp("small")
    disk = root / "disk"
    disk.mkdir()
    here = Path(__file__).parent.parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    return subprocess.run(
        [
            "unshare",
            "-Urm",
            "sh",
            "-c",
            'mount -t tmpfs -o size=400k tmpfs "$1" && shift && exec "$@"',
            "sh",
            disk,
            sys.executable,
            "-c",
            ON_A_SMALL_DISK,
            disk,
            root,
        ],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
    )


@pytest.mark.namespaces
@pytest.mark.parametrize("how", ["in turn", "background"])
def test_a_disk_that_becomes_full(small_disk, how):
    print(small_disk.stdout, small_disk.stderr)
    assert (
        small_disk.stdout.count(f"told: {how} ") == 3 == small_disk.stdout.count(f"equal: {how}\n")
        and small_disk.returncode == 0
    )
