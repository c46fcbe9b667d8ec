"""The table of runs in a page of its own: no JupyterLab, no kernel, a model that only keeps what it is told."""

import json

import pytest
from lab import PICTURES

from tractkit.lab.run_browser import _Table

pytestmark = pytest.mark.browser

PAGE = """<!DOCTYPE html><html><head><style>%s body { margin: 0 } </style></head><body>
<div id="here"></div><script type="module">
%s
const listeners = {}, state = %s;
window.sent = [];
window.model = { get: (k) => state[k], send: (m) => window.sent.push(m), save_changes: () => {}, off: () => {},
  set: (k, v) => { state[k] = v; (listeners[k] || []).forEach((f) => f()); },
  on: (name, f) => (listeners[name.slice(7)] ||= []).push(f) };
window.end = render({ model: window.model, el: document.getElementById("here") });
</script></body></html>"""


def row(
    name,
    status,
    best,
    rate,
    note="",
    curve="<svg width='84' height='22'><circle r='3' cx='9' cy='9' fill='currentColor'/></svg>",
):
    cells = [name, status, "" if best is None else f"{best:.4g}", f"{rate}"]
    return {
        "name": name,
        "status": status,
        "note": note,
        "cells": cells,
        "curve": curve,
        "drawable": bool(curve),
        "sort": {"name": name, "status": status, "best": best, "rate": rate},
    }


ROWS = [
    row("run-10", "finished", 0.25, 0.01),
    row("run-9", "failed", 0.5, 0.001, "OSError: <b>disk</b> full"),
    row("<i>x</i>", "running", 0.125, 0.002),
    row("void", "no run", None, 0, "empty", ""),
]
STATE = {
    "table": {
        "columns": [
            ["name", "run", False],
            ["status", "status", False],
            ["best", "best", True],
            ["rate", "learning_rate", True],
        ],
        "rows": ROWS,
        "below": "4 runs",
    },
    "chosen": ["run-10"],
    "order": ["", False],
    "picture": None,
    "dark": False,
    "colors": ["#2f6fb5"] * 8,
}


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 900, "height": 360})
    script = str(_Table._esm).replace("export default { render };", "")
    page.set_content(PAGE % (_Table._css, script, json.dumps(STATE)))
    yield page
    page.close()


def names(page):
    return page.locator("tbody tr").evaluate_all("rows => rows.map((r) => r.dataset.name)")


def test_a_press_on_a_heading_sorts_and_what_is_missing_stays_last(page):
    page.set_default_timeout(5_000)
    assert names(page) == ["run-10", "run-9", "<i>x</i>", "void"]
    heading = page.get_by_role("button", name="best")
    heading.click()
    assert names(page) == ["<i>x</i>", "run-10", "run-9", "void"]
    heading.press("Enter")  # it has the focus still
    assert names(page) == ["run-9", "run-10", "<i>x</i>", "void"]
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("best")
    page.get_by_role("button", name="run", exact=True).click()
    assert names(page)[1:3] == ["run-9", "run-10"]  # as people count


def test_names_are_text_and_buttons_send_what_they_say(page):
    assert page.locator("tbody i, tbody b").count() == 0 and page.get_by_text("OSError: <b>disk</b> full").is_visible()
    page.get_by_role("button", name="open").nth(2).click()
    page.get_by_role("button", name="refresh").click()
    assert page.evaluate("sent") == [{"verb": "open", "name": "<i>x</i>"}, {"verb": "refresh"}]
    assert page.locator("tr[data-name=void]").get_by_role("button").count() == 0
    page.get_by_label("show the curves of run-9").check()
    assert page.evaluate("model.get('chosen')") == ["run-10", "run-9"]
    page.get_by_label("show the curves of run-10").uncheck()
    assert page.evaluate("model.get('chosen')") == ["run-9"] and page.locator("input:checked").count() == 1


def test_the_theme_of_the_page_is_told(page):
    page.screenshot(path=PICTURES / "runs-light.png")
    page.evaluate(
        "document.body.style.cssText = '--jp-layout-color0: #111; --jp-ui-font-color1: #ddd; "
        "--jp-ui-font-color2: #aaa; "
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        ""
        "background: #111'"
    )
    page.wait_for_function("model.get('dark') === true")
    page.screenshot(path=PICTURES / "runs-dark.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= 900
