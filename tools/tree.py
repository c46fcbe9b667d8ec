"""The files of this checkout, and a copy of them elsewhere: for checks that must not touch the original."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCES = {".git", "__pycache__", "build", "dist", "_docs"}
GENERATED = {".venv", "results", "runs"}  # at the root; `tractkit/runs` and `nbs/runs` are sources


def source_files(root: Path = ROOT) -> list[str]:
    """Every file git tracks, or would if it were added, relative to `root`; without git, a walk."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=root, capture_output=True, text=True,
    ) if (root / ".git").exists() else None
    if listing is not None and listing.returncode == 0:
        return sorted({name for name in listing.stdout.split("\0") if name and (root / name).is_file()})
    found = []
    for folder, folders, files in os.walk(root):
        left_out = NOT_SOURCES | (GENERATED if Path(folder) == root else set())
        folders[:] = [f for f in folders if f not in left_out and not f.endswith((".egg-info", "_cache"))]
        found += [(Path(folder) / f).relative_to(root).as_posix() for f in files]
    return sorted(found)


def copy_tree(destination: Path, root: Path = ROOT) -> Path:
    """Copy the source files of `root` to `destination`."""
    for name in source_files(root):
        target = destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target)
    return destination


def git_status(root: Path = ROOT) -> set[str]:
    """The lines of `git status`, ignored files left out; empty without git."""
    if not (root / ".git").exists():
        return set()
    status = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=all"], cwd=root, capture_output=True, text=True)
    return set(status.stdout.splitlines())
