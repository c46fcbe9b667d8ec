"""The list of runs against real trainings, and against every way in which a folder can be damaged; the browser without
a page."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers_training import FitBreaks, Points, fit
from helpers_waiting import until

from tractkit.core.files import DataError
from tractkit.lab import run_browser as runs
from tractkit.lab.run_browser import RunBrowser
from tractkit.lab.run_table import PageMaker, check_columns, run_rows, runs_html, runs_text, table_of
from tractkit.runs import listing
from tractkit.runs.checkpoint import peek_checkpoint
from tractkit.runs.curves import read_run
from tractkit.runs.listing import KnownRuns, RunFacts, differing_settings, find_runs
from tractkit.runs.lock import folder_busy, folder_lock
from tractkit.runs.mailbox import Mailbox
from tractkit.runs.notes import RunNotes, annotate
from tractkit.runs.status import Status

OTHER = {
    "env": os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    "text": True,
    "stdout": subprocess.PIPE,
    "stdin": subprocess.PIPE,
}


def train(folder, name, **options):
    trainer = fit(folder, name, **{"tensorboard": False} | options)
    trainer.train_and_validate()
    return trainer


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """Runs that nobody changes: copy them."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder, "done")
    train(folder, "series/small", learning_rate=.003, max_epochs=2)
    with pytest.raises(OSError, match="disk is gone"):
        train(folder, "broken", kind=FitBreaks)
    stopped = fit(folder, "stopped", tensorboard=False)
    stopped.step(8)
    stopped.stop(wait=True)
    return folder


@pytest.fixture
def folder(kept, tmp_path) -> Path:
    return shutil.copytree(kept, tmp_path / "runs")


def facts(folder, name) -> RunFacts:
    return {r.name: r for r in find_runs(folder)}[name]


# ---- how a run stands ----------------------------------------------------------------------------------------


def test_each_run_stands_as_it_was_left(kept):
    found = {r.name: r for r in find_runs(kept)}
    assert {n: (r.status, r.epochs, r.max_epochs, r.step) for n, r in found.items()} == {
        "done": ("finished", 3, 3, 18),
        "series/small": ("finished", 2, 2, 12),
        "broken": ("failed", 1, 3, 7),
        "stopped": ("stopped", 1, 3, 8),
    }
    assert found["broken"].note == "OSError: the disk is gone"
    assert found["stopped"].note == found["done"].note == ""


def test_best_epoch_and_time_are_those_of_the_log(kept):
    for run in find_runs(kept):
        epochs = read_run(run.folder).columns["epoch"]
        assert run.best == epochs["valid_loss"].min() and run.best_epoch == epochs["valid_loss"].argmin() + 1
        assert run.curves.columns["epoch"]["train_loss"].tolist() == epochs["train_loss"].tolist()
        spent = [r["time"] for r in map(json.loads, (run.folder / "log.jsonl").open()) if r["kind"] == "epoch"][-1]
        assert run.seconds >= spent["training"] + spent["validation"] > 0


def test_a_failure_is_forgotten_when_the_run_goes_on(folder):
    train(folder, "broken")
    assert (facts(folder, "broken").status, (folder / "broken/failed.txt").exists()) == ("finished", False)


def test_a_killed_run_says_how_much_is_lost(folder):
    log = folder / "stopped/log.jsonl"
    records = [{"kind": "batch", "epoch": 1, "batch": b, "step": 7 + b, "loss": 0.1} for b in range(2, 6)] + [
        {"kind": "epoch", "epoch": 1, "step": 12, "train_loss": 0.1, "valid_loss": 0.001}
    ]
    with log.open("a") as f:
        f.writelines(json.dumps(r) + "\n" for r in records)
        f.write('{"kind": "epoch", "epoch": 2, "st')  # it was writing
    run = facts(folder, "stopped")
    assert (run.status, run.note, run.epochs, run.step, run.best, run.best_epoch) == (
        "dead", "killed 4 batches after its last checkpoint", 2, 12, .001, 2)
    assert run.columns["batch"]["step"][-4:].tolist() == [9, 10, 11, 12] and run.not_finite == ""


def test_where_a_loss_is_no_number_is_said(folder):
    log = folder / "stopped/log.jsonl"
    with log.open("a") as f:
        f.write(json.dumps({"kind": "batch", "epoch": 1, "batch": 2, "step": 9, "loss": None}) + "\n")
    assert facts(folder, "stopped").not_finite == "the loss is no number at step 9"
    with log.open("a") as f:
        f.write(json.dumps({"kind": "epoch", "epoch": 1, "step": 12, "train_loss": 0.1, "valid_loss": None}) + "\n")
    run = facts(folder, "stopped")
    assert run.not_finite == "the loss is no number in epoch 2" and math.isfinite(run.best) and run.best_epoch == 1
    assert not any(r.not_finite for r in find_runs(folder) if r.name != "stopped")


