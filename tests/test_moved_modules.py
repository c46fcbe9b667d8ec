"""The modules that tractkit had before its packages: scripts, model files and pickles of then still work.

`tests/data/before_redraw/objects.pkl.gz` was written by the version before (make_objects.py beside it), and so was the
text of
MODEL_FILE, by `write_module`."""

import gzip
import importlib
import io
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import make_file

import tractkit as tk
from tractkit._before import MODULES
from tractkit._moved import RENAMED, import_line
from tractkit._names import NAMES
from tractkit.cli.commands import main
from tractkit.training.config import import_file, read_run_config

DATA = Path(__file__).resolve().parent / "data"
BEFORE = (DATA / "public_names_before.txt").read_text(encoding="utf-8").split()
KEPT = {"models.base", "models.blocks", "models.layers", "models.learn2track"}  # modules of the same name today
PACKAGES = {name for name in MODULES if (Path(tk.__file__).parent / name).is_dir()}
OBJECTS: dict[str, bytes] = pickle.loads(gzip.decompress((DATA / "before_redraw" / "objects.pkl.gz").read_bytes()))
MODEL_FILE = '''# Written by write_module of tractkit, from the cells of a notebook.
from tractkit.models.learn2track import Learn2Track
from tractkit.models.base import register_model
from tractkit.models.directions import point_directions
from tractkit.trainer import TrainerOneInput
from tractkit.policy import Constant



@register_model
class SlowTrack(Learn2Track):
    """A model of one's own."""

    def compute_loss(self, outputs, targets, average_results=True):
        point_directions  # of a module that has another name now
        return super().compute_loss(outputs, targets, average_results)

class SlowTrainer(TrainerOneInput):
    def __init__(self, *args, learning_rate=0.1, **kwargs):
        super().__init__(*args, learning_rate=Constant(float(learning_rate)), **kwargs)
'''


def forget() -> None:
    """Undo every import from an old module, so that the next one warns again."""
    for name, names in MODULES.items():
        parent, _, last = f"tractkit.{name}".rpartition(".")
        if name in PACKAGES:
            for old in names.split():
                vars(importlib.import_module(f"tractkit.{name}")).pop(old, None)
        elif sys.modules.pop(f"tractkit.{name}", None) is not None:
            delattr(sys.modules[parent], last)


@pytest.fixture(autouse=True)
def fresh():
    forget()
    yield
    forget()


def python(code: str) -> str:
    """What a fresh interpreter prints for `code`."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


# ---- names ---------------------------------------------------------------------------------------------------


def test_every_name_of_before_is_in_a_module_of_before():
    """Or in one that has its name today."""
    listed = [name for names in MODULES.values() for name in names.split()]
    kept = {name for name in BEFORE if NAMES.get(name) in KEPT}
    assert sorted(listed) == sorted(set(BEFORE) - kept)
    assert set(MODULES) & set(NAMES.values()) == set(), "a module that is there is not gone"
    assert set(MODULES) & set(NAMES) == set(), "importing it would hide a public name"


@pytest.mark.parametrize("module", MODULES)
def test_a_name_is_imported_from_its_old_module_or_has_a_new_line(module):
    for name in MODULES[module].split():
        line = f"from tractkit.{module} import {name}"
        if name not in NAMES:
            with pytest.raises(ImportError) as error:
                exec(line, {})
            assert str(error.value) == f"tractkit.{module}.{name} is gone: write `{RENAMED[name]}`"
            continue
        found: dict = {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            exec(line, found)
            exec(line, found)
        assert found[name] is getattr(importlib.import_module(f"tractkit.{NAMES[name]}"), name)
        ours = [w for w in caught if issubclass(w.category, DeprecationWarning) and "has moved" in str(w.message)]
        if module == "functional" and name in importlib.import_module("tractkit.functional")._MODULE_OF:
            assert ours == [], "a name that today's package has itself"
            continue
        assert len(ours) == 1, "one warning for a name, not one for each import"
        assert str(ours[0].message) == f"tractkit.{module}.{name} has moved: write `{import_line(name)}`"
        assert ours[0].filename == "<string>", "it points to the line of the import"


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.filterwarnings("ignore:.*has moved:DeprecationWarning")
def test_star_import(module):
    found: dict = {}
    exec(f"from tractkit.{module} import *", found)
    assert {name for name in MODULES[module].split() if name in NAMES} <= set(found)


def test_a_name_that_an_old_module_had_for_itself_says_where_its_parts_are():
    old = importlib.import_module("tractkit.trainer")
    parts = "its parts are in tractkit.training.resume, tractkit.training.trainer"
    with pytest.raises(AttributeError, match=rf"^tractkit.trainer has no '_scale': the module is gone; {parts}$"):
        old._scale  # noqa: B018
    with pytest.raises(ImportError, match=rf"^cannot import name '_scale' from 'tractkit.trainer' \(<gone; "
                                          rf"{parts}>\)$"):
        exec("from tractkit.trainer import _scale")
    with pytest.raises(AttributeError, match="write `from tractkit.runs.checkpoint import Checkpoints`"):
        old.Checkpoints  # noqa: B018
    assert not hasattr(old, "__wrapped__") and not hasattr(old, "__path__")


def test_a_package_of_today_answers_as_before_for_other_names():
    for name in sorted(PACKAGES):
        with pytest.raises(AttributeError, match=rf"^module 'tractkit\.{name}' has no attribute 'zzz'$"):
            importlib.import_module(f"tractkit.{name}").zzz  # noqa: B018


@pytest.mark.parametrize("name", ["tractkit.nonsense", "tractkit.models.nonsense", "tractkit.trainer.nonsense"])
def test_a_module_that_never_was_is_not_found(name):
    with pytest.raises(ModuleNotFoundError) as error:
        importlib.import_module(name)
    assert error.value.name == name


def test_real_modules_win_and_warn_of_nothing():
    code = """
