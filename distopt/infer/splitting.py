"""What a sharded plate does to one message of Pyro: it scales sites, marks parameters as local, and finds mistakes.

Two handlers use this, `sharded_plate` for plates in one's own code and `shard` for those of others. Both may be active,
so each effect is applied only once per message.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from distopt import backends
from distopt.sharding import SPLIT, LocalParameter, LocalParameterError, PlateShard, local_parameter, mark_local


def plate_shard(
    name: str, num_shards: int | None, rows: ArrayLike | None = None, *, replicated: Iterable[str] = ()
) -> PlateShard:
    """Returns the description of a plate that is split over `num_shards` ranks; None stands for all of the world."""
    if num_shards is None:
        num_shards = backends.current().world_size
    indices = None if rows is None else row_numbers(rows)
    return PlateShard(name, num_shards, rows=indices, replicated=tuple(replicated))


def row_numbers(rows: ArrayLike | Tensor) -> NDArray[np.int64]:
    """Returns rows as integers on the host, (n,) int64; a tensor may lie on a GPU, which is waited for."""
    return np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows, dtype=np.int64)


def split_site(msg: Any, plates: Mapping[str, PlateShard]) -> None:
    """Multiplies the scale of a site inside sharded plates by the number of ranks; only once if there are several."""
    if site_is_subsample(msg):
        return
    sharded = None
    for frame in msg["cond_indep_stack"]:
        plate = plates.get(frame.name)
        if plate is None:
            continue
        if frame.dim is None:
            raise LocalParameterError(
                f"plate {frame.name!r} is used sequentially, as in `for i in pyro.plate(...)`; a sharded plate must be "
                "vectorized: `with pyro.plate(...):`"
            )
        plate.resize(int(frame.full_size or frame.size))
        sharded = sharded or plate
    if sharded is not None:
        scale_site(msg, sharded)


def scale_site(msg: Any, plate: PlateShard) -> None:
    """Multiplies the scale of a site by the number of ranks that share its plate, unless that was done already."""
    if not msg.get(SPLIT):
        msg["scale"] = msg["scale"] * plate.num_shards
        msg["infer"] = {**(msg["infer"] or {}), SPLIT: True}
        msg[SPLIT] = True


def check_guide(msg: Any, plates: Mapping[str, PlateShard]) -> None:
    """Raises if, during training, a site of the model was drawn by a guide whose plate of that name is not sharded."""
    if not msg.get(SPLIT) or msg["is_observed"] or SPLIT in msg["infer"] or not torch.is_grad_enabled():
        return
    name = next((frame.name for frame in msg["cond_indep_stack"] if frame.name in plates), None)
    if name is not None and msg["mask"] is not False:
        raise LocalParameterError(
            f"site {msg['name']!r} is in the sharded plate {name!r}, but the guide that drew it has an ordinary plate "
            f"of that name, so their densities differ by a factor of {plates[name].num_shards}. Use "
            f"distopt.infer.SVI, or give SVI shard(guide, plates={name!r}) in place of guide; in a hand-written guide "
            "use sharded_plate"
        )


class Unsplit(NamedTuple):
    """A parameter that is not split, and those of its dimensions that neither `event_dim` nor a plate explains."""

    leaf: Tensor
    """The unconstrained parameter."""
    shape: tuple[int, ...]
    """Shape of the constrained parameter."""
    dims: tuple[int, ...]
    """Dimensions that may run over datapoints by mistake."""


def keep_local(msg: Any, plates: Mapping[str, PlateShard], unsplit: dict[str, Unsplit]) -> None:
    """Marks a parameter as local if it has a row per datapoint of a sharded plate; notes it in `unsplit` if not."""
    rows_of = _find_rows(msg, plates)
    leaf = msg["value"].unconstrained()
    if rows_of is None:
        shape, event_dim = tuple(msg["value"].shape), msg["kwargs"].get("event_dim")
        dims: Sequence[int] = range(len(shape))
        if event_dim is not None:
            explained = {len(shape) - event_dim + frame.dim for frame in msg["cond_indep_stack"] if frame.vectorized}
            dims = [dim for dim in dims[: len(shape) - event_dim] if dim not in explained]
        unsplit[msg["name"]] = Unsplit(leaf, shape, tuple(dims))
        return

    plate, dim = rows_of
    if plate.size and leaf.shape[dim] != plate.size:
        raise LocalParameterError(
            f"parameter {msg['name']!r} of shape {tuple(leaf.shape)} has {leaf.shape[dim]} rows, but plate "
            f"{plate.name!r} has {plate.size} datapoints on this rank; it may have been made for another shard, or "
            "restored without its rows"
        )
    mark_local(leaf, LocalParameter(plate, tuple(leaf.shape), dim))
    unsplit.pop(msg["name"], None)


# A parameter with a row per datapoint that is stated without `event_dim`, or outside the plate, looks replicated.
# Averaging it over the ranks would mix rows of different datapoints, silently, since the shapes fit if shards are of
# equal size. Its one trace is a dimension of exactly the shard's size. A global parameter can have that size by chance,
# which only the user can know: so it is an error, with both ways out in its message.
def check_replicated(unsplit: Mapping[str, Unsplit], plates: Iterable[PlateShard]) -> None:
    """Raises if a parameter that is not local has a dimension of a shard's size that nothing else explains."""
    for plate in plates:
        for name, (leaf, shape, dims) in unsplit.items():
            dim = next((dim for dim in dims if shape[dim] == plate.size > 1), None)
            if dim is None or local_parameter(leaf) is not None:
                continue
            if not any(fnmatchcase(name, pattern) for pattern in plate.replicated):
                raise LocalParameterError(_describe_unsplit(name, shape, dim, plate))


def _find_rows(msg: Any, plates: Mapping[str, PlateShard]) -> tuple[PlateShard, int] | None:
    """Returns the sharded plate that a parameter has rows of, and the dimension, from the left; None for no plate.

    What the user declares with `shard(..., local=...)` comes first. Otherwise the dimension follows from Pyro's rule
    that the batch dimensions of a parameter, those left of its last `event_dim`, are aligned with the plates' dims.
    """
    name = msg["name"]
    num_dims = len(msg["value"].shape)
    for plate in plates.values():
        for pattern, dim in plate.local.items():
            if fnmatchcase(name, pattern):
                return plate, dim % num_dims

    event_dim = msg["kwargs"].get("event_dim")
    for frame in msg["cond_indep_stack"]:
        plate_here = plates.get(frame.name)
        if plate_here is None or frame.dim is None:
            continue
        plate_here.resize(int(frame.full_size or frame.size))
        if event_dim is None:
            continue
        dim = num_dims + frame.dim - event_dim
        # A dimension of size 1 is broadcast along the plate: one value for all datapoints, so it is replicated.
        if dim >= 0 and (msg["value"].shape[dim] != 1 or plate_here.size == 1):
            return plate_here, dim
    return None


def _describe_unsplit(name: str, shape: tuple[int, ...], dim: int, plate: PlateShard) -> str:
    """Returns the message for a replicated parameter that has the shard's size in its shape."""
    return (
        f"parameter {name!r} has shape {shape}, and sharded plate {plate.name!r} has {plate.size} datapoints on this "
        "rank: if it has a row per datapoint, it would be averaged with other ranks' rows. State it inside the plate "
        f"with event_dim, as pyro.param({name!r}, ..., event_dim={len(shape) - 1 - dim}), or give "
        f"shard(..., local={{{name!r}: {dim}}}). If the sizes agree by chance, give "
        f"shard or sharded_plate replicated=[{name!r}]"
    )
