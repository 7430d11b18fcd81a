"""Constraints as JSON, so that ranks can compare them and build what they lack without unpickling anything."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from distopt.backends import Json


def describe_constraint(constraint: Constraint) -> Json:
    """Returns a constraint as JSON: its class and the arguments of its constructor.

    Example:
        >>> describe_constraint(torch.distributions.constraints.interval(0.0, 2.0))["lower_bound"]
        0.0
    """
    kind = type(constraint)
    names = [] if kind.__init__ is object.__init__ else list(inspect.signature(kind.__init__).parameters)[1:]
    described = {name: _describe(getattr(constraint, name, None)) for name in names}
    return {"class": f"{kind.__module__}:{kind.__qualname__}", **described}


def build_constraint(description: Json) -> Constraint:
    """Returns the constraint that was described.

    Only classes of modules that this process has imported itself are looked at, and only constraints are made.

    Raises:
        ValueError: This process does not know the class.
    """
    module, _, name = str(description["class"]).partition(":")
    kind: Any = sys.modules.get(module)
    for part in name.split("."):
        kind = getattr(kind, part, None)
    if not (inspect.isclass(kind) and issubclass(kind, Constraint)):
        raise ValueError(f"the constraint class {description['class']} is not known to this process")
    built = kind(**{key: _build(value) for key, value in description.items() if key != "class"})
    assert isinstance(built, Constraint)
    return built


def _describe(value: Any) -> Json:
    if isinstance(value, Constraint):
        return describe_constraint(value)
    if isinstance(value, Tensor):
        return {"tensor": value.detach().cpu().tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        return [_describe(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def _build(value: Json) -> Any:
    if isinstance(value, dict) and "tensor" in value:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
    if isinstance(value, dict):
        return build_constraint(value)
    return [_build(item) for item in value] if isinstance(value, list) else value
