"""Makes what lies beside it: a data file and four trainings, as the version before the redraw wrote them.

It was run with commit 1ac7f91, the last one before the redraw, and uses the names that version had:

    git clone . /tmp/before && git -C /tmp/before checkout 1ac7f91 && mkdir /data
    OMP_NUM_THREADS=1 PYTHONPATH=/tmp/before python tests/data/before_redraw/make.py /data/before_redraw
    rm -r /data

It writes into the folder that is named, whose path is in the files (so it is one of no machine), and copies what is
kept to where this script lies. There is no need to run it again, and another version it refuses: that would prove
nothing. `tests/training/test_made_before.py` imports the trainings below and goes on with them, as a person does whose
script is older than the installed package; so they use names of the top level, those that a person knows.

The trainings, all with one thread on the CPU:

streamlines  Learn2Track and all that is random around it; settings are changed in its second epoch, then it is stopped
points       a plain module, a trainer of one's own, SGD with momentum, a scheduler of torch; killed in its second epoch
functional   `train_model` on batches by number; Ctrl-C in its second epoch
finished     a training that has ended, and is given more epochs
"""

import functools
import hashlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import tractkit as tk

try:
    Threads, random_apply = tk.Threads, tk.random_apply
except AttributeError:  # no names of the top level since
    from tractkit.functional.pipeline import Threads
    from tractkit.functional.sources import random_apply

HERE = Path(__file__).resolve().parent
COMMIT = "1ac7f91"
RUNS = {"streamlines": "streamlines", "points": "points",  # name: folder
        "functional": "functional/checkpoints", "finished": "finished"}


# ---- the data file -------------------------------------------------------------------------------------------

GROUPS = {
    "input": {"type": "volume", "files": ["signal.nii.gz"], "standardization": "all"},
    "streamlines": {"type": "streamlines", "files": ["lines.trx"], "dps_keys": ["weight", "color"], "dpp_keys": ["fa"],
                    "groups": ["left", "right"], "connectivity_matrix": "matrix.npy",
                    "connectivity_nb_blocs": [2, 1, 1]},
}


def make_data(folder: Path) -> Path:
    """Two subjects; the streamlines of one are shared between training and validation."""
    rng = np.random.default_rng(0)
    for name, n in (("a", 26), ("b", 18)):
        make_subject(folder / "subjects" / name, rng, n)
    splits = {"training": ["a 0.7", "b"], "validation": ["a 0.3"]}
    return tk.create_hdf5(folder / "subjects", folder / "data.h5", GROUPS, splits, compression="gzip", progress=False)


def make_subject(folder: Path, rng: np.random.Generator, n: int) -> None:
    """An oblique grid, smooth curves, and a little of everything that goes with streamlines."""
    folder.mkdir(parents=True)
    shape, affine = (8, 7, 6), np.eye(4)
    affine[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] * (2.0, 2.5, 3.0)
    affine[:3, 3] = (-7, 12, 30)
    signal_ = rng.normal(size=(*shape, 3)).astype(np.float32).round(2)
    tk.Volume(signal_, affine).save(folder / "signal.nii.gz")
    lines = []
    for _ in range(n):
        a, b, c = rng.uniform(0, np.array(shape) - 1, (3, 3))
        t = np.linspace(0, 1, int(rng.integers(6, 14)))[:, None]
        lines.append(a * (1 - t) ** 2 + 2 * b * t * (1 - t) + c * t**2)
    points = tk.Streamlines.from_list(lines)
    dps = {"weight": np.arange(n, dtype=np.float32), "color": rng.random((n, 3)).astype(np.float32)}
    dpp = {"fa": rng.random(len(points.points)).astype(np.float32)}
    groups = {"left": np.arange(0, n, 2), "right": np.arange(1, n, 3)}
    tk.Tractogram(points, affine, shape, dps=dps, dpp=dpp, groups=groups).save(folder / "lines.trx")
    np.save(folder / "matrix.npy", np.array([[4, 1], [1, 7]]))


