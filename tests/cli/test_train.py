"""`tractkit train` and `tractkit resume`: a run of words, stopped and gone on with, told what is wrong in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import yaml
from helpers_data import make_file
from helpers_training import fit, log_without_time, same_states

from tractkit.cli.commands import main
from tractkit.core.files import DataError
from tractkit.runs.log import RunLog
from tractkit.training.callbacks import Callback, OnNonFinite
from tractkit.training.config import build_trainer, check_run_config, read_run_config
from tractkit.training.policy import DecreasingOnPlateau, Exponential, LossStop, Patience, Schedule, Switch
from tractkit.training.state import TrainerState


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_file(tmp_path_factory.mktemp("data"), n=16, points=(4, 30))[0]


def words(data, folder, name="run", **more):
    """A small training with noise and dropout, as options in dwi_ml's words."""
    options = (
        dict(
            input_group_name="input",
            streamline_group_name="streamlines",
            experiments_path=folder,
            experiment_name=name,
            max_epochs=3,
            batch_size_training=4,
            rnn_layer_sizes="6 5",
            dropout=0.2,
            step_size=2.0,
            reverse_ratio=0.5,
            noise_gaussian_size_forward=0.1,
            learning_rate="0.01*2 0.005",
            clip_grad="1e0",
            rng=7,
            device="cpu",
            num_threads=1,
            num_workers=0,
        )
        | more
    )
    return [
        "train",
        str(data),
        *(w for k, v in options.items() for w in (f"--{k}", *(str(v).split() if k == "rnn_layer_sizes" else [str(v)]))),
        "--no-progress",
    ]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert main(words(data, folder)) == 0
    return folder / "run"


def assert_equal_runs(a, b):
    assert same_states(TrainerState.load(a), TrainerState.load(b)) == []
    assert log_without_time(RunLog(a)) == log_without_time(RunLog(b))


def test_options_are_the_settings(data, whole):
    config = read_run_config(whole)
    assert (
        config["data"]["path"] == str(data)
        and config["model"]["class"] == "Learn2Track"
        and config["model"]["nb_features"] == 3
    )
    assert config["model"]["rnn_layer_sizes"] == [6, 5] and config["model"]["dropout"] == .2
    assert [config[s]["rng"] for s in ("sampler", "loader", "trainer")] == [7, 7, 7]
    assert config["trainer"]["learning_rate"] == [.01, .01, .005] and config["trainer"]["clip_grad"] == 1.0
    assert config["loader"]["step_size"] is None and config["loader"]["reverse_ratio"] == .5
    assert len(RunLog(whole).records("epoch")) == 3


def test_a_config_gives_the_same_run(whole, tmp_path):
    """Moved to another name, and to the bit."""
    config = read_run_config(whole)
    config["trainer"] |= {"experiments_path": str(tmp_path)}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "mine.yaml"), "--max-epochs", "2"]) == 0
    assert TrainerState.load(tmp_path / "run").epoch == 2
    assert main(["resume", str(tmp_path / "run"), "--new_max_epochs", "3"]) == 0
    assert_equal_runs(tmp_path / "run", whole)
    assert read_run_config(tmp_path / "run")["trainer"]["max_epochs"] == 3


@pytest.mark.parametrize("model, kind", [("tts", "TransformerSrcOnlyModel"), ("TTO", "OriginalTransformerModel"),
                                         ("ttst", "TransformerSrcAndTgtModel")])
def test_transformers_are_trained_by_their_short_names(data, tmp_path, capsys, model, kind):
    options = dict(model=model, max_epochs=1, nheads=2, n_layers_e=1, input_embedded_size=8, dropout_rate=0.1,
                   position_encoding="rotary", dg_key="gaussian", add_eos="") | (
                       {"target_embedded_size": 8} if model == "ttst" else {})
    of_rnn = ("--rnn_layer_sizes", "6", "5", "--dropout", "0.2")
    argv = [w for w in words(data, tmp_path, **options) if w]
    start = argv.index(of_rnn[0])
    assert main(argv[:start] + argv[start + len(of_rnn):]) == 0
    config = read_run_config(tmp_path / "run")["model"]
    assert config["class"] == kind and config["position_encoding"] == "rotary" and config["nb_features"] == 3
    state = TrainerState.load(tmp_path / "run")
    assert type(state.model).__name__ == kind and state.model.direction_getter.add_eos
    message = complaint(capsys, *(argv[:start] + argv[start + 3:]), "--experiment_name", "other")
    assert "model.dropout is not known; did you mean d" in message


