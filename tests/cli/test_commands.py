"""The command line: what is wrong with a person's files is one line that names the file, and leaves nothing behind."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import nibabel as nib
import numpy as np
import pytest
from nbformat.sign import NotebookNotary

from tractkit.cli import commands as cli
from tractkit.cli.commands import main
from tractkit.demo import pipeline, report
from tractkit.dwi.phantom import sample_subjects
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume

pytestmark = pytest.mark.filterwarnings("ignore:The legacy descoteaux07:PendingDeprecationWarning")
NAMES = {"dwi": "dwi.nii.gz", "bvals": "bvals", "bvecs": "bvecs", "mask": "mask.nii.gz", "tractogram": "tractogram.trk"}


@pytest.fixture(scope="session")
def phantom() -> Path:
    return sample_subjects(3, progress=False)


@pytest.fixture
def mine(phantom, tmp_path) -> Path:
    """A person's folder, whose files a test may spoil."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in NAMES.values():
        shutil.copy(phantom / "sub-01" / name, folder / name)
    return folder


def words(folder, **other):
    """The five flags; another file for a name, or None to leave it out."""
    files = {flag: folder / name for flag, name in NAMES.items()} | other
    return [text for flag, path in files.items() if path is not None for text in (f"--{flag}", str(path))]


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Run `tractkit demo` on words that must be refused: its one line of complaint. Nothing may be left behind."""
    def stop(*args):
        raise KeyboardInterrupt  # what is not refused is not run for minutes

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "run_steps", stop)

    def run(*args) -> str:
        before = sorted(tmp_path.rglob("*"))
        code = main(["demo", "--no-html", *map(str, args)])
        out, err = capsys.readouterr()
        assert code == 2
        assert out == "" and err.startswith("tractkit: ") and err.endswith("\n") and err.count("\n") == 1, (out, err)
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run


@pytest.mark.parametrize("flag", NAMES)
@pytest.mark.parametrize("out", [["--out", "results/new"], []])
def test_a_wrong_path_is_named(mine, refused, flag, out):
    wrong = mine / "elsewhere" / NAMES[flag]
    assert str(wrong) in refused(*words(mine, **{flag: wrong}), *out)


@pytest.mark.parametrize("flag", ["dwi", "mask", "tractogram"])
def test_a_damaged_file_is_named(mine, refused, flag):
    path = mine / NAMES[flag]
    path.write_bytes(path.read_bytes()[:400])
    assert str(path) in refused(*words(mine))


@pytest.mark.parametrize("flag", ["bvals", "bvecs"])
def test_a_gradient_table_of_words_is_named(mine, refused, flag):
    (mine / NAMES[flag]).write_text("no numbers\n")
    assert str(mine / NAMES[flag]) in refused(*words(mine))


def test_a_mask_of_another_shape_is_named(mine, refused):
    mask = Volume.load(mine / "mask.nii.gz", dtype=np.uint8)
    Volume(mask.data[:-1], mask.affine).save(mine / "mask.nii.gz")
    message = refused(*words(mine))
    assert str(mine / "mask.nii.gz") in message and "47" in message and "48" in message


def test_a_mask_on_a_shifted_grid_is_named(mine, refused):
    mask = Volume.load(mine / "mask.nii.gz", dtype=np.uint8)
    affine = mask.affine.copy()
    affine[0, 3] += 7
    Volume(mask.data, affine).save(mine / "mask.nii.gz")
    assert str(mine / "mask.nii.gz") in refused(*words(mine))


def test_bvals_that_do_not_fit_are_named(mine, refused):
    values = (mine / "bvals").read_text().split()
    (mine / "bvals").write_text(" ".join(values[:-1]) + "\n")
    message = refused(*words(mine))
    assert str(mine / "bvals") in message and f"{len(values) - 1} b-values for {len(values)} volumes" in message


def test_bvecs_that_do_not_fit_are_named(mine, refused):
    np.savetxt(mine / "bvecs", np.loadtxt(mine / "bvecs")[:, :-2] if np.loadtxt(mine / "bvecs").shape[0] == 3
               else np.loadtxt(mine / "bvecs")[:-2])
    assert str(mine / "bvecs") in refused(*words(mine))


def test_a_tractogram_outside_the_volume_is_named(mine, refused):
    path = mine / "tractogram.trk"
    t = Tractogram.load(path)
    moved = nib.streamlines.Tractogram([line + [40, 0, 0] for line in t.rasmm()], affine_to_rasmm=np.eye(4))
    nib.streamlines.save(moved, path, header=nib.streamlines.load(path).header)
    message = refused(*words(mine))
    assert str(path) in message and "leave the volume" in message


def test_a_tractogram_of_another_grid_is_named(mine, refused):
    path = mine / "tractogram.trk"
    t = Tractogram.load(path)
    affine = t.affine.copy()
    affine[:3, 3] += 25
    Tractogram(t.streamlines, affine, t.dimensions).save(path)
    assert str(path) in refused(*words(mine))


def test_all_five_files_are_asked_for(mine, refused):
    message = refused(*words(mine, bvals=None, tractogram=None))
    assert "--bvals, --tractogram" in message and "--dwi" not in message


def test_folders_and_single_files_do_not_mix(mine, refused):
    assert "--subject" in refused("--subject", mine, "--dwi", mine / "dwi.nii.gz")


def test_a_folder_without_a_tractogram_is_named(mine, refused):
    (mine / "tractogram.trk").unlink()
    message = refused("--subject", mine)
    assert f"{mine}: has no tractogram" in message


def test_a_folder_that_is_none_is_named(mine, refused):
    assert str(mine / "bvals") in refused("--subject", mine, "--subject", mine / "bvals")


def test_two_candidates_are_a_question(mine, refused):
    (mine / "tractogram.trk").rename(mine / "left.trk")
    shutil.copy(mine / "left.trk", mine / "right.trk")
    message = refused("--subject", mine)
    assert "left.trk, right.trk" in message and str(mine) in message


def test_one_name_for_two_subjects_is_refused(mine, refused, phantom):
    assert "mine" in refused("--subject", mine, "--subject", mine, "--subject", phantom / "sub-02")


@pytest.mark.parametrize("spoiled", ["first", "last"])
def test_one_bad_subject_of_several_stops_before_anything_is_written(mine, refused, phantom, spoiled):
    (mine / "bvals").write_text("0 1000\n")
    good = [phantom / "sub-02", phantom / "sub-03"]
    folders = [mine, *good] if spoiled == "first" else [*good, mine]
    assert str(mine / "bvals") in refused(*(w for f in folders for w in ("--subject", f)))


def test_a_folder_with_other_things_is_left_alone(tmp_path, refused):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    for more in ([], ["--fresh"]):
        assert str(tmp_path / "thesis") in refused("--out", tmp_path / "thesis", *more)


def test_an_out_that_is_a_file_is_named(tmp_path, refused):
    (tmp_path / "notes.txt").write_text("notes")
    assert str(tmp_path / "notes.txt") in refused("--out", tmp_path / "notes.txt")


@pytest.mark.parametrize("epochs", ["0", "-3", "many"])
def test_epochs_are_a_positive_number(epochs, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--epochs", epochs, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2 and "--epochs" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_help_and_version_are_quick_and_import_nothing_heavy():
    code = ("import sys; from tractkit.cli.commands import main; main(['--version']); main([]);"
            "sys.exit(bool({'torch', 'fury', 'matplotlib', 'dipy', 'numba'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("tractkit") and "demo" in done.stdout


def test_lab_without_jupyterlab_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert main(["lab"]) == 2
    assert "pip install 'tractkit[lab]'" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_lab_copies_tutorials_and_keeps_what_was_changed(monkeypatch, tmp_path):
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    called = []
    monkeypatch.setattr(cli.subprocess, "call", lambda words: called.append(words) or 0)
    monkeypatch.setattr(cli, "find_spec", lambda name: object())
    names = [p.name for p in cli.resources.files("tractkit.tutorials").iterdir() if p.name.endswith(".ipynb")]
    assert names
    for before, now in (("", "{"), ("changed by me", "changed by me")):
        if before:
            assert all(
                NotebookNotary(data_dir=str(tmp_path / "jupyter")).check_signature(
                    nbformat.read(tmp_path / "mine" / n, 4)
                )
                for n in names
            )
            for name in names:
                (tmp_path / "mine" / name).write_text(before)
        with pytest.raises(SystemExit) as ended:
            main(["lab", "--folder", str(tmp_path / "mine")])
        assert ended.value.code == 0
        assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == sorted(names)
        assert all((tmp_path / "mine" / name).read_text().startswith(now) for name in names)
        if not before:  # what JupyterLab would write into it on opening is there, so it is not marked as changed
            asks = [nbformat.read(tmp_path / "mine" / n, 4).metadata for n in names]
            assert {m["language_info"]["version"] for m in asks} == {platform.python_version()}
            assert {m["kernelspec"]["name"] for m in asks} == {"python3"}
    assert called[0][1:3] == ["-m", "jupyterlab"]
    opened = "--LabApp.default_url=/lab/tree/90_phantom.ipynb"
    assert called[0][3:] == [f"--ServerApp.root_dir={tmp_path / 'mine'}", opened]


def test_the_address_that_lab_prints_opens_the_notebook(tmp_path):
    from tractkit.cli.commands import opening

    notebook = tmp_path / "my study" / "90.ipynb"
    given = [f"--notebook-dir={tmp_path}", "--no-browser"]
    assert opening(notebook, given) == [
        f"--ServerApp.root_dir={tmp_path}", "--LabApp.default_url=/lab/tree/my%20study/90.ipynb", *given]
    elsewhere = [f"--ServerApp.root_dir={tmp_path / 'other'}"]
    assert opening(notebook, elsewhere) == [str(notebook), *elsewhere]


# ---- tractkit hdf5 -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from helpers_data import make_file

    return make_file(tmp_path_factory.mktemp("data"))[0]


@pytest.fixture
def say(capsys):
    """Run a command: exit code, output, and lines of complaint."""
    def run(*words):
        code = main(["hdf5", *map(str, words)])
        out, err = capsys.readouterr()
        return code, out, [line for line in err.splitlines() if line.startswith("tractkit")]

    return run


def complaint(answer) -> str:
    code, out, lines = answer
    assert code == 2 and out == "" and len(lines) == 1, answer
    return lines[0]


def test_hdf5_create(data, say, tmp_path):
    import json

    import h5py
    from helpers_data import CONFIG

    root, out = data.parent, tmp_path / "new.hdf5"
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "train.txt").write_text("sub-0\nsub-1\n")
    words = [
        "create",
        root,
        out,
        tmp_path / "config.json",
        "--training",
        tmp_path / "train.txt",
        "--testing",
        "sub-2",
        "--no-progress",
    ]
    assert say(*words) == (0, f"{out}\n", [])
    with h5py.File(out) as h5:
        assert list(h5.attrs["training_subjs"]) == ["sub-0", "sub-1"] and list(h5.attrs["testing_subjs"]) == ["sub-2"]
        assert h5.attrs["step_size"] == "Not defined by user"
    assert f"{out}: exists already" in complaint(say(*words))
    for option, key, value in (
        (["--step-size", "1.5"], "step_size", 1.5),
        (["--nb-points", "12"], "nb_points", 12),
        (["--compress"], "compress", 0.01),
        (["--compress", "0.2"], "compress", 0.2),
    ):
        assert say(*words, "-f", *option)[0] == 0
        with h5py.File(out) as h5:
            assert h5.attrs[key] == value
    assert "at most one" in complaint(say(*words, "-f", "--compress", "--nb-points", "3"))
    assert "sub-9" in complaint(
        say("create", root, tmp_path / "none.hdf5", tmp_path / "config.json", "--training", "sub-9", "--no-progress")
    )
    assert not (tmp_path / "none.hdf5").exists()


def test_hdf5_what_is_left_out_is_said(data, say, tmp_path):
    from helpers_data import CONFIG, make_subject

    t = make_subject(tmp_path / "a", np.random.default_rng(0), n=5)
    points = t.streamlines.points.copy()
    points[0] += 90
    Tractogram(type(t.streamlines)(points, t.streamlines.offsets), t.affine, t.dimensions, t.dps).save(
        tmp_path / "a/lines.trk"
    )
    (tmp_path / "c.yaml").write_text(str(CONFIG))
    words = ["create", tmp_path, tmp_path / "x.hdf5", tmp_path / "c.yaml", "--training", "a", "--no-progress"]
    assert "1 of 5 streamlines" in complaint(say(*words))
    code, out, notes = say(*words, "--remove-invalid")
    assert (
        code == 0 and len(notes) == 1 and notes[0].startswith("tractkit: note: ") and "1 of 5 streamlines" in notes[0]
    )


def test_hdf5_add(monkeypatch, say, tmp_path):
    import tractkit.hdf5.create as create_module

    monkeypatch.setattr(
        create_module,
        "add_subject",
        lambda path, root, subject, split, *, progress=True: f"{path} {root} {subject} {split} {progress}",
    )
    assert say("add", "x.hdf5", "root", "sub-7", "testing", "--no-progress") == (
        0,
        "x.hdf5 root sub-7 testing False\n",
        [],
    )


def test_hdf5_add_for_real(data, say, tmp_path):
    from helpers_data import CONFIG

    (tmp_path / "c.yaml").write_text(str(CONFIG))
    out = tmp_path / "x.hdf5"
    assert (
        say(
            "create",
            data.parent,
            out,
            tmp_path / "c.yaml",
            "--training",
            "sub-0",
            "--one-file-per-subject",
            "--no-progress",
        )[0]
        == 0
    )
    assert say("add", out, data.parent, "sub-1", "testing", "--no-progress")[:2] == (0, f"{out}\n")
    assert say("validate", out, "--strict", "--no-progress")[0] == 0
    assert "sub-1" in complaint(say("add", out, data.parent, "sub-1", "testing", "--no-progress"))


def test_hdf5_validate(data, say, tmp_path):
    import h5py

    assert say("validate", data, "--no-progress") == (0, "data.hdf5: all is well in 6 groups of 3 subjects\n", [])
    bad = shutil.copy(data, tmp_path / "bad.hdf5")
    with h5py.File(bad, "a") as h5:
        h5.attrs["testing_subjs"] = []
    assert [say("validate", bad, "--no-progress", *more)[0] for more in ([], ["--strict"])] == [0, 1]
    with h5py.File(bad, "a") as h5:
        h5["sub-1/streamlines/offsets"][1] = -5
    code, out, lines = say("validate", bad, "--no-progress")
    assert code == 1 and "offsets[1]" in out and lines == []
    assert "none.hdf5" in complaint(say("validate", tmp_path / "none.hdf5"))


def test_hdf5_describe(data, say, tmp_path):
    code, out, lines = say("describe", data)
    assert (code, lines) == (0, []) and "streamlines" in out and "1 training, 1 validation, 1 testing" in out
    assert "none.hdf5" in complaint(say("describe", tmp_path / "none.hdf5"))


def test_hdf5_extract(data, say, tmp_path):
    import h5py

    words = [
        "extract",
        data,
        tmp_path / "out",
        "--subjects",
        "sub-0",
        "sub-2",
        "--groups",
        "streamlines",
        "--tractogram",
        ".trk",
        "--no-progress",
    ]
    code, out, lines = say(*words)
    assert (code, lines) == (0, []) and out.split() == [
        str(tmp_path / "out" / s / "streamlines.trk") for s in ("sub-0", "sub-2")
    ]
    assert "exists already" in complaint(say(*words)) and say(*words, "--overwrite")[0] == 0
    bad = shutil.copy(data, tmp_path / "bad.hdf5")
    with h5py.File(bad, "a") as h5:
        h5["sub-1/streamlines/offsets"][1] = -5
    assert "sub-1/streamlines: offsets[1] is -5" in complaint(
        say("extract", bad, tmp_path / "mended", "--subjects", "sub-1", "--no-progress")
    )
    code, _, notes = say(
        "extract", bad, tmp_path / "mended", "--subjects", "sub-1", "--repair", "offsets", "nan", "--no-progress", "-f"
    )
    assert code == 0 and len(notes) == 1 and "offsets are taken from the lengths" in notes[0]
    assert "'all' is none of" in complaint(say("extract", bad, tmp_path / "more", "--repair", "all", "--no-progress"))


@pytest.mark.parametrize("command", ["create", "add", "extract"])
def test_hdf5_every_keyword_has_an_option_with_help(command):
    import inspect
    import re

    import tractkit.hdf5.create as create_module
    from tractkit.cli.commands import parser
    from tractkit.hdf5.extract import extract_hdf5

    function = {"create": create_module.create_hdf5, "add": create_module.add_subject, "extract": extract_hdf5}[command]
    commands = parser("hdf5")._subparsers._group_actions[0].choices["hdf5"]._subparsers._group_actions[0].choices
    options = {action.dest: action for action in commands[command]._actions}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            assert options[name].default == parameter.default and len(options[name].help) > 8, name
            assert all(re.fullmatch(r"-f|--[a-z-]+", flag) for flag in options[name].option_strings)


def test_hdf5_speaks_of_options_and_takes_underscores(data, say, tmp_path):
    import json

    from helpers_data import CONFIG

    config = {**CONFIG, "input": {**CONFIG["input"], "files": "none_at_all=True.nii.gz"}}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "missing.json").write_text(json.dumps(config))
    words = ["create", data.parent, tmp_path / "a_b.hdf5"]
    assert say(*words, tmp_path / "config.json", "--training", "sub-0", "--no_progress", "--step_size=1.5")[0] == 0
    assert "--overwrite" in complaint(say(*words, tmp_path / "config.json", "--training", "sub-0", "--no_progress"))
    answer = complaint(say(*words[:2], tmp_path / "c.hdf5", tmp_path / "missing.json", "--training", "sub-0"))
    assert "none_at_all=True.nii.gz" in answer and "--skip-enforce-files-presence" in answer
    assert (
        say(
            *words,
            tmp_path / "missing.json",
            "--training",
            "sub-0",
            "-f",
            "--skip_enforce_files_presence",
            "--no-progress",
        )[0]
        == 0
    )


def test_hdf5_help_is_quick_to_find(capsys):
    code = ("import sys; from tractkit.cli.commands import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
            "sys.exit(bool({'torch', 'h5py', 'matplotlib', 'dipy', 'numba'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "hdf5" in done.stdout
    with pytest.raises(SystemExit) as ended:
        main(["hdf5"])
    assert ended.value.code == 2


# ---- the tutorial's kernel -----------------------------------------------------------------------------------


@pytest.mark.parametrize("good", [True, False])
def test_the_kernel_is_silent_and_its_errors_are_not(good, monkeypatch, tmp_path, capfd):
    import nbformat

    source = "import sys; print('hello', file=sys.stderr)" if good else "raise ValueError('a real error')"
    cells = [nbformat.v4.new_code_cell("set_up = 1", metadata={"nbdev": {"hide": "true"}}),
             nbformat.v4.new_code_cell(source, metadata={"nbdev": {"varies": "true"}})]
    (tmp_path / "90_phantom.ipynb").write_text(nbformat.writes(nbformat.v4.new_notebook(cells=cells)))
    monkeypatch.setattr(report.resources, "files", lambda name: tmp_path)
    run = SimpleNamespace(folder=tmp_path, settings=SimpleNamespace(own=False))
    if good:
        report.write_tutorial(run, print)
        page = (tmp_path / "tutorial.html").read_text()
        assert "hello" in page and "set_up" not in page and "varies" not in page
    else:
        with pytest.raises(Exception, match="a real error"):
            report.write_tutorial(run, print)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("keeps", [True, False])
def test_ctrl_c_in_a_function_that_c_code_has_called_is_not_lost(keeps):
    """A demo went on to the end: Ctrl-C had come while a compiler called Python. `keeps`: and without the mend it is
    lost."""
    code = (
        "import contextlib, ctypes, os, signal, time\n"
        "from tractkit.cli.commands import keeping_interrupts\n"
        "def called():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    for _ in range(1000): pass\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try:\n"
        f"    with keeping_interrupts() if {keeps} else contextlib.nullcontext():\n"
        "        ctypes.CFUNCTYPE(None)(called)()\n"
        "        time.sleep(3)\n"
        "    print('lost')\n"
        "except KeyboardInterrupt:\n"
        "    print('kept')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == ("kept" if keeps else "lost"), done.stderr
    assert ("ignored" in done.stderr) is not keeps
