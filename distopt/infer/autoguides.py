"""Which parameters of Pyro's autoguides belong to datapoints, for guides that keep them outside their plates.

Inside a plate with `event_dim`, a parameter says itself which of its dimensions runs over the datapoints. AutoNormal,
AutoDelta and the messenger guides state theirs so. Others keep flat vectors per site, or one joint vector for all
sites; for these, a plan is made from the guide's own record of its sites.
"""

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
class GuidePlan:
    """What a guide does outside its plates for datapoints of sharded plates.

    Args:
        plates: Names of the sharded plates that the plan was made for.
        params: Parameters that have a row per datapoint, by their names in the parameter store.
        sites: Auxiliary sample sites that have a density per datapoint, by name.
    """

    plates: set[str]
    params: dict[str, LocalParameter] = field(default_factory=dict)
    sites: dict[str, PlateShard] = field(default_factory=dict)


_PLANNED = (AutoContinuous, AutoGaussian, AutoStructured, AutoDiscreteParallel)


def set_up_autoguide(guide: AutoGuide, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Lets an autoguide trace its model, as in its first call.

    Returns:
        Whether the guide needs a plan. If it does not, nothing was traced.
    """
    planned = [member for member in _members(guide) if isinstance(member, _PLANNED)]
    for each in [guide, *planned] if planned else []:
        if each.prototype_trace is None:
            with guide._pyro_context:  # as in a call, so that parameters get their names
                each._setup_prototype(*args, **kwargs)
    return bool(planned)


def plan_autoguide(guide: AutoGuide, plates: Mapping[str, PlateShard]) -> GuidePlan:
    """Plans how an autoguide is split over the ranks; `set_up_autoguide` must have been called.

    AutoStructured keeps flat vectors per site, and AutoDiscreteParallel states its probabilities outside the plates.
    Guides with one joint vector or matrix over all variables (AutoDiagonalNormal, AutoMultivariateNormal, flows,
    AutoGaussian, ...) cannot be split.

    Raises:
        LocalParameterError: One parameter of the guide ties variables of different datapoints together, or ties them to
            the global ones. The message has the guide to use instead.
    """
    plan = GuidePlan(set(plates))
    for member in _members(guide):
        if isinstance(member, AutoContinuous):
            _refuse_joint(member, _local_sites(member._cond_indep_stacks, plates))
        elif isinstance(member, AutoGaussian):
            latent = {name: site for name, site in member._factors.items() if not site["is_observed"]}
            stacks = {name: site["cond_indep_stack"] for name, site in latent.items()}
            _refuse_joint(member, _local_sites(stacks, plates))
        elif isinstance(member, AutoStructured):
            _plan_structured(member, plates, plan)
        elif isinstance(member, AutoDiscreteParallel):
            _plan_discrete(member, plates, plan)
    return plan


def _members(guide: AutoGuide) -> Iterator[AutoGuide]:
    """Yields the guides of an `AutoGuideList`, which may be nested, or the guide itself."""
    if isinstance(guide, AutoGuideList):
        for member in guide:
            yield from _members(member)
    else:
        yield guide


def _local_sites(stacks: Mapping[str, Any], plates: Mapping[str, PlateShard]) -> dict[str, tuple[PlateShard, int]]:
    """Returns the sites inside sharded plates, each with the plate and its dim."""
    sites = {}
    for name, stack in stacks.items():
        for frame in stack:
            if frame.name in plates:
                sites[name] = (plates[frame.name], frame.dim)
    return sites


def _refuse_joint(guide: AutoGuide, local: Mapping[str, tuple[PlateShard, int]]) -> None:
    """Raises if a guide with one joint parameter has a site in a sharded plate."""
    for name, (plate, _) in local.items():
        kind = type(guide).__name__
        raise LocalParameterError(
            f"{kind} keeps all its variables in one joint parameter, and {name!r} is in the sharded plate "
            f"{plate.name!r}, whose datapoints are on different ranks. Use AutoNormal, or separate guides: guide = "
            "AutoGuideList(model); guide.append(AutoNormal(poutine.block(model, "
            f"expose=[{', '.join(map(repr, local))}]))); guide.append({kind}(poutine.block(model, "
            f"hide=[{', '.join(map(repr, local))}])))"
        )


# AutoStructured keeps `locs.NAME` and `scales.NAME` as flat vectors over all datapoints of a site, and for each
# dependency on an upstream site a matrix `deps.NAME.UPSTREAM$$$weight` of (values of the site, values of upstream). As
# long as upstream is a global site, each row of the matrix belongs to one datapoint, so it can be split by rows. A
# dependency on a site that is sharded itself would multiply rows of several ranks.
def _plan_structured(guide: Any, plates: Mapping[str, PlateShard], plan: GuidePlan) -> None:
    """Plans the flat vectors of AutoStructured: locations, scales, and weights of dependencies on global sites."""
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

        batch_shape = guide._batch_shapes[name]
        shape = tuple(batch_shape + guide._unconstrained_event_shapes[name])
        row_dim = len(batch_shape) + dim
        plan.sites[f"{name}_aux"] = plate
        for kind in ("locs", "scales"):
            plan.params[f"{prefix}.{kind}.{name}"] = LocalParameter(plate, shape, row_dim)
        for upstream in guide.dependencies.get(name, {}):
            weight = getattr(getattr(guide.deps, name), upstream).weight
            weight_rows = LocalParameter(plate, (*shape, weight.shape[1]), row_dim)
            plan.params[f"{prefix}.deps.{name}.{upstream}$$$weight"] = weight_rows


def _plan_discrete(guide: Any, plates: Mapping[str, PlateShard], plan: GuidePlan) -> None:
    """Plans the probabilities of AutoDiscreteParallel, one for each datapoint and class."""
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
