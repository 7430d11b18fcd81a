"""Noise: what each rank draws at each step, all of it from one seed."""

from __future__ import annotations

import random
from typing import Literal, TypeAlias

import numpy as np
import torch

from distopt import backends

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


_policy: list[NoisePolicy] = ["independent"]


def seed_noise(seed: int, step: int = 0, rank: int = 0, policy: NoisePolicy = "independent") -> None:
    """Seeds torch, NumPy and Python's `random` for `step`, see `noise_seed`.

    Under `shared`, sites in sharded plates still draw a rank's own noise, for their datapoints are its own.
    """
    _policy[0] = policy
    number = noise_seed(seed, step, rank, policy)
    random.seed(number)
    np.random.seed(number)
    # Not torch.manual_seed, which keeps a text of the call stack for each kind of GPU: 0.2 ms a step.
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(number)


class OwnNoise:
    """A stretch of a shared stream in which a rank draws noise of its own, and after which all are in step again.

    The rank's seed is drawn from the shared stream, so it differs from site to site and is the same at each repetition.

    Args:
        rank: this rank, which tells its seed from the others'.
    """

    def __init__(self, rank: int) -> None:
        drawn = int(torch.randint(2**62, ()))
        self._cpu = torch.get_rng_state()
        self._gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        torch.manual_seed(noise_seed(drawn, rank=rank))

    def end(self) -> None:
        """Goes on with the shared stream."""
        torch.set_rng_state(self._cpu)
        if self._gpu is not None:
            torch.cuda.set_rng_state(self._gpu)


def begin_own_noise() -> OwnNoise | None:
    """Begins a stretch of this rank's own noise where the ranks share theirs; None where they do not."""
    if _policy[0] == "independent":
        return None
    return OwnNoise(backends.current().rank)
