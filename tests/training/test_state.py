"""The state of training: saved, loaded, copied, handed from thread to thread."""

import sys
import threading
import time
import types

import numpy as np
import pytest
import torch
from helpers_training import Points, SlowPoints, fit, log_without_time, same_states, toy_model
from helpers_waiting import until
from torch import nn

from tractkit.core.files import DataError
from tractkit.core.html import sparkline
from tractkit.models.learn2track import Learn2Track
from tractkit.runs import log as runlog
from tractkit.runs.checkpoint import load_checkpoint, save_checkpoint
from tractkit.runs.fingerprint import differences
from tractkit.training import commands
from tractkit.training.optimizers import make_optimizer
from tractkit.training.state import TrainerState


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
        save_checkpoint(tmp_path / "b", {k: v for k, v in tree.items() if k != name})
        with pytest.raises(DataError, match=name if name != "format" else "format None"):
            TrainerState.load(tmp_path / "b")
    before = state.snapshot()
    with pytest.raises(DataError, match="curve missing"):
        state.load_state_dict({k: v for k, v in tree.items() if k != "curve"} | {"seed": 99})
    assert same_states(state, before) == []  # nothing was taken over


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
    assert threads == {trainer.runner.thread.ident}
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


# -- history

def test_history_is_that_of_the_state_not_of_the_log(tmp_path):
    trainer = fit(tmp_path, max_epochs=3)
    trainer.train_and_validate()
    history = trainer.state.history
    assert (
        list(history) == list(history.epochs)
        and history["epoch"].tolist() == [0, 1, 2]
        and isinstance(history["valid_loss"], np.ndarray)
    )
    assert history.batches["step"].tolist() == list(range(1, 19)) and (history.batches["seconds"] >= 0).all()
    assert history.batches["loss"].tolist() == [r["loss"] for r in trainer.log.records("batch")]
    early = TrainerState.load(trainer.checkpoints.path(12), toy_model())  # the log is ahead of it
    assert early.history.batches["step"][-1] == 12 and early.history["epoch"].tolist() == [0, 1]
    assert TrainerState.create(toy_model()).history.batches == {} and len(TrainerState.create(toy_model()).history) == 0


def test_history_of_a_state_that_was_saved_elsewhere(trained, tmp_path):
    trained.save(tmp_path / "elsewhere.ckpt")
    back = TrainerState.load(tmp_path / "elsewhere.ckpt", toy_model())
    assert back.history.batches["step"].tolist() == list(range(1, 13))
    trained.log.path.rename(tmp_path / "moved")
    with pytest.raises(DataError, match="the log of this training is not there"):
        dict(back.history.batches)
    assert back.history["epoch"].tolist() == [0, 1]


def test_frames_if_pandas_is_there(trained, monkeypatch):
    frames = types.ModuleType("pandas")
    frames.DataFrame = lambda columns: ("frame", dict(columns))
    monkeypatch.setitem(sys.modules, "pandas", frames)
    kind, columns = trained.history.batches.frame()
    assert kind == "frame" and columns["step"].tolist() == list(range(1, 13))
    assert trained.history.epochs.frame()[1]["epoch"].tolist() == [0, 1]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError):
        trained.history.epochs.frame()


# -- back, and branches

def test_rewinding_and_going_on_ends_in_the_same_bits(tmp_path):
    whole = fit(tmp_path, "whole", max_epochs=4).train_and_validate()
    trainer = fit(tmp_path, max_epochs=4, keep_checkpoints=3)
    state = trainer.train_and_validate()
    assert state.rewind(2) is state and (state.epoch, state.batch, state.finished) == (2, 0, None)
    assert len(state.history.batches["loss"]) == 12
    with pytest.warns(UserWarning, match="set back from step 24 to 12"):
        assert trainer.train_and_validate() is state  # the same trainer, without naming the state
    assert same_states(state, whole) == []
    assert log_without_time(trainer.log) == log_without_time(fit(tmp_path, "whole").log)
    state.rewind(trainer.checkpoints.path(18))
    assert state.epoch == 3
    with pytest.warns(UserWarning, match="set back"):
        fit(tmp_path, max_epochs=4).train_and_validate(state)
    assert same_states(state, whole) == []


