"""The whole way in one call: what it leaves behind, that it can be stopped anywhere, and a person's own files."""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import resources
from pathlib import Path

import nbformat
import nibabel as nib
import numpy as np
import pytest
from dipy.reconst.dti import TensorModel
from safetensors.numpy import load_file

from tractkit.cli.commands import main
from tractkit.demo import pipeline
from tractkit.demo.pipeline import open_demo
from tractkit.demo.results import Demo
from tractkit.demo.settings import demo_settings
from tractkit.demo.subject_files import SubjectFiles
from tractkit.demo.trainer import demo_trainer
from tractkit.dwi.gradients import load_dwi
from tractkit.dwi.phantom import sample_subjects
from tractkit.runs.log import RunLog
from tractkit.spatial.streamlines import segment_directions
from tractkit.spatial.tractogram import Tractogram
from tractkit.spatial.volume import Volume

pytestmark = pytest.mark.filterwarnings("ignore:The legacy descoteaux07:PendingDeprecationWarning")
EPOCHS = 2
EVERYWHERE = {f"{who}.{ending}" for who in ("model", "dipy", "shuffled") for ending in ("trk", "trx")} | {
    "demo.json", "data.hdf5", "run", "control", "subjects", "losses.json", "scores.json", "scores.txt",
    "streamlines.png", "losses.png", "comparison.png", "panel.png"}


