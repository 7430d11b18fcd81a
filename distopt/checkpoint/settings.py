"""Whether a checkpoint belongs to a run: configurations compared, and the difference put into words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral, Real
from pathlib import PurePath
from typing import Any

from distopt.checkpoint.errors import CheckpointError
from distopt.config import MAY_CHANGE

PRIVATE = ("launch.env",)
"""Keys that are never written down: environments hold secrets."""

_MISSING = object()


def differences(saved: Any, now: Any, free: Iterable[str] = MAY_CHANGE) -> list[str]:
    """Returns one line per key that differs, without those at or below a key of `free`.

    Example:
        >>> differences({"optim": {"lr": 0.1}, "log": 1}, {"optim": {"lr": 0.2}, "seed": 1})
        ['optim.lr: 0.1 in the checkpoint, 0.2 now', 'seed: absent in the checkpoint, 1 now']
    """
    old, new = dict(_leaves(saved)), dict(_leaves(now))
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if any(key == prefix or key.startswith(prefix + ".") for prefix in free):
            continue
        before, after = old.get(key, _MISSING), new.get(key, _MISSING)
        if before != after:
            lines.append(f"{key}: {_show(before)} in the checkpoint, {_show(after)} now")
    return lines


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


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _show(value: Any) -> str:
    return "absent" if value is _MISSING else repr(value)
