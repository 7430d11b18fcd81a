"""What a model looks like on each rank, to find models that mean something else on several ranks than on one.

Averages over ranks are means: they equal one process with all rows only if each rank scales its rows to all of them, as
`pyro.plate(name, num_rows_of_all, subsample_size=...)` and sharded plates do. Two ways of writing a model go wrong
without an error, because all shapes agree. Both show in the first run of the model, once the ranks compare:

- `pyro.plate("rows", len(x))` over this rank's rows: nothing scales them, so the mean over W ranks counts the
  likelihood 1/W, beside priors that count in full. The posterior is too wide.
- a plate with a latent variable for each datapoint that is not sharded: the i-th datapoints of all ranks, which are
  different ones, share a parameter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import xxhash
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from distopt.backends import Json
from distopt.reduce.errors import ranks_by_value
from distopt.sharding import is_split

_PARTICLES = "num_particles_vectorized"  # a plate that Pyro's ELBOs put around the model
_MAX_NAMES = 3  # of sites or parameters that are described


class ModelSurvey(Messenger):  # type: ignore[misc]
    """An effect handler that records plates, observations and parameters of the model and guide inside it."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[str, int] = {}
        self._subsampled: set[str] = set()
        self._in_batch: dict[str, int] = {}
        self._latent: dict[tuple[str, ...], list[str]] = {}
        self._observed: dict[tuple[str, ...], dict[str, Any]] = {}
        self._params: dict[str, tuple[tuple[int, ...], set[str]]] = {}
        self._joint_numel = 0  # of the largest site that stands for all variables of an autoguide

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        plates = tuple(frame.name for frame in msg["cond_indep_stack"] if frame.name != _PARTICLES)
        for frame in msg["cond_indep_stack"]:
            size = int(frame.full_size or frame.size)
            self._sizes[frame.name] = size
            self._in_batch[frame.name] = int(frame.size)
            if frame.size != size:
                self._subsampled.add(frame.name)

        if msg["is_observed"]:
            group = self._observed.setdefault(plates, {"sites": [], "hash": xxhash.xxh3_64(), "scaled": False})
            group["sites"].append(msg["name"])
            group["scaled"] |= is_split(msg) or not _is_one(msg["scale"])
            _hash_tensor(group["hash"], msg["value"])
        elif (msg["infer"] or {}).get("is_auxiliary"):
            self._joint_numel = max(self._joint_numel, msg["value"].shape[-1] if msg["value"].dim() else 1)
        elif not is_split(msg):
            self._latent.setdefault(plates, []).append(msg["name"])

    def _pyro_post_param(self, msg: Any) -> None:
        if isinstance(msg["value"], Tensor):
            plates = {frame.name for frame in msg["cond_indep_stack"]}
            self._params[msg["name"]] = (tuple(msg["value"].shape), plates)

    def describe(self) -> Json:
        """Returns what was seen, to be compared by `warn_of_differences`.

        Sites are grouped by the plates that they are in, since there may be as many as there are rows.
        """
        observed = [
            {
                "plates": list(plates),
                "sites": sorted(group["sites"])[:_MAX_NAMES],
                "sizes": [self._sizes[name] for name in plates],
                "digest": group["hash"].hexdigest(),
                "whole": not group["scaled"] and not self._subsampled.intersection(plates),
                "rows": self._params_by_row(plates),
                "beside": self._latents_outside(plates),
            }
            for plates, group in sorted(self._observed.items())
        ]
        return {"observed": observed}

    def _params_by_row(self, plates: Iterable[str]) -> dict[str, list[str]]:
        """Returns, for each plate with latent variables, parameters that have a row for each of its datapoints."""
        by_plate = {}
        for plate in plates:
            latent = {name for inside, names in self._latent.items() if plate in inside for name in names}
            size = self._sizes[plate]
            names = sorted(
                name
                for name, (shape, inside) in self._params.items()
                if size > 1 and size in shape and (plate in inside or not _is_of_network(name))
            )
            if latent and self._joint_numel >= size > 1 and not names:
                names = ["the guide's joint parameter"]
            if latent and names:
                by_plate[plate] = names[:_MAX_NAMES]
        return by_plate

    def _latents_outside(self, plates: Sequence[str]) -> list[str]:
        """Returns latent variables that are not split by the innermost of `plates`, which the data thus inform."""
        inner = plates[-1] if plates else None
        outside = (names for inside, names in self._latent.items() if inner is None or inner not in inside)
        return sorted({name for names in outside for name in names})[:_MAX_NAMES]

    def sizes_of_whole_plates(self) -> dict[str, int]:
        """Returns the size of each plate over observations that nothing scales."""
        observed = [group for group in self.describe()["observed"] if group["whole"]]
        return {name: size for group in observed for name, size in zip(group["plates"], group["sizes"], strict=True)}

    def sizes_in_batch(self) -> dict[str, int]:
        """Returns of each plate over observations how many of its datapoints were seen."""
        return {name: self._in_batch[name] for plates in self._observed for name in plates}

    def sites_sized_by_batch(self, other: ModelSurvey) -> Iterator[tuple[str, str | None, int]]:
        """Yields (observed site, its innermost plate, size) where the size follows the number of rows, unscaled.

        Args:
            other: A survey of the same model on another number of rows.
        """
        for plates, group in sorted(self._observed.items()):
            changed = [
                name for name in plates if other._sizes.get(name) != self._sizes[name] and name not in self._subsampled
            ]
            if changed and not group["scaled"]:
                yield sorted(group["sites"])[0], changed[-1], self._sizes[changed[-1]]


