"""The form has a field for each setting that may be changed while a model trains, from the setting's declaration."""

from pathlib import Path

from ipywidgets import FloatText, Text

from tractkit.core.settings import Setting
from tractkit.lab import settings_form
from tractkit.lab.folder_run import FolderRun
from tractkit.lab.settings_form import EditForm
from tractkit.training.live_settings import LIVE

VALUES = {name: 3 if name == "max_epochs" else 0.5 for name in LIVE}


def test_each_live_setting_has_a_field_with_its_label_and_help():
    form = EditForm(lambda name, value: None)
    form.show(VALUES)
    assert list(form.fields) == list(LIVE)
    for name, field in form.fields.items():
        assert field.description == LIVE[name].label and field.tooltip.startswith(LIVE[name].help)
    kinds = {name: type(form.fields[name]) for name in LIVE}
    assert [n for n, kind in kinds.items() if kind is Text] == ["learning_rate", "patience", "clip_grad"]
    assert {kind for kind in kinds.values() if kind is not Text} == {FloatText}  # none that quietly makes 1 of 1.5


def test_a_new_setting_needs_no_change_of_the_form(monkeypatch):
    new = Setting("momentum", float, 0.9, help="of the optimizer", label="momentum", live="from the next batch")
    monkeypatch.setitem(settings_form.LIVE, "momentum", new)
    asked = []
    form = EditForm(lambda *change: asked.append(change))
    form.show({"momentum": 0.9})
    field = form.fields["momentum"]
    assert (type(field), field.tooltip) == (FloatText, "of the optimizer; a change holds from the next batch")
    field.value = 0.8
    assert asked == [("momentum", 0.8)]


def test_the_settings_of_a_folder_are_the_live_ones(tmp_path: Path):
    lines = "".join(f"  {name}: 1\n" for name in (*LIVE, "seed"))
    (tmp_path / "config.yaml").write_text("trainer:\n" + lines)
    (tmp_path / "log.jsonl").write_text("")
    assert list(FolderRun(tmp_path).settings()) == list(LIVE)
