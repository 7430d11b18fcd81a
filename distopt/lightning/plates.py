"""Plates that are as large as a batch: a model counts only the rows that it is given, unless somebody scales them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine

from distopt.optim.distributed.svi_step import preserving_buffers
from distopt.reduce.model_survey import ModelSurvey
from distopt.rng import generators_state, set_generators_state


def unscaled_plates(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], num_rows: int
) -> list[str]:
    """Returns the plates over `num_rows` observations that are not scaled to more than these.

    The mean over W ranks of a likelihood that each counts for its share is 1/W of that of one process. A plate that is
    subsampled, or scaled, says how many rows there are; one that is as large as the share does not.

    Args:
        model: Run once; parameters that it makes stay, random generators and buffers are as before.
        args: Its arguments.
        kwargs: Its keyword arguments.
        num_rows: Rows of this rank's share of a batch.
    """
    state = generators_state(torch.device("cpu"))
    with torch.no_grad(), preserving_buffers(), poutine.block(), ModelSurvey() as survey:
        model(*args, **kwargs)
    set_generators_state(state, torch.device("cpu"))
    names: list[str] = []
    for group in survey.describe()["observed"]:
        sizes = zip(group["plates"], group["sizes"], strict=True)
        names += [name for name, size in sizes if group["whole"] and size == num_rows]
    return list(dict.fromkeys(names))
