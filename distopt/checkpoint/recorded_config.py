"""What of a configuration is kept with a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import PurePath
from typing import Any

from distopt.checkpoint.errors import CheckpointError

PRIVATE = ("launch.env",)
"""Keys that are never written down: environments hold secrets."""


def without_private(config: Any) -> Any:
    """Returns the configuration as JSON has it, without the keys of `PRIVATE`.

    Raises:
        CheckpointError: for a value that is neither a number, a text, a path nor made of these, naming its key.

    Example:
        >>> without_private({"clip": float("inf"), "sizes": ((1, 2), 3), "launch": {"env": {"TOKEN": "secret"}}})
        {'clip': 'inf', 'sizes': [[1, 2], 3], 'launch': {}}
    """
    return _plain(config, "config")


def _plain(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        kept = ((key, f"{path}.{key}") for key in value if f"{path}.{key}".removeprefix("config.") not in PRIVATE)
        return {str(key): _plain(value[key], below) for key, below in kept}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else repr(float(value))
    if isinstance(value, PurePath):
        return str(value)
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    raise CheckpointError(f"{path}: a {name} cannot be kept with a checkpoint; give numbers, texts, lists and dicts.")
