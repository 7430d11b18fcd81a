"""Noise of several ranks: told apart by seed, and set apart where they would draw alike."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

NoisePolicy: TypeAlias = Literal["independent", "shared"]

# Odd, so that its multiples reach each of the 2**32 seeds before one comes again; 2**32 over the golden ratio, which
# keeps neighbours far apart (Knuth, The Art of Computer Programming, volume 3, section 6.4).
_STRIDE = 0x9E3779B1


def noise_seed(seed: int, step: int = 0, rank: int = 0, policy: NoisePolicy = "independent") -> int:
    """Returns the seed, in [0, 2**32), of what `rank` draws at `step`.

    Under `independent` no two ranks of a step have the same seed, so that `W` ranks are `W` particles of the ELBO and
    the variance of the averaged gradient is a `W`-th of one rank's. Under `shared` all ranks draw what rank 0 draws.

    The noise of a step depends on these four numbers alone, as the data do: it is the same after a crash, after a
    resume on another number of workers, and whatever was drawn before.

    Example:
        >>> len({noise_seed(7, step=3, rank=rank) for rank in range(1000)})
        1000
        >>> noise_seed(7, 3, 5, "shared") == noise_seed(7, 3, 0)
        True
    """
    # 32 bits: the Mersenne Twister that torch uses on the CPU looks at no more of its seed.
    (base,) = np.random.SeedSequence([seed, step]).generate_state(1, np.uint32)
    return (int(base) + (0 if policy == "shared" else rank) * _STRIDE) % 2**32


def seed_generators(seed: int) -> None:
    """Seeds torch, NumPy and Python's `random`."""
    random.seed(seed)
    np.random.seed(seed)
    # Not torch.manual_seed, which keeps a text of the call stack for each kind of GPU: 0.2 ms a step.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def generators_state(device: torch.device) -> dict[str, Any]:
    """Returns the state of Python's, NumPy's and torch's generators; of a GPU's too when `device` is one."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(legacy=True), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_generators_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Goes on with the noise of a state that `generators_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def noise_state() -> int:
    """Returns a 64-bit digest of torch's generator: ranks with the same one draw the same noise from here on."""
    return int.from_bytes(hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=8).digest(), "little")


def set_apart(states: Sequence[int], rank: int) -> None:
    """Seeds this rank's generators anew if a lower rank is in the same state.

    Processes that torch starts all have one default seed, and a script seeds them alike more often than not.

    Args:
        states: Each rank's `noise_state`.
        rank: This rank.
    """
    if states[rank] in states[:rank]:
        seed_generators(noise_seed(states[rank], rank=rank))
