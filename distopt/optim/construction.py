"""Torch optimizers made without torch's compiler.

Torch's `add_param_group` and `load_state_dict` import the compiler at their first call, to have it leave them alone:
1.5 s of processor time, half of what a worker needs from its start to its first step. Nothing is compiled there, so
the functions below call what lies behind that wrapper. A class with a method of its own is left as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

from torch.optim import Optimizer


def construct(constructor: Any, params: list[Any], args: Mapping[str, Any]) -> Any:
    """Returns `constructor(params, **args)`.

    Args:
        constructor: A class of torch optimizers, or any callable that returns one.
        params: Tensors or parameter groups.
        args: The other arguments.

    Raises:
        Exception: What the constructor raises.
    """
    if not _is_plain(constructor):
        return constructor(params, **args)

    # Torch's `__init__` calls the method by the object, where an attribute comes before the class's.
    optimizer = constructor.__new__(constructor)
    optimizer.add_param_group = MethodType(inspect.unwrap(Optimizer.add_param_group), optimizer)
    constructor.__init__(optimizer, params, **args)
    del optimizer.add_param_group
    return optimizer


def load_plain_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Does `optimizer.load_state_dict(state)`, hooks included; `optimizer` may be a scheduler, too."""
    _behind_wrapper(optimizer, "load_state_dict")(state)


def plain_state(optimizer: Any) -> dict[str, Any]:
    """Returns `optimizer.state_dict()`, hooks included; `optimizer` may be a scheduler, too."""
    state: dict[str, Any] = _behind_wrapper(optimizer, "state_dict")()
    return state


def _behind_wrapper(optimizer: Any, name: str) -> Callable[..., Any]:
    """Returns a bound method: torch's own without its wrapper, any other as it is."""
    method = getattr(optimizer, name)
    if getattr(method, "__func__", None) is not getattr(Optimizer, name):
        return method  # type: ignore[no-any-return]
    return MethodType(inspect.unwrap(getattr(Optimizer, name)), optimizer)


def _is_plain(constructor: Any) -> bool:
    """Returns whether an object is made as torch's are: by `object.__new__` and an `__init__` that adds the groups."""
    return (
        type(constructor) is type
        and issubclass(constructor, Optimizer)
        and constructor.__new__ is object.__new__
        and constructor.__setattr__ is object.__setattr__
        and constructor.add_param_group is Optimizer.add_param_group
    )
