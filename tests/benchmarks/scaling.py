"""How the cost of a step grows: ranks on one machine, hosts on a slow network, and a model fitted to both.

The model is that of a ring all-reduce: with W ranks, n bytes, latency a and bandwidth b,
    seconds = c + 2 (W - 1) a + 2 (W - 1) / W · n / b.
Hosts are network namespaces, each with its own interface whose rate `tc tbf` limits; root and iproute2 are needed.
"""

from __future__ import annotations

import os
import shutil
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


def measure(
    num_ranks: int, prefixes: Sequence[Sequence[str]] = ((),), address: str = "127.0.0.1", link: str = "lo"
) -> list[Point]:
    """Starts the ranks, one after the other over the hosts, and returns what rank 0 measured."""
    environment = os.environ | {"MASTER_ADDR": address, "MASTER_PORT": "29533", "WORLD_SIZE": str(num_ranks)}
    environment |= {"GLOO_SOCKET_IFNAME": link, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
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
    out, _ = started[0].communicate(timeout=150)
    for process in started[1:]:
        process.wait(timeout=30)
    words = [line.split() for line in out.splitlines() if line.startswith("point")]
    return [Point(num_ranks, int(num_bytes), float(seconds)) for _, num_bytes, seconds in words]


@contextmanager
def network(num_hosts: int, rate_mbit: int) -> Iterator[list[list[str]]]:
    """Makes hosts 10.78.0.1, 10.78.0.2, … of that rate; yields the command prefix that runs a process on each."""
    names = [f"dob{number}" for number in range(num_hosts + 1)]  # the last one is the switch

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    for name in names:
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
    try:
        switch = names[-1]
        ip("-n", switch, "link", "add", "br0", "type", "bridge")
        ip("-n", switch, "link", "set", "br0", "up")
        for number, name in enumerate(names[:-1]):
            ip("link", "add", "veth0", "netns", name, "type", "veth", "peer", "name", f"p{number}", "netns", switch)
            ip("-n", switch, "link", "set", f"p{number}", "master", "br0", "up")
            ip("-n", name, "addr", "add", f"10.78.0.{number + 1}/24", "dev", "veth0")
            ip("-n", name, "link", "set", "veth0", "up")
            shape = f"tbf rate {rate_mbit}mbit burst 256kb latency 200ms".split()
            subprocess.run(
                ["ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "veth0", "root", *shape], check=True
            )
        yield [["ip", "netns", "exec", name] for name in names[:-1]]
    finally:
        for name in names:
            ip("netns", "del", name)


def fit(points: Sequence[Point]) -> tuple[np.ndarray, float]:
    """Returns (constant, latency, seconds per byte), and the median relative error of the fit.

    Least squares of relative errors, with no negative coefficient: what comes out negative is left out.
    """
    rows = np.array([[1.0, 2 * (p.num_ranks - 1), 2 * (p.num_ranks - 1) / p.num_ranks * p.num_bytes] for p in points])
    seconds = np.array([p.seconds for p in points])
    kept = [0, 1, 2]
    while True:
        solved, *_ = np.linalg.lstsq(rows[:, kept] / seconds[:, None], np.ones(len(points)), rcond=None)
        if (solved >= 0).all():
            break
        kept = [each for each, value in zip(kept, solved, strict=True) if value >= 0]
    found = np.zeros(3)
    found[kept] = solved
    return found, float(np.median(np.abs(rows @ found / seconds - 1)))


def report(name: str, points: Sequence[Point]) -> None:
    """Prints the points, the model and what it expects of more ranks."""
    print(f"\n{name}")
    for size in BYTES:
        row = "  ".join(f"{p.num_ranks} ranks {p.seconds * 1e3:8.2f} ms" for p in points if p.num_bytes == size)
        print(f"  {size:9,d} bytes: {row}")
    several = [point for point in points if point.num_ranks > 1]
    (constant, latency, per_byte), error = fit(several)
    bandwidth = f"{8e-6 / per_byte:,.0f} Mbit/s" if per_byte else "not seen"
    print(f"  fit: {constant * 1e3:.2f} ms + 2 (W - 1) x {latency * 1e6:.0f} us, {bandwidth}; median error {error:.0%}")
    for ranks in (64, 512):
        told = [constant + 2 * (ranks - 1) * latency + 2 * (ranks - 1) / ranks * size * per_byte for size in BYTES]
        print(f"  expected at {ranks:3d} ranks: " + ", ".join(f"{each * 1e3:,.1f} ms" for each in told))


def main() -> None:
    """Measures and reports all of it."""
    report("ranks on this machine", [point for ranks in RANKS for point in measure(ranks)])
    if os.geteuid() != 0 or shutil.which("tc") is None:
        print("hosts: left out, network namespaces need root and iproute2")
        return
    for rate in RATES_MBIT:
        points = []
        for num_hosts in HOSTS:
            with network(num_hosts, rate) as prefixes:
                points += measure(num_hosts, prefixes, "10.78.0.1", "veth0")
        report(f"hosts on {rate} Mbit/s", points)


if __name__ == "__main__":
    main()
