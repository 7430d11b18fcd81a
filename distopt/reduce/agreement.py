"""What ranks do when one of them has news: compare, take the lowest rank's value, create what is missing.

A round of gradients told all of them, so all come here together. Two gathers of JSON and one broadcast for each rank
whose values are taken; steady states never come here.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import constraints

from distopt.backends import Backend, Json
from distopt.constraints import ConstraintError, build_constraint, describe_constraint
from distopt.reduce.errors import DisagreementError, PeerError
from distopt.reduce.layout import Entry
from distopt.rng import generator_digest, separate_streams
from distopt.sharding import local_parameter


@dataclass
class News:
    """What a rank brings to an agreement."""

    step: int
    kind: str
    names: set[str] = field(default_factory=set)  # parameters the layout lacks or holds otherwise
    sparse: set[str] = field(default_factory=set)  # those of them whose gradient is sparse here
    dense: set[str] = field(default_factory=set)  # those of them whose gradient is dense here
    error: BaseException | None = None


class Agreement:
    """Brings the ranks' parameters together.

    Args:
        backend: Link to the other ranks.
        settings: What must be equal on all ranks for their collectives to match, by keyword.
        tensor_of: Returns this rank's unconstrained tensor of a name, None when it has none.
    """

    def __init__(
        self, backend: Backend, settings: Mapping[str, Json], tensor_of: Callable[[str], Tensor | None]
    ) -> None:
        self._backend, self._settings, self._tensor_of = backend, dict(settings), tensor_of
        self._is_first = True

    def settle(self, news: News, known: Mapping[str, Entry]) -> dict[str, Entry]:
        """Returns the entries that all ranks know from now on; their tensors exist here and are equal on all ranks.

        Args:
            news: What this rank brings.
            known: Entries known so far, equal on all ranks.

        Raises:
            PeerError: A rank has raised in its model.
            DisagreementError: Ranks are at different steps, or differ in a setting, shape, dtype or constraint.
        """
        told = self._backend.all_gather_json(self._tell(news, known))
        self._check_errors(told)
        self._check_steps(told)
        self._check_settings(told)
        if self._is_first and self._settings["noise"] == "independent":
            separate_streams([each["noise"] for each in told], self._backend.rank)
        self._is_first = False
        gone = [set(each["gone"]) for each in told]
        given_up = set.intersection(*gone)
        new = [set(each["news"]) for each in told]
        names = sorted((set().union(*new) | set().union(*gone)) - given_up)
        described = self._backend.all_gather_json({name: self._describe(name) for name in names})
        entries = {name: entry for name, entry in known.items() if name not in given_up}
        owners: dict[str, int] = {}
        for name in names:
            holders = {rank: each[name] for rank, each in enumerate(described) if each[name] is not None}
            fresh = [rank for rank in holders if name in new[rank]]
            owners[name] = min(fresh if name in known and fresh else holders)
            sparse = any(name in each["sparse"] for each in told) or (name in known and known[name].sparse)
            sparse &= not any(name in each["dense"] for each in told)
            entries[name] = self._entry(name, holders, owners[name], sparse, told[0]["step"])
        self._create_missing(names, entries)
        self._share_values(owners, entries)
        return entries

    def _tell(self, news: News, known: Mapping[str, Entry]) -> Json:
        error = None
        if news.error is not None:
            text = "".join(traceback.format_exception(news.error))
            error = {"what": f"{type(news.error).__name__}: {news.error}", "traceback": text}
        return {
            "step": news.step,
            "kind": news.kind,
            "settings": self._settings,
            "noise": generator_digest() if self._is_first else None,
            "news": sorted(news.names),
            "sparse": sorted(news.sparse),
            "dense": sorted(news.dense),
            "gone": sorted(name for name in known if self._tensor_of(name) is None),
            "error": error,
        }

    def _check_errors(self, told: Sequence[Json]) -> None:
        failed = [(rank, each) for rank, each in enumerate(told) if each["error"] is not None]
        if not failed:
            return
        lines = [
            f"rank {rank} of {len(told)} failed at step {each['step']}: {each['error']['what']}"
            for rank, each in failed
        ]
        rank, first = failed[0]
        raise PeerError("; ".join(lines) + f"\n--- traceback of rank {rank}\n{first['error']['traceback'].rstrip()}")

    def _check_steps(self, told: Sequence[Json]) -> None:
        places = [(each["step"], each["kind"]) for each in told if each["kind"] != "joined"]
        if len(set(places)) <= 1:
            return
        latest = max(step for step, _ in places)
        ahead = [rank for rank, each in enumerate(told) if each["step"] == latest and each["kind"] != "joined"]
        seen = ", ".join(f"rank {rank}: step {each['step']} ({each['kind']})" for rank, each in enumerate(told))
        raise DisagreementError(
            f"{self._here(latest)}: the ranks are at different calls of the optimizer: {seen}. "
            f"{_ranks(ahead)} left out or added a call. Every rank must call it equally often; for uneven data use "
            "`with optimizer.join():`."
        )

    def _check_settings(self, told: Sequence[Json]) -> None:
        for key in self._settings:
            values = [each["settings"][key] for each in told]
            if any(value != values[0] for value in values):
                raise DisagreementError(
                    f"{self._here(told[0]['step'])}: the optimizer's {key} differs between ranks: {_by_rank(values)}. "
                    "Construct it with the same arguments everywhere."
                )

    def _describe(self, name: str) -> Json:
        tensor = self._tensor_of(name)
        if tensor is None:
            return None
        return Entry(name, tuple(tensor.shape), tensor.dtype, tensor.device.type, False, "").describe() | {
            "constraint": _as_json(_constraint_of(name)),
            "kind": "replicated" if local_parameter(tensor) is None else "local",
        }

    def _entry(self, name: str, holders: Mapping[int, Json], owner: int, sparse: bool, step: int) -> Entry:
        given = holders[owner]
        for key in ("kind", "shape", "dtype", "device", "constraint"):
            values = {rank: _plain(key, each[key]) for rank, each in holders.items()}
            if len(set(values.values())) > 1:
                hint = f" Is {name!r} inside a sharded plate?" if key in ("shape", "kind") else ""
                raise DisagreementError(
                    f"{self._here(step)}: parameter {name!r} differs in {key}: {_by_rank(values)}. "
                    f"Replicated parameters must agree.{hint}"
                )
        dtype = getattr(torch, given["dtype"])
        return Entry(name, tuple(given["shape"]), dtype, given["device"], sparse, given["constraint"])

    def _create_missing(self, names: Sequence[str], entries: Mapping[str, Entry]) -> None:
        failed: dict[str, str] = {}
        for name in names:
            if self._tensor_of(name) is None:
                try:
                    self._create(entries[name])
                except ValueError as error:
                    failed[name] = str(error)
        if any(entries[name].constraint not in _CAN_BUILD for name in names):
            # Whether a class is known differs between ranks, so they tell each other before anything is created.
            told = [each for each in self._backend.all_gather_json(failed) if each]
            if told:
                name, why = next(iter(told[0].items()))
                raise DisagreementError(
                    f"parameter {name!r} cannot be created on a rank that has not seen it: {why} Or touch it on every "
                    "rank."
                )

    def _create(self, entry: Entry) -> None:
        constraint = build_constraint(json.loads(entry.constraint, object_hook=_tensor_from_json))
        device = torch.device("cpu") if entry.device == "cpu" else self._backend.device
        tensor = torch.zeros(entry.shape, dtype=entry.dtype, device=device).requires_grad_()
        pyro.get_param_store().set_state({"params": {entry.name: tensor}, "constraints": {entry.name: constraint}})

    def _share_values(self, owners: Mapping[str, int], entries: Mapping[str, Entry]) -> None:
        groups: dict[tuple[Any, ...], list[Tensor]] = {}
        for name, owner in owners.items():
            tensor = self._tensor_of(name)
            assert tensor is not None
            groups.setdefault((owner, entries[name].dtype, entries[name].device), []).append(tensor)
        for (owner, dtype, _), tensors in groups.items():
            share_values_(self._backend, tensors, owner, dtype)

    def _here(self, step: int) -> str:
        return f"rank {self._backend.rank} of {self._backend.world_size}, step {step}"


def _as_json(constraint: constraints.Constraint) -> str:
    """A constraint as JSON text; of a class that is not registered only the name, which can be compared."""
    try:
        described = describe_constraint(constraint)
    except ConstraintError:
        described = {"name": f"{type(constraint).__module__}.{type(constraint).__qualname__}"}
    return json.dumps(described, sort_keys=True, default=_tensor_as_json)


def _tensor_as_json(tensor: Tensor) -> Json:
    return {"tensor": tensor.cpu().tolist(), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _tensor_from_json(value: dict[str, Any]) -> Any:
    return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"])) if "tensor" in value else value


_CAN_BUILD = {_as_json(constraints.real)}


@torch.no_grad()
def share_values_(backend: Backend, tensors: Sequence[Tensor], owner: int, dtype: torch.dtype) -> None:
    """Overwrites tensors of one dtype and device with rank `owner`'s, by one broadcast."""
    real = [torch.view_as_real(tensor.data) if dtype.is_complex else tensor.data for tensor in tensors]
    flat = torch.cat([tensor.reshape(-1) for tensor in real])
    backend.broadcast(flat, owner).wait()
    for tensor, values in zip(real, torch.split(flat, [tensor.numel() for tensor in real]), strict=True):
        tensor.copy_(values.view(tensor.shape))


def _constraint_of(name: str) -> constraints.Constraint:
    # The public get_state() would also take `.unconstrained` from the tensors that a running trace holds.
    constraint: constraints.Constraint = pyro.get_param_store()._constraints[name]
    return constraint


def _plain(key: str, value: Json) -> str:
    if key == "shape":
        return str(tuple(value))
    return str(json.loads(value)) if key == "constraint" else str(value)


def _by_rank(values: Mapping[int, Any] | Sequence[Any]) -> str:
    """Groups ranks by what they have: "rank 0, 2: (3,); rank 1: (4,)"."""
    pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
    groups: dict[str, list[int]] = {}
    for rank, value in pairs:
        groups.setdefault(str(value), []).append(rank)
    return "; ".join(f"{_ranks(ranks)}: {value}" for value, ranks in groups.items())


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {', '.join(map(str, ranks))}"
