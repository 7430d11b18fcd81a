"""Cells of an AnnData over ranks: each rank has its own, and all have the categories of all.

scvi-tools numbers the categories that it finds in the cells of a process. Two ranks with the batches {a, b} and {b, c}
both find two, and code 1 means b on one and c on the other: the model trains, and is wrong. So a column of categories
gets those of all ranks before scvi-tools sees it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import ArrayLike, NDArray

from distopt import backends
from distopt.backends import Backend

NUMBER = "distopt_cell"
"""The column of `obs` that holds each cell's number among those of all ranks."""


def split(
    adata: Any, rows: ArrayLike | None = None, *, columns: Iterable[str] = (), backend: Backend | None = None
) -> Any:
    """Returns this rank's cells of an AnnData that every rank has opened, for `setup_anndata` to be called with.

    Columns of strings, truth values and categories have the categories of all cells in it, also those that no cell of
    this rank has. anndata is told to keep such categories from now on (`settings.remove_unused_categories`): a later
    choice of genes would drop them again.

    Args:
        adata: All cells, in memory or `read_h5ad(path, backed="r")`; it is not changed. A choice of the cells of a
            file, as `adata[mask]`, is read as a whole first.
        rows: This rank's cells: their names, positions, or a mask. None for consecutive ones, as many on each rank.
        columns: Further columns of `obs` that are categories, such as numbers of batches.
        backend: Link to the other ranks; None for that of this process, which is joined now if it was not before.

    Returns:
        A copy in memory. Its column `distopt_cell` has the position of each cell in `adata`.

    Raises:
        ValueError: A cell is on no rank or on several, a rank has none, or ranks have other columns or orders of
            categories.

    Cost:
        An all-reduce of one number for each cell, and a gather of a digest of the categories.

    Example:
        >>> cells = split(anndata.read_h5ad("cells.h5ad", backed="r"))  # doctest: +SKIP
    """
    backend = backend or backends.init()
    positions = _positions(adata, rows, backend)
    _check_held_once(positions, len(adata.obs), backend)

    is_in_file = bool(getattr(adata, "isbacked", False))
    if is_in_file and adata.is_view:  # of which anndata makes no view
        adata = adata.to_memory()
        is_in_file = False
    mine = adata[positions].to_memory() if is_in_file else adata[positions].copy()
    for name, (categories, is_ordered) in _categories(adata.obs, columns).items():
        _set_categories(mine.obs, name, categories, is_ordered)
    mine.obs[NUMBER] = positions
    _share_categories(mine, columns, backend)
    return mine


def align_(adata: Any, *, columns: Iterable[str] = (), backend: Backend | None = None) -> Any:
    """Gives cells that each rank has read from a file of its own the categories of all ranks, in place.

    Args:
        adata: The cells of this rank. They are numbered in the order of ranks.
        columns: As for `split`.
        backend: As for `split`.

    Returns:
        `adata` itself.

    Raises:
        ValueError: As from `split`; or the ranks' genes differ.

    Cost:
        A gather of the categories that differ between ranks.
    """
    backend = backend or backends.init()
    by_rank = backend.all_gather_json([len(adata.obs), _digest_of_names(adata.var_names)])
    for rank, (_, genes) in enumerate(by_rank):
        if genes != by_rank[0][1]:
            raise ValueError(
                f"rank {rank} has other genes than rank 0, or in another order: choose the same ones on every rank, as "
                "in adata = adata[:, genes].copy(), before align_(adata)."
            )
    _check_not_empty([size for size, _ in by_rank])
    start = sum(size for size, _ in by_rank[: backend.rank])
    adata.obs[NUMBER] = np.arange(start, start + len(adata.obs))
    _share_categories(adata, columns, backend)
    return adata


def cell_numbers(adata: Any) -> NDArray[np.int64]:
    """Returns the (num_cells,) number of each cell of this rank among those of all ranks.

    Raises:
        ValueError: Neither `split` nor `align_` has made this AnnData.
    """
    if NUMBER not in adata.obs:
        raise ValueError(
            f"this AnnData has no column {NUMBER!r}: call adata = distopt.scvi.split(adata) before setup_anndata, or "
            "distopt.scvi.align_(adata) if each rank has read cells of its own."
        )
    return np.asarray(adata.obs[NUMBER], dtype=np.int64)


