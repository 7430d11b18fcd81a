"""Code that a configuration names: found, or refused with what to write instead; imported only where it is trusted."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod

import pytest
from pydantic import TypeAdapter, ValidationError

from distopt.config import ConfigError
from distopt.config.plugins import TRUSTED_VARIABLE, Reference, is_reference, load_reference, load_subclass

CHECK = TypeAdapter(Reference)


class Plugin:
    """What a user would bring."""


CONSTANT = 3


def test_reference_has_a_module_and_a_plain_name_has_none():
    assert is_reference("mypackage.losses:MyLoss")
    assert not is_reference("ClippedAdam")


def test_class_is_imported():
    assert load_reference(f"{__name__}:Plugin", "train.loss") is Plugin


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (
            "no_such:Loss",
            r"importing no_such failed: No module named 'no_such'; check the spelling, that it is installed",
        ),
        ("tests.no_such:Loss", r"No module named 'tests.no_such'; check the spelling"),
        (f"{__name__}:Plugn", r"tests\.config\.test_plugins has no Plugn; did you mean Plugin\?"),
        (f"{__name__}:Zzzzz", r"has no Zzzzz; it has: .*Plugin"),
        (f"{__name__}:CONSTANT", r"which is of type int, expected a class or a function"),
    ],
)
def test_reference_to_nothing_is_answered_with_key_and_fix(reference, message):
    with pytest.raises(ConfigError, match=f"^train.loss: found {reference}, .*{message}"):
        load_reference(reference, "train.loss")


def test_module_that_lacks_another_is_not_said_to_be_missing(tmp_path, monkeypatch):
    (tmp_path / "needy_plugin.py").write_text("import no_such_library")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ConfigError, match="importing needy_plugin failed.*install no_such_library where the workers run"
    ):
        load_reference("needy_plugin:Loss", "train.loss")


def test_defect_in_the_module_is_raised_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "broken_plugin.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError):
        load_reference("broken_plugin:Loss", "train.loss")


@pytest.mark.parametrize("reference", ["os:system", "builtins:eval", "importlib.util:find_spec"])
def test_standard_library_is_refused_and_not_imported(reference):
    with pytest.raises(ValidationError, match="belongs to Python's standard library"):
        CHECK.validate_python(reference)


@pytest.mark.parametrize("reference", ["a", "a:", ":b", "a.b", "a:b.c", "a b:c", "a:b()", "a:_b", "../a:b", "a:b\n"])
def test_text_that_is_no_reference_is_refused(reference):
    with pytest.raises(ValidationError, match="should match pattern"):
        CHECK.validate_python(reference)


@pytest.mark.parametrize(
    ("reference", "trusted"),
    [("mine:A", True), ("mine.sub.module:A", True), ("also:A", True), ("minemine:A", False), ("theirs:A", False)],
)
def test_only_trusted_packages_where_some_are_declared(reference, trusted, monkeypatch):
    monkeypatch.setenv(TRUSTED_VARIABLE, "mine, also")
    if trusted:
        assert CHECK.validate_python(reference) == reference
    else:
        with pytest.raises(
            ValidationError, match=f"found {reference}, but your {TRUSTED_VARIABLE} allows only code of mine"
        ):
            CHECK.validate_python(reference)
    assert not {"mine", "also", "theirs"} & set(sys.modules)


class Contract(ABC):
    @abstractmethod
    def needed(self) -> None: ...


class Whole(Contract):
    def needed(self) -> None: ...


def test_subclass_of_a_contract_is_imported():
    assert load_subclass(f"{__name__}:Whole", "train.loss", Contract) is Whole


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Plugin", r"found \S+:Plugin, expected a subclass of tests.config.test_plugins.Contract"),
        ("load_reference", r"found \S+:load_reference, expected a subclass of"),
        ("Contract", r"\S+:Contract lacks methods that tests.config.test_plugins.Contract requires: needed"),
        ("Contrakt", r"found \S+:Contrakt, but \S+ has no Contrakt; did you mean Contract\?"),
    ],
)
def test_class_that_does_not_fulfil_a_contract_is_answered_with_it(name, message):
    with pytest.raises(ConfigError, match=f"^train.loss: {message}"):
        load_subclass(f"{__name__}:{name}", "train.loss", Contract)