def test_a_run_at_work_in_this_kernel(folder):
    trainer = fit(folder, "mine", tensorboard=False)
    trainer.step(2)
    try:
        for _ in range(3):
            assert facts(folder, "mine").status in ("running", "paused")
        code = f"from tractkit.runs.lock import folder_lock\nwith folder_lock({str(folder / 'mine')!r}): print('taken')"
        assert (
            "taken" not in subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, **OTHER).stdout
        )  # looking took nothing away
        assert RunBrowser(folder).open("mine").trainer is trainer
    finally:
        trainer.stop(wait=True)
    assert facts(folder, "mine").status == "stopped"


def test_a_run_at_work_in_another_process(folder):
    """Holding the lock of a trainer, then in its turn the mailbox of a process that rests."""
    at = folder / "stopped"
    code = f"""
import sys
from tractkit.runs.lock import folder_lock
from tractkit.runs.status import Status
from tractkit.runs.mailbox import Mailbox
from tractkit.runs.notes import RunNotes, annotate
with folder_lock({str(at)!r}):
    print("locked", flush=True); sys.stdin.readline()
mailbox = Mailbox({str(at)!r}); mailbox.clear()
with mailbox.hold():
    mailbox.write_status(Status("paused", epoch=1), resting=True, ended=False)
    print("resting", flush=True); sys.stdin.readline()
    mailbox.write_status(Status("failed"), ended=True,
                         error={{"type": "MemoryError", "message": "too much\\nfor it", "trace": ""}})
"""
    other = subprocess.Popen([sys.executable, "-c", code], **OTHER)
    said = []
    for words in ("locked\n", "resting\n"):
        assert other.stdout.readline() == words
        assert folder_busy(at) == (words == "locked\n")
        said.append(facts(folder, "stopped").status)
        other.stdin.write("\n")
        other.stdin.flush()
    assert other.wait() == 0
    run = facts(folder, "stopped")
    assert said == ["running", "paused"] and (run.status, run.note) == ("failed", "MemoryError: too much")
    Mailbox(at).write_status(Status("training"), resting=False, ended=False)
    assert (facts(folder, "stopped").status, facts(folder, "stopped").note) == ("dead", "its process is gone")


def test_looking_hinders_no_trainer(tmp_path):
    """A look while somebody starts must not make them fail."""
    (tmp_path / ".lock").touch()
    code = f"""
from tractkit.runs.lock import folder_busy
print("looking", flush=True)
while True: folder_busy({str(tmp_path)!r})"""
    other = subprocess.Popen([sys.executable, "-c", code], **OTHER)
    try:
        assert other.stdout.readline() == "looking\n"
        end = time.monotonic() + .5
        while time.monotonic() < end:
            with folder_lock(tmp_path):
                pass
    finally:
        other.kill()
        other.wait()


# ---- quickly -------------------------------------------------------------------------------------------------


