"""Build the HTML documentation into _docs/html, without a network: `make docs`.

The pages are the notebooks as they are stored, the texts at the root of the checkout, and one API page a module:
signatures with the comments beside their parameters, and docstrings, read from the exported source without
importing it."""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from tools.export import PACKAGES, generated_modules, public_names  # noqa: E402

SOURCE, HTML = ROOT / "_docs" / "source", ROOT / "_docs" / "html"
TEXTS = ["ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/RESULTS.md"]
ORPHAN = "---\norphan: true\n---\n\n"  # a page that is not in the side bar: its package's page leads to it
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def markdown(text: str) -> str:
    """A docstring as Markdown: what looks like HTML outside of code stays text."""
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in re.split(r"(`[^`]*`)", text))


def signature(node: Definition, lines: list[str]) -> str:
    """The lines of a definition before its body, decorators and comments included."""
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    body = node.body[0]
    end = min([body.lineno, *(d.lineno for d in getattr(body, "decorator_list", []))])
    if end == node.lineno:  # all on one line
        return lines[first - 1].strip()
    block = lines[first - 1 : end - 1]
    indent = len(block[0]) - len(block[0].lstrip())
    return "\n".join(line[indent:] for line in block).rstrip()


def fields(node: ast.ClassDef, lines: list[str]) -> str:
    """The annotated attributes of a class body, each with its comment: what a dataclass is made of."""
    chosen = [lines[n.lineno - 1 : n.end_lineno] for n in node.body if isinstance(n, ast.AnnAssign)]
    return "\n".join(line for block in chosen for line in block)


def describe(node: Definition, lines: list[str], prefix: str = "", level: int = 2) -> str:
    """The API entry of a function, or of a class with its public methods."""
    code = signature(node, lines)
    if isinstance(node, ast.ClassDef) and (attributes := fields(node, lines)):
        code += "\n" + attributes
    parts = [f"{'#' * level} `{prefix}{node.name}`", f"```python\n{code}\n```", markdown(ast.get_docstring(node) or "")]
    if isinstance(node, ast.ClassDef):
        for method in node.body:
            if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef):
                setter = any(isinstance(d, ast.Attribute) for d in method.decorator_list)
                if method.name == "__init__" or not (method.name.startswith("_") or setter):
                    parts.append(describe(method, lines, f"{node.name}.", level + 1))
    return "\n\n".join(filter(None, parts))


def api_page(path: Path, root: Path = ROOT) -> str:
    """The API page of one exported module."""
    text = path.read_text(encoding="utf-8")
    lines, tree, names = text.splitlines(), ast.parse(text), public_names(path)
    module = ".".join(path.relative_to(root / "tractkit").with_suffix("").parts)
    notebook = re.search(r"nbs/(\S+\.ipynb)", text)
    parts = [ORPHAN + f"# {module}", markdown(ast.get_docstring(tree) or "")]
    if notebook:
        parts.append(f"Argued and shown in [its notebook](../nbs/{notebook.group(1)}).")
    described = set()
    for node in tree.body:
        if isinstance(node, Definition) and node.name in names:
            parts.append(describe(node, lines))
            described.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            named = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name) and n.id in names]
            if named:
                source = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                parts.append(f"## {', '.join(f'`{name}`' for name in named)}\n\n```python\n{source}\n```")
                described.update(named)
    parts += [f"## `{name}`\n\nTaken over from another place." for name in names if name not in described]
    return "\n\n".join(filter(None, parts)) + "\n"


