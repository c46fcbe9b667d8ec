"""Sphinx settings. tools/docs/build.py copies this file beside the pages it gathers."""

from html import escape

from docutils.nodes import SkipNode
from matplotlib.textpath import TextPath

project = "tractkit"
author = "The tractkit developers"
extensions = ["myst_nb"]
nb_execution_mode = "off"  # pages show the outputs that the notebooks store
nb_ipywidgets_js = {}      # widgets need a kernel; a page shows the still picture beside each
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type", "myst.xref_missing", "misc.highlighting_failure"]
html_theme = "furo"
html_title = "tractkit"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_math_renderer = "drawn"  # MathJax, which is the usual one, would come from another site whenever a page is read


def _drawn(tex: str, size: float = 15) -> str:
    """A formula as a picture in the color of the text around it, standing on its line."""
    path = TextPath((0, 0), f"${tex}$", size=size)
    left, bottom, width, height = path.get_extents().padded(0.5).bounds
    pen = {1: "M", 2: "L", 3: "Q", 4: "C", 79: "Z"}
    steps = (
        pen[code] + " ".join(f"{v:.1f}" for v in points if code != 79)
        for points, code in path.iter_segments(simplify=False)
    )
    return (
        f'<svg class="formula" role="img" aria-label="{escape(tex)}" width="{width:.1f}" height="{height:.1f}" '
        f'viewBox="{left:.1f} {-bottom - height:.1f} {width:.1f} {height:.1f}" style="vertical-align: {bottom:.1f}px">'
        f'<path transform="scale(1 -1)" fill="currentColor" d="{"".join(steps)}"/></svg>'
    )


def _inline(page, node):
    page.body.append(_drawn(node.astext()))
    raise SkipNode


def _displayed(page, node):
    page.body.append(f'<p style="text-align: center">{_drawn(node.astext(), 18)}</p>')
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("drawn", (_inline, None), (_displayed, None))
