"""How ranks agree on parameters: they compare, take the lowest rank's value, and create what is missing.

A round has told all ranks that one of them has changes, so all of them come here together and make the same calls. In
the steady state nothing here runs.

The first message of each rank says what it knows of its own: errors, step, options, the parameters that are new here
and the names of those that are gone. From all of these, equal on every rank, follows which names are in question. Where
these are not new on every rank, a second message describes them, as far as the rank has them. So every rank sees the
same disagreements and raises the same error, or else derives the same layout, the same owner of each value, and makes
the same broadcasts. Nothing on any rank changes before all ranks have passed these checks, so that an error leaves the
parameters as they were.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import filterfalse
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import constraints

from distopt.backends import Backend, Json
from distopt.constraints import ConstraintError, build_constraint, describe_constraint
from distopt.optim.packing import Segments
from distopt.reduce.errors import DisagreementError, PeerError, ranks_by_value
from distopt.reduce.layout import ParamSpec
from distopt.reduce.loop_counters import explain_skipped
from distopt.reduce.model_survey import warn_of_differences
from distopt.rng import generator_digest, separate_streams
from distopt.sharding import local_parameter


@dataclass
class LayoutChanges:
    """What a rank brings to an agreement.

    Attributes:
        step: The step that the rank is at.
        activity: What it was doing: a kind of round, or `joined`.
        names: Parameters that the layout lacks or holds otherwise.
        sparse: Those of them whose gradient is sparse here.
        dense: Those of them whose gradient is dense here.
        schedule_steps: How many steps its learning-rate schedule has taken.
        loop_counters: The variables that count its calls, see `LoopCounters.describe`; None of a rank that makes none.
        survey: What its model looked like, see `ModelSurvey.describe`; None if it was not looked at.
        error: What the rank has raised.
    """

    step: int
    activity: str
    names: set[str] = field(default_factory=set)
    sparse: set[str] = field(default_factory=set)
    dense: set[str] = field(default_factory=set)
    schedule_steps: int = 0
    loop_counters: Json = None
    survey: Json = None
    error: BaseException | None = None


class Agreement:
    """Brings the ranks' parameters together.

    Args:
        backend: Link to the other ranks.
        options: What must be equal on all ranks for their collectives to match, by keyword.
        tensor_of: Returns this rank's unconstrained tensor of a name, None when it has none.
    """

    def __init__(
        self, backend: Backend, options: Mapping[str, Json], tensor_of: Callable[[str], Tensor | None]
    ) -> None:
        self._backend = backend
        self._options = dict(options)
        self._tensor_of = tensor_of
        self._is_first = True

    def renegotiate(
        self, changes: LayoutChanges, known: Mapping[str, ParamSpec]
    ) -> tuple[dict[str, ParamSpec], set[str]]:
        """Returns the parameters that all ranks know from now on; their tensors exist and are equal on all ranks.

        Args:
            changes: What this rank brings.
            known: Parameters known so far, equal on all ranks.

        Raises:
            PeerError: A rank has raised in its model.
            DisagreementError: Ranks are at different steps, or differ in an option, shape, dtype or constraint; no
                parameter has been changed.

        Cost:
            One gather of JSON, another one where a parameter is not new on all ranks or has a constraint, and one
            broadcast for each rank whose values are taken, by dtype and device. Besides that it takes time in
            proportion to the new parameters, and some 30 ns for each of those known.
        """
        messages = self._backend.all_gather_json(self._message(changes, known))
        self._check_errors(messages)
        self._check_steps(messages)
        self._check_options(messages)
        if self._is_first and self._options["noise"] == "independent":
            separate_streams([each["noise"] for each in messages], self._backend.rank)
        self._is_first = False
        warn_of_differences([each["survey"] for each in messages], self._backend.rank)

        # A name that no rank's store holds any more is given up. One that is gone on some ranks is created anew there.
        gone = [set(each["gone"]) for each in messages]
        new = [set(each["new"]) for each in messages]
        given_up = set.intersection(*gone)
        names = sorted((set().union(*new) | set().union(*gone)) - given_up)

        # The value is taken from the lowest rank that has the parameter; where it replaces a known one (a user has set
        # it in the store of some ranks), from the lowest of those that have replaced it.
        descriptions = [each["new"] for each in messages]
        if not all(name in each for name in names for each in descriptions):
            descriptions = self._backend.all_gather_json({name: self._describe(name) for name in names})
        specs = dict(known)
        for name in given_up:
            specs.pop(name, None)
        owners: dict[str, int] = {}
        for name in names:
            holders = {rank: each[name] for rank, each in enumerate(descriptions) if each[name] is not None}
            replaced = [rank for rank in holders if name in known and name in new[rank]]
            owners[name] = min(replaced or holders)
            # A gradient is sent dense as soon as one rank has it so, since a sparse one can be made dense.
            sparse = any(name in each["sparse"] for each in messages) or (name in known and known[name].sparse)
            sparse = sparse and not any(name in each["dense"] for each in messages)
            specs[name] = self._agree_on(name, holders, owners[name], sparse, messages[0]["step"])

        self._create_missing(names, specs)
        self._share_values(owners, specs)
        return specs, given_up.union(names)

    # What this rank tells.

    def _message(self, changes: LayoutChanges, known: Mapping[str, ParamSpec]) -> Json:
        error = None
        if changes.error is not None:
            text = "".join(traceback.format_exception(changes.error))
            error = {"what": f"{type(changes.error).__name__}: {changes.error}", "traceback": text}
        return {
            "step": changes.step,
            "activity": changes.activity,
            "schedule_steps": changes.schedule_steps,
            "loop_counters": changes.loop_counters,
            "survey": changes.survey,
            "options": self._options,
            "noise": generator_digest() if self._is_first else None,
            "new": {name: self._describe(name) for name in sorted(changes.names)},
            "sparse": sorted(changes.sparse),
            "dense": sorted(changes.dense),
            "gone": sorted(_missing(known)),
            "error": error,
        }

    def _describe(self, name: str) -> Json:
        tensor = self._tensor_of(name)
        if tensor is None:
            return None
        spec = ParamSpec(name, tuple(tensor.shape), tensor.dtype, tensor.device.type, sparse=False, constraint="")
        return spec.describe() | {
            "constraint": _constraint_as_json(_constraint_of(name)),
            "kind": "replicated" if local_parameter(tensor) is None else "local",
        }

    # What is compared.

    def _check_errors(self, messages: Sequence[Json]) -> None:
        failed = [(rank, each) for rank, each in enumerate(messages) if each["error"] is not None]
        if not failed:
            return
        lines = [
            f"rank {rank} of {len(messages)} failed at step {each['step']}: {each['error']['what']}"
            for rank, each in failed
        ]
        rank, first = failed[0]
        raise PeerError("; ".join(lines) + f"\n--- traceback of rank {rank}\n{first['error']['traceback'].rstrip()}")

    def _check_steps(self, messages: Sequence[Json]) -> None:
        active = [(rank, each) for rank, each in enumerate(messages) if each["activity"] != "joined"]
        if len({(each["step"], each["activity"]) for _, each in active}) <= 1:
            self._check_calls(active)
            return
        latest = max(each["step"] for _, each in active)
        ahead = [rank for rank, each in active if each["step"] == latest]
        calls = [f"rank {rank}: step {each['step']} ({each['activity']})" for rank, each in enumerate(messages)]
        raise DisagreementError(
            f"{self._here(latest)}: the ranks are at different calls of the optimizer: {', '.join(calls)}. "
            f"rank {', '.join(map(str, ahead))} left out or added a call. Every rank must call it equally often; for "
            "uneven data use `with optimizer.join():`."
        )

    def _check_calls(self, active: Sequence[tuple[int, Json]]) -> None:
        """Raises if ranks that count the same step have made different calls to get there."""
        ranks = ", ".join(str(rank) for rank, _ in active)
        if len({each["schedule_steps"] for _, each in active}) > 1:
            steps = ", ".join(f"{each['schedule_steps']} on rank {rank}" for rank, each in active)
            raise DisagreementError(
                f"{self._here(active[0][1]['step'])}: the learning-rate schedule has taken {steps}. "
                "Every rank must call step() of the schedule after the same calls of the optimizer, or the replicas "
                "drift apart; for uneven data use `with optimizer.join():`."
            )
        skipped = explain_skipped([each["loop_counters"] or {} for _, each in active])
        if skipped is not None:
            raise DisagreementError(
                f"{self._here(active[0][1]['step'])}: a rank has left out a call of the optimizer: of rank {ranks}, "
                f"{skipped}. Every rank must call it equally often; for uneven data use `with optimizer.join():`."
            )

    def _check_options(self, messages: Sequence[Json]) -> None:
        for key in self._options:
            values = [each["options"][key] for each in messages]
            if any(value != values[0] for value in values):
                raise DisagreementError(
                    f"{self._here(messages[0]['step'])}: the optimizer's {key} differs between ranks: "
                    f"{_by_rank(dict(enumerate(map(str, values))))}. Construct it with the same arguments everywhere."
                )

    def _agree_on(self, name: str, holders: Mapping[int, Json], owner: int, sparse: bool, step: int) -> ParamSpec:
        for key in ("kind", "shape", "dtype", "device", "constraint"):
            values = {rank: _readable(key, each[key]) for rank, each in holders.items()}
            if len(set(values.values())) > 1:
                hint = f" Is {name!r} inside a sharded plate?" if key in ("shape", "kind") else ""
                raise DisagreementError(
                    f"{self._here(step)}: parameter {name!r} differs in {key}: {_by_rank(values)}. "
                    f"Replicated parameters must agree.{hint}"
                )
        agreed = holders[owner]
        dtype = getattr(torch, agreed["dtype"])
        return ParamSpec(name, tuple(agreed["shape"]), dtype, agreed["device"], sparse, agreed["constraint"])

    def _here(self, step: int) -> str:
        return f"rank {self._backend.rank} of {self._backend.world_size}, step {step}"

    # What changes on this rank.

    def _create_missing(self, names: Sequence[str], specs: Mapping[str, ParamSpec]) -> None:
        built: dict[str, constraints.Constraint] = {}
        failed: dict[str, str] = {}
        for name in names:
            if self._tensor_of(name) is None:
                try:
                    built[name] = build_constraint(json.loads(specs[name].constraint, object_hook=_tensor_from_json))
                except ValueError as error:
                    failed[name] = str(error)

        # Which constraint classes are registered may differ between ranks, so one rank alone may fail. Most parameters
        # have no constraint, and then this message is not needed.
        if any(specs[name].constraint != _REAL for name in names):
            failures = [each for each in self._backend.all_gather_json(failed) if each]
            if failures:
                name, reason = next(iter(failures[0].items()))
                raise DisagreementError(
                    f"parameter {name!r} cannot be created on a rank that has not seen it: {reason} Or touch it on "
                    "every rank."
                )
        for name, constraint in built.items():
            self._create(specs[name], constraint)

    def _create(self, spec: ParamSpec, constraint: constraints.Constraint) -> None:
        device = torch.device("cpu") if spec.device == "cpu" else self._backend.device
        tensor = torch.zeros(spec.shape, dtype=spec.dtype, device=device).requires_grad_()
        pyro.get_param_store().set_state({"params": {spec.name: tensor}, "constraints": {spec.name: constraint}})

    def _share_values(self, owners: Mapping[str, int], specs: Mapping[str, ParamSpec]) -> None:
        groups: dict[tuple[Any, ...], list[Tensor]] = {}
        for name, owner in owners.items():
            tensor = self._tensor_of(name)
            assert tensor is not None
            groups.setdefault((owner, specs[name].dtype, specs[name].device), []).append(tensor)
        for (owner, _, _), tensors in groups.items():
            share_values_(self._backend, tensors, owner)


@torch.no_grad()
def share_values_(backend: Backend, tensors: Sequence[Tensor], owner: int) -> None:
    """Overwrites tensors, all of one dtype and device, with those of rank `owner`.

    Cost:
        One broadcast of all of them.
    """
    real = [torch.view_as_real(tensor.data) if tensor.is_complex() else tensor.data for tensor in tensors]
    flat = real[0].new_empty(sum(tensor.numel() for tensor in real))
    segments = Segments(flat, [tensor.shape for tensor in real])
    segments.copy_(real)
    backend.broadcast(flat, owner).wait()
    for tensor, values in zip(real, segments.views, strict=True):
        tensor.copy_(values)


def _missing(known: Mapping[str, ParamSpec]) -> list[str]:
    """Returns the known names that Pyro's store does not hold any more; a loop that runs inside the interpreter."""
    return list(filterfalse(pyro.get_param_store().named_parameters().mapping.__contains__, known))


