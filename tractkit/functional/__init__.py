"""Train any model on any batches: batch iterators, `TorchModel`, `train_model`.

    from tractkit.functional import Infinite, TorchModel, load_by_random_id, train_model

Each name is imported from its module when it is first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tractkit._moved import answer_old_names

if TYPE_CHECKING:
    from tractkit.functional.batch_iter import BatchIter, Infinite, as_batch_iter
    from tractkit.functional.pipeline import ExpirationPool, Iterator, Loky, Threads
    from tractkit.functional.pipeline import combine_batches, combine_pad, combine_to_arrays
    from tractkit.functional.sources import Source, apply_at, item_key, load_by_random_id, multiply, random_apply
    from tractkit.functional.sources import sample, sample_args, unpack_args, zip_apply
    from tractkit.functional.steps import inference_step, multi_inference_step, train_step
    from tractkit.functional.torch_model import ConsoleLogger, ModelTrainer, TorchModel, train_model
    from tractkit.training.policy import EarlyStopping, Exponential, Policy

_NAMES = {
    "batch_iter": ("BatchIter", "Infinite", "as_batch_iter"),
    "pipeline": ("ExpirationPool", "Iterator", "Loky", "Threads", "combine_batches", "combine_pad",
                 "combine_to_arrays"),
    "sources": ("Source", "apply_at", "item_key", "load_by_random_id", "multiply", "random_apply", "sample",
                "sample_args", "unpack_args", "zip_apply"),
    "steps": ("inference_step", "multi_inference_step", "train_step"),
    "torch_model": ("ConsoleLogger", "ModelTrainer", "TorchModel", "train_model"),
}
_MODULE_OF = {name: f"tractkit.functional.{module}" for module, names in _NAMES.items() for name in names}
_MODULE_OF |= dict.fromkeys(("EarlyStopping", "Exponential", "Policy"), "tractkit.training.policy")
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Return a public name of the package, imported from its module."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    """Return the public names, for completion."""
    return sorted({*globals(), *__all__})


answer_old_names(__name__)  # those of the module that had the package's name
