"""Which parameters of Pyro's autoguides belong to datapoints, where the guide itself does not say it in a plate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pyro.infer.autoguide import (
    AutoDiscreteParallel,
    AutoGaussian,
    AutoGuide,
    AutoGuideList,
    AutoStructured,
)
from pyro.infer.autoguide.guides import AutoContinuous

from distopt.sharding import LocalParameter, LocalParameterError, PlateShard


@dataclass
class Plan:
    """What a guide does outside its plates for datapoints of sharded plates.

    Args:
        plates: Names of the sharded plates it was made for.
        params: Parameters with rows of datapoints, by parameter-store name.
        sites: Auxiliary sample sites with a density per datapoint, by name.
    """

    plates: set[str]
    params: dict[str, LocalParameter] = field(default_factory=dict)
    sites: dict[str, PlateShard] = field(default_factory=dict)


_PLANNED = (AutoContinuous, AutoGaussian, AutoStructured, AutoDiscreteParallel)


def set_up(guide: AutoGuide, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Lets an autoguide look at its model, as in its first call; False for one of a kind that needs no plan."""
    parts = [part for part in _parts(guide) if isinstance(part, _PLANNED)]
    for part in [guide, *parts] if parts else []:
        if part.prototype_trace is None:
            with guide._pyro_context:  # as in a call, so that parameters get their names
                part._setup_prototype(*args, **kwargs)
    return bool(parts)


def plan_autoguide(guide: AutoGuide, plates: Mapping[str, PlateShard]) -> Plan:
    """Says how an autoguide that has been set up is split over the ranks.

    AutoNormal, AutoDelta and the messenger guides state their parameters inside plates and need no plan.
    AutoStructured keeps flat vectors per site, and AutoDiscreteParallel states its probabilities outside the plates.
    The guides of one joint vector or matrix over all variables (AutoDiagonalNormal, AutoMultivariateNormal, flows,
    AutoGaussian, ...) cannot be split.

    Raises:
        LocalParameterError: The guide ties variables of different datapoints together, or to the global ones, in
            one parameter; the message names the guide that is of the same family and can be split.
    """
    plan = Plan(set(plates))
    for part in _parts(guide):
        if isinstance(part, AutoContinuous):
            _refuse_joint(part, _local_sites(part._cond_indep_stacks, plates))
        elif isinstance(part, AutoGaussian):
            stacks = {name: site["cond_indep_stack"] for name, site in part._factors.items() if not site["is_observed"]}
            _refuse_joint(part, _local_sites(stacks, plates))
        elif isinstance(part, AutoStructured):
            _plan_structured(part, plates, plan)
        elif isinstance(part, AutoDiscreteParallel):
            _plan_discrete(part, plates, plan)
    return plan


def _parts(guide: AutoGuide) -> Iterator[AutoGuide]:
    """The guide, or the guides of a list."""
    if isinstance(guide, AutoGuideList):
        for part in guide:
            yield from _parts(part)
    else:
        yield guide


def _local_sites(stacks: Mapping[str, Any], plates: Mapping[str, PlateShard]) -> dict[str, tuple[PlateShard, int]]:
    """The sites inside sharded plates: the plate and its dim."""
    found = {}
    for name, stack in stacks.items():
        for frame in stack:
            if frame.name in plates:
                found[name] = (plates[frame.name], frame.dim)
    return found


def _refuse_joint(guide: AutoGuide, local: Mapping[str, tuple[PlateShard, int]]) -> None:
    """Raises for a guide with one joint parameter when a site of it is in a sharded plate."""
    for name, (plate, _) in local.items():
        kind = type(guide).__name__
        raise LocalParameterError(
            f"{kind} keeps all its variables in one joint parameter, and {name!r} is in the sharded plate "
            f"{plate.name!r}, whose datapoints are on different ranks. Use AutoNormal, or a guide per part: guide = "
            "AutoGuideList(model); guide.append(AutoNormal(poutine.block(model, "
            f"expose=[{', '.join(map(repr, local))}]))); guide.append({kind}(poutine.block(model, "
            f"hide=[{', '.join(map(repr, local))}])))"
        )


def _plan_structured(guide: Any, plates: Mapping[str, PlateShard], plan: Plan) -> None:
    """Plans the flat vectors of AutoStructured: locations, scales, and the weights of dependencies on global sites."""
    local = _local_sites({name: site["cond_indep_stack"] for name, site in guide._sorted_sites}, plates)
    prefix = guide._pyro_name
    for name, upstreams in guide.dependencies.items():
        for upstream, kind in upstreams.items():
            if upstream in local or (name in local and kind != "linear"):
                raise LocalParameterError(
                    f"AutoStructured: {name!r} depends on {upstream!r} by {kind!r}, which ties together datapoints of "
                    f"the sharded plate {(local.get(upstream) or local[name])[0].name!r} that are on different ranks. "
                    "Give dependencies={...} in which sites of the plate depend on global sites alone, by 'linear'"
                )
    for name, (plate, dim) in local.items():
        conditional = guide.conditionals[name]
        if conditional not in ("normal", "delta"):
            raise LocalParameterError(
                f"AutoStructured: the conditional of {name!r} is {conditional!r}, over all datapoints of the sharded "
                f"plate {plate.name!r} together. Give conditionals={{{name!r}: 'normal', ...}} ('normal' or 'delta')"
            )
        batch, event = guide._batch_shapes[name], guide._unconstrained_event_shapes[name]
        shape, row_dim = tuple(batch + event), len(batch) + dim
        plan.sites[f"{name}_aux"] = plate
        for kind in ("locs", "scales"):
            plan.params[f"{prefix}.{kind}.{name}"] = LocalParameter(plate, shape, row_dim)
        for upstream in guide.dependencies.get(name, {}):
            weight = getattr(getattr(guide.deps, name), upstream).weight
            entry = LocalParameter(plate, (*shape, weight.shape[1]), row_dim)
            plan.params[f"{prefix}.deps.{name}.{upstream}$$$weight"] = entry


def _plan_discrete(guide: Any, plates: Mapping[str, PlateShard], plan: Plan) -> None:
    """Plans the probabilities of AutoDiscreteParallel, one per datapoint and class."""
    local = _local_sites(guide._cond_indep_stacks, plates)
    for site, _, params in guide._discrete_sites:
        if site["name"] not in local:
            continue
        plate, dim = local[site["name"]]
        for kind, init, _ in params:
            unconstrained = getattr(guide, f"{site['name']}_{kind}_unconstrained")
            row_dim = len(site["fn"].batch_shape) + dim
            name = f"{guide._pyro_name}.{site['name']}_{kind}"
            plan.params[name] = LocalParameter(plate, tuple(unconstrained.shape), row_dim)
            assert init.shape[: row_dim + 1] == unconstrained.shape[: row_dim + 1]
