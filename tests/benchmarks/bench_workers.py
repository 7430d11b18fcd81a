"""What a second worker is worth: rows per second of two workers over those of one, and from which rows it pays.

    python -m tests.benchmarks.bench_workers [--quick] [WORD ...]

Each worker has one core and one thread. Batches are read as in a run from YAML, and steps are `SVI.step_with` of a
`DistributedOptimizer`. One worker and two take turns; times are medians over rounds. With words, only the workloads
that have one of them in their name are measured.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[2]
REQUIRED = 1.6

# What is measured: name, mode, rows of a step over all workers, what two workers are worth at least.
FLIGHTS_ROWS = (4_096, 8_192, 16_384, 32_768, 65_536, 131_072, 294_611)
PLATE_ROWS = 200_000
WORKLOADS = [
    *(("flights", "graph", rows, REQUIRED if rows == 131_072 else None) for rows in FLIGHTS_ROWS),
    *(("flights", "compiled", rows, REQUIRED if rows == 294_611 else None) for rows in FLIGHTS_ROWS[1::2]),
    ("flights", "compiled", 294_611, REQUIRED),
    ("plate", "graph", PLATE_ROWS, REQUIRED),
    ("plate", "compiled", PLATE_ROWS, REQUIRED),
]


class Times(NamedTuple):
    """Seconds of a step: of the clock, and of rank 0 on the processor."""

    wall: float
    processor: float


# A worker's part.


def _flights(rows: int, rank: int, world_size: int) -> tuple[Any, Any, Any, float]:
    from distopt.data import GlobalBatches
    from distopt.examples.flights import Flights
    from distopt.train.task import TaskRows

    task = Flights()
    global_batch = None if rows == task.rows() else rows
    batches = GlobalBatches(task.rows(), global_batch, 1, rank=rank, world_size=world_size)
    return task.model, task.guide, (TaskRows(task), batches), batches.weight


def _plate(rows: int, rank: int, world_size: int) -> tuple[Any, Any, Any, float]:
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer.autoguide import AutoNormal

    from distopt.infer import sharded_plate
    from tests.benchmarks.step_models import plate_data

    x = torch.from_numpy(plate_data()[rows * rank // world_size : rows * (rank + 1) // world_size])

    def model(x: torch.Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        with sharded_plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    return model, AutoNormal(model), (x,), 1.0


def work(name: str, mode: Any, rows: int) -> None:
    """Takes as many steps as each line of the standard input says, and prints the seconds that one took."""
    import pyro
    import torch

    import distopt
    from distopt.config import DataConfig
    from distopt.data import Loader
    from distopt.infer import SVI
    from distopt.optim import Adam, DistributedOptimizer

    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    distopt.init("torch_dist")
    model, guide, data, weight = (_flights if name == "flights" else _plate)(rows, rank, world_size)
    optim = DistributedOptimizer(Adam({"lr": 0.01}))
    svi = SVI(model, guide, optim, pyro.infer.Trace_ELBO(), weight=weight, capture=mode)
    loader = Loader(*data, num_ahead=DataConfig().prefetch) if name == "flights" else None
    num_steps = 0

    def steps(count: int) -> None:
        nonlocal num_steps
        for _ in range(count):
            svi.step_with(data if loader is None else loader.batch(num_steps))
            num_steps += 1

    steps(5)
    if svi.captured is None or svi.captured.refusal or svi.captured.notice:
        raise RuntimeError(f"not captured as asked: {svi.captured and (svi.captured.refusal or svi.captured.notice)}")
    steps(70)  # beyond the steps that are recorded again for comparison
    print("ready", flush=True)
    for line in sys.stdin:
        count, began, began_cpu = int(line), time.perf_counter(), time.process_time()
        steps(count)
        print((time.perf_counter() - began) / count, (time.process_time() - began_cpu) / count, flush=True)


# Worlds of one and of two workers, which take turns.


class World:
    """The processes of some workers, each with one core."""

    def __init__(self, ranks: Sequence[subprocess.Popen[str]]) -> None:
        self._ranks = ranks

    def read(self) -> list[str]:
        """Returns the next line that each rank prints."""
        lines = [rank.stdout.readline().strip() for rank in self._ranks if rank.stdout is not None]
        if not all(lines):
            raise RuntimeError("a worker has ended")
        return lines

    def time(self, count: int) -> Times:
        """Returns the seconds of a step, in the mean over `count` steps."""
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write(f"{count}\n")
            rank.stdin.flush()
        return Times(*map(float, self.read()[0].split()))


def environments(world_size: int) -> list[dict[str, str]]:
    """Returns the environment of each rank of a new world: one thread, and memory that malloc keeps."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    shared |= {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
    shared |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in map(str, range(world_size))]