def test_whole_logs_and_weights_are_not_read(tmp_path, monkeypatch):
    """Of 400 records, those beyond the newest checkpoint; of the checkpoint, its header."""
    train(tmp_path, "long", points=Points(200, 1), max_epochs=2)
    lines, parsed = [], []
    monkeypatch.setattr(
        listing,
        "_STEP",
        type("", (), {"search": lambda self, line: lines.append(line) or re.search(rb'"step": (\d+)', line)})(),
    )
    monkeypatch.setattr("tractkit.runs.log._parse", lambda line: parsed.append(line) or json.loads(line))
    run = facts(tmp_path, "long")
    assert (run.epochs, run.step, run.status) == (2, 400, "finished")
    assert len(lines) <= 2 and not parsed
    newest = max((tmp_path / "long/checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])  # the last weight
    assert "cut short" in facts(tmp_path, "long").note
    for path in (tmp_path / "long/checkpoints").iterdir():
        path.unlink()
    lines.clear()
    parsed.clear()
    assert (facts(tmp_path, "long").epochs, len(parsed)) == (
        2,
        2,
    )  # without a checkpoint: all lines are looked at, those of epochs are read


def test_a_glance_at_a_checkpoint_is_what_loading_it_gives(kept):
    trainer = fit(kept, "done")
    tree, path = trainer.checkpoints.newest()
    seen = peek_checkpoint(path, ("epochs", "time", "finished", "policies", "no such"))
    assert seen == {k: tree[k] for k in ("epochs", "time", "finished", "policies")}


def test_only_what_has_changed_is_read_again(folder, monkeypatch):
    """Of four runs, again and again: the checkpoint, config, log, notes or status of one of them is another."""
    reads, known = [], KnownRuns()
    for name in ("peek_checkpoint", "parse_yaml", "_end_of_log", "read_notes"):
        real = getattr(listing, name)
        monkeypatch.setattr(listing, name, lambda *a, name=name, real=real: reads.append(name) or real(*a))

    def look():
        reads.clear()
        return {r.name: r for r in find_runs(folder, known=known)}

    def changed(name="stopped"):
        before = look()
        return lambda: [n for n, run in look().items() if run is not before[n]] == [name]

    assert len(look()) == 4 and len(reads) == 16
    first = look()
    assert reads == [] and all(a is b for a, b in zip(first.values(), look().values(), strict=True))
    at, is_new = folder / "stopped", changed()
    with (at / "log.jsonl").open("a") as f:
        f.write(json.dumps({"kind": "batch", "epoch": 1, "batch": 2, "step": 9, "loss": 1.0}) + "\n")
    assert is_new() and reads == ["_end_of_log"]
    is_new = changed()
    annotate(at, "hands off", ["baseline"])
    assert is_new() and reads == ["read_notes"] and look()["stopped"].notes.tags == ("baseline",)
    is_new = changed()
    (at / "config.yaml").write_text((at / "config.yaml").read_text().replace("0.01", "0.02"))
    assert is_new() and reads == ["parse_yaml"]
    is_new = changed()
    newest = max((at / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])  # in its place
    assert is_new() and "peek_checkpoint" in reads and "cut short" in look()["stopped"].note
    with folder_lock(at):
        assert look()["stopped"].status == "running" and reads == []  # locks are always asked
    assert look()["stopped"].status == "stopped"
    shutil.rmtree(at)
    assert len(look()) == 3 and not any(at in key for key in known._kept)


def test_runs_are_shown_while_others_are_read(folder, monkeypatch):
    seen, shown = [], threading.Event()

    def read(path, name, known):
        if name == "stopped":  # the last one is ready when a part was shown
            shown.wait(20)
        return listing_reads(path, name, known)

    listing_reads = listing.read_facts
    monkeypatch.setattr(listing, "read_facts", read)
    monkeypatch.setattr(listing, "_FIRST_PAUSE", 0.0)
    found = find_runs(folder, so_far=lambda some: seen.append(some) or (len(some) == 3 and shown.set()))
    assert shown.is_set() and [len(some) for some in seen] == [1, 2, 3]
    assert seen[-1] == found[:3] and [run.name for run in found] == ["broken", "done", "series/small", "stopped"]
    shown.clear()
    browser, below = RunBrowser(folder), []
    browser._make_page()  # as a cell does that shows it: before anything is read
    table = browser._page.widget
    assert "being read" in table.table["below"]
    table.observe(lambda change: below.append(change["new"]["below"]) or (len(below) == 3 and shown.set()), "table")
    browser.refresh()
    assert ["being read" in line for line in below] == [True, True, True, False] and len(table.chosen) == 4
    table.set_state({"chosen": ["done"]})
    browser.refresh()
    assert table.chosen == ["done"]  # what was ticked stays
    browser.close()


def test_notes_are_kept_in_the_folder_and_a_damaged_file_is_named(folder):
    annotate(folder / "done", "the one of the paper", "baseline, old")
    assert facts(folder, "done").notes == RunNotes("the one of the paper", ("baseline", "old"))
    (folder / "done/notes.json").write_text("[")
    run = facts(folder, "done")
    assert (run.status, run.notes) == ("finished", RunNotes()) and "notes.json" in run.note


# ---- damaged, foreign ----------------------------------------------------------------------------------------


DAMAGE = [
    b"",
    b"\x00" * 64,
    b"\xff" * 9,
    b"[1, 2",
    b"{}",
    b'{"kind": 3}\n',
    b"a: [*x]\n",
    b"- 1\n",
    b"\x80\x81: \n",
    b'{"status": {"x": 1}}',
    b"8" * 70,
]


@pytest.mark.parametrize("content", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_folder_is_one_row(folder, content):
    """Each file in turn holds something else, then all together, then they are folders."""
    at = folder / "stopped"
    files = [
        at / name
        for name in ("log.jsonl", "config.yaml", "checkpoints/step-00000008.ckpt", "process/status.json", "failed.txt")
    ]
    (at / "process").mkdir(exist_ok=True)

    def look():
        found = find_runs(folder)
        assert [r.name for r in found] == ["broken", "done", "series/small", "stopped"] and found[
            1
        ].status == "finished"
        return found[3]

    for path in files:
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(content)
        assert look().epochs == 1 and look().status in ("stopped", "failed")  # the rest of the folder tells
        path.unlink() if before is None else path.write_bytes(before)
    for path in files:
        path.write_bytes(content)
    assert look().status in listing.STATUSES
    assert len(repr(RunBrowser(folder)).splitlines()) == 7
    for path in files:
        path.unlink()
        path.mkdir()
    assert look().status in listing.STATUSES


def test_every_cut_of_a_checkpoint_falls_back_or_is_named(folder):
    newest = max((folder / "done/checkpoints").iterdir())
    whole = newest.read_bytes()
    for cut in (0, 1, 7, 8, 50, len(whole) // 2, len(whole) - 1):
        newest.write_bytes(whole[:cut])
        run = facts(folder, "done")
        assert (run.epochs, run.step) == (3, 18) and newest.name in run.note, cut  # the log has the rest
    assert run.status == "stopped"  # an earlier checkpoint has no end


def test_guests_have_a_row_that_says_what_they_are(folder):
    (folder / "holiday").mkdir()
    for i in range(5):
        (folder / "holiday" / f"{i}.jpg").touch()
    (folder / "void/deep/deeper").mkdir(parents=True)
    (folder / "a file.txt").touch()
    (folder / ".hidden").mkdir()
    (folder / "loop").symlink_to(folder)
    (folder / "dwi/logs").mkdir(parents=True)
    np.save(folder / "dwi/logs/valid_loss_monitor_per_epoch.npy", np.array([.5, .2, .3]))
    found = {r.name: r for r in find_runs(folder)}
    assert found["holiday"].note == "holds 0.jpg, 1.jpg, 2.jpg and 2 more" and found["void"].note == "holds deep"
    assert not {"a file.txt", ".hidden"} & found.keys()
    if "dwi" in found:
        assert (found["dwi"].epochs, found["dwi"].best, found["dwi"].best_epoch) == (3, .2, 2)


def test_links_that_lead_back_list_no_run_again(folder):
    before = [r.name for r in find_runs(folder)]
    (folder / "all").symlink_to(folder)  # to itself, from below, to each other, and to a folder above it
    (folder / "series/up").symlink_to(folder / "series")
    (folder / "series/above").symlink_to(folder)
    assert [r.name for r in find_runs(folder)] == before
    (folder / "latest").symlink_to(folder / "done")  # a second name of one run is its own row
    assert [r.name for r in find_runs(folder)] == sorted([*before, "latest"])


def test_text_that_is_no_utf8_is_shown_by_its_bytes(folder):
    """In the name of a folder and of what is in it, and in notes, settings and errors."""
    odd = [os.fsdecode(b"run\xfe"), os.fsdecode(b"run\xff"), os.fsdecode(b"guest\xfe")]
    for name in odd[:2]:
        shutil.copytree(folder / "done", folder / name)
    (folder / odd[2]).mkdir()
    (folder / odd[2] / odd[0]).touch()
    (folder / odd[1] / "notes.json").write_text(r'{"note": "\ud800", "tags": ["\udfff"]}')
    (folder / odd[1] / "config.yaml").write_text(r'{"trainer": {"a\ud800": ["\ud800"], "b": "\ud801"}}')
    (folder / "stopped/checkpoints").rename(folder / "stopped" / odd[0])
    browser = RunBrowser(folder)
    assert {r"run\udcfe", r"run\udcff", r"guest\udcfe"} < {r.name for r in browser.runs}
    table = browser.widget.children[1]
    table.set_state({"chosen": [r"run\udcfe", r"run\udcff"]})
    for text in (repr(browser), browser._repr_html_(), json.dumps(table.table, ensure_ascii=False),
                 json.dumps([c["name"] for c in table.curves], ensure_ascii=False)):
        assert r"run\udcfe" in text.encode().decode().replace("\\\\", "\\")
    assert len(table.curves) == 2 and browser.curves().axes and browser.annotate(r"run\udcfe", "x").text == "x"
    browser.close()


def test_no_folder_is_said_and_a_run_is_a_list_of_one(folder):
    with pytest.raises(DataError, match="no such folder"):
        RunBrowser(folder / "nowhere")
    assert [(r.name, r.status) for r in find_runs(folder / "done")] == [("done", "finished")]
    (folder / "empty").mkdir()
    assert "no run yet" in repr(RunBrowser(folder / "empty"))


def test_a_folder_that_may_not_be_read(folder, monkeypatch):
    """By the one place that opens it: root may read everything."""
    def refuse(path, *args, inside=str(folder / "done"), real=os.listdir):
        if os.fspath(path) == inside:
            raise PermissionError(13, "Permission denied", inside)
        return real(path, *args)

    monkeypatch.setattr(os, "listdir", refuse)
    assert (facts(folder, "done").status, facts(folder, "done").note.partition(":")[0]) == (
        "damaged",
        "PermissionError",
    )
    found = {r.name: r.status for r in find_runs(folder)}
    assert found["done"] == "damaged" and found["stopped"] == "stopped"


# ---- what differs --------------------------------------------------------------------------------------------


def test_settings_that_differ(kept):
    found = [r for r in find_runs(kept) if r.name in ("done", "series/small")]
    assert differing_settings(found) == {
        "learning_rate": {"done": 0.01, "series/small": 0.003},
        "max_epochs": {"done": 3, "series/small": 2},
    }
    assert differing_settings(found[:1]) == {}
    assert differing_settings(find_runs(kept))["trainer"] == {
        "broken": "FitBreaks",
        "done": "Fit",
        "series/small": "Fit",
        "stopped": "Fit",
    }


def test_names_of_settings_stay_apart():
    def made(name, **settings):
        return RunFacts(name, Path(name), "finished", settings=settings)

    found = [
        made("a", **{"loader.rng": 1, "sampler.rng": 1, "model.size": [1, 2]}),
        made("b", **{"loader.rng": 2, "sampler.rng": 3, "model.size": [1, 3]}),
        made("c"),
    ]
    assert differing_settings(found) == {
        "loader.rng": {"a": 1, "b": 2},
        "sampler.rng": {"a": 1, "b": 3},
        "size": {"a": [1, 2], "b": [1, 3]},
    }
    found = [
        made("a", **{"loader.rng": 1, "sampler.rng": 1, "model.name": "x", "model.class": "A", "m.b.class": "A"}),
        made("b", **{"loader.rng": 1, "sampler.rng": 3, "model.name": "y", "model.class": "B", "m.b.class": "A"}),
    ]
    assert list(differing_settings(found)) == ["sampler.rng", "model.name", "model"]  # "name" is that of the run


# ---- the browser ---------------------------------------------------------------------------------------------


def pretend(monkeypatch, n, name="run-{}"):
    """`n` runs without folders."""
    epochs = {
        "epoch": np.arange(30.0),
        "step": np.arange(30.0) * 10,
        "valid_loss": 1 / np.arange(1.0, 31.0),
        "train_loss": 1 / np.arange(1.0, 31.0),
    }
    found = [
        RunFacts(
            name.format(i),
            Path(f"runs/{i}"),
            "finished",
            "",
            30,
            30,
            300,
            i / n,
            30,
            60.0,
            0.0,
            {"trainer.rate": i, **{f"m.s{k}": i for k in range(20)}},
            {"epoch": epochs},
        )
        for i in range(n)
    ]
    monkeypatch.setattr(runs, "runs_folder", Path)
    monkeypatch.setattr(runs, "find_runs", lambda folder, known, so_far=None: found)
    return found


def test_sorted_by_any_column_with_the_missing_ones_last(monkeypatch):
    found = pretend(monkeypatch, 3)
    found.append(RunFacts("void", Path("void"), "no run", "empty"))
    browser = RunBrowser("runs")
    assert [r["name"] for r in browser.table("best")] == ["run-0", "run-1", "run-2", "void"]
    assert [r["name"] for r in browser.table("rate", descending=True)] == ["run-2", "run-1", "run-0", "void"]
    assert [r["name"] for r in browser.table(descending=True)] == ["void", "run-2", "run-1", "run-0"]
    with pytest.raises(KeyError, match="no column 'colour'"):
        browser.table("colour")


def test_a_thousand_runs_make_a_page_of_bounded_size(monkeypatch):
    pretend(monkeypatch, 1000, "<b>x</b>{}")
    browser = RunBrowser("runs")
    page, text = browser._repr_html_(), repr(browser)
    assert len(page) < 500_000 and "and 800 more" in page and "900 more" in text
    assert "<b>x" not in page and "&lt;b&gt;x&lt;/b&gt;0" in page and "<b>x</b>0" in text
    assert "They also differ in s" in text and len(json.dumps(browser.widget.children[1].table)) < 1_300_000
    browser.close()


def test_the_picture_has_a_line_for_each_run(kept):
    browser = RunBrowser(kept)
    for names in (["done"], ["done", "stopped", "series/small"]):
        picture = browser.curves(names)
        ends = {round(float(line.get_xdata()[-1]), 6) for ax in picture.axes for line in ax.lines}
        assert {float(browser[n].epochs) for n in names} <= ends
    assert len(browser.curves(["done"], {"rate": "batch/learning_rate"}, x="step").axes) == 1
    with pytest.raises(KeyError, match="no run 'x'"):
        browser.curves(["x"])


def press(browser, verb, **more):
    browser._page.on_message(None, {"verb": verb, **more})


def test_the_folder_is_read_often_only_while_somebody_is_at_work(folder, monkeypatch):
    looks = []
    monkeypatch.setattr(runs, "find_runs", lambda f, **more: looks.append(1) or find_runs(f, **more))
    browser = RunBrowser(folder, interval=.05)
    monkeypatch.setattr(browser, "_pause", lambda real=browser._pause: 60 if real() >= .5 else real())
    browser._watcher._pause = browser._pause
    table = browser.widget.children[1]
    time.sleep(.3)
    assert len(looks) == 1 and browser._pause() == 60  # nobody is at work
    shutil.copytree(folder / "done", folder / "done-2")
    press(browser, "refresh")
    until(lambda: len(table.table["rows"]) == 5)
    with folder_lock(folder / "done-2"):
        press(browser, "refresh")
        until(lambda: "1 running" in table.table["below"])
        before = len(looks)
        until(lambda: len(looks) > before + 2)
    until(lambda: "running" not in table.table["below"])
    rest = len(looks)
    time.sleep(.3)
    assert len(looks) <= rest + 1
    browser.close()


def test_only_rows_that_have_changed_are_sent(folder):
    browser = RunBrowser(folder)
    table, sent = browser.widget.children[1], []
    table.observe(lambda change: sent.append((change["name"], change["new"])), ["table", "changed", "shown"])
    browser.refresh()
    assert sent == []
    with folder_lock(folder / "done"):
        browser.refresh()
    (name, new), = sent
    assert name == "changed" and [row["status"] for row in new["rows"].values()] == ["running"]
    assert list(new["rows"]) == ["1"] and table.table["rows"][1]["status"] == "running"  # for a page opened later
    press(browser, "annotate", name="stopped", note="again\nlater", tags="to repeat")
    assert [list(new["rows"]) for name, new in sent[1:] if name == "changed"] == [["1", "3"]]
    assert table.table["rows"][3]["tags"] == ["to repeat"] and facts(folder, "stopped").notes.text == "again\nlater"
    (folder / "done/notes.json").write_text("[1]")
    press(browser, "annotate", name="done", note="x", tags="")
    assert "holds no notes" in table.shown["problem"] and (folder / "done/notes.json").read_text() == "[1]"
    browser.close()


def test_a_filter_of_the_page_is_that_of_the_table_and_of_the_saved_page(kept):
    browser = RunBrowser(kept)
    table = browser.widget.children[1]
    table.set_state({"where": "lr < 5e-3 or status == failed"})
    assert table.shown == {"names": ["broken", "series/small"], "problem": ""} and browser.where == table.where
    assert [r["name"] for r in browser.table("best")] == ["series/small", "broken"]
    assert "stopped" not in browser._repr_html_().partition("<img")[0] and "stopped" not in repr(browser)
    assert {"done", "stopped", "series/small"} < set(browser.chosen)  # hidden ones stay ticked, and are not drawn
    few, all_of_them = browser.curves(), browser.curves(browser.chosen)
    assert len(few.axes[0].lines) < len(all_of_them.axes[0].lines)
    assert 'alt="losses of ' in (page := browser._repr_html_()) and "done" not in page
    table.set_state({"where": "lr <"})
    assert table.shown["names"] == ["broken", "series/small"] and "no condition" in table.shown["problem"]
    assert len(repr(browser).splitlines()) == 7  # a filter that is half written hides nothing
    table.set_state({"where": ""})
    assert table.shown == {"names": None, "problem": ""}
    assert browser.table(where="small", columns=["name", "learning_rate"]) == [
        {"name": "series/small", "learning_rate": .003}]
    assert browser.table(where="small", columns=["weight_decay", "clip_grad"]) == [
        {"weight_decay": .01, "clip_grad": None}]  # the same in all runs
    assert "weight_decay" not in browser.table()[0]
    assert [(r["max_epochs"], r["runs"]) for r in browser.table(group="max_epochs")] == [(3, 3), (2, 1)]
    with pytest.raises(KeyError, match="no column 'colour'"):
        RunBrowser(kept, columns=["name", "colour"])
    browser.close()


def test_a_browser_without_runs_keeps_its_filter_and_its_columns_for_those_that_come(kept, tmp_path):
    where = "lr < 5e-3 or not lr > 2 and trainer in [Fit]"
    browser = RunBrowser(tmp_path, where=where, columns=["name", "learning_rate"])
    table = browser.widget.children[1]
    assert browser.table() == [] and "no run yet" in repr(browser)
    (tmp_path / "notes").mkdir()  # a folder that is no run has no settings either
    press(browser, "refresh")
    until(lambda: len(table.table["rows"]) == 1)
    assert table.where == browser.where == where and not table.shown["problem"]
    for name in ("done", "series/small"):
        shutil.copytree(kept / name, tmp_path / name)
    browser.refresh()
    assert table.shown == {"names": ["done", "series/small"], "problem": ""} and browser.chosen
    assert [c[0] for c in table.table["columns"] if c[3]] == ["name", "status", "curve", "learning_rate"]
    shutil.rmtree(tmp_path / "series")  # nothing differs any more
    browser.refresh()
    assert [row["name"] for row in table.table["rows"] if row["status"] == "gone"] == ["series/small"]
    assert len(table.table["rows"]) == 3 and "done" in repr(browser) and "done" in browser._repr_html_()
    table.set_state({"where": "lr <"})  # half written
    fresh = RunBrowser(tmp_path)
    fresh.where = "lr <"
    assert fresh.chosen == ["done"]
    with pytest.raises(ValueError, match="no condition"):
        RunBrowser(tmp_path, where="lr <")
    browser.close()


def test_a_run_that_is_gone_or_has_a_damaged_log_is_left_out_of_the_curves(folder):
    damage = {"no file": None, "time": {"time": {"training": "x", "at": [1]}}, "kind": {"kind": 7, "time": {"at": "x"}},
              "huge": {"step": 10 ** 400, "time": {"at": 1.0}}}
    for name, more in damage.items():
        log = shutil.copytree(folder / "done", folder / name) / "log.jsonl"
        if more is None:
            log.unlink()
            log.mkdir()
        else:
            with log.open("a") as f:
                f.write(json.dumps({"kind": "epoch", "epoch": 3, "train_loss": 1.0, "step": 20} | more) + "\n")
    browser = RunBrowser(folder)
    names = ["done", *damage]
    for options in ({"x": "hours"}, {"x": "time"}, {"graphs": {"loss": "train_loss"}, "x": "hours"}):
        with pytest.warns(UserWarning, match="left out, as the log cannot be read: no file .Is a directory.") as said:
            picture = browser.curves(names, **options)
        assert len(said) == 1 and picture.axes[0].lines
    table = browser.widget.children[1]
    table.set_state({"chosen": names})
    assert [c["name"] for c in table.curves if c["lines"]] == ["done", "kind"]  # the others say that they are damaged
    browser.chosen = ["done", "stopped"]
    shutil.rmtree(folder / "stopped")
    browser.refresh()
    assert browser.curves().axes[0].lines and "losses of done, stopped" in browser._repr_html_()  # they were read
    with pytest.warns(UserWarning, match="left out, as the log cannot be read: stopped"):
        assert browser.curves(graphs={"loss": "train_loss"}).axes[0].lines
    browser.chosen = ["done", "never there"]
    with pytest.warns(UserWarning, match="left out, as the folder is gone: never there"):
        assert browser.curves().axes[0].lines
    browser.close()


def test_a_run_that_is_deleted_alone_is_gone_in_its_row_and_comes_back(folder, tmp_path):
    browser = RunBrowser(folder, interval=.05)
    table = browser.widget.children[1]
    names = [row["name"] for row in table.table["rows"]]
    (folder / "done").rename(tmp_path / "away")
    for _ in range(2):
        browser.refresh()
        assert [row["name"] for row in browser.table()] == names == [row["name"] for row in table.table["rows"]]
        assert [row["name"] for row in table.table["rows"] if row["status"] == "gone"] == ["done"]
    assert "1 gone" in table.changed["below"] and browser["done"].note == "the folder is gone"
    press(browser, "annotate", name="done", note="x", tags="")
    assert "this was not done" in table.shown["problem"] and not (folder / "done").exists()
    (tmp_path / "away").rename(folder / "done")
    browser.refresh()
    assert browser["done"].status == "finished" and [r.name for r in browser.runs] == names
    browser.close()


def test_every_setting_can_be_a_column_and_those_that_show_a_run_are_none_at_first():
    shared = {"trainer.patience": 5, "model.class": "Lstm", "sampler.size": [1, 2]}
    found = [RunFacts(n, Path(n), "finished", settings={
        "trainer.learning_rate": rate, "trainer.progress": rate < .5, "trainer.comet": n, **shared})
        for n, rate in (("a", .1), ("b", 1.0))] + [RunFacts("c", Path("c"), "stopped", "of dwi_ml")]
    table, page = table_of(found), PageMaker().page(found)
    assert table.columns == ["name", "status", "best", "learning_rate", "epochs", "best_epoch", "hours"]
    assert "differ" not in table.line and table.same == ["patience", "model", "size"]
    assert {"progress", "comet"} <= set(table.others)
    assert page.columns[-3:] == [["patience", "patience", True, False, "5"], ["model", "model", True, False, "Lstm"],
                                 ["size", "size", True, False, "[1, 2]"]]
    assert {len(row["cells"]) for row in page.rows} == {len(page.columns) - 3}  # these come once, not in each row
    assert [row["configured"] for row in page.rows] == [True, True, False]
    chosen = PageMaker().page(found, ["name", "size", "progress"])
    assert [c[0] for c in chosen.columns if c[3]] == ["name", "status", "curve", "size", "progress"]
    assert "[1, 2]" in runs_text(found, columns=["name", "size"])
    with pytest.raises(KeyError, match="did you mean patience"):
        check_columns(run_rows(found, same=True), ["patiance"])


def test_runs_whose_folder_was_deleted_are_gone_and_come_back(folder, tmp_path):
    browser = RunBrowser(folder, interval=.05)
    table = browser.widget.children[1]
    with folder_lock(folder / "done"):
        browser.refresh()
        assert "1 running" in table.table["below"]
        folder.rename(tmp_path / "away")
        until(lambda: "4 gone" in table.table["below"])  # nobody has pressed anything
    assert {row["status"] for row in table.table["rows"]} == {"gone"} == {row["status"] for row in browser.table()}
    assert browser.curves().axes and "gone" in repr(browser) and "gone" in browser._repr_html_()
    press(browser, "annotate", name="done", note="x", tags="")
    assert "this was not done" in table.shown["problem"] and browser._pause() >= .5  # none is at work
    (tmp_path / "away").rename(folder)
    browser.refresh()
    assert {row["status"] for row in browser.table()} == {"finished", "failed", "stopped"}
    browser.close()


def test_a_note_is_written_once():
    found = [RunFacts("a", Path("a"), "finished", notes=RunNotes("the one of the paper"))]
    for columns in (None, ["name", "notes"]):
        for text in (runs_text(found, columns=columns), runs_html(found, columns=columns)):
            assert text.count("the one of the paper") == 1


def test_ticks_send_curves_with_their_four_places(kept):
    browser = RunBrowser(kept)
    table = browser.widget.children[1]
    assert [c["name"] for c in table.curves] == browser.chosen == table.chosen
    table.set_state({"chosen": ["done"]})
    (curve,) = table.curves
    lines = {name: n for name, n in curve["lines"]}
    assert browser.chosen == ["done"] and list(lines) == ["validation", "training", "batches"]
    valid, step, epoch, hours, at = np.frombuffer(curve["data"])[:5 * lines["validation"]].reshape(5, -1)
    records = [json.loads(line) for line in (kept / "done/log.jsonl").open()]
    epochs = [r for r in records if r["kind"] == "epoch"]
    assert valid.tolist() == [r["valid_loss"] for r in epochs] and step.tolist() == [6, 12, 18]
    assert epoch.tolist() == [1, 2, 3] and at.tolist() == [r["time"]["at"] for r in epochs]
    spent = [(r["time"]["training"] + r["time"]["validation"]) / 3600 for r in epochs]
    assert np.allclose(hours, spent)
    for x in ("hours", "time"):
        ends = [line.get_xdata()[-1] for ax in browser.curves(x=x).axes for line in ax.lines]
        assert np.allclose(max(ends), (hours if x == "hours" else at)[-1])
    browser.close()


def test_the_button_opens_the_panel_of_the_folder(kept, monkeypatch):
    from ipywidgets import Label

    class Panel:
        def __init__(self, folder):
            if folder.name == "broken":
                raise ValueError("no panel of that")
            self.trainer, self.widget, self.closed = folder, Label(str(folder)), False

        def close(self):
            self.closed = True

    monkeypatch.setattr(runs, "TrainerPanel", Panel)
    browser = RunBrowser(kept)
    below = browser.widget.children[2]
    for name in ("done", "broken", "done"):
        press(browser, "open", name=name)
    assert [b.children[1].value for b in below.children] == ["ValueError: no panel of that", str(kept / "done")]
    panel = browser.panels["done"]
    below.children[1].children[0].children[1].click()
    assert panel.closed and len(below.children) == 1 and not browser.panels
    browser.close()
    assert math.isfinite(browser["done"].best)


def test_the_panel_of_a_run_that_is_over_and_of_one_that_broke(kept):
    browser = RunBrowser(kept)
    for name in ("done", "broken"):
        panel = browser.open(name)
        assert Path(panel.trainer.folder) == kept / name and len(panel.trainer.curves()["training"][0]) > 0
        assert panel.still().array().shape[2] == 4
        browser._opened.open(name)
        assert browser.widget.children[2].children[-1].children[1] is browser.panels[name].widget
        panel.close()
    browser.close()
    assert not browser.panels
