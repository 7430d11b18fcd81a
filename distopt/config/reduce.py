"""How gradients of many workers become one: the options of `DistributedOptimizer`, which are the YAML's `reduce:` too.

This module imports neither torch nor `distopt.reduce`, so that a launcher can check a configuration before any worker
starts.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from distopt.config.base import Positive, Section
from distopt.config.plugins import Reference

Names: TypeAlias = Annotated[tuple[str, ...], Field(strict=False)]
"""A list in the YAML; a tuple here, so that options can be hashed."""


def _check_groups(value: Any) -> Any:
    """Refuses what is neither a number nor lists of names in one sentence, instead of one for each kind."""
    is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    is_lists = isinstance(value, list | tuple) and all(map(_is_names, value))
    if not is_number and not is_lists:
        raise ValueError(f"found {value!r}, expected a number of groups, or lists of names such as [[a, b], [c]]")
    return value


def _is_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


Groups: TypeAlias = Annotated[
    Annotated[int, Field(ge=0)] | Annotated[tuple[Names, ...], Field(strict=False)], BeforeValidator(_check_groups)
]
"""A number of groups, or the names of each group."""


class ReduceOptions(Section):
    """How gradients of many workers become one; the same on all ranks.

    Raises:
        ValueError: A value is out of its range, or two of them exclude each other. The message is one line.

    Example:
        >>> ReduceOptions(bucket_mib=8, compression="bf16").compression
        'bf16'
        >>> ReduceOptions(bucket_mb=8)
        Traceback (most recent call last):
            ...
        ValueError: bucket_mb: unknown option of ReduceOptions. Did you mean bucket_mib?
    """

    op: Literal["average", "sum", "adasum"] = "average"
    """What becomes of the workers' gradients: their `average` over the active workers, their `sum` (as many times as
    large as there are workers, for parameters of sharded plates too), or `adasum`, a combination between the two."""
    compression: Literal["none", "fp16", "bf16", "powersgd"] | Reference = "none"
    """How gradients are sent: as they are, in 16 bits, or as matrices of low rank with error feedback. `module:Name`
    names a `distopt.reduce.CommHook` of your own."""
    power_sgd_rank: Annotated[int, Field(ge=1)] = 2
    """Rank of the matrices that `powersgd` sends; a higher rank is more accurate and slower."""
    bucket_mib: Positive = 25.0
    """Size in MiB of the buffers that are reduced one at a time; a larger parameter has a buffer for itself."""
    groups: Groups = ()
    """Names of parameters that share a buffer, by group, or a number of groups; the others are packed by size."""
    gradient_predivide_factor: Positive = 1.0
    """Gradients are divided by this before they are summed and multiplied by it afterwards, for `average`."""
    sparse_as_dense: bool = False
    """Whether sparse gradients are made dense before they are sent."""
    overlap: bool = False
    """Whether reductions start during the backward pass. It must run equally often before each step."""
    backward_passes_per_step: Annotated[int, Field(ge=1)] = 1
    """Calls of the optimizer whose gradients are added up before one reduction and step."""
    drift_every_steps: Annotated[int, Field(ge=0)] = 0
    """Steps between two comparisons of the workers' parameters and optimizer states, bit by bit; 0 never compares."""

    if not TYPE_CHECKING:

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise ValueError("; ".join(_mistakes(type(self), error))) from None

        # As RootModel of pydantic says of its constructor: fields of this type are validated without calling it, so
        # that the YAML's errors keep the key of each value.
        __init__.__pydantic_base_init__ = True

    @model_validator(mode="after")
    def _options_go_together(self) -> ReduceOptions:
        if self.gradient_predivide_factor != 1.0 and self.op != "average":
            raise ValueError(
                f"gradient_predivide_factor={self.gradient_predivide_factor:g} needs op='average', found op={self.op!r}"
            )
        if self.op == "adasum" and self.compression != "none":
            raise ValueError(f"op='adasum' needs compression='none', found compression={self.compression!r}")

        # What is sent during backward must be final, and must not depend on what was received.
        if self.overlap and self.backward_passes_per_step > 1:
            raise ValueError(
                "overlap=True reduces in each call of the optimizer, so it needs backward_passes_per_step=1, found "
                f"{self.backward_passes_per_step}"
            )
        if self.overlap and (self.op == "adasum" or self.compression == "powersgd"):
            cause = "op='adasum'" if self.op == "adasum" else "compression='powersgd'"
            raise ValueError(f"{cause} sends several messages after the backward pass, so it needs overlap=False")
        return self


class ReduceConfig(ReduceOptions):
    """How gradients of many workers become one, and the library that sends them."""

    backend: Literal["auto", "single", "torch_dist", "horovod", "mpi"] | Reference = "auto"
    """The library that sends them; `auto` takes the one that the platform's launcher belongs to, mostly `torch_dist`;
    `module:Name` takes a subclass of `distopt.backends.Backend` of your own."""
    timeout_s: Positive = 300.0
    """Seconds that a rank waits for the others before it ends with an error naming them."""


def _mistakes(options: type[Section], error: ValidationError) -> list[str]:
    """Returns each mistake as `name=value: what is wrong with it`."""
    mistakes: dict[str, list[str]] = {}
    for detail in error.errors():
        name = str(detail["loc"][0]) if detail["loc"] else ""

        if detail["type"] == "value_error":
            mistakes[name] = [f"{name}: {detail['ctx']['error']}" if name else str(detail["ctx"]["error"])]
        elif detail["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, options.model_fields, 1)
            hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(options.model_fields)}."
            mistakes[name] = [f"{name}: unknown option of {options.__name__}. {hint}"]
        else:
            # A union reports an error for each of its members.
            is_reference = detail["type"] == "string_pattern_mismatch"
            expected = "module:Name" if is_reference else detail["msg"].removeprefix("Input should be ")
            mistakes.setdefault(name, [f"{name}={detail['input']!r} should be "]).append(expected)

    return [first + " or ".join(dict.fromkeys(rest)) for first, *rest in mistakes.values()]
