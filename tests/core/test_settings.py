"""Settings are written once: their records, their checks, and what an error says."""

import math
import subprocess
import sys
from dataclasses import MISSING, dataclass, replace

import numpy as np
import pytest

from tractkit.core.settings import check_settings, setting, settings_of


@dataclass(frozen=True)
class Made:
    size: float = setting(help="how large", unit="mm", above=0)
    share: float = setting(0.5, at_least=0, at_most=1, live="from the next batch")
    count: int | None = setting(None, above=0, live="")
    on: bool = setting(False)
    kind: str = setting("a", choices=("a", "b", "c"))
    name: str | None = setting(None, also=("title",))
    objects: list[int] | str = setting("any")

    def __post_init__(self):
        check_settings(self)


def test_records_say_what_the_fields_say():
    found = settings_of(Made)
    assert list(found) == ["size", "share", "count", "on", "kind", "name", "objects"]
    assert found == settings_of(Made(1.0))
    assert found["size"].required and found["size"].default is MISSING and not found["share"].required
    assert (found["size"].help, found["size"].unit, found["share"].live, found["count"].live) == (
        "how large",
        "mm",
        "from the next batch",
        "",
    )
    assert found["name"].also == ("title",) and found["on"].live is None
    assert [s.wanted for s in found.values()] == [
        "a positive number",
        "a number in [0, 1]",
        "a positive whole number or None",
        "True or False",
        "'a', 'b' or 'c'",
        "text or None",
        "text",
    ]


@pytest.mark.parametrize(
    "wrong, text",
    [
        ({"size": 0}, "size must be positive, not 0"),
        ({"size": -2.5}, "size must be positive, not -2.5"),
        ({"size": math.nan}, "size must be positive, not nan"),
        ({"size": None}, "size must be a positive number, not None"),
        ({"size": True}, "size must be a positive number, not True"),
        ({"share": 1.5}, r"share must be in \[0, 1\], not 1.5"),
        ({"share": "half"}, r"share must be a number in \[0, 1\], not 'half'"),
        ({"count": 2.5}, "count must be a positive whole number or None, not 2.5"),
        ({"count": 0}, "count must be positive, not 0"),
        ({"on": "yes"}, "on must be True or False, not 'yes'"),
        ({"kind": "d"}, "kind must be 'a', 'b' or 'c', not 'd'"),
        ({"name": 3}, "name must be text or None, not 3"),
    ],
)
def test_an_error_names_the_setting_and_what_it_must_be(wrong, text):
    for make in (lambda: Made(**{"size": 1} | wrong), lambda: replace(Made(1), **wrong)):
        with pytest.raises(ValueError, match=f"^{text}$"):
            make()


@pytest.mark.parametrize(
    "right",
    [
        {"size": 1},
        {"size": np.float32(2)},
        {"size": np.int64(2)},
        {"size": math.inf},
        {"count": np.int16(3)},
        {"count": 3.0},
        {"count": None},
        {"on": 1},
        {"on": np.True_},
        {"share": 0},
        {"share": 1},
        {"objects": [1]},
        {"objects": 5},
    ],
)
def test_what_is_meant_is_taken(right):
    assert Made(**{"size": 1} | right)


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("count", 0, "count must be a positive whole number or None, not 0"),
        ("count", math.inf, "count must be a positive whole number or None, not inf"),
        ("size", math.nan, "size must be a positive number, not nan"),
        ("size", -1, "size must be a positive number, not -1"),
        ("share", "a lot", r"share must be a number in \[0, 1\], not 'a lot'"),
    ],
)
def test_a_change_is_checked_with_all_that_it_must_be(name, value, text):
    with pytest.raises(ValueError, match=f"^{text}$"):
        settings_of(Made)[name].check(value)
    settings_of(Made)["count"].check(None)
    settings_of(Made)["share"].check(0.25)


def test_settings_load_no_torch():
    code = "import sys, tractkit.core.settings, tractkit.training.settings; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