@pytest.mark.parametrize("end", ["stop", "finish", pytest.param("process", marks=pytest.mark.full)])
def test_what_is_asked_of_a_training_that_closes_is_done(tmp_path, monkeypatch, end):
    whole = fit(tmp_path, "whole", max_epochs=4).train_and_validate()
    trainer = fit(tmp_path, max_epochs=3, keep_checkpoints=9, points=SlowPoints())
    close = trainer.run_folder.log.close
    if end != "process":  # it takes a moment of itself
        monkeypatch.setattr(trainer.run_folder.log, "close", lambda: (time.sleep(.3), close()))
    trainer.start(process=end == "process")
    if end != "finish":
        until(lambda: trainer.status.epoch and trainer.status.phase == "training")
        trainer.stop()
    until(lambda: trainer.status.phase in ("stopped", "finished"))
    assert trainer.running or end == "process"  # it closes what is open
    assert trainer.rewind(1).epoch == 1 and not trainer.running
    assert trainer.status.phase == "stopped" and "Set back" in trainer.status.message
    trainer.start(process=end == "process")
    until(lambda: trainer.status.phase == "finished")
    trainer.change(max_epochs=4)
    trainer.start()  # at once
    trainer.wait()
    assert trainer.status.phase == "finished" and [
        name for name in same_states(trainer.state, whole) if "changes" not in name] == []


@pytest.mark.parametrize("first", ["stop", "rewind"])
def test_stop_and_going_back_right_after_each_other(tmp_path, first):
    trainer = fit(tmp_path, keep_checkpoints=9, points=SlowPoints(), max_epochs=9)
    trainer.start()
    until(lambda: trainer.status.global_step > 1)
    if first == "stop":
        trainer.stop()
        trainer.rewind(0)
    else:
        trainer.runner.ask_back(trainer.state.state_dict())
        trainer.stop()
        trainer.rewind(0)
    assert (trainer.state.global_step, trainer.status.phase, trainer.running) == (0, "idle", False)


def test_who_waits_for_the_end_of_a_training_does_not_wait_for_the_next(tmp_path):
    runner, first, second = fit(tmp_path).runner, threading.Event(), threading.Event()
    runner.start(lambda: (runner.over(), first.wait()))
    until(lambda: runner.is_over)
    waiting = threading.Thread(target=runner.until_ended, args=(runner.loop,))
    waiting.start()
    threading.Timer(.1, first.set).start()
    runner.start(second.wait)  # waits for the end of the first, too
    waiting.join(5)
    assert not waiting.is_alive() and runner.running
    second.set()
    runner.wait()


