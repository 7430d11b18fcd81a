"""Times of one whole gradient step: losses, gradients and Adam, as ratios to NumPyro's.

    python -m tests.benchmarks.bench_step [--quick] [WORD ...]

Every candidate is a process of its own on one and the same core, since NumPyro takes two otherwise; they take turns,
and each number is the median over rounds of the process's time on the processor. With words, only the workloads that
have one of them in their name are measured. Where NumPyro is not installed, ratios are to Pyro.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

CANDIDATES = ("numpyro", "pyro", "pyro jit", "distopt", "distopt graph", "distopt compiled")
WORKLOADS = ("flights", "51 sites", "vae", "plate", "flights 131,072", "eight schools", "baseball")

# By workload: compiled steps over NumPyro at most.
COMPILED_TARGETS = {"flights": 1.0, "51 sites": 1.0, "vae": 1.0, "plate": 0.45, "flights 131,072": 1.2}

# By workload: graph mode over NumPyro at most, eager over graph mode at least.
TARGETS = {"flights": (2.4, 8.0), "51 sites": (1.6, 18.0), "vae": (1.1, None), "plate": (0.8, None)}

# Peak memory of a process in graph mode over one with eager steps at most, imports, data and parameters included.
MOST_MEMORY = 1.2

# Seconds of recording twice, passes and guards for 1,000 recorded operations at most, first imports aside.
MOST_RECORDING = 0.25

ROOT = Path(__file__).parents[2]


def numpyro_steps(workload: str) -> Callable[[int], float]:
    """Returns a function that takes steps with NumPyro, compiled, and returns the last loss."""
    import jax
    import numpyro

    from tests.benchmarks.step_models_numpyro import WORKLOADS

    model, guide, batches, lr = WORKLOADS[workload]()
    svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(lr), numpyro.infer.Trace_ELBO())
    state = [svi.init(jax.random.PRNGKey(0), *batches[0])]
    update = jax.jit(svi.update)

    def steps(count: int) -> float:
        loss = 0.0
        for i in range(count):
            state[0], value = update(state[0], *batches[i % len(batches)])
            loss = float(value)
        return loss

    return steps


def pyro_steps(workload: str, candidate: str) -> Callable[[int], float]:
    """Returns a function that takes steps with Pyro, alone or through distopt, and returns the last loss."""
    import pyro
    import torch

    from distopt import optim
    from distopt.infer import SVI
    from tests.benchmarks.step_models import WORKLOADS

    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    model, guide, batches, lr = WORKLOADS[workload]()
    svi: pyro.infer.SVI
    if candidate.startswith("pyro"):
        elbo = pyro.infer.JitTrace_ELBO if candidate == "pyro jit" else pyro.infer.Trace_ELBO
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": lr}), elbo(ignore_jit_warnings=True))
    else:
        capture: Any = candidate.removeprefix("distopt").strip() or "off"
        distributed = optim.DistributedOptimizer(optim.Adam({"lr": lr}))
        svi = SVI(model, guide, distributed, pyro.infer.Trace_ELBO(), capture=capture)

    def steps(count: int) -> float:
        return [svi.step(*batches[i % len(batches)]) for i in range(count)][-1]

    return steps


def work(workload: str, candidate: str) -> None:
    """Takes as many steps as each line of the standard input says, and prints the seconds that they took.

    The line "peak" asks for the most memory that the process has had, in bytes.
    """
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    steps = numpyro_steps(workload) if candidate == "numpyro" else pyro_steps(workload, candidate)
    steps(70)  # compiled, recorded, and beyond the steps that are recorded again for comparison
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "peak":
            print(1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]), flush=True)
            continue
        start = time.process_time()
        steps(int(line))
        print(time.process_time() - start, flush=True)


def record(workload: str) -> None:
    """Prints the operations of a step, and the seconds that it takes to record it beyond those of eager steps."""
    import pyro
    import torch

    from distopt.infer.capture.step import StepCapture
    from tests.benchmarks.step_models import WORKLOADS

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    model, guide, batches, _ = WORKLOADS[workload]()
    elbo = pyro.infer.Trace_ELBO()
    costs = []
    for _ in range(4):  # the first one imports
        capture, num_steps, began = StepCapture(elbo.loss_and_grads), 0, time.process_time()
        while not capture.num_captured and capture.refusal is None:
            capture(model, guide, *batches[0])
            num_steps += 1
        seconds, began = time.process_time() - began, time.process_time()
        for _ in range(num_steps):
            elbo.loss_and_grads(model, guide, *batches[0])
        costs.append(seconds - (time.process_time() - began))
    programs = [each for variant in capture._variants.values() for each in variant.captured]
    print(len(programs[0].recording.ops), statistics.median(costs[1:]))


class Worker:
    """A candidate's process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def read(self) -> str:
        """Returns the next line that the process prints."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the candidate's process has ended with status {self._process.wait()}.")
        return line.strip()

    def time(self, count: int) -> float:
        """Returns the seconds that a step takes, in the mean over `count` steps."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        return float(self.read()) / count

    def peak(self) -> int:
        """Returns the most memory that the process has had, in bytes."""
        assert self._process.stdin is not None
        self._process.stdin.write("peak\n")
        self._process.stdin.flush()
        return int(self.read())


