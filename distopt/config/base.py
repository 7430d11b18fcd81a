"""What all sections of a configuration have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A mapping in the YAML: unknown keys are refused, values not converted (`"3"` is no number), frozen.

    The docstring below each field is its description in `distopt config schema`.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)
