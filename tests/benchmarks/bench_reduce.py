"""What averaging gradients adds to a training step, against Pyro's HorovodOptimizer, DDP and the bare all-reduce.

`python -m tests.benchmarks.bench_reduce` times two ranks on this machine, in interleaved rounds, and prints medians as
ratios (`... 10 100 1000 big`: some of the models). `... scaling` times the step on 1 to 8 ranks and on hosts made of
network namespaces, and fits a model of cost (`... scaling ranks`, `1000`, `100`: one part of it). `... sums` times the
bare sum of two ranks and of four through shared memory, as a ratio to gloo's.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests import workers

ROUNDS, BATCH = 9, 3
KINDS = ("horovod", "torch_dist")
BIG = "10 M-parameter network"
SIZES = {"10 × 100": 10, "100 × 100": 100, "1000 × 100": 1000}
MODELS = {"10": "10 × 100", "100": "100 × 100", "1000": "1000 × 100", "big": BIG}
REQUIRED = {"10 × 100": (1.3, 1.0), "100 × 100": (10.0, 4.0), "1000 × 100": (40.0, 4.0)}  # on torch_dist, on Horovod


class Small:
    """Many small parameters in Pyro's store; backward is one multiplication each."""

    def __init__(self, count: int) -> None:
        import pyro

        self.params = [pyro.param(f"p{i}", torch.zeros(100)).unconstrained() for i in range(count)]

    def backward(self) -> None:
        """Leaves a gradient on each parameter."""
        torch.stack(self.params).square().sum().backward()  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        """As Pyro's SVI does between steps."""
        for param in self.params:
            param.grad = torch.zeros_like(param)


class Network(Small):
    """A network of about ten million parameters."""

    def __init__(self) -> None:
        import pyro

        torch.manual_seed(0)
        width = 1792
        layers = [torch.nn.Linear(width, width) for _ in range(3)]
        self.module = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
        pyro.module("net", self.module)
        self.params = [param for _, param in pyro.get_param_store().named_parameters()]
        self.data = torch.randn(32, width)

    def backward(self) -> None:
        """One pass over a small batch."""
        self.module(self.data).square().sum().backward()


_steps: dict[str, Callable[[], None]] = {}  # in each rank, from `prepare` to the last `time_round`
_stores: dict[str, Any] = {}


def prepare(kind: str, model: str) -> int:
    """Runs in each rank: makes this backend's contenders; returns the process id."""
    import pyro

    _steps.clear(), _stores.clear()
    for name, make in _contenders(kind, model):
        pyro.clear_param_store()
        _steps[name] = make()
        _stores[name] = pyro.get_param_store().get_state()
    return os.getpid()


def time_round(number: int) -> dict[str, float]:
    """Runs in each rank: seconds of a step of every contender, in an order that changes with each round."""
    import pyro

    from distopt.backends import current

    store, times = pyro.get_param_store(), {}
    for name in [*_steps][number % len(_steps) :] + [*_steps][: number % len(_steps)]:
        # Each contender has its own parameters, put back before the clock starts.
        store.clear()
        store.set_state(_stores[name])
        current().barrier()
        started = time.perf_counter()
        for _ in range(BATCH):
            _steps[name]()
        times[name] = (time.perf_counter() - started) / BATCH
    return times


@contextmanager
def awake(pids: Sequence[int]) -> Iterator[None]:
    """Lets a world run; the others' processes are stopped meanwhile, since Horovod's work even while they wait."""
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)


def time_contenders(model: str) -> dict[str, list[float]]:
    """Returns the seconds of a step of every contender on both backends, by round; a round meets one load of all."""
    worlds = {kind: workers.world(kind, 2) for kind in KINDS}
    pids: dict[str, list[int]] = {kind: [] for kind in worlds}
    times: dict[str, list[float]] = {}
    try:
        for kind, world in worlds.items():
            pids[kind] = world.run(prepare, kind, model)
        for number in range(ROUNDS + 1):
            for kind, world in worlds.items():
                with awake(pids[kind]):
                    by_rank = world.run(time_round, number, timeout_s=120)
                for name in by_rank[0] if number else ():  # the first round creates optimizers and connections
                    # A step is done when the slower rank is.
                    key = f"{name} ({kind})" if name.startswith("bare") else name
                    times.setdefault(key, []).append(max(each[name] for each in by_rank))
    finally:
        for pid in [pid for each in pids.values() for pid in each]:
            os.kill(pid, signal.SIGCONT)
    return times


def _contenders(kind: str, model: str) -> Iterator[tuple[str, Callable[[], Callable[[], None]]]]:
    make = Network if model == BIG else lambda: Small(SIZES[model])
    yield "bare backward", lambda: _bare(make())
    yield "bare all-reduce", lambda: _floor(make())
    if kind == "horovod":
        yield "pyro HorovodOptimizer", lambda: _pyro_horovod(make())
        yield "distopt on horovod", lambda: _distopt(make())
    else:
        yield "distopt on torch_dist", lambda: _distopt(make())
        yield "DDP, fused Adam", lambda: _ddp(make())


def _step(model: Any, finish: Callable[[], None], clear: Callable[[], None] | None = None) -> Callable[[], None]:
    clear = clear or model.clear

    def step() -> None:
        model.backward()
        finish()
        clear()

    return step


def _bare(model: Any) -> Callable[[], None]:
    return _step(model, lambda: None)


