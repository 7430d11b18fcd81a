"""Where two configurations differ."""

from __future__ import annotations

import pytest

from distopt.config import compare
from distopt.config.compare import ABSENT, comparable, differences


def test_differences_are_named_by_dotted_keys_in_order_with_both_values():
    old = {"a": {"b": 1, "c": [1, 2]}, "only old": 1, "same": {"x": None}}
    new = {"a": {"b": 1, "c": [1, 3]}, "only new": 2, "same": {"x": None}}
    assert list(differences(old, new)) == [
        ("a.c", [1, 2], [1, 3]),
        ("only old", 1, ABSENT),
        ("only new", ABSENT, 2),
    ]
    assert repr(ABSENT) == "absent"


def test_ignored_keys_are_ignored_with_all_below_them_and_nothing_else():
    old, new = {"a": {"b": 1, "bc": 1}, "ab": 1}, {"a": {"b": {"d": 2}, "bc": 2}, "ab": 2}
    assert [key for key, _, _ in differences(old, new, ignore=["a.b"])] == ["a.bc", "ab"]
    assert [key for key, _, _ in differences(old, new, ignore=["a"])] == ["ab"]


def test_section_that_became_a_value_differs_as_a_whole():
    assert list(differences({"a": {"b": 1}}, {"a": None})) == [("a", {"b": 1}, None)]


def test_config_of_an_older_version_is_comparable_with_one_of_today():
    old = {"reduce": {"op": "sum"}, "seed": 1}
    today = {"reduce": {"op": "sum", "groups": [], "backward_passes_per_step": 1}, "seed": 1}
    changed = {"reduce": {"op": "sum", "groups": [], "backward_passes_per_step": 4}, "seed": 1}
    assert list(differences(comparable(old), comparable(today))) == []
    assert list(differences(comparable(old), comparable(changed))) == [("reduce.backward_passes_per_step", ABSENT, 4)]
    assert today["reduce"]["groups"] == []  # it is a copy that lost the key


@pytest.mark.parametrize("key", ["later", "optim.later", "optim.clip.later"])
def test_key_that_came_later_may_stand_at_any_depth(key, monkeypatch):
    monkeypatch.setattr(compare, "ADDED_LATER", {key: 1})
    old = {"seed": 7, "optim": {"clip": {"clip_norm": 2.0}}}

    def today(value):
        config = {"seed": 7, "optim": {"clip": {"clip_norm": 2.0}}}
        section = config
        for name in key.split(".")[:-1]:
            section = section[name]
        section["later"] = value
        return config

    assert comparable(today(1)) == comparable(old) == old
    assert list(differences(comparable(old), comparable(today(2)))) == [(key, ABSENT, 2)]


def test_what_is_no_config_is_returned_as_it_is():
    assert comparable(None) is None and comparable([1]) == [1] and comparable({"reduce": 3}) == {"reduce": 3}
