"""Weights of our own runs and of others: the latest, the best, and no code run on the way."""

import os
import pickle
import shutil

import pytest
import torch
from helpers_training import fit, toy_model
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from tractkit.core.files import DataError
from tractkit.models.base import load_model
from tractkit.runs.weights import load_best_val, load_latest, load_weights, read_scalars, read_weights
from tractkit.training.state import TrainerState


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def net(seed):
    torch.manual_seed(seed)
    return nn.Linear(2, 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    trainer = fit(
        tmp_path_factory.mktemp("run"), max_epochs=6, learning_rate=[0.01, 0.01, 1.0, 1.0, 1.0, 1.0]
    )  # it gets worse
    trainer.train_and_validate()
    assert trainer.state.best["epoch"] < 4
    return trainer


def test_the_latest_of_a_run(run):
    for where in (run.folder, run.folder / "checkpoints", run.folder.parent):
        model = toy_model()
        assert load_latest(where, model) == run.checkpoints.path(36) and same(model, run.model)


def test_the_best_is_the_best(run, tmp_path):
    """Its checkpoint is kept beside the last ones, and holds what best_model holds."""
    best = run.state.history["valid_loss"].argmin()
    assert run.checkpoints.steps() == [6 * best + 6, 30, 36]
    model = toy_model()
    assert load_best_val(run.folder, run.folder, model) == run.checkpoints.path(6 * best + 6)
    assert same(model, load_model(run.folder / "best_model", toy_model()))
    copy = shutil.copytree(run.folder / "checkpoints", tmp_path / "copy")
    (copy / f"step-{6 * best + 6:08d}.ckpt").unlink()
    with pytest.raises(DataError, match="its weights are not there; there are: step-"):
        load_best_val(run.folder, copy, model)
    with pytest.raises(DataError, match="no other_loss in this log"):
        load_best_val(run.folder, run.folder, model, metric="other_loss")
    assert load_best_val(run.folder / "best_model", run.folder, model) is None


def test_back_to_the_best(run):
    state = TrainerState.load(run.folder, toy_model())
    state.rewind(state.best["epoch"] + 1)
    assert same(state.model, load_model(run.folder / "best_model", toy_model()))


@pytest.mark.parametrize(
    "steps, numbers", [((0, 1, 2), (0, 1, 2)), ((1, 2, 3), (1, 2, 3)), ((50, 100, 150), (1, 2, 3))]
)
def test_of_other_programs_with_tensorboard(tmp_path, steps, numbers):
    """Scores at epochs or at iterations; weights numbered by epoch."""
    with SummaryWriter(tmp_path / "tensorboard") as writer:
        for step, number, score in zip(steps, numbers, (float("nan"), .5, .7), strict=True):
            writer.add_scalar("train/loss", 1.0, step)
            writer.add_scalar("validation", score, step)
            torch.save(net(number).state_dict(), tmp_path / f"unet_{number}.pth")
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert [(n, s) for n, s, _ in read_scalars(events) if n == "validation"] == [("validation", s) for s in steps]
    model = nn.Linear(2, 2)
    where = tmp_path / "{model_name}_{epoch}.pth"
    assert load_best_val(tmp_path / "tensorboard", where, model).name == f"unet_{numbers[1]}.pth" and same(
        model, net(numbers[1])
    )
    assert load_best_val(tmp_path / "tensorboard", where, model, low_is_best=False).name == f"unet_{numbers[2]}.pth"
    assert load_latest(where, model).name == f"unet_{numbers[2]}.pth" and same(model, net(numbers[2]))
    if steps == numbers:
        events.write_bytes(events.read_bytes()[:-30])  # being written
        assert load_best_val(tmp_path / "tensorboard", where, model).name == f"unet_{numbers[1]}.pth"
    (tmp_path / f"unet_{numbers[1]}.pth").unlink()
    with pytest.raises(DataError, match="0.5, is that of step"):
        load_best_val(tmp_path / "tensorboard", where, model)


def test_the_highest_number_is_the_latest(tmp_path):
    for number in (9, 10, 2):
        torch.save({"epoch": number, "state_dict": net(number).state_dict()}, tmp_path / f"net_{number}.pth")
    model = nn.Linear(2, 2)
    assert load_latest(tmp_path, model).name == "net_10.pth" and same(model, net(10))
    (tmp_path / "net_10.pth").write_bytes(b"\x80half")
    with pytest.warns(UserWarning, match="Looking for an earlier one"):
        assert load_latest(tmp_path / "*.pth", model).name == "net_9.pth"
    assert load_latest(tmp_path / "nothing", model) is None and same(model, net(9))


def test_what_does_not_fit_leaves_the_model(tmp_path):
    torch.save(nn.Linear(2, 3).state_dict(), tmp_path / "a.pth")
    model = net(1)
    with pytest.raises(DataError, match=r"weight: \[3, 2\] -> \[2, 2\]"):
        load_weights(tmp_path / "a.pth", model)
    assert same(model, net(1))
    torch.save({"loss": 1.0}, tmp_path / "b.pth")
    with pytest.raises(DataError, match="no weights in this file"):
        read_weights(tmp_path / "b.pth")
    with pytest.raises(DataError, match="cannot be read"):
        read_weights(tmp_path / "c.pth")


def test_tied_weights(tmp_path):
    def tied():
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        model[1].weight = model[0].weight
        return model

    from safetensors.torch import save_model
    source, model = tied(), tied()
    save_model(source, str(tmp_path / "a.safetensors"))
    load_weights(tmp_path / "a.safetensors", model)
    assert same(source, model) and model[0].weight is model[1].weight


@pytest.mark.parametrize("name", ["a.pth", "a.pkl", "a.pt", "a.safetensors", "a.ckpt", "step-00000001.ckpt"])
@pytest.mark.parametrize(
    "write",
    [
        lambda o, p: torch.save({"state_dict": o}, p),
        lambda o, p: p.write_bytes(pickle.dumps(o)),
        lambda o, p: torch.save(o, p, _use_new_zipfile_serialization=False),
    ],
)
def test_no_code_runs(tmp_path, name, write):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    write(Evil(), tmp_path / name)
    for read in (
        read_weights,
        lambda p: load_weights(p, net(0)),
        lambda p: TrainerState.load(p, net(0)),
        lambda p: load_model(p, net(0)),
    ):
        with pytest.raises(DataError):
            read(tmp_path / name)
    with pytest.warns(UserWarning):
        assert load_latest(tmp_path, net(0)) is None
    assert not (tmp_path / "owned").exists()


def test_our_log_is_read_first_and_events_without_tensorboard_are_one_error(run, tmp_path, monkeypatch):
    with SummaryWriter(tmp_path / "events") as writer:
        writer.add_scalar("validation", .5, 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with SummaryWriter(run.folder / "tensorboard") as writer:
        writer.add_scalar("valid_loss", -1.0, 1)
    assert load_best_val(run.folder, run.folder, toy_model()) == run.checkpoints.path(6 * run.state.best["epoch"] + 6)
    assert load_best_val(tmp_path / "nothing", tmp_path, net(0)) is None
    with pytest.raises(ImportError, match=r"pip install 'tractkit\[tensorboard\]'"):
        load_best_val(tmp_path / "events", tmp_path, net(0))
