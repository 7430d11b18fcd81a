"""Posterior samples and summaries of cells that are split over ranks, in the order of the user's cells."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distopt import backends
from distopt.backends import Backend
from distopt.infer.gathering import gather_of_plate
from distopt.infer.predictive import SAMPLES, RowsOfSite, SampledRows
from distopt.reduce.errors import DisagreementError, gather_unless_failed, raised_on_all
from distopt.rng import drawing_alike
from distopt.scvi.cells import cell_numbers
from distopt.scvi.row_strategy import plate_of_cells
from distopt.sharding import PlateShard

_Summaries: TypeAlias = Mapping[str, Mapping[str, NDArray[Any]]]


def gather_cells(values: Any, adata: Any, *, backend: Backend | None = None) -> Any:
    """Returns values of all cells, in the order of their numbers, on every rank.

    Args:
        values: (num_cells, ...) array, tensor or DataFrame of this rank's cells.
        adata: The AnnData of this rank's cells, of `split` or `align_`.
        backend: Link to the other ranks; None for that of this process.

    Returns:
        The same kind: a DataFrame has the names of all cells as its index.

    Raises:
        LocalParameterError: A cell is held by no rank, or by several.
        PeerError: Another rank has raised.

    Cost:
        An all-reduce of the result.

    Example:
        >>> latent = gather_cells(model.get_latent_representation(), model.adata)  # doctest: +SKIP
    """
    backend = backend or backends.current()
    with raised_on_all(backend):
        plate = PlateShard("cells", backend.world_size, size=len(adata.obs), rows=cell_numbers(adata))
        mine = values.detach() if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    gathered = gather_of_plate(mine, plate, None, backend)
    if isinstance(values, Tensor):
        return gathered
    array = gathered.cpu().numpy()
    if not hasattr(values, "columns"):
        return array

    import pandas as pd

    names = backend.all_gather_json([cell_numbers(adata).tolist(), [str(name) for name in values.index]])
    order = dict(sorted((number, name) for each in names for number, name in zip(*each, strict=True)))
    return pd.DataFrame(array, index=list(order.values()), columns=values.columns)


def sample_posterior(model: Any, *, seed: int = 0, backend: Backend | None = None, **kwargs: Any) -> dict[str, Any]:
    """Returns what `model.sample_posterior` would of all cells in one process, on every rank.

    Variables of all cells are drawn alike on all ranks, and those of cells on the rank that has them.

    Args:
        model: A model of scvi-tools that was trained with its cells split.
        seed: Of the samples.
        backend: Link to the other ranks; None for that of this process.
        **kwargs: Of `sample_posterior`.

    Returns:
        As scvi-tools: for each summary the values of each site, with cells in the order of their numbers.

    Raises:
        Exception: What the model raised on this rank.
        PeerError: What it raised on another one.
        DisagreementError: The values have other names or shapes on another rank.

    Cost:
        An all-reduce of each value.
    """
    backend = backend or backends.current()
    with raised_on_all(backend), _drawing(model, seed, backend) as sites:
        local: _Summaries = model.sample_posterior(**kwargs)
    _compare(_described(local, sites), backend)
    return {
        summary: {
            site: _gathered(value, sites[site].dim, model.adata, backend)
            if site in sites
            else _of_rank_0(value, backend)
            for site, value in values.items()
        }
        for summary, values in local.items()
    }


def export_posterior(
    model: Any,
    adata: Any,
    *,
    into: Any = None,
    folder: str | Path | None = None,
    seed: int = 0,
    backend: Backend | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Calls `model.export_posterior` on each rank, and brings its tables of cells together.

    Args:
        model: A model with `export_posterior`, such as cell2location's, that was trained with its cells split.
        adata: The AnnData of this rank's cells, which gets this rank's results.
        into: An AnnData of all cells, which gets the tables of all, in its own order of cells; on any of the ranks.
        folder: Where each rank writes the tables of its own cells as `NAME-RANK-of-RANKS.csv`, in place of gathering
            them, for more cells than one machine can hold.
        seed: As for `sample_posterior`.
        backend: Link to the other ranks; None for that of this process.
        **kwargs: Of `export_posterior`.

    Returns:
        The tables that it has set in `adata.obsm`: of all cells, or of this rank's if there is a folder.

    Raises:
        ValueError: Cells of `into` cannot be found by their names; `adata` has its results.
        Exception: As `sample_posterior` does.

    Cost:
        An all-reduce of the tables, unless there is a folder.
    """
    backend = backend or backends.current()
    before = dict(adata.obsm)
    with raised_on_all(backend):
        with _drawing(model, seed, backend) as sites, _global_values_of_rank_0(model, sites, backend):
            model.export_posterior(adata, **kwargs)
        tables = {name: adata.obsm[name] for name in sorted(adata.obsm) if adata.obsm[name] is not before.get(name)}
        if folder is not None:
            _write(tables, Path(folder), backend)
    _compare({f"table {name}": str(list(table.columns)) for name, table in tables.items()}, backend)
    if folder is not None:
        return tables

    gathered = {name: gather_cells(table, adata, backend=backend) for name, table in tables.items()}
    if into is not None:
        for name, table in gathered.items():
            into.obsm[name] = _in_order_of(into.obs_names, table)
    return gathered


