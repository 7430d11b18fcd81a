"""Constraints in checkpoints: descriptions, with errors that say where in the checkpoint."""

from __future__ import annotations

from typing import Any

from torch.distributions.constraints import Constraint

from distopt import constraints
from distopt.checkpoint.errors import CheckpointError, CorruptCheckpointError
from distopt.constraints import ConstraintError, known_constraints, register_constraint

__all__ = ["build_constraint", "describe_constraint", "known_constraints", "register_constraint"]


def describe_constraint(constraint: Constraint, where: str) -> dict[str, Any]:
    """Returns the constraint as a nested dict of names, numbers and tensors.

    Raises:
        CheckpointError: for a class that is not known, naming the parameter.
    """
    try:
        return constraints.describe_constraint(constraint)
    except ConstraintError as error:
        raise CheckpointError(f"{where}: {error}") from error


def build_constraint(description: Any, where: str) -> Constraint:
    """Returns the constraint that was described.

    Raises:
        CorruptCheckpointError: for anything that `describe_constraint` does not write.
    """
    try:
        return constraints.build_constraint(description)
    except ConstraintError as error:
        raise CorruptCheckpointError(f"{where}: {error}") from error
