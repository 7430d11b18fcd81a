"""What a model takes from its data when it is made: it must be the same on all ranks.

A model of scvi-tools computes means, priors, initial values and scales from the AnnData it is given. Where each rank
gives its own cells, each has its own: a RegressionModel of cell2location ended 18 % off on two ranks by its initial
values alone, with all replicas equal and no warning. So every number and array of a module is compared, those that are
known are computed over all ranks, and others are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor, nn

from distopt import backends
from distopt.backends import Backend

_OF_TORCH = frozenset(vars(nn.Module())) | {"training"}
_CELL_COUNTS = ("n_cells", "n_obs", "n_ind_x")  # of scvi-tools' registry


class DifferentModelError(ValueError):
    """A model holds numbers that differ between ranks; the message has their names, and what to do."""


def check_same(model: Any, *, ignore: Iterable[str] = (), backend: Backend | None = None) -> None:
    """Makes sure that a model which each rank has made of its own cells is the same model on all of them.

    Compared are buffers, numbers, strings and arrays of all modules of `model.module`, also in dictionaries, lists and
    partial functions, and the categories and sizes that scvi-tools has registered. What is as long as this rank has
    cells, on every rank, belongs to the cells and may differ. Parameters are not compared: they start alike, as rank
    0's.

    Two values are computed over all ranks and set: the expected detection of `cell2location.models.Cell2location`, and
    the averages of each label from which `RegressionModel` starts.

    Args:
        model: A model of scvi-tools, or another object with a `module`.
        ignore: Names (or patterns, as in `fnmatch`) of values that each rank has for itself.
        backend: Link to the other ranks; None for that of this process.

    Raises:
        DifferentModelError: Other values differ. All ranks raise it.

    Cost:
        A gather of a digest for each value; an all-reduce of the averages.
    """
    backend = backend or backends.current()
    if backend.world_size == 1:
        return
    for kind in type(model).__mro__:
        if kind.__name__ in _KNOWN and kind.__module__.startswith("cell2location."):
            _KNOWN[kind.__name__](model, backend)

    num_cells = int(len(model.adata.obs)) if hasattr(model, "adata") else -1
    mine = {name: _digests(value, num_cells) for name, value in values_of(model)}
    by_rank: list[dict[str, list[str]]] = backend.all_gather_json(mine)
    names = sorted({name for each in by_rank for name in each})
    different = [
        name
        for name in names
        if not _agree([each.get(name) for each in by_rank])
        and not any(fnmatchcase(name, pattern) for pattern in ignore)
    ]
    if different:
        raise DifferentModelError(_message(different, len(by_rank)))


def values_of(model: Any) -> Iterator[tuple[str, Any]]:
    """Yields name and value of each buffer, number, string and array that a model may have taken from its data."""
    for prefix, module in model.module.named_modules():
        start = f"module.{prefix}." if prefix else "module."
        for name, buffer in module.named_buffers(recurse=False):
            yield start + name, buffer
        for name, value in vars(module).items():
            if name not in _OF_TORCH:
                yield from _plain_values(start + name, value, 0)
    registry = getattr(getattr(model, "adata_manager", None), "registry", {})
    for field, entry in registry.get("field_registries", {}).items():
        for kind in ("state_registry", "summary_stats"):
            values = {name: each for name, each in entry.get(kind, {}).items() if name not in _CELL_COUNTS}
            yield from _plain_values(f"registry.{field}.{kind}", values, 0)


def _plain_values(name: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """Yields the numbers and arrays of nested containers."""
    if isinstance(value, bool | int | float | str | Tensor | np.ndarray | np.generic):
        yield name, value
    elif depth > 4:  # what refers to itself ends here
        return
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _plain_values(f"{name}[{key!r}]", each, depth + 1)
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value):
            yield from _plain_values(f"{name}[{number}]", each, depth + 1)
    elif isinstance(value, partial):
        yield from _plain_values(f"{name}.args", value.args, depth + 1)
        yield from _plain_values(f"{name}.keywords", value.keywords, depth + 1)
    elif hasattr(value, "to_numpy") and hasattr(value, "index"):  # of pandas
        yield name, value.to_numpy()


def _digests(value: Any, num_cells: int) -> list[str]:
    """Returns what two ranks compare: the value; and, if it is a number of cells or has a row for each, only that."""
    if isinstance(value, bool | str):
        return [repr(value), ""]
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    content = repr(array.tolist()).encode() if array.dtype == object else np.ascontiguousarray(array).tobytes()
    digest = f"{array.dtype} {array.shape} {xxhash.xxh3_64_hexdigest(content)}"
    if array.ndim == 0:
        return [digest, "number of cells" if array.dtype.kind in "iuf" and array == num_cells else ""]
    return [digest, f"{array.dtype} for each cell, each of shape {array.shape[1:]}" if len(array) == num_cells else ""]


def _agree(by_rank: list[list[str] | None]) -> bool:
    """Returns whether a value is the same on all ranks, or is of each rank's cells on all of them."""
    first = by_rank[0]
    if first is None or any(each is None for each in by_rank):
        return False
    return any(first[kind] and all(each and each[kind] == first[kind] for each in by_rank) for kind in (0, 1))


