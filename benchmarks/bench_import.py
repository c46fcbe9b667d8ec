"""`import tractkit` beside the bare interpreter: what every command and every kernel pays first."""

import subprocess
import sys
from collections.abc import Iterator

from benchmarks.pairs import Ratio, compare


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def rows() -> Iterator[Ratio]:
    yield compare("import tractkit", lambda: run("import tractkit"), "bare interpreter", lambda: run("pass"),
                  note="warm page cache")
