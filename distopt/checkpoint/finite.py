"""Whether a state is finite: one with NaN in it ends every run that resumes from it, so it is neither written nor read.

What is asked: parameters that are trained, their optimizer state, modules' parameters outside Pyro's store, and the
running statistics of torch's normalization layers, which stay NaN once they are. An unconstrained value may be infinite
where its constrained one is not (0 of a positive parameter). Other buffers are the user's: masks hold infinities, and
data may hold NaN for what is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.distributions import transform_to

from distopt.checkpoint.columns import states_of, untabulate
from distopt.checkpoint.errors import NonfiniteStateError
from distopt.checkpoint.param_store import built
from distopt.checkpoint.snapshot import Snapshot
from distopt.nonfinite import is_finite

_MAX_NAMES = 5
_STATISTICS = ("running_mean", "running_var")


def nonfinite(replicated: Mapping[str, Any]) -> str:
    """Returns the names of what is not finite in a state, empty when all is.

    Args:
        replicated: `params`, `optimizers` and `modules`, see `load_replicated`.
    """
    return _listed(_nonfinite_names(replicated))


def nonfinite_statistics(buffers: Mapping[str, Any]) -> str:
    """Returns the names of running statistics that are not finite, empty when all are.

    Args:
        buffers: By module and name.
    """
    return _listed(
        f"buffer {name!r} of module {module!r}"
        for module, tensors in buffers.items()
        for name, value in tensors.items()
        if name.rpartition(".")[2] in _STATISTICS and isinstance(value, Tensor) and not is_finite(value)
    )


def check_snapshots(snapshots: Mapping[str, Snapshot], rank: int, world_size: int) -> None:
    """Refuses to write a state that is not finite.

    Args:
        snapshots: What this rank writes, by file name without suffix.
        rank: This rank.
        world_size: Number of ranks.

    Raises:
        NonfiniteStateError: Naming the rank and what is not finite.
    """
    for name, snapshot in snapshots.items():
        is_replicated = name == "replicated"
        if not (is_replicated or name.startswith(("shard-", "buffers-"))) or snapshot.is_finite():
            continue
        state = snapshot.decoded()  # only now: it takes as long as loading the state
        if is_replicated:
            optimizers = {each: states_of(saved) for each, saved in state["optimizers"].items()}
            state |= {"params": untabulate(state["params"], state["tables"]), "optimizers": optimizers}
            names = nonfinite(state)
        elif name.startswith("buffers-"):
            names = nonfinite_statistics(state)
        else:
            names = _listed(
                f"parameter {key!r}"
                for key, entry in state["params"].items()
                if not all(map(is_finite, _tensors(entry)))
            )
        if names:
            raise NonfiniteStateError(f"rank {rank} of {world_size}: {names} not finite (NaN or infinite)")


def _listed(names: Iterable[str]) -> str:
    """Returns the first few names."""
    first = list(islice(names, _MAX_NAMES + 1))
    return f"{', '.join(first[:_MAX_NAMES])} and more" if len(first) > _MAX_NAMES else ", ".join(first)


def _nonfinite_names(replicated: Mapping[str, Any]) -> Iterator[str]:
    params = replicated["params"]
    for name, entry in params.items():
        if not entry.get("frozen") and not _is_usable(entry):
            yield f"parameter {name!r}"
    for states in replicated["optimizers"].values():
        for name, state in states.items():
            if not params.get(name, {}).get("frozen") and not all(map(is_finite, _tensors(state))):
                yield f"optimizer state of {name!r}"
    for module, tensors in replicated["modules"].items():
        for name, value in tensors.items():
            if isinstance(value, Tensor) and not is_finite(value.detach()):
                yield f"parameter {name!r} of module {module!r}"


def _is_usable(entry: Mapping[str, Any]) -> bool:
    value = entry["value"]
    if is_finite(value):
        return True
    if "constraint" not in entry or bool(torch.isnan(value).any()):
        return False
    return is_finite(transform_to(built(entry["constraint"], "constraint"))(value))


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from _tensors(value)
