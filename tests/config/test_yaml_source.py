"""Documents that are hostile or merely unusual: refused before anything is built of them, or read as YAML 1.2 says."""

from __future__ import annotations

import pytest

from distopt.config.yaml_source import MAX_ALIASES, MAX_BYTES, MAX_DEPTH, UnsafeYAML, parse_yaml
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
        ("1:30:00", "1:30:00"),  # YAML 1.1 counts it in base 60: 5400
        ("-1:30.5", "-1:30.5"),
        ("yes", True),
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
    import yaml

    assert yaml.safe_load("1e-3") == "1e-3"
    assert str(type(yaml.safe_load("2013-01-01"))) == "<class 'datetime.date'>"
