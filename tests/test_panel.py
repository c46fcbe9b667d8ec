"""The panel against a real trainer, and against a pretender for what a real one rarely does."""

import math
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from tractkit import panel as room
from tractkit.panel import TrainerPanel, panel_of

# A trainer of a cubic: also the source of the notebooks below, which run in a kernel of their own.
FIT = '''
import numpy as np, torch
from torch import nn
from tractkit.keyed import fold, permutation
from tractkit.trainer import Trainer

class Points:
    def __init__(self, pause=0.0): self.pause = pause
    def plan(self, epoch, subset): return permutation(fold(1, epoch, subset), 128).reshape(8, 16)[:8 if subset == "training" else 2]
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
    return Fit(model, folder, name, points, points, **dict(max_epochs=3, learning_rate=.01, progress=False, num_threads=1) | options)
'''
_space: dict = {}
exec(FIT, _space)
fit = _space["fit"]


@dataclass(frozen=True)
class Status:
    phase: str = "idle"
    epoch: int = 0
    max_epochs: int = 4
    batch: int = 0
    n_batches: int = 10
    train_loss: float = math.nan
    valid_loss: float = math.nan
    best_loss: float = math.nan
    eta: float = math.nan
    message: str = ""


class Pretender:
    """Stands still; its status is what the test says."""

    def __init__(self, **status):
        self.status, self.listeners, self.pressed = Status(**status), [], []
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


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


@pytest.mark.parametrize("phase, buttons", [
    ("idle", {"start"}), ("starting", {"stop"}), ("training", {"pause", "stop"}), ("validating", {"pause", "stop"}),
    ("paused", {"resume", "stop"}), ("stopped", {"start"}), ("failed", {"start"}), ("finished", set())])
def test_only_buttons_that_make_sense_can_be_pressed(make_panel, phase, buttons):
    p = make_panel(Pretender(phase=phase, epoch=4 if phase == "finished" else 1))
    assert enabled(p) == buttons
    assert all(b.button_style == ("primary" if v in buttons & {"start", "resume"} else "") for v, b in p.buttons.items())


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
    assert trainer.pressed == ["pause"] and p._readout.readout["label"] == "pausing" and enabled(p) == {"stop"}
    trainer.set(phase="paused")
    p.refresh()
    assert p._readout.readout["label"] == "paused" and enabled(p) == {"resume", "stop"}


def test_what_a_trainer_refuses_is_said(make_panel):
    trainer = Pretender()
    trainer.start = lambda: 1 / 0
    p = make_panel(trainer)
    p.buttons["start"].click()
    assert p._readout.readout["message"] == "ZeroDivisionError: division by zero"
    p.still()
    trainer.start = lambda: None
    p.press("start")
    assert p._readout.readout["message"] == ""


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
    said = make_panel(Pretender(**status))._readout.readout
    assert (said["where"], said["done"]) == (where, done)


def test_a_million_steps_cost_as_much_as_ten_thousand(make_panel):
    """The bytes of an update are bounded, and few."""
    trainer, sizes = Pretender(phase="training"), []
    p = make_panel(trainer)
    send = p._readout._send
    for n in (10_000, 1_000_000):
        x = np.arange(1, n + 1)
        trainer.data = {"training": (x, 1 / x), "validation": (x[::10], 2 / x[::10])}
        sent = []
        p._readout._send = lambda message, buffers=None, sent=sent: sent.append(len(str(message)) + sum(map(len, buffers or [])))
        trainer.set(batch=n % 7)
        p.refresh()
        assert len(sent) == 1  # one message
        sizes += sent
    p._readout._send = send
    assert max(sizes) < 8_000 and sizes[1] < 1.2 * sizes[0]


def test_thinning_keeps_means_and_leaves_out_what_is_not_finite():
    rng = np.random.default_rng(0)
    y = rng.random(9_001)
    y[5] = np.nan
    x, thin = room._thinned(np.arange(9_001), y, limit=300)
    assert len(x) <= 300 and np.all(np.diff(x) > 0)
    assert thin[1:-1].mean() == pytest.approx(np.nanmean(y), rel=0.02)
    assert room._thinned([1, 2, 3], [1.0, np.inf, 3])[0].tolist() == [1, 3]
    assert room._thinned([], []) [0].size == 0
    assert len(room._thinned([1, 2], [1.0, 2, 3])[0]) == 2  # read while it is appended to


