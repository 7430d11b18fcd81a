"""What all sections of a configuration have in common."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A finite number above 0."""


class Section(BaseModel):
    """A mapping in the YAML: unknown keys are refused, values not converted (`"3"` is no number), frozen.

    The docstring below each field is its description in `distopt config schema`.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)
