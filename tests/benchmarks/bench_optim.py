"""Times of one optimizer step, as ratios to `pyro.optim` and to one torch optimizer over the same list of tensors.

    python -m tests.benchmarks.bench_optim [--quick] [NAME ...]

One process, one thread, in time of that thread on its processor. Each number is the median over rounds in which the
candidates take turns, so that a slow moment affects all of them. With names, only the rows in whose name one of them
occurs ("5,000", "SGD", "half", "state") are measured.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.optim
import torch

import distopt.optim

# parameters, elements, times pyro.optim, times torch's list
SIZES = [
    (10, 10, 5.0, 1.0),
    (100, 10, 40.0, 3.0),
    (1_000, 10, 100.0, 10.0),
    (5_000, 10, 100.0, 12.0),
    (1_000, 1_000, 20.0, 3.0),
    (100, 100_000, 2.0, 0.9),
]


class ClippedList:
    """What torch has for ClippedAdam: the gradients clipped by value, then fused Adam."""

    def __init__(self, params: list[torch.Tensor]) -> None:
        self._params, self._adam = params, torch.optim.Adam(params, fused=True)

    def step(self) -> None:
        """Takes one step."""
        torch.nn.utils.clip_grad_value_(self._params, 10.0)
        self._adam.step()


# name, arguments, the quickest that torch has over a list: of the same kind, or the nearest where it has none
OPTIMIZERS: list[tuple[str, dict[str, Any], Callable[[list[torch.Tensor]], Any]]] = [
    ("Adam", {"lr": 1e-3}, lambda ps: torch.optim.Adam(ps, fused=True)),
    ("AdamW", {"lr": 1e-3}, lambda ps: torch.optim.AdamW(ps, fused=True)),
    ("SGD", {"lr": 1e-3, "momentum": 0.9}, lambda ps: torch.optim.SGD(ps, lr=1e-3, momentum=0.9, fused=True)),
    ("ClippedAdam", {"lr": 1e-3}, lambda ps: ClippedList(ps)),
    ("AdagradRMSProp", {"eta": 1e-3}, lambda ps: torch.optim.Adagrad(ps, fused=True)),
    ("RMSprop", {"lr": 1e-3}, lambda ps: torch.optim.RMSprop(ps, foreach=True)),
]


@dataclass(frozen=True)
class Row:
    """One measured ratio and what it must be."""

    what: str
    against: str
    ratio: float
    needed: float
    ours_us: float

    def __str__(self) -> str:
        verdict = "ok" if self.ratio >= self.needed else "MISSED"
        needed, us = f"needed {self.needed:6.1f}", f"({self.ours_us:,.0f} us)"
        return f"{self.what:<44} {self.ratio:8.1f} x {self.against:<12} {needed}  {verdict:<6} {us}"


def _params(prefix: str, count: int, numel: int) -> list[torch.Tensor]:
    for i in range(count):
        pyro.param(f"{prefix}.{i}", torch.randn(numel))
    store = dict(pyro.get_param_store().named_parameters())
    params = [store[f"{prefix}.{i}"] for i in range(count)]
    for p in params:
        p.grad = torch.randn(numel)
    return params


def interleaved(candidates: dict[str, Callable[[], Any]], seconds: float = 1.0, rounds: int = 7) -> dict[str, float]:
    """Returns the median time of each candidate in seconds; the rounds of all together take about `seconds`."""
    once = {}
    for name, run in candidates.items():
        run()
        run()
        start = time.thread_time()
        run()
        once[name] = max(time.thread_time() - start, 1e-6)
    share = seconds / len(candidates) / rounds
    times: dict[str, list[float]] = {name: [] for name in candidates}
    gc.disable()
    try:
        for _ in range(rounds):
            for name, run in candidates.items():
                n = max(3, min(200, round(share / once[name])))
                start = time.thread_time()
                for _ in range(n):
                    run()
                times[name].append((time.thread_time() - start) / n)
    finally:
        gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}


def steps(quick: bool, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """The table of steps in the steady state."""
    for count, numel, over_pyro, over_list in SIZES:
        for name, args, torch_list in OPTIMIZERS:
            what = f"{name} {count:,} x {numel:,}"
            if not wanted(what):
                continue
            pyro.clear_param_store()
            theirs, mine, listed = (_params(prefix, count, numel) for prefix in "abc")
            pyro_optim, optim = getattr(pyro.optim, name)(dict(args)), getattr(distopt.optim, name)(dict(args))
            optimizer = torch_list(listed)
            sets = set(theirs), set(mine)
            medians = interleaved(
                {
                    "pyro": lambda o=pyro_optim, s=sets[0]: o(s),
                    "ours": lambda o=optim, s=sets[1]: o(s),
                    "list": optimizer.step,
                },
                seconds=0.4 if quick else 2.0,
            )
            us = 1e6 * medians["ours"]
            yield Row(what, "pyro.optim", medians["pyro"] / medians["ours"], over_pyro, us)
            yield Row(what, "torch's list", medians["list"] / medians["ours"], over_list, us)


def coming_and_going(quick: bool, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """A different half of the parameters is touched in each step."""
    count, numel = 1_000, 10
    more = [("ClippedAdam", {"lr": 1e-3, "lrd": 0.999}, "ClippedAdam with lrd"), ("DCTAdam", {"lr": 1e-3}, "DCTAdam")]
    for name, args, label in [(name, args, name) for name, args, _ in OPTIMIZERS] + more:
        what = f"{label} half of 1,000 x 10"
        if not wanted(what):
            continue
        pyro.clear_param_store()
        candidates = {}
        for prefix, module in (("pyro", pyro.optim), ("ours", distopt.optim)):
            params, optim = _params(prefix, count, numel), getattr(module, name)(dict(args))
            generator = torch.Generator().manual_seed(0)
            halves = [[params[i] for i in torch.randperm(count, generator=generator)[: count // 2]] for _ in range(64)]
            turn = iter(range(1_000_000))
            candidates[prefix] = lambda o=optim, h=halves, t=turn: o(h[next(t) % 64])
        for _ in range(5 if quick else 70):
            candidates["ours"]()
        medians = interleaved(candidates, seconds=0.5 if quick else 2.0)
        yield Row(what, "pyro.optim", medians["pyro"] / medians["ours"], 5.0, 1e6 * medians["ours"])


def state_and_schedule(quick: bool) -> Iterator[Row]:
    """State by name and in columns, `set_state` with the step that uses it, and `PyroLRScheduler.step`."""
    pyro.clear_param_store()
    optims, params, states = {}, {}, {}
    for prefix, module in (("pyro", pyro.optim), ("ours", distopt.optim)):
        params[prefix], optims[prefix] = _params(prefix, 1_000, 10), module.Adam({"lr": 1e-3})
        optims[prefix](params[prefix])
        states[prefix] = optims[prefix].get_state()
    seconds = 0.5 if quick else 2.0
    medians = interleaved({k: o.get_state for k, o in optims.items()}, seconds)
    yield Row("get_state of 1,000", "pyro.optim", medians["pyro"] / medians["ours"], 1.0, 1e6 * medians["ours"])

    # Pyro has no state in columns; what a checkpoint would otherwise start from is its get_state.
    medians = interleaved({"pyro": optims["pyro"].get_state, "ours": optims["ours"].packed_state}, seconds)
    yield Row("packed_state of 1,000", "get_state", medians["pyro"] / medians["ours"], 10.0, 1e6 * medians["ours"])

    def resume(prefix: str, module: Any) -> None:
        optim = module.Adam({"lr": 1e-3})
        optim.set_state(states[prefix])
        optim(params[prefix])

    medians = interleaved(
        {"pyro": lambda: resume("pyro", pyro.optim), "ours": lambda: resume("ours", distopt.optim)}, seconds
    )
    yield Row(
        "set_state and first step of 1,000", "pyro.optim", medians["pyro"] / medians["ours"], 1.0, 1e6 * medians["ours"]
    )
    for prefix, module in (("pyro", pyro.optim), ("ours", distopt.optim)):
        args = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-3}, "gamma": 0.9999}
        optims[prefix] = module.ExponentialLR(args)
        optims[prefix](params[prefix])
    medians = interleaved({k: o.step for k, o in optims.items()}, seconds)
    yield Row("scheduler step of 1,000", "pyro.optim", medians["pyro"] / medians["ours"], 100.0, 1e6 * medians["ours"])


def rows(quick: bool = False, names: Sequence[str] = ()) -> Iterable[Row]:
    """Measures and yields every row, or those in whose name one of `names` occurs."""

    def wanted(what: str) -> bool:
        return not names or any(name in what for name in names)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from steps(quick, wanted)
        yield from coming_and_going(quick, wanted)
        if wanted("state and schedule of 1,000"):
            yield from state_and_schedule(quick)
    finally:
        pyro.clear_param_store()
        torch.set_num_threads(threads)


def main(argv: list[str] | None = None) -> None:
    """Prints every row as it is measured."""
    argv = sys.argv[1:] if argv is None else argv
    missed = 0
    for row in rows("--quick" in argv, [name for name in argv if not name.startswith("--")]):
        missed += row.ratio < row.needed
        print(row, flush=True)
    print(f"{missed} missed")


if __name__ == "__main__":
    main()