def data_contents(path: Path, lazy: bool = False) -> dict:
    """What a person finds in the file: of every array a digest of its bits."""
    dataset = tk.MultiSubjectDataset(path, lazy=lazy).load_data()
    found = {"fingerprint": dataset.fingerprint()}
    for subset in (dataset.training_set, dataset.validation_set, dataset.testing_set):
        found[f"{subset.name} set"] = subset.subjects
        for subject in subset:
            for name, v in subject.volumes.items():
                found[f"{subject.name}/{name}"] = {"data": mark(v.volume.data), "affine": mark(v.affine)}
            for name, s in subject.streamlines.items():
                t = s.as_tractogram()
                arrays = {"points": t.streamlines.points, "offsets": t.streamlines.offsets, "affine": t.affine,
                          "lengths_mm": s.lengths_mm, "matrix": s.connectivity.matrix}
                for kind in ("dps", "dpp", "groups"):
                    arrays |= {f"{kind}/{k}": v for k, v in getattr(t, kind).items()}
                marks = {k: mark(v) for k, v in sorted(arrays.items())}
                found[f"{subject.name}/{name}"] = {"dimensions": list(t.dimensions), **marks}
    return found


# ---- the trainings -------------------------------------------------------------------------------------------


def streamline_trainer(data: Path, folder: Path, name: str = "streamlines") -> tk.TrainerOneInput:
    """Learn2Track with dropout, splits, reversal, two kinds of noise. Nine batches an epoch, two to a step, the last
    one alone."""
    dataset = tk.MultiSubjectDataset(data).load_data()
    model = tk.Learn2Track(3, rnn_layer_sizes=[4, 3], dropout=.2, dg_dropout=.1, use_skip_connection=True,
                           use_layer_normalization=True, step_size=1.0, seed=5)
    sampler = tk.BatchIDSampler(dataset, "streamlines", 4, 3, rng=3)
    loader = tk.BatchLoaderOneInput(dataset, model, "input", "streamlines", rng=4, split_ratio=.5, reverse_ratio=.5,
                                    noise_gaussian_size_forward=.1, noise_gaussian_size_loss=.05)
    return tk.TrainerOneInput(
        model, folder, name, sampler, loader, learning_rate=tk.Exponential(.02, .7), optimizer="Adam", max_epochs=4,
        patience=50, patience_delta=.15, clip_grad=1., accumulate=2, device="cpu", num_threads=1,
        checkpoint_every_seconds=None, checkpoint_every_batches=2, progress=False, npy_logs=True)


CHANGED_AT, STOPPED_AT = 7, 8  # steps; five make an epoch


def change_at_step(trainer: tk.Trainer, stop: bool) -> None:
    """Within the second epoch settings are changed, one of them for the epochs to come; a step later it is stopped."""
    def listen(event, t):
        if event == "batch" and t.status.phase == "training":
            if t.state.global_step == CHANGED_AT:
                rate = tk.DecreasingOnPlateau(initial=.01, multiplier=.5, patience=0, rtol=.2, atol=0.)
                t.change(learning_rate=rate, clip_grad=.2, split_ratio=.2, batch_size_training=5)
            if stop and t.state.global_step == STOPPED_AT:
                t.stop()
    trainer.listeners.append(listen)


class Net(nn.Module):
    """A plain module, with dropout and buffers of torch."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(.2),
                                    nn.Linear(8, 1))
        exact_weights(self)

    def forward(self, x):
        return self.layers(x)


def exact_weights(model: nn.Module) -> None:
    """First weights that are no draws, and the same on every machine."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_((((torch.arange(p.numel()) * 7919 + 31 * i) % 101 - 50) / 64).view_as(p))


class Numbers:
    """Sampler and loader in one, as a person may write them: six batches of eight pairs of numbers."""

    def plan(self, epoch, subset):
        n, first = (6, 13 * epoch) if subset == "training" else (2, 200)
        return [np.arange(first + 8 * i, first + 8 * (i + 1)) * 37 % 101 for i in range(n)]

    def load_batch_streamlines(self, ids, *, epoch, training):
        pairs = np.stack([ids / 64, (ids * 5 % 17 + epoch * training) / 16], 1) - .75
        x = torch.tensor(pairs, dtype=torch.float32)
        return x, x[:, :1] * x[:, :1] - x[:, 1:]


class Fit(tk.Trainer):
    """A trainer of one's own."""

    def compute_batch_loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.model(x), y), len(x)


class Remembers(tk.Policy):
    """Knows what it has seen, without saying so."""

    def __init__(self):
        self.seen, self.last = 0, []

    def train_step_finished(self, epoch, iteration, loss):
        self.seen, self.last = self.seen + 1, [*self.last[-2:], loss]


