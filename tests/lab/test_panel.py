"""The panel against a real trainer, and against a pretender for what a real one rarely does."""

import gc
import re
import shutil
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import make_file
from helpers_training import SlowPoints, same_states, streamline_trainer
from helpers_training import fit as far_fit
from helpers_waiting import until
from ipywidgets import Button

from tractkit.core.files import DataError
from tractkit.evaluation.scoring import GroundTruth
from tractkit.lab.controls import Controls
from tractkit.lab.folder_run import FolderRun
from tractkit.lab.live_curves import mean_curve, thin_curve
from tractkit.lab.panel import TrainerPanel, panel_of
from tractkit.lab.preview import Preview
from tractkit.lab.settings_form import field_text
from tractkit.models.base import model_class
from tractkit.runs.listing import find_runs
from tractkit.runs.mailbox import Mailbox
from tractkit.runs.status import Status
from tractkit.spatial.volume import Volume
from tractkit.training.callbacks import OnNonFinite
from tractkit.training.process import attach
from tractkit.training.run_folder import LostFolder
from tractkit.training.state import TrainerState

# A trainer of a cubic: also the source of the notebooks below, which run in a kernel of their own.
FIT = '''
import numpy as np, torch
from torch import nn
from tractkit.core.rng import fold, permutation
from tractkit.training.trainer import Trainer

class Points:
    def __init__(self, pause=0.0): self.pause = pause
    def plan(self, epoch, subset):
        return permutation(fold(1, epoch, subset), 128).reshape(8, 16)[:8 if subset == "training" else 2]
    def load_batch_streamlines(self, ids, *, epoch, training):
        import time; time.sleep(self.pause)
        x = torch.from_numpy(np.linspace(-1, 1, 128, dtype=np.float32)[ids, None])
        return x, x**3

class Fit(Trainer):
    def compute_batch_loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.model(x), y), len(x)

def fit(folder, name="run", pause=0.0, **options):
    torch.manual_seed(0)
    model, points = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)), Points(pause)
    options = dict(max_epochs=3, learning_rate=.01, progress=False, num_threads=1) | options
    return Fit(model, folder, name, points, points, **options)
'''
_space: dict = {}
exec(FIT, _space)
fit = _space["fit"]


class Pretender:
    """Stands still; its status is what the test says."""

    def __init__(self, **status):
        self.status, self.listeners, self.pressed = Status(**{"max_epochs": 4, "n_batches": 10} | status), [], []
        self.data = {"training": (np.arange(1, 4), np.array([3.0, 2, 1]))}

    def set(self, **changes):
        self.status = replace(self.status, **changes)

    def curves(self):
        return self.data

    def __getattr__(self, verb):
        if verb not in ("start", "pause", "resume", "stop"):
            raise AttributeError(verb)
        return lambda: self.pressed.append(verb)


@pytest.fixture
def make_panel():
    made = []

    def make(trainer, **options):
        made.append(TrainerPanel(trainer, **options))
        return made[-1]

    yield make
    for p in made:
        p.close()


def enabled(p) -> set[str]:
    return {verb for verb, button in p.buttons.items() if not button.disabled}


@pytest.mark.parametrize("phase, buttons", [
    ("idle", {"start"}), ("starting", {"stop"}), ("training", {"pause", "stop"}), ("validating", {"pause", "stop"}),
    ("paused", {"resume", "stop"}), ("stopped", {"start"}), ("failed", {"start"}), ("finished", set())])
def test_only_buttons_that_make_sense_can_be_pressed(make_panel, phase, buttons):
    p = make_panel(Pretender(phase=phase, epoch=4 if phase == "finished" else 1))
    assert enabled(p) == buttons
    assert all(
        b.button_style == ("primary" if v in buttons & {"start", "resume"} else "") for v, b in p.buttons.items()
    )


def test_a_finished_trainer_that_was_given_more_epochs_can_start(make_panel):
    trainer = Pretender(phase="finished", epoch=4)
    p = make_panel(trainer)
    trainer.max_epochs = 6
    p.refresh()
    assert enabled(p) == {"start"}


def test_a_wish_is_shown_until_it_is_fulfilled_and_cannot_be_made_twice(make_panel):
    trainer = Pretender(phase="training")
    p = make_panel(trainer)
    p.buttons["pause"].click()
    assert trainer.pressed == ["pause"] and p.readout.readout["label"] == "pausing" and enabled(p) == {"stop"}
    trainer.set(phase="paused")
    p.refresh()
    assert p.readout.readout["label"] == "paused" and enabled(p) == {"resume", "stop"}


@pytest.mark.parametrize("command", ["pause", "resume", "stop"])
def test_a_command_that_comes_after_the_end_leaves_no_trace(make_panel, command):
    """As a click that the kernel received while a cell was interrupted."""
    p = make_panel(Pretender(phase="stopped", epoch=1))
    p.press(command)
    assert p.readout.readout["label"] == "stopped" and enabled(p) == {"start"}


def test_a_start_that_ends_before_anybody_looks_leaves_no_trace(make_panel):
    trainer = Pretender(phase="failed", epoch=1)
    trainer.running = True
    p = make_panel(trainer)
    p.press("start")
    assert p.readout.readout["label"] == "starting"
    trainer.running = False
    p.refresh()
    assert p.readout.readout["label"] == "failed" and enabled(p) == {"start"}


def test_where_a_click_cannot_be_served_the_buttons_say_interrupt_the_cell(make_panel, tmp_path, monkeypatch):
    monkeypatch.setattr("tractkit.lab.panel.clicks_wait_for_cells", lambda: True)  # as ipykernel 6
    trainer = fit(tmp_path, max_epochs=1)
    p, seen = make_panel(trainer), []

    def look(event, _):
        if event == "batch":
            p.refresh()
            seen.append((enabled(p), p.controls.note.value, p.form.fields["learning_rate"].disabled))

    trainer.listeners.append(look)
    trainer.train_and_validate()
    assert all(s[0] == set() and "Interrupt the cell" in s[1] and s[2] for s in seen) and len(seen) >= 8
    p.refresh()
    assert enabled(p) and p.controls.note.value == "" and not p.form.fields["learning_rate"].disabled


def test_what_a_trainer_refuses_is_said(make_panel):
    trainer = Pretender()
    trainer.start = lambda: 1 / 0
    p = make_panel(trainer)
    p.buttons["start"].click()
    assert p.readout.readout["message"] == "ZeroDivisionError: division by zero"
    p.still()
    trainer.start = lambda: None
    p.press("start")
    assert p.readout.readout["message"] == ""


@pytest.mark.parametrize("status, where, done", [
    (dict(), "epoch 1 of 4", 0),
    (dict(phase="training", epoch=1, batch=5), "epoch 2 of 4, batch 5 of 10", 0.375),
    (dict(phase="validating", epoch=1, batch=9), "epoch 2 of 4, batch 9 of 10", 0.25),
    (dict(phase="finished", epoch=4), "4 of 4 epochs", 1),
    (dict(phase="finished", epoch=2), "2 of 4 epochs", 1),   # early
    (dict(phase="stopped", epoch=4, batch=0), "epoch 4 of 4, batch 0 of 10", 1),
    (dict(phase="training", n_batches=0, max_epochs=0), "epoch 1 of 1", 0),
])
def test_progress_is_told_in_words_and_shares(make_panel, status, where, done):
    said = make_panel(Pretender(**status)).readout.readout
    assert (said["where"], said["done"]) == (where, done)


