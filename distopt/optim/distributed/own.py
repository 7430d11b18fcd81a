"""What the ranks must know of gradients that one of them alone steps by: those of its sharded plates."""

from __future__ import annotations

import math

from distopt.optim.arguments import args_for
from distopt.optim.clipping import global_norm
from distopt.optim.optim import PyroOptim
from distopt.reduce import Brought, Reduced
from distopt.reduce.control import Control
from distopt.reduce.finite import is_finite


def tell_own(optim: PyroOptim, brought: Brought, said: Control) -> None:
    """Writes into `said` what decides how all ranks step: whether they are finite, and their norm where that clips.

    Raises:
        ValueError: `clip_args` is a callable and wants a global norm for some of them.
    """
    if optim.nonfinite != "step" or optim.scaler is not None:
        said.nonfinite = not all(is_finite(gradient) for _, _, gradient in brought.own)
    args = optim.pt_clip_args
    if not callable(args):
        if args.get("global_norm") is not None:
            said.own_square = brought.own_square()
        return
    for name, _, _ in brought.own:
        if args_for("clip_args", args, name).get("global_norm") is not None:
            raise ValueError(
                f"clip_args is a callable and gives global_norm for {name!r}, which is one rank's own, so the ranks "
                "cannot tell over which parameters the norm goes. Give clip_args={'global_norm': ...}, which is for "
                "all, or clip_norm for this one."
            )


def total_norm(optim: PyroOptim, reduced: Reduced) -> float | None:
    """Returns the norm over all parameters of all ranks, bit by bit the same on each; None where none has its own."""
    if not reduced.heard.own_square:
        return None
    shared = [part.buffer for part in reduced.dense]
    shared += [gradient for _, _, gradient in reduced.loose[: len(reduced.loose) - reduced.num_own]]
    total = math.sqrt(float(global_norm(shared)) ** 2 + reduced.heard.own_square)
    return total if optim.scaler is None else total / optim.scaler.get_scale()


def spread_nonfinite_(optim: PyroOptim, reduced: Reduced) -> None:
    """Makes gradients infinite where some rank's own are not finite, so that all scalers skip the step and back off."""
    if optim.scaler is not None and reduced.heard.num_nonfinite:
        for gradient in [part.buffer for part in reduced.dense] + [each for _, _, each in reduced.loose]:
            gradient.fill_(math.inf)
