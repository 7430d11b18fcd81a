"""Whether a checkpoint belongs to a run: configurations compared, and the difference put into words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

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
    """Returns the configuration without the keys of `PRIVATE`."""
    return _without(config, "")


def _without(value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        return list(value) if isinstance(value, tuple) else value
    return {key: _without(item, f"{path}{key}.") for key, item in value.items() if f"{path}{key}" not in PRIVATE}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, list(value) if isinstance(value, tuple) else value


def _show(value: Any) -> str:
    return "absent" if value is _MISSING else repr(value)