def point_trainer(folder: Path, name: str = "points") -> Fit:
    numbers, falling = Numbers(), functools.partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[4, 11], gamma=.3)
    sgd = functools.partial(torch.optim.SGD, lr=.05, momentum=.9, nesterov=True, weight_decay=.001)
    return Fit(Net(), folder, name, numbers, numbers, learning_rate=tk.TorchSchedule(falling, .05, every="step"),
               policies=[Remembers()], optimizer=sgd, max_epochs=3, device="cpu", num_threads=1,
               checkpoint_every_seconds=None, checkpoint_every_batches=2, progress=False)


KILLED_AT = 9  # step; the last checkpoint is of the one before


def kill_at_step(trainer: tk.Trainer) -> None:
    def listen(event, t):
        if event == "batch" and t.status.phase == "training" and t.state.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
    trainer.listeners.append(listen)


def finished_trainer(folder: Path, name: str = "finished", max_epochs: int = 2) -> Fit:
    numbers = Numbers()
    return Fit(Net(), folder, name, numbers, numbers, learning_rate=[.02, .01], optimizer="AdamW",
               policies=[Remembers()], patience=9, max_epochs=max_epochs, device="cpu", num_threads=1,
               keep_checkpoints=1, checkpoint_every_seconds=None, progress=False)


def load_image(i):
    return (np.arange(16.).reshape(4, 4) * (i + 1) % 23 - 11) / 8


def load_label(i):
    return i % 3


def turn(item):
    image, label = item
    return image.T.copy(), label


class Weighted(tk.TorchModel):
    """A step that takes one argument more; and, where it is told to, somebody presses Ctrl-C."""

    interrupt_at = 0

    def do_train_step(self, *inputs, lr, weight):
        self.interrupt_at -= 1
        if self.interrupt_at == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return super().do_train_step(*inputs, lr=lr * weight)


INTERRUPTED_AT = 8  # step; five make an epoch


def functional_core() -> nn.Module:
    core = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Dropout(.2), nn.Tanh(), nn.Linear(6, 3))
    exact_weights(core)
    return core


def functional_training(folder: Path, interrupt_at: int = 0) -> tk.TrainerState:
    """`train_model` with policies of several kinds, and a log in a folder of its own."""
    model = Weighted(functional_core(), nn.Softmax(-1), nn.CrossEntropyLoss(), torch.optim.AdamW)
    model.interrupt_at = interrupt_at
    images = tk.load_by_random_id(load_image, load_label, ids=range(30), weights=[1 + i % 4 for i in range(30)])
    batches = tk.Infinite(images, Threads(random_apply(.5, turn), n_workers=2), random_apply(.3, turn),
                          batch_size=4, batches_per_epoch=5, seed=3)
    held_out = np.stack([load_image(i) for i in range(6)]).astype(np.float32)

    def validate():
        p = model.do_inf_step(held_out)
        return {"valid_loss": -float(np.log(p[np.arange(6), np.arange(6) % 3]).mean()), "sure": float(p.max(-1).mean())}

    rate = tk.DecreasingOnPlateau(initial=.02, multiplier=.5, patience=0, rtol=.2, atol=.2)
    return tk.train_model(model, batches, 3, rate, folder / "functional/logs", folder / "functional/checkpoints",
                          validate, progress=False, weight=tk.Exponential(1, .8), remembers=Remembers(),
                          options={"checkpoint_every_batches": 2, "num_threads": 1})


# ---- what is kept of a training ------------------------------------------------------------------------------

OF_TIME_AND_PLACE = ("/time", "/run_id", "/parent", "/log_path", "/fingerprints/environment", "/fingerprints/config")


def mark(array) -> str:
    """A digest of an array: its type, its shape, its bits."""
    array = np.ascontiguousarray(array)
    return f"{array.dtype} {list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


def content(state: tk.TrainerState) -> tuple[dict, dict]:
    """A state without what the clock, the place and the version say: as JSON has it, with marks for arrays; and the
    arrays by their paths."""
    arrays = {}

    def walk(node, path):
        if isinstance(node, dict):
            kept = {str(k): v for k, v in node.items() if not f"{path}/{k}".startswith(OF_TIME_AND_PLACE)}
            return {k: walk(v, f"{path}/{k}") for k, v in kept.items()}
        if isinstance(node, (list, tuple)):
            return [walk(v, f"{path}/{i}") for i, v in enumerate(node)]
        if isinstance(node, (torch.Tensor, np.ndarray)):
            arrays[path] = node.detach().numpy().copy() if isinstance(node, torch.Tensor) else node
            return mark(arrays[path])
        return node

    return walk(state.state_dict(), ""), arrays


