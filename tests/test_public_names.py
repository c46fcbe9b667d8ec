"""The names of `import tractkit`: few, in order, and a way from every name that was there before."""

import ast
import importlib
import pickle
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import tractkit
from tools.export import public_names
from tractkit._moved import RENAMED, import_line
from tractkit._names import NAMES

ROOT = Path(__file__).resolve().parent.parent
BEFORE = (ROOT / "tests" / "data" / "public_names_before.txt").read_text(encoding="utf-8").split()
FOUNDING = {  # what the texts that tractkit was founded on call by name, without the prefix DWIML
    "MultiSubjectDataset", "SubjectData", "MRIData", "SFTData", "BatchIDSampler", "BatchLoaderOneInput", "Trainer",
    "TrainerOneInput", "train_model", "TorchModel", "BatchIter", "Infinite", "load_by_random_id", "PyramidPooling",
    "Policy", "Exponential", "EarlyStopping", "load_latest", "load_best_val",
}
COMMON = {
    "take",
    "split",
    "fold",
    "unit",
    "sample",
    "smooth",
    "reverse",
    "normal",
    "uniform",
    "T",
    "Step",
    "Iterator",
    "Source",
    "Stage",
    "Plan",
    "Place",
    "Rows",
    "Split",
    "Lambda",
    "Reshape",
    "Threads",
    "main",
    "parser",
    "reading",
}
PAGES = sorted((ROOT / "nbs" / "tutorials").glob("*.ipynb")) + [ROOT / "nbs" / "index.ipynb"]


def test_there_are_at_most_120_each_once():
    assert len(tractkit.__all__) == len(set(tractkit.__all__)) <= 120


def test_founding_names_are_there():
    assert FOUNDING - set(tractkit.__all__) == set()


def test_words_too_common_to_own_are_not():
    assert COMMON & set(tractkit.__all__) == set()


def test_the_stub_has_them_in_the_same_order():
    stub = ast.parse((ROOT / "tractkit" / "__init__.pyi").read_text(encoding="utf-8"))
    assert [node.names[0].asname for node in stub.body if isinstance(node, ast.ImportFrom)] == tractkit.__all__
    assert public_names(ROOT / "tractkit" / "__init__.py") == tractkit.__all__


@pytest.mark.parametrize("name", BEFORE)
def test_a_name_of_before_is_there_or_says_where_it_is(name):
    if name in tractkit.__all__:
        assert getattr(tractkit, name) is getattr(importlib.import_module(f"tractkit.{NAMES[name]}"), name)
        return
    with pytest.raises(AttributeError) as error:
        getattr(tractkit, name)
    line = re.fullmatch(rf"tractkit\.{name} is not at the top level: write `(from \S+ import \w+)`", str(error.value))
    assert line, str(error.value)
    exec(line.group(1), {})
    assert error.value.__cause__ is None and error.value.__context__ is None


def test_renamed_names_are_names_of_before():
    assert set(RENAMED) <= set(BEFORE)


def test_a_name_that_never_was_names_the_nearest():
    with pytest.raises(AttributeError, match="has no attribute 'Tracter'; names like it: Tracker"):
        tractkit.Tracter  # noqa: B018
    with pytest.raises(AttributeError, match=r"has no attribute 'zzz'$"):
        tractkit.zzz  # noqa: B018
    with pytest.raises(AttributeError, match=r"has no attribute '_repr_html_'$"):
        tractkit._repr_html_  # noqa: B018
    assert import_line("zzz") is None


def test_completion_and_pickles_work():
    from IPython.core.completer import IPCompleter, provisionalcompleter

    with provisionalcompleter():
        found = {c.text for c in IPCompleter(namespace={"tk": tractkit}, use_jedi=False).completions("tk.", 3)}
    assert {f".{name}" for name in tractkit.__all__} <= found
    for value in (tractkit.Space.VOX, tractkit.Exponential(1.0, 0.5), tractkit.Trainer, tractkit.apply_affine):
        assert type(pickle.loads(pickle.dumps(value))) is type(value)


def used_names(source: str) -> set[str]:
    """The names that a page's code takes from the top level of tractkit."""
    code = "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))
    found: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in {"tk", "tractkit"}:
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module == "tractkit":
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_tutorials_and_readme_use_no_other_names(page):
    for cell in nbformat.read(page, as_version=4).cells:
        text = str(cell.source)
        if cell.cell_type == "code" and not text.startswith("%%"):
            assert used_names(text) - set(tractkit.__all__) == set(), cell.id
        assert set(re.findall(r"\btk\.([A-Za-z_]\w*)", text)) - set(tractkit.__all__) == set(), cell.id


def test_readme_names_are_at_the_top():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\btk\.([A-Za-z_]\w*)", text)) <= set(tractkit.__all__)


def test_nothing_is_loaded_by_asking_for_a_name_that_left():
    code = (
        "import sys, tractkit\ntry: tractkit.reverse\nexcept AttributeError: pass\nprint([m for m in sys.modules if "
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        "m.startswith('tractkit.')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert ast.literal_eval(out) == ["tractkit._names", "tractkit._moved"]
