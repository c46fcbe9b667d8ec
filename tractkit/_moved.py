"""Where names of before are now: the line that imports each, and the modules that tractkit had before its packages.

Scripts and model files written then import from modules that are gone (`from tractkit.trainer import Trainer`),
and pickles name them. `OldModules` makes such a module when it is imported; its names are loaded from where they are
now."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

from ._names import NAMES

TYPE_CHECKING = False  # that of typing, without importing it
if TYPE_CHECKING:
    from importlib.abc import Loader
else:  # importlib.abc takes thirty times as long to import as all of this

    class Loader: ...

# Names of the top level of version 0.1 that have another name now, or left:
# the line that imports what took their place.
RENAMED: dict[str, str] = {
    "CometView": "from tractkit.runs.comet import CometLogger",
    "FileView": "from tractkit.runs.loggers import FileLogger",
    "FROM_WHEN": "from tractkit.training.live_settings import LIVE",
    "HOOKS": "from tractkit.training.callbacks import Event",
    "Post": "from tractkit.runs.mailbox import Mailbox",
    "TrainerSettings": "from tractkit.training.settings import TrainerSettings",
    "TrainerSnags": "from tractkit.training.errors import OutOfMemory",
    "TrainerSteps": "from tractkit.training.trainer import Trainer",
    "VERBS": "from tractkit.training.commands import COMMANDS",
    "best_device": "from tractkit.training.trainer import Trainer",
    "config_mark": "from tractkit.training.resume import describe_settings",
    "config_of_words": "from tractkit.cli.train import config_of_options",
    "describe_trainer": "from tractkit.lab.status_text import describe_status",
    "encode_event": "from tractkit.runs.tensorboard import write_tensorboard",
    "in_words": "from tractkit.training.serialize import as_plain_value",
    "kept_checkpoints": "from tractkit.lab.status_text import checkpoint_labels",
    "make_views": "from tractkit.runs.loggers import make_loggers",
    "masked_crc32c": "from tractkit.runs.tensorboard import write_tensorboard",
    "note_changes": "from tractkit.training.live_settings import LiveSettings",
    "possible_verbs": "from tractkit.lab.status_text import possible_commands",
    "read_value": "from tractkit.training.config import read_run_config",
    "settings_code": "from tractkit.lab.settings_code import code_of_settings",
    "show_trainers_as_panels": "from tractkit.lab.panel import panel_of",
    "take_over": "from tractkit.training.live_settings import LiveSettings",
    "thinned": "from tractkit.lab.live_curves import thin_curve",
    "torchrun_words": "from tractkit.training.torchrun import torchrun_arguments",
    "value_from_words": "from tractkit.training.serialize import value_policy_from_plain",
}


def import_line(name: str) -> str | None:
    """Return the line that imports `name`, or what it is called now; None for a name that never was public."""
    if name in NAMES:
        return f"from tractkit.{NAMES[name]} import {name}"
    return RENAMED.get(name)


def explain(name: str) -> str:
    """Return the message of the AttributeError for `tractkit.name`."""
    line = import_line(name)
    if line is not None:
        return f"tractkit.{name} is not at the top level: write `{line}`"
    message = f"module 'tractkit' has no attribute {name!r}"
    if name.startswith("_"):  # asked by IPython, pickle and inspect, for every module
        return message
    from difflib import get_close_matches

    near = get_close_matches(name, [*NAMES, *RENAMED], n=3, cutoff=0.75)
    lines = [import_line(n) for n in near]
    return message + (f"; names like it: {', '.join(near)} ({'; '.join(filter(None, lines))})" if near else "")


# ---- modules of before ---------------------------------------------------------------------------------------


class OldModules(Loader):
    """The finder and loader of modules that are gone; it comes last in `sys.meta_path`, so that real modules win."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Return the spec of a module that is gone; None for any other name."""
        if not fullname.startswith("tractkit.") or fullname.startswith("tractkit._"):
            return None
        from ._before import MODULES

        return ModuleSpec(fullname, self) if fullname.removeprefix("tractkit.") in MODULES else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave it to Python to make the module."""

    def exec_module(self, module: ModuleType) -> None:
        """Let the module answer to its old names; `cannot import name …` ends in where its parts are."""
        answer_old_names(module.__name__)
        parts = modules_now(module.__name__)
        module.__file__ = f"<gone; its parts are in {', '.join(parts)}>" if parts else "<gone>"


def modules_now(module: str) -> list[str]:
    """Return the modules that have the public names of an old module now."""
    from ._before import MODULES

    lines = map(import_line, MODULES[module.removeprefix("tractkit.")].split())
    return sorted({line.split()[1] for line in lines if line})


def answer_old_names(module: str) -> None:
    """Give a module, or a package of today, the public names of the old module of that name; each warns once."""
    from ._before import MODULES

    namespace = vars(sys.modules[module])
    own, names = namespace.get("__getattr__"), namespace.get("__all__", [])
    old = [name for name in MODULES[module.removeprefix("tractkit.")].split() if name not in names]

    def load(name: str) -> object:
        """Return an old name from where it is now, or raise the error that says where to look."""
        line = import_line(name)
        if name not in old or line is None:
            if own is not None:
                return own(name)
            raise AttributeError(_no_such_name(module, name), name=name)
        if name not in NAMES:  # an AttributeError would be lost in `from … import`
            raise ImportError(f"{module}.{name} is gone: write `{line}`", name=module)
        import warnings

        warnings.warn(f"{module}.{name} has moved: write `{line}`", DeprecationWarning, stacklevel=2)
        namespace[name] = getattr(import_module(f"tractkit.{NAMES[name]}"), name)
        return namespace[name]

    namespace["__getattr__"] = load
    namespace["__all__"] = sorted([*names, *(name for name in old if name in NAMES)])


def _no_such_name(module: str, name: str) -> str:
    """Return the message of the AttributeError for a name that the old module had not, or had for itself only."""
    if "__path__" in vars(sys.modules[module]) or name.startswith("__"):
        return f"module {module!r} has no attribute {name!r}"
    parts, line = modules_now(module), import_line(name)
    found = f"its parts are in {', '.join(parts)}" if parts else "nothing of it is public"
    where = f"write `{line}`" if line else found
    return f"{module} has no {name!r}: the module is gone; {where}"
