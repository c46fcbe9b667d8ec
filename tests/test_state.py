"""The state of training: saved, loaded, copied, handed from thread to thread."""

import threading
import time

import pytest
import torch
from helpers_training import Points, fit, same_states, toy_model
from torch import nn

from tractkit.card import sparkline
from tractkit.checkpoint import load_checkpoint, save_checkpoint
from tractkit.describe import differences, make_optimizer
from tractkit.files import DataError
from tractkit.models.learn2track import Learn2Track
from tractkit.state import TrainerState


@pytest.fixture
def trained(tmp_path):
    trainer = fit(tmp_path, max_epochs=2)
    return trainer.train_and_validate()


def test_load_gives_back_what_was_saved(trained, tmp_path):
    trained.save(tmp_path / "s.ckpt")
    back = TrainerState.load(tmp_path / "s.ckpt", model=toy_model())
    assert same_states(back, trained) == [] and back.run_id == trained.run_id and back.time == trained.time
    from_run = TrainerState.load(tmp_path / "run", model=toy_model())
    assert same_states(from_run, trained) == []
    assert same_states(TrainerState.load(tmp_path / "run/checkpoints", model=toy_model()), trained) == []


def test_copies_share_nothing(trained):
    snapshot, branch = trained.snapshot(), trained.fork()
    before = {k: v.clone() for k, v in snapshot.model.state_dict().items()}
    assert same_states(snapshot, trained) == [] and same_states(branch, trained) == []
    assert snapshot.run_id == trained.run_id and branch.run_id != trained.run_id and branch.parent == trained.run_id
    for p in trained.model.parameters():
        p.grad = torch.ones_like(p)
    trained.optimizer.step()
    trained.epochs.append({"epoch": 9})
    trained.curve.append(1, 1.0)
    trained.fingerprints["environment"]["torch"] = "0"
    assert all(torch.equal(v, before[k]) for k, v in snapshot.model.state_dict().items())
    assert same_states(snapshot, branch) == []
    owners = {id(p) for g in snapshot.optimizer.param_groups for p in g["params"]}
    assert owners == {id(p) for p in snapshot.model.parameters()}


def test_registered_models_are_rebuilt_others_must_be_given(tmp_path):
    state = TrainerState.create(Learn2Track(3, rnn_layer_sizes=(4,), rnn_key="gru"), "RAdam", seed=7)
    state.save(tmp_path / "a")
    back = TrainerState.load(tmp_path / "a")
    assert type(back.model) is Learn2Track and type(back.optimizer) is torch.optim.RAdam and back.seed == 7

    class Mine(nn.Linear):
        pass

    TrainerState.create(Mine(2, 2)).save(tmp_path / "b")
    with pytest.raises(DataError, match=r"model=Mine\(\.\.\.\)"):
        TrainerState.load(tmp_path / "b")
    TrainerState.load(tmp_path / "b", model=Mine(2, 2))


@pytest.mark.parametrize("other, text", [(lambda: Learn2Track(3, rnn_layer_sizes=(5,)), "rnn_layer_sizes"),
                                         (lambda: nn.Linear(3, 4), "class: Learn2Track -> Linear")])
def test_what_does_not_fit_is_spelled_out(tmp_path, other, text):
    TrainerState.create(Learn2Track(3, rnn_layer_sizes=(4,))).save(tmp_path / "a")
    with pytest.raises(DataError, match=text):
        TrainerState.load(tmp_path / "a", model=other())


def test_a_missing_field_is_no_silent_default(tmp_path):
    state = TrainerState.create(Learn2Track(3, rnn_layer_sizes=(4,)))
    state.save(tmp_path / "a")
    tree = load_checkpoint(tmp_path / "a")
    for name in sorted(tree):
        if name in ("format",):
            continue
        save_checkpoint(tmp_path / "b", {k: v for k, v in tree.items() if k != name})
        with pytest.raises((DataError, KeyError)):
            TrainerState.load(tmp_path / "b")


def test_optimizers():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert make_optimizer(model, "SGD", 0.1, 0, momentum=0.9).param_groups[0]["params"] == [model.weight]
    assert make_optimizer(model, lambda p: torch.optim.Rprop(p, lr=0.3)).defaults["lr"] == 0.3
    with pytest.raises(ValueError, match="one of Adam, AdamW, RAdam, SGD"):
        make_optimizer(model, "Adagrad")
    assert differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}, "d": 4}) == ["c: 2 -> 3", "d: None -> 4"]


def test_copies_of_a_running_training_are_consistent(tmp_path):
    """Each copy must be the state of an undisturbed run at that step: no half-made update in it."""
    trainer = fit(tmp_path, points=Points(40), max_epochs=6)
    trainer.step(1)
    trainer.resume()
    copies = []
    while trainer.running and len(copies) < 8:
        copies.append(trainer.state.snapshot())
        trainer.state.save(tmp_path / "cell.ckpt")
        time.sleep(0.002)
    trainer.wait()
    assert len({c.global_step for c in copies}) > 2
    for copy in copies[:-1]:
        alone = fit(tmp_path, f"alone-{copy.global_step}", points=Points(40), max_epochs=6)
        if copy.batch:  # not at the very end of an epoch, where validation comes next
            alone.step(copy.global_step)
            assert same_states(alone.state, copy) == []
            alone.stop(wait=True)


def test_work_waits_for_the_batch_and_carries_its_error(tmp_path):
    trainer = fit(tmp_path, points=Points(50), max_epochs=50)
    trainer.start()
    while trainer.status.phase != "training":
        time.sleep(0.001)
    threads = {trainer.state.gate.call(threading.get_ident) for _ in range(3)}
    assert threads == {trainer._thread.ident}
    with pytest.raises(ZeroDivisionError):
        trainer.state.gate.call(lambda: 1 / 0)
    trainer.stop(wait=True)
    assert trainer.state.gate.call(threading.get_ident) == threading.get_ident()


def test_moving_to_the_same_device_changes_nothing(trained):
    before = trained.snapshot()
    assert same_states(trained.to("cpu"), before) == []


def test_what_it_looks_like(trained):
    text, page = repr(trained), trained._repr_html_()
    assert "2 epochs done (step 12)" in text and "best" in text
    assert "<svg" in page and "object at 0x" not in page and page.count("<div") == page.count("</div>")
    assert TrainerState.create(toy_model())._repr_html_().count("<svg") == 0
    assert sparkline({"red": ([1, 2], [float("nan"), float("nan")])}) == ""
    assert "nan" not in sparkline({"red": ([1, 2, 3], [1.0, float("inf"), 1.0])})
