"""Posterior and predictive samples of all rows, of which each rank draws those of its own.

A sample of the model is one of all its variables together. So the ranks draw variables of all rows alike, from a common
stream of random numbers, and those of rows from streams of their own, whose lengths may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import xxhash
from numpy.typing import ArrayLike, NDArray
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from distopt import backends
from distopt.backends import Backend, Json
from distopt.infer.autoguides import GuidePlan, plan_autoguide, set_up_autoguide
from distopt.infer.gathering import gather_of_plate, write_rows
from distopt.infer.sharded_plate import Sharded, Sharding
from distopt.reduce.errors import gather_unless_failed
from distopt.rng import begin_rank_stream, drawing_alike, preserve_rng_during_setup
from distopt.sharding import LocalParameterError, PlateShard

SAMPLES = 1 << 41
"""Steps of the noise of samples begin here, beyond those of training and validation."""
_TOLERANCE = 1e-4  # of samples that ranks on other processors have computed

Dims: TypeAlias = Mapping[str, int | tuple[str, int]]


class RowsOfSite(NamedTuple):
    """Where the values of a site have the rows of a plate."""

    plate: str
    """Name of the plate."""
    dim: int
    """The dimension that runs over the rows, from the right."""
    num_rows: int
    """How many rows this rank has there."""
    is_subsample: bool
    """Whether the plate has more rows than these."""


def predictive(
    model: Callable[..., Any],
    posterior_samples: Mapping[str, Tensor] | None = None,
    guide: Callable[..., Any] | None = None,
    num_samples: int | None = None,
    return_sites: Iterable[str] | None = (),
    parallel: bool = False,
    *,
    plates: str | Iterable[str] = (),
    rows: Mapping[str, ArrayLike] | None = None,
    dims: Dims | None = None,
    seed: int | None = None,
    folder: str | Path | None = None,
    backend: Backend | None = None,
) -> Callable[..., dict[str, Tensor]]:
    """Returns what `pyro.infer.Predictive` is for one process: a function that draws samples, here of all ranks' rows.

    Each rank calls it with the arguments of the model for its own rows, and all get the samples of all rows. Variables
    outside the plates are the same on all ranks in each sample. Where nothing is drawn, as with `AutoDelta` and data
    that are given, the result is that of `Predictive` in one process with all rows.

    Args:
        model: As for `Predictive`; a model that was sharded brings its plates.
        posterior_samples: As for `Predictive`; of this rank's rows.
        guide: As for `Predictive`.
        num_samples: As for `Predictive`.
        return_sites: As for `Predictive`.
        parallel: As for `Predictive`.
        plates: Names of the plates over rows that are split over the ranks.
        rows: For each plate, (size,) the global index of each row that this rank calls with; together they are numbers
            from 0 without gaps. None: as in training, if the model was sharded with `rows` and is called with as many;
            else rank 0 has the first ones, rank 1 the next ones, and so on.
        dims: For sites that are not inside the plate (`pyro.deterministic`, `"_RETURN"`) but have a row for each of its
            datapoints: the dimension that runs over them, from the right, as -1; or (plate, dimension).
        seed: Of the samples, rank 0's; None to draw one from rank 0's generator.
        folder: Where each rank writes the samples of its rows, for `read_local`, in place of gathering them. In a file,
            the first dimension runs over the rows, and the second one over the samples.
        backend: Link to the other ranks; None for the current one.

    Returns:
        A function of the model's arguments, to be called on all ranks. It returns (num_samples, ...) detached samples
        by site: of all rows, by global index, and the same on all ranks; of this rank's rows, if there is a folder.
        Generators are as before, but for the seed.

    Raises:
        LocalParameterError: When it is called: samples that should be the same on all ranks are not, a row is held by
            no rank or by several, or it is not known which rows these are.
        Exception: Likewise, what model or guide raised on this rank.
        PeerError: Likewise, what they raised on another one.

    Cost:
        In each call a gather of a digest for each site, and an all-reduce of its samples of all rows, unless there is a
        folder.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", len(x)):
        ...         return pyro.sample("y", dist.Normal(slope * x, 0.1), obs=y)
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> samples = predictive(model, guide=guide, num_samples=50, plates="rows")(torch.arange(7.0))
        >>> {name: tuple(value.shape) for name, value in samples.items()}
        {'slope': (50, 1), 'y': (50, 7)}
    """
    draw = partial(Predictive, num_samples=num_samples, return_sites=return_sites, parallel=parallel)
    given = dict(posterior_samples) if posterior_samples is not None else None
    draw(model, given, guide)  # so that wrong arguments are refused here
    names = (plates,) if isinstance(plates, str) else tuple(plates)

    def sample(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        world = backend or backends.current()
        with drawing_alike(_agreed_seed(seed, world), SAMPLES, world.device):
            mine: _Drawn | Exception
            try:
                drawing = SampledRows(names, world.world_size)
                run = draw(drawing.around(model, world.device), given, guide and drawing.around(guide, world.device))
                samples = dict(_tensors(run(*args, **kwargs)))
                sites = drawing.sites | dict(drawing.declared(samples, dims or {}))
                mine = _Drawn(samples, sites, drawing.known_rows(), rows or {})
            except Exception as error:  # the others wait for what this rank has drawn
                mine = error
        return _bring_together(mine, folder, world)

    return sample


class SampledRows(Sharding):
    """The effect handler inside which samples are drawn: it gives each rank its own noise for rows, and notes sites.

    Args:
        plates: Names of the plates that are split over the ranks.
        num_shards: Number of ranks.
        plan: As for `Sharding`.

    Attributes:
        sites: Those that have rows of the plates, as far as they were met.
    """

    def __init__(self, plates: Iterable[str], num_shards: int, plan: GuidePlan | None = None) -> None:
        super().__init__({name: PlateShard(name, num_shards) for name in plates}, plan, check=False)
        self.sites: dict[str, RowsOfSite] = {}
        self._trained: dict[str, PlateShard] = {}  # of sharded models

    def around(self, fn: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        """Returns a model or guide that runs inside such a handler, which shares plates and sites with this one."""
        while isinstance(fn, Sharded):
            self._trained |= fn.plates
            for name, plate in fn.plates.items():
                self.plates.setdefault(name, PlateShard(name, plate.num_shards))
            fn = fn.args[1]
        if isinstance(fn, nn.Module):
            preserve_rng_during_setup([fn], device)  # which would draw as many numbers as a rank has rows

        def run(*args: Any, **kwargs: Any) -> Any:
            inside = SampledRows((), 1)
            inside.plates = self.plates
            inside.sites = self.sites
            if isinstance(fn, AutoGuide) and set_up_autoguide(fn, args, kwargs):
                inside._plan = plan_autoguide(fn, self.plates)
            with inside:
                return fn(*args, **kwargs)

        return run

    def known_rows(self) -> dict[str, NDArray[np.int64]]:
        """Returns the global index of each row of training, by plate, where the model has it."""
        plates = [*self._trained.items(), *self.plates.items()]
        return {name: plate.rows for name, plate in plates if plate.rows is not None}

    def declared(self, samples: Mapping[str, Tensor], dims: Dims) -> Iterable[tuple[str, RowsOfSite]]:
        """Yields the sites whose rows the user has declared."""
        for name, plate_and_dim in dims.items():
            if isinstance(plate_and_dim, int):
                if len(self.plates) != 1:
                    known = ", ".join(sorted(self.plates)) or "none"
                    raise LocalParameterError(
                        f"dims={{{name!r}: {plate_and_dim}}}: expected one plate, found {known}. Name it in plates=, "
                        f"or give dims={{{name!r}: (PLATE, {plate_and_dim})}}."
                    )
                plate_and_dim = (next(iter(self.plates)), plate_and_dim)
            if name not in samples:
                continue
            plate, dim = plate_and_dim
            shape = tuple(samples[name].shape)
            if not -len(shape) < dim < 0:
                raise LocalParameterError(
                    f"dims={{{name!r}: {dim}}}: its samples have shape {shape}. Give a dimension from the right, "
                    "-1 for the last one; the first one counts the samples."
                )
            yield name, RowsOfSite(plate, dim, shape[dim], False)

    def _pyro_sample(self, msg: Any) -> None:
        # Of a plate that selects rows at random each rank draws as many numbers as it has rows.
        if site_is_subsample(msg) and msg["name"] in self.plates:
            self._rank_streams.append((msg["name"], begin_rank_stream()))
        super()._pyro_sample(msg)

    def _pyro_post_sample(self, msg: Any) -> None:
        super()._pyro_post_sample(msg)
        if site_is_subsample(msg) or not isinstance(msg["value"], Tensor):
            return
        frames = [frame for frame in msg["cond_indep_stack"] if frame.name in self.plates]
        if len(frames) > 1:
            names = " and ".join(repr(frame.name) for frame in frames)
            raise LocalParameterError(
                f"site {msg['name']!r} is inside the plates {names}, which are both split over the ranks, so there are "
                "values that no rank has drawn. Give the name of one plate alone."
            )
        shape = msg["value"].shape
        for frame in frames:
            # What a model states by pyro.deterministic may have all its dimensions in event_dim, those of plates too.
            for dim in (frame.dim - msg["fn"].event_dim, frame.dim):
                if len(shape) >= -dim and shape[dim] == frame.size:
                    is_subsample = frame.full_size not in (None, frame.size)
                    self.sites[msg["name"]] = RowsOfSite(frame.name, dim, int(frame.size), is_subsample)
                    return

    def _pyro_post_param(self, msg: Any) -> None:
        """Leaves parameters as they are: only training marks those of rows."""


class _Drawn:
    """Samples of this rank, and what the ranks must know of each other's.

    Args:
        samples: By site.
        sites: Those that have rows of a plate.
        known: The global index of each row in training, by plate.
        given: The global index of each row, by plate, as the user gave it.

    Raises:
        LocalParameterError: Rows were given of which there are not as many, or sites have unequally many of a plate.
    """

    def __init__(
        self,
        samples: Mapping[str, Tensor],
        sites: Mapping[str, RowsOfSite],
        known: Mapping[str, NDArray[np.int64]],
        given: Mapping[str, ArrayLike],
    ) -> None:
        self.samples = dict(samples)
        self.sites = {name: site for name, site in sorted(sites.items()) if name in samples}
        self._known = known
        self._given = {name: np.asarray(each, dtype=np.int64) for name, each in given.items()}
        firsts: dict[str, str] = {}
        for name, site in self.sites.items():
            first = firsts.setdefault(site.plate, name)
            if self.sites[first].num_rows != site.num_rows:
                raise LocalParameterError(
                    f"plate {site.plate!r}: samples of site {first!r} have {self.sites[first].num_rows} rows in their "
                    f"dimension {self.sites[first].dim}, and those of {name!r} have {site.num_rows} in dimension "
                    f"{site.dim}. Give the dimension that runs over the rows, dims={{SITE: DIM}}, or leave out of "
                    "return_sites what has no row for each datapoint."
                )
        self._num_rows = {site.plate: site.num_rows for site in self.sites.values()}
        for plate, num_rows in self._num_rows.items():
            PlateShard(plate, 1, rows=self._given.get(plate)).resize(num_rows)

    def describe(self) -> Json:
        """Returns what is compared: each site's dtype and shape but for rows, a digest if it has none; and plates."""
        sites = {}
        for name, value in sorted(self.samples.items()):
            shape: list[Any] = list(value.shape)
            if name not in self.sites:
                sites[name] = [f"{value.dtype} {shape}", _digest(value)]
                continue
            shape[self.sites[name].dim] = f"rows of {self.sites[name].plate}"
            sites[name] = [f"{value.dtype} {shape}".replace("'", ""), ""]
        plates = {
            plate: {
                "num_rows": num_rows,
                "known": len(self._known.get(plate, ())) == num_rows,
                "given": plate in self._given,
                "part": any(site.is_subsample for site in self.sites.values() if site.plate == plate),
            }
            for plate, num_rows in sorted(self._num_rows.items())
        }
        return {"sites": sites, "plates": plates}

    def shard(self, plate: str, facts: Sequence[Mapping[str, Any]]) -> PlateShard:
        """Returns which rows of a plate this rank has drawn.

        Args:
            plate: Its name.
            facts: What `describe` says of it on each rank.
        """
        rows = self._given.get(plate)
        is_given = [each["given"] for each in facts]
        if any(is_given) and not all(is_given):
            raise LocalParameterError(
                f"plate {plate!r}: rank {is_given.index(True)} was given the numbers of its rows, and rank "
                f"{is_given.index(False)} was not. Give rows={{{plate!r}: INDICES}} on all ranks, or on none."
            )
        if not any(is_given) and all(each["known"] for each in facts):
            rows = self._known[plate]
        elif any(each["part"] and not each["given"] for each in facts):
            raise LocalParameterError(
                f"plate {plate!r} has more rows than those of this call: give their numbers among those of all ranks, "
                f"rows={{{plate!r}: INDICES}}."
            )
        return PlateShard(plate, len(facts), self._num_rows[plate], rows)


