"""A file of a command that is no command is put aside and answered; control goes on, and nobody waits for ever."""

import json
import os
from pathlib import Path

import pytest
from helpers_training import fit
from helpers_waiting import until

from tractkit.runs.mailbox import Mailbox
from tractkit.training.process import ProcessRun


def text(content):
    return lambda path: path.write_bytes(content)


def command(**message):
    return text(json.dumps(message).encode())


def full_folder(path):
    path.mkdir()
    (path / "mine.txt").write_text("mine")


BAD = {  # what is in the place of a command
    "empty": text(b""),
    "blank": text(b" \n"),
    "cut": text(b'{"verb": "pau'),
    "words": text(b"pause"),
    "a number": text(b"3"),
    "null": text(b"null"),
    "a text": text(b'"pause"'),
    "a list": text(b'["pause"]'),
    "nested": text(b"[" * 200_000),
    "a nested dict": text(b'{"verb":' * 100_000),
    "not UTF-8": text(b'{"verb": "\xff\xfe"}'),
    "zeros": text(b"\0" * 64),
    "a long number": text(b'{"verb": "step", "n": ' + b"9" * 5000 + b"}"),
    "infinite steps": text(b'{"verb": "step", "n": Infinity}'),
    "no verb": command(n=1),
    "an unknown verb": command(verb="explode"),
    "a verb that is a list": command(verb=["pause"]),
    "a folder": lambda path: path.mkdir(),
    "a folder with files": full_folder,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a pipe": os.mkfifo,
    "very long": text(b'{"verb": "pause", "x": "' + b"x" * 2**21 + b'"}'),
    "no settings": command(verb="change", settings=5),
    "no name": command(verb="fork", name=["a"]),
    "a name that leads out": command(verb="fork", name="../../out"),
}


@pytest.mark.parametrize("kind", BAD)
def test_control_goes_on_after_a_bad_command_file(tmp_path, kind):
    trainer = fit(tmp_path / "runs", max_epochs=500, prefetch=0)
    trainer.start(paused=True)
    trainer.runner.until_resting()
    box = Mailbox(trainer.folder)
    bad = box.folder / "command-00000000000000000001-bad.json"
    BAD[kind](bad)
    try:
        box.send_command("step", n=2)
        until(lambda: trainer.state.global_step == 2)
        assert box.read_reply(bad)["problem"]
        until(lambda: not list(box.folder.glob("command-*")))
        box.send_command("stop")
        until(lambda: not trainer.running)
    finally:
        trainer.stop(wait=True)
    assert trainer.status.phase == "stopped" and sorted(p.name for p in tmp_path.iterdir()) == ["runs"]
    again = fit(tmp_path / "runs", max_epochs=1)  # what was put aside is in nobody's way
    assert again.train_and_validate().epoch == 1


def test_a_file_that_cannot_be_read_or_removed_is_answered_once(tmp_path, monkeypatch):
    """As another user's, or where the disk has become read-only: a step is not made again and again."""
    trainer = fit(tmp_path, max_epochs=500, prefetch=0)
    trainer.start(paused=True)
    trainer.runner.until_resting()
    box, refused = Mailbox(trainer.folder), OSError(13, "Permission denied")
    kept = box.send_command("step", n=1)

    def refusing(real):
        def method(self, *args, **kwargs):
            if self.name == kept.name:
                raise refused
            return real(self, *args, **kwargs)
        return method

    for name in ("unlink", "rename"):
        monkeypatch.setattr(Path, name, refusing(getattr(Path, name)))
    box.send_command("step", n=1)
    until(lambda: trainer.state.global_step >= 1 and trainer.control.rested.is_set())
    until(lambda: len(list(box.folder.glob("command-*"))) == 1)
    at = trainer.state.global_step
    box.send_command("save")
    until(lambda: len(list(box.folder.glob("command-*"))) == 1)
    assert trainer.state.global_step == at <= 2
    monkeypatch.undo()
    trainer.stop(wait=True)


def test_whoever_sent_a_command_that_was_put_aside_hears_of_it(tmp_path, monkeypatch):
    trainer = fit(tmp_path, max_epochs=500, prefetch=0)
    trainer.start(paused=True)
    trainer.runner.until_resting()
    run, send = ProcessRun(trainer.folder), Mailbox.send_command

    def send_cut(self, verb, **arguments):
        return send(self, verb, **arguments) if verb == "stop" else (
            p := self.folder / f"command-{verb}.json", p.write_text("{"))[0]

    monkeypatch.setattr(Mailbox, "send_command", send_cut)
    for ask in (run.save_checkpoint, run.fork, run.step, lambda: run.pause(wait=True), lambda: run.rewind(0)):
        with pytest.raises(ValueError, match="no command"):
            ask()
    run.stop(wait=True)


def test_nobody_waits_for_ever(tmp_path):
    """A process that holds the folder and answers nothing: stopped by a debugger, or its thread has ended."""
    box = Mailbox(tmp_path / "run")
    box.folder.mkdir(parents=True)
    with box.hold():
        run = ProcessRun(box.folder.parent, patience=.2)
        for ask in (run.save_checkpoint, run.fork, run.step, lambda: run.pause(wait=True), lambda: run.rewind(0)):
            with pytest.raises(TimeoutError, match="has not answered"):
                ask()


# -- names that lead out of the folder

OUT = ["../x", "../../x", "..", ".", "", " ", "/x", "a/../../x", "~/x", "a\0b"]


@pytest.mark.parametrize("name", OUT)
def test_names_that_lead_out_are_refused(tmp_path, name):
    runs = tmp_path / "runs"
    runs.mkdir()
    with pytest.raises(ValueError, match="experiment_name"):
        fit(runs, name)
    trainer = fit(runs, "run", max_epochs=1)
    trainer.train_and_validate()
    for bad in (name, "a/b", 5):
        with pytest.raises(ValueError, match="fork"):
            trainer.fork(bad)
    assert [p.name for p in runs.iterdir()] == ["run"] and list(tmp_path.iterdir()) == [runs]


def test_names_in_a_folder_of_their_own_are_allowed(tmp_path):
    assert fit(tmp_path, "sweep/first").folder == tmp_path / "sweep/first"
    assert fit(tmp_path, "a b (2)").folder.name == "a b (2)"


def test_a_command_file_cannot_name_a_folder_outside(tmp_path):
    trainer = fit(tmp_path / "runs", max_epochs=500, prefetch=0)
    trainer.start(paused=True)
    trainer.runner.until_resting()
    run = ProcessRun(trainer.folder)
    for name in ("../out", str(tmp_path / "out"), "a/b", ""):
        with pytest.raises(ValueError, match="fork"):
            run.fork(name)
    assert run.fork("inside") == tmp_path / "runs/inside"
    trainer.stop(wait=True)
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