def test_of_two_starts_at_once_one_is_refused(tmp_path):
    for k in range(8):
        trainer, both, said = fit(tmp_path, f"run-{k}", max_epochs=1), threading.Barrier(2), []

        def start(trainer=trainer, both=both, said=said):
            both.wait()
            try:
                said.append(trainer.start())
            except RuntimeError as e:
                said.append(str(e))

        threads = [threading.Thread(target=start) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        trainer.wait()
        assert sorted(map(str, said)) == ["None", "it is running already; wait() for it or stop() it first"]
        assert trainer.status.phase == "finished"


def test_a_start_waits_for_a_checkpoint_that_is_being_written(tmp_path, monkeypatch):
    trainer = fit(tmp_path)
    trainer.step(2)
    trainer.stop(wait=True)
    writing, write = threading.Event(), commands.write_checkpoint
    monkeypatch.setattr(commands, "write_checkpoint", lambda t, **how: (
        writing.set(), time.sleep(.3), write(t, **how))[2])
    saving = threading.Thread(target=trainer.save_checkpoint)
    saving.start()
    assert writing.wait(5)
    trainer.start()
    trainer.wait()
    saving.join()
    assert trainer.status.phase == "finished"


def test_where_it_cannot_be_set_back_to(tmp_path):
    trainer = fit(tmp_path, max_epochs=5, keep_checkpoints=1)
    state = trainer.train_and_validate()
    kept = trainer.checkpoints.steps()
    assert state.best_step in kept and len(kept) <= 2
    state.rewind(state.best["epoch"] + 1)
    state.rewind(trainer.checkpoints.path(30))
    before = state.snapshot()
    with pytest.raises(DataError, match=r"no checkpoint of the end of 1 epochs; there are those of .*5"):
        state.rewind(1)
    other = fit(tmp_path, "other", max_epochs=1)
    other.train_and_validate()
    with pytest.raises(DataError, match="a checkpoint of another run"):
        state.rewind(other.checkpoints.path(6))
    with pytest.raises(DataError, match="there is no such checkpoint"):
        state.rewind(tmp_path / "nothing.ckpt")
    with pytest.raises(DataError, match="there are those of none"):
        TrainerState.create(toy_model()).rewind(0)
    assert same_states(state, before) == []
    slow = fit(tmp_path, "slow", points=SlowPoints(40))
    slow.step(1)
    with pytest.raises(RuntimeError, match="being trained"):
        slow.state.rewind(0)
    slow.stop(wait=True)


def test_a_branch_has_its_own_run_and_the_common_past(tmp_path):
    trainer = fit(tmp_path, max_epochs=2)
    branch = trainer.train_and_validate().fork()
    fit(tmp_path, max_epochs=4).train_and_validate()
    other = fit(tmp_path, "branch", max_epochs=4, learning_rate=.003)
    other.train_and_validate(branch)
    assert branch.history.batches["step"].tolist() == list(range(1, 25)) and branch.parent == trainer.state.run_id
    mine, past = other.log.records("batch"), trainer.log.records("batch")
    assert mine[:12] == past[:12] and mine[12] != past[12]
    assert TrainerState.load(other.folder, toy_model()).run_id == branch.run_id


def test_evaluation_of_the_live_model_leaves_no_trace(tmp_path):
    whole = fit(tmp_path, "whole", points=Points(30)).train_and_validate()
    trainer = fit(tmp_path, points=Points(30))
    trainer.step(1)
    trainer.resume()
    x, modes = torch.ones(5, 1), set()
    while trainer.running:
        values = [
            trainer.state.evaluate(lambda m: (modes.add((m.training, torch.is_grad_enabled())), m(x))[1])
            for _ in range(2)
        ]
        assert not values[0].requires_grad
    trainer.wait()
    assert modes == {(False, False)} and same_states(trainer.state, whole) == []
    frozen = trainer.state
    frozen.model.train()
    frozen.model[2].eval()  # each layer keeps its own mode
    with pytest.raises(ZeroDivisionError):
        frozen.evaluate(lambda m: 1 / 0)
    assert frozen.model.training and not frozen.model[2].training


# -- other models, by name

def test_what_fits_can_be_taken_over_by_name(tmp_path):
    fit(tmp_path, max_epochs=1).train_and_validate()
    wider = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Identity(), nn.Linear(16, 2))
    own = wider[3].weight.clone()
    with pytest.raises(DataError, match=r"3.weight: \[1, 16\] -> \[2, 16\].*accept=\['model'\]"):
        TrainerState.load(tmp_path / "run", wider)
    with pytest.warns(
        UserWarning, match="2 of 4 weights are taken over, not 3.bias, 3.weight; the optimizer starts anew"
    ):
        state = TrainerState.load(tmp_path / "run", wider, accept=["model"])
    stored = load_checkpoint(tmp_path / "run/checkpoints/step-00000006.ckpt")
    assert torch.equal(wider[0].weight, stored["model"]["weights"]["0.weight"]) and torch.equal(wider[3].weight, own)
    assert state.epoch == 1 and not state.optimizer.state
    with pytest.raises(DataError, match="optimizer: Adam -> SGD"):
        TrainerState.load(tmp_path / "run", toy_model(), "SGD")
    with pytest.warns(UserWarning, match="4 of 4 weights are taken over; the optimizer starts anew"):
        assert (
            type(TrainerState.load(tmp_path / "run", toy_model(), "SGD", accept=["optimizer"]).optimizer)
            is torch.optim.SGD
        )


