"""Run the benchmarks and write what they found into benchmarks/RESULTS.md.

    python -m benchmarks                 # all
    python -m benchmarks volume loader   # bench_volume.py and bench_loader.py
    python -m benchmarks --dry           # print only
    python -m benchmarks models --getters  # every direction getter, trained and examined: 12 minutes
    python -m benchmarks models --getters-long  # the densities, with four times the batches: 25 minutes

A benchmark is a file bench_NAME.py with a docstring that says what is compared, and `rows()`, which yields
`benchmarks.pairs.Ratio`, or, where nothing is timed, `table()`, which returns Markdown. Its section of RESULTS.md
stands between two comments; text outside them is kept."""

import argparse
import datetime
import importlib
import inspect
import re
import sys
import time
from pathlib import Path

from benchmarks.pairs import as_table, machine

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "RESULTS.md"


def section(name: str) -> tuple[str, float]:
    """Run one benchmark: its section of RESULTS.md, and how long it took."""
    began = time.perf_counter()
    module = importlib.import_module("benchmarks.getters" if "getters" in name else f"benchmarks.bench_{name}")
    makes, described = (module.long_table, module.long_table) if name == "getters-long" else (
        getattr(module, "table", lambda: as_table(list(module.rows()))), module)
    table = makes()
    today = datetime.date.today().isoformat()
    text = f"## {name}\n\n{inspect.cleandoc(described.__doc__ or '')}\n\n{table}\n\n{today}, {machine()}."
    return text, time.perf_counter() - began


def put(results: str, name: str, text: str) -> str:
    """`results` with the section of one benchmark replaced, or appended if it has none."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    block = f"{begin}\n{text}\n{end}"
    old = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    return old.sub(lambda _: block, results) if old.search(results) else f"{results.rstrip()}\n\n{block}\n"


def main() -> int:
    every = sorted(p.stem.removeprefix("bench_") for p in HERE.glob("bench_*.py"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(every)}")
    parser.add_argument("--dry", action="store_true", help="print, do not write RESULTS.md")
    parser.add_argument("--getters", action="store_true", help="with models: only the table of direction getters")
    parser.add_argument("--getters-long", action="store_true", help="with models: only the densities, trained longer")
    args = parser.parse_args()
    tables = [name for name in ("getters", "getters-long") if getattr(args, name.replace("-", "_"))]
    if tables and args.names != ["models"]:
        parser.error(f"--{tables[0]} is for models: python -m benchmarks models --{tables[0]}")
    if unknown := set(args.names) - set(every):
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    names = tables or args.names or every
    for number, name in enumerate(names, 1):
        print(f"{number}/{len(names)} {name} ...", flush=True)
        text, seconds = section(name)
        print(f"{text}\n({seconds:.0f} s)\n", flush=True)
        if not args.dry:
            RESULTS.write_text(put(RESULTS.read_text(encoding="utf-8"), name, text), encoding="utf-8")
    if not args.dry:
        print(f"written to {RESULTS.relative_to(HERE.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