def test_curves_arrive_as_they_are(make_panel):
    p = make_panel(Pretender())
    x, y = np.frombuffer(p._readout.curves["training"], "<f4").reshape(2, -1)
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
    assert 3 <= len(looks) <= 8
    trainer.set(phase="stopped")
    trainer.listeners[0]("ended", trainer)
    until(lambda: len(looks) and time.monotonic() - looks[-1] > 0.5)


def test_a_trainer_without_listeners_is_looked_at_all_the_same(make_panel):
    trainer = Pretender()
    del trainer.listeners
    p = make_panel(trainer)
    p._waits = 0.05
    trainer.set(phase="training", batch=3)
    until(lambda: p._readout.readout["phase"] == "training")


def test_closing_ends_its_thread_and_leaves_the_trainer(make_panel):
    before = {t for t in threading.enumerate() if t.name == "tractkit-panel"}
    trainer = Pretender(phase="training")
    p = TrainerPanel(trainer)
    assert len(trainer.listeners) == 1
    p.close()
    assert trainer.listeners == [] and trainer.pressed == []
    until(lambda: {t for t in threading.enumerate() if t.name == "tractkit-panel"} <= before)


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
    until(lambda: p._readout.readout["done"] > 0 and "pause" in enabled(p))
    p.buttons["pause"].click()
    until(lambda: trainer.status.phase == "paused")
    until(lambda: enabled(p) == {"resume", "stop"})
    step = trainer.status.global_step
    time.sleep(0.2)
    assert trainer.status.global_step == step
    p.buttons["resume"].click()
    until(lambda: trainer.status.global_step > step + 3)
    p.buttons["stop"].click()
    trainer.wait(20)
    until(lambda: p._readout.readout["phase"] == "stopped" and enabled(p) == {"start"})
    assert "saved in" in p._readout.readout["message"]
    stopped = trainer.status.global_step
    p.buttons["start"].click()
    until(lambda: trainer.status.global_step > stopped)
    trainer.stop(wait=True)


def test_a_trainer_started_from_a_cell_is_noticed(make_panel, tmp_path):
    trainer = fit(tmp_path)
    p = make_panel(trainer)
    trainer.train_and_validate()
    until(lambda: p._readout.readout["phase"] == "finished")
    assert p._readout.readout["done"] == 1 and {"train", "valid", "best"} <= set(p._readout.readout["losses"])


def test_a_failure_is_shown(make_panel, tmp_path):
    trainer = fit(tmp_path)
    trainer.compute_batch_loss = lambda batch: 1 / 0
    p = make_panel(trainer)
    p.buttons["start"].click()
    until(lambda: p._readout.readout["phase"] == "failed")
    assert "ZeroDivisionError" in p._readout.readout["message"] and enabled(p) == {"start"}


def test_a_plain_script_can_have_a_panel(tmp_path):
    code = FIT + f'''
from tractkit.panel import TrainerPanel
from tractkit.plots import save_figure
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
    nbformat, nbclient, nbconvert = (pytest.importorskip(m) for m in ("nbformat", "nbclient", "nbconvert"))
    cells = [FIT, f"import tractkit.panel\ntrainer = fit({str(tmp_path)!r})\ntrainer", "trainer.start(); trainer.wait(); import time; time.sleep(1.5)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(Path.cwd())}}).execute()
    live, still = notebook.cells[1].outputs
    assert "application/vnd.jupyter.widget-view+json" in live["data"]
    assert still["data"]["text/html"].startswith('<div class="tractkit-still"><img alt=')
    assert live["data"]["text/plain"] == "TrainerPanel(ready, epoch 1 of 3)"
    assert still["data"]["text/plain"] == "TrainerPanel(finished, 3 of 3 epochs)"  # brought up to date from its thread
    assert not any(" at 0x" in str(o) for c in notebook.cells for o in c.outputs)
    page, _ = nbconvert.HTMLExporter().from_notebook_node(notebook)
    assert 'class="tractkit-still"><img alt="The trainer' in page