def _floor(model: Any) -> Callable[[], None]:
    from distopt.backends import current

    flat = torch.zeros(sum(param.numel() for param in model.params))
    return lambda: current().all_reduce(flat).wait()


def _distopt(model: Any) -> Callable[[], None]:
    from distopt.optim import Adam, DistributedOptimizer

    optim, params = DistributedOptimizer(Adam({"lr": 1e-3})), set(model.params)
    return _step(model, lambda: optim(params), lambda: optim.zero_grad(params))


def _pyro_horovod(model: Any) -> Callable[[], None]:
    from pyro.optim import Adam, HorovodOptimizer

    optim, params = HorovodOptimizer(Adam({"lr": 1e-3})), set(model.params)
    return _step(model, lambda: optim(params))


def _ddp(model: Any) -> Callable[[], None]:
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(model, Network):
        wrapped, data = DistributedDataParallel(model.module), model.data
    else:
        wrapped, data = DistributedDataParallel(_Holder(model.params)), None
    optim = torch.optim.Adam(wrapped.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        out = wrapped(data) if data is not None else wrapped()
        out.square().sum().backward()
        optim.step()
        optim.zero_grad()

    return step


class _Holder(torch.nn.Module):
    def __init__(self, params: list[Tensor]) -> None:
        super().__init__()
        self.held = torch.nn.ParameterList([torch.nn.Parameter(param.detach().clone()) for param in params])

    def forward(self) -> Tensor:
        return torch.stack(list(self.held))


def compare(models: Sequence[str]) -> int:
    """Prints the table and the requirements; returns how many of these were missed."""
    rows: list[tuple[str, float, float]] = []
    for model in models:
        times = time_contenders(model)
        bare = [min(pair) for pair in zip(*(times[f"bare backward ({kind})"] for kind in KINDS), strict=True)]
        added = {
            name: statistics.median(each - base for each, base in zip(seconds, bare, strict=True))
            for name, seconds in times.items()
        }
        print(f"\n{model}: bare backward {statistics.median(bare) * 1e3:.2f} ms; what is added to it (whole step), ms")
        for name, seconds in times.items():
            whole = statistics.median(seconds) * 1e3
            if name.startswith("bare all"):
                print(f"  {name:32s} {whole:8.2f}", flush=True)
            elif not name.startswith("bare"):
                print(f"  {name:32s} {added[name] * 1e3:8.2f} ({whole:.2f})", flush=True)
        rows += _requirements(model, times, added)
    workers.close_worlds()
    print()
    for what, ratio, least in rows:
        print(f"{'ok    ' if ratio >= least else 'MISSED'} {ratio:8.2f} (at least {least:.2f})  {what}")
    return sum(ratio < least for _, ratio, least in rows)


def _requirements(
    model: str, times: dict[str, list[float]], added: dict[str, float]
) -> Iterator[tuple[str, float, float]]:
    """Yields what is compared, the ratio found and the least one required."""
    pyros = "pyro HorovodOptimizer"
    if model != BIG:
        for kind, least in zip(("torch_dist", "horovod"), REQUIRED[model], strict=True):
            ratio = added[pyros] / max(added[f"distopt on {kind}"], 1e-6)
            yield f"added, {model}: Pyro / distopt on {kind}", ratio, least
        return
    for kind, other, least in (("torch_dist", "DDP, fused Adam", 1 / 1.05), ("horovod", pyros, 1.0)):
        pairs = zip(times[other], times[f"distopt on {kind}"], strict=True)
        ratio = statistics.median(theirs / ours for theirs, ours in pairs)
        yield f"whole step, big network: {other} / distopt on {kind}", ratio, least


def time_sums(length: int) -> float:
    """Returns the median seconds of a sum of `length` numbers; runs on each rank."""
    from distopt.backends import current

    backend, tensor, seconds = current(), torch.ones(length), []
    for _ in range(max(5, min(500, 10_000_000 // length))):
        began = time.perf_counter()
        backend.sum_buffer(tensor).wait()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def compare_sums() -> None:
    """Prints how long sums take through shared memory and over gloo, in the median of rounds in turns."""
    print("\nbare sums, ms: through shared memory, over gloo, ratio")
    for size in (2, 4):
        for length in (100, 10_000, 1_000_000, 6_500_000):
            times: dict[str, list[float]] = {"torch_dist": [], "torch_dist-network": []}
            for _ in range(5):
                for kind, of_kind in times.items():
                    of_kind.append(max(workers.world(kind, size).run(time_sums, length)))
            shared, network = (1e3 * statistics.median(of_kind) for of_kind in times.values())
            print(
                f"  {size} ranks, {length:9,d} numbers {shared:8.3f} {network:8.3f} {network / shared:6.1f} x",
                flush=True,
            )
    workers.close_worlds()


def main(arguments: list[str]) -> int:
    """Runs the comparison, of all models or those named, or with `scaling` the study of how the cost grows."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # no rank stays stopped
    if arguments[:1] == ["scaling"]:
        from tests.benchmarks import scaling

        scaling.main(arguments[1:])
        return 0
    if arguments == ["sums"]:
        compare_sums()
        return 0
    return compare([MODELS[name] for name in arguments or MODELS])


if __name__ == "__main__":
    # By its own name, so that the ranks find what they are sent.
    from tests.benchmarks import bench_reduce

    bench_reduce.main(sys.argv[1:])