def test_a_million_steps_cost_as_much_as_ten_thousand(make_panel):
    """The bytes of an update are bounded, and few."""
    trainer, sizes = Pretender(phase="training"), []
    p = make_panel(trainer)
    p.watcher.close()  # nothing else looks
    p.watcher._thread.join()
    send = p.readout._send
    for n in (10_000, 1_000_000):
        x = np.arange(1, n + 1)
        trainer.data = {"training": (x, 1 / x), "validation": (x[::10], 2 / x[::10])}
        sent = []
        p.readout._send = lambda message, buffers=None, sent=sent: sent.append(
            len(str(message)) + sum(map(len, buffers or []))
        )
        trainer.set(batch=n % 7)
        p.refresh()
        assert len(sent) == 1  # one message
        sizes += sent
    p.readout._send = send
    assert max(sizes) < 8_000 and sizes[1] < 1.2 * sizes[0]


def test_thinning_keeps_what_was_and_the_means_beside_it():
    rng = np.random.default_rng(0)
    y = rng.random(9_001)
    y[[5, 777, 4_000]] = np.nan, 450.0, -3.0
    x, thin = thin_curve(np.arange(9_001), y, limit=300)
    assert 150 < len(x) <= 300 and np.all(np.diff(x) > 0)
    assert np.array_equal(thin, y[x.astype(int)], equal_nan=True)  # each where it was
    assert (np.nanmax(thin), np.nanmin(thin), x[np.isnan(thin)].tolist()) == (450, -3, [5])
    assert mean_curve(np.arange(9_001), y)[1][1:-1].mean() == pytest.approx(np.nanmean(y[90:-90]), rel=0.02)
    assert thin_curve([1, 2, 3], [1.0, np.inf, 3])[1].tolist()[::2] == [1, 3]
    assert np.isnan(thin_curve([1, 2, 3], [1.0, np.inf, 3])[1][1])  # a gap
    assert np.isnan(thin_curve(range(999), [np.nan] * 999)[1]).all()
    assert thin_curve([], [])[0].size == 0
    assert len(thin_curve([1, 2], [1.0, 2, 3])[0]) == 2  # read while it is appended to


def test_a_step_that_was_left_out_is_a_gap_from_the_state_and_from_the_log(tmp_path):
    def breaks(trainer, whole):
        def loss(batch):
            value, n = whole(batch)
            return (value * float("nan") if trainer.state.global_step == 5 else value), n
        return loss

    trainer = fit(tmp_path, policies=[OnNonFinite()], max_epochs=2)
    trainer.compute_batch_loss = breaks(trainer, trainer.compute_batch_loss)
    trainer.train_and_validate()
    own, of_log = trainer.curves(), FolderRun(trainer.folder).curves()
    for name in ("training", "training mean", "validation", "best"):
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(own[name], of_log[name], strict=True)), name
    x, y = own["training"]
    assert x[np.isnan(y)].tolist() == [6] and len(x) == 16
    assert [v.tolist() for v in own["best"]] == [[trainer.state.best_step], [trainer.state.best["loss"]]]


def test_curves_arrive_as_they_are(make_panel):
    p = make_panel(Pretender())
    x, y = np.frombuffer(p.readout.curves["training"], "<f4").reshape(2, -1)
    assert x.tolist() == [1, 2, 3] and y.tolist() == [3, 2, 1]


def test_a_running_trainer_is_looked_at_at_most_four_times_a_second_and_an_idle_one_never(make_panel):
    trainer = Pretender()
    p, looks = make_panel(trainer), []
    p.refresh = lambda: looks.append(time.monotonic())
    time.sleep(0.6)
    assert looks == []
    trainer.set(phase="training")
    for _ in range(150):
        trainer.listeners[0]("batch", trainer)
        time.sleep(0.01)
    assert len(looks) >= 3 and np.diff(looks).min() > 0.24
    trainer.set(phase="stopped")
    trainer.listeners[0]("ended", trainer)
    until(lambda: len(looks) and time.monotonic() - looks[-1] > 0.5)


def test_a_trainer_without_listeners_is_looked_at_all_the_same(make_panel):
    trainer = Pretender()
    del trainer.listeners
    p = make_panel(trainer)
    p.poll = 0.05
    trainer.set(phase="training", batch=3)
    until(lambda: p.readout.readout["phase"] == "training")


def test_the_first_batch_and_a_pause_are_shown_without_waiting_for_the_next_look(make_panel):
    trainer = Pretender()
    p, looks = make_panel(trainer, interval=60), []
    p.refresh = lambda: looks.append(trainer.status.batch)

    def report(event, **changes):
        trainer.set(**changes)
        trainer.listeners[0](event, trainer)
        time.sleep(0.2)

    report("started", phase="training")
    report("batch", batch=1)
    report("batch", batch=2)  # has time
    assert looks == [0, 1]
    report("paused", phase="paused", batch=3)
    report("resumed", phase="training", batch=4)
    assert looks == [0, 1, 3, 4]


def test_a_pause_that_ends_again_at_once_draws_no_still(make_panel):
    trainer = Pretender(phase="training", batch=1)
    p, drawn = make_panel(trainer, interval=0.01), []
    p.saved.shows, p.saved.shown_at = "the first", time.monotonic()
    p.saved.update = lambda made_of, *_: (drawn.append(trainer.status.phase), setattr(p.saved, "shows", made_of))
    for batch in range(2, 6):
        trainer.set(phase="paused", batch=batch)
        trainer.listeners[0]("paused", trainer)
        until(lambda: p.readout.readout["phase"] == "paused")
        trainer.set(phase="training")
        trainer.listeners[0]("resumed", trainer)
        until(lambda: p.readout.readout["phase"] == "training")
    assert drawn == []
    trainer.set(phase="paused")
    trainer.listeners[0]("paused", trainer)
    until(lambda: drawn == ["paused"], 20)
    trainer.set(phase="finished")
    trainer.listeners[0]("ended", trainer)
    until(lambda: drawn == ["paused", "finished"], 20)


def test_the_compact_form_is_a_line_with_buttons_a_curve_and_the_way_to_the_whole(make_panel):
    trainer = Pretender(phase="training", batch=3, train_loss=0.5)
    p = make_panel(trainer, compact=True)
    assert p.widget.children[1] is p.readout and p.controls.widget not in p.widget.children
    assert p.readout.readout["enabled"] == ["pause", "stop"]
    for message in ({"press": "pause"}, {"press": "nothing"}, {}):
        p.readout._handle_custom_msg(message, [])
    assert trainer.pressed == ["pause"] and p.readout.readout["enabled"] == ["stop"]
    assert p.still().axes[0].get_position().height < 0.5
    p.readout._handle_custom_msg({"press": "whole"}, [])
    assert p.widget.children == (p.kernel_watch, p.controls.widget, p.tabs) and not p.readout.compact


def test_closing_ends_its_thread_and_leaves_the_trainer(make_panel):
    before = {t for t in threading.enumerate() if t.name == "tractkit-panel"}
    trainer = Pretender(phase="training")
    p = TrainerPanel(trainer)
    assert len(trainer.listeners) == 1
    p.close()
    assert trainer.listeners == [] and trainer.pressed == []
    until(lambda: {t for t in threading.enumerate() if t.name == "tractkit-panel"} <= before)


def test_thirty_panels_leave_one_listener_each_and_nothing_when_they_are_closed(tmp_path):
    from ipywidgets.widgets.widget import _instances

    trainer, before = fit(tmp_path), set(_instances)
    threads = {t for t in threading.enumerate() if t.name == "tractkit-panel"}
    panels = [TrainerPanel(trainer, compact=k % 2 == 1) for k in range(30)]
    assert len(trainer.listeners) == 30
    left = [weakref.ref(part) for p in panels for part in (p, p.readout, p.widget, p.form)]
    for k, p in enumerate(panels):
        (p if k < 15 else p.widget).close()  # as `Widget.close_all()` does
    assert trainer.listeners == [] and set(_instances) <= before
    until(lambda: {t for t in threading.enumerate() if t.name == "tractkit-panel"} <= threads)
    del panels, p
    gc.collect()
    assert [kept() for kept in left if kept() is not None] == []


