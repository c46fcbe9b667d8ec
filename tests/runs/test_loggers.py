"""Loggers hold each step of the log once, whatever happens to the process and to the files."""

import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import types
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers_training import Points, fit, log_without_time, same_states, toy_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.compat.proto import event_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from tractkit.core.files import DataError
from tractkit.runs import comet
from tractkit.runs import tensorboard as event_files
from tractkit.runs.comet import CometLogger, export_comet, upload_comet
from tractkit.runs.log import RunLog, scalars_of
from tractkit.runs.loggers import make_loggers
from tractkit.runs.npy import write_npy_logs
from tractkit.runs.tensorboard import write_tensorboard
from tractkit.training.state import TrainerState


@pytest.fixture(autouse=True)
def no_key(monkeypatch, tmp_path):
    monkeypatch.delenv("COMET_API_KEY", raising=False)
    monkeypatch.setenv("COMET_CONFIG", str(tmp_path / "none.config"))


def reader(folder, purge=True):  # purge: as TensorBoard does, forget what a later file says is void
    return event_accumulator.EventAccumulator(
        str(folder), size_guidance={"scalars": 0, "images": 0}, purge_orphaned_data=purge
    )


def scalars(read):
    read.Reload()
    found = {tag: [(e.step, np.float32(e.value)) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    return {tag: events for tag, events in found.items() if events}


def event_bytes(step, tag, value):
    """An event as it is in a file, by TensorBoard's own writer."""
    event = event_pb2.Event(wall_time=0.0, step=step)
    event.summary.value.add(tag=tag, simple_value=value)
    file = io.BytesIO()
    RecordWriter(file).write(event.SerializeToString())
    return file.getvalue()


def told_by(log):
    """What TensorBoard should show of a log."""
    told = {}
    for record in log.records():
        for tag, value in scalars_of(record).items():
            told.setdefault(tag, []).append((record["step"], np.float32(value)))
    return told


def write(log, first, last, per_epoch=4, value=None):
    for step in range(first, last + 1):
        epoch = (step - 1) // per_epoch
        log.append(
            "batch", epoch=epoch, batch=(step - 1) % per_epoch, step=step, loss=value or 1 / step, time={"seconds": 0.5}
        )
        if step % per_epoch == 0:
            log.append(
                "epoch",
                epoch=epoch,
                step=step,
                train_loss=value or 1.0,
                valid_loss=2.0,
                time={"training": step, "validation": step},
            )


# ---- TensorBoard ---------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["write", "cut", "update", "leftover", "shorten", "lose", "spoil"]), st.integers(1, 14)
        ),
        max_size=14,
    )
)
@settings(max_examples=60, deadline=None)
def test_the_files_say_what_the_log_says(tmp_path_factory, deeds):
    folder = tmp_path_factory.mktemp("run")
    log, step = RunLog(folder), 0
    for deed, n in deeds:
        files = sorted((folder / "tensorboard").glob("events*"))
        if deed == "write":
            write(log, step + 1, step + n, value=float(len(files) + 1))
            step += n
        elif deed == "cut":  # killed: back to a checkpoint, before or after the end of its epoch
            step = max(0, step - n)
            log.truncate(step, step // 4 if n % 2 else (step - 1) // 4)
            if step % 4 == 0 and step and not n % 2:
                log.append("epoch", epoch=step // 4 - 1, step=step, train_loss=9.0, valid_loss=2.0, time={})
        elif deed == "update":
            write_tensorboard(folder)
            write_npy_logs(folder)
        elif deed == "leftover" and files:  # it died while it wrote
            with open(files[-1], "ab") as f:
                f.write(event_bytes(step + 1, "batch/loss", 5.0)[:n * 3])
        elif deed == "shorten" and files:
            os.truncate(files[-1], max(0, files[-1].stat().st_size - n))
        elif deed == "lose":
            (folder / "tensorboard/index.json").unlink(missing_ok=True)
        elif deed == "spoil" and files:
            (folder / "tensorboard/index.json").write_text('{"serial": 1, "no')
    write_tensorboard(folder)
    log.close()
    if log.path.exists():
        for purge in (True, False):
            assert scalars(reader(folder / "tensorboard", purge)) == told_by(log)
        write_npy_logs(folder)
        losses = [r["train_loss"] for r in log.records("epoch")]
        if losses:
            assert np.load(folder / "logs/train_loss_monitor_per_epoch.npy").tolist() == losses


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12), st.booleans()), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_a_tensorboard_that_is_open_forgets_what_was_cut(tmp_path_factory, sessions):
    folder = tmp_path_factory.mktemp("run")
    log, step, opened = RunLog(folder), 0, None
    for k, (n, back, half) in enumerate(sessions):
        write(log, step + 1, step + n, value=float(k + 1))
        step += n
        write_tensorboard(folder)
        opened = opened or reader(folder / "tensorboard")
        assert scalars(opened) == told_by(log)
        step = max(0, step - back)
        log.truncate(step, (step - 1) // 4 if half else step // 4)
        if half and step and step % 4 == 0:
            log.append("epoch", epoch=step // 4 - 1, step=step, train_loss=9.0, valid_loss=2.0, time={})
    log.close()


def test_each_step_of_the_log_is_read_once(tmp_path, monkeypatch):
    log = RunLog(tmp_path)
    write(log, 1, 3000)
    write_tensorboard(tmp_path)
    log.truncate(2990, 747)
    write(log, 2991, 3010)
    seen = []
    add = event_files._add_record
    monkeypatch.setattr(event_files, "_add_record", lambda *args: seen.append(1) or add(*args))
    write_tensorboard(tmp_path)
    assert len(seen) < 60
    assert scalars(reader(tmp_path / "tensorboard")) == told_by(log)


def test_a_step_and_a_name_as_given(tmp_path):
    log = RunLog(tmp_path)
    log.append("batch", step=2**40, time={"at": 12.5}, **{"loss/é": 0.25})
    write_tensorboard(tmp_path)
    event, = reader(tmp_path / "tensorboard").Reload().Scalars("batch/loss/é")
    assert (event.step, event.wall_time, event.value) == (2**40, 12.5, 0.25)


def test_numbers_that_are_no_curve_and_pictures_that_are_gone(tmp_path):
    log = RunLog(tmp_path)
    log.append("batch", step=1, loss=float("nan"), left_out="nan", good=True, time={})
    log.append("figure", step=1, name="gone", file="figures/gone.png")
    log.append("validation by tracking", step=1, score=0.5)
    write_tensorboard(tmp_path)
    assert scalars(reader(tmp_path / "tensorboard")) == {"validation by tracking/score": [(1, 0.5)]}


def test_without_the_package_the_start_says_what_to_install(tmp_path, monkeypatch):
    write(RunLog(tmp_path), 1, 4)
    monkeypatch.setattr(event_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'tractkit\[tensorboard\]'"):
        write_tensorboard(tmp_path)
    assert make_loggers() == [] and len(make_loggers(tensorboard=True)) == 1
    trainer, said = fit(tmp_path, tensorboard=True), []
    trainer.listeners.append(lambda event, t: said.append((event, len(t.loggers))))
    with pytest.warns(
        UserWarning, match=r"the logger FileLogger\('tensorboard'\) was removed.*pip install 'tractkit\[tensorboard\]'"
    ):
        trainer.train_and_validate()
    assert trainer.state.finished and said[0] == ("started", 0)


def test_a_training_without_tensorboard_imports_no_tensorboard(tmp_path):
    code = f"""
import sys
from helpers_training import fit
import pathlib
fit(pathlib.Path({str(tmp_path)!r}), tensorboard=False).train_and_validate()
print("tensorboard" in sys.modules, "wandb" in sys.modules, "comet_ml" in sys.modules)"""
    here = Path(__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip().endswith("False False False"), done.stderr


# ---- pictures in the log -------------------------------------------------------------------------------------


def test_a_picture_is_in_the_log_once(tmp_path):
    from tractkit.viz.losses import plot_losses

    log = RunLog(tmp_path)
    picture = plot_losses({"a": [1, 2]}, size=(300, 160))
    for step in (4, 8):
        write(log, step - 3, step)
        log.add_figure("a b/c", picture, step=step)
        path = log.add_figure("a b/c", picture, step=step)
    assert path.parent.name == "figures" and len(log.records("figure")) == 2
    log.append("epoch", epoch=2, step=8, train_loss=0.0)
    log.add_figure("end", picture, step=8)
    assert log.truncate(8, 2) == 2  # with the epoch goes what was written after it
    assert len(log.records("figure")) == 2
    write_tensorboard(tmp_path)
    read = reader(tmp_path / "tensorboard").Reload()
    assert [i.step for i in read.Images("a b/c")] == [4, 8]
    assert read.Images("a b/c")[0].width == 300
    log.truncate(7, 1)
    write(log, 8, 8)
    log.add_figure("a b/c", path, step=8)
    write_tensorboard(tmp_path)
    assert [i.step for i in reader(tmp_path / "tensorboard").Reload().Images("a b/c")] == [4, 8]


# ---- with a trainer ------------------------------------------------------------------------------------------


@pytest.fixture
def child(tmp_path):
    """Runs a job of loggers_child.py: each in a process of its own, forked from one that has torch imported."""
    here = Path(__file__).parent.parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    with open(tmp_path / "errors.txt", "w+") as errors:
        parent = subprocess.Popen(
            [sys.executable, str(here / "loggers_child.py")],
            env=env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )

        def run(folder, **job):
            parent.stdin.write(json.dumps({"folder": str(folder), **job}) + "\n")
            parent.stdin.flush()
            pid, status = parent.stdout.readline(), parent.stdout.readline()
            assert pid and os.waitstatus_to_exitcode(int(status)) == (-signal.SIGKILL if job.get("kill") else 0), (
                tmp_path / "errors.txt"
            ).read_text()[-2000:]

        yield run
        parent.stdin.close()
        parent.wait()


def archived(folder):
    """(name, step) of all metrics in a run's archives."""
    found = []
    for path in sorted((folder / "comet").glob("*.zip")):
        with zipfile.ZipFile(path) as z:
            messages = [json.loads(line)["payload"] for line in z.read("messages.json").decode().splitlines()]
        found += [(m["metric"]["metricName"], m["metric"]["step"]) for m in messages if "metric" in m]
    return [m for m in found if m[0] != "process duration"]


@pytest.mark.parametrize(
    "kills",
    [
        [(3, "training"), (9, "training"), (12, "validating")],
        pytest.param([(k, p) for k in (1, 6, 7, 13) for p in ("training", "validating")], marks=pytest.mark.full),
    ],
)
def test_killed_and_gone_on_with_each_step_is_there_once(tmp_path, child, kills):
    whole = fit(tmp_path, "whole")
    whole.train_and_validate()
    for step, phase in kills:
        child(tmp_path, kill=step, phase=phase)
        run = tmp_path / "run"
        assert scalars(reader(run / "tensorboard")).keys() <= told_by(RunLog(run)).keys()
    child(tmp_path, options={"comet": "offline"})
    assert log_without_time(RunLog(run)) == log_without_time(whole.log)
    found = scalars(reader(run / "tensorboard"))
    assert found == told_by(RunLog(run))
    assert [s for s, _ in found["batch/loss"]] == list(range(1, 19)) and [s for s, _ in found["epoch/valid_loss"]] == [
        6,
        12,
        18,
    ]
    for name, key in (("train_loss", "train_loss"), ("valid_local_loss", "valid_loss")):
        assert np.load(run / f"logs/{name}_monitor_per_epoch.npy").tolist() == whole.state.history[key].tolist()
    metrics = archived(run)
    assert max(Counter(metrics).values()) == 1
    assert [s for name, s in metrics if name == "valid_loss"] == [6, 12, 18] and ("batch/loss", 10) in metrics


@pytest.mark.filterwarnings("ignore:.*sentry_sdk.Hub")
def test_loggers_do_not_change_a_training(tmp_path):
    bare = fit(tmp_path, "bare", tensorboard=False).train_and_validate()
    seen = fit(tmp_path, "seen", npy_logs=True, comet="offline", comet_project="p")
    for logger in seen.loggers:
        logger.every = 0.0
    seen.train_and_validate()
    assert same_states(bare, seen.state) == []
    assert not (tmp_path / "bare/tensorboard").exists() and (tmp_path / "seen/tensorboard").exists()
    assert len(archived(tmp_path / "seen")) > 10


def test_a_logger_that_fails_ends_no_training(tmp_path):
    trainer = fit(tmp_path)
    trainer.folder.mkdir()
    (trainer.folder / "tensorboard").write_text("in the way")
    with pytest.warns(UserWarning, match=r"the logger FileLogger\('tensorboard'\) was removed"):
        trainer.train_and_validate()
    assert trainer.state.finished and trainer.loggers == []


def test_in_a_process_of_its_own(tmp_path):
    trainer = fit(tmp_path, npy_logs=True)
    trainer.start(process=True)
    trainer.wait()
    assert [s for s, _ in scalars(reader(trainer.folder / "tensorboard"))["batch/loss"]] == list(range(1, 19))
    assert len(np.load(trainer.folder / "logs/train_loss_monitor_per_epoch.npy")) == 3


def test_a_fork_has_the_past_of_both(tmp_path):
    first = fit(tmp_path, max_epochs=2).train_and_validate()
    branch = fit(tmp_path, "branch", npy_logs=True)
    branch.train_and_validate(first.fork())
    assert [s for s, _ in scalars(reader(branch.folder / "tensorboard"))["batch/loss"]] == list(range(1, 19))
    losses, spent = (
        np.load(branch.folder / f"logs/{n}.npy")
        for n in ("train_loss_monitor_per_epoch", "validation_time_monitor_duration")
    )
    assert np.array_equal(losses, branch.state.history["train_loss"]) and len(losses) == 3 and np.isfinite(spent).all()


def test_the_gradient_norm_before_and_after_clipping(tmp_path):
    trainer = fit(tmp_path, clip_grad=0.2, npy_logs=True)
    trainer.train_and_validate()
    norms = trainer.log.batches()["grad_norm"].reshape(3, 6)
    before, after = (
        np.load(trainer.folder / f"logs/{n}_monitor_per_epoch.npy") for n in ("unclipped_grad_norm", "grad_norm")
    )
    assert (
        np.allclose(before, norms.mean(1))
        and np.allclose(after, np.minimum(norms, 0.2).mean(1))
        and (after < before).any()
    )
    minutes = np.load(trainer.folder / "logs/training_time_monitor_duration.npy")
    assert np.isclose(minutes.sum() * 60, trainer.state.time["training"])


def test_train_model_writes_where_its_log_is(tmp_path):
    import torch
    from torch import nn

    from tractkit.functional.torch_model import TorchModel, train_model

    model = TorchModel(nn.Linear(1, 1), lambda x: x, nn.MSELoss(), torch.optim.SGD)
    x = np.ones((4, 1), np.float32)
    train_model(model, [(x, x)] * 3, 2, 0.1, tmp_path / "logs", validate=lambda: {"dice": 0.5}, progress=False)
    found = scalars(reader(tmp_path / "logs/tensorboard"))
    assert [s for s, _ in found["batch/loss"]] == [1, 2, 3, 4, 5, 6] and found["epoch/dice"] == [(3, 0.5), (6, 0.5)]


# ---- Comet ---------------------------------------------------------------------------------------------------


def test_without_comet_the_error_names_the_extra(tmp_path, monkeypatch):
    find = comet.importlib.util.find_spec
    monkeypatch.setattr(comet.importlib.util, "find_spec", lambda name: None if name == "comet_ml" else find(name))
    for call in (
        lambda: fit(tmp_path, comet_project="p"),
        lambda: make_loggers(comet="offline"),
        lambda: export_comet(tmp_path),
    ):
        with pytest.raises(ImportError, match=r"pip install 'tractkit\[comet\]'"):
            call()
    assert len(make_loggers()) == 1
    with pytest.raises(ValueError, match="'online' or 'offline'"):
        make_loggers(comet="yes")


class Server:
    """Comet, as far as we use it."""

    def __init__(self):
        self.metrics, self.down = {}, False
        for name in ("Experiment", "ExistingExperiment", "OfflineExperiment", "ExistingOfflineExperiment"):
            setattr(self, name, lambda kind=name, **options: self.connect(kind, **options))

    def get_config(self, name):
        return "key"

    def connect(self, kind, experiment_key=None, previous_experiment=None, offline_directory=None, **options):
        if self.down and "Offline" not in kind:
            raise ConnectionError("no network")
        assert (kind.startswith("Existing")) == (previous_experiment is not None)
        key = experiment_key or previous_experiment
        assert kind.startswith("Existing") == (key in self.metrics)
        got = self.metrics.setdefault(key, [])

        def end():
            if offline_directory:
                Path(offline_directory).mkdir(parents=True)
                zipfile.ZipFile(Path(offline_directory) / "x.zip", "w").close()

        return types.SimpleNamespace(
            log_metric=lambda name, value, step, epoch: got.append((name, step)),
            set_name=lambda name: None,
            log_parameters=lambda p: got.append(("parameters", p["trainer/max_epochs"])) if p else None,
            log_image=lambda path, name, step: got.append((name, step)),
            end=end,
        )


@pytest.fixture
def server(monkeypatch):
    server = Server()
    monkeypatch.setattr(comet, "need_comet", lambda: server)
    monkeypatch.setattr(comet.importlib.util, "find_spec", lambda name: name)
    return server


def online(folder, **options):
    trainer = fit(
        folder,
        comet="online",
        comet_workspace="me",
        comet_project="p",
        checkpoint_every_batches=4,
        points=Points(20),
        **options,
    )
    trainer.loggers[-1].every = 0.0
    return trainer


class Killed(BaseException):
    """As if the process were gone: nobody catches it."""


def test_online_only_what_a_checkpoint_stands_behind_is_sent(tmp_path, server):
    ahead = []
    trainer = online(tmp_path)
    sent = CometLogger.update

    def watched(self, log, step, done=False):
        sent(self, log, step, done)
        known = [s for got in server.metrics.values() for name, s in got if name == "batch/loss"]
        ahead.append(max(known, default=0) <= max(trainer.checkpoints.steps()))

    CometLogger.update = watched
    try:
        trainer.train_and_validate()
    finally:
        CometLogger.update = sent
    got, = server.metrics.values()
    assert all(ahead) and len(ahead) > 50
    assert got[0] == ("parameters", 3) and len(got) == len(set(got))
    assert [s for name, s in got if name == "valid_loss"] == [20, 40, 60] and [
        s for name, s in got if name == "batch/loss"
    ] == [10, 20, 30, 40, 50, 60]


@pytest.mark.parametrize("step", [10, 20, 21, 47])
def test_online_killed_and_gone_on_with_nothing_is_sent_twice(tmp_path, server, step):
    trainer = online(tmp_path)

    def deadly(event, t):
        if event == "batch" and t.state.global_step == step and t.status.phase == "training":
            shutil.copytree(t.folder, tmp_path / "then/run")
            before.update({k: list(v) for k, v in server.metrics.items()})

    before = {}
    trainer.listeners.append(deadly)
    trainer.train_and_validate()
    server.metrics = before  # what had arrived when it was killed
    shutil.rmtree(tmp_path / "run")
    online(tmp_path / "then").train_and_validate()
    got, = server.metrics.values()
    assert len(got) == len(set(got)) and [s for name, s in got if name == "valid_loss"] == [20, 40, 60]


def test_online_set_back_a_new_experiment_begins(tmp_path, server):
    online(tmp_path, max_epochs=2).train_and_validate()
    checkpoint = TrainerState.load(tmp_path / "run", toy_model())
    online(tmp_path, max_epochs=3).train_and_validate()
    again = online(tmp_path, max_epochs=3)
    with pytest.warns(UserWarning, match="set back"):
        again.train_and_validate(checkpoint)
    first, second = server.metrics.values()
    for got in (first, second):
        assert len(got) == len(set(got)) and [s for name, s in got if name == "valid_loss"] == [20, 40, 60]


def test_what_was_on_its_way_is_not_sent_again_but_told(tmp_path, server):
    log = RunLog(tmp_path)
    write(log, 1, 20)
    logger = CometLogger("online")
    logger.open(log)
    send, comet._log_to = comet._log_to, lambda *args: (_ for _ in ()).throw(Killed())
    try:
        with pytest.raises(Killed):
            logger.update(log, 12)
    finally:
        comet._log_to = send
    later = CometLogger("online")
    later.open(log)
    with pytest.warns(UserWarning, match="may be missing"):
        later.update(log, 20, done=True)
    got, = server.metrics.values()
    assert [s for name, s in got if name == "batch/loss"] == [20] and [
        s for name, s in got if name == "valid_loss"
    ] == [12, 16, 20]


def test_without_network_the_log_becomes_an_archive(tmp_path, server):
    server.down = True
    trainer = online(tmp_path)
    with pytest.warns(UserWarning, match="Comet cannot be reached"):
        trainer.train_and_validate()
    assert len(list((trainer.folder / "comet").glob("*.zip"))) == 1
    got, = server.metrics.values()
    assert [s for name, s in got if name == "valid_loss"] == [20, 40, 60]


def test_upload_sends_each_archive_once(tmp_path, monkeypatch):
    import comet_ml.offline

    taken = []
    monkeypatch.setattr(
        comet_ml.offline,
        "upload_single_offline_experiment",
        lambda path, key, force_upload: taken.append((Path(path).name, key)) or key != "bad",
    )
    log = RunLog(tmp_path)
    write(log, 1, 12)
    with pytest.raises(ValueError, match="COMET_API_KEY"):
        upload_comet(tmp_path)
    with pytest.raises(RuntimeError, match="did not take"):
        upload_comet(tmp_path, "bad")
    assert upload_comet(tmp_path, "good") == 1 and upload_comet(tmp_path, "good") == 0
    write(log, 13, 20)
    assert upload_comet(tmp_path, "good") == 1
    assert upload_comet(tmp_path, "good", again=True) == 1
    keys = [name.split("-")[1] for name, key in taken if key == "good"]
    assert keys[0] == keys[1] != keys[2]
    assert [s for name, s in archived(tmp_path) if name == "valid_loss"] == [4, 8, 12, 16, 20, 4, 8, 12, 16, 20]


def test_a_folder_without_a_run():
    from tractkit.runs.curves import read_run

    with pytest.raises(DataError, match="no log of a run"):
        read_run("/nowhere")
    assert write_tensorboard("/nowhere") == 0 and write_npy_logs("/nowhere") == 0


# -- Weights & Biases

def wandb_records(path):
    """The messages of a .wandb file: blocks of 32 KiB after a header of 7 bytes, each message in one part or
    several."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack("<HB", data[at + 4:at + 7])
        if not kind:
            break
        whole, at = whole + data[at + 7:at + 7 + size], at + 7 + size
        if kind in (1, 4):  # 1: whole; 2, 3, 4: first, middle, last part
            yield whole
            whole = b""


def test_a_trainer_logs_to_wandb_each_step_once(tmp_path, monkeypatch):
    """Offline, stopped in the middle of an epoch and resumed by another trainer."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_SILENT", "true")
    cut = fit(tmp_path, wandb="offline")
    cut.step(9)
    cut.stop(wait=True)
    fit(tmp_path, wandb="offline").train_and_validate()
    wandb.teardown()  # its process writes the files a moment after a run is finished
    steps = []
    for path in sorted((tmp_path / "run").glob("wandb/offline-run-*/*.wandb")):
        for record in map(Record.FromString, wandb_records(path)):
            row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            steps += [row["_step"]] if "batch/loss" in row else []
    assert sorted(steps) == list(range(1, 19))
