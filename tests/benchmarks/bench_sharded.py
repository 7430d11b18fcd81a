"""Time of a step with a latent vector per datapoint, split over two workers, against Pyro alone; as ratios.

    python -m tests.benchmarks.bench_sharded [rows ...]

Each round times, one after the other: Pyro in one process with all data; Pyro in each process with its part of the
data, and a bare all-reduce of as many bytes as distopt sends after each step; and distopt with the sharded plate.
Medians over rounds, the ratio within each. Then the memory of 1 to 4 workers.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.infer
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from distopt import backends, optim
from distopt.infer import SVI, shard
from tests.infer.sharded_costs import NUM_DIMS, model, train
from tests.workers import close_worlds, world

WORKERS, ROUNDS = 2, 7


def _stepper(kind: str, data: Tensor, num_steps: int) -> Callable[[], Any]:
    """Returns a function that takes some steps, with a parameter store of its own."""
    backend, small = backends.current(), torch.zeros(64)
    store = pyro.get_param_store()
    store.clear()
    elbo = pyro.infer.Trace_ELBO()
    if kind == "distopt":
        sharded = shard(model, "rows")
        svi: Any = SVI(sharded, AutoNormal(sharded), optim.DistributedOptimizer(optim.Adam({"lr": 0.01})), elbo)
    else:
        svi = pyro.infer.SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), elbo)
    for _ in range(2):
        svi.step(data)
    state = store.get_state()

    def step() -> None:
        store.clear()
        store.set_state(state)
        for _ in range(num_steps):
            svi.step(data)
            if kind == "part":
                backend.all_reduce(small).wait()

    return step


def measure(num_rows: int) -> dict[str, list[float]]:
    """One rank's part; returns the seconds per step in each round."""
    backend = backends.current()
    data = torch.ones(num_rows, NUM_DIMS)
    share = data[num_rows * backend.rank // WORKERS : num_rows * (backend.rank + 1) // WORKERS]
    num_steps = max(2, min(5, 500_000 // num_rows))
    kinds = {kind: _stepper(kind, share, num_steps) for kind in ("part", "distopt")}
    if backend.rank == 0:
        kinds["all"] = _stepper("all", data, num_steps)
    times: dict[str, list[float]] = {"all": [], "part": [], "distopt": []}
    for _ in range(max(ROUNDS, 500_000 // num_rows)):
        for kind, measured in times.items():
            backend.barrier()
            began = time.perf_counter()
            if kind in kinds:
                kinds[kind]()
            backend.barrier()  # as slow as the slower rank
            measured.append((time.perf_counter() - began) / num_steps)
    return times


SIZES = (20_000, 200_000, 1_000_000)
MOST = 1.02  # times Pyro on this rank's part and the all-reduce


def time_steps(num_rows: int) -> bool:
    """Prints the times of a step and their ratios; returns whether distopt is as quick as it is meant to be."""
    from tests.benchmarks.bench_sharded import measure as body  # the ranks cannot find it in __main__

    times = world("torch_dist", WORKERS).run(body, num_rows, timeout_s=200)[0]
    measured = {kind: statistics.median(each) for kind, each in times.items()}
    # Within a round, so that what else the machine does weighs on both alike.
    ratio = statistics.median(ours / share for ours, share in zip(times["distopt"], times["part"], strict=True))
    is_met = ratio <= MOST
    print(f"\n{num_rows:,} datapoints of {NUM_DIMS} numbers, AutoNormal, Adam, {WORKERS} workers; ms per step:")
    print(f"  Pyro, one process, all data                           {1e3 * measured['all']:8.1f}")
    print(f"  Pyro, each process its part, and a small all-reduce   {1e3 * measured['part']:8.1f}")
    print(f"  distopt, sharded plate                                {1e3 * measured['distopt']:8.1f}")
    met = "met" if is_met else "NOT met"
    print(f"  against Pyro on its part and the all-reduce: {ratio:.2f} x, required at most {MOST}: {met}")
    print(f"  against Pyro with all data: {measured['all'] / measured['distopt']:.2f} x as fast", flush=True)
    return is_met


def measure_memory(num_rows: int) -> None:
    """Prints what each of 1 to 4 workers holds at its peak, and the bytes it sends in a step."""
    print(f"\n{num_rows:,} datapoints of {NUM_DIMS} numbers, AutoDelta, Adam; each worker, at most:")
    for world_size in (1, 2, 3, 4):
        world("torch_dist", world_size).run(train, 1000, 2)  # loads what a first step loads
        measured = world("torch_dist", world_size).run(train, num_rows, 3)
        rows, peak, sent = (max(each[key] for each in measured) for key in ("rows", "peak", "bytes"))
        print(
            f"  {world_size} workers: {rows:9,} datapoints, {peak / 2**20:6.0f} MiB, {sent} bytes sent a step",
            flush=True,
        )
    close_worlds()


def main(sizes: Sequence[int]) -> int:
    """Prints times and memory; returns 1 when a step takes longer than required."""
    is_met = [time_steps(num_rows) for num_rows in sizes]
    close_worlds()  # memory is measured in processes that have held nothing yet
    measure_memory(1_000_000)
    return 0 if all(is_met) else 1


if __name__ == "__main__":
    sys.exit(main([int(size) for size in sys.argv[1:]] or SIZES))
