"""Plates whose datapoints are split over the ranks, with the latent variables that belong to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

import pyro
from numpy.typing import ArrayLike
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from distopt.infer.autoguides import Plan, plan_autoguide, set_up
from distopt.infer.splitting import (
    Unsplit,
    check_guide,
    check_replicated,
    is_split,
    keep_local,
    plate_shard,
    scale_site,
    split_site,
)
from distopt.rng import RankStream, begin_rank_stream
from distopt.sharding import LocalParameterError, PlateShard, mark_local


class sharded_plate(pyro.plate):  # type: ignore[misc]  # noqa: N801  # reads like pyro.plate, which it is
    """A `pyro.plate` over the datapoints that this rank holds, of more that are on the other ranks.

    Inside it everything is as in `pyro.plate`, but the density of every site is multiplied by the number of ranks `W`,
    so that the mean of the ranks' losses, and of their gradients, is that of one process with all the data, whatever
    the sizes of the shards: `mean_r [global + W sum_(n in r) local_n] = global + sum_n local_n`. A `pyro.param` with
    `event_dim` that has a row per datapoint stays on its rank, and its optimizer state too.

    Use it in the model and in a hand-written guide. An autoguide makes plates of its own, so give model and autoguide
    to `distopt.infer.SVI`, or the guide through `shard`.

    Args:
        name: Name of the plate.
        size: Number of datapoints this rank holds, 1 or more. Ranks may hold different numbers.
        subsample_size: Size of a minibatch of this rank's datapoints; None for all.
        subsample: (batch,) int64 indices into this rank's datapoints, in [0, size), as in `pyro.plate`.
        dim: As in `pyro.plate`.
        rows: (size,) the global index of each datapoint, for `gather` and checkpoints. None: rank 0 holds the first
            ones, rank 1 the next ones, and so on.
        replicated: Names (or patterns, as in `fnmatch`) of parameters that have this rank's `size` in their shape by
            chance.
        num_shards: Over how many ranks the plate is split. None: all of the world.
        device: As in `pyro.plate`.

    Raises:
        LocalParameterError: A parameter has a row per datapoint, but no `event_dim` to say so.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(data):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with sharded_plate("rows", len(data)):
        ...         z = pyro.sample("z", dist.Normal(loc, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=data)
    """

    def __init__(
        self,
        name: str,
        size: int,
        subsample_size: int | None = None,
        subsample: Tensor | None = None,
        dim: int | None = None,
        *,
        rows: ArrayLike | None = None,
        replicated: Iterable[str] = (),
        num_shards: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__(name, size, subsample_size, subsample, dim, device=device)
        self._shard = plate_shard(name, num_shards, rows, replicated=replicated)
        self._shard.resize(size)
        self._unsplit: dict[str, Unsplit] = {}
        for handler in _PYRO_STACK:
            if isinstance(handler, Sharding):
                handler.plates[name] = self._shard

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if kind is None:
            check_replicated(self._unsplit, [self._shard])
            self._unsplit = {}

    def _process_message(self, msg: Any) -> None:
        super()._process_message(msg)
        if msg["type"] == "sample":
            split_site(msg, {self.name: self._shard})

    def _postprocess_message(self, msg: Any) -> None:
        if msg["type"] == "param":
            keep_local(msg, {self.name: self._shard}, self._unsplit)
        elif msg["type"] == "sample":
            check_guide(msg, {self.name: self._shard})
        super()._postprocess_message(msg)


def shard(
    fn: Callable[..., Any],
    plates: str | Iterable[str],
    *,
    rows: Mapping[str, ArrayLike] | None = None,
    local: Mapping[str, int | tuple[str, int]] | None = None,
    replicated: Iterable[str] = (),
    num_shards: int | None = None,
) -> Sharded:
    """Makes named plates of a model (or guide) that is not ours to edit behave as `sharded_plate`.

    Each rank calls it with its own datapoints, so the plates' sizes are numbers of datapoints of this rank, and index
    arguments (`pyro.plate(name, size=n, subsample=index)`) count within them. A site inside several of the plates,
    nested ones, is one rank's, as in a single plate. An untouched autoguide goes on top: `AutoNormal(shard(model,
    "cells"))`.

    Args:
        fn: Model or guide.
        plates: Names of its plates that are split over the ranks.
        rows: By plate, (size,) global index of each datapoint; see `sharded_plate`.
        local: Parameters of model or guide with a row per datapoint that are stated without `event_dim`, or outside the
            plate: by name (or pattern, as in `fnmatch`), which dimension runs over the datapoints, or (plate,
            dimension) where there are several plates.
        replicated: Names (or patterns) of parameters that have the shard's size in their shape by chance.
        num_shards: Over how many ranks the plates are split. None: all of the world.

    Returns:
        A callable as `fn`. Other attributes are `fn`'s own.

    Raises:
        LocalParameterError: When called: a plate that the code does not have, a guide that cannot be split, a
            replicated parameter whose shape follows the size of the shard.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def published(data):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("cells", len(data)):
        ...         z = pyro.sample("z", dist.Normal(loc, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=data)
        >>> model = shard(published, plates="cells")
        >>> guide = AutoNormal(model)
    """
    names = (plates,) if isinstance(plates, str) else tuple(plates)
    shards = {name: plate_shard(name, num_shards, (rows or {}).get(name), replicated=replicated) for name in names}
    for pattern, where in (local or {}).items():
        if isinstance(where, int):
            if len(names) != 1:
                raise LocalParameterError(
                    f"local={{{pattern!r}: {where}}}: there are several sharded plates ({', '.join(names)}), so say "
                    f"which, as local={{{pattern!r}: ({names[0]!r}, {where})}}"
                )
            where = (names[0], where)
        shards[where[0]].local[pattern] = where[1]
    return Sharded(fn, shards, required=names)


class Sharded(partial[Any]):
    """A model or guide that runs inside `Sharding`; what `shard` returns.

    It is a `partial` of the form that `pyro.poutine.unwrap` sees through, for Pyro's losses look for messenger guides
    so.

    Args:
        fn: Model or guide.
        plates: The sharded plates by name; plates that are found inside are added, and model and guide may share it.
        required: Plates that `fn` must have.
        weight: By which the density of sites outside sharded plates is multiplied.
    """

    plates: dict[str, PlateShard]

    def __new__(
        cls, fn: Callable[..., Any], plates: dict[str, PlateShard], required: tuple[str, ...] = (), weight: float = 1.0
    ) -> Self:
        """Binds `fn` to the plates."""
        run = _Run(plates, () if isinstance(fn, AutoGuide) else required, weight)
        self = super().__new__(cls, _Run.__call__, run, fn)
        self.plates = plates
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.args[1], name)


class _Run:
    """Runs a model or guide inside `Sharding`, an autoguide with a plan of what it does outside its plates."""

    def __init__(self, plates: dict[str, PlateShard], required: tuple[str, ...], weight: float) -> None:
        self._plates, self._weight = plates, weight
        self._required = required
        self._plan: Plan | None = None

    def __call__(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if isinstance(fn, AutoGuide):
            self._prepare(fn, args, kwargs)
        with Sharding(self._plates, self._plan, weight=self._weight) as sharding:
            result = fn(*args, **kwargs)
        for name in self._required:
            if name not in sharding.seen:
                raise LocalParameterError(
                    f"plate {name!r} was to be sharded, but the model has no such plate. "
                    f"Its plates: {', '.join(sorted(sharding.seen)) or 'none'}"
                )
        return result

    def _prepare(self, guide: AutoGuide, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Finds out which of an autoguide's parameters belong to datapoints, setting it up if that takes a plan."""
        with poutine.block(), Sharding(self._plates, check=False):
            if not set_up(guide, args, kwargs):
                return
        if self._plan is None or self._plan.plates != set(self._plates):
            self._plan = plan_autoguide(guide, self._plates)


def share_plates(model: Callable[..., Any], guide: Callable[..., Any], weight: float = 1.0) -> tuple[Sharded, Sharded]:
    """Wraps model and guide so that a plate that is sharded in one is so in the other.

    Sites outside sharded plates are weighted: with unequal minibatches of replicated plates, by this rank's part.
    """
    plates: dict[str, PlateShard] = {}
    for fn in (model, guide):
        if isinstance(fn, Sharded):
            plates.update(fn.plates)
    return Sharded(model, plates, weight=weight), Sharded(guide, plates, weight=weight)


class Sharding(Messenger):  # type: ignore[misc]
    """The effect handler behind `shard`: scales sites of its plates, keeps their parameters here, checks the rest.

    Args:
        plates: By name. `sharded_plate`s and the plates of handlers that run inside it are added.
        plan: What an autoguide does for datapoints outside its plates.
        check: Whether to check that no replicated parameter follows the shard's size.
        weight: By which the density of sites outside the plates is multiplied.
    """

    def __init__(
        self, plates: dict[str, PlateShard], plan: Plan | None = None, *, check: bool = True, weight: float = 1.0
    ) -> None:
        super().__init__()
        self._weight = weight
        self.plates = plates
        self.seen: set[str] = set()
        self._plan = plan or Plan(set())
        self._check = check
        self._unsplit: dict[str, Unsplit] = {}
        self._rank_streams: list[tuple[str, RankStream | None]] = []

    def __enter__(self) -> Sharding:
        for handler in _PYRO_STACK:
            if isinstance(handler, Sharding):
                handler.plates.update(self.plates)
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        while self._rank_streams:
            self._end_rank_stream()
        if kind is None and self._check:
            check_replicated(self._unsplit, self.plates.values())

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        self.seen.update(frame.name for frame in msg["cond_indep_stack"])
        if msg["name"] in self._plan.sites:
            scale_site(msg, self._plan.sites[msg["name"]])
        else:
            split_site(msg, self.plates)
        if self._weight != 1.0 and not is_split(msg):
            msg["scale"] = msg["scale"] * self._weight
        if is_split(msg) and not msg["is_observed"] and not msg["done"]:
            self._rank_streams.append((msg["name"], begin_rank_stream()))

    def _pyro_post_sample(self, msg: Any) -> None:
        if self._rank_streams and self._rank_streams[-1][0] == msg["name"]:
            self._end_rank_stream()
        check_guide(msg, self.plates)

    def _end_rank_stream(self) -> None:
        _, stream = self._rank_streams.pop()
        if stream is not None:
            stream.end()

    def _pyro_post_param(self, msg: Any) -> None:
        entry = self._plan.params.get(msg["name"])
        if entry is None:
            keep_local(msg, self.plates, self._unsplit)
        else:
            mark_local(msg["value"].unconstrained(), entry)
            self._unsplit.pop(msg["name"], None)