def test_a_trainer_has_one_panel():
    trainer = Pretender()
    first = panel_of(trainer)
    assert panel_of(trainer) is first
    first.close()
    assert panel_of(trainer) is not first
    panel_of(trainer).close()


@pytest.mark.parametrize("phase", ["idle", "training", "failed", "finished"])
def test_the_still_is_drawn_in_every_phase(make_panel, phase):
    trainer = Pretender(phase=phase, train_loss=0.1, message="x" * 300)
    if phase == "idle":
        trainer.data = {}
    pixels = make_panel(trainer).still().array()
    assert pixels.shape == (400, 800, 4) and pixels[..., :3].std() > 5


# --- a real trainer


def test_the_buttons_drive_a_real_trainer(make_panel, tmp_path):
    trainer = fit(tmp_path, pause=0.004, max_epochs=30)
    p = make_panel(trainer)
    p.buttons["start"].click()
    until(lambda: p.readout.readout["done"] > 0 and "pause" in enabled(p))
    p.buttons["pause"].click()
    until(lambda: trainer.status.phase == "paused")
    until(lambda: enabled(p) == {"resume", "stop", "step", "epoch", "save", "fork", "rewind"})
    assert p.readout.readout["message"].startswith("Paused after batch")
    step = trainer.status.global_step
    time.sleep(0.2)
    assert trainer.status.global_step == step
    p.buttons["resume"].click()
    until(lambda: trainer.status.global_step > step + 3)
    p.buttons["stop"].click()
    trainer.wait(20)
    at_rest = {"start", "step", "epoch", "save", "rewind", "fork"}
    until(lambda: p.readout.readout["phase"] == "stopped" and enabled(p) == at_rest)
    assert "saved in" in p.readout.readout["message"]
    stopped = trainer.status.global_step
    p.buttons["start"].click()
    until(lambda: trainer.status.global_step > stopped)
    trainer.stop(wait=True)


def test_a_trainer_started_from_a_cell_is_noticed(make_panel, tmp_path):
    trainer = fit(tmp_path)
    p = make_panel(trainer)
    trainer.train_and_validate()
    until(lambda: p.readout.readout["phase"] == "finished")
    assert p.readout.readout["done"] == 1 and {"train", "valid", "best"} <= set(p.readout.readout["losses"])


def test_the_settings_that_the_model_was_built_with_are_listed_with_what_they_mean(make_panel, tmp_path):
    data = make_file(tmp_path / "data", n=16, points=(4, 30))[0]
    model = model_class("tto")(
        3, nheads=2, n_layers_e=1, input_embedded_size=8, position_encoding="rotary", step_size=2.)
    trainer = streamline_trainer(data, tmp_path, model=model, max_epochs=1)
    trainer.train_and_validate()
    for of in (trainer, trainer.folder):
        listed = make_panel(of).settings_tab.model.value
        assert "OriginalTransformerModel" in listed and "rotary" in listed and "of each attention" in listed
        assert re.search(r"step_size</td><td[^>]*>2.0</td><td[^>]*>mm between points[^<]*with</td>", listed), listed
    assert make_panel(Pretender()).settings_tab.model.value == ""
    own = make_panel(far_fit(tmp_path, "toy")).settings_tab.model.value
    assert "Sequential" in own and "keeps no settings" in own


def test_a_failure_is_shown_once_with_its_batch_and_after_a_fix_it_goes_on(make_panel, tmp_path):
    trainer = fit(tmp_path)
    whole = trainer.compute_batch_loss
    trainer.compute_batch_loss = lambda batch: 1 / 0 if trainer.state.global_step == 11 else whole(batch)
    p = make_panel(trainer)
    p.buttons["start"].click()
    until(lambda: p.readout.readout["phase"] == "failed")
    ids = str(trainer.batch_sampler.plan(1, "training")[3])
    text = f"ZeroDivisionError: division by zero It happened in epoch 2, batch 4 ({ids})."
    assert p.readout.readout["message"] == text and p.readout.readout["messages"].count(text) == 1
    left = make_panel(trainer.folder).readout.readout
    assert left["phase"] == "failed" and left["message"].startswith("ZeroDivisionError: division by zero")
    assert "start" in enabled(p)
    trainer.compute_batch_loss = whole
    p.buttons["start"].click()
    until(lambda: p.readout.readout["phase"] == "finished")
    alone = fit(tmp_path, "alone")
    assert same_states(alone.train_and_validate(), trainer.state) == []


def test_one_batch_one_epoch_save_go_back_and_branch_off(make_panel, tmp_path):
    trainer = fit(tmp_path, max_epochs=5, keep_checkpoints=9, checkpoint_every_seconds=None)
    p = make_panel(trainer)

    def click(verb, said):
        assert verb in enabled(p)
        p.buttons[verb].click()
        until(lambda: p.readout.readout["message"].startswith(said))

    click("step", "One batch done; paused after batch 1 of epoch 1.")
    click("step", "One batch done; paused after batch 2 of epoch 1.")
    click("epoch", "Epoch 1 done; paused.")
    assert (trainer.state.epoch, trainer.state.batch) == (1, 0)
    click("epoch", "Epoch 2 done; paused.")
    p.buttons["fork"].click()
    until(lambda: p.forks and "A branch of step 16, for" in p.readout.readout["message"])
    branch = p.forks[0]
    assert branch.trainer.state.parent == trainer.state.run_id and branch.widget in p.widget.children
    branch.press("start")
    branch.trainer.wait()
    p.controls.branch_name.value = " other "
    p.buttons["fork"].click()
    until(lambda: len(p.forks) == 2 and p.controls.branch_name.value == "")
    other, head = p.forks[1], p.widget.children[-2]
    assert other.trainer.folder == tmp_path / "other" and "other" in head.children[0].value
    head.children[1].click()  # close
    assert p.forks == [branch] and p.widget.children[-1] is branch.widget and (tmp_path / "other").exists()
    p.controls.branch_name.value = "other"
    p.buttons["fork"].click()
    until(lambda: "give the branch another name" in p.readout.readout["message"])
    p.buttons["stop"].click()
    trainer.wait()
    until(lambda: "rewind" in enabled(p))
    assert [label for label, _ in p.checkpoint.options] == [
        "after epoch 2, the best",
        "after epoch 1",
        "step 2",
        "step 1",
        "the beginning",
    ]
    assert p.checkpoint.index == 0  # there is one chosen
    p.checkpoint.value = 8
    p.buttons["rewind"].click()
    p.controls.question.yes.click()
    until(lambda: p.readout.readout["message"].startswith("Went back: 1 epochs done (step 8)"))
    assert (
        trainer.status.epoch == 1
        and p.readout.readout["where"] == "epoch 2 of 5"
        and len(p.source.curves()["training"][0]) == 8
    )
    p.press("start")
    assert same_states(trainer.wait(), branch.trainer.state) == []  # the same in both folders


