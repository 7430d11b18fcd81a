"""Plates whose datapoints are split over the ranks, together with the latent variables of these datapoints.

With `W` ranks and the datapoints `D_r` on rank `r`, the ELBO of all data is the mean over the ranks of

    global + W * sum(local(n) for n in D_r)

where `global` are the terms outside the plate. So a rank multiplies the density of sites inside the plate by `W`, and
the all-reduce that averages gradients does the rest: gradients of global parameters are exact for any sizes of the
shards. The gradient of a local parameter is `W` times too large on the one rank that has it; the optimizer divides it
by `W` and sends it nowhere.

`sharded_plate` is for one's own model, `shard` for a model that is not to be changed. `distopt.infer.SVI` wraps both
model and guide, so that a plate that is sharded in one is sharded in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeAlias

import pyro
from numpy.typing import ArrayLike
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from distopt.infer.autoguides import GuidePlan, plan_autoguide, set_up_autoguide
from distopt.infer.splitting import (
    Unsplit,
    check_guide,
    check_replicated,
    keep_local,
    plate_shard,
    scale_site,
    split_site,
)
from distopt.rng import RankStream, begin_rank_stream
from distopt.sharding import LocalParameterError, PlateShard, is_split, mark_local

Weight: TypeAlias = float | Callable[[], float]


class sharded_plate(pyro.plate):  # type: ignore[misc]  # noqa: N801  # reads like pyro.plate, which it is
    r"""A `pyro.plate` over the datapoints that this rank holds, while other ranks hold the rest.

    It is used like `pyro.plate`, but the density of every site inside is multiplied by the number of ranks `W`, so that
    the mean over the ranks of losses and gradients is that of one process with all the data:

    .. math::

        \frac{1}{W} \sum_{r=1}^{W} \Bigl[\mathrm{global} + W \sum_{n \in r} \mathrm{local}_n\Bigr]
        = \mathrm{global} + \sum_n \mathrm{local}_n

    A `pyro.param` with `event_dim` that has a row per datapoint stays on its rank, and so does its optimizer state.

    Use it in the model and in a hand-written guide. An autoguide makes its own plates, so pass model and autoguide to
    `distopt.infer.SVI`, or wrap the guide with `shard`.

    Args:
        name: Name of the plate.
        size: Number of datapoints that this rank holds, 1 or more. Ranks may hold different numbers.
        subsample_size: Size of a minibatch of this rank's datapoints; None takes all.
        subsample: (batch,) int64 indices into this rank's datapoints, in [0, size), as in `pyro.plate`.
        dim: As in `pyro.plate`.
        rows: (size,) the global index of each datapoint, for `gather_local` and checkpoints. None: rank 0 holds the
            first ones, rank 1 the next ones, and so on.
        replicated: Names (or patterns, as in `fnmatch`) of parameters that are the same on all ranks although their
            shape contains this rank's `size`.
        num_shards: Number of ranks that the plate is split over; None for all ranks of the world.
        device: As in `pyro.plate`.

    Raises:
        LocalParameterError: A parameter seems to have a row per datapoint, but no `event_dim` that says so.

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
        # Handlers outside, such as those of `SVI`, learn of the plate, so that the guide's plate of this name is
        # sharded.
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
    """Makes plates of an existing model or guide behave like `sharded_plate`, without changing its code.

    Each rank calls it with its own datapoints, so the sizes of the plates are numbers of datapoints of this rank, and
    indices (`pyro.plate(name, size=n, subsample=index)`) count within them. A site inside several nested sharded plates
    is split once, as in a single plate. An autoguide needs no change either: `AutoNormal(shard(model, "cells"))`.

    Args:
        fn: Model or guide.
        plates: Names of its plates that are split over the ranks.
        rows: For each plate, (size,) global index of each datapoint; see `sharded_plate`.
        local: Parameters that have a row per datapoint but are stated without `event_dim`, or outside the plate: for
            each name (or pattern, as in `fnmatch`) the dimension that runs over the datapoints, or (plate, dimension)
            if there are several plates.
        replicated: Names (or patterns) of parameters that are the same on all ranks although their shape contains the
            size of the shard.
        num_shards: Number of ranks that the plates are split over; None for all ranks of the world.

    Returns:
        A callable with the arguments of `fn`, whose attributes are those of `fn`.

    Raises:
        LocalParameterError: When it is called: it has no such plate, it is a guide that cannot be split, or a parameter
            seems to have a row per datapoint but does not say so.

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

    for pattern, plate_and_dim in (local or {}).items():
        if isinstance(plate_and_dim, int):
            if len(names) != 1:
                raise LocalParameterError(
                    f"local={{{pattern!r}: {plate_and_dim}}}: there are several sharded plates ({', '.join(names)}); "
                    f"name one, as in local={{{pattern!r}: ({names[0]!r}, {plate_and_dim})}}"
                )
            plate_and_dim = (names[0], plate_and_dim)
        plate, dim = plate_and_dim
        shards[plate].local[pattern] = dim
    return Sharded(fn, shards, required=names)


class Sharded(partial[Any]):
    """A model or guide that runs inside the handler `Sharding`; what `shard` returns.

    Args:
        fn: Model or guide.
        plates: The sharded plates by name. Plates that are found while it runs are added; model and guide may share the
            dictionary.
        required: Plates that `fn` must have.
        weight: Factor of the density of sites outside sharded plates; or a function that returns that of each run.
    """

    # Pyro's losses treat messenger guides specially and find them with `pyro.poutine.unwrap`, which looks through
    # partials of the form `partial(call, handler, fn)`. So this is such a partial and not a plain wrapper.

    plates: dict[str, PlateShard]

    def __new__(
        cls, fn: Callable[..., Any], plates: dict[str, PlateShard], required: tuple[str, ...] = (), weight: Weight = 1.0
    ) -> Self:
        """Binds `fn` to the plates."""
        run = _Run(plates, () if isinstance(fn, AutoGuide) else required, weight)
        self = super().__new__(cls, _Run.__call__, run, fn)
        self.plates = plates
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.args[1], name)

    def current_weight(self) -> float:
        """Returns the factor of sites outside sharded plates in a run that begins now."""
        run: _Run = self.args[0]
        return run.current_weight()

    def __reduce__(self) -> Any:
        """Returns what it is pickled and copied by; a model and guide that are copied together share the plates."""
        run, fn = self.args
        return Sharded, (fn, self.plates, run.required, run.weight)


class _Run:
    """Runs a model or guide inside `Sharding`; an autoguide with a plan of what it does outside its plates."""

    def __init__(self, plates: dict[str, PlateShard], required: tuple[str, ...], weight: Weight) -> None:
        self._plates = plates
        self.required = required
        self.weight = weight
        self._plan: GuidePlan | None = None

    def __call__(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if isinstance(fn, AutoGuide):
            self._prepare(fn, args, kwargs)
        with Sharding(self._plates, self._plan, weight=self.current_weight()) as sharding:
            result = fn(*args, **kwargs)

        for name in self.required:
            if name not in sharding.seen:
                raise LocalParameterError(
                    f"shard() was given the plate {name!r}, but the model has no such plate. "
                    f"Its plates: {', '.join(sorted(sharding.seen)) or 'none'}"
                )
        return result

    def current_weight(self) -> float:
        return self.weight() if callable(self.weight) else self.weight

    def _prepare(self, guide: AutoGuide, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Plans which parameters of an autoguide belong to datapoints; again if plates were found meanwhile."""
        # Blocked, because the guide traces the model here, whose sites are not those of the surrounding trace.
        with poutine.block(), Sharding(self._plates, check=False):
            if not set_up_autoguide(guide, args, kwargs):
                return
        if self._plan is None or self._plan.plates != set(self._plates):
            self._plan = plan_autoguide(guide, self._plates)


