"""YAML that several tests of the configuration read, and what is wrong with a text."""

from __future__ import annotations

import pytest

from distopt.config import ConfigError, parse_config

MINIMAL = "name: flights\ntask: distopt.examples.flights:Flights\n"
SOURCE = "configs/flights.yaml"


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, overrides, source=SOURCE)
    return caught.value.problems
