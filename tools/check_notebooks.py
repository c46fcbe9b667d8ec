"""Do the notebooks, the modules exported from them and the outputs stored in them agree?

    python tools/check_notebooks.py --export             # the exported files are what the notebooks say
    python tools/check_notebooks.py --run [NOTEBOOK...]  # the stored outputs are what the notebooks print
    python tools/check_notebooks.py --store NOTEBOOK...  # run notebooks and store what they print

--export copies the tree, deletes all that is generated, exports and cleans in the copy, and compares the two
file by file, byte by byte.

--run executes each notebook in a kernel, a process of its own, some at a time, and compares by cell id: streams
and text exactly, other outputs by their mime types (pictures may differ by a pixel between machines). Cells marked
`#| slow`, `#| gpu` or `#| browser`, and `#| eval: false`, are not executed and keep what is stored; FULL=1 executes
the slow ones. `#| varies` marks cells whose text depends on a training, which no two kinds of processor repeat to the
last bit: only the kinds of their outputs are compared, warnings apart. `#| real` marks cells that need the data folder
and are left out where TRACTKIT_DATA is not set. In the tutorials, which show what a reader types, the directives are
in the cells' metadata: {"nbdev": {"slow": "true"}}. Of the tutorials only 90 and 92 are run unless FULL=1, or unless
they are named.
"""

import argparse
import copy
import difflib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import nbformat
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tools import export as exporting  # noqa: E402
from tools import warm_kernel  # noqa: E402
from tools.tree import copy_tree, git_status, source_files  # noqa: E402

WARM = ROOT / "tools" / "warm_kernel.py"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
AT_ONCE = min(4, CORES + 1)  # a kernel that starts or ends leaves its core to the others
IN_SHORT = ("90_", "92_")  # the tutorials that the short run executes
SLOW_NOTEBOOK = 20  # seconds
LARGE_NOTEBOOK = 300  # KB

# ---- the exported files ------------------------------------------------------------------------------------------


def first_difference(ours: bytes, fresh: bytes) -> str:
    """The first few differing lines of two files, for a person to see what kind of difference it is."""
    try:
        lines = difflib.unified_diff(
            ours.decode().splitlines(), fresh.decode().splitlines(), "committed", "exported", lineterm="", n=0)
    except UnicodeDecodeError:
        return ""
    return "\n".join(f"    {line[:150]}" for line in list(lines)[2:8])


def export_differences(root: Path = ROOT) -> tuple[list[str], int]:
    """What differs between `root` and a copy of it exported afresh, and how many files were compared."""
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_tree(Path(folder), root)
        for path in exporting.generated_files(copy):
            path.unlink(missing_ok=True)
        done = subprocess.run([sys.executable, "tools/export.py"], cwd=copy, capture_output=True, text=True)
        if done.returncode:
            return [f"tools/export.py fails: {(done.stderr or done.stdout).strip()[-1500:]}"], 0
        ours, fresh = set(source_files(root)), set(source_files(copy))
        problems = [
            f"{name}: no notebook exports it; delete it or its notebook is lost" for name in sorted(ours - fresh)
        ]
        problems += [
            f"{name}: is exported but not there; run tools/export.py and add it" for name in sorted(fresh - ours)
        ]
        for name in sorted(ours & fresh):
            was, now = (root / name).read_bytes(), (copy / name).read_bytes()
            if was != now:
                problems.append(f"{name}: is not what tools/export.py writes\n{first_difference(was, now)}")
    return problems, len(ours | fresh)


# ---- the stored outputs ------------------------------------------------------------------------------------------

EMBEDDED = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=\s]+")
NOT_FOR_KEEPING = {
    "an address": re.compile(r"\bat 0x[0-9a-f]{4,}"),
    "a path of this machine": re.compile(r"(?<![\w.])/(?:home|root|tmp|Users|work|private/var)/\w"),
    "a progress bar": re.compile(r"\d+%\|.*\||\d(?:it/s|s/it)\b"),
}