def log_without_time(folder: Path) -> list[dict]:
    """The records of a log; the file is read as it is."""
    records = map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [{k: v for k, v in r.items() if k != "time"} for r in records]


def log_folder(folder: Path, name: str) -> Path:
    return folder / ("functional/logs" if name == "functional" else RUNS[name])


def own_model(name: str) -> nn.Module | None:
    """A module that the package cannot build by its name."""
    return None if name == "streamlines" else functional_core() if name == "functional" else Net()


def load(folder: Path, name: str) -> tk.TrainerState:
    """The state of a run, from its folder."""
    return tk.TrainerState.load(folder / RUNS[name], model=own_model(name))


def best_model(folder: Path, name: str) -> dict[str, str]:
    """Marks of the weights in `best_model`."""
    model = tk.load_model(folder / RUNS[name] / "best_model", own_model(name))
    return {k: mark(v.numpy()) for k, v in model.state_dict().items()}


def standing(folder: Path, name: str) -> dict:
    """How a training stands that was stopped: its state, its history, its best model."""
    state = load(folder, name)
    found = {"run_id": state.run_id, "position": state.position, "state": content(state)[0],
             "best_model": best_model(folder, name), "epochs": {k: v.tolist() for k, v in state.history.items()}}
    if name != "functional":  # its log is beside the folder, and is not found where that was moved to
        found["batches"] = {k: v.tolist() for k, v in state.history.batches.items() if k not in ("at", "seconds")}
    return found


def ending(state: tk.TrainerState, folder: Path, name: str) -> tuple[dict, dict]:
    """How a training ended, as JSON has it; and the arrays of its state."""
    tree, arrays = content(state)
    log = log_without_time(log_folder(folder, name))
    return {"state": tree, "log": log, "best_model": best_model(folder, name)}, arrays


def table(folder: Path) -> list[dict]:
    """The listing of all runs of a folder."""
    columns = ("name", "status", "epochs", "max_epochs", "step", "best", "best_epoch")
    return [{k: getattr(run, k) for k in columns} for run in tk.find_runs(folder)]


