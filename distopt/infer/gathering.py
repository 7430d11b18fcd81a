"""The posterior of the datapoints' own variables, brought together from the ranks that hold them, or written down."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyro
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from distopt import backends
from distopt.backends.base import Backend
from distopt.sharding import LocalParameterError, PlateShard, local_parameters

_SHARD = re.compile(r"local-(\d{5})-of-(\d{5})\.safetensors")


def gather(name: str, rows: ArrayLike | None = None, *, backend: Backend | None = None) -> dict[str, Tensor]:
    """Returns local parameters by global index of their datapoints, on every rank.

    For a site `z` under `AutoNormal` that is the location and the scale of `z` (before the transform to its
    support). Values of your own, such as `guide.median(...)["z"]`, go through `gather_rows`.

    Args:
        name: A local parameter, or a site whose name ends theirs: `"z"` for `AutoNormal.locs.z` and
            `AutoNormal.scales.z`.
        rows: (num_rows,) global indices, in any order; None for all datapoints of all ranks.
        backend: The world; None for the current one.

    Returns:
        By parameter-store name, (num_rows, ...) constrained values, detached; the datapoints are the first dimension.

    Raises:
        LocalParameterError: No local parameter of that name, or rows that no rank holds, or two.

    Cost:
        Collective: all ranks call it with the same arguments. An all-reduce of the rows asked for, for each parameter.
    """
    found = _named(name)
    store = pyro.get_param_store()
    result = {}
    for key in found:
        entry = local_parameters()[key]
        result[key] = _collect(entry.by_row(store[key].detach()), entry.plate, rows, backend or backends.current())
    return result


def gather_rows(
    values: Tensor, plate: str, rows: ArrayLike | None = None, *, dim: int = 0, backend: Backend | None = None
) -> Tensor:
    """Returns values that each rank has for its datapoints, by global index, on every rank.

    Args:
        values: Tensor with this rank's datapoints along `dim`, in the plate's order, as `guide.median(...)["z"]`.
        plate: Name of the sharded plate.
        rows: As in `gather`.
        dim: Dimension of `values` that runs over the datapoints.
        backend: As in `gather`.

    Returns:
        (num_rows, ...) tensor, the datapoints as the first dimension.

    Raises:
        LocalParameterError: `values` does not have the plate's datapoints along `dim`, or as in `gather`.

    Cost:
        As in `gather`.
    """
    shards = {entry.plate.name: entry.plate for entry in local_parameters().values()}
    if plate not in shards:
        raise LocalParameterError(
            f"no parameter belongs to a sharded plate {plate!r}; known: {', '.join(sorted(shards)) or 'none'}"
        )
    return _collect(values.detach().movedim(dim, 0), shards[plate], rows, backend or backends.current())


def write_local(directory: str | Path, names: Iterable[str] = (), *, backend: Backend | None = None) -> Path:
    """Writes each rank's local parameters to a safetensors file of its own, for `read_local`.

    Args:
        directory: Is made if it is not there. Shards that another number of ranks wrote there before are removed.
        names: Parameters or sites, as in `gather`; none given: all local parameters.
        backend: As in `gather`.

    Returns:
        This rank's file: `local-00000-of-00004.safetensors`, in which `NAME` is (size, ...), rows first, constrained,
        and `rows.NAME` is (size,) int64, their global index.

    Raises:
        LocalParameterError: No local parameter of that name.

    Cost:
        Collective: all ranks call it. A barrier, and no data between ranks.
    """
    backend = backend or backends.current()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    store, entries, tensors = pyro.get_param_store(), local_parameters(), {}
    for key in sorted({key for name in names for key in _named(name)} or entries):
        tensors[key] = entries[key].by_row(store[key].detach()).cpu().contiguous().clone()
        tensors[f"rows.{key}"] = torch.from_numpy(entries[key].plate.global_rows(backend).copy())
    path = directory / f"local-{backend.rank:05d}-of-{backend.world_size:05d}.safetensors"
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    os.replace(partial, path)
    backend.barrier()
    if backend.rank == 0:
        for old in _shard_files(directory):
            if int(_match(old)[2]) != backend.world_size:
                old.unlink()
    return path


def read_local(directory: str | Path, name: str, rows: ArrayLike | None = None) -> Tensor:
    """Reads a parameter that `write_local` wrote, by global index, from the shards that hold it; in any process.

    Args:
        directory: Where the shards are.
        name: The parameter's full name.
        rows: (num_rows,) global indices; None for all.

    Returns:
        (num_rows, ...) tensor on the CPU.

    Raises:
        LocalParameterError: A shard is missing, or does not have the parameter, or a row is in none of them.

    Cost:
        Reads the rows' index of every shard, and of the values only the span between the first and last row wanted.
    """
    files = _complete(Path(directory))
    held, parts = [], []
    wanted = None if rows is None else np.asarray(rows, dtype=np.int64)
    for path in files:
        with safe_open(path, framework="pt") as shard:
            if name not in shard.keys():  # noqa: SIM118  # safe_open is no mapping
                known = ", ".join(key for key in shard.keys() if not key.startswith("rows."))  # noqa: SIM118
                raise LocalParameterError(f"{path}: has no parameter {name!r}. It has: {known}")
            index = shard.get_tensor(f"rows.{name}").numpy()
            places = np.arange(len(index)) if wanted is None else np.flatnonzero(np.isin(index, wanted))
            if len(places):
                first, last = int(places[0]), int(places[-1]) + 1
                parts.append(shard.get_slice(name)[first:last][torch.from_numpy(places - first)])
                held.append(index[places])
    there = np.concatenate(held) if held else np.empty(0, np.int64)
    wanted = np.sort(there) if wanted is None else wanted
    where = _find(there, wanted)
    if (where < 0).any():
        raise LocalParameterError(f"{directory}: no shard holds {_some(wanted[where < 0])} of {name!r}")
    return torch.cat(parts)[torch.from_numpy(where)]


def _named(name: str) -> list[str]:
    """The local parameters of a name, or of a site."""
    known = local_parameters()
    found = [key for key in known if key == name or key.endswith("." + name)]
    if not found:
        raise LocalParameterError(
            f"no local parameter is, or ends in, {name!r}; local parameters: {', '.join(known) or 'none'}"
        )
    return found


def _collect(values: Tensor, plate: PlateShard, rows: ArrayLike | None, backend: Backend) -> Tensor:
    """Sums, over ranks, the rows that each holds into a tensor of the rows wanted."""
    if len(values) != plate.size:
        raise LocalParameterError(
            f"values of shape {tuple(values.shape)} have {len(values)} rows, but plate {plate.name!r} has {plate.size} "
            "datapoints on this rank; give dim=, the dimension that runs over the datapoints"
        )
    own = plate.global_rows(backend)
    if rows is None:
        ends = backend.all_gather_json([len(own), int(own.max(initial=-1)) + 1])
        total, end = sum(size for size, _ in ends), max(last for _, last in ends)
        if total != end:
            raise LocalParameterError(
                f"plate {plate.name!r}: the ranks hold {total:,} datapoints, numbered up to {end - 1:,}; say which "
                "with rows="
            )
        rows = np.arange(total)
    wanted = np.asarray(rows, dtype=np.int64)
    places = _find(own, wanted)
    here = torch.from_numpy(places >= 0)
    gathered = values.new_zeros((len(wanted), *values.shape[1:]))
    gathered[here] = values[torch.from_numpy(places[places >= 0]).to(values.device)]
    holders = here.to(device=values.device, dtype=torch.int64)
    for handle in (backend.all_reduce(holders), backend.all_reduce(gathered)):
        handle.wait()
    if bool((holders != 1).any()):
        wrong = wanted[(holders != 1).cpu().numpy()]
        raise LocalParameterError(
            f"plate {plate.name!r}: {_some(wrong)} held by {int(holders[holders != 1][0])} of {backend.world_size} "
            "ranks; each datapoint belongs to one"
        )
    return gathered


def _find(own: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where in `own` each of `wanted` is, -1 where it is not."""
    if not len(own):
        return np.full(wanted.shape, -1, np.int64)
    order = np.argsort(own, kind="stable")
    places = order[np.minimum(np.searchsorted(own[order], wanted), len(own) - 1)]
    return np.where(own[places] == wanted, places, -1)


def _some(rows: NDArray[np.int64]) -> str:
    """Names a few rows."""
    return f"rows {', '.join(map(str, rows[:5]))}{', ...' if len(rows) > 5 else ''}"


def _shard_files(directory: Path) -> list[Path]:
    """The shards in a directory, in order."""
    return sorted(path for path in directory.glob("local-*.safetensors") if _SHARD.fullmatch(path.name))


def _match(path: Path) -> re.Match[str]:
    """The rank and the number of ranks in a shard's name."""
    match = _SHARD.fullmatch(path.name)
    assert match is not None
    return match


def _complete(directory: Path) -> list[Path]:
    """All shards of one writing; raises when some are missing."""
    files = _shard_files(directory)
    counts = {int(_match(path)[2]) for path in files}
    if len(counts) != 1 or len(files) != next(iter(counts)):
        raise LocalParameterError(
            f"{directory}: found {len(files)} shards of a writing by "
            f"{' and by '.join(map(str, sorted(counts))) or 'no'} ranks: the set is not complete"
        )
    return files
