"""`SequentialLR` and `ChainedScheduler` from specifications: their inner schedulers are built per optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

Spec: TypeAlias = tuple[Any, Mapping[str, Any]]
"""A scheduler class (or its name in `torch.optim.lr_scheduler`) and its arguments; any iterable form is a pair."""


def composed(constructor: Any, optimizer: torch.optim.Optimizer, kwargs: Mapping[str, Any]) -> Any:
    """Builds a scheduler around `optimizer`, its inner ones first when it has some.

    Args:
        constructor: a scheduler class.
        optimizer: what it schedules.
        kwargs: its arguments; `schedulers`, where it has them, is a list of `Spec`.
    """
    if "schedulers" not in kwargs:
        return constructor(optimizer, **kwargs)
    name = getattr(constructor, "__name__", "scheduler")
    inner = [_built(spec, optimizer, name) for spec in kwargs["schedulers"]]
    if not inner:
        raise ValueError(f"{name}: schedulers is empty, expected a list of (scheduler class, arguments).")
    rest = {k: v for k, v in kwargs.items() if k != "schedulers"}
    if constructor is torch.optim.lr_scheduler.ChainedScheduler:
        return constructor(inner, optimizer=optimizer, **rest)
    return constructor(optimizer, inner, **rest)


def _built(spec: Any, optimizer: torch.optim.Optimizer, outer: str) -> Any:
    if not isinstance(spec, Sequence) or isinstance(spec, str) or len(spec) != 2 or not isinstance(spec[1], Mapping):
        raise ValueError(
            f"{outer}: found {spec!r} among schedulers, expected a pair such as ('ConstantLR', {{'factor': 0.1}})."
        )
    constructor, kwargs = spec
    if isinstance(constructor, str):
        found = getattr(torch.optim.lr_scheduler, constructor, None)
        if found is None:
            raise ValueError(f"{outer}: torch.optim.lr_scheduler has no {constructor!r}.")
        constructor = found
    return composed(constructor, optimizer, kwargs)
