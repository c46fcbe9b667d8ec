"""tractkit: train deep models that trace white-matter streamlines through diffusion MRI.

Every public name of every module is here, loaded when it is first used (PEP 562), so that
`import tractkit as tk` stays cheap: `tk.MultiSubjectDataset`, `tk.Trainer`, `tk.view`.
"""

import os as _os
from importlib import import_module as _import_module

from ._names import NAMES as _NAMES

__all__ = sorted(_NAMES)


def _can_write(folder: str) -> bool:
    """Whether `folder` can be written, or made."""
    while not _os.path.exists(folder) and folder != _os.path.dirname(folder):
        folder = _os.path.dirname(folder)
    return _os.access(folder, _os.W_OK)


def _give_numba_a_place() -> None:
    """numba keeps compiled functions beside the package or in the user's cache folder, and fails if it can write
    neither (a container with a foreign user id): then they go to a folder of this user's own in the temporary one."""
    caches = _os.environ.get("XDG_CACHE_HOME") or _os.path.expanduser("~/.cache")
    if "NUMBA_CACHE_DIR" in _os.environ or _can_write(_os.path.dirname(__file__)) or _can_write(_os.path.abspath(caches)):
        return
    import tempfile as _tempfile

    folder = _os.path.join(_tempfile.gettempdir(), f"tractkit-numba-{_os.getuid() if hasattr(_os, 'getuid') else ''}")
    _os.makedirs(folder, mode=0o700, exist_ok=True)
    found = _os.lstat(folder)
    if hasattr(_os, "getuid") and (found.st_uid != _os.getuid() or found.st_mode & 0o777 != 0o700):
        folder = _tempfile.mkdtemp(prefix="tractkit-numba-")  # somebody else made it: what lies there may not be run
    _os.environ["NUMBA_CACHE_DIR"] = folder


_give_numba_a_place()


def __getattr__(name: str):
    if name == "__version__":
        from importlib.metadata import version

        return version("tractkit")
    module = _NAMES.get(name)
    if module is None:
        raise AttributeError(f"module 'tractkit' has no attribute {name!r}")
    value = getattr(_import_module(f"tractkit.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
