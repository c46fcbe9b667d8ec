"""tractkit: train deep models that trace white-matter streamlines through diffusion MRI.

Every public name of every module is here, loaded when it is first used (PEP 562), so that
`import tractkit as tk` stays cheap: `tk.MultiSubjectDataset`, `tk.Trainer`, `tk.view`.
"""

from importlib import import_module as _import_module

from ._names import NAMES as _NAMES

__all__ = sorted(_NAMES)


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