def _message(different: list[str], num_ranks: int) -> str:
    shown = ", ".join(different[:8]) + (f" and {len(different) - 8} more" if len(different) > 8 else "")
    advice = (
        'Give every rank all cells and split the batches, model.train(strategy="distopt"); or pass the value to the '
        "model, the same on every rank; or, if each rank is meant to have its own, ignore=[NAME]."
    )
    if any(name.startswith("registry.") for name in different):
        advice = (
            "The ranks have registered other categories: call adata = distopt.scvi.split(adata), or align_(adata), "
            "before setup_anndata, with columns=[...] for categories that are numbers. " + advice
        )
    return f"the model is not the same on the {num_ranks} ranks, since each made it of its own cells: {shown}. {advice}"


# Values that are known, and how they follow from those of the ranks: means over cells are weighted by these.


def _mean_over_ranks(
    means: NDArray[Any], num_cells: NDArray[Any], backend: Backend
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the (k, ...) means of k groups of cells over all ranks, and the (k,) numbers of cells.

    Args:
        means: (k, ...) of this rank's cells; anything where there is none.
        num_cells: (k,) of this rank.
        backend: Link to the other ranks.
    """
    weights = num_cells.astype(np.float64).reshape(-1, *[1] * (means.ndim - 1))
    sums = torch.from_numpy(np.where(weights > 0, means.astype(np.float64) * weights, 0.0)).to(backend.control_device)
    total = torch.from_numpy(num_cells.astype(np.float64)).to(backend.control_device)
    for handle in (backend.all_reduce(sums), backend.all_reduce(total)):
        handle.wait()
    counts = total.cpu().numpy()
    return sums.cpu().numpy() / np.maximum(counts, 1.0).reshape(weights.shape), counts


def _share_detection(model: Any, backend: Backend) -> None:
    """Cell2location: its expected detection is the mean count of its cells, or of those of each batch."""
    module = model.module.model
    local = np.asarray(model.detection_mean_)
    if local.ndim == 0:
        num_cells = np.array([len(model.adata.obs)])
    else:
        codes = np.asarray(model.adata_manager.get_from_registry("batch")).ravel()
        num_cells = np.bincount(codes.astype(int), minlength=local.size)
    means, _ = _mean_over_ranks(local.reshape(-1), num_cells, backend)

    mean = means.reshape(local.shape).astype(local.dtype)
    prior = module.detection_hyp_prior
    prior["mean"] = float(mean) if local.ndim == 0 else mean.reshape(np.shape(prior["mean"])).astype("float32")
    model.detection_mean_ = mean[()]
    buffer = module.detection_mean_hyp_prior_beta
    module.detection_mean_hyp_prior_beta = torch.as_tensor(prior["mean_alpha"] / prior["mean"], dtype=buffer.dtype).to(
        buffer.device
    )


def _share_averages(model: Any, backend: Backend) -> None:
    """RegressionModel: it starts from the average of each gene in each label, of which a rank may have no cell."""
    name = "per_cluster_mu_fg"
    module = model.module.model
    initial = getattr(module, "np_init_vals", None) or {}
    if name not in initial:
        return
    registry = model.adata_manager.get_state_registry("labels")
    column = model.adata.obs[registry["original_key"]]
    present, num_present = np.unique(column, return_counts=True)
    labels = np.unique(registry["categorical_mapping"])
    index = np.searchsorted(labels, present)

    # Averaged anew: the model has rounded those that it starts from to 32 bits.
    local = np.zeros((len(labels), initial[name].shape[1]))
    local[index] = model._compute_cluster_averages(key="labels").to_numpy().T
    num_cells = np.zeros(len(labels), dtype=np.int64)
    num_cells[index] = num_present
    means, _ = _mean_over_ranks(local, num_cells, backend)

    initial[name] = means.astype("float32") + 0.0001  # as cell2location does
    buffer = getattr(module, f"init_val_{name}")
    setattr(module, f"init_val_{name}", torch.as_tensor(initial[name], dtype=buffer.dtype).to(buffer.device))


_KNOWN: dict[str, Callable[[Any, Backend], None]] = {
    "Cell2location": _share_detection,
    "RegressionModel": _share_averages,
}