def directives(cell: Mapping) -> set[str]:
    """The nbdev directives of a cell, in its source or in its metadata: `#| slow` and {"nbdev": {"slow": "true"}} give
    "slow", `#| eval: false` gives "eval:false"."""
    in_source = {re.sub(r"\s", "", line[2:]) for line in as_text(cell["source"]).splitlines() if line.startswith("#|")}
    in_metadata = cell.get("metadata", {}).get("nbdev", {}).items()
    return in_source | {name if value == "true" else f"{name}:{value}" for name, value in in_metadata}


def left_out() -> set[str]:
    """The directives whose cells are not executed now."""
    flags = {"eval:false", "gpu", "browser"}
    if os.environ.get("FULL") != "1":
        flags.add("slow")
    if not os.environ.get("TRACTKIT_DATA"):
        flags.add("real")
    return flags


def summary(outputs: list) -> list[tuple[str, str]]:
    """What is compared of a cell's outputs: (kind, text) pairs; neighbouring pieces of a stream count as one."""
    pairs: list[tuple[str, str]] = []
    for output in outputs:
        kind = output["output_type"]
        if kind == "stream":
            if pairs and pairs[-1][0] == output["name"]:
                pairs[-1] = (output["name"], pairs[-1][1] + as_text(output["text"]))
            else:
                pairs.append((output["name"], as_text(output["text"])))
        elif kind == "error":
            pairs.append(("error", f"{output['ename']}: {output['evalue']}"))
        else:
            for mime, data in sorted(output["data"].items()):
                is_text = mime.startswith("text/") or mime == "application/json"
                pairs.append((mime, EMBEDDED.sub("data:...", as_text(data)) if is_text else ""))
    return pairs


def as_text(data) -> str:
    """The text of an output field, which a notebook file may hold as a list of lines."""
    if isinstance(data, list):
        return "".join(data)
    return data if isinstance(data, str) else json.dumps(data, sort_keys=True)


def cell_difference(stored: list, now: list, kinds_only: bool = False) -> str:
    """How the outputs of one cell differ, in a few lines; empty if they agree."""
    was, got = summary(stored), summary(now)
    if kinds_only:
        was, got = (
            [(kind, "") for kind, _ in pairs if kind != "stderr"] for pairs in (was, got)
        )  # a run that is found warns of nothing
    if was == got:
        return ""
    lines = list(difflib.unified_diff(
        [f"{kind}: {line}" for kind, text in was for line in (text.splitlines() or [""])],
        [f"{kind}: {line}" for kind, text in got for line in (text.splitlines() or [""])],
        lineterm="", n=0))[2:]
    lines = [line for line in lines if not line.startswith("@@")]
    removed, added = ([line for line in lines if line[0] == sign] for sign in "-+")
    starts = [len(os.path.commonprefix([a[1:], b[1:]])) for a, b in zip(removed, added, strict=False)]
    shown = []
    for line in lines:
        number = (removed if line[0] == "-" else added).index(line)
        same = starts[number] if number < len(starts) else 0
        cut = same - 30 if same > 90 else 0  # a long line: from a little before the first difference
        shown.append(f"    {line[0]}{'...' if cut else ''}{line[1 + cut :][:150]}")
    more = [f"    ... and {len(shown) - 8} more lines"] if len(shown) > 8 else []
    return "\n".join([*shown[:8], *more]) or "    outputs are cut at other places"


def dies_with_its_kernel(output) -> bool:
    """Is an output a live view or panel, or tqdm's widget? A stored one is an error message where it is opened; the
    still stays."""
    data = output.get("data", {})
    text = as_text(data.get("text/plain", ""))
    if "tractkit-alone" in as_text(data.get("text/html", "")):  # hides what stands in the place of a view
        return True
    return any("widget-view" in mime for mime in data) and \
        (text.startswith(("View(", "Below: the panel")) or NOT_FOR_KEEPING["a progress bar"].search(text) is not None)