def test_what_drops_steps_asks_once_and_does_nothing_without_a_yes(make_panel, tmp_path):
    trainer = fit(tmp_path, max_epochs=5, keep_checkpoints=9, checkpoint_every_seconds=None)
    p = make_panel(trainer)
    question = p.controls.question

    def asked():
        return question.text.value if question.widget.layout.display == "" else ""

    def rested(step):
        until(lambda: (trainer.status.phase, trainer.status.global_step) == ("paused", step) and not p.feedback.command)
        p.refresh()

    p.buttons["step"].click()
    rested(1)
    p.buttons["epoch"].click()
    rested(8)
    p.buttons["rewind"].click()  # to the newest: nothing to drop
    until(lambda: "8" in p.readout.readout["message"] and trainer.status.phase == "paused")
    assert asked() == ""
    p.buttons["epoch"].click()
    rested(16)
    p.checkpoint.value = 8
    p.buttons["rewind"].click()
    assert "Go back to step 8? 8 steps after it are dropped." in asked() and question.yes.description == "Go back"
    question.no.click()
    assert asked() == "" and trainer.status.global_step == 16
    p.buttons["rewind"].click()
    p.checkpoint.value = 0  # another than was asked about
    assert asked() == ""
    p.buttons["rewind"].click()
    assert "16 steps" in asked()
    p.buttons["step"].click()  # something else
    assert asked() == ""
    rested(17)
    p.buttons["stop"].click()
    trainer.wait()
    until(lambda: "start" in enabled(p))

    p.checkpoint.value = 8
    p.buttons["rewind"].click()
    assert "9 steps after it are dropped when training starts." in asked()
    question.yes.click()
    until(lambda: trainer.status.global_step == 8 and not p.feedback.command)
    assert trainer.checkpoints.steps()[-1] == 17
    p.buttons["step"].click()  # it was answered already
    rested(9)
    assert asked() == "" and trainer.checkpoints.steps()[-1] <= 9
    trainer.stop(wait=True)
    trainer.rewind(0)  # by a script
    until(lambda: "start" in enabled(p))
    p.buttons["start"].click()
    assert "Start from step 0? 9 steps after it are dropped." in asked() and not trainer.running
    question.yes.click()
    trainer.wait()
    p.refresh()
    assert asked() == "" and trainer.status.phase == "finished"


def test_no_message_beside_the_buttons_has_the_words_of_python(make_panel, tmp_path):
    trainer = fit(tmp_path, pause=.002, max_epochs=40, keep_checkpoints=9)
    p, shown = make_panel(trainer), []
    whole, broken = trainer.compute_batch_loss, threading.Event()

    def loss(batch):
        if broken.is_set():
            raise torch.OutOfMemoryError("no memory")
        return whole(batch)

    def notes(*_):
        said = p.readout.readout
        shown.extend([said["message"], *said["messages"], p.settings_tab.line.value, *p.controls.checkpoint.options])

    def click(command, phase, said):
        p.buttons[command].click()
        if command == "rewind" and p.controls.question.command:
            p.controls.question.yes.click()
        until(lambda: trainer.status.phase in phase and said in p.readout.readout["message"], 20)

    trainer.compute_batch_loss = loss
    p.readout.observe(notes, "readout")
    click("start", ("training",), "")
    until(lambda: trainer.status.global_step > 2)
    p.press("start")  # as by a click that came twice
    assert "running already; wait for its end, or press Stop" in p.readout.readout["message"]
    click("pause", ("paused",), "Paused after")
    click("step", ("paused",), "One batch done; paused")
    click("rewind", ("paused",), "Went back to step")
    click("resume", ("training",), "Resumed.")
    click("stop", ("stopped",), "Press Start to go on.")
    click("rewind", ("stopped",), "Went back: ")
    broken.set()
    click("start", ("failed",), "Start goes on from there")
    notes()
    assert "train_and_validate() goes on from there" in trainer.status.message  # in a script
    texts = [text if isinstance(text, str) else text[0] for text in shown]
    wrong = {text for text in texts for word in ("()", "trainer.", "resting", "Going on.") if word in text}
    assert len(set(texts)) > 9 and not wrong