# Constraints as JSON text, which can be compared.


def _constraint_of(name: str) -> constraints.Constraint:
    # The public get_state() would also take `.unconstrained` from the tensors that a running trace holds.
    constraint: constraints.Constraint = pyro.get_param_store()._constraints[name]
    return constraint


def _constraint_as_json(constraint: constraints.Constraint) -> str:
    """Returns a description; of a class that is not registered only the name, which is enough for a comparison."""
    try:
        description = describe_constraint(constraint)
    except ConstraintError:
        description = {"name": f"{type(constraint).__module__}.{type(constraint).__qualname__}"}
    return json.dumps(description, sort_keys=True, default=_tensor_as_json)


def _tensor_as_json(tensor: Tensor) -> Json:
    return {"tensor": tensor.cpu().tolist(), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _tensor_from_json(value: dict[str, Any]) -> Any:
    return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"])) if "tensor" in value else value


_REAL = _constraint_as_json(constraints.real)


# Values in messages.


def _readable(key: str, value: Json) -> str:
    if key == "shape":
        return str(tuple(value))
    return str(json.loads(value)) if key == "constraint" else str(value)


def _by_rank(values: Mapping[int, str]) -> str:
    return "; ".join(f"{ranks}: {value}" for value, ranks in ranks_by_value(values).items())
