"""What it costs two ranks to agree on parameters that appear one at a time, and what a step takes afterwards.

`python -m tests.benchmarks.bench_growth [NUMBER] [BIRTHS]`: a model of NUMBER parameters (1,000) of which BIRTHS (all)
appear one a step, the others at once before, beside one whose parameters all appear at once. Times are those of the
optimizer's call, of the slower rank. What a step costs after 20,000 parameters is seen by the last few of them:
`bench_growth 20000 40`.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from torch import Tensor

from tests import workers

NUMEL = 10
NUM_STEADY = 60
SETTLED = 40  # steps after the last parameter until groups are joined, which are not counted
REQUIRED = 1.5
"""Most that a step may take after growth, in steps of the model whose parameters came at once."""


def grow(number: int, births: int) -> tuple[list[float], list[float], float]:
    """Runs in each rank: seconds of each call with a new parameter, of steady ones, and of the first with many."""
    import pyro

    from distopt.optim import Adam, DistributedOptimizer

    pyro.clear_param_store()
    optim = DistributedOptimizer(Adam({"lr": 1e-3}))
    params: list[Tensor] = []

    def appear(index: int) -> None:
        name = f"p{index * 7919 % 100_003:06d}"  # in no order of names
        params.append(pyro.param(name, torch.full((NUMEL,), float(index))).unconstrained())

    def timed() -> float:
        for param in params:
            param.grad = torch.ones_like(param)
        started = time.perf_counter()
        optim(params)
        return time.perf_counter() - started

    for index in range(number - births):
        appear(index)
    at_once = timed() if params else 0.0
    growing = []
    for index in range(number - births, number):
        appear(index)
        growing.append(timed())
    return growing, [timed() for _ in range(SETTLED + NUM_STEADY)][SETTLED:], at_once


def main(arguments: list[str]) -> int:
    """Prints milliseconds of an agreement by quarter of the growth, and the ratio of the steps after it."""
    number = int(arguments[0]) if arguments else 1000
    births = int(arguments[1]) if len(arguments) > 1 else number
    world = workers.world("torch_dist", 2)
    grown, together = (list(zip(*world.run(grow, number, each, timeout_s=3000), strict=True)) for each in (births, 0))
    workers.close_worlds()

    growing = [max(pair) * 1e3 for pair in zip(*grown[0], strict=True)]
    quarter = max(1, births // 4)
    medians = [statistics.median(growing[start : start + quarter]) for start in range(0, quarter * 4, quarter)]
    steady, fixed = (statistics.median(max(pair) for pair in zip(*each[1], strict=True)) for each in (grown, together))
    print(f"{births} of {number} parameters, one a step: ms of a step with an agreement, median of each quarter")
    print("  " + "  ".join(f"{each:.1f}" for each in medians) + f"   in all {sum(growing) / 1e3:.1f} s")
    print(f"all {number} at once: {max(together[2]) * 1e3:.1f} ms")
    print(f"steady step afterwards {steady * 1e3:.2f} ms, of parameters that came at once {fixed * 1e3:.2f} ms")
    ratio = steady / fixed
    print(f"{'ok    ' if ratio <= REQUIRED else 'MISSED'} {ratio:8.2f} (at most {REQUIRED:.2f})  step after growth")
    return int(ratio > REQUIRED)


if __name__ == "__main__":
    # By its own name, so that the ranks find what they are sent.
    from tests.benchmarks import bench_growth

    sys.exit(bench_growth.main(sys.argv[1:]))
