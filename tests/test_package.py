"""What a person gets who installs tractkit: a light import, a whole wheel, and no tool of ours at run time."""

import configparser
import importlib.metadata
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
import zipfile
from pathlib import Path

import pytest

from tools.tree import copy_tree

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "fury", "matplotlib", "dipy", "numba")
AUTHORING = ("nbdev", "fastcore", "execnb", "ghapi")  # what notebooks are written with; never needed to run


def python(code: str, **options) -> str:
    """What a fresh interpreter prints for `code`."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, **options).stdout


# ---- import --------------------------------------------------------------------------------------------------


def test_import_loads_nothing_heavy():
    loaded = python("import sys, tractkit as tk; dir(tk); tk.__all__; print(*sys.modules)").split()
    assert "tractkit" in loaded
    assert sorted(set(HEAVY) & set(loaded)) == []


def test_import_is_cheap():
    """The import adds less than 0.3 s: medians of 9 pairs, the bare interpreter beside each."""
    seconds: dict[str, list[float]] = {"pass": [], "import tractkit": []}
    for _ in range(9):
        for code, times in seconds.items():
            began = time.perf_counter()
            python(code)
            times.append(time.perf_counter() - began)
    bare, ours = (statistics.median(times) for times in seconds.values())
    assert ours - bare < 0.3, (
        f"import tractkit takes {ours:.2f} s, {ours / bare:.1f} times the bare interpreter's {bare:.2f} s"
    )


@pytest.mark.parametrize("taken", [False, True])
def test_compiled_code_has_a_place_where_nothing_can_be_written(tmp_path, taken):
    """os.access stands for a file system that is read-only, which root cannot be shown."""
    if taken:
        (tmp_path / f"tractkit-numba-{os.getuid()}").mkdir(mode=0o777)
        (tmp_path / f"tractkit-numba-{os.getuid()}").chmod(0o777)
    code = "import os; os.access = lambda *a: False; import tractkit; print(os.environ['NUMBA_CACHE_DIR'])"
    env = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=env | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    folder = Path(run.stdout.strip())
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    assert (folder.name != f"tractkit-numba-{os.getuid()}") == taken
    usual = subprocess.run(
        [sys.executable, "-c", "import os, tractkit; print('NUMBA_CACHE_DIR' in os.environ)"],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert usual.stdout.strip() == "False"


def test_no_import_silences_the_warnings_of_a_session():
    """FURY does, and DIPY imports FURY."""
    code = """