def test_other_hyperparameters_with_equal_weights_keep_the_optimizer(tmp_path):
    trained = TrainerState.create(Learn2Track(3, rnn_layer_sizes=(4,), dropout=.1))
    for p in trained.model.parameters():
        p.grad = torch.ones_like(p)
    trained.optimizer.step()
    trained.save(tmp_path / "a")
    state = TrainerState.load(tmp_path / "a", Learn2Track(3, rnn_layer_sizes=(4,), dropout=.2), accept=["model"])
    assert [s["step"] for s in state.optimizer.state.values()] == [1] * len(list(state.model.parameters()))


def test_a_trainer_accepts_them_too(tmp_path):
    trainer = fit(tmp_path, max_epochs=1)
    trainer.train_and_validate()
    wider = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Identity(), nn.Linear(16, 1, bias=False))
    with pytest.warns(UserWarning, match="3 of 3 weights"):
        state = fit(tmp_path, "wider", model=wider, accept=["model", "optimizer"], optimizer="SGD").train_and_validate(
            trainer.state.fork()
        )
    assert state.model is wider and state.epoch == 3
    with pytest.warns(UserWarning, match="the optimizer starts anew"):
        assert fit(tmp_path, accept=["optimizer"], optimizer="SGD").train_and_validate().epoch == 3


def test_other_settings_are_said(tmp_path, capsys):
    trainer = fit(tmp_path)
    trainer.step(4)
    trainer.stop(wait=True)
    fit(tmp_path, clip_grad=1.0, learning_rate=.02, progress=True).train_and_validate()
    assert "other settings: weight_decay" not in (said := capsys.readouterr().out)
    assert "clip_grad: None -> 1.0" in said and "Constant(0.02)" in said
    assert TrainerState.load(tmp_path / "run", toy_model()).fingerprints["config"]["clip_grad"] == 1.0


# -- size, and time to resume

class Many(Points):
    """An epoch of very many batches."""

    loads = 0

    def plan(self, epoch, subset):
        return np.arange(8)[None].repeat(50_000, 0) if subset == "training" else np.arange(8)[None]

    def load_batch_streamlines(self, ids, **kwargs):
        self.loads += 1
        return super().load_batch_streamlines(ids, **kwargs)


def advanced(trainer, n):
    """Its state as after n batches, with a log of them."""
    state = trainer.state
    with open(trainer.log.path, "wb") as f:
        for step in range(1, n + 1):
            f.write(b'{"kind": "batch", "epoch": 0, "batch": %d, "step": %d, "loss": 1.0, "n": 8}\n' % (step - 1, step))
            state.curve.append(step, 1.0 / step)
    state.batch = state.global_step = n
    return state.save(trainer.checkpoints.path(n))


def test_neither_size_nor_work_grows_with_batches(tmp_path, monkeypatch):
    """Nothing is replayed: as many batches are loaded, and lines of the log read, after 10,000 batches as after
    1,000."""
    sizes, loads, lines, parse = [], [], [], runlog._parse
    for n in (1000, 10_000):
        trainer = fit(tmp_path, f"after-{n}", points=Many(), max_epochs=1, tensorboard=False)
        trainer.step(1)
        trainer.stop(wait=True)
        sizes.append(advanced(trainer, n).stat().st_size)
        again, read = fit(tmp_path, f"after-{n}", points=Many(), max_epochs=1, tensorboard=False), []
        monkeypatch.setattr(runlog, "_parse", lambda line, read=read: read.append(line) or parse(line))
        again.step(3)
        assert again.state.global_step == n + 3
        loads.append(again.batch_sampler.loads)
        lines.append(len(read))
        again.stop(wait=True)
    assert max(loads) <= 3 + 3 and max(lines) <= 3
    assert sizes[1] <= sizes[0] < 30_000
