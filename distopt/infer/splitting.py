"""What a sharded plate does to one message of Pyro: scale a site, keep a parameter, notice what is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from distopt import backends
from distopt.sharding import LocalParameter, LocalParameterError, PlateShard, local_parameter, mark_local

_SPLIT = "_sharded"  # on a message that has been dealt with, and in a site's `infer`, where `replay` carries it on


def plate_shard(
    name: str, num_shards: int | None, rows: ArrayLike | None = None, *, replicated: Iterable[str] = ()
) -> PlateShard:
    """Returns a plate's record for the world that this process is in."""
    if num_shards is None:
        num_shards = backends.current().world_size
    indices = None if rows is None else np.asarray(rows, dtype=np.int64)
    return PlateShard(name, num_shards, rows=indices, replicated=tuple(replicated))


def split_site(msg: Any, plates: Mapping[str, PlateShard]) -> None:
    """Multiplies the scale of a site in sharded plates by the number of ranks, once for all of them."""
    if site_is_subsample(msg):
        return
    inside = None
    for frame in msg["cond_indep_stack"]:
        plate = plates.get(frame.name)
        if plate is None:
            continue
        if frame.dim is None:
            raise LocalParameterError(
                f"plate {frame.name!r} is iterated over; a sharded plate must be vectorized: with pyro.plate(...) as "
                "index:"
            )
        plate.resize(int(frame.full_size or frame.size))
        inside = inside or plate
    if inside is not None:
        scale_site(msg, inside)


def scale_site(msg: Any, plate: PlateShard) -> None:
    """Multiplies a site's scale by the number of ranks that share its plate, if that has not been done."""
    if not msg.get(_SPLIT):
        msg["scale"] = msg["scale"] * plate.num_shards
        msg["infer"] = {**(msg["infer"] or {}), _SPLIT: True}
        msg[_SPLIT] = True


def is_split(msg: Any) -> bool:
    """Whether a site's scale has been multiplied by the number of ranks."""
    return bool(msg.get(_SPLIT))


def check_guide(msg: Any, plates: Mapping[str, PlateShard]) -> None:
    """Raises when the model's site was drawn by a guide that knows nothing of the sharded plate, while training."""
    if not msg.get(_SPLIT) or msg["is_observed"] or _SPLIT in msg["infer"] or not torch.is_grad_enabled():
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
    """A parameter that is not split, and the dimensions that neither `event_dim` nor a plate explains."""

    leaf: Tensor
    shape: tuple[int, ...]
    dims: tuple[int, ...]


def keep_local(msg: Any, plates: Mapping[str, PlateShard], unsplit: dict[str, Unsplit]) -> None:
    """Marks a parameter with a row per datapoint of a sharded plate as local; notes any other in `unsplit`."""
    where = _rows_of(msg, plates)
    leaf = msg["value"].unconstrained()
    if where is None:
        shape, event_dim = tuple(msg["value"].shape), msg["kwargs"].get("event_dim")
        dims: Sequence[int] = range(len(shape))
        if event_dim is not None:
            explained = {len(shape) - event_dim + frame.dim for frame in msg["cond_indep_stack"] if frame.vectorized}
            dims = [dim for dim in dims[: len(shape) - event_dim] if dim not in explained]
        unsplit[msg["name"]] = Unsplit(leaf, shape, tuple(dims))
        return
    plate, dim = where
    if plate.size and leaf.shape[dim] != plate.size:
        raise LocalParameterError(
            f"parameter {msg['name']!r} of shape {tuple(leaf.shape)} has {leaf.shape[dim]} rows, but plate "
            f"{plate.name!r} has {plate.size} datapoints on this rank. Was it made for another shard, or restored "
            "without its rows?"
        )
    mark_local(leaf, LocalParameter(plate, tuple(leaf.shape), dim))
    unsplit.pop(msg["name"], None)


def check_replicated(unsplit: Mapping[str, Unsplit], plates: Iterable[PlateShard]) -> None:
    """Raises when a parameter that is not local has a dimension of a shard's size that nothing else explains."""
    for plate in plates:
        for name, (leaf, shape, dims) in unsplit.items():
            dim = next((dim for dim in dims if shape[dim] == plate.size > 1), None)
            if dim is None or local_parameter(leaf) is not None:
                continue
            if not any(fnmatchcase(name, pattern) for pattern in plate.replicated):
                raise LocalParameterError(_follows(name, shape, dim, plate))


def _rows_of(msg: Any, plates: Mapping[str, PlateShard]) -> tuple[PlateShard, int] | None:
    """Which sharded plate a parameter has rows of, and along which dimension from the left; None if of none."""
    name, dims = msg["name"], len(msg["value"].shape)
    for plate in plates.values():
        for pattern, dim in plate.local.items():
            if fnmatchcase(name, pattern):
                return plate, dim % dims
    event_dim = msg["kwargs"].get("event_dim")
    for frame in msg["cond_indep_stack"]:
        inside = plates.get(frame.name)
        if inside is None or frame.dim is None:
            continue
        inside.resize(int(frame.full_size or frame.size))
        if event_dim is None:
            continue
        dim = dims + frame.dim - event_dim
        if dim >= 0 and (msg["value"].shape[dim] != 1 or inside.size == 1):
            return inside, dim
    return None


def _follows(name: str, shape: tuple[int, ...], dim: int, plate: PlateShard) -> str:
    """The message for a replicated parameter that has the shard's size in its shape."""
    return (
        f"parameter {name!r} has shape {shape}, and sharded plate {plate.name!r} has {plate.size} datapoints on this "
        "rank: if it has a row per datapoint, it would be averaged with other ranks' rows. State it inside the plate "
        f"with event_dim, as pyro.param({name!r}, ..., event_dim={len(shape) - 1 - dim}), or give "
        f"shard(..., local={{{name!r}: {dim}}}). If the sizes agree by chance, give "
        f"shard or sharded_plate replicated=[{name!r}]"
    )
