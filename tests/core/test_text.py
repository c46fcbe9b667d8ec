"""Names, numbers and YAML as people write them."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tractkit.core.text import format_bytes, format_duration, nearest_name, parse_json, parse_yaml


@pytest.mark.parametrize(
    ("word", "nearest"), [("Standardisation", "standardization"), ("FILES", "files"), ("qqq", None)]
)
def test_nearest_name_is_one_that_is_known_or_none(word, nearest):
    assert nearest_name(word, ["files", "standardization"]) == nearest
    assert nearest_name(word, []) is None


def test_with_no_cutoff_there_is_always_a_nearest_name():
    assert nearest_name("qqq", ["files"], 0) == "files"


@given(st.floats(0, 1e15))
def test_bytes_have_three_digits_and_a_unit(n):
    value, unit = format_bytes(n).split()
    assert "e" not in value
    scale = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
    assert float(value.replace(",", "")) * scale == pytest.approx(n, rel=.006, abs=.5)


@given(st.floats(0, 1e6))
def test_duration_is_that_of_its_units(seconds):
    words = format_duration(seconds).split()
    found = sum(int(n) * {"h": 3600, "min": 60, "s": 1}[unit] for n, unit in zip(words[::2], words[1::2], strict=True))
    assert abs(found - seconds) <= (.5 if seconds < 599 else 30.5)


def test_yaml_reads_numbers_and_merges():
    assert parse_yaml("a: &x {rate: 1e-3, n: 5}\nb: {<<: *x, n: 6}") == {
        "a": {"rate": .001, "n": 5}, "b": {"rate": .001, "n": 6}}


@pytest.mark.parametrize("text", ["a: 1\na: 2", "a: {b: 1, b: 2}", "[1", "!!python/name:os.system x"])
def test_yaml_refuses_repeated_names_broken_text_and_code(text):
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)


def laughs(levels: int) -> str:
    return "a0: &a0 [ha]\n" + "".join(
        f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(levels))


@pytest.mark.parametrize("text", [
    laughs(9), "a: &a [1]\nb: *a", "a: &a [*a]", "a: &a {<<: *a}",
    "a: &a {x: 1}\nb: &b {p: {<<: *a}, q: {<<: *a}}\nc: {<<: *b}",  # a merge of what has merges
    "a: &a {x: 1}\nb: {<<: [*a, *a]}", "a: &a {x: 1}\n" + "".join(f"b{i}: {{<<: *a}}\n" for i in range(200)),
])
def test_yaml_that_stands_for_more_than_it_is(text):
    with pytest.raises(yaml.YAMLError, match=r"line \d+: an alias \(\*\w+\)"):
        parse_yaml(text)


@pytest.mark.parametrize("text", ["[" * 50_000, "{a: " * 50_000, "- " * 50_000, "? " * 20_000])
def test_yaml_of_many_levels(text):
    """They end the process in the parser."""
    with pytest.raises(yaml.YAMLError, match="more than 50 levels"):
        parse_yaml(text)


@pytest.mark.parametrize("text", ["a: 2020-99-99", f"a: {'9' * 5000}", "a: " + "x" * 2**22])
def test_yaml_of_values_that_cannot_be(text):
    with pytest.raises(yaml.YAMLError, match="cannot be read|characters"):
        parse_yaml(text)


def test_json_of_many_levels():
    with pytest.raises(ValueError, match="too many"):
        parse_json("[" * 100_000)
