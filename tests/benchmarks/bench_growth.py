"""What it costs two ranks to agree on parameters that appear one at a time, and what a step takes afterwards.

`python -m tests.benchmarks.bench_growth [NUMBER] [BIRTHS]`: a model of NUMBER parameters (1,000) of which BIRTHS (all)
appear one a step, the others at once before, beside one whose parameters all appear at once. Times are those of the
optimizer's call, of the slower rank; processor time is that of its main thread, and hardly follows from what else the
machine does. What a step costs after 20,000 parameters is seen by the last few of them:
`bench_growth 20000 40`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from tests import workers

NUMEL = 10
NUM_STEADY = 60
SETTLED = 40  # steps after the last parameter until groups are joined, which are not counted
Times: TypeAlias = tuple[float, float]
"""Seconds of a call, and those in which its thread computed."""
REQUIRED = 1.5
"""Most that a step may take after growth, in steps of the model whose parameters came at once."""


def grow(number: int, births: int) -> tuple[list[Times], list[Times], Times]:
    """Runs in each rank: times of each call with a new parameter, of steady ones, and of the first with many."""
    import pyro

    from distopt.optim import Adam, DistributedOptimizer

    pyro.clear_param_store()
    optim = DistributedOptimizer(Adam({"lr": 1e-3}))
    params: list[Tensor] = []

    def appear(index: int) -> None:
        name = f"p{index * 7919 % 100_003:06d}"  # in no order of names
        params.append(pyro.param(name, torch.full((NUMEL,), float(index))).unconstrained())

    def timed() -> Times:
        for param in params:
            param.grad = torch.ones_like(param)
        started = time.perf_counter(), time.thread_time()
        optim(params)
        return time.perf_counter() - started[0], time.thread_time() - started[1]

    for index in range(number - births):
        appear(index)
    at_once = timed() if params else (0.0, 0.0)
    growing = []
    for index in range(number - births, number):
        appear(index)
        growing.append(timed())
    return growing, [timed() for _ in range(SETTLED + NUM_STEADY)][SETTLED:], at_once


def slower(ranks: Sequence[Times]) -> Times:
    """Returns the largest of each time over the ranks."""
    return max(wall for wall, _ in ranks), max(processor for _, processor in ranks)


def median(times: Sequence[Times]) -> Times:
    return statistics.median(wall for wall, _ in times), statistics.median(processor for _, processor in times)


def in_ms(times: Times) -> str:
    return f"{times[0] * 1e3:.1f} ({times[1] * 1e3:.1f})"


def main(arguments: list[str]) -> int:
    """Prints milliseconds of an agreement by quarter of the growth, and the ratio of the steps after it."""
    number = int(arguments[0]) if arguments else 1000
    births = int(arguments[1]) if len(arguments) > 1 else number
    world = workers.world("torch_dist", 2)
    grown, together = (list(zip(*world.run(grow, number, each, timeout_s=3000), strict=True)) for each in (births, 0))
    workers.close_worlds()

    quarter = max(1, births // 4)
    growing = [slower(pair) for pair in zip(*grown[0], strict=True)]
    steady, fixed = (median([slower(pair) for pair in zip(*each[1], strict=True)]) for each in (grown, together))
    print("milliseconds, and those of the processor in brackets")
    print(f"{births} of {number} parameters, one a step: step with an agreement, median of each quarter")
    quarters = [median(growing[start : start + quarter]) for start in range(0, quarter * 4, quarter)]
    print(f"  {'  '.join(map(in_ms, quarters))}   in all {sum(wall for wall, _ in growing):.1f} s")
    print(f"all {number} at once: {in_ms(slower(together[2]))}")
    print(f"steady step afterwards {in_ms(steady)}, of parameters that came at once {in_ms(fixed)}")
    ratio = steady[0] / fixed[0]
    print(f"{'ok    ' if ratio <= REQUIRED else 'MISSED'} {ratio:8.2f} (at most {REQUIRED:.2f})  step after growth")
    return int(ratio > REQUIRED)


if __name__ == "__main__":
    # By its own name, so that the ranks find what they are sent.
    from tests.benchmarks import bench_growth

    sys.exit(bench_growth.main(sys.argv[1:]))