def unfit_for_keeping(nb) -> list[str]:
    """Stored outputs that would differ at every run or on every machine, and figures without their picture."""
    problems = []
    for cell in nb.cells:
        for _, text in summary(cell.get("outputs", [])):
            problems += [f"cell {cell.id} stores {what}: {found.group()[:60]}"
                         for what, pattern in NOT_FOR_KEEPING.items() if (found := pattern.search(text))]
        problems += [
            f"cell {cell.id} stores a figure as text; put %matplotlib inline into a cell before it and store again"
            for output in cell.get("outputs", [])
            if lost_figure(output.get("data", {}))
        ]
    return problems


def lost_figure(data: Mapping[str, str | list[str]]) -> bool:
    """Is an output the text of a matplotlib figure, without its picture?"""
    return "<Figure size" in as_text(data.get("text/plain", "")) and "image/png" not in data


def execute(nb, folder_of_notebook: Path, *, skip: set[str], warm: str | None = None) -> None:
    """Run a notebook in its folder, in a new kernel of this very interpreter; cells with directives in `skip` are left.

    `warm` is the socket of a server of kernels (tools/warm_kernel.py); without it the kernel is started cold."""
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    class ThisInterpreter(KernelSpecManager):
        """Whatever kernels are installed on the machine, use this one."""

        def get_kernel_spec(self, kernel_name):
            spec = get_kernel_dict()
            if warm:
                spec["argv"] = [sys.executable, "-I", "-S", str(WARM), warm, "-f", "{connection_file}"]
            return KernelSpec(**spec)

    kept = {}
    for cell in nb.cells:
        if cell.cell_type == "code" and directives(cell) & skip:
            kept[cell.id], cell.source = cell.source, ""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as printed:
        manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=ThisInterpreter(),
                                     connection_file=str(Path(folder) / "kernel.json"))
        client = NotebookClient(nb, km=manager, timeout=1200, resources={"metadata": {"path": str(folder_of_notebook)}},
                                store_widget_state=False)
        try:
            client.execute(
                cleanup_kc=True, env=isolated_environment(folder), stdout=printed, stderr=printed
            )  # the kernel ends here
        except (DeadKernelError, RuntimeError) as error:  # the second: before its first cell
            printed.seek(0)
            raise DeadKernelError(f"{error}: {printed.read().decode(errors='replace').strip()[-2500:]}") from None
    for cell in nb.cells:
        cell.source = kept.get(cell.id, cell.source)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not dies_with_its_kernel(output)]