def test_save_works_while_it_rests_and_what_it_saved_stays(make_panel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = fit(tmp_path, keep_checkpoints=1, checkpoint_every_batches=1)
    p = make_panel(trainer)
    assert p.buttons["save"].disabled and p.buttons["save"].tooltip.startswith("There is nothing to save")
    trainer.step(2)
    until(lambda: "save" in enabled(p))
    p.press("save")
    file = "run/checkpoints/step-00000002.ckpt"
    assert p.readout.readout["message"] == f"Saved: step 2. It stays until you delete {file}."
    assert "stays" in p.buttons["save"].tooltip
    trainer.step(9)
    trainer.stop(wait=True)
    assert {2, 11} <= set(trainer.checkpoints.steps()) and len(trainer.checkpoints.steps()) <= 3  # with the best
    p.press("save")
    assert "Saved: step 11" in p.readout.readout["message"]
    trainer.resume()
    new = make_panel(fit(tmp_path, keep_checkpoints=1, checkpoint_every_batches=1))  # after a restart of the kernel
    assert [label for label, step in new.checkpoint.options if step in (2, 11)] == [
        "step 11, saved by hand", "step 2, saved by hand"]
    new.press("save")
    assert "Saved: step 11" in new.readout.readout["message"]
    new.trainer.train_and_validate()
    assert [step for step in trainer.checkpoints.steps() if trainer.checkpoints.is_by_hand(step)] == [2, 11]
    new.trainer.save_checkpoint()  # a script's are rotated
    new.refresh()
    new.checkpoint.value = 2
    new.buttons["rewind"].click()
    assert "dropped when training starts, also what was saved by hand at step 11." in new.controls.question.text.value
    new.controls.question.yes.click()
    until(lambda: new.trainer.status.global_step == 2)
    new.trainer.train_and_validate()
    assert [step for step in trainer.checkpoints.steps() if trainer.checkpoints.is_by_hand(step)] == [2]


def test_saving_waits_for_the_batch_but_not_the_kernel(make_panel, tmp_path):
    trainer = fit(tmp_path, pause=.8, max_epochs=2, checkpoint_every_seconds=None, prefetch=0)
    p = make_panel(trainer)
    p.press("start")
    until(lambda: "save" in enabled(p) and trainer.status.global_step > 0)
    before = trainer.checkpoints.steps()
    began = time.monotonic()
    p.buttons["save"].click()
    assert time.monotonic() - began < .5
    until(lambda: "Saved: step" in p.readout.readout["message"])
    assert trainer.checkpoints.steps() != before
    trainer.stop(wait=True)


def test_two_panels_agree(make_panel, tmp_path):
    trainer = fit(tmp_path, pause=.003, max_epochs=60)
    a, b = make_panel(trainer), make_panel(trainer)
    assert panel_of(trainer) not in (a, b)
    a.press("start")
    until(lambda: enabled(a) == enabled(b) and "pause" in enabled(b))
    b.press("pause")
    b.set("learning_rate", .002)
    until(lambda: a.readout.readout["phase"] == b.readout.readout["phase"] == "paused")
    until(lambda: a.form.fields["learning_rate"].value == b.form.fields["learning_rate"].value == "0.002")
    a.refresh(), b.refresh()
    same = ("phase", "where", "losses", "measures", "messages", "done")
    assert {k: a.readout.readout[k] for k in same} == {
        k: b.readout.readout[k] for k in same
    } and a.readout.curves == b.readout.curves
    panel_of(trainer).close()
    trainer.stop(wait=True)


def test_a_panel_by_its_folder_drives_a_thread_and_says_when_it_is_gone(make_panel, tmp_path):
    """As another kernel does, through files in the folder."""
    trainer = fit(tmp_path, pause=.004, max_epochs=90, keep_checkpoints=9)
    with pytest.raises(DataError):
        TrainerPanel(trainer.folder)
    trainer.start()
    until(lambda: trainer.checkpoints.steps())
    p = make_panel(trainer.folder)
    assert isinstance(p.trainer, FolderRun)

    def click(verb, said):
        until(lambda: verb in enabled(p))
        p.buttons[verb].click()
        until(lambda: p.readout.readout["message"].startswith(said))

    click("pause", "Paused after batch")
    until(lambda: find_runs(tmp_path)[0].status == "paused")
    until(lambda: enabled(p) == {"resume", "stop", "step", "epoch", "save", "fork", "rewind"})
    click("step", "One batch done; paused after batch")
    click("epoch", "Epoch ")
    p.set("learning_rate", .002)
    assert (
        p.readout.readout["message"] == "learning_rate: 0.01 -> 0.002, from the next batch."
        and trainer.learning_rate.value == 0.002
    )
    at = trainer.state.global_step
    click("epoch", f"Epoch {at // 8 + 1} done; paused.")
    until(lambda: p.checkpoint.options[0][1] > at)  # that of the epoch is listed, too
    p.checkpoint.value = at
    p.buttons["rewind"].click()
    p.controls.question.yes.click()
    until(lambda: p.readout.readout["message"] == f"Went back to step {at}; paused.")
    assert (trainer.state.global_step, trainer.status.phase, p.readout.readout["phase"]) == (at, "paused", "paused")
    assert p.readout.readout["where"] == f"epoch {at // 8 + 1} of 90" and len(p.source.curves()["training"][0]) == at
    p.press("rewind", to=77)
    assert "no checkpoint of the end of 77 epochs" in p.readout.readout["message"] and trainer.status.phase == "paused"
    click("fork", f"A branch of step {at}, for {tmp_path / 'run-fork'}: its panel is below.")
    p.press("fork", to="run-fork")
    assert "is there already" in p.readout.readout["message"]
    assert p.forks[0].readout.readout["phase"] == "stopped" and len(p.forks[0].source.curves()["training"][0]) == at
    click("resume", "Resumed.")
    click("stop", "Stopped in epoch")
    trainer.wait()
    until(lambda: enabled(p) == set() and "build the trainer as it was" in p.buttons["rewind"].tooltip)
    branch = fit(tmp_path, "run-fork", max_epochs=at // 8 + 1, learning_rate=.002)
    assert branch.train_and_validate().parent == trainer.state.run_id
    Mailbox(trainer.folder).write_status(
        replace(trainer.status, phase="training"), resting=False, ended=False
    )  # as it stands after SIGKILL
    p.refresh()
    assert p.readout.readout["phase"] == "dead" and p.readout.readout["message"].startswith("Its process is gone.")
    assert find_runs(trainer.folder)[0].status == "dead"


def test_a_running_trainer_goes_back_and_ends_as_one_that_did_not(make_panel, tmp_path):
    trainer, whole = far_fit(tmp_path, keep_checkpoints=9), far_fit(tmp_path, "whole")
    trainer.step(1, unit="epoch")
    trainer.step(9)
    p = make_panel(trainer)
    p.press("rewind", to=1)
    assert (trainer.state.global_step, trainer.status.phase) == (6, "paused") and p.readout.readout[
        "message"
    ] == "Went back to step 6; paused."
    trainer.step(2)
    trainer.change(max_epochs=3)
    trainer.resume()
    trainer.wait()
    assert same_states(trainer.state, whole.train_and_validate()) == []
    assert [r["step"] for r in trainer.log.records("batch")] == list(range(1, 19))


def test_what_is_typed_into_a_field_is_changed_and_told_or_put_back(make_panel, tmp_path):
    trainer = fit(tmp_path)
    p = make_panel(trainer)
    p.press("step")
    until(lambda: trainer.status.phase == "paused")
    p.form.fields["learning_rate"].value = "0.003*2 0.001"
    until(lambda: p.readout.readout["message"] == "learning_rate: 0.01 -> [0.003, 0.003, 0.001], from the next batch.")
    until(lambda: p.form.fields["learning_rate"].value == "0.003 0.003 0.001")  # a moment after the message
    p.form.fields["clip_grad"].value = "a lot"
    until(lambda: "clip_grad must be a positive number or None, not 'a lot'" in p.readout.readout["message"])
    until(lambda: p.form.fields["clip_grad"].value == "")
    p.form.fields["max_epochs"].value = 2
    until(lambda: trainer.settings.max_epochs == 2 and p.readout.readout["where"].endswith("of 2, batch 1 of 8"))
    assert [(r["step"], r["name"]) for r in trainer.log.records("change")] == [(1, "learning_rate"), (1, "max_epochs")]
    p.press("resume")
    trainer.wait()


def test_a_panel_that_cannot_look_says_so_and_looks_again(make_panel, tmp_path, monkeypatch):
    trainer = fit(tmp_path, pause=.002, max_epochs=900)
    p = make_panel(trainer)
    whole, broken = p.source.settings, threading.Event()

    def settings():
        if broken.is_set():
            raise UnicodeDecodeError("utf-8", b"x", 0, 1, "of config.yaml")
        return whole()

    monkeypatch.setattr(p.source, "settings", settings)
    p.press("start")
    until(lambda: trainer.status.global_step > 2)
    broken.set()
    until(lambda: "the panel could not look: UnicodeDecodeError" in p.readout.readout["message"], 20)
    broken.clear()
    step = trainer.status.global_step
    until(lambda: p.readout.readout["phase"] == "training" and "could not" not in p.readout.readout["message"], 20)
    until(lambda: int(p.readout.readout["measures"]["step"].replace(",", "")) > step, 20)
    trainer.stop(wait=True)


def test_a_branch_that_trains_on_after_its_panel_is_closed_says_where(make_panel, tmp_path):
    trainer = fit(tmp_path, pause=.01, max_epochs=90)
    trainer.step(2)
    trainer.stop(wait=True)
    p = make_panel(trainer)
    p.press("fork", "slow")
    branch, head = p.forks[0].trainer, p.widget.children[-2]
    branch.start()
    until(lambda: branch.status.phase == "training")
    next(w for w in head.children if isinstance(w, Button)).click()
    assert f"TrainerPanel('{branch.folder}') shows it" in p.readout.readout["message"] and p.forks == []
    branch.stop(wait=True)
    left = make_panel(str(trainer.folder))  # where nothing can be started
    assert "To go on, build its trainer again" in left.readout.readout["message"]
    assert "press Start" not in left.readout.readout["message"]


def test_a_run_in_the_working_folder_is_named_from_there(make_panel, tmp_path, monkeypatch):
    p = make_panel(fit(tmp_path))
    assert p.readout.readout["name"] == str(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    p.refresh()
    assert p.readout.readout["name"] == p.table()["run"] == "run"


def test_a_checkpoint_that_was_chosen_stays_chosen_until_it_trains_again():
    controls = Controls(lambda command: None)
    controls.show({"rewind"}, [("step 16", 16), ("step 8", 8), ("step 4", 4)])
    assert controls.checkpoint.value == 16
    controls.show({"rewind"}, [("step 20", 20), ("step 16", 16), ("step 8", 8)])
    assert controls.checkpoint.value == 20  # nobody has chosen
    controls.checkpoint.value = 8
    controls.show({"rewind"}, [("step 24", 24), ("step 20", 20), ("step 8", 8)])
    assert controls.checkpoint.value == 8
    controls.show({"rewind"}, [("step 28", 28), ("step 24", 24)])
    assert controls.checkpoint.value == 28  # it is not kept any more
    controls.checkpoint.value = 24
    controls.show({"pause"}, [("step 28", 28), ("step 24", 24)])
    controls.show({"rewind"}, [("step 40", 40), ("step 24", 24)])
    assert controls.checkpoint.value == 40


def test_fields_refuse_ask_and_undo(make_panel, tmp_path):
    data = make_file(tmp_path / "data", points=(5, 30))[0]
    trainer = streamline_trainer(data, tmp_path, policies=[], max_epochs=9)
    p = make_panel(trainer)
    trainer.step(2, unit="epoch")
    p.refresh()
    before = p.source.settings()
    for name, typed, problem in [
        ("reverse_ratio", 1.5, "reverse_ratio must be in [0, 1], not 1.5"),
        ("reverse_ratio", float("nan"), "reverse_ratio must be a number, not nan"),
        ("batch_size_training", 5.5, "batch_size_training must be a whole number of streamlines, not 5.5"),
        ("max_epochs", 4.5, "max_epochs must be a positive whole number, not 4.5"),
        ("max_epochs", 0, "max_epochs must be a positive whole number, not 0"),
        ("patience", "some", "patience must be a positive whole number or None"),
        ("learning_rate", "fast", "fast"),
        ("learning_rate", "0.01*1000000000", "1,000,000,000 values, one per epoch, are too many"),
        ("learning_rate", " ", "must have at least one"),
    ]:
        p.form.fields[name].value = typed
        until(lambda name=name, text=problem: text in p.form.notes[name].text.value)
        assert p.source.settings() == before and field_text(p.form.fields[name].value) == field_text(before[name] or "")

    p.form.fields["learning_rate"].value = "1"
    assert "times as much" in p.form.notes["learning_rate"].text.value and p.source.settings() == before
    p.form.notes["learning_rate"].no.click()
    assert p.form.notes["learning_rate"].widget.layout.display == "none"
    assert p.form.fields["learning_rate"].value == field_text(before["learning_rate"])
    p.form.fields["learning_rate"].value = "0"
    assert "the weights stay as they are" in p.form.notes["learning_rate"].text.value and p.source.settings() == before
    p.form.notes["learning_rate"].no.click()
    p.form.fields["max_epochs"].value = 2
    asked = p.form.notes["max_epochs"].text.value
    assert "2 epochs are done already: with an end at 2 the training ends after this epoch" in asked
    p.form.notes["max_epochs"].no.click()
    p.form.fields["learning_rate"].value = "1"
    p.form.notes["learning_rate"].yes.click()
    until(lambda: p.form.undo.description.startswith("Undo learning_rate"))
    step = trainer.state.global_step
    until(lambda: p.readout.changes and p.readout.changes[-1]["step"] == step)  # a mark on the curves
    p.form.undo.click()
    until(lambda: p.source.settings() == before and p.form.undo.layout.display == "none")
    assert len(p.readout.changes) == 2
    trainer.stop(wait=True)


def test_two_quick_clicks_on_undo_set_back_two_changes(make_panel, tmp_path):
    trainer = fit(tmp_path)
    p = make_panel(trainer)
    trainer.step(2)
    for rate in (0.02, 0.03, 0.04):
        trainer.change(learning_rate=rate)
    until(lambda: p.form.undo.description == "Undo learning_rate 0.03 → 0.04")
    p.form.undo.click()
    p.form.undo.click()
    until(lambda: p.source.settings()["learning_rate"] == 0.02)
    until(lambda: p.form.undo.description == "Undo learning_rate 0.01 → 0.02")
    trainer.stop(wait=True)

    trainer.change(clip_grad=1.0)  # at rest: nothing is in the log yet
    p.refresh()
    assert p.form.undo.description == "Undo clip_grad none → 1" and p.readout.changes[-1]["step"] == 2
    p.form.undo.click()
    p.form.undo.click()
    until(lambda: p.source.settings()["clip_grad"] is None and p.source.settings()["learning_rate"] == 0.01)
    until(lambda: p.form.undo.layout.display == "none")
    trainer.train_and_validate()
    assert p.source.settings()["learning_rate"] == 0.01 and p.form.undo.layout.display == "none"


def test_the_buttons_of_a_question_are_there_before_it_is_asked(make_panel, tmp_path, monkeypatch):
    """A button that is made while a cell runs would be served at the next look only; while it rests there is none."""
    served = set()

    def serve(widget):
        served.add(widget)
        for part in getattr(widget, "children", ()):
            serve(part)

    monkeypatch.setattr("tractkit.lab.panel.serve_while_cells_run", serve)
    p = make_panel(fit(tmp_path))

    def parts(widget):
        return [widget, *(w for child in getattr(widget, "children", ()) for w in parts(child))]

    p.form.fields["learning_rate"].value = "1"  # 100 times as much: it asks
    answers = [w for w in parts(p.widget) if getattr(w, "description", "") in ("Change it", "Leave it")]
    assert len(answers) >= 2 and set(answers) <= served


@pytest.mark.parametrize("what", ["run", "run/checkpoints"])
def test_of_a_lost_folder_the_advice_and_the_buttons_say_the_same(make_panel, tmp_path, what):
    trainer = fit(tmp_path, pause=0.002, max_epochs=9)
    p = make_panel(trainer)
    p.press("start")
    until(lambda: trainer.status.global_step > 9)
    shutil.rmtree(tmp_path / what)
    p.press("save")
    with pytest.raises(LostFolder, match="start.. goes on in this place with what this trainer has in memory"):
        trainer.wait()
    p.refresh()
    said = p.readout.readout["message"]
    assert "Put it back if you have it; then Start goes on in this place" in said
    assert "Save writes that there, Branch beside it" in said and {"start", "save", "fork"} <= enabled(p)
    at = trainer.status.global_step
    p.press("save")
    assert p.readout.readout["message"].startswith(f"Saved: step {at}. It stays until")
    assert trainer.checkpoints.steps() == [at]
    p.press("fork", "aside")
    assert p.readout.readout["message"].startswith(f"A branch of step {at}, for {tmp_path / 'aside'}")
    p.press("start")
    trainer.wait()
    assert trainer.status.phase == "finished"
    assert same_states(trainer.state, fit(tmp_path, "whole", max_epochs=9).train_and_validate()) == []


def test_what_was_changed_in_a_run_is_shown_before_it_goes_on(make_panel, tmp_path):
    first = fit(tmp_path)
    first.step(2, unit="epoch")
    first.change(max_epochs=5, learning_rate=0.02)
    first.stop(wait=True)

    def shown(p):
        p.refresh()
        return [p.source.settings()[k] for k in ("max_epochs", "learning_rate")], p.readout.readout["where"][-20:]

    trainer = fit(tmp_path)  # the cell after a restart of the kernel: it has the settings of before
    p = make_panel(trainer)
    for _ in range(2):
        assert shown(p) == ([5, 0.02], "epoch 3 of 5, batch 0 of 8"[-20:]) == shown(make_panel(trainer.folder))
        assert p.form.fields["max_epochs"].value == 5 and trainer.settings.max_epochs == 3
        trainer.take()
        trainer.reporter.show("", None, n_batches=8)
    p.set("learning_rate", 0.01)  # as the cell has it
    assert shown(p)[0] == [5, 0.01]
    p.press("step")
    until(lambda: trainer.status.phase == "paused")
    assert trainer.status.max_epochs == 5 and shown(p)[0] == [5, 0.01]
    trainer.resume()
    trainer.wait()
    assert shown(p)[1] == "5 of 5 epochs" and trainer.learning_rate.value == 0.01
    again = make_panel(fit(tmp_path))
    assert shown(again) == ([5, 0.01], "5 of 5 epochs")


@pytest.mark.parametrize(("thing", "why"), [
    (None, "a NoneType has no status, curves, start, pause, resume, stop"),
    (Pretender, "the class Pretender has no status, start, pause"),
    ({"curves": None}, r"curves\(\) of a Pretender is to be a dict: name -> \(steps, losses\), not None"),
    ({"status": "training"}, "status of a Pretender is to be a tractkit.runs.status.Status, not a str")])
def test_what_is_no_trainer_is_refused_in_one_sentence(thing, why):
    made = thing
    if isinstance(thing, dict):
        made = Pretender()
        made.status, made.data = thing.get("status", made.status), thing.get("curves", made.data)
    with pytest.raises(TypeError, match=why):
        TrainerPanel(made)


def test_a_trainer_whose_listeners_are_none_is_looked_at_all_the_same(make_panel):
    trainer = Pretender()
    trainer.listeners, trainer.messages, trainer.folder = None, None, None
    p = make_panel(trainer)
    p.poll = 0.02
    p.watcher.wake()
    trainer.set(phase="training", batch=3)
    until(lambda: p.readout.readout["phase"] == "training")
    p.close()


def test_the_code_shown_makes_the_trainer_as_it_is(make_panel, tmp_path):
    data = make_file(tmp_path / "data", points=(5, 30))[0]
    trainer = streamline_trainer(data, tmp_path, policies=[])
    p = make_panel(trainer)
    trainer.change(
        learning_rate={"class": "Exponential", "initial": 0.02, "multiplier": 0.5},
        clip_grad=None,
        reverse_ratio=0.25,
        batch_size_training=5,
        patience=None,
    )
    exec(p.code(), space := {})  # in a fresh cell
    assert space["trainer"].config() == trainer.config()
    assert "noise_gaussian_size_loss=0.05" in p.code() and "rng=1234" not in p.code()  # no defaults
    p.settings_tab.show_code()
    assert "BatchIDSampler(" in p.settings_tab.code.text
    trainer.step(2)
    trainer.change(clip_grad=.5)
    trainer.stop(wait=True)
    assert "#   after step 2: clip_grad None -> 0.5" in p.code()
    left = make_panel(trainer.folder)
    exec(left.code(), space := {})
    assert space["trainer"].config() == trainer.config()


def test_after_the_kernel_died_the_panel_is_as_it_was(make_panel, tmp_path):
    trainer = fit(tmp_path, keep_checkpoints=4)
    before = make_panel(trainer)
    trainer.step(11)
    before.set("learning_rate", .004)
    trainer.stop(wait=True)
    before.refresh()

    def facts(p):
        return {k: p.readout.readout[k] for k in ("phase", "label", "losses", "name")} | {
            "where": p.readout.readout["where"].split(" of 8")[0]
        }

    again = fit(tmp_path, keep_checkpoints=4)  # the same cells in a new kernel
    unasked = make_panel(again)
    assert (
        facts(unasked) == facts(before)
        and "Start goes on with it" in unasked.readout.readout["message"]
        and again.state is None
    )
    loaded = make_panel(again, state=TrainerState.load(trainer.folder, model=fit(tmp_path, "x").model))
    assert facts(loaded) == facts(before) and loaded.readout.curves == before.readout.curves
    assert [x for x in loaded.checkpoint.options] == [x for x in before.checkpoint.options]
    only = make_panel(str(trainer.folder))
    assert facts(only) == facts(before) and only.readout.curves == before.readout.curves and enabled(only) == set()
    assert only.form.fields["learning_rate"].value == "0.004" and only.form.fields["learning_rate"].disabled
    loaded.press("start")
    again.wait()
    assert again.learning_rate.value == .004 and again.status.phase == "finished"


@pytest.mark.full
def test_a_run_in_another_process_is_driven_by_its_folder(make_panel, tmp_path):
    trainer = far_fit(tmp_path, points=SlowPoints(), max_epochs=40, prefetch=0)
    trainer.start(paused=True, process=True)
    until(lambda: trainer.status.phase == "paused")
    p, own = make_panel(attach(trainer.folder)), make_panel(trainer)
    other = make_panel(trainer.folder)
    until(lambda: p.readout.readout["phase"] == "paused")
    p.press("step")
    until(lambda: trainer.status.global_step == 1 and "One batch done" in p.readout.readout["message"])
    p.set("learning_rate", .002)
    assert p.readout.readout["message"].startswith("learning_rate: 0.01 -> 0.002")
    other.set("clip_grad", -1.)
    assert "clip_grad must be a positive number or None" in other.readout.readout["message"]
    trainer.change(max_epochs=3)
    assert trainer.settings.max_epochs == 3 and trainer.learning_rate.value == .01  # changed behind its back
    until(lambda: other.form.fields["max_epochs"].value == 3 and other.form.fields["learning_rate"].value == "0.002")
    p.press("epoch")
    until(lambda: trainer.status.epoch == 1 and trainer.status.phase == "paused")
    p.press("save")
    assert trainer.checkpoints.steps()[-1] == 6 and trainer.checkpoints.is_by_hand(6)
    until(lambda: own.readout.readout["where"] == p.readout.readout["where"] == other.readout.readout["where"])
    new = make_panel(
        far_fit(tmp_path, points=SlowPoints(), max_epochs=40)
    )  # the notebook after a restart: it finds the process
    until(lambda: new.readout.readout["phase"] == "paused")
    assert new.trainer.learning_rate.value == .002 and new.trainer.settings.max_epochs == 3
    new.press("resume")
    trainer.wait()
    until(lambda: p.readout.readout["phase"] == "finished" and enabled(p) == set())
    assert [(r["step"], r["name"]) for r in trainer.log.records("change")] == [(1, "learning_rate"), (1, "max_epochs")]
    alone = far_fit(tmp_path, "alone", points=SlowPoints(), max_epochs=40, prefetch=0)
    alone.step(1)
    alone.change(learning_rate=.002, max_epochs=3)
    alone.resume()
    assert same_states(alone.wait(), trainer.state) == []
    new.trainer.wait()


def test_the_table_says_what_the_picture_shows(make_panel, tmp_path):
    trainer = fit(tmp_path)
    trainer.train_and_validate()
    table = make_panel(trainer).table()
    assert (table["status"], table["position"], table["learning_rate"], table["run"]) == (
        "finished",
        "3 of 3 epochs",
        "0.01",
        str(trainer.folder),
    )
    assert {"train", "valid", "best", "gradient norm", "message"} <= set(table)


def preview_and_trainer(folder, **options):
    """A trainer and a preview of its first subject."""
    data, tractograms = make_file(Path(folder) / "data", points=(12, 40))
    trainer = streamline_trainer(data, Path(folder), **{"max_epochs": 2, "patience": None} | options)
    subject = trainer.batch_loader.dataset.training_set[0]
    volume, reference = subject.volumes["input"].volume, tractograms[subject.name]
    mask = Volume(np.ones(volume.shape3d, np.uint8), volume.affine)
    return Preview(volume, mask, None, reference, n_streamlines=60, min_length=2., max_length=60.), trainer


def test_of_an_enlarged_stretch_all_batches_are_sent(make_panel, tmp_path):
    trainer = fit(tmp_path, max_epochs=3)
    state = trainer.train_and_validate()
    for p in (make_panel(trainer), make_panel(str(trainer.folder))):
        p.readout._handle_custom_msg({"zoom": [5, 14]}, [])
        sent = p.readout.detail
        steps, losses = np.frombuffer(sent["curves"]["training"], "<f4").reshape(2, -1)
        assert steps.tolist() == list(range(5, 15)) and (sent["from"], sent["to"], sent["end"]) == (5, 14, 14)
        np.testing.assert_allclose(losses, trainer.log.batches()["loss"][4:14], rtol=1e-6)
        valid = np.frombuffer(sent["curves"]["validation"], "<f4").reshape(2, -1)
        assert valid[0].tolist() == [8] and {"gradient norm", "learning rate"} <= set(sent["curves"])
        last = state.global_step
        p.readout._handle_custom_msg({"zoom": [last - 1, last + 50]}, [])  # it may go on
        assert (p.readout.detail["to"], p.readout.detail["end"]) == (last, last + 50)
        p.readout._handle_custom_msg({"zoom": [10**6, 10**6 + 9]}, [])
        assert p.readout.detail == {}


def test_an_end_that_the_still_has_noticed_is_shown_on_the_page_too(make_panel, tmp_path, monkeypatch):
    trainer = fit(tmp_path, max_epochs=1)
    p = make_panel(trainer)
    p.watcher.close()
    trainer.train_and_validate()
    kind = type(p.source)
    with monkeypatch.context() as m:  # its thread has not ended yet
        m.setattr(kind, "running", property(lambda source: True))
        p.feedback.begin("stop", trainer.status)
        p.refresh()
        assert p.readout.readout["label"] == "stopping" and p._pause() == 0
    monkeypatch.setattr(kind, "running", property(lambda source: False))
    p.still()
    assert p.feedback.command == "" and p._pause() == 0  # it looks again: the page still has the old word
    p.refresh()
    assert p.readout.readout["label"] == "finished" and p._pause() != 0


def test_a_branch_has_a_preview_of_its_own(make_panel, tmp_path):
    preview, trainer = preview_and_trainer(tmp_path)
    p = make_panel(trainer, preview=preview)
    p.press("start")
    trainer.wait()
    p.press("fork", to="branch")
    branch = p.forks[0]
    own = branch.preview
    assert own is not preview and own.widget in branch.tabs.children and branch.tabs.get_title(2) == "Preview"
    np.testing.assert_array_equal(own.seeds, preview.seeds)
    assert own.widget.reference == preview.widget.reference and own.tracking == preview.tracking
    branch.set("max_epochs", 3)
    branch.press("start")
    branch.trainer.wait()
    own.wait(30)
    assert own.scores[-1][0] == 3 and 3 not in [epoch for epoch, _ in preview.scores]
    thread = own._thread
    p._close_branch(branch, p.widget.children[-2])
    thread.join(10)
    assert not thread.is_alive() and own.widget.comm is None and preview.widget.comm is not None


def test_the_preview_tracks_beside_the_training_and_does_not_disturb_it(make_panel, tmp_path):
    preview, trainer = preview_and_trainer(tmp_path)
    p = make_panel(trainer, preview=preview)
    assert preview.widget in p.tabs.children and len(preview.widget.reference) % 48 == 0
    p.press("start")
    trainer.wait()
    preview.wait(30)
    epoch, score = preview.scores[-1]
    assert (
        epoch == 2
        and 0 <= score <= 1
        and len(preview.details[-1])
        and len(preview.widget.latest) == 48 * len(preview.latest) < 20_000
    )
    alone = preview_and_trainer(tmp_path / "alone")[1]
    differing = same_states(alone.train_and_validate(), trainer.state)
    assert differing == ["/fingerprints/content"]  # the same data in a file of its own: its name and time
    broken, again = preview_and_trainer(tmp_path / "broken", max_epochs=1)
    broken.follow(again)
    broken.volume = None
    again.train_and_validate()
    broken.wait(30)
    assert "No preview of this epoch" in broken.widget.note and again.status.phase == "finished"
    whole = np.ones((1, *preview.mask.shape3d), bool)
    ends = np.zeros((1, 2, *preview.mask.shape3d), bool)
    ends[0, 0, :7], ends[0, 1, 7:] = True, True
    for lines in ({}, {"all": preview.reference.streamlines}):
        truth = GroundTruth(preview.mask.affine, ("all",), whole, ends, whole[0], lines)
        judged = Preview(preview.volume, preview.mask, preview.seeds, truth, min_length=2., max_length=60.)
        assert judged.look(trainer.state) == judged.details[0].mean("f1") > 0 and "F1" in judged.widget.note
        assert len(judged.widget.reference) == 48 * sum(map(len, lines.values()))
        box = np.frombuffer(judged.widget.latest, np.int8)
        assert abs(box.astype(int)).max() <= 127 and box.std() > 5
        judged.close()
    by_folder = preview_and_trainer(tmp_path / "folder")[0]
    q = make_panel(trainer.folder, preview=by_folder)
    until(lambda: by_folder.scores)
    assert (
        by_folder.scores == preview.scores[-1:]
        and by_folder.widget.latest == preview.widget.latest
        and by_folder.widget in q.tabs.children
    )
    for x in (preview, broken, by_folder):
        x.close()
    assert again.listeners == []


def test_what_is_loaded_while_a_person_looks_is_not_loaded_after_start(tmp_path):
    code = FIT + f'''
import sys
from tractkit.lab.panel import TrainerPanel
trainer = fit({str(tmp_path)!r}, max_epochs=1)
panel = TrainerPanel(trainer)
panel.source.prepare()
before = set(sys.modules)
panel.press("start"); trainer.wait()
late = [name for name in sys.modules if name.startswith(("torch.", "tensorboard", "numba.")) and name not in before]
print(len(late))
panel.close()
'''
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 10, done.stdout  # about 700 without it


def test_a_plain_script_can_have_a_panel(tmp_path):
    code = FIT + f'''
from tractkit.lab.panel import TrainerPanel
from tractkit.viz.figure import save_figure
trainer = fit({str(tmp_path)!r})
panel = TrainerPanel(trainer)
panel.press("start"); trainer.wait()
save_figure(panel.still(), {str(tmp_path / "panel.png")!r})
panel._ipython_display_()
'''
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert (tmp_path / "panel.png").stat().st_size > 5_000


def test_a_trainer_as_a_cells_value_shows_its_panel_and_leaves_a_still(tmp_path):
    """In a kernel, without a browser: what a saved notebook and its export hold."""
    import nbclient
    import nbconvert
    import nbformat

    cells = [
        FIT,
        f"import sys; trainer = fit({str(tmp_path)!r}); panels = 'tractkit.lab.panel' in sys.modules\ntrainer",
        "trainer.start(); trainer.wait(); import time\n"
        "from tractkit.lab.panel import panel_of; panel, end = panel_of(trainer), time.monotonic() + 30\n"
        "while 'finished' not in panel.saved.shows and time.monotonic() < end: time.sleep(.05)\ntime.sleep(2)\n"
        "print(panels, trainer)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(Path.cwd())}}
    ).execute()
    live, still = notebook.cells[1].outputs
    assert "application/vnd.jupyter.widget-view+json" in live["data"]
    assert still["data"]["text/html"].startswith('<div class="tractkit-still"><img alt=')
    assert ">learning_rate</th><td style='text-align: left'>0.01</td>" in still["data"]["text/html"]  # and in words
    assert "Run the cell again for the live one" in live["data"]["text/plain"]  # where the page cannot show it
    assert still["data"]["text/plain"] == "TrainerPanel(finished, 3 of 3 epochs)"  # brought up to date from its thread
    assert not any(" at 0x" in str(o) for c in notebook.cells for o in c.outputs)
    text = notebook.cells[2].outputs[-1]["text"]  # it was shown before its module was imported by anybody
    assert text.startswith("False Fit('run', finished, epoch 3/3, step 24, best loss 0.") and str(tmp_path) in text
    page, _ = nbconvert.HTMLExporter().from_notebook_node(notebook)
    assert 'class="tractkit-still"><img alt="The trainer' in page