def share_plates(model: Callable[..., Any], guide: Callable[..., Any], weight: Weight = 1.0) -> tuple[Sharded, Sharded]:
    """Wraps model and guide, so that a plate that is sharded in one is sharded in the other.

    Args:
        model: The model.
        guide: The guide.
        weight: Factor of the density of sites outside sharded plates; not 1 if ranks read unequally many rows. Or a
            function that returns the factor of each run.
    """
    plates: dict[str, PlateShard] = {}
    for fn in (model, guide):
        if isinstance(fn, Sharded):
            plates.update(fn.plates)
    return Sharded(model, plates, weight=weight), Sharded(guide, plates, weight=weight)


class Sharding(Messenger):  # type: ignore[misc]
    """The effect handler behind `shard`: scales sites of its plates, marks their parameters, checks the rest.

    Args:
        plates: By name. Each `sharded_plate` inside is added, and the plates of such handlers inside.
        plan: What an autoguide does for datapoints outside its plates.
        check: Whether to check for parameters that seem to have a row per datapoint but do not say so.
        weight: Factor of the density of sites outside the plates.

    Attributes:
        plates: As given, with what was added.
        seen: Names of all plates that sites were in.
    """

    def __init__(
        self, plates: dict[str, PlateShard], plan: GuidePlan | None = None, *, check: bool = True, weight: float = 1.0
    ) -> None:
        super().__init__()
        self._weight = weight
        self.plates = plates
        self.seen: set[str] = set()
        self._plan = plan or GuidePlan(set())
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

        # Every site is scaled by the number of ranks (inside sharded plates) or by this rank's weight (outside).
        if msg["name"] in self._plan.sites:
            scale_site(msg, self._plan.sites[msg["name"]])
        else:
            split_site(msg, self.plates)
        if self._weight != 1.0 and not is_split(msg):
            msg["scale"] = msg["scale"] * self._weight

        # Ranks that draw the same numbers for global sites must not do so for sites of different datapoints.
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
        planned = self._plan.params.get(msg["name"])
        if planned is None:
            keep_local(msg, self.plates, self._unsplit)
        else:
            mark_local(msg["value"].unconstrained(), planned)
            self._unsplit.pop(msg["name"], None)
