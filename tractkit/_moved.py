"""What `tractkit.name` answers for a name that is not at the top, or not any more: the line that imports it."""

from ._names import NAMES

# Names of the top level of version 0.1 that have another name now: the line that imports what took their place.
RENAMED: dict[str, str] = {
    "TrainerSettings": "from tractkit.training.trainer import Trainer",
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