def numbers(value) -> list[float]:
    """All numbers in what JSON holds."""
    if isinstance(value, dict):
        return [x for v in value.values() for x in numbers(v)]
    if isinstance(value, list):
        return [x for v in value for x in numbers(v)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def listing(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def check_results(folder: Path, more: set[str]) -> dict:
    """All files are there and open, all scores are finite. Returns the scores."""
    assert listing(folder) == EVERYWHERE | more
    for picture in folder.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000, picture
    scores = json.loads((folder / "scores.json").read_text())
    values = numbers(scores)
    assert len(values) > 10 and all(map(math.isfinite, values)) and len(set(values)) > 5
    assert not list(folder.rglob("*.tmp*")) and not [
        p for p in folder.rglob("*") if p.name.startswith(".") and "lock" not in p.name
    ]
    return scores


# the phantom, stopped and gone on with ----------------------------------------------------------------------------

def start(words: list[str], cwd: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tractkit", *words],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen, happened) -> None:
    while not happened():
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.05)


def nb_batches(folder: Path) -> int:
    return len(RunLog(folder / "run").records("batch"))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """`tractkit demo --quick`, stopped by Ctrl-C in its second epoch; then the command it printed, to the end."""
    sample_subjects(3, progress=False)
    cwd = tmp_path_factory.mktemp("stopped")
    folder = cwd / "a folder"
    first = start(["demo", "--quick", "--no-html", "--epochs", str(EPOCHS), "--out", "a folder"], cwd)
    wait_for(first, lambda: nb_batches(folder) > 30)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does
    out, err = first.communicate(timeout=120)
    log = RunLog(folder / "run").records()
    command = err.strip().splitlines()[-1].strip()
    then = start(shlex.split(command)[1:], cwd)
    out2, err2 = then.communicate(timeout=600)
    return {"folder": folder, "first": (first.returncode, out, err), "log": log, "command": command,
            "then": (then.returncode, out2, err2), "cwd": cwd}


def test_ctrl_c_prints_the_command_that_goes_on(stopped):
    code, out, err = stopped["first"]
    assert code == 130 and "Traceback" not in err
    assert stopped["command"] == f"tractkit demo --quick --no-html --epochs {EPOCHS} --out 'a folder'"
    steps = [r["step"] for r in stopped["log"] if r["kind"] == "batch"]
    assert 30 < len(steps) < 27 * EPOCHS, "it was to be stopped in the midst of training"
    assert "tracking the test subject" not in out


def test_the_plan_comes_first(stopped):
    first, *rest = stopped["first"][1].splitlines()
    assert "phantom of 3 subjects" in first and f"{EPOCHS} epochs" in first
    assert "results in a folder" in rest[1] and "minute" in rest[1] and "Ctrl-C" in rest[1]
    assert any("phantom.png" in line for line in rest)


def test_the_command_goes_on_at_the_batch_where_it_stopped(stopped):
    code, out, err = stopped["then"]
    assert code == 0, err[-3000:]
    before = [r for r in stopped["log"] if r["kind"] == "batch"]
    after = RunLog(stopped["folder"] / "run").records("batch")
    assert after[:len(before)] == before, "batches from before the stop were run again"  # the clock's seconds included
    assert [r["step"] for r in after] == list(range(1, len(after) + 1))
    n = len(after) // EPOCHS
    assert [(r["epoch"], r["batch"]) for r in after] == [(e, b) for e in range(EPOCHS) for b in range(n)]
    epochs = RunLog(stopped["folder"] / "run").records("epoch")
    assert [r["epoch"] for r in epochs] == list(range(EPOCHS))
    assert f"after batch {before[-1]['batch'] + 1} (step {len(before)})" in out + err


@pytest.mark.parametrize("control", [False, pytest.param(True, marks=pytest.mark.full)])
def test_stopped_or_not_the_weights_are_the_same_bits(stopped, tmp_path, control):
    demo = open_demo(stopped["folder"])
    os.link(demo.folder / "data.hdf5", tmp_path / "data.hdf5")
    name = "control" if control else "run"
    state = demo_trainer(tmp_path, demo.settings, control, progress=False).train_and_validate()
    again = demo.trainer(control, progress=False).train_and_validate()
    for key, value in state.model.state_dict().items():
        assert np.array_equal(value.numpy(), again.model.state_dict()[key].numpy()), key
    whole, parts = (load_file(folder / name / "best_model" / "model.safetensors") for folder in (tmp_path, demo.folder))
    assert all(np.array_equal(whole[key], parts[key]) for key in whole) and set(whole) == set(parts)
    assert [r["valid_loss"] for r in state.epochs] == [r["valid_loss"] for r in again.epochs]


def test_what_a_demo_leaves_behind(stopped):
    folder = stopped["folder"]
    scores = check_results(folder, {"oracle.trk", "oracle.trx", "phantom.png"})
    demo = open_demo(folder)
    assert len(scores["scores"]) == 4 and len(scores["validation_loss"]) == 3
    assert scores["scores"]["oracle: follows the nearest true curve"]["valid_share"] > 0.9
    dwi = nib.load(sample_subjects(3, progress=False) / "sub-03" / "dwi.nii.gz")
    for who in ("model", "dipy", "oracle"):
        trk, trx = demo.tractogram(who), Tractogram.load(folder / f"{who}.trk")
        assert len(trk) == len(trx) > 500 and (trk.lengths_mm >= 20 - 1e-3).all()
        assert np.allclose(trx.streamlines.points, trk.streamlines.points, atol=1e-2)
        assert np.allclose(nib.streamlines.load(folder / f"{who}.trk").header["voxel_to_rasmm"], dwi.affine, atol=1e-5)


def test_the_table_reads_without_us(stopped):
    out = stopped["then"][1]
    table = (stopped["folder"] / "scores.txt").read_text()
    assert table.strip() in out
    rows = [line for line in table.splitlines() if " of 7 " in line]
    assert [row.split("  ")[0] for row in rows] == [
        "this model",
        "DIPY deterministic CSD",
        "oracle: follows the nearest true curve",
    ]
    assert "repeating the previous direction" in table and "input set to zero" in table and "shuffled" in table
    last = out.strip().splitlines()[-3:]
    assert "streamlines.png" in last[0] and "lab" in last[2]


def test_dipys_settings_are_chosen_from_a_printed_grid(stopped):
    out = stopped["then"][1]
    grid = out[out.index("step "):out.index("DIPY deterministic, ")]
    assert len([line for line in grid.splitlines() if " of 7 " in line]) >= 9


def test_a_finished_run_is_reused(stopped, capsys, monkeypatch):
    def never(*args):
        raise AssertionError("this was done already")

    monkeypatch.chdir(stopped["cwd"])
    monkeypatch.setattr(pipeline, "run_steps", never)
    before = {p: p.stat().st_mtime_ns for p in stopped["folder"].rglob("*")}
    began = time.process_time()
    assert main(["demo", "--quick", "--no-html", "--epochs", str(EPOCHS), "--out", "a folder"]) == 0
    assert time.process_time() - began < 3
    out = capsys.readouterr().out
    assert out.startswith("a folder: this run is finished and reused") and "--fresh" in out and "this model" in out
    assert {p: p.stat().st_mtime_ns for p in stopped["folder"].rglob("*")} == before


@pytest.mark.parametrize("words", [["--seed", "1"], ["--epochs", "4"]])
def test_a_folder_with_other_settings_is_refused(stopped, capsys, monkeypatch, words):
    monkeypatch.chdir(stopped["cwd"])
    before = (stopped["folder"] / "demo.json").read_bytes()
    assert main(["demo", "--quick", "--no-html", "--epochs", str(EPOCHS), "--out", "a folder", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "a folder" in err and "--fresh" in err
    assert (stopped["folder"] / "demo.json").read_bytes() == before and "model.trk" in listing(stopped["folder"])


@pytest.mark.full
@pytest.mark.parametrize("seconds", [0.1, 1.5])
def test_ctrl_c_while_the_phantom_is_made(tmp_path, monkeypatch, seconds):
    """Child processes get the signal too, as in a terminal; what is finished is kept."""
    monkeypatch.setenv("TRACTKIT_CACHE", str(tmp_path / "cache"))
    process = start(["demo", "--quick", "--no-html", "--epochs", "1", "--out", "out"], tmp_path)
    wait_for(process, (tmp_path / "out" / "demo.json").exists)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 130 and "Traceback" not in err, err[-3000:]
    assert err.strip().endswith("tractkit demo --quick --no-html --epochs 1 --out out")
    process = start(["demo", "--quick", "--no-html", "--epochs", "1", "--out", "out"], tmp_path)
    wait_for(process, lambda: nb_batches(tmp_path / "out") > 0)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=240)
    assert process.returncode == 130


def test_fresh_starts_anew(stopped, tmp_path, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    shutil.copytree(stopped["folder"], tmp_path / "copy")
    monkeypatch.setattr(pipeline, "run_steps", interrupted)
    assert main(["demo", "--quick", "--no-html", "--seed", "7", "--out", str(tmp_path / "copy"), "--fresh"]) == 130
    assert listing(tmp_path / "copy") == {"demo.json"}
    assert json.loads((tmp_path / "copy" / "demo.json").read_text())["seed"] == 7
    again = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--fresh" not in again and "--seed 7" in again


def test_a_relative_path_means_another_file_elsewhere(tmp_path, monkeypatch, capsys):
    source = sample_subjects(3, progress=False)
    monkeypatch.setattr(pipeline, "run_steps", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    for name, code in (("sub-01", 130), ("sub-01", 130), ("sub-02", 2)):
        monkeypatch.chdir(source / name)
        assert main(["demo", *own_words(Path()), "--out", str(tmp_path / "out")]) == code
        capsys.readouterr()


# a person's own data ------------------------------------------------------------------------------------------------

def own_words(folder: Path) -> list[str]:
    files = SubjectFiles.find(folder)
    return [
        w for flag in ("dwi", "bvals", "bvecs", "mask", "tractogram") for w in (f"--{flag}", str(getattr(files, flag)))
    ]


@pytest.fixture
def few_seeds(monkeypatch):
    """Tracking takes as long as it has seeds."""
    settings = pipeline.demo_settings
    monkeypatch.setattr(pipeline, "demo_settings", lambda *args: replace(settings(*args), max_seeds=600))


def cells_of_the_page(demo: Demo, work: Path, monkeypatch) -> dict:
    """Run the cells of the page of one's own data in this process; return their variables."""
    monkeypatch.setenv("TRACTKIT_DEMO", str(demo.folder))
    work.mkdir()
    monkeypatch.chdir(work)
    notebook = nbformat.reads(resources.files("tractkit.tutorials").joinpath("91_real.ipynb").read_text("utf-8"), 4)
    variables: dict = {}
    for cell in notebook.cells:
        if cell.cell_type == "code" and "hide" not in cell.metadata.get("nbdev", {}):
            exec(cell.source.replace("from IPython.display import display", "display = print"), variables)
    return variables


def test_one_subject_of_ones_own(tmp_path, capsys, few_seeds, monkeypatch):
    folder = sample_subjects(3, progress=False) / "sub-01"
    words = ["demo", "--quick", "--epochs", "1", "--no-html", "--out", str(tmp_path / "own"), *own_words(folder)]
    assert main(words) == 0
    out = capsys.readouterr().out
    scores = check_results(tmp_path / "own", {"dipy-again.trk", "dipy-again.trx"})
    text = (tmp_path / "own" / "scores.txt").read_text()
    assert text.splitlines()[0] == "same subject: shows the pipeline, not generalisation" and text.strip() in out
    assert "If the reference was itself tracked with DIPY's CSD, DIPY from other seeds is the ceiling." in text
    assert set(scores["comparison"]) == {
        "this model",
        "DIPY deterministic CSD",
        "DIPY again, other seeds",
        "this model, signal shuffled",
    }
    demo = open_demo(tmp_path / "own")
    page = cells_of_the_page(demo, tmp_path / "elsewhere", monkeypatch)
    assert page["demo"].folder == demo.folder and str(page["demo"].table()) in text, "the page is not of this run"
    assert page["rows"] == scores["comparison"]
    assert check_results(demo.folder, {"dipy-again.trk", "dipy-again.trx"}) == scores and not listing(Path.cwd())
    whole = Tractogram.load(folder / "tractogram.trk")
    parts = [
        demo.dataset.subject(f"dwi_{part}").streamlines["streamlines"] for part in ("training", "validation", "testing")
    ]
    assert sum(map(len, parts)) == len(whole)
    assert np.allclose([len(p) / len(whole) for p in parts], [0.8, 0.1, 0.1], atol=0.002)
    seen = [
        set(map(bytes, (p.get(np.arange(len(p)))[i].mean(0).round(3).astype("f4") for i in range(len(p)))))
        for p in parts
    ]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    assert main(words) == 0 and "reused" in capsys.readouterr().out


def test_several_subjects_of_ones_own(tmp_path, capsys, few_seeds):
    root = sample_subjects(3, progress=False)
    folders = [w for k in (2, 3, 1) for w in ("--subject", str(root / f"sub-{k:02}"))]
    assert main(["demo", "--quick", "--epochs", "1", "--no-html", "--out", str(tmp_path / "own"), *folders,
                 "--tracked-with", "a pencil"]) == 0
    capsys.readouterr()
    check_results(tmp_path / "own", {"dipy-again.trk", "dipy-again.trx"})
    text = (tmp_path / "own" / "scores.txt").read_text()
    assert "same subject" not in text and "itself tracked with a pencil" in text
    demo = open_demo(tmp_path / "own")
    assert demo.splits == {"training": ["sub-02"], "validation": ["sub-03"], "testing": ["sub-01"]}
    truth = Tractogram.load(root / "sub-01" / "tractogram.trk")
    assert len(demo.reference) == len(truth) and np.allclose(demo.reference.affine, truth.affine)


def test_who_trains_and_who_is_tested():
    def people(n):
        return [SubjectFiles(f"s{k}", *[Path("x")] * 5) for k in range(n)]

    assert demo_settings().training == tuple(f"sub-{k:02}" for k in range(1, 13))
    assert demo_settings().validation == ("sub-13", "sub-14") and demo_settings().testing == ("sub-15",)
    one, two, five = (demo_settings(people(n)) for n in (1, 2, 5))
    assert one.same_subject and not two.same_subject and not five.same_subject
    assert two.testing == ("s1",) and two.training == ("s0 0.9",)
    assert (five.training, five.validation, five.testing) == (("s0", "s1", "s2"), ("s3",), ("s4",))


# real data ----------------------------------------------------------------------------------------------------------

@pytest.mark.real
def test_the_gradients_of_the_real_data_fit_its_streamlines(real_data):
    """The affine mirrors x, so FSL's directions are those of the voxel axes; tensors lie along the reference."""
    folder = real_data / "real_dwi_3mm"
    files = SubjectFiles.find(folder)
    assert np.linalg.det(Volume.load(files.dwi).affine) < 0
    dwi = load_dwi(files.dwi, files.bvals, files.bvecs, files.mask)
    t = Tractogram.load(files.tractogram)
    directions = segment_directions(t.streamlines)
    places = np.round(t.streamlines.points + directions / 2).astype(int)
    use = directions.any(1) & dwi.mask[tuple(places.T)]
    keep = np.flatnonzero(use)[::40]
    along = directions[keep] / np.linalg.norm(directions[keep], axis=1, keepdims=True)
    tensors = TensorModel(dwi.gtab).fit(dwi.volume.data[tuple(places[keep].T)])
    strong = tensors.fa > 0.4
    agree = {flips: np.abs((tensors.directions[strong, 0] * flips * along[strong]).sum(1)).mean()
             for flips in ((1, 1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, -1))}
    assert max(agree, key=agree.get) == (1, 1, 1) and agree[1, 1, 1] > 0.9, agree


@pytest.mark.real
def test_the_command_on_real_data(real_data, tmp_path, capsys):
    folder, out = real_data / "real_dwi_3mm", tmp_path / "real"
    assert main(["demo", "--quick", "--epochs", "1", "--no-html", "--out", str(out), *own_words(folder),
                 "--tracked-with", "DIPY's CSD"]) == 0
    capsys.readouterr()
    scores = check_results(out, {"dipy-again.trk", "dipy-again.trx"})["comparison"]
    text = (out / "scores.txt").read_text()
    assert "The reference was itself tracked with DIPY's CSD" in text and text.startswith("same subject: ")
    volume, mask = nib.load(folder / "dwi.nii.gz"), np.asarray(nib.load(folder / "mask.nii.gz").dataobj) > 0
    for who in ("model", "dipy", "dipy-again"):
        opened = nib.streamlines.load(out / f"{who}.trk")
        assert np.allclose(opened.header["voxel_to_rasmm"], volume.affine, atol=1e-5)
        assert tuple(opened.header["dimensions"]) == volume.shape[:3]
        lines = opened.streamlines
        lengths = np.array([np.linalg.norm(np.diff(line, axis=0), axis=1).sum() for line in lines])
        assert (lengths >= 20 - 1e-2).sum() >= 1000
        voxels = np.round(nib.affines.apply_affine(np.linalg.inv(volume.affine), lines.get_data()) - 1e-4).astype(int)
        assert mask[tuple(voxels.T)].mean() > 0.9999
    assert len({tuple(row.values()) for row in scores.values()}) == len(scores)
    assert scores["DIPY again, other seeds"]["b_to_a_mm"] < scores["this model, signal shuffled"]["b_to_a_mm"]


def test_demo_reads_what_it_wrote(tmp_path):
    people = [SubjectFiles(f"s{k}", *[Path(f"/x/{k}")] * 5) for k in range(3)]
    settings = demo_settings(people, 3, True, "a pencil", 12.0, 5)
    pipeline.open_folder(tmp_path / "demo", settings, False)
    (tmp_path / "demo" / "scores.txt").touch()
    read = open_demo(tmp_path / "demo")
    assert read == Demo(tmp_path / "demo", settings) and read.settings.to_json() == settings.to_json()


def test_without_say_only_the_last_line_is_shown(monkeypatch, capsys):
    from tractkit.demo import pipeline

    monkeypatch.setattr(pipeline, "no_bar", lambda wanted: not wanted)
    for wanted in (True, False):
        with pipeline.one_line(wanted) as say:
            say("tracking the test subject")
            say("  epoch 2/12\nand more")
        shown = capsys.readouterr().out
        assert ("epoch 2/12 (00:0" in shown) == wanted and "and more" not in shown
        assert shown.rpartition("\r")[2] == ""  # and is wiped out