import importlib, pkgutil, warnings, tractkit
before = warnings.filters[:]
for module in pkgutil.walk_packages(tractkit.__path__, "tractkit."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
new = [f for f in warnings.filters if f not in before]
print([f for f in new if f[0] == "ignore" and f[1] is f[3] is None and f[2] in (Warning, UserWarning)])
"""
    assert python(code) == "[]\n"


def test_unknown_name_says_so():
    import tractkit

    with pytest.raises(AttributeError, match="has no attribute 'no_such_thing'"):
        tractkit.no_such_thing  # noqa: B018


# ---- pins ----------------------------------------------------------------------------------------------------


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_pin_no_cuda_and_no_torchvision():
    assert [name for name in pins() if re.match(r"nvidia|cuda|triton|torchvision|torchaudio", normal(name))] == []


def test_pins_can_be_installed_on_the_oldest_python_we_promise():
    """Debian 12 has Python 3.11.2: a pin that asks for a later 3.11 would break every first command there."""
    from packaging.specifiers import SpecifierSet

    refuse = []
    for name, version in pins().items():
        try:
            metadata = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:  # pinned, and not installed in this environment
            continue
        if metadata["Version"].split("+")[0] == version:
            python_versions = metadata.get("Requires-Python") or ""
            if not SpecifierSet(python_versions).contains("3.11.0"):
                refuse.append(f"{name}=={version} needs Python {python_versions}")
    assert refuse == []


def test_nothing_installs_torchvision():
    words = ("settings.ini", "pyproject.toml", "Makefile", "tools/setup.sh", "setup.py")
    assert [f for f in words if "torchvision" in (ROOT / f).read_text(encoding="utf-8")] == []


def test_constraints_cover_every_requirement():
    """Each package that the runtime and the extra `dev` need, at any depth, has its exact version."""
    from packaging.requirements import Requirement

    pinned = {normal(name) for name in pins()}
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    ours = [word for key in ("requirements", "dev_requirements") for word in shlex.split(settings["DEFAULT"][key])]
    todo, missing, seen = [("tractkit", frozenset())], set(), set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            needed = ours if name == "tractkit" else importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # pinned, and not installed in this environment
            continue
        for text in needed:
            requirement = Requirement(text)
            if requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in extras | {""}):
                continue
            if normal(requirement.name) not in pinned:
                missing.add(f"{requirement.name} (for {name})")
            else:
                todo.append((requirement.name, frozenset(requirement.extras)))
    assert sorted(missing) == []


# ---- wheel and sdist -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> dict[str, Path]:
    """The sdist of this tree, and the wheel built from that sdist, by the pinned setuptools and without a network."""
    tree = copy_tree(tmp_path_factory.mktemp("tree"))
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return {"sdist": next(out.glob("*.tar.gz")), "wheel": next(out.glob("*.whl"))}


def package_files() -> set[str]:
    """Every file of the package in the tree, as the wheel should hold it."""
    found = (p.relative_to(ROOT).as_posix() for p in (ROOT / "tractkit").rglob("*") if p.is_file())
    return {f for f in found if "__pycache__" not in f and ".ipynb_checkpoints" not in f}


def test_wheel_holds_the_whole_package(built):
    names = {n for n in zipfile.ZipFile(built["wheel"]).namelist() if ".dist-info/" not in n}
    assert names == package_files()
    assert {"tractkit/py.typed", "tractkit/__init__.pyi", "tractkit/models/__init__.py"} <= names
    tutorials = {f"tractkit/tutorials/{p.name}" for p in (ROOT / "nbs" / "tutorials").glob("*.ipynb")}
    assert {n for n in names if n.endswith(".ipynb")} == tutorials
    assert {n.rpartition(".")[2] for n in names} >= {"js", "css"}, "what the browser draws the panel with"


def test_wheel_metadata_is_that_of_settings(built):
    wheel = zipfile.ZipFile(built["wheel"])
    metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    entry_points = wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode()
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    assert f"Version: {re.search(r'^version = (.*)', settings, re.M)[1]}" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata and "torchvision" not in metadata
    assert "Requires-Dist: fury<3,>=2.0" in metadata
    assert "tractkit = tractkit.cli.commands:main" in entry_points
    assert any(n.endswith("licenses/LICENSE") for n in wheel.namelist())


def test_sdist_holds_what_it_takes_to_build(built):
    names = {n.partition("/")[2] for n in tarfile.open(built["sdist"]).getnames()}
    assert {
        "setup.py",
        "settings.ini",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "constraints.txt",
    } <= names
    assert package_files() <= names


# ---- a person's environment, without our tools ---------------------------------------------------------------

BLOCKER = """
import sys


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(
                f"No module named {{name!r}} (blocked: a person's environment has it not)", name=name)


sys.meta_path.insert(0, NotInstalled())
"""


def make_environment(folder: Path, wheel: Path, blocked: tuple[str, ...]) -> Path:
    """An empty venv with the wheel in it, and the dependencies of this interpreter save the `blocked` ones.

    The dependencies are lent by a .pth line, not downloaded again. The lending interpreter's editable tractkit does
    not come along, since a .pth file inside a lent folder is not read."""
    venv.create(folder, with_pip=False, symlinks=True)
    interpreter = folder / "bin" / "python"
    site = Path(subprocess.run([interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                               check=True, capture_output=True, text=True).stdout.strip())
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--python", str(interpreter), "install", "--no-deps",
                    "--no-index", str(wheel)], check=True)
    (site / "blocker.py").write_text(BLOCKER.format(blocked=blocked))
    (site / "a_blocker.pth").write_text("import blocker\n")
    (site / "lent.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder / "bin"


@pytest.fixture(scope="session")
def installed(built, tmp_path_factory) -> Path:
    """The bin folder of an environment as after `pip install tractkit[lab]`: no nbdev, no fastcore."""
    return make_environment(tmp_path_factory.mktemp("installed"), built["wheel"], AUTHORING)


def run_installed(bin_folder: Path, *command: str, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(
        [bin_folder / command[0], *command[1:]], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-1500:]}\n{done.stderr[-2500:]}"
    return done.stdout


@pytest.mark.full
def test_installed_package_needs_none_of_our_tools(installed, tmp_path):
    code = f"""
import importlib, pkgutil, tractkit
for tool in {AUTHORING!r}:
    try: importlib.import_module(tool)
    except ModuleNotFoundError: pass
    else: raise SystemExit(f"{{tool}} can be imported: this test would prove nothing")
modules = [m.name for m in pkgutil.walk_packages(tractkit.__path__, "tractkit.") if not m.name.endswith("__main__")]
for module in modules: importlib.import_module(module)
for name in tractkit.__all__: getattr(tractkit, name)
print(tractkit.__file__, len(modules), tractkit.__version__)
"""
    where, count, version = run_installed(installed, "python", "-c", code, cwd=tmp_path).split()
    assert str(installed.parent) in where and str(ROOT) not in where
    assert int(count) == sum(1 for f in package_files() if f.endswith(".py")) - 2  # the package itself and __main__
    assert f"version = {version}\n" in (ROOT / "settings.ini").read_text(encoding="utf-8")


@pytest.mark.full
@pytest.mark.parametrize("command", [["tractkit"], ["python", "-m", "tractkit"]], ids=" ".join)
def test_installed_command_runs(installed, tmp_path, command):
    assert "demo" in run_installed(installed, *command, "--help", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
def test_installed_panel_has_its_styles_and_scripts(installed, tmp_path):
    code = """
import tractkit as tk
from tractkit.lab.readout import Readout
from tractkit.lab.run_browser import RunBrowser
readout = Readout()
print(len(str(readout._esm)) > 500, len(str(readout._css)) > 100, tk.TrainerPanel.__name__)
"""
    assert run_installed(installed, "python", "-c", code, cwd=tmp_path) == "True True TrainerPanel\n"


@pytest.mark.full
def test_installed_demo_runs(installed, tmp_path):
    run_installed(installed, "tractkit", "demo", "--quick", "--epochs", "1", "--no-html", "--out", "out", cwd=tmp_path)
    assert {"scores.txt", "panel.png", "streamlines.png"} <= {p.name for p in (tmp_path / "out").iterdir()}


# ---- the set-up ----------------------------------------------------------------------------------------------


def test_setup_refuses_an_old_python_and_says_what_to_do(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\ncase "$*" in *version_info*) exit 1;; --version) echo Python 3.9.2;; esac\n')
    old.chmod(0o755)
    done = subprocess.run(["bash", "tools/setup.sh", "docs"], cwd=tree, capture_output=True, text=True,
                          env={**os.environ, "PYTHON": str(old)})
    assert done.returncode == 1
    assert "Python 3.9.2 is too old: tractkit needs 3.11 or newer. Try: make docs PYTHON=" in done.stderr
    assert not (tree / ".venv").exists()


@pytest.fixture
def bare_machine(tmp_path):
    """Run tools/setup.sh in a copy of the tree on a pretended machine: only basic programs, no Vulkan driver, no
    chromium, no Python (so that it ends at the second phase), and the programs given as scripts."""

    def run(target: str, **scripts: str) -> subprocess.CompletedProcess:
        tree, programs = copy_tree(tmp_path / "tree"), tmp_path / "bin"
        programs.mkdir()
        for name in ("bash", "cat", "cksum", "dirname", "sed", "mkdir", "tail", "mktemp", "rm", "grep", "env"):
            (programs / name).symlink_to(shutil.which(name))
        for name, body in {"uname": "echo Linux", "id": "echo 1000", "ls": "exit 1", **scripts}.items():
            (programs / name.replace("_", "-")).write_text(f"#!{shutil.which('bash')}\n{body}\n")
            (programs / name.replace("_", "-")).chmod(0o755)
        return subprocess.run(["bash", "tools/setup.sh", target], cwd=tree, capture_output=True, text=True,
                              env={"PATH": str(programs), "HOME": str(tmp_path), "PYTHON": "no-such-python"})

    return run


RECORD = 'echo "$DEBIAN_FRONTEND $*" >> "$HOME/apt"'


def test_setup_without_apt_says_what_to_install_and_goes_on(bare_machine):
    done = bare_machine("test")
    for what in ("apt-get install mesa-vulkan-drivers", "VK_DRIVER_FILES", "apt-get install chromium", "on your PATH"):
        assert what in done.stdout
    assert "set-up 2/4" in done.stdout and "no-such-python is not there" in done.stderr


def test_setup_without_root_does_not_try_apt(bare_machine, tmp_path):
    done = bare_machine("demo", apt_get=RECORD, sudo="exit 1")
    assert not (tmp_path / "apt").exists()
    assert "without root" in done.stdout and "set-up 2/4" in done.stdout


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ("demo", "mesa-vulkan-drivers python3-venv"),
        ("test", "mesa-vulkan-drivers chromium python3-venv"),
        ("docs", "python3-venv"),
    ],
)
def test_setup_as_root_installs_what_the_target_needs(bare_machine, tmp_path, target, wanted):
    done = bare_machine(target, apt_get=RECORD, id="echo 0")
    update, install = (tmp_path / "apt").read_text().splitlines()
    assert update.split() == ["update"]
    assert install == f"noninteractive install -y --no-install-recommends {wanted}"
    assert "without root" not in done.stdout


def test_setup_with_sudo_uses_it(bare_machine, tmp_path):
    bare_machine("demo", apt_get=RECORD, sudo='unset DEBIAN_FRONTEND; shift; [ "$1" = true ] || exec "$@"')
    assert "noninteractive install -y --no-install-recommends mesa-vulkan-drivers" in (tmp_path / "apt").read_text()


def test_setup_goes_on_when_apt_fails(bare_machine):
    done = bare_machine("demo", apt_get="echo 'E: Could not resolve deb.debian.org' >&2; exit 100", id="echo 0")
    assert "apt-get could not, and said:\n    E: Could not resolve deb.debian.org" in done.stdout
    assert "without root" in done.stdout and "set-up 2/4" in done.stdout
