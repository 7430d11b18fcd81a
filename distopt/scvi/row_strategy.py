"""The strategy for a model that each rank has made of its own cells."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from distopt import backends
from distopt.backends import Backend
from distopt.lightning.plates import plates_of_rows
from distopt.lightning.strategy import DistoptStrategy
from distopt.scvi.cells import cell_numbers
from distopt.scvi.same import check_same

_NUM_ROWS = 5  # of the batch that the model is looked at with


def by_rows(
    model: Any, *, ignore: Iterable[str] = (), backend: Backend | None = None, **options: Any
) -> DistoptStrategy:
    """Returns the strategy that trains a model of this rank's cells together with those of the other ranks.

    The model must be the same on all ranks but for its cells (`check_same`). The plate over cells is found by looking
    at the model with a few of them.

    Args:
        model: A Pyro model of scvi-tools, made of what `split` or `align_` returned.
        ignore: As for `check_same`.
        backend: Link to the other ranks; None for that of this process.
        **options: Of `DistoptStrategy`, such as `seed`, `local` and `replicated`.

    Raises:
        DifferentModelError: As from `check_same`.
        ValueError: No plate over cells is found, or `split` was not called.

    Example:
        >>> model.train(strategy=by_rows(model), device=2)  # doctest: +SKIP
    """
    backend = backend or backends.current()
    check_same(model, ignore=ignore, backend=backend)
    plate = plate_of_cells(model)
    numbers = cell_numbers(model.adata)

    starts = np.cumsum([0, *backend.all_gather_json(len(numbers))])
    is_block = bool((numbers == np.arange(len(numbers)) + starts[backend.rank]).all())
    if not all(backend.all_gather_json(is_block)):
        options.setdefault("rows", {plate: numbers})
    return DistoptStrategy("rows", plates=plate, **options)


def plate_of_cells(model: Any) -> str:
    """Returns the name of the plate over cells, as the model lists it, else the one whose size follows a batch's.

    Args:
        model: A Pyro model of scvi-tools.

    Raises:
        ValueError: There is none, or several.
    """
    listed = str((getattr(model.module, "list_obs_plate_vars", None) or {}).get("name") or "")
    if listed:
        return listed
    num_rows = min(_NUM_ROWS, len(model.adata.obs))
    loader = model._make_data_loader(model.adata, indices=np.arange(num_rows), batch_size=num_rows, shuffle=False)
    args, kwargs = model.module._get_fn_args_from_batch(next(iter(loader)))
    names = plates_of_rows(model.module.model, args, kwargs, num_rows)
    if len(names) == 1:
        return names[0]
    raise ValueError(
        f"{type(model).__name__}: found {', '.join(names) or 'no plate'} where the plate over cells was expected. Name "
        'it: DistoptStrategy("rows", plates=NAME), after distopt.scvi.check_same(model).'
    )