def _in_order_of(names: Any, table: Any) -> Any:
    """Returns the rows of a table by the names of cells, of which several may have one if the order is the table's.

    Raises:
        ValueError: Names are missing in the table, or do not tell its rows apart.
    """
    if list(table.index) == list(names):
        return table.set_axis(names, axis=0)
    if not table.index.is_unique:
        raise ValueError(
            "into: several cells have one name, and the order is not that of the cells of the ranks: call "
            "obs_names_make_unique() on all cells before they are split."
        )
    missing = names.difference(table.index)
    if len(missing):
        raise ValueError(f"into: {len(missing)} of its {len(names)} cells are on no rank, such as {str(missing[0])!r}.")
    return table.loc[names]


@contextmanager
def _drawing(model: Any, seed: int, backend: Backend) -> Iterator[Mapping[str, RowsOfSite]]:
    """Draws samples as `distopt.infer.predictive` does, and yields which sites have a value for each cell."""
    drawing = SampledRows([plate_of_cells(model)], backend.world_size)
    with drawing_alike(seed, SAMPLES, backend.device), drawing:
        yield drawing.sites


@contextmanager
def _global_values_of_rank_0(model: Any, sites: Mapping[str, RowsOfSite], backend: Backend) -> Iterator[None]:
    """Has the model draw samples whose variables of all cells are rank 0's: a rank of more batches draws other ones."""
    draw = model.sample_posterior

    def drawn(*args: Any, **kwargs: Any) -> Mapping[str, Any]:
        results = draw(*args, **kwargs)  # where it raises, `export_posterior` tells the others, which are below
        _compare(_described(results, sites), backend)
        return {
            summary: {site: value if site in sites else _of_rank_0(value, backend) for site, value in values.items()}
            for summary, values in results.items()
        }

    model.sample_posterior = drawn
    try:
        yield
    finally:
        del model.sample_posterior


def _gathered(value: NDArray[Any], axis: int, adata: Any, backend: Backend) -> NDArray[Any]:
    rows_first = np.ascontiguousarray(np.moveaxis(value, axis, 0))
    return np.moveaxis(np.asarray(gather_cells(rows_first, adata, backend=backend)), 0, axis)


def _of_rank_0(value: NDArray[Any], backend: Backend) -> NDArray[Any]:
    tensor = torch.from_numpy(np.array(value)).to(backend.device)
    backend.broadcast(tensor, 0).wait()
    return tensor.cpu().numpy()


def _write(tables: Mapping[str, Any], folder: Path, backend: Backend) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        path = folder / f"{name}-{backend.rank:05d}-of-{backend.world_size:05d}.csv"
        partial = path.with_suffix(".partial")
        table.to_csv(partial)
        os.replace(partial, path)


def _described(summaries: _Summaries, sites: Mapping[str, RowsOfSite]) -> dict[str, str]:
    """Returns dtype and shape of each value, but for cells."""
    described = {}
    for summary, values in summaries.items():
        for site, value in values.items():
            shape: list[Any] = list(np.shape(value))
            if site in sites:
                shape[sites[site].dim] = "cells"
            described[f"{site} of {summary}"] = f"{np.asarray(value).dtype} {shape}"
    return described


def _compare(mine: dict[str, str], backend: Backend) -> None:
    """Raises on all ranks if one has failed, or has another value than rank 0."""
    by_rank = gather_unless_failed(backend, mine)
    for rank, each in enumerate(by_rank):
        for name in sorted(each.keys() | by_rank[0].keys()):
            other = each.get(name, "missing")
            expected = by_rank[0].get(name, "missing")
            if other != expected:
                raise DisagreementError(
                    f"{name} is {other} on rank {rank}, and {expected} on rank 0: call this with the same options on "
                    "all ranks, for models that were made with the same options."
                )
