"""Filters of runs: what they choose, and that whatever is written is an answer or a ValueError, and never executed."""

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tractkit.runs.filters import filter_runs
from tractkit.runs.listing import RunFacts
from tractkit.runs.notes import RunNotes


def run(name, best=0.5, status="finished", notes=RunNotes(), **settings):  # noqa: B008  # frozen
    return RunFacts(name, Path(name), status, best=best, seconds=7200, settings=settings, notes=notes)


RUNS = [
    run("a", .3, notes=RunNotes("good", ("base", "paper")),
        **{"trainer.learning_rate": 1e-4, "model.class": "Learn2Track", "sampler.rng": 1, "loader.rng": 5,
           "trainer.amp": None}),
    run("b-2", .2, **{"trainer.learning_rate": [1e-2, 1e-5], "model.class": "Other", "sampler.rng": 2, "loader.rng": 5,
                      "trainer.amp": "bf16"}),
    run("c", math.nan, "failed", **{"trainer.learning_rate": 1e-3, "model.class": "Learn2Track", "sampler.rng": 3,
                                    "loader.rng": 5, "trainer.compile": True}),
    RunFacts("d", Path("d"), "no run"),
]


@pytest.mark.parametrize(("where", "names"), [
    ("", "a b-2 c d"), ("lr < 1e-3", "a"), ("lr <= 1e-3 and model == Learn2Track", "a c"),
    ("learning_rate > -1", "a b-2 c"),
    ("trainer.learning_rate < .1", "a b-2 c"), ("0.2 < best <= .3", "a"), ("not best < 1", "c d"), ("best == None", ""),
    ("sampler.rng in [1, 3]", "a c"), ("sampler.rng not in (1, 3)", "b-2"), ("amp == None", "a c d"),
    ("amp != None", "b-2"),
    ("compile", "c"), ("status == failed or tags == x", "c"), ("'base' in tags", "a"), ("base in tag", "a"),
    ("time > 1", "a b-2 c"),
    ("'B-' in run", "b-2"), ("name == 'b-2'", "b-2"), ("paper", "a"), ("b-2", "b-2"),
    ("lr < Learn2Track or name == a", None),
    ("lr < '1'", ""), ("status in [failed, 'no run']", "c d"),
])
def test_what_filters_choose(where, names):
    if names is None:
        with pytest.raises(ValueError, match="no run has Learn2Track"):
            filter_runs(RUNS, where)
    else:
        assert [r.name for r in filter_runs(RUNS, where)] == names.split()


@pytest.mark.parametrize(("where", "words"), [
    ("lerning_rate < 1", "did you mean learning_rate"), ("rng == 1", "sampler.rng or loader.rng"),
    ("lr = 3", "write =="),
    ("lr <", "no condition"), ("(" * 900 + "lr", "no condition"), ("lr < 1" * 500, "at most 1,000"),
    ("open('x') == 1", "cannot be used"), ("[x for x in name]", "cannot be used"), ("lr is None", "cannot be used"),
    ("lr.__class__ == 1", "no run has"), ("(lambda: 1)() == 1", "cannot be used"),
    ("lr < 10 ** 9 ** 9", "cannot be used"),
    ("not " * 240 + "compile == 1 + 1", "cannot be used"),
])
def test_what_is_no_filter_is_refused_with_what_to_write(where, words):
    with pytest.raises(ValueError, match=words):
        filter_runs(RUNS, where)


_WORDS = st.sampled_from(["lr", "best", "name", "not", "and", "or", "in", "<", "==", "!=", "(", ")", "[", "]", ",",
                          "1e-3", "'a'", "None", "True", "-", "tags", "model", ".", "lambda", ":", "if", "else", "*",
                          "rng", "\x00", "…"])


@given(st.lists(_WORDS, max_size=9))
@settings(max_examples=300, deadline=None)
def test_whatever_is_written_gives_runs_or_a_value_error(words):
    try:
        found = filter_runs(RUNS, " ".join(words))
    except ValueError:
        return
    assert all(r in RUNS for r in found)
