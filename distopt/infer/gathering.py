"""Local parameters of datapoints, by global index: gathered from the ranks that hold them, or written to files.

After training, each rank holds the variables of its own datapoints. `gather_local` and `gather_rows` bring the values
of chosen datapoints to all ranks; `write_local` and `read_local` do it through files, for a posterior that no single
machine could hold.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyro
import torch
import xxhash
from numpy.typing import ArrayLike, NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from distopt import backends
from distopt.backends.base import Backend
from distopt.infer.splitting import row_numbers
from distopt.reduce.errors import gather_unless_failed, raised_on_all
from distopt.sharding import LocalParameterError, PlateShard, local_parameters

_T = TypeVar("_T")

_SHARD = re.compile(r"local-(\d{5})-of-(\d{5})\.safetensors")


def gather_local(name: str, rows: ArrayLike | None = None, *, backend: Backend | None = None) -> dict[str, Tensor]:
    """Returns local parameters by global index of their datapoints, on every rank.

    For a site `z` under `AutoNormal`, these are the location and the scale of `z` before the transform to its support.
    For other values, such as `guide.median(...)["z"]`, there is `gather_rows`.

    Args:
        name: A local parameter, or a site whose name is the last component of parameters: `"z"` stands for
            `AutoNormal.locs.z` and `AutoNormal.scales.z`.
        rows: (num_rows,) global indices, in any order; None for all datapoints of all ranks.
        backend: The world; None for the current one.

    Returns:
        (num_rows, ...) constrained and detached values for each parameter, by its name in the parameter store. The
        first dimension runs over the datapoints.

    Raises:
        LocalParameterError: There is no local parameter of that name, or a row is held by no rank or by several.
        PeerError: Another rank has raised.

    Cost:
        For each parameter an all-reduce of the requested rows, and gathers of a few numbers. All ranks must call it
        with the same arguments.
    """
    backend = backend or backends.current()
    store = pyro.get_param_store()
    gathered = {}
    for key in _known_on_all(lambda: _parameters_called(name), backend):
        parameter = local_parameters()[key]
        gathered[key] = gather_of_plate(parameter.by_row(store[key].detach()), parameter.plate, rows, backend)
    return gathered


def gather_rows(
    values: Tensor, plate: str, rows: ArrayLike | None = None, *, dim: int = 0, backend: Backend | None = None
) -> Tensor:
    """Returns values that each rank computed for its datapoints, by global index, on every rank.

    Args:
        values: This rank's datapoints along `dim`, in the order of the plate, such as `guide.median(...)["z"]`.
        plate: Name of the sharded plate.
        rows: As in `gather_local`.
        dim: Dimension of `values` that runs over the datapoints.
        backend: As in `gather_local`.

    Returns:
        (num_rows, ...) detached values; the first dimension runs over the datapoints.

    Raises:
        LocalParameterError: `values` does not have as many rows as the plate, or a row is held by no rank or by
            several.
        PeerError: Another rank has raised.

    Cost:
        An all-reduce of the requested rows, and gathers of a few numbers. All ranks must call it with the same `rows`.
    """
    backend = backend or backends.current()

    def mine() -> tuple[Tensor, PlateShard]:
        shards = {parameter.plate.name: parameter.plate for parameter in local_parameters().values()}
        if plate not in shards:
            raise LocalParameterError(
                f"no parameter belongs to a sharded plate {plate!r}; known: {', '.join(sorted(shards)) or 'none'}"
            )
        return values.detach().movedim(dim, 0), shards[plate]

    return gather_of_plate(*_known_on_all(mine, backend), rows, backend)


def write_local(directory: str | Path, names: Iterable[str] = (), *, backend: Backend | None = None) -> Path:
    """Writes this rank's local parameters to a safetensors file, for `read_local`.

    Args:
        directory: Created if it does not exist. Files that another number of ranks has written there are removed.
        names: Parameters or sites, as in `gather_local`; all local parameters if there are none.
        backend: As in `gather_local`.

    Returns:
        This rank's file, such as `local-00000-of-00004.safetensors`. In it, `NAME` has the constrained values,
        (size, ...) with rows first, and `rows.NAME` their global indices, (size,) int64.

    Raises:
        LocalParameterError: There is no local parameter of that name.
        OSError: The file cannot be written.
        PeerError: Another rank has raised.

    Cost:
        Gathers of a few numbers; no data are sent between ranks. All ranks must call it.
    """
    backend = backend or backends.current()

    def mine() -> dict[str, tuple[Tensor, PlateShard]]:
        store = pyro.get_param_store()
        parameters = local_parameters()
        keys = sorted({key for name in names for key in _parameters_called(name)} or parameters)
        return {key: (parameters[key].by_row(store[key].detach()), parameters[key].plate) for key in keys}

    return write_rows(directory, _known_on_all(mine, backend), backend)


def write_rows(directory: str | Path, values: Mapping[str, tuple[Tensor, PlateShard]], backend: Backend) -> Path:
    """Writes values of this rank's datapoints as `write_local` does; a collective call.

    Args:
        directory: As for `write_local`.
        values: By name (size, ...) values, and the plate of these datapoints.
        backend: Link to the other ranks.
    """
    directory = Path(directory)
    path = directory / f"local-{backend.rank:05d}-of-{backend.world_size:05d}.safetensors"
    sizes = gather_unless_failed(backend, {key: plate.size for key, (_, plate) in values.items()})

    def write() -> None:
        tensors = {}
        for key, (rows, plate) in values.items():
            # A copy: safetensors refuses tensors that share memory, as packed parameters do.
            tensors[key] = rows.cpu().contiguous().clone()
            held = plate.global_rows([each.get(key, 0) for each in sizes], backend.rank)
            tensors[f"rows.{key}"] = torch.from_numpy(held.copy())

        # Renamed when complete, so that `read_local` never sees half a file.
        directory.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(tensors, partial)
        os.replace(partial, path)

    _known_on_all(write, backend)
    if backend.rank == 0:
        for old, num_files in _files_in(directory):
            if num_files != backend.world_size:
                old.unlink()
    return path


def read_local(directory: str | Path, name: str, rows: ArrayLike | None = None) -> Tensor:
    """Reads a parameter that `write_local` has written, by global index; any process can call it.

    Args:
        directory: Folder of the files.
        name: The parameter's full name.
        rows: (num_rows,) global indices, in any order; None for all.

    Returns:
        (num_rows, ...) tensor on the CPU.

    Raises:
        LocalParameterError: A file is missing or lacks the parameter, or a row is in no file.

    Cost:
        Reads the global indices of every file, and of the values only those between the first and the last row that
        the file has of `rows`.
    """
    wanted = None if rows is None else row_numbers(rows)
    indices, chunks = [], []
    for path in _complete_set(Path(directory)):
        with safe_open(path, framework="pt") as file:
            if name not in file.keys():  # noqa: SIM118  # safe_open is no mapping
                known = ", ".join(key for key in file.keys() if not key.startswith("rows."))  # noqa: SIM118
                raise LocalParameterError(f"{path}: has no parameter {name!r}. It has: {known}")
            index = file.get_tensor(f"rows.{name}").numpy()
            offsets = np.arange(len(index)) if wanted is None else np.flatnonzero(np.isin(index, wanted))
            if len(offsets):
                first, last = int(offsets[0]), int(offsets[-1]) + 1
                chunks.append(file.get_slice(name)[first:last][torch.from_numpy(offsets - first)])
                indices.append(index[offsets])

    available = np.concatenate(indices) if indices else np.empty(0, np.int64)
    wanted = np.sort(available) if wanted is None else wanted
    offsets = _positions(available, wanted)
    if (offsets < 0).any():
        raise LocalParameterError(f"{directory}: no file holds {_some(wanted[offsets < 0])} of {name!r}")
    return torch.cat(chunks)[torch.from_numpy(offsets)]


def _known_on_all(compute: Callable[[], _T], backend: Backend) -> _T:
    """Returns what this rank computes alone, once all ranks have; raises on all of them where one cannot."""
    with raised_on_all(backend):
        result = compute()
    gather_unless_failed(backend, None)
    return result


def _parameters_called(name: str) -> list[str]:
    """Returns the local parameters that a user means by a name: that of a parameter or of a site."""
    known = local_parameters()
    meant = [key for key in known if key == name or key.endswith(f".{name}")]
    if not meant:
        raise LocalParameterError(
            f"no local parameter is called {name!r} or ends in '.{name}'; "
            f"local parameters: {', '.join(known) or 'none'}"
        )
    return meant


# A row is gathered by addition: each rank writes its rows into zeros, and one all-reduce gives all of them to all
# ranks. That sends world_size - 1 zeros for each value, but only of the rows that were asked for, and needs no
# knowledge of who holds what. A second all-reduce counts the holders of each row, so that rows held twice or nowhere
# are found and not silently summed.
def gather_of_plate(values: Tensor, plate: PlateShard, rows: ArrayLike | None, backend: Backend) -> Tensor:
    """Returns the requested rows of all ranks; `values` are this rank's, rows first."""
    with raised_on_all(backend):
        if len(values) != plate.size:
            raise LocalParameterError(
                f"values of shape {tuple(values.shape)} have {len(values)} rows, but plate {plate.name!r} has "
                f"{plate.size} datapoints on this rank; give dim=, the dimension that runs over the datapoints"
            )
        asked = None if rows is None else row_numbers(rows)
    sizes = _compared_sizes(values, plate, asked, backend)

    held = plate.global_rows(sizes, backend.rank)
    wanted = _all_rows(held, plate, backend) if asked is None else asked
    offsets = _positions(held, wanted)
    is_held = torch.from_numpy(offsets >= 0)

    summed = torch.uint8 if values.dtype == torch.bool else values.dtype
    gathered = values.new_zeros((len(wanted), *values.shape[1:]), dtype=summed)
    gathered[is_held] = values[torch.from_numpy(offsets[offsets >= 0]).to(values.device)].to(summed)
    num_holders = is_held.to(device=values.device, dtype=torch.int64)
    for handle in (backend.all_reduce(num_holders), backend.all_reduce(gathered)):
        handle.wait()

    is_wrong = num_holders != 1
    if bool(is_wrong.any()):
        raise LocalParameterError(
            f"plate {plate.name!r}: {_some(wanted[is_wrong.cpu().numpy()])} held by {int(num_holders[is_wrong][0])} of "
            f"{backend.world_size} ranks, expected one"
        )
    return gathered.to(values.dtype)


