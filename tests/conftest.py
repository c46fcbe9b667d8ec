"""What every test file shares: which tests this machine can run, and the closing line on real data."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DATA = os.environ.get("TRACTKIT_DATA")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _has_vulkan() -> bool:
    from tractkit.viz.vulkan import vulkan_available

    return vulkan_available()


def _has_webgl() -> bool:
    from playwright.sync_api import sync_playwright

    with (
        sync_playwright() as p,
        p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]) as browser,
    ):
        return browser.new_page().evaluate("() => !!document.createElement('canvas').getContext('webgl2')")


def _has_namespaces() -> bool:
    return (
        shutil.which("unshare") is not None
        and subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode == 0
    )


# marker -> (can this machine run it?, what a person can do about it); asked only where a test carries the marker
NEEDS = {
    "full": (lambda: os.environ.get("FULL") == "1", "a long repetition: set FULL=1 to run it"),
    "gpu": (_has_gpu, "torch finds no CUDA device here"),
    "browser": (lambda: CHROMIUM is not None, "no chromium or google-chrome on the PATH"),
    "vulkan": (_has_vulkan, "no Vulkan driver for FURY: tractkit.viz.vulkan.NO_VULKAN says what to install"),
    "webgl": (_has_webgl, "no WebGL 2 in this browser: tests/viz reads what it would be given"),
    "namespaces": (
        _has_namespaces,
        "no mount namespaces here: the errors are injected in test_checkpoint.py and test_trainer.py",
    ),
    "linux": (lambda: sys.platform == "linux", "asks Linux: /proc, or limits of a process"),
    "real": (lambda: bool(DATA), "TRACTKIT_DATA names no folder of real data"),
}


# Files that take minutes, longest first: where files run side by side, none of these may be the last to begin.
LONG = [
    "test_promise.py",
    "test_demo.py",
    "test_steps_cut_short.py",
    "test_tutorials.py",
    "test_fuzz.py",
    "test_panel_browser.py",
    "test_resume.py",
    "test_torchrun.py",
    "test_killed_models.py",
    "test_package.py",
    "test_tutorial_browser.py",
    "test_loggers.py",
    "test_phantom.py",
    "test_process.py",
    "test_own_draws.py",
    "test_view_browser.py",
    "test_data_check.py",
    "test_train.py",
    "test_loader.py",
    "test_panel.py",
    "test_torch_model.py",
    "test_kept_shapes.py",
    "test_dataset.py",
    "test_trainer.py",
    "test_overrides.py",
    "test_prefetch.py",
    "test_runs_browser.py",
    "test_create.py",
    "test_trainer_options.py",
    "test_space_check.py",
    "test_remote_file.py",
    "test_fury_scene.py",
    "test_live_settings.py",
    "test_commands.py",
    "test_from_folders.py",
    "test_tools.py",
]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    answers: dict[str, bool] = {}
    for item in items:
        for marker, (can_run, reason) in NEEDS.items():
            if item.get_closest_marker(marker):
                if marker not in answers:
                    answers[marker] = can_run()
                if not answers[marker]:
                    item.add_marker(pytest.mark.skip(reason=reason))
                    break  # what else it needs is not asked: that may take a second


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    # After pytest's own closing count, which a terminal summary would come before.
    if not hasattr(config, "workerinput"):
        print(f"real data: {'run' if DATA and Path(DATA).is_dir() else 'skipped'}")


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of the browser; for tests marked `browser`."""
    assert CHROMIUM is not None, "mark the test with pytest.mark.browser"
    return CHROMIUM


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data; for tests marked `real`."""
    assert DATA, "mark the test with pytest.mark.real"
    return Path(DATA)