def arithmetic() -> dict[str, str]:
    """What bits depend on beside the package: versions, the CPU's instructions, digests of sums like those that are
    made here, and of torch's draws.

    Where one of them differs, a training may end in other last bits, and no version of the package is to blame."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        lines = [np.linspace(.1, 5, 99, dtype=dtype) for dtype in (np.float32, np.float64)]
        results = [f(x) for x in lines for f in (np.exp, np.log, np.sqrt)]
        for n, steps in ((1, 7), (3, 12), (6, 17)):
            results += _sums(n, steps)
        draws = torch.empty(3, 99).bernoulli_(.8, generator=torch.Generator().manual_seed(7))
    finally:
        torch.set_num_threads(before)
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(r).tobytes() for r in results)).hexdigest()
    return {"torch": torch.__version__, "numpy": np.__version__, "machine": platform.machine(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(), "sums": digest[:16],
            "draws": mark(draws.numpy())}


def _sums(n: int, steps: int) -> list[np.ndarray]:
    """Two steps of torch's own layers, in the sizes that are used here."""
    first, second, wide, norm = nn.LSTM(6, 4), nn.LSTM(10, 3), nn.Linear(16, 6), nn.BatchNorm1d(6)
    last = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3), nn.Tanh())
    layers = nn.ModuleList([first, second, wide, norm, last])
    exact_weights(layers)
    x = ((torch.arange(steps * n * 6) * 613 % 97 - 48) / 32).view(steps, n, 6)
    for optimizer in (torch.optim.Adam(layers.parameters(), lr=.01),
                      torch.optim.SGD(layers.parameters(), lr=.01, momentum=.9)):
        seen = first(x)[0]
        out = last(second(torch.cat([x, seen], 2))[0])
        logits = norm(wide(x.reshape(-1)[:32].view(2, 16)))
        loss = (1 - nn.functional.cosine_similarity(out, x[..., :3], dim=-1)).mean()
        loss = loss + nn.functional.cross_entropy(logits, torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(layers.parameters(), .5)
        optimizer.step()
    return [p.detach().numpy() for p in layers.parameters()]


# ---- making it -----------------------------------------------------------------------------------------------


def stop_all(data: Path, folder: Path) -> None:
    """The trainings as they are kept."""
    trainer = streamline_trainer(data, folder)
    change_at_step(trainer, stop=True)
    assert trainer.train_and_validate().global_step == STOPPED_AT
    killed = subprocess.run([sys.executable, __file__, str(folder), "killed"])
    assert killed.returncode == -signal.SIGKILL
    assert functional_training(folder, INTERRUPTED_AT).global_step == INTERRUPTED_AT
    assert finished_trainer(folder).train_and_validate().finished


def go_on_all(data: Path, folder: Path) -> dict[str, tuple]:
    """To the end, from wherever they stand."""
    states = {"streamlines": streamline_trainer(data, folder).train_and_validate(),
              "points": point_trainer(folder).train_and_validate(),
              "functional": functional_training(folder),
              "finished": finished_trainer(folder, max_epochs=4).train_and_validate()}
    return {name: ending(state, folder, name) for name, state in states.items()}


def in_one_go(data: Path, folder: Path) -> dict[str, tuple]:
    """The same trainings, never stopped."""
    trainer = streamline_trainer(data, folder)
    change_at_step(trainer, stop=False)
    trainer.train_and_validate()
    return go_on_all(data, folder)


def write_in_lines(path: Path, made: dict) -> None:
    """JSON with a line for each thing of each training."""
    parts = [f'"{k}": {json.dumps(v)}' for k, v in made.items() if k != "runs"]
    runs = []
    for name, run in made["runs"].items():
        lines = [f'"{k} {what}": {json.dumps(v)}' for k, of in run.items() for what, v in of.items()]
        runs.append(f'"{name}": {{\n  ' + ",\n  ".join(lines) + "}")
    path.write_text("{" + ",\n".join([*parts, '"runs": {' + ",\n ".join(runs)]) + "}}\n", encoding="utf-8")


def check_version() -> None:
    checkout = Path(tk.__file__).resolve().parent.parent
    words = [subprocess.run(["git", "-C", str(checkout), *command.split()], capture_output=True, text=True).stdout
             for command in ("rev-parse HEAD", "status --porcelain --untracked-files=no")]
    assert words[0].startswith(COMMIT) and not words[1], f"this is to be run with commit {COMMIT}, not in {checkout}"


def check_neutral(folder: Path) -> None:
    """Nothing that is kept tells of the machine it was made on."""
    words = [b"/tmp", b"/work", b"/home", b"/root", b"/usr", sys.prefix.encode(), f'"{os.uname().nodename}"'.encode()]
    for path in filter(Path.is_file, folder.rglob("*")):
        assert not [w for w in words if w in path.read_bytes()], path


def main(root: Path) -> None:
    check_version()
    root.mkdir(parents=True)
    data = make_data(root)
    stop_all(data, root / "runs")
    shutil.copytree(root / "runs", root / "again")
    whole, again = in_one_go(data, root / "whole"), go_on_all(data, root / "again")
    made = {"commit": COMMIT, "arithmetic": arithmetic(), "data": data_contents(data), "table": table(root / "runs"),
            "runs": {name: {"stopped": standing(root / "runs", name), "ended": whole[name][0]} for name in RUNS}}
    for name in RUNS:  # stopped or not, they end in the same bits
        assert json.dumps(whole[name][0]) == json.dumps(again[name][0]), name
    kept = root / "kept"
    shutil.copytree(root / "runs", kept / "trainings",
                    ignore=lambda _, names: [n for n in names if n.startswith(".") and n != ".lock"])
    shutil.copyfile(data, kept / "data.h5")
    ends = {name: [a.ravel().view(np.uint8) for a in arrays.values()] for name, (_, arrays) in whole.items()}
    np.savez_compressed(kept / "ended.npz", **{name: np.concatenate(parts) for name, parts in ends.items()})
    write_in_lines(kept / "made.json", made)
    check_neutral(kept)
    for path in kept.iterdir():
        to = HERE / path.name
        shutil.rmtree(to) if to.is_dir() else to.unlink(missing_ok=True)
        shutil.move(path, to)


if __name__ == "__main__":
    socket.gethostname = lambda: "before"
    if sys.argv[2:] == ["killed"]:
        trainer = point_trainer(Path(sys.argv[1]))
        kill_at_step(trainer)
        trainer.train_and_validate()
    else:
        main(Path(sys.argv[1]))
