"""What all of `distopt.config` rests on: the base of its sections and its error."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Annotated, Any, ClassVar, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A finite number above 0."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message has one line per mistake, which names its key."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems: list[str] = list(problems)


class Section(BaseModel):
    """A mapping in the YAML: unknown keys are refused, values not converted (`"3"` is no number), frozen.

    The docstring below each field is its description in `distopt config schema`.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, ser_json_inf_nan="strings"
    )

    def as_json(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        """Returns the values as JSON holds them, to be recorded and compared.

        Keys are strings; infinity and NaN, which JSON lacks, are the strings `Infinity`, `-Infinity` and `NaN`.

        Args:
            exclude: Keys to leave out.
        """
        values: dict[str, Any] = json.loads(self.model_dump_json(exclude=set(exclude)))
        return values
