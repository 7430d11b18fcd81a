"""How the cost of a step grows: ranks on one machine, hosts on a slow network, and a model fitted to both.

The model is that of a ring all-reduce: with W ranks, n bytes, latency a and bandwidth b,
    seconds = c + 2 (W - 1) a + 2 (W - 1) / W · n / b.
Hosts are network namespaces, each with its own interface whose rate `tc tbf` limits; root and iproute2 are needed.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BYTES = (400, 40_000, 4_000_000)
RANKS = (1, 2, 4, 8)
RATES_MBIT = (1000, 100)
HOSTS = (2, 3, 4)
LINK = "veth0"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Point:
    """One measured median."""

    num_ranks: int
    num_bytes: int
    seconds: float


def time_steps() -> None:
    """Runs in each rank: prints the median seconds of a whole reduction (fill, all-reduce, read) for each size."""
    import pyro
    import torch

    import distopt
    from distopt.optim import SGD, DistributedOptimizer

    torch.set_num_threads(1)
    backend = distopt.init("torch_dist")
    for num_bytes in BYTES:
        pyro.clear_param_store()
        optim = DistributedOptimizer(SGD({"lr": 0.0}))
        param = pyro.param("x", torch.zeros(num_bytes // 4)).unconstrained()
        param.grad = torch.zeros_like(param)
        times = []
        for _ in range(12 if num_bytes > 1e6 else 40):
            backend.barrier()
            started = time.perf_counter()
            optim({param})
            times.append(time.perf_counter() - started)
        if backend.rank == 0:
            print("point", num_bytes, statistics.median(times[4:]), flush=True)
    backend.close()


def measure(num_ranks: int, prefixes: Sequence[Sequence[str]] = ((),), address: str = "127.0.0.1") -> list[Point]:
    """Starts the ranks, one after the other over the hosts, and returns what rank 0 measured."""
    link = "lo" if address == "127.0.0.1" else LINK
    environment = os.environ | {"MASTER_ADDR": address, "MASTER_PORT": "29533", "WORLD_SIZE": str(num_ranks)}
    environment |= {"GLOO_SOCKET_IFNAME": link, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # the hosts have no names
    command = [sys.executable, "-c", "from tests.benchmarks.scaling import time_steps; time_steps()"]
    started = [
        subprocess.Popen(
            [*prefixes[rank % len(prefixes)], *command],
            env=environment | {"RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        out, _ = started[0].communicate(timeout=100)
        for process in started[1:]:
            process.wait(timeout=30)
    finally:
        for process in started:
            process.kill()
            process.wait()
    rows = [line.split() for line in out.splitlines() if line.startswith("point")]
    return [Point(num_ranks, int(num_bytes), float(seconds)) for _, num_bytes, seconds in rows]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def remove_stale() -> None:
    """Removes the namespaces that a run which was killed has left."""
    for line in subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout.splitlines():
        name = line.split()[0]
        if name.startswith("dob-") and not Path("/proc", name.split("-")[1]).exists():
            _ip("netns", "del", name)


@contextmanager
def network(num_hosts: int, rate_mbit: int) -> Iterator[list[list[str]]]:
    """Makes hosts 10.78.0.1, 10.78.0.2, … of that rate; yields the command prefix that runs a process on each."""
    *names, switch = made = [f"dob-{os.getpid()}-{number}" for number in range(num_hosts + 1)]
    shape = f"tbf rate {rate_mbit}mbit burst 256kb latency 200ms".split()
    try:
        for name in made:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for number, name in enumerate(names):
            _ip("link", "add", LINK, "netns", name, "type", "veth", "peer", "name", f"p{number}", "netns", switch)
            _ip("-n", switch, "link", "set", f"p{number}", "master", "br0", "up")
            _ip("-n", name, "addr", "add", f"10.78.0.{number + 1}/24", "dev", LINK)
            _ip("-n", name, "link", "set", LINK, "up")
            subprocess.run(["ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", LINK, "root", *shape], check=True)
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def fit(points: Sequence[Point]) -> tuple[np.ndarray, float]:
    """Returns (constant, latency, seconds per byte), and the median relative error of the fit.

    Least squares of relative errors, with no negative coefficient: what comes out negative is left out.
    """
    rows = np.array([_terms(point) for point in points])
    seconds = np.array([p.seconds for p in points])
    kept = [0, 1, 2]
    while True:
        solved, *_ = np.linalg.lstsq(rows[:, kept] / seconds[:, None], np.ones(len(points)), rcond=None)
        if (solved >= 0).all():
            break
        kept = [each for each, value in zip(kept, solved, strict=True) if value >= 0]
    coefficients = np.zeros(3)
    coefficients[kept] = solved
    return coefficients, float(np.median(np.abs(rows @ coefficients / seconds - 1)))


def _terms(point: Point) -> np.ndarray:
    rounds = 2 * (point.num_ranks - 1)
    return np.array([1.0, rounds, rounds / point.num_ranks * point.num_bytes])


def expected(model: np.ndarray, num_ranks: int, num_bytes: int) -> float:
    """Returns the seconds that a fitted model expects of a reduction."""
    return float(model @ _terms(Point(num_ranks, num_bytes, 0.0)))


def report(name: str, points: Sequence[Point]) -> None:
    """Prints the points, the model, its errors, and what it expects of more ranks."""
    print(f"\n{name}")
    for size in BYTES:
        row = "  ".join(f"{p.num_ranks} ranks {p.seconds * 1e3:8.2f} ms" for p in points if p.num_bytes == size)
        print(f"  {size:9,d} bytes: {row}")
    several = [point for point in points if point.num_ranks > 1]
    model, error = fit(several)
    constant, latency, per_byte = model
    bandwidth = f"{8e-6 / per_byte:,.0f} Mbit/s" if per_byte else "not seen"
    largest = max(point.num_ranks for point in several)
    unseen = fit([point for point in several if point.num_ranks < largest])[0]
    misses = [
        abs(expected(unseen, p.num_ranks, p.num_bytes) / p.seconds - 1) for p in several if p.num_ranks == largest
    ]
    print(f"  fit: {constant * 1e3:.2f} ms + 2 (W - 1) x {latency * 1e6:.0f} us, {bandwidth}; median error {error:.0%}")
    print(f"  fitted without {largest} ranks, it misses those by {', '.join(f'{each:.0%}' for each in misses)}")
    for ranks in (64, 512):
        durations = ", ".join(f"{expected(model, ranks, size) * 1e3:,.1f} ms" for size in BYTES)
        print(f"  expected at {ranks:3d} ranks: {durations}", flush=True)


def main(arguments: Sequence[str] = ()) -> None:
    """Measures and reports all of it, or one part: `ranks`, or a rate in Mbit/s."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # so that namespaces are removed
    if not arguments or "ranks" in arguments:
        report("ranks on this machine", [point for ranks in RANKS for point in measure(ranks)])
    if os.geteuid() != 0 or shutil.which("tc") is None:
        print("hosts: left out, network namespaces need root and iproute2")
        return
    remove_stale()
    for rate in RATES_MBIT:
        if arguments and str(rate) not in arguments:
            continue
        points = []
        for num_hosts in HOSTS:
            with network(num_hosts, rate) as prefixes:
                points += measure(num_hosts, prefixes, "10.78.0.1")
        report(f"hosts on {rate} Mbit/s", points)
