"""The tutorials as they are stored: small, with their pictures, and as HTML without being run; and the site made of
them."""

import json
import re
from pathlib import Path

import nbformat
import pytest

from tools import check_notebooks
from tools.docs import build

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = sorted((ROOT / "nbs" / "tutorials").glob("*.ipynb"))
PNG = re.compile(r"<img[^>]*src=\"data:image/png;base64,[A-Za-z0-9+/=\n]{1000,}\"")


@pytest.fixture(params=TUTORIALS, ids=lambda p: p.stem[:2])
def tutorial(request) -> Path:
    return request.param


def outputs_of(path: Path) -> list:
    return [o for cell in nbformat.read(path, as_version=4).cells for o in cell.get("outputs", [])]


def stills_in(output) -> int:
    """Pictures of an output: a PNG, or those in its HTML (a panel's last state)."""
    data = output.get("data", {})
    return len(PNG.findall(data["text/html"])) if "text/html" in data else int("image/png" in data)


def test_as_html_it_shows_its_stills(tutorial):
    from nbconvert import HTMLExporter

    stills = sum(map(stills_in, outputs_of(tutorial)))
    page, _ = HTMLExporter().from_filename(str(tutorial))
    assert stills >= 2
    assert len(PNG.findall(page)) == stills


def test_nothing_in_it_dies_with_a_kernel(tutorial):
    notebook = json.loads(tutorial.read_text(encoding="utf-8"))
    assert "widgets" not in notebook["metadata"]
    assert not [mime for o in outputs_of(tutorial) for mime in o.get("data", {}) if "widget-view" in mime]
    assert not check_notebooks.unfit_for_keeping(nbformat.read(tutorial, as_version=4))


def test_it_is_small_and_begins_with_its_story(tutorial):
    assert tutorial.stat().st_size < 300_000
    cells = nbformat.read(tutorial, as_version=4).cells
    assert re.match(r"# .+\n\n> .+", cells[0].source)
    assert not any("#| export" in cell.source for cell in cells)
    pictured = [i for i, cell in enumerate(cells) if any(map(stills_in, cell.get("outputs", [])))]
    asserted = [
        i
        for i, cell in enumerate(cells)
        if cell.cell_type == "code" and re.search(r"^\s*assert ", cell.source, re.MULTILINE)
    ]
    for i, following in zip(pictured, [*pictured[1:], len(cells)], strict=True):
        assert any(i < k < following for k in asserted), (
            f"nothing is asserted below the figure of: {cells[i].source[-300:]}"
        )


def test_its_code_is_what_a_reader_types_and_is_not_cut(tutorial):
    """In a JupyterLab of 900 pixels, with its file list closed, 90 characters fit; directives are in the metadata."""
    code = [line for c in nbformat.read(tutorial, as_version=4).cells if c.cell_type == "code"
            for line in c.source.splitlines()]
    assert [line for line in code if len(line) > 90 or line.lstrip().startswith("#|")] == []


def test_its_links_lead_to_notebooks_that_are_there(tutorial):
    for cell in nbformat.read(tutorial, as_version=4).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)#:]+)\)", cell.source):
                assert (tutorial.parent / target).is_file(), target


def test_a_short_run_leaves_long_stories_out(monkeypatch):
    monkeypatch.setenv("FULL", "0")
    short = [p.name[:2] for p in check_notebooks.in_this_run(TUTORIALS)]
    assert short == [n for n in ("90", "92") if n in {p.name[:2] for p in TUTORIALS}]
    monkeypatch.setenv("FULL", "1")
    assert check_notebooks.in_this_run(TUTORIALS) == TUTORIALS


def test_links_that_lead_nowhere_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="top">A</h1><a href="b.html#here">b</a><a href="https://x.org/y">x</a><a href="#top">t</a>'
    )
    (tmp_path / "b.html").write_text(
        '<p id="here">B</p><a href="c.html">c</a><img src="d.png"><a href="a.html#there">a</a>'
    )
    assert build.broken_links(tmp_path) == [
        "b.html: a.html#there: the page has no such place", "b.html: c.html is not there", "b.html: d.png is not there"]


@pytest.mark.full
def test_the_site_is_built_from_what_is_stored(tmp_path, monkeypatch, capfd):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # whoever asks the network gets no answer
    assert build.make_site(tmp_path / "source", tmp_path / "html") == 0
    assert "WARNING" not in capfd.readouterr().err
    pages = {p.relative_to(tmp_path / "html").as_posix() for p in (tmp_path / "html").rglob("*.html")}
    assert {"index.html", "ARCHITECTURE.html", "api/viz.viewer.html"} | {
        f"nbs/tutorials/{p.stem}.html" for p in TUTORIALS
    } <= pages
    for path in TUTORIALS:
        stills = sum("image/png" in o.get("data", {}) for o in outputs_of(path))  # those in HTML stay where they are
        page = (tmp_path / "html" / "nbs" / "tutorials" / f"{path.stem}.html").read_text(encoding="utf-8")
        assert len(re.findall(r'<img[^>]*src="\.\./\.\./_images/', page)) == stills, path.name