def _bring_together(mine: _Drawn | Exception, folder: str | Path | None, backend: Backend) -> dict[str, Tensor]:
    """Returns the samples of all rows on every rank, or writes them per rank if there is a folder."""
    by_rank = gather_unless_failed(backend, mine if isinstance(mine, Exception) else mine.describe())
    assert isinstance(mine, _Drawn)
    _compare_sites([each["sites"] for each in by_rank])

    facts = {plate: [each["plates"][plate] for each in by_rank] for plate in by_rank[0]["plates"]}
    shards = {plate: mine.shard(plate, each) for plate, each in facts.items()}
    for name in sorted(mine.samples):
        if any(each["sites"][name][1] != by_rank[0]["sites"][name][1] for each in by_rank):
            _take_from_rank_0(name, mine.samples[name], backend)
    values = {name: (mine.samples[name].movedim(site.dim, 0), shards[site.plate]) for name, site in mine.sites.items()}
    if folder is not None:
        write_rows(folder, values, backend)
        return mine.samples
    all_rows = {plate: np.arange(sum(each["num_rows"] for each in ranks)) for plate, ranks in facts.items()}
    gathered = {
        name: gather_of_plate(rows_first, plate, all_rows[plate.name], backend).movedim(0, mine.sites[name].dim)
        for name, (rows_first, plate) in values.items()
    }
    return mine.samples | gathered


