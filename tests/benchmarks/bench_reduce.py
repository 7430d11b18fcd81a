"""What averaging gradients adds to a training step, against Pyro's HorovodOptimizer, DDP and the bare all-reduce.

`python -m tests.benchmarks.bench_reduce` times two ranks on this machine, in interleaved rounds, and prints medians as
ratios; `... scaling` times the step on 1 to 8 ranks and on hosts made of network namespaces, and fits a model of cost.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests import workers

ROUNDS, BATCH = 8, 3
BIG = "10 M-parameter network"
SIZES = {"10 × 100": 10, "100 × 100": 100, "1000 × 100": 1000}
Times = dict[str, dict[str, list[float]]]  # model -> contender -> seconds of a step, one per round


class Small:
    """Many small parameters in Pyro's store; backward is one multiplication each."""

    def __init__(self, count: int) -> None:
        import pyro

        self.params = [pyro.param(f"p{i}", torch.zeros(100)).unconstrained() for i in range(count)]

    def backward(self) -> None:
        """Leaves a gradient on each parameter."""
        torch.stack(self.params).square().sum().backward()  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        """As SVI does between steps."""
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


def time_contenders(kind: str, model: str) -> dict[str, list[float]]:
    """Runs in each rank: seconds per step of every contender of this backend, by round."""
    import pyro

    from distopt.backends import current

    store = pyro.get_param_store()
    steps, stores = {}, {}
    for name, make in _contenders(kind, model):
        pyro.clear_param_store()
        steps[name] = make()
        stores[name] = store.get_state()
    times: dict[str, list[float]] = {name: [] for name in steps}
    rounds = ROUNDS if model != BIG else 4
    for number in range(rounds + 1):
        for name, step in steps.items():
            # Each contender has parameters of its own, put back before the clock starts.
            store.clear()
            store.set_state(stores[name])
            current().barrier()
            started = time.perf_counter()
            for _ in range(BATCH):
                step()
            if number:  # the first round creates optimizers and connections
                times[name].append((time.perf_counter() - started) / BATCH)
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


def _step(model: Any, finish: Callable[[], None]) -> Callable[[], None]:
    def step() -> None:
        model.backward()
        finish()
        model.clear()

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
    return _step(model, lambda: optim(params))


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


def compare() -> int:
    """Prints the table and the requirements; returns how many of these were missed."""
    models = [*SIZES, BIG]
    times: Times = {}
    for kind in ("horovod", "torch_dist"):
        world = workers.world(kind, 2)
        for model in models:
            told = world.run(time_contenders, kind, model, timeout_s=170)
            for name in told[0]:
                # A step is done when the slower rank is.
                both = [max(pair) for pair in zip(*(each[name] for each in told), strict=True)]
                times.setdefault(model, {})[f"{name} ({kind})" if name.startswith("bare") else name] = both
                print(f"{model:24s} {kind:10s} {name:24s} {statistics.median(both) * 1e3:9.2f} ms", flush=True)
    workers.close_worlds()
    added: dict[str, dict[str, float]] = {}
    whole: dict[str, dict[str, float]] = {}
    for model in models:
        medians = {name: statistics.median(seconds) for name, seconds in times[model].items()}
        base = min(medians["bare backward (torch_dist)"], medians["bare backward (horovod)"])
        print(f"\n{model}: bare backward {base * 1e3:.2f} ms; what is added to it (the whole step), ms")
        whole[model], added[model] = medians, {name: seconds - base for name, seconds in medians.items()}
        for name, seconds in medians.items():
            if name.startswith("bare all"):
                print(f"  {name:32s} {seconds * 1e3:8.2f}")
            elif not name.startswith("bare"):
                print(f"  {name:32s} {added[model][name] * 1e3:8.2f} ({seconds * 1e3:.2f})")
    return _judge(added, whole)


def _judge(added: dict[str, dict[str, float]], whole: dict[str, dict[str, float]]) -> int:
    rows = []
    for (model, least_torch), least_horovod in zip(zip(SIZES, (1.3, 10, 40), strict=True), (1, 4, 4), strict=True):
        each = {name: max(seconds, 1e-6) for name, seconds in added[model].items()}
        pyros = each["pyro HorovodOptimizer"]
        rows.append(
            (f"added, {model}: Pyro / distopt on torch_dist", pyros / each["distopt on torch_dist"], least_torch)
        )
        rows.append((f"added, {model}: Pyro / distopt on horovod", pyros / each["distopt on horovod"], least_horovod))
    big = whole[BIG]
    rows.append(
        (
            "whole step, big network: DDP / distopt on torch_dist",
            big["DDP, fused Adam"] / big["distopt on torch_dist"],
            1 / 1.05,
        )
    )
    rows.append(
        (
            "whole step, big network: Pyro / distopt on horovod",
            big["pyro HorovodOptimizer"] / big["distopt on horovod"],
            1.0,
        )
    )
    missed = 0
    print()
    for what, ratio, least in rows:
        is_met = ratio >= least
        missed += not is_met
        print(f"{'ok    ' if is_met else 'MISSED'} {ratio:8.2f} (at least {least:.2f})  {what}")
    return missed


def main(words: list[str]) -> int:
    """Runs the comparison, or with `scaling` the study of how the cost grows."""
    if words == ["scaling"]:
        from tests.benchmarks import scaling

        scaling.main()
        return 0
    return compare()


if __name__ == "__main__":
    # By its own name, so that the ranks find what they are sent.
    from tests.benchmarks import bench_reduce

    bench_reduce.main(sys.argv[1:])