@pytest.mark.full
def test_a_moved_run_is_gone_on_with_where_it_is(data, whole, tmp_path, capsys):
    assert main(words(data, tmp_path, "old", max_epochs=2)) == 0
    (tmp_path / "archive").mkdir()
    (tmp_path / "old").rename(tmp_path / "archive/new")
    assert main(["resume", str(tmp_path / "archive/new"), "--max-epochs", "3", "--new-patience", "2"]) == 0
    assert not (tmp_path / "old").exists() and TrainerState.load(tmp_path / "archive/new").epoch == 3
    capsys.readouterr()
    assert main(["resume", str(tmp_path / "archive/new")]) == 0 and "Nothing left to train" in capsys.readouterr().out


def test_interrupted_it_says_how_to_go_on(data, whole, tmp_path, capsys):
    """Ctrl-C after some batches: saved, exit code 130, and the line it prints finishes the run with the same bits."""
    log = RunLog(tmp_path / "run")

    def interrupt():
        end = time.monotonic() + 240
        while len(log.records("batch")) < 6 and time.monotonic() < end:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    code = main(words(data, tmp_path))
    thread.join()
    out, err = capsys.readouterr()
    assert (
        code == 130
        and "saved in" in out
        and err.splitlines()[-2:] == ["To go on:", f"  tractkit resume {tmp_path / 'run'}"]
    )
    assert TrainerState.load(tmp_path / "run").global_step < TrainerState.load(whole).global_step
    assert main(err.split()[err.split().index("tractkit") + 1:]) == 0
    assert_equal_runs(tmp_path / "run", whole)