@contextmanager
def started(world_size: int, *workload: Any) -> Iterator[World]:
    """Starts a world and ends it."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.bench_workers", "--work", *map(str, workload)]
    ranks: list[subprocess.Popen[str]] = []
    try:
        for environment in environments(world_size):
            pipe = subprocess.PIPE
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True))
        yield World(ranks)
    finally:
        for each in ranks:
            each.kill()
            each.communicate()


def measure(workload: Sequence[Any], seconds: float) -> list[Times]:
    """Returns the median times of a step with one worker and with two."""
    with ExitStack() as stack:
        worlds = [stack.enter_context(started(world_size, *workload)) for world_size in (1, 2)]
        for each in worlds:
            each.read()
        counts = [max(3, int(0.2 / each.time(5).wall)) for each in worlds]
        times: list[list[Times]] = [[], []]
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(times[0]) < 5:
            for each, count, measured in zip(worlds, counts, times, strict=True):
                measured.append(each.time(count))
    return [Times(*map(statistics.median, zip(*measured, strict=True))) for measured in times]


def fit(measured: Sequence[tuple[int, float, float]]) -> tuple[float, float, float]:
    """Fits seconds of a step = constant + per_row * rows / workers, + what a second worker adds.

    Args:
        measured: Rows of a step, its seconds with one worker, and with two.

    Returns:
        The constant, the seconds of a row, and what a second worker adds: least squares of relative errors.
    """
    equations = [(1.0, rows, 0.0, one) for rows, one, _ in measured]
    equations += [(1.0, rows / 2, 1.0, two) for rows, _, two in measured]
    *terms, seconds = np.array(equations).T
    solved, *_ = np.linalg.lstsq(np.stack(terms, 1) / seconds[:, None], np.ones(len(seconds)), rcond=None)
    return float(solved[0]), float(solved[1]), float(solved[2])


def report_model(mode: str, measured: Sequence[tuple[int, float, float]]) -> None:
    """Prints the fitted cost of a step, and from which rows on a second worker pays."""
    constant, per_row, second = fit(measured)
    even = max(0.0, 2 * second / per_row)
    # one / two = 1.6: constant + rows a = 1.6 (constant + rows a / 2 + second)
    worth = max(0.0, ((REQUIRED - 1) * constant + REQUIRED * second) / (per_row * (1 - REQUIRED / 2)))
    print(
        f"flights {mode}: {1e6 * constant:.0f} us + {1e9 * per_row:.1f} ns a row of a worker, a second worker adds "
        f"{1e6 * second:.0f} us: it makes steps quicker from {even:,.0f} rows a step, {REQUIRED} x from {worth:,.0f}",
        flush=True,
    )


def main(arguments: list[str]) -> int:
    """Measures the workloads; returns how many miss what is required."""
    names = [argument for argument in arguments if argument != "--quick"]
    missed = 0
    measured: dict[str, list[tuple[int, float, float]]] = {}
    for name, mode, rows, required in WORKLOADS:
        label = f"{name} {mode} {rows:,}"
        if names and not any(substring in label for substring in names):
            continue
        one, two = measure((name, mode, rows), 4.0 if "--quick" in arguments else 15.0)
        ratio = one.wall / two.wall
        met = "" if required is None else f"  at least {required}: {'met' if ratio >= required else 'NOT met'}"
        missed += required is not None and ratio < required
        print(
            f"{label:26s} ms a step (on the processor): one worker {1e3 * one.wall:7.3f} ({1e3 * one.processor:7.3f})  "
            f"two {1e3 * two.wall:7.3f} ({1e3 * two.processor:7.3f})  {ratio:5.2f} x{met}",
            flush=True,
        )
        if name == "flights":
            measured.setdefault(mode, []).append((rows, one.wall, two.wall))
    for mode, points in measured.items():
        if len(points) > 2:
            report_model(mode, points)
    return missed


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        sys.exit(main(sys.argv[1:]))