def warn_of_differences(surveys: Sequence[Json], rank: int) -> None:
    """Warns of observations that differ between ranks where nothing says that they are parts of one whole.

    Args:
        surveys: `ModelSurvey.describe` of each rank; None of a rank that has looked at no model.
        rank: This rank.
    """
    if any(survey is None for survey in surveys):
        return
    groups = [{tuple(each["plates"]): each for each in survey["observed"]} for survey in surveys]
    for plates in sorted(set.intersection(*map(set, groups))):
        by_rank = [group[plates] for group in groups]
        differs = len({each["digest"] for each in by_rank}) > 1
        if not differs or not all(each["whole"] for each in by_rank):
            continue
        text = _describe_shared_rows(by_rank) or _describe_unscaled(by_rank)
        if text is not None:
            warnings.warn(f"rank {rank} of {len(surveys)}: {text}", stacklevel=2)


def _describe_shared_rows(by_rank: Sequence[Mapping[str, Any]]) -> str | None:
    for plate, params in by_rank[0]["rows"].items():
        return (
            f"the ranks have different observations ({_quoted(by_rank[0]['sites'])}) in plate {plate!r}, which is not "
            f"sharded, and {_quoted(params)} has a row for each of its datapoints: so different datapoints of the "
            f"ranks share a row. Give the plate to shard, as model = distopt.infer.shard(model, plates={plate!r}) with "
            f"distopt.infer.SVI(model, guide, ...), or write distopt.infer.sharded_plate({plate!r}, ...) in place of "
            "pyro.plate."
        )
    return None


def _describe_unscaled(by_rank: Sequence[Mapping[str, Any]]) -> str | None:
    first = by_rank[0]
    if not first["beside"]:
        return None  # all priors are split with the data, so all terms are scaled alike
    effect = (
        "and nothing scales them to the rows of all ranks. The mean over the ranks counts the likelihood "
        f"1/{len(by_rank)} beside the priors of {_quoted(first['beside'])}, so the posterior is too wide."
    )
    if not first["plates"]:
        return (
            f"the ranks have different observations at {_quoted(first['sites'])}, in no plate, {effect} Put the rows "
            "in distopt.infer.sharded_plate('rows', len(x))."
        )

    plate = first["plates"][-1]
    sizes = [each["sizes"][-1] for each in by_rank]
    by_size = ", ".join(
        f"{size} on {ranks}" for size, ranks in ranks_by_value(dict(enumerate(map(str, sizes)))).items()
    )
    return (
        f"the ranks have different observations ({_quoted(first['sites'])}) in plate {plate!r} of size {by_size}, "
        f"{effect} Write distopt.infer.sharded_plate({plate!r}, {sizes[0]}) for rows of this rank, or "
        f"pyro.plate({plate!r}, {sum(sizes)}, subsample_size={sizes[0]}) with the number of rows of all ranks."
    )


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _is_of_network(name: str) -> bool:
    """Returns whether a parameter is a layer's, whose width may be the number of rows by chance."""
    return "$$$" in name or name.rpartition(".")[2] in ("weight", "bias")


def _is_one(scale: Any) -> bool:
    return bool((scale == 1).all()) if isinstance(scale, Tensor) else bool(scale == 1)


def _hash_tensor(digest: Any, value: Any) -> None:
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        digest.update(str(value).encode())
        return
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest.update(str((value.dtype, tuple(value.shape))).encode())
    digest.update(raw.numpy())