def page_of_notebook(path: Path) -> str:
    """A notebook for readers: without nbdev's directives, and without the cells that say hide."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    shown = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            if re.search(r"^#\|\s*(hide|default_exp)\b", source, re.M) or "hide" in cell["metadata"].get("nbdev", {}):
                continue
            source = re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE)
        cell["source"] = source
        shown.append(cell)
    metadata = {**notebook["metadata"], **({} if path.parent.name == "tutorials" else {"orphan": True})}
    return json.dumps({**notebook, "cells": shown, "metadata": metadata})


def package_page(package: str, notebooks: Iterable[Path], modules: Iterable[str]) -> str:
    """The page of a package: its notebooks, each with its title, its sentence and the API page of its module."""
    rows = []
    for path in notebooks:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        title, sentence = re.match(r"# (.+?)\s*(?:\n+> (.+?))?\s*(?:\n\n|$)", "".join(cells[0]["source"])).groups()
        module = re.search(r"#\|\s*default_exp\s+(\S+)", "\n".join("".join(cell["source"]) for cell in cells))
        api = f" · [API](../api/{module.group(1)}.md)" if module and module.group(1) in modules else ""
        rows.append(f"- [{title}](../nbs/{package}/{path.name}){api}" + (f"\\\n  {sentence}" if sentence else ""))
    return f"# {package}\n\n" + "\n".join(rows) + "\n"


def toctree(caption: str, pages: list[str]) -> str:
    """A toctree for the side bar; empty without pages."""
    entries = "\n".join(pages)
    return f":::{{toctree}}\n:hidden:\n:caption: {caption}\n:maxdepth: 1\n\n{entries}\n:::" if pages else ""


def gather(source: Path = SOURCE, root: Path = ROOT) -> None:
    """Write all pages into `source`, laid out as the checkout is, so that links between them hold."""
    shutil.rmtree(source, ignore_errors=True)
    (source / "nbs").mkdir(parents=True)
    (source / "api").mkdir()
    (source / "_static").mkdir()
    shutil.copy(root / "tools" / "docs" / "conf.py", source)
    shutil.copy(root / "tools" / "docs" / "wide.css", source / "_static")
    notebooks = {
        p.relative_to(root).as_posix(): p for p in sorted((root / "nbs").rglob("*.ipynb")) if p.stem != "index"
    }
    for name, path in notebooks.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(page_of_notebook(path), encoding="utf-8")
    if (root / "nbs" / "images").is_dir():
        shutil.copytree(root / "nbs" / "images", source / "nbs" / "images")
    modules = {".".join(p.relative_to(root / "tractkit").with_suffix("").parts): p for p in generated_modules(root)}
    for name, path in modules.items():
        (source / "api" / f"{name}.md").write_text(api_page(path, root), encoding="utf-8")
    for name in TEXTS:
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copy(root / name, source / name)
    (source / "packages").mkdir()
    for package in PACKAGES:
        page = package_page(package, sorted((root / "nbs" / package).glob("*.ipynb")), modules)
        (source / "packages" / f"{package}.md").write_text(page, encoding="utf-8")
    trees = [
        toctree("Tutorials", [name for name in notebooks if name.startswith("nbs/tutorials/")]),
        toctree("The project", TEXTS),
        toctree("Notebooks and API", [f"packages/{package}.md" for package in PACKAGES]),
    ]
    readme = (root / "README.md").read_text(encoding="utf-8")
    (source / "index.md").write_text("\n\n".join([readme, *filter(None, trees)]) + "\n", encoding="utf-8")


class _Links(HTMLParser):
    """The links of a page, what it loads, and the places in it that links can name."""

    def __init__(self, text: str):
        super().__init__()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.add(value)
                if name == "src" or (tag == "link" and dict(attrs).get("rel") in ("stylesheet", "preload", "icon")):
                    self.loads.add(value)
            elif name in ("id", "name") and value:
                self.places.add(value)


def broken_links(html: Path = HTML) -> list[str]:
    """The links within the site that lead nowhere, and what pages would load from elsewhere."""
    pages = {path: _Links(path.read_text(encoding="utf-8")) for path in sorted(html.rglob("*.html"))}
    problems = []
    for path, page in pages.items():
        for link in sorted(page.links):
            address = urlsplit(link)
            if address.scheme or address.netloc:
                if link in page.loads and address.scheme != "data":
                    problems.append(f"{path.relative_to(html)}: {link} comes from elsewhere")
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            if not target.is_file():
                problems.append(f"{path.relative_to(html)}: {link} is not there")
            elif address.fragment and target in pages and unquote(address.fragment) not in pages[target].places:
                problems.append(f"{path.relative_to(html)}: {link}: the page has no such place")
    return problems


def make_site(source: Path = SOURCE, html: Path = HTML) -> int:
    """Write all pages into `html`. Not 0 if a page cannot be made, or a link leads nowhere."""
    gather(source)
    shutil.rmtree(html, ignore_errors=True)
    code = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-j", "2", "-b", "html", str(source), str(html)]
    ).returncode
    if code:
        return code
    if (source / "nbs" / "images").is_dir():  # the README shows them by HTML, of which sphinx takes no notice
        shutil.copytree(source / "nbs" / "images", html / "nbs" / "images", dirs_exist_ok=True)
    problems = broken_links(html)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(
        f"{len(list(html.rglob('*.html')))} pages in {html}"
        + (f"; {len(problems)} links BROKEN" if problems else "; all links lead somewhere")
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(make_site())
