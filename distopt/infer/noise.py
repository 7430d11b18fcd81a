"""Noise: what each rank draws at each step, all of it from one seed."""

from __future__ import annotations

import torch

from distopt import backends
from distopt.reduce.noise import NoisePolicy, noise_seed, seed_generators

_policy: list[NoisePolicy] = ["independent"]


def seed_noise(seed: int, step: int = 0, rank: int = 0, policy: NoisePolicy = "independent") -> None:
    """Seeds torch, NumPy and Python's `random` for `step`, see `noise_seed`.

    Under `shared`, sites in sharded plates still draw a rank's own noise, for their datapoints are its own.
    """
    _policy[0] = policy
    seed_generators(noise_seed(seed, step, rank, policy))


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