def _compared_sizes(values: Tensor, plate: PlateShard, asked: NDArray[np.int64] | None, backend: Backend) -> list[int]:
    """Returns each rank's number of datapoints, once all ranks are known to gather the same."""
    wanted = "all rows" if asked is None else f"{len(asked)} rows ({xxhash.xxh3_64_hexdigest(asked.tobytes())})"
    what = f"{wanted} of plate {plate.name!r}, each {values.dtype} {list(values.shape[1:])}"
    by_rank = gather_unless_failed(backend, [what, plate.size])
    for rank, (other, _) in enumerate(by_rank):
        if other != by_rank[0][0]:
            raise LocalParameterError(
                f"rank {rank} gathers {other}, and rank 0 {by_rank[0][0]}: give all ranks the same rows, and values of "
                "the same shape but for the datapoints"
            )
    return [size for _, size in by_rank]


def _all_rows(held: NDArray[np.int64], plate: PlateShard, backend: Backend) -> NDArray[np.int64]:
    """Returns the global indices of all datapoints, which must be numbered without gaps."""
    ends = backend.all_gather_json([len(held), int(held.max(initial=-1)) + 1])
    total = sum(size for size, _ in ends)
    end = max(last for _, last in ends)
    if total != end:
        raise LocalParameterError(
            f"plate {plate.name!r}: the ranks hold {total:,} datapoints, numbered up to {end - 1:,}; "
            "give the ones to gather as rows="
        )
    return np.arange(total)


