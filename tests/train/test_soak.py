"""A long run keeps to its memory, descriptors and threads, in every one of its processes."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.train.runs import ROOT, command, config, environment, steps_logged

MARK = "DISTOPT_SOAK"
NUM_WORKERS = 2


@dataclass(frozen=True)
class Sample:
    """What one process holds at some step."""

    step: int
    kib: int  # private to it: what ends with it
    descriptors: int
    threads: int


def soak(folder: Path, num_steps: int, num_samples: int) -> dict[str, list[Sample]]:
    """Runs two workers with checkpoints and TensorBoard, and samples each process at about equal numbers of steps."""
    path = config(
        folder,
        train={"num_steps": num_steps},
        checkpoint={"every_steps": max(10, num_steps // 300)},
        log={"every_steps": 10, "tensorboard": True},
        launch={"workers": NUM_WORKERS, "max_restarts": 0},
    )
    samples: dict[str, list[Sample]] = defaultdict(list)
    with (folder / "output.txt").open("w") as output:
        launcher = subprocess.Popen(
            command(path), cwd=ROOT, env=environment() | {MARK: str(folder)}, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        due = 0
        while launcher.poll() is None:
            step = max(steps_logged(folder / "run"), default=0)
            if step >= due and step:
                due = step + num_steps // num_samples
                for name, process in family(folder).items():
                    try:
                        with process.oneshot():
                            kib = process.memory_full_info().uss >> 10
                            samples[name].append(Sample(step, kib, process.num_fds(), process.num_threads()))
                    except psutil.Error:
                        continue  # it has just ended
            time.sleep(0.05)
    finally:
        for process in family(folder).values():
            process.kill()
        launcher.kill()
        launcher.wait()
    text = (folder / "output.txt").read_text()
    assert launcher.returncode == 0, text[-3000:]
    assert steps_logged(folder / "run")[-1] == num_steps, text[-3000:]
    return samples


def family(folder: Path) -> dict[str, psutil.Process]:
    """Returns the processes of the run by what they are."""
    running = {}
    for process in psutil.process_iter():
        try:
            environ = process.environ()
            if environ.get(MARK) == str(folder):
                running[role(process.cmdline(), environ)] = process
        except psutil.Error:
            continue
    return running


def role(cmdline: list[str], environ: dict[str, str]) -> str:
    rank = environ.get("RANK")
    if "torch.distributed.run" in cmdline:  # first: it has the supervisor's command among its arguments
        return "torchrun"
    if "distopt.launch.worker.supervisor" in cmdline:
        return f"supervisor of rank {rank}"
    return "launcher" if rank is None else f"rank {rank}"


def growth_kib(samples: list[Sample]) -> float:
    """Returns by how many KiB a process grows in 1,000 steps: Theil and Sen's slope, which single jumps do not move."""
    slopes = [
        (later.kib - earlier.kib) / (later.step - earlier.step)
        for index, earlier in enumerate(samples)
        for later in samples[index + 1 :]
        if later.step > earlier.step
    ]
    return 1000 * statistics.median(slopes)


def check(samples: dict[str, list[Sample]], limit_kib: float) -> None:
    """Every process is flat in the second half of its samples: caches fill and the allocator settles in the first."""
    expected = {
        "launcher",
        "torchrun",
        *(f"{kind}{rank}" for kind in ("rank ", "supervisor of rank ") for rank in (0, 1)),
    }
    assert expected <= samples.keys()
    for name in sorted(expected):
        settled = samples[name][len(samples[name]) // 2 :]
        assert len(settled) >= 8, f"{name}: {samples[name]}"
        growth = growth_kib(settled)
        print(f"{name}: {growth:+.1f} KiB in 1,000 steps, {settled[-1]}", flush=True)
        assert growth < limit_kib, f"{name} grows by {growth:.1f} KiB in 1,000 steps: {settled}"
        # A checkpoint that is being written has a thread and a few open files; the fewest are those between two.
        for what in ("descriptors", "threads"):
            counts = [getattr(sample, what) for sample in settled]
            half = len(counts) // 2
            assert min(counts[half:]) <= min(counts[:half]), f"{name}: {what} rise: {counts}"


# Rank 0 grows by some MiB in its first thousands of steps, while the allocator settles around what TensorBoard and
# checkpoints take for a moment.
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_descriptors_and_threads_of_every_process_settle(tmp_path):
    # Rank 0's allocator still settles, by up to 1.3 MiB in 1,000 steps as measured; a gradient or a trace that is kept
    # of each step is several times as much. The long run has the tight limit.
    check(soak(tmp_path, 1_500, 40), limit_kib=4_000)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_memory_descriptors_and_threads_of_every_process_stay_for_20_000_steps(tmp_path):
    check(soak(tmp_path, 20_000, 200), limit_kib=20)


def test_growth_is_that_of_the_settled_samples_whatever_single_jumps():
    leaking = [Sample(step, 1000 + step // 2, 5, 3) for step in range(0, 1000, 50)]
    assert growth_kib(leaking) == pytest.approx(500, rel=0.05)
    jump = [Sample(step, 1000 + 4096 * (step >= 900), 5, 3) for step in range(0, 1000, 50)]
    assert growth_kib(jump) == 0
