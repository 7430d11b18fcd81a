"""Seconds until held-out flights are predicted as well as at the end of the shipped run: distopt, Pyro, NumPyro.

    python -m tests.benchmarks.bench_score [--quick]

All take the steps of configs/flights.yaml: all rows in each, the same optimizer, schedule and guide. Each worker has
one core and one thread, and candidates run one after the other. The score is the mean log density of the delays of
32,735 flights that nobody trains on, at the posterior medians. What counts is the clock of the steps, compilation
included; scores are computed between them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.bench_workers import environments

ROOT = Path(__file__).parents[2]
CANDIDATES = {"Pyro": 1, "NumPyro": 1, "distopt, 1 worker": 1, "distopt, 2 workers": 2}
NUM_STEPS, EVERY, SEED = 1_000, 10, 1
RATE, DECAY = 0.1, 0.995
TOLERANCE = 0.001
"""How far below Pyro's last score, in nats a flight, one is as good."""

Steps = Callable[[int, int], None]
Medians = Callable[[], Mapping[str, Any]]


def score(task: Any, medians: Mapping[str, Any]) -> float:
    """Returns the mean log density of the held-out delays at these values of the latent variables."""
    import scipy.stats

    codes = {name: values[task.held_out] for name, values in task.data.codes.items()}

    def deviations(name: str) -> np.ndarray:
        group = name.removesuffix("_spread")
        effects = np.asarray(medians[name], float)
        centred = effects if name == "aircraft" else effects - task.shares[group].numpy() @ effects
        return np.asarray(centred[codes[group]])

    location = float(medians["mu"]) + sum(map(deviations, ("carrier", "destination", "aircraft", "hour", "month")))
    spread = float(medians["sigma"]) * np.exp(deviations("hour_spread"))
    delays = task.data.delay[task.held_out]
    return float(scipy.stats.t.logpdf(delays, float(medians["nu"]), location, spread).mean())


# A candidate's part: what takes steps, and what it then believes.


def with_numpyro(task: Any) -> tuple[Steps, Medians]:
    """The steps compiled, with the data on the device from the first one on."""
    import jax
    import jax.numpy as jnp
    import numpyro

    from tests.benchmarks.step_models_numpyro import flights

    model, guide, example, _ = flights(task.rows())
    optim = numpyro.optim.ClippedAdam(lambda step: RATE * DECAY**step)
    svi = numpyro.infer.SVI(model, guide, optim, numpyro.infer.Trace_ELBO())
    columns = [jnp.asarray(column.numpy()) for column in task.columns()]
    update = jax.jit(svi.update)
    state = svi.init(jax.random.PRNGKey(SEED), *example[0])

    def steps(first: int, last: int) -> None:
        nonlocal state
        for _ in range(first, last):
            state, loss = update(state, *columns)
        loss.block_until_ready()

    return steps, lambda: guide.median(svi.get_params(state))


def with_pyro(task: Any) -> tuple[Steps, Medians]:
    """Pyro alone, as its examples do."""
    import pyro

    clipped_adam = pyro.optim.clipped_adam.ClippedAdam
    schedule = pyro.optim.ExponentialLR({"optimizer": clipped_adam, "optim_args": {"lr": RATE}, "gamma": DECAY})
    svi = pyro.infer.SVI(task.model, task.guide, schedule, pyro.infer.Trace_ELBO())
    data = task.batch(np.arange(task.rows()))

    def steps(first: int, last: int) -> None:
        for _ in range(first, last):
            svi.step(*data)
            schedule.step()

    return steps, lambda: {name: value.detach().numpy() for name, value in task.guide.median().items()}


def with_distopt(task: Any) -> tuple[Steps, Medians]:
    """As a run from the YAML computes."""
    import pyro

    import distopt
    from distopt.data import GlobalBatches, Loader
    from distopt.infer import SVI
    from distopt.optim import DistributedOptimizer, ExponentialLR
    from distopt.optim.clipped_adam import ClippedAdam
    from distopt.train.task import TaskRows

    worker = distopt.init("torch_dist")
    optim = DistributedOptimizer(ExponentialLR({"optimizer": ClippedAdam, "optim_args": {"lr": RATE}, "gamma": DECAY}))
    batches = GlobalBatches(task.rows(), None, SEED, worker.rank, worker.world_size)
    svi = SVI(task.model, task.guide, optim, pyro.infer.Trace_ELBO(), weight=batches.weight, capture="auto")
    loader = Loader(TaskRows(task), batches)

    def steps(first: int, last: int) -> None:
        for step in range(first, last):
            svi.step_with(loader.batch(step))
            optim.step()

    return steps, lambda: {name: value.detach().numpy() for name, value in task.guide.median().items()}


def work(candidate: str) -> None:
    """Trains, and prints a line for each score: the step, the seconds of all steps so far, the score."""
    import pyro
    import torch

    from distopt.examples.flights import Flights

    rank = int(os.environ["RANK"])
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    pyro.set_rng_seed(SEED)
    task = Flights()
    makers = {"Pyro": with_pyro, "NumPyro": with_numpyro}
    steps, medians = makers.get(candidate, with_distopt)(task)
    seconds = 0.0
    for first in range(0, NUM_STEPS, EVERY):
        began = time.perf_counter()
        steps(first, first + EVERY)
        seconds += time.perf_counter() - began
        if rank == 0:
            print(json.dumps([first + EVERY, seconds, score(task, medians())]), flush=True)


# The comparison.


def train(candidate: str) -> list[tuple[int, float, float]]:
    """Runs a candidate and returns its steps, seconds and scores."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.bench_score", "--work", candidate]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env=each | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True)
        for each in environments(CANDIDATES[candidate])
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"{candidate} failed")
    return [tuple(json.loads(line)) for line in outputs[0].splitlines()]


def reached(scores: list[tuple[int, float, float]], aim: float) -> tuple[int, float]:
    """Returns the step and the seconds from which on all scores are as good."""
    later = 0
    for number, (_, _, value) in enumerate(scores):
        if value < aim:
            later = number + 1
    if later == len(scores):
        return scores[-1][0], float("nan")
    return scores[later][:2]


def main(arguments: list[str]) -> int:
    """Prints the table: for each candidate, medians over rounds."""
    rounds = [{each: train(each) for each in CANDIDATES} for _ in range(1 if "--quick" in arguments else 3)]
    aim = min(each["Pyro"][-1][2] for each in rounds) - TOLERANCE
    print(f"score aimed at: {aim:.4f} nats a flight")
    print("| | last score | steps to the score | seconds of these | seconds of all steps |\n|---|---|---|---|---|")
    for candidate in CANDIDATES:
        runs = [each[candidate] for each in rounds]
        steps, seconds = zip(*(reached(run, aim) for run in runs), strict=True)
        last, whole = (statistics.median(run[-1][column] for run in runs) for column in (2, 1))
        median = statistics.median(seconds)
        print(f"| {candidate} | {last:.4f} | {statistics.median(steps):,.0f} | {median:.1f} | {whole:.1f} |")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2])
    else:
        sys.exit(main(sys.argv[1:]))
