"""Sphinx settings. tools/docs/build.py copies this file beside the pages it gathers."""

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