def _compare_sites(by_rank: Sequence[Mapping[str, Sequence[str]]]) -> None:
    """Raises if a site has another dtype, or other dimensions than those of rows, on some rank."""
    for rank, sites in enumerate(by_rank):
        for name in sorted(by_rank[0].keys() | sites.keys()):
            first = by_rank[0].get(name, ["missing"])[0]
            other = sites.get(name, ["missing"])[0]
            if first != other:
                raise LocalParameterError(
                    f"samples of site {name!r} are {other} on rank {rank}, and {first} on rank 0. {_advice(name)}"
                )


def _take_from_rank_0(name: str, value: Tensor, backend: Backend) -> None:
    """Takes rank 0's samples where those of other processors are other roundings; a collective call."""
    of_rank_0 = value.clone().contiguous()
    backend.broadcast(of_rank_0, 0).wait()
    is_near = torch.allclose(value.double(), of_rank_0.double(), _TOLERANCE, _TOLERANCE, equal_nan=True)
    near = backend.all_gather_json(is_near)
    if not all(near):
        raise LocalParameterError(
            f"site {name!r} has no rows of a plate that is split, and its samples on rank {near.index(False)} are not "
            f"those of rank 0. {_advice(name)}"
        )
    value.copy_(of_rank_0)


def _digest(value: Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(value.cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())


def _advice(name: str) -> str:
    return (
        f"If it has a value for each row, name its plate (plates=NAME), or give dims={{{name!r}: DIM}} if it is "
        "outside of the plate; if not, it was computed from a rank's own rows: leave it out of return_sites."
    )


def _tensors(samples: Mapping[str, Any]) -> Iterable[tuple[str, Tensor]]:
    for name, value in samples.items():
        if not isinstance(value, Tensor):
            raise LocalParameterError(
                f"site {name!r} is a {type(value).__name__}, expected a tensor: leave it out of return_sites."
            )
        yield name, value.detach().clone()


def _agreed_seed(seed: int | None, backend: Backend) -> int:
    drawn = int(torch.randint(2**31, ())) if seed is None else seed
    return int(backend.all_gather_json(drawn)[0])
