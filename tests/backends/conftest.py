"""Each test here starts as a process that no launcher has started, with no backend yet."""

from __future__ import annotations

import pytest

from distopt import backends
from tests.test_launchers import ENVIRONMENTS


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for variables in ENVIRONMENTS.values():
        for variable in variables(0, 1):
            monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(backends, "_current", None)


@pytest.fixture
def started_as(monkeypatch):
    """Gives this process the variables of a launcher."""

    def start(variables: dict[str, str]) -> None:
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)

    return start
