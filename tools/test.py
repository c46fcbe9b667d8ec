"""Everything that `make test` checks, phase by phase; all of them run, whatever fails.

FULL=1 adds the long repetitions. pytest comes last: its closing count and the line on real data end the run."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# Four at once on two cores: many tests wait, for a browser, a child or a disk. More take a gigabyte of memory each.
WORKERS = min(4, 2 * CORES)
TYPES = ("types", ["-m", "mypy"])  # a minute of one core: begins with the first phase, beside those up to its own
PHASES = [
    ("ruff", ["-m", "ruff", "check", "nbs", "tractkit", "tests", "tools", "benchmarks", "setup.py"]),
    ("JavaScript and CSS", ["tools/lint_web.py"]),
    ("export: nbs/ and tractkit/ agree", ["tools/check_notebooks.py", "--export"]),
    ("notebooks: each in its own process", ["tools/check_notebooks.py", "--run"]),
    TYPES,
    # Files side by side; conftest.py puts the longest first.
    ("pytest", ["-m", "pytest", "-n", str(WORKERS), "--dist", "loadfile", "--no-loadscope-reorder"]),
]


def environment_of_phases() -> dict[str, str]:
    """The variables of all phases: threads of libraries wait asleep, and modules are compiled once.

    A thread that waits for its next part of a computation in a loop takes the core of the test beside it. Without
    compiled files, hundreds of child processes compile torch and the package anew, three seconds each."""
    own = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1",
           "OMP_WAIT_POLICY": "passive", "OPENBLAS_THREAD_TIMEOUT": "4"}
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | own


def main() -> int:
    full = os.environ.get("FULL") == "1"
    options: dict = {"cwd": ROOT, "env": environment_of_phases()}
    failed = []
    print(f"tests: {'FULL=1, with' if full else 'the short run, without'} the long repetitions", flush=True)
    with tempfile.TemporaryFile() as printed:
        types = subprocess.Popen([PYTHON, *TYPES[1]], stdout=printed, stderr=printed, **options)
        for number, (name, command) in enumerate(PHASES, 1):
            print(f"\n== {number}/{len(PHASES)} {name}", flush=True)
            began = time.perf_counter()
            if (name, command) == TYPES:
                code = types.wait()
                printed.seek(0)
                print(printed.read().decode(), end="", flush=True)
            else:
                code = subprocess.run([PYTHON, *command], **options).returncode
            if code:
                failed.append(f"{name} (exit code {code})")
            if number < len(PHASES):
                print(f"   {'FAILED' if code else 'passed'} after {time.perf_counter() - began:.1f} s", flush=True)
    if failed:
        print("\nFAILED: " + "; ".join(failed), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