def isolated_environment(folder: str) -> dict[str, str]:
    """Variables that keep the person's own Jupyter settings, profiles and progress bars out of a run."""
    own = {name: str(Path(folder) / name.lower()) for name in
           ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "XDG_RUNTIME_DIR")}
    for path in own.values():
        Path(path).mkdir(mode=0o700)
    return {**os.environ, "OMP_NUM_THREADS": "1", **own, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1", "NO_COLOR": "1"}


@contextmanager
def warm_kernels():
    """A server of kernels that have the heavy libraries in memory: its socket, or None where the system has no such
    thing."""
    if not warm_kernel.AVAILABLE:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        address = str(Path(folder) / "kernels")
        server = subprocess.Popen([sys.executable, str(WARM), "--serve", address], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, env=isolated_environment(folder))
        try:
            assert server.stdin and server.stdout
            if server.stdout.readline() != b"ready\n":
                raise RuntimeError(f"{WARM.name} does not start: it ended with {server.wait()}")
            yield address
        finally:
            server.stdin.close()  # its sign to end, and its kernels with it
            server.wait()


def run(path: Path, store: bool = False, warm: str | None = None) -> tuple[list[str], float]:
    """Run one notebook in a kernel of its own and compare, or store: its problems and its seconds."""
    began = time.perf_counter()
    stored = nbformat.read(path, as_version=4)
    now = copy.deepcopy(stored)
    try:
        execute(now, path.parent, skip=left_out(), warm=warm)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        problems = [re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()[-2500:]]
        return problems, time.perf_counter() - began
    if store:
        for cell in now.cells:
            cell.metadata = {key: value for key, value in cell.metadata.items() if key == "nbdev"}
        now.metadata.pop("widgets", None)
        nbformat.write(now, path)
        problems = unfit_for_keeping(now)
    else:
        problems = unfit_for_keeping(stored)
        for was, got in zip(stored.cells, now.cells, strict=True):
            kinds_only = "varies" in directives(was)
            if was.cell_type == "code" and (
                difference := cell_difference(
                    [o for o in was.outputs if not dies_with_its_kernel(o)], got.outputs, kinds_only
                )
            ):
                problems.append(f"cell {was.id} prints something else than what is stored\n{difference}")
    return problems, time.perf_counter() - began


def in_this_run(notebooks: list[Path]) -> list[Path]:
    """What is run if nothing is named: without FULL=1, of the tutorials only the first and the panel's."""
    return [
        p
        for p in notebooks
        if os.environ.get("FULL") == "1" or p.parent.name != "tutorials" or p.name.startswith(IN_SHORT)
    ]


# ---- the command -------------------------------------------------------------------------------------------------


def check_export() -> int:
    problems, compared = export_differences()
    for problem in problems:
        print(f"  {problem}")
    print(f"export: {compared} files compared, " + (f"{len(problems)} DIFFER" if problems else "all agree"))
    return 1 if problems else 0


def check_run(notebooks: list[Path], store: bool = False) -> int:
    before = git_status()
    wrong = 0
    with warm_kernels() as warm, ThreadPoolExecutor(AT_ONCE) as pool:
        # Tutorials and the largest first, so that the last one to finish is not a long one that began late.
        by_size = sorted(notebooks, key=lambda p: (p.parent.name != "tutorials", -p.stat().st_size))
        for path, (problems, seconds) in zip(by_size, pool.map(lambda p: run(p, store, warm), by_size), strict=True):
            size = path.stat().st_size / 1000
            notes = [f"over {SLOW_NOTEBOOK} s"] if seconds > SLOW_NOTEBOOK else []
            notes += [f"{size:.0f} KB, over {LARGE_NOTEBOOK}"] if size > LARGE_NOTEBOOK else []
            print(
                f"  {'FAIL' if problems else 'ok  '} {seconds:5.1f} s  "
                f"{path.relative_to(ROOT / 'nbs') if path.is_relative_to(ROOT / 'nbs') else path.name}"
                + (f"  (note: {'; '.join(notes)})" if notes else ""),
                flush=True,
            )
            for problem in problems:
                print(f"    {problem}", flush=True)
            wrong += bool(problems)
    litter = [] if store else sorted(git_status() - before)
    for line in litter:
        print(f"  left behind or changed by a notebook: {line}")
    left = ", ".join(sorted(left_out() - {"eval:false"}))
    print(f"notebooks: {len(notebooks)} run, " + (f"{wrong} FAILED" if wrong else "all as stored")
          + (f", {len(litter)} files LEFT BEHIND" if litter else "") + f"; cells not executed: {left}")
    return 1 if wrong or litter else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all in nbs/")
    parser.add_argument("--export", action="store_true", help="compare the exported files")
    parser.add_argument("--run", action="store_true", help="run the notebooks and compare their outputs")
    parser.add_argument("--store", action="store_true", help="run the notebooks and store their outputs")
    args = parser.parse_args()
    notebooks = [p.resolve() for p in args.notebooks] or in_this_run(sorted((ROOT / "nbs").rglob("*.ipynb")))
    if args.store:
        wrong = check_run(notebooks, store=True)
        exporting.export()
        return wrong
    wrong = 0
    if args.export or not args.run:
        wrong += check_export()
    if args.run or not args.export:
        wrong += check_run(notebooks)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