import importlib, sys, warnings
warnings.filterwarnings("error", ".*has moved", DeprecationWarning)
import tractkit
from tractkit._before import MODULES
from tractkit._moved import OldModules
finders = [f for f in sys.meta_path if type(f) is OldModules]
assert len(finders) == 1 and sys.meta_path[-1] is finders[0]
for name in ("training.trainer", "runs.checkpoint", "hdf5.create", "functional.torch_model", "demo.settings", "dwi.sh"):
    importlib.import_module(f"tractkit.{name}")
from tractkit.functional import TorchModel
from tractkit.hdf5 import create
print([m for m in sys.modules if m.removeprefix("tractkit.") in MODULES and not hasattr(sys.modules[m], "__path__")])
"""
    assert python(code) == "[]\n"


def test_a_script_is_shown_the_new_line():
    code = "from tractkit.keyed import fold; print(fold.__module__)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout == "tractkit.core.rng\n"
    assert "DeprecationWarning: tractkit.keyed.fold has moved: write `from tractkit.core.rng import fold`" in run.stderr


# ---- files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def model_file(tmp_path) -> Path:
    path = tmp_path / "old_models.py"
    path.write_text(MODEL_FILE, encoding="utf-8")
    yield path
    sys.modules.pop(path.stem, None)


@pytest.mark.filterwarnings("ignore:.*has moved:DeprecationWarning")
def test_a_file_that_write_module_wrote_is_imported(model_file):
    module = import_file(model_file)
    assert issubclass(module.SlowTrack, tk.Learn2Track) and issubclass(module.SlowTrainer, tk.TrainerOneInput)
    assert module.Constant is tk.Constant


@pytest.mark.filterwarnings("ignore:.*has moved:DeprecationWarning")
def test_resume_imports_such_a_file(model_file, tmp_path, capsys):
    data = make_file(tmp_path, n=16, points=(4, 30))[0]
    options = ["--import", str(model_file), "--no-progress"]
    assert main(["train", str(data), "--input-group-name", "input", "--streamline-group-name", "streamlines",
                 "--experiments-path", str(tmp_path), "--experiment-name", "run", "--max-epochs", "1",
                 "--batch-size-training", "8", "--rnn-layer-sizes", "3", "--device", "cpu", "--num-threads", "1",
                 "--model", "SlowTrack", "--set", "trainer.class=SlowTrainer", *options]) == 0
    forget()
    sys.modules.pop(model_file.stem)
    assert main(["resume", str(tmp_path / "run"), "--max-epochs", "2", *options]) == 0
    assert tk.TrainerState.load(tmp_path / "run").epoch == 2
    assert read_run_config(tmp_path / "run")["trainer"]["class"] == "SlowTrainer"


# ---- pickles -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*has moved:DeprecationWarning")
def test_old_pickles_load():
    old = {name: pickle.loads(data) for name, data in OBJECTS.items() if name in NAMES and name != "Learn2Track"}
    for name, value in old.items():
        assert value is getattr(tk, name) or type(value) is getattr(tk, name), name
    assert np.array_equal(old["Volume"].data, np.arange(8, dtype=np.float32).reshape(2, 2, 2))
    assert np.array_equal(old["Volume"].affine, np.diag([2.0, 2.0, 2.0, 1.0]))
    assert [len(line) for line in old["Streamlines"]] == [2, 3] and old["Streamlines"].points[1].tolist() == [3, 4, 5]
    assert old["PhantomSettings"] == tk.PhantomSettings(snr=7)
    assert repr(old["Constant"]) == repr(tk.Constant(0.5)) and repr(old["Exponential"]) == repr(
        tk.Exponential(1.0, 0.5)
    )
    assert old["Space"] is tk.Space.VOX


@pytest.mark.filterwarnings("ignore:.*has moved:DeprecationWarning")
def test_an_old_torch_save_of_a_model_loads_and_computes_the_same():
    model = torch.load(io.BytesIO(OBJECTS["Learn2Track"]), weights_only=False)
    assert type(model) is tk.Learn2Track and type(model.direction_getter) is tk.CosineRegression
    step, _ = model.eval().step(torch.ones(1, 2), torch.tensor([[1.0, 0.0, 0.0]]), model.init_state(1))
    expected = np.frombuffer(OBJECTS["a step of it"], np.float32)
    np.testing.assert_allclose(step.detach().numpy().ravel(), expected, rtol=1e-5)
    new = tk.Learn2Track(2, rnn_layer_sizes=[3], dropout=0.1, dg_dropout=0.1)
    assert [vars(a).keys() for a in model.modules()] == [vars(b).keys() for b in new.modules()]
