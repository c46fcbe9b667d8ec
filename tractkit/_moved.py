"""What `tractkit.name` answers for a name that is not at the top, or not any more: the line that imports it."""

from ._names import NAMES

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
