"""The states of torch's generators that a step may draw from: the CPU's, and the current GPU's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def generator_states() -> list[Tensor]:
    """Returns where torch's generators stand; a GPU's counts once the process uses one.

    Cost:
        No wait for a GPU: its generator's state lies on the host.
    """
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states.append(torch.cuda.get_rng_state())
    return states


def set_generator_states(states: Sequence[Tensor]) -> None:
    """Puts torch's generators to where they stood, as `generator_states` returned it."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)


def same_states(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Returns whether the generators stand at the same place; one that was first used in between counts as moved."""
    return len(a) == len(b) and all(map(torch.equal, a, b))
