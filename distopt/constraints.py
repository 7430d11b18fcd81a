"""Constraints of parameters as descriptions, for checkpoints and other ranks, since a pickled constraint would be code.

Every constraint class of `torch.distributions.constraints` and `pyro.distributions.constraints` is known by its name,
with the arguments of its constructor, which these classes keep under the same names. A description is data: what reads
one can build nothing but these classes and those that the user has registered.
"""

from __future__ import annotations

import inspect
from typing import Any

import pyro.distributions.constraints as pyro_constraints
import torch.distributions.constraints as torch_constraints
from torch import Tensor
from torch.distributions.constraints import Constraint

# Constraints that depend on other arguments of a distribution (`dependent`) describe no parameter.
_KNOWN: dict[str, type[Constraint]] = {
    name.lstrip("_"): value
    for module in (torch_constraints, pyro_constraints)
    for name, value in vars(module).items()
    if inspect.isclass(value) and issubclass(value, Constraint) and value is not Constraint
    if not issubclass(value, torch_constraints._Dependent)
}


class ConstraintError(ValueError):
    """A constraint that has no description, or a description of none; the message has the edit."""


def register_constraint(kind: type[Constraint]) -> type[Constraint]:
    """Lets parameters of your own constraint class be saved, and be created on ranks that lack them; a decorator.

    Its constructor's arguments must be numbers, tensors or constraints, kept in attributes of the same names.

    Raises:
        ValueError: Another class has that name.
    """
    name = kind.__name__.lstrip("_")
    if _KNOWN.setdefault(name, kind) is not kind:
        raise ValueError(f"a constraint named {name} is known already: {_KNOWN[name]}")
    return kind


def known_constraints() -> list[type[Constraint]]:
    """Returns the classes that have a description: Pyro's, torch's and the registered ones."""
    return list(_KNOWN.values())


def describe_constraint(constraint: Constraint) -> dict[str, Any]:
    """Returns the constraint as a nested dict of names, numbers and tensors.

    Raises:
        ConstraintError: Its class is not known, or an argument is neither a number, a tensor nor a constraint.

    Example:
        >>> describe_constraint(torch_constraints.interval(0.0, 2.0))
        {'name': 'Interval', 'lower_bound': 0.0, 'upper_bound': 2.0}
    """
    # The class itself is compared and not its name alone: another class of the same name may mean something else.
    kind = type(constraint)
    name = kind.__name__.lstrip("_")
    if _KNOWN.get(name) is not kind:
        raise ConstraintError(
            f"the constraint {kind.__module__}.{kind.__qualname__} is none of torch's or Pyro's, so it has no "
            "description. Add `distopt.checkpoint.register_constraint` to its class."
        )
    arguments = {argument: _describe_argument(getattr(constraint, argument)) for argument in _argument_names(kind)}
    return {"name": name} | arguments


def build_constraint(description: Any) -> Constraint:
    """Returns the constraint that was described.

    Raises:
        ConstraintError: It is nothing that `describe_constraint` writes here.
    """
    name = description.get("name") if isinstance(description, dict) else description
    if not isinstance(description, dict) or not isinstance(name, str) or name not in _KNOWN:
        raise ConstraintError(f"unknown constraint {name!r}. Is its register_constraint missing here?")
    arguments = {key: _build_argument(value) for key, value in description.items() if key != "name"}
    try:
        return _KNOWN[name](**arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConstraintError(f"{name} with {sorted(arguments)}: {error}.") from error


def _argument_names(kind: type[Constraint]) -> list[str]:
    # Arguments and attributes have the same names in all of torch's and Pyro's classes, though nothing there says so;
    # the tests build each of them from its description.
    if kind.__init__ is object.__init__:
        return []
    return [name for name in inspect.signature(kind.__init__).parameters if name != "self"]


def _describe_argument(value: Any) -> Any:
    if isinstance(value, Constraint):
        return describe_constraint(value)
    if isinstance(value, (list, tuple)):
        return [_describe_argument(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, Tensor)):
        return value.detach() if isinstance(value, Tensor) else value
    raise ConstraintError(f"a constraint's argument is {value!r}; numbers, tensors and constraints can be described.")


def _build_argument(value: Any) -> Any:
    if isinstance(value, dict):
        return build_constraint(value)
    if isinstance(value, list):
        return [_build_argument(item) for item in value]
    return value
