"""Constraints as data: every one of torch's and Pyro's is described and built again, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pyro.distributions import constraints
from torch.distributions.constraints import Constraint, is_dependent

from distopt import constraints as described
from distopt.constraints import (
    ConstraintError,
    build_constraint,
    describe_constraint,
    known_constraints,
    register_constraint,
)

EXAMPLES = [
    *(each for each in vars(constraints).values() if isinstance(each, Constraint) and not is_dependent(each)),
    constraints.interval(-1.0, 2.0),
    constraints.greater_than(torch.tensor([1.0, 2.0])),
    constraints.integer_interval(0, 3),
    constraints.independent(constraints.positive, 2),
    constraints.cat([constraints.real, constraints.interval(0.0, 1.0)], dim=-1, lengths=[1, 2]),
]


@pytest.mark.parametrize("constraint", EXAMPLES, ids=repr)
def test_description_builds_an_equal_constraint(constraint: Constraint) -> None:
    description = describe_constraint(constraint)
    built = build_constraint(description)
    assert type(built) is type(constraint)
    assert repr(describe_constraint(built)) == repr(description)


def test_argument_tensors_are_described_without_their_graph() -> None:
    bound = torch.ones(2, requires_grad=True)
    assert not describe_constraint(constraints.greater_than(bound))["lower_bound"].requires_grad


@pytest.mark.parametrize(
    "description", ["os.system", "Real", {"name": "NoSuch"}, {"nome": "Real"}, None, 3, {"name": ["Real"]}]
)
def test_what_was_not_described_here_is_not_built(description: Any) -> None:
    with pytest.raises(ConstraintError, match="unknown constraint"):
        build_constraint(description)


def test_description_with_wrong_arguments_is_an_error() -> None:
    with pytest.raises(ConstraintError, match=r"Interval with \['lower_bound'\]"):
        build_constraint({"name": "Interval", "lower_bound": 0.0})


class Rounded(Constraint):
    """A user's own."""

    def __init__(self, digits: Any) -> None:
        self.digits = digits


def test_class_of_the_user_is_known_once_it_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(described, "_KNOWN", dict(described._KNOWN))
    with pytest.raises(ConstraintError, match="Rounded is none of torch's or Pyro's.*register_constraint"):
        describe_constraint(Rounded(2))
    assert register_constraint(Rounded) is Rounded
    assert Rounded in known_constraints()
    assert build_constraint(describe_constraint(Rounded(2))).digits == 2
    with pytest.raises(ConstraintError, match="a constraint's argument is 'two'"):
        describe_constraint(Rounded("two"))

    class Interval(Constraint):
        pass

    with pytest.raises(ValueError, match="a constraint named Interval is known already"):
        register_constraint(Interval)