def _positions(adata: Any, rows: ArrayLike | None, backend: Backend) -> NDArray[np.int64]:
    num_cells = len(adata.obs)
    if rows is None:
        start = num_cells * backend.rank // backend.world_size
        return np.arange(start, num_cells * (backend.rank + 1) // backend.world_size)
    given = np.asarray(rows)
    if given.dtype == bool:
        return np.flatnonzero(given)
    if given.dtype.kind not in "iuf":
        if not adata.obs_names.is_unique:
            raise ValueError(
                "rows: several cells have one name; give positions, or call adata.obs_names_make_unique()."
            )
        indices = adata.obs_names.get_indexer(given)
        if (indices < 0).any():
            raise ValueError(f"rows: there is no cell {str(given[indices < 0][0])!r} in the AnnData.")
        return np.asarray(indices, dtype=np.int64)
    outside = given[(given < 0) | (given >= num_cells)]
    if len(outside):
        raise ValueError(f"rows: found {outside[0]}, expected positions from 0 to {num_cells - 1}.")
    return given.astype(np.int64)


def _check_held_once(positions: NDArray[np.int64], num_cells: int, backend: Backend) -> None:
    by_rank = backend.all_gather_json([num_cells, len(positions)])
    sizes = [each[0] for each in by_rank]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"the ranks' AnnData have {', '.join(map(str, sizes))} cells: split needs the same on every rank. If each "
            "rank has read cells of its own, call distopt.scvi.align_(adata)."
        )
    _check_not_empty([each[1] for each in by_rank])
    num_holders = torch.zeros(num_cells, dtype=torch.int64)
    num_holders.index_add_(0, torch.from_numpy(positions), torch.ones(len(positions), dtype=torch.int64))
    num_holders = num_holders.to(backend.control_device)
    backend.all_reduce(num_holders).wait()
    wrong = np.flatnonzero(num_holders.cpu().numpy() != 1)
    if len(wrong):
        raise ValueError(
            f"rows: {len(wrong)} of {num_cells} cells are not on exactly one rank; cell {wrong[0]} is on "
            f"{int(num_holders[wrong[0]])}. Leave cells out before: split(adata[mask], ...)."
        )


def _check_not_empty(num_cells: list[int]) -> None:
    if 0 in num_cells:
        raise ValueError(
            f"rank {num_cells.index(0)} of {len(num_cells)} has no cells, of which no model can be made: give each "
            "rank some, or start fewer workers."
        )


# Categories.


def _categories(obs: Any, columns: Iterable[str]) -> dict[str, tuple[list[Any], bool]]:
    """Returns the categories of each column that scvi-tools may number, and whether they have an order."""
    import pandas as pd

    named = set(columns)
    for name in named - set(obs.columns):
        raise ValueError(f"columns: obs has no column {name!r}. It has: {', '.join(map(str, obs.columns))}.")
    by_column = {}
    for name in obs.columns:
        column = obs[name]
        if isinstance(column.dtype, pd.CategoricalDtype):
            by_column[name] = (_plain(column.cat.categories), bool(column.cat.ordered))
        elif name in named or _has_categories(column):
            by_column[name] = (_plain(sorted(column.dropna().unique())), False)
    return by_column


def _has_categories(column: Any) -> bool:
    """Returns whether a column has strings or truth values, of which any, or all of this rank's, may be missing."""
    import pandas as pd

    if column.dtype == object:
        return pd.api.types.infer_dtype(column, skipna=True) in ("string", "boolean", "empty")
    return bool(pd.api.types.is_bool_dtype(column) or pd.api.types.is_string_dtype(column))


def _plain(values: Iterable[Any]) -> list[Any]:
    return [each.item() if isinstance(each, np.generic) else each for each in values]


def _set_categories(obs: Any, name: str, categories: list[Any], is_ordered: bool) -> None:
    import pandas as pd

    dtype = pd.CategoricalDtype(categories, ordered=is_ordered)
    obs[name] = pd.Categorical(obs[name].tolist(), dtype=dtype)


def _share_categories(adata: Any, columns: Iterable[str], backend: Backend) -> None:
    """Gives every column of categories those of all ranks."""
    _keep_unused_categories()
    mine = _categories(adata.obs, columns)
    by_rank = backend.all_gather_json({name: [_digest(each[0]), each[1]] for name, each in mine.items()})
    for rank, each in enumerate(by_rank):
        if each.keys() != by_rank[0].keys():
            names = ", ".join(sorted(each.keys() ^ by_rank[0].keys()))
            raise ValueError(
                f"rank {rank} and rank 0 have other columns of categories in obs: {names}. Give all ranks the same "
                "columns, and name those that hold numbers: columns=[...]."
            )

    for name, (categories, is_ordered) in mine.items():
        if all(each[name] == by_rank[0][name] for each in by_rank):
            _set_categories(adata.obs, name, categories, is_ordered)
            continue
        if any(each[name][1] for each in by_rank):
            raise ValueError(
                f"obs[{name!r}]: its categories have an order, and differ between ranks. Set the same on each: "
                f"adata.obs[{name!r}] = adata.obs[{name!r}].cat.set_categories([...], ordered=True)."
            )
        lists = backend.all_gather_json(categories)
        _set_categories(adata.obs, name, union(lists), False)


def union(lists: list[list[Any]]) -> list[Any]:
    """Returns all categories of several lists: sorted if each list is, as those that scvi-tools makes of a column.

    Example:
        >>> union([["a", "b"], ["b", "c"]]), union([["b", "a"], ["c"]])
        (['a', 'b', 'c'], ['b', 'a', 'c'])
    """
    joined = list(dict.fromkeys(each for categories in lists for each in categories))
    is_sorted = all(categories == sorted(categories) for categories in lists)
    return sorted(joined) if is_sorted else joined


def _digest(categories: list[Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(categories, default=str).encode())


def _digest_of_names(names: Iterable[Any]) -> str:
    return _digest([str(each) for each in names])


def _keep_unused_categories() -> None:
    anndata = sys.modules.get("anndata")  # which whoever has an AnnData has imported
    if anndata is not None:
        anndata.settings.remove_unused_categories = False
