"""Time of a step with a latent vector per datapoint, split over two workers, against Pyro alone; as ratios.

    python -m tests.benchmarks.bench_sharded [rows]

Each round times, one after the other: Pyro in one process with all data; Pyro in each process with its part of the
data and no exchange; distopt with the sharded plate; and a bare all-reduce of as many bytes as that sends.
Medians over rounds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.infer
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from distopt import backends, optim
from distopt.infer import SVI, shard
from tests.infer.sharded_costs import NUM_DIMS, model
from tests.workers import close_worlds, world

WORKERS, ROUNDS, STEPS = 2, 7, 5


def _stepper(kind: str, data: Tensor) -> Callable[[], Any]:
    """Returns a function that takes one step, with a parameter store of its own."""
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
        for _ in range(STEPS):
            svi.step(data)

    return step


def measure(num_rows: int) -> dict[str, float]:
    """One rank's part; returns the medians in seconds per step."""
    backend = backends.current()
    data = torch.ones(num_rows, NUM_DIMS)
    part = data[num_rows * backend.rank // WORKERS : num_rows * (backend.rank + 1) // WORKERS]
    small = torch.zeros(64)

    def all_reduce() -> None:
        for _ in range(STEPS):
            backend.all_reduce(small).wait()

    kinds: dict[str, Callable[[], Any]] = {"part": _stepper("pyro", part), "distopt": _stepper("distopt", part)}
    if backend.rank == 0:
        kinds["all"] = _stepper("pyro", data)
    kinds["all_reduce"] = all_reduce
    times: dict[str, list[float]] = {"all": [], "part": [], "distopt": [], "all_reduce": []}
    for _ in range(ROUNDS):
        for kind, found in times.items():
            backend.barrier()
            began = time.perf_counter()
            if kind in kinds:
                kinds[kind]()
            backend.barrier()  # as slow as the slower rank
            found.append((time.perf_counter() - began) / STEPS)
    return {kind: statistics.median(found) for kind, found in times.items()}


def main(num_rows: int) -> int:
    """Prints the ratios; returns 0."""
    found = world("torch_dist", WORKERS).run(measure, num_rows, timeout_s=170)[0]
    close_worlds()
    floor = found["part"] + found["all_reduce"]
    print(f"{num_rows:,} datapoints of {NUM_DIMS} numbers, AutoNormal, Adam, {WORKERS} workers; ms per step:")
    print(f"  Pyro, one process, all data              {1e3 * found['all']:8.1f}")
    print(f"  Pyro, each process its part, no exchange {1e3 * found['part']:8.1f}")
    print(f"  one small all-reduce                     {1e3 * found['all_reduce']:8.2f}")
    print(f"  distopt, sharded plate                   {1e3 * found['distopt']:8.1f}")
    print(f"  against Pyro on its part plus the all-reduce: {found['distopt'] / floor:.2f} x")
    print(f"  against Pyro with all data: {found['all'] / found['distopt']:.2f} x as fast")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 200_000))
