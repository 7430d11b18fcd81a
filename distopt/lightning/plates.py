"""Plates that are as large as a batch: a model counts only the rows that it is given, unless somebody scales them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_map

from distopt.optim.distributed.svi_step import preserving_buffers
from distopt.reduce.model_survey import ModelSurvey
from distopt.rng import generators_state, set_generators_state


def unscaled_plates(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], num_rows: int
) -> list[str]:
    """Returns the plates over `num_rows` observations that are not scaled to more than these.

    The mean over W ranks of a likelihood that each counts for its share is 1/W of that of one process. A plate that is
    subsampled, or scaled, says how many rows there are; one that is as large as the share does not.

    Where several plates have that size, the rows of another dimension are as many by chance. Then the model is run on a
    row less, and those count whose size follows; all of them if it cannot be run so, or none follows.

    Args:
        model: Run once or twice; parameters that it makes stay, random generators and buffers are as before.
        args: Its arguments.
        kwargs: Its keyword arguments.
        num_rows: Rows of this rank's share of a batch.
    """
    return _following(model, args, kwargs, num_rows, lambda survey: survey.sizes_of_whole_plates())


def plates_of_rows(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], num_rows: int
) -> list[str]:
    """Returns the plates over observations that `num_rows` rows are in, also those that say how many there are in all.

    Args:
        model: As for `unscaled_plates`.
        args: Its arguments.
        kwargs: Its keyword arguments.
        num_rows: Rows of the batch.
    """
    return _following(model, args, kwargs, num_rows, lambda survey: survey.sizes_in_batch())


def _following(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    num_rows: int,
    sizes_of: Callable[[ModelSurvey], dict[str, int]],
) -> list[str]:
    sizes = sizes_of(_survey(model, args, kwargs))
    names = [name for name, size in sizes.items() if size == num_rows]
    if len(names) < 2:
        return names

    def without_last_row(value: Any) -> Any:
        has_rows = isinstance(value, Tensor | np.ndarray) and value.ndim > 0 and len(value) == num_rows
        return value[:-1] if has_rows else value

    try:
        fewer = sizes_of(_survey(model, *tree_map(without_last_row, (tuple(args), dict(kwargs)))))
    except Exception:  # a model may take whatever it likes
        return names
    return [name for name in names if fewer.get(name) == num_rows - 1] or names


def _survey(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> ModelSurvey:
    state = generators_state(torch.device("cpu"))
    survey = ModelSurvey()
    try:
        with torch.no_grad(), preserving_buffers(), poutine.block(), survey:
            model(*args, **kwargs)
    finally:
        set_generators_state(state, torch.device("cpu"))
    return survey