def _positions(held: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the position in `held` of each element of `wanted`, -1 for those that it does not have."""
    if not len(held):
        return np.full(wanted.shape, -1, np.int64)
    order = np.argsort(held, kind="stable")
    positions = order[np.minimum(np.searchsorted(held[order], wanted), len(held) - 1)]
    return np.where(held[positions] == wanted, positions, -1)


def _some(rows: NDArray[np.int64]) -> str:
    """Names the first rows."""
    return f"rows {', '.join(map(str, rows[:5]))}{', ...' if len(rows) > 5 else ''}"


def _files_in(directory: Path) -> list[tuple[Path, int]]:
    """Returns the files that `write_local` has written, in order of rank, each with the number of files of its set."""
    matches = [(path, _SHARD.fullmatch(path.name)) for path in sorted(directory.glob("local-*.safetensors"))]
    return [(path, int(match[2])) for path, match in matches if match is not None]


def _complete_set(directory: Path) -> list[Path]:
    """Returns the files of all ranks, or raises if some are missing."""
    files = _files_in(directory)
    sizes = {num_files for _, num_files in files}
    if len(sizes) != 1 or len(files) != next(iter(sizes)):
        written = " and ".join(map(str, sorted(sizes))) or "no"
        raise LocalParameterError(
            f"{directory}: found {len(files)} files, written by {written} ranks; one file of each rank is needed"
        )
    return [path for path, _ in files]