def complaint(capsys, *argv) -> str:
    capsys.readouterr()
    assert main([str(w) for w in argv]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("tractkit")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


@pytest.mark.parametrize(
    "place, key, text",
    [
        ("trainer", "max_epoch", "did you mean max_epochs?"),
        ("loader", "reverse_rate", "did you mean reverse_ratio?"),
        ("sampler", "batchsize_training", "did you mean batch_size_training?"),
        ("model", "rnn_layers", "did you mean rnn_layer_sizes?"),
        ("data", "file", "there are path"),
        ("data", "lasy", "did you mean lazy?"),
        ("trainer", "optimiser", "did you mean optimizer?"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest(whole, tmp_path, capsys, place, key, text):
    config = read_run_config(whole)
    config[place][key] = 1
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(config))
    message = complaint(capsys, "train", tmp_path / "wrong.yaml")
    assert str(tmp_path / "wrong.yaml") in message and f"{place}.{key}" in message and text in message
    assert "did you mean" in text or key == "file"


@pytest.mark.parametrize("options, text", [
    ("--model tts --dropout 0.1", "model.dropout is not known; did you mean dropout_rate?"),
    ("--dropout-rate 0.1", "model.dropout_rate is not known; did you mean dropout?"),
    ("--model tts --dropout-rate -0.1", "model: dropout_rate must be in [0, 1), not -0.1"),
    ("--dg-dropout 1", "model: dg_dropout must be in [0, 1), not 1"),
    ("--position-encoding rotary", "is not known; it is a setting of transformers (tts, tto, ttst)"),
    ("--model tts --rnn-key gru", "is not known; it is a setting of learn2track"),
    ("--model tts --position-encoding relational", "not 'relational'. Give rotary"),
    ("--model gru", "did you mean learn2track with rnn_key gru (--model learn2track --rnn-key gru)?"),
    ("--model ttss", "did you mean tts? There are learn2track, tts, tto, ttst, autoencoder"),
    ("--model ae", "did you mean autoencoder? There are learn2track, tts, tto, ttst, autoencoder"),
])
def test_a_setting_of_another_model_is_told_by_its_name(data, tmp_path, capsys, options, text):
    places = ["--input-group-name", "input", "--streamline-group-name", "streamlines", "--experiments-path", tmp_path]
    assert text in complaint(capsys, "train", data, *places, "--num-workers", "0", *options.split())


def test_other_mistakes_are_one_line(data, whole, tmp_path, capsys):
    bad = tmp_path / "bad.yaml"
    for text, told in (
        ("trainr: {max_epochs: 3}", "did you mean trainer?"),
        ("- a\n- b", "no mapping"),
        ("a: [1", "cannot be read as YAML"),
        ("format: 7", "format 7"),
        ("data: {path: x}\nmodel: {class: Learn2Trak}", "did you mean Learn2Track?"),
        (f"data: {{path: {data}}}", "sampler.streamline_group_name is missing"),
        ("trainer: 3", "no mapping"),
    ):
        bad.write_text(text)
        assert told in complaint(capsys, "train", bad), text
    assert "no such config" in complaint(capsys, "resume", tmp_path)
    for name in ("data.hdf5", "config.yaml"):  # a file where a folder is meant
        (tmp_path / name).write_bytes(b"\x89HDF")
        assert "is a file, and a run is a folder. Give " in complaint(capsys, "resume", tmp_path / name)
    (tmp_path / "config.yaml").unlink()
    assert "no such config" in complaint(capsys, "train", tmp_path / "none.yaml")
    assert "data.path is missing" in complaint(capsys, "train")
    assert "is not SECTION.KEY=VALUE" in complaint(capsys, "train", data, "--set", "max_epochs=3")
    assert "no such volumes group" in complaint(capsys, *words(data, tmp_path, input_group_name="inputs"))
    assert "max_epochs must be positive" in complaint(capsys, *words(data, tmp_path, max_epochs=0))
    assert "trained on other data" in complaint(
        capsys, "resume", whole, "--max-epochs", "4", "--hdf5_file", make_file(tmp_path / "other", n=7)[0]
    )
    assert "host:port" in complaint(capsys, "train", whole / "config.yaml", "--nnodes", "2")
    with pytest.raises(SystemExit):
        main(["train", str(data), "--max-epoks", "3"])


@pytest.mark.parametrize("argv, named", [
    (["--use-gpu", "--device", "cpu"], "--use-gpu and --device cpu contradict each other. Give one of them"),
    (["--device", "cpu", "--use-gpu"], "--use-gpu and --device cpu contradict each other. Give one of them"),
    pytest.param(["--use-gpu"], "this machine has no GPU", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a GPU")),
    (["--device", "cuda:99", "--nproc-per-node", "2"], "device 'cuda:99': this machine has"),
    (["--nb-features", "7"], "the model reads 7 features"),
])
def test_a_device_or_width_that_does_not_fit_leaves_no_folder(data, tmp_path, capsys, monkeypatch, argv, named):
    monkeypatch.chdir(tmp_path)
    groups = ["--input-group-name", "input", "--streamline-group-name", "streamlines", "--num-workers", "0"]
    assert named in complaint(capsys, "train", str(data), *groups, *argv)
    assert not list(tmp_path.iterdir())


def test_a_number_is_a_number(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "trainer: {weight_decay: 1e-3, learning_rate: 0.01*3 0.001, clip_grad: 1., experiment_name: 2026-11-21}"
    )
    trainer = read_run_config(tmp_path / "c.yaml")["trainer"]
    assert (
        trainer["weight_decay"] == 1e-3 and trainer["learning_rate"] == "0.01*3 0.001" and trainer["clip_grad"] == 1.0
    )


@pytest.mark.full
def test_policies_go_into_the_file_and_come_back(whole, tmp_path):
    told = [
        Patience(3, 0.1),
        DecreasingOnPlateau(initial=0.1, multiplier=0.5, patience=2, rtol=0.1, atol=0.01),
        LossStop(2),
        OnNonFinite(0.5, 4),
    ]
    rates = [Exponential(.1, .5, 3, min_value=1e-4), Schedule(.1, {2: .5}), Switch(.1, {3: .01}), .2, [.1, .2]]
    for rate in rates:
        config = read_run_config(whole)
        given = fit(tmp_path, learning_rate=rate, policies=told, optimizer=torch.optim.NAdam).config()["trainer"]
        config["trainer"] |= {k: given[k] for k in ("learning_rate", "policies", "optimizer")} | {
            "experiment_name": "other"
        }
        config = yaml.safe_load(yaml.safe_dump(config))
        trainer = build_trainer(config)
        assert [str(p) for p in trainer.policies] == [
            str(p) for p in fit(tmp_path, learning_rate=rate, policies=told).policies
        ]
        assert trainer.optimizer is torch.optim.NAdam
    config["trainer"]["learning_rate"] = {"class": "Exponental", "initial": .1}
    with pytest.raises(DataError, match="did you mean Exponential?"):
        build_trainer(config)
    config["trainer"]["learning_rate"] = {"class": "Exponential", "initial": .1, "multplier": .5}
    with pytest.raises(DataError, match="did you mean multiplier?"):
        build_trainer(config)


def test_what_a_file_cannot_hold_is_said_there_and_when_read(tmp_path):
    trainer = fit(
        tmp_path,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        policies=[Callback(checkpoint_saved=print)],
        max_epochs=1,
    )
    trainer.train_and_validate()
    config = read_run_config(tmp_path / "run")
    assert "only_in_python" in str(config["trainer"]["optimizer"]) and "Callback" in str(config["trainer"]["policies"])
    with pytest.raises(DataError, match="data|Sequential|Points"):
        check_run_config(config)
    config = {
        **config,
        "data": {"path": "x"},
        "model": {},
        "sampler": {"streamline_group_name": "s"},
        "loader": {"streamline_group_name": "s", "input_group_name": "i"},
    }
    config["trainer"].pop("class")
    with pytest.raises(DataError, match="trainer.optimizer was given in Python"):
        check_run_config(config)


MINE = """
from tractkit.models.base import register_model
from tractkit.models.learn2track import Learn2Track
from tractkit.training.trainer import TrainerOneInput

@register_model
class MyTrack(Learn2Track):
    pass

class MyTrainer(TrainerOneInput):
    def __init__(self, *args, greeting="hello", **kwargs):
        super().__init__(*args, **kwargs)
        self.greeting = greeting
"""


@pytest.mark.full
def test_classes_of_ones_own_come_from_a_file_that_is_named(data, tmp_path, capsys):
    (tmp_path / "mine_cli.py").write_text(MINE)
    argv = [
        *words(data, tmp_path, max_epochs=1),
        "--model",
        "MyTrack",
        "--set",
        "trainer.class=MyTrainer",
        "--set",
        "trainer.greeting=good morning",
    ]
    assert "'MyTrack' is no model of tractkit" in complaint(capsys, *argv)
    assert "no such Python file" in complaint(capsys, *argv, "--import", tmp_path / "yours.py")
    assert main([*argv, "--import", str(tmp_path / "mine_cli.py")]) == 0
    assert main(["resume", str(tmp_path / "run"), "--import", str(tmp_path / "mine_cli.py"), "--max-epochs", "2"]) == 0
    assert type(TrainerState.load(tmp_path / "run").model).__name__ == "MyTrack"


@pytest.mark.parametrize("source, problem", [
    ("import no_such_package", "line 2: No module named 'no_such_package'. Install the package that it needs, or "
                               "correct"),
    ("from json import nonsense", "line 2: cannot import name 'nonsense' from 'json'"),
    ("from tractkit.hooks import HOOKS", "line 2: tractkit.hooks.HOOKS is gone: write `from "
                                         "tractkit.training.callbacks"),
])
def test_a_file_whose_import_fails_is_named_in_one_line(whole, tmp_path, capsys, source, problem):
    file = tmp_path / "mine_fails.py"
    file.write_text(f"import os\n{source}\n")
    for _ in range(2):  # the file is not taken for imported the second time
        text = complaint(capsys, "resume", whole, "--import", file)
        assert text.startswith(f"tractkit: {file}: {problem}") and text.endswith("orrect the import")


def test_a_package_that_is_missing_is_named_in_one_line(whole, tmp_path, capsys, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    text = "tractkit: Weights & Biases needs the package wandb: pip install 'tractkit[wandb]', or leave out"
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None)
    assert complaint(capsys, "resume", tmp_path / "run", "--wandb", "offline", "--max-epochs", 4).startswith(text)


def test_help_lists_the_settings(capsys):
    for command in ("train", "resume"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        out = capsys.readouterr().out
        assert ended.value.code == 0
        for word in (
            "--max-epochs",
            "--new-max-epochs",
            "--batch-size-training",
            "--rnn-layer-sizes",
            "--SOS-token-type",
            "--noise-gaussian-size-forward",
            "--nproc-per-node",
            "--lazy",
        ):
            assert word in out, word


@pytest.mark.full
def test_several_processes_from_the_command_line(data, tmp_path):
    """Two gloo processes, interrupted as by Ctrl-C, gone on with: where one process ends, dropout off."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    same = dict(dropout=0, optimizer="SGD", max_epochs=30, checkpoint_every_batches=5)
    command = [sys.executable, "-m", "tractkit"]
    both = subprocess.Popen(
        [*command, *words(data, tmp_path, "two", **same), "--nproc-per-node", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )
    log, end = RunLog(tmp_path / "two"), time.monotonic() + 240
    while len(log.records("batch")) < 5 and time.monotonic() < end:
        time.sleep(0.01)
    both.send_signal(signal.SIGINT)
    assert main(words(data, tmp_path, "one", **same)) == 0
    out, err = both.communicate(timeout=240)
    assert both.returncode == 130, out + err
    again = err.strip().splitlines()[-1].split()
    assert again == ["tractkit", "resume", str(tmp_path / "two"), "--nproc-per-node", "2"]
    done = subprocess.run([*command, *again[1:]], capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0 and "Finished" in done.stdout, done.stdout + done.stderr
    a, b = (TrainerState.load(tmp_path / n) for n in ("one", "two"))
    assert a.global_step == b.global_step and json.dumps(a.finished) == json.dumps(b.finished)
    assert (
        max(float((x - y).abs().max()) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True)) < 1e-5
    )


@pytest.mark.parametrize(
    "argv, code",
    [
        (["train", "--help"], 0),
        (["resume", "--help"], 0),
        (["train", "x.hdf5", "--max-epoks", "3"], 2),
        (["train", "x.hdf5", "--max_epochs", "0"], 2),
    ],
)
def test_help_and_errors_of_arguments_load_no_torch(argv, code):
    program = ("import sys\nfrom tractkit.cli.commands import main\n"
               f"try:\n    code = main({argv})\nexcept SystemExit as e:\n    code = e.code\n"
               f"assert code == {code}, code\nassert 'torch' not in sys.modules")
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    if code == 0:
        assert (
            "--max-epochs X" in ended.stdout
            and "largest norm of the gradient" in ended.stdout
            and "--no-tensorboard" in ended.stdout
        )
    if argv[-1] == "0":
        assert "tractkit: trainer: max_epochs must be positive, not 0" in ended.stderr


def test_options_are_the_keywords_of_the_classes():
    from tractkit.cli.train import settings_of_part
    from tractkit.training.config import SECTIONS, keywords_of

    for section, (cls, *others) in SECTIONS.items():
        taken, options = keywords_of(cls), settings_of_part(section)
        if section == "model":  # of all of them; where several have one, it is the first's
            for other in others:
                taken = keywords_of(other) | taken
        if section != "trainer" or "max_epochs" in taken:  # a trainer may hand its keywords on
            assert set(taken) == set(options), section
            assert {k: p.default for k, p in taken.items() if p.default is not p.empty} == {
                k: s.default for k, s in options.items() if not s.required}, section


@pytest.mark.parametrize("nb_processes", [1, 2])
def test_runs_without_a_name_have_a_folder_each(data, tmp_path, monkeypatch, nb_processes):
    """Jobs of an array that begin in one second; none goes on with the run of another."""
    found = []

    def build(config, *args, **kwargs):
        t = config["trainer"]
        found.append(fit(t["experiments_path"], t.get("experiment_name")).folder)
        found[-1].mkdir(exist_ok=True)
        (found[-1] / "log.jsonl").touch()
        raise ValueError("enough")

    options = words(data, tmp_path) + ["--nproc-per-node", str(nb_processes)]
    at = options.index("--experiment_name")
    del options[at:at + 2]
    monkeypatch.setattr("tractkit.training.config.build_trainer", build)
    monkeypatch.setattr("tractkit.training.torchrun.launch", build)
    for _ in range(5):
        main(options)
    assert len(set(found)) == 5
