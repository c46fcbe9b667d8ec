"""Write README.md from nbs/index.ipynb: its text as it is, its code as fenced blocks, no outputs.

Relative links in the notebook start at nbs/; in README.md they start at the root."""

import json
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\(|\b(?:src|href)=\")([^)\"\s#][^)\"\s]*)")
DIRECTIVE = re.compile(r"^#\|.*\n?", re.MULTILINE)


def from_root(link: re.Match) -> str:
    """A link as seen from the root of the checkout."""
    opening, target = link.groups()
    return opening + (target if ":" in target else posixpath.normpath(posixpath.join("nbs", target)))


def as_markdown(cell: dict) -> str:
    """One cell of the notebook as a block of README.md; empty for a cell that is only directives."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return LINK.sub(from_root, source).strip()
    if cell["cell_type"] != "code" or re.search(r"^#\|\s*(hide|default_exp)\b", source, re.MULTILINE):
        return ""
    code = DIRECTIVE.sub("", source).strip()
    if code.startswith("%%"):  # a cell for the shell
        return "```bash\n" + code.partition("\n")[2].strip() + "\n```"
    return f"```python\n{code}\n```" if code else ""


def readme(root: Path = ROOT) -> str:
    """The text of README.md."""
    cells = json.loads((root / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    note = "<!-- Written from nbs/index.ipynb by tools/readme.py: edit the notebook. -->"
    return "\n\n".join([note, *filter(None, map(as_markdown, cells))]) + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