@contextmanager
def started(workload: str, candidate: str) -> Iterator[Worker]:
    """Starts a candidate, and ends its process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.bench_step", "--work", workload, candidate]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Worker(process)
        finally:
            process.terminate()


def measure(workload: str, candidates: Sequence[str], seconds: float) -> tuple[dict[str, float], dict[str, int]]:
    """Returns the median time of a step of each candidate, in seconds, and its peak memory, in bytes."""
    with ExitStack() as stack:
        workers = {name: stack.enter_context(started(workload, name)) for name in candidates}
        for worker in workers.values():
            while worker.read() != "ready":
                pass
        counts = {name: max(2, int(0.05 / worker.time(2))) for name, worker in workers.items()}

        times: dict[str, list[float]] = {name: [] for name in workers}
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(times[candidates[0]]) < 5:
            for name, worker in workers.items():
                times[name].append(worker.time(counts[name]))
        peaks = {name: worker.peak() for name, worker in workers.items()}
    return {name: statistics.median(values) for name, values in times.items()}, peaks


def report(workload: str, medians: dict[str, float], peaks: dict[str, int]) -> bool:
    """Prints a workload's rows; returns whether its targets are met."""
    reference = next(iter(medians))
    for name, median in medians.items():
        ratio = f"{median / medians[reference]:8.2f} x {reference}"
        print(f"{workload:16s} {name:16s} {1e3 * median:9.3f} ms {ratio}, peak {peaks[name] / 2**20:6.0f} MiB")
    met = peaks["distopt graph"] <= MOST_MEMORY * peaks["distopt"]
    at_most, at_least = TARGETS.get(workload, (None, None))
    if reference == "numpyro" and at_most is not None:
        met = met and medians["distopt graph"] <= at_most * medians["numpyro"]
    if reference == "numpyro" and workload in COMPILED_TARGETS:
        met = met and medians["distopt compiled"] <= COMPILED_TARGETS[workload] * medians["numpyro"]
    if at_least is not None:
        met = met and medians["distopt"] >= at_least * medians["distopt graph"]
    if not met:
        print(
            f"{workload:16s} misses its target: at most {at_most} x numpyro, {at_least} x quicker than eager, "
            f"compiled at most {COMPILED_TARGETS.get(workload)} x numpyro, peak of graph at most {MOST_MEMORY} x eager"
        )
    return met


def report_recording(workload: str) -> bool:
    """Prints what recording costs; returns whether it is as little as it should be."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.bench_step", "--record", workload]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    num_operations, seconds = map(float, done.stdout.split())
    per_thousand = 1000 * seconds / num_operations
    print(
        f"{workload:16s} recording {num_operations:.0f} operations: {per_thousand:.3f} s for 1,000, at most "
        f"{MOST_RECORDING}: {'met' if per_thousand <= MOST_RECORDING else 'NOT met'}",
        flush=True,
    )
    return per_thousand <= MOST_RECORDING


def main(arguments: list[str]) -> int:
    """Measures the workloads; returns how many miss their targets."""
    names = [argument for argument in arguments if argument != "--quick"]
    has_numpyro = importlib.util.find_spec("numpyro") is not None
    candidates = CANDIDATES if has_numpyro else CANDIDATES[1:]
    missed = 0
    for workload in WORKLOADS:
        if names and not any(substring in workload for substring in names):
            continue
        are_met = report(workload, *measure(workload, candidates, 5.0 if "--quick" in arguments else 30.0))
        missed += not (report_recording(workload) and are_met)
    return missed


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
    elif sys.argv[1:2] == ["--record"]:
        record(sys.argv[2])
    else:
        sys.exit(main(sys.argv[1:]))
