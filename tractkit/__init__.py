"""tractkit: train deep models that trace white-matter streamlines through diffusion MRI.

`import tractkit as tk` is cheap: each name below is loaded from its module when it is first used (PEP 562). The names
are those that a notebook or script of yours needs, in the order in which you meet them. Everything else is imported
from its module, as in `from tractkit.runs.checkpoint import Checkpoints`.
"""

import os as _os
import sys as _sys
from importlib import import_module as _import_module

from ._moved import OldModules as _OldModules
from ._names import NAMES as _NAMES

# By hand, at most 120 (tests/test_public_names.py). tools/export.py writes __init__.pyi from it.
__all__ = [
    # a subject
    "data_folder", "sample_subjects", "make_phantom", "PhantomSettings", "Volume", "Streamlines", "Tractogram",
    "Space", "Origin", "apply_affine", "load_dwi", "DWI", "compute_sh", "load_sh", "compute_fodf", "fodf_peaks",
    "prepare_subject", "check_space",
    # seen
    "view", "snapshot", "link_views", "Slices", "Lines", "Contour", "Glyphs", "Peaks", "Coloring", "Still", "Picture",
    "plot_streamlines", "plot_comparison", "plot_signal_and_fodf",
    # in a data file
    "create_hdf5", "add_subject", "validate_hdf5", "describe_hdf5", "extract_hdf5", "DataError",
    # from the file to a batch
    "MultiSubjectDataset", "SubjectData", "MRIData", "SFTData", "BatchIDSampler", "StreamlineBatch",
    "StreamlinesBatchLoader", "BatchLoaderOneInput", "BatchLoaderSeveralInputs", "Neighborhood",
    "resample_step", "resample_nb_points", "segment_directions",
    # a model
    "Learn2Track", "TractographyModel", "StackedRNN", "KeyedDropout", "CosineRegression", "point_directions",
    "previous_directions", "initialize_weights", "register_model", "build_model", "save_model", "load_model",
    # trained
    "Trainer", "TrainerOneInput", "TrainerState", "Callback", "OnNonFinite", "TorchSchedule", "attach", "launch",
    "write_module",
    # watched
    "TrainerPanel", "Preview", "RunBrowser",
    # its runs
    "RunLog", "find_runs", "read_run", "read_runs", "plot_losses", "plot_runs", "plot_correlation", "write_csv",
    "export_comet", "upload_comet", "load_latest", "load_best_val", "load_weights", "read_weights",
    # tracking, and how good it is
    "prepare_input", "dilate_mask", "seeds_from_mask", "Tracker", "GroundTruth", "score_tractogram", "score_table",
    "classify_streamlines", "compare_tractograms", "density_map", "track_dipy", "track_oracle",
    "previous_direction_loss",
    # any model on any batches
    "train_model", "TorchModel", "Infinite", "BatchIter", "load_by_random_id", "PyramidPooling",
    "Policy", "Constant", "Exponential", "Schedule", "Switch", "DecreasingOnPlateau", "EarlyStopping", "LossStop",
    # the whole way in one call
    "run_demo", "open_demo", "SubjectFiles", "check_subject",
]


def _can_write(folder: str) -> bool:
    """Whether `folder` can be written, or made."""
    while not _os.path.exists(folder) and folder != _os.path.dirname(folder):
        folder = _os.path.dirname(folder)
    return _os.access(folder, _os.W_OK)


def _give_numba_a_place() -> None:
    """Give numba a private temporary folder for compiled functions where it can write no other.

    It keeps them beside the package or in the user's cache folder, and fails if it can write neither, as in a
    container with a foreign user id."""
    caches = _os.environ.get("XDG_CACHE_HOME") or _os.path.expanduser("~/.cache")
    beside = _os.path.dirname(__file__)
    known = not caches.startswith("~")  # else there is no home folder, and it would be made here
    if "NUMBA_CACHE_DIR" in _os.environ or _can_write(beside) or (known and _can_write(_os.path.abspath(caches))):
        return
    import tempfile as _tempfile

    user = _os.getuid() if hasattr(_os, "getuid") else ""
    folder = _os.path.join(_tempfile.gettempdir(), f"tractkit-numba-{user}")
    _os.makedirs(folder, mode=0o700, exist_ok=True)
    found = _os.lstat(folder)
    if user != "" and (found.st_uid != user or found.st_mode & 0o777 != 0o700):
        folder = _tempfile.mkdtemp(prefix="tractkit-numba-")  # somebody else made it: do not run what lies there
    _os.environ["NUMBA_CACHE_DIR"] = folder


def _show_trainers_as_panels() -> None:
    """In a notebook, show the panel of a trainer that is a cell's last value. The panel is imported at the first one.

    IPython is not imported for it: in a kernel it is there already. Elsewhere a trainer is shown as text."""
    shell = getattr(_sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if not hasattr(shell, "kernel"):
        return

    def show(trainer: object) -> None:
        _import_module("tractkit.lab.panel").panel_of(trainer)._ipython_display_()

    formatter = shell.display_formatter.ipython_display_formatter
    formatter.for_type_by_name("tractkit.training.trainer", "Trainer", show)  # and of its child classes


_give_numba_a_place()
_show_trainers_as_panels()
_sys.meta_path.append(_OldModules())  # last: for `from tractkit.trainer import Trainer`, written before the packages


def __getattr__(name: str):
    """Load a name of `__all__`; for any other say where it is."""
    if name == "__version__":
        from importlib.metadata import version

        return version("tractkit")
    if name not in __all__:
        from ._moved import explain

        raise AttributeError(explain(name), name=name)
    value = getattr(_import_module(f"tractkit.{_NAMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
