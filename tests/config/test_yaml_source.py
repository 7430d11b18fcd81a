"""Documents that are hostile or merely unusual: refused before anything is built of them, or read as YAML 1.2 says."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from distopt.config.yaml_source import (
    MAX_ALIASES,
    MAX_BYTES,
    MAX_DEPTH,
    MAX_DIGITS,
    UnsafeYAML,
    format_yaml,
    parse_yaml,
)
from tests.config.sources import problems

BOMB = "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{','.join([f'*a{i}'] * 9)}]\n" for i in range(9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x: !!python/object/apply:os.system ['touch canary']", "could not determine a constructor for the tag"),
        (BOMB, "values once its aliases are written out"),
        ("a: &a [1]\nb: [" + ",".join(["*a"] * 200) + "]", "more than 100 aliases"),
        ("a: &a [*a]", "an alias refers to what contains it"),
        ("[" * 5000, "nested more than 32 levels deep"),
        ("a: " + "x" * 2_000_000, "bytes, no configuration is that long"),
        ("a: \x00", "special characters are not allowed"),
        ("", "found nothing (null), expected a mapping"),
        ("- 1", "found [1] (list), expected a mapping"),
    ],
)
def test_hostile_document_is_refused_before_it_is_built(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in problems(text)[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),  # YAML 1.1 takes it for a string
        ("-2E5", -2e5),
        ("1.5", 1.5),
        ("2013-01-01", "2013-01-01"),  # PyYAML alone makes a date of it
        ("yes", "yes"),  # YAML 1.1 takes it for true
        ("on", "on"),
        ("Off", "Off"),
        ("True", True),
        ("1:30", "1:30"),  # 90 in YAML 1.1
        ("1:30.5", "1:30.5"),
        ("0o17", 15),
        ("0x1F", 31),
        ("0b11", "0b11"),
        ("1_000", 1000),
        ("-0", 0),
        ("1e5", 1e5),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("'1:30'", "1:30"),
        ("=", "="),
        ('"\\ud83d\\ude00"', "\U0001f600"),  # as JSON writes it
        ("1:30:00", "1:30:00"),
        ("-1:30.5", "-1:30.5"),
        ("'1e-3'", "1e-3"),
        ("", None),
        ("{a: &x [1], b: *x}", {"a": [1], "b": [1]}),
        ("{<<: {a: 1, b: 2}, b: 3}", {"a": 1, "b": 3}),
    ],
)
def test_scalars_and_aliases_are_read_as_people_write_them(text, value):
    read = parse_yaml(text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "x" * (MAX_BYTES + 1),
        "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
        "[&a 1" + ", *a" * (MAX_ALIASES + 1) + "]",
    ],
)
def test_limits_are_where_they_are_said_to_be(text):
    with pytest.raises(UnsafeYAML):
        parse_yaml(text)


def test_documents_at_the_limits_are_read():
    assert parse_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert len(parse_yaml("[&a 1" + ", *a" * MAX_ALIASES + "]")) == MAX_ALIASES + 1


def test_parsing_leaves_pyyaml_as_it_was():
    assert yaml.safe_load("1e-3") == "1e-3"
    assert str(type(yaml.safe_load("2013-01-01"))) == "<class 'datetime.date'>"
    assert yaml.safe_load("[yes, 010]") == [True, 8]
    assert yaml.safe_dump("1e-3") == "1e-3\n...\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "seed: 010",
            "line 1, column 7: found 010, which some readers of YAML take for an octal number; write 10, or 0o10",
        ),
        ("seed: -0900", "write -900, or '-0900' for a string"),
        ("seed: " + "9" * (MAX_DIGITS + 1), "found an integer of 1,001 digits, expected at most 1,000"),
        ("seed: 0x" + "f" * 5000, "found an integer of 5,002 digits"),
        ("seed: !!int abc", "found 'abc', expected an integer"),
        ("seed: !!float abc", "found 'abc', expected a number"),
        ("seed: !!bool abc", "found 'abc', expected true or false"),
        ("seed: !!timestamp 2001-01-01", "could not determine a constructor for the tag"),
        ("seed: !!set {a}", "could not determine a constructor for the tag"),
        ("true: 1", "found 'true' as a key, expected a string (in quotes) or an integer"),
        ("1.5: 1", "found '1.5' as a key"),
        ("null: 1", "found 'null' as a key"),
        ("? [a]\n: 1", "found a list or a mapping as a key"),
        ("{1: a, 0x1: b}", "the key '1' appears twice"),
        ("{1: a, '1': b}", "the key '1' appears twice"),
        ('name: "\\ud83d"', "in which half of a surrogate pair is missing"),
    ],
)
def test_value_that_readers_disagree_on_is_refused_with_its_line(text, message):
    assert message in problems(text)[0]


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
NUMBERLIKE = r"[-+]?[0-9.:_]{0,6}([eE][-+]?[0-9]{0,3})?"
LOOKALIKES = st.from_regex(rf"{NUMBERLIKE}|[yYnNoOtTfF~<=!&*]{{1,3}}[a-z]{{0,4}}", fullmatch=True)
KEYS = st.text() | LOOKALIKES | st.integers()
VALUES = st.recursive(
    SCALARS | LOOKALIKES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text() | LOOKALIKES | st.integers(), inner, max_size=4)
    ),
    max_leaves=8,
)


def one_name_each(value: object) -> bool:
    """Returns whether no mapping has two keys that JSON would take for one."""
    if isinstance(value, dict):
        return len(set(map(str, value))) == len(value) and all(map(one_name_each, value.values()))
    return not isinstance(value, list) or all(map(one_name_each, value))


@given(VALUES.filter(one_name_each))
def test_every_value_is_written_so_that_it_is_read_back(value):
    assert repr(parse_yaml(format_yaml(value))) == repr(value)  # repr tells types and NaN


def test_numbers_that_are_meant_as_text_stay_as_they_are_written():
    read = parse_yaml("{args: [1.10, 010, true, 2, x, null, [3]], other: 1.10}", lambda keys: keys[0] == "args")
    assert read == {"args": ["1.10", "010", "true", "2", "x", None, ["3"]], "other": 1.1}
    assert parse_yaml("1.10", lambda keys: keys == ("args", "0"), ("args", "0")) == "1.10"
