"""A real run of two workers, killed at random moments, ends equal to the undisturbed one; and deaths around a save."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import psutil
import pyro
import pytest
import torch

from distopt.backends import init
from distopt.backends.single import Single
from distopt.checkpoint import Checkpointer
from distopt.checkpoint.pyro_files import read_replicated
from distopt.data import GlobalBatches
from tests import workers
from tests.checkpoint.states import assert_equal
from tests.checkpoint.tasks import Dying
from tests.train.runs import ROOT, command, config, environment, launch, launch_well, steps_logged
from tests.train.tasks import NUM_ROWS

EVERY, BATCH, SEED = 10, 100, 1
LIFE_S = 120
NUM_FIRST_READS = 3  # one makes the parameters, two of other sizes show the plates of the model


def run_config(folder, num_steps, task="LoggedLine"):
    """A run with a schedule, whose checkpoints hold all there is to compare."""
    folder.mkdir()
    return config(
        folder,
        task=f"tests.checkpoint.tasks:{task}",
        task_args={"folder": str(folder)},
        seed=SEED,
        train={"num_steps": num_steps},
        data={"global_batch": BATCH},
        optim={"name": "Adam", "args": {"lr": 0.05}, "scheduler": {"name": "ExponentialLR", "args": {"gamma": 0.999}}},
        checkpoint={"every_steps": EVERY},
        launch={"workers": 2, "max_restarts": 1000},
    )


def lives(folder):
    """Returns the batches of each process by (rank, pid), the oldest first; a line may still be half written."""
    observed = {}
    for path in sorted(folder.glob("batches-*.jsonl"), key=lambda path: path.stat().st_mtime_ns):
        _, rank, pid = path.stem.split("-")
        lines = path.read_text().split("\n")[:-1]
        observed[int(rank), int(pid)] = [json.loads(line) for line in lines]
    return observed


def wait_for_life(folder, known, num_batches, run):
    """Returns the pids by rank once both ranks have new processes, one of which has read so many batches.

    None when the run has ended before.
    """
    deadline = time.monotonic() + LIFE_S
    while run.poll() is None:
        assert time.monotonic() < deadline, f"no new life in {LIFE_S} s"
        fresh = {key: len(batches) for key, batches in lives(folder).items() if key not in known}
        if {rank for rank, _ in fresh} == {0, 1} and max(fresh.values()) >= num_batches:
            return dict(fresh.keys())
        time.sleep(0.001)
    return None


def start(path):
    log = (path.parent / "log.txt").open("a")
    with log:
        return subprocess.Popen(command(path), cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT)


def kill_at_random(folder, path, kills):
    """Ends a worker, or one time in eight the launcher, `kills` times; starts what is not started again by itself."""
    chance, killed, known = random.Random(kills), [], set()
    run = start(path)
    try:
        while len(killed) < kills:
            pids = wait_for_life(folder, known, chance.randint(1, 45), run)
            assert pids is not None, f"it ended after {len(killed)} kills: {(folder / 'log.txt').read_text()[-3000:]}"
            known = set(lives(folder))
            victim = chance.choice([0, 0, 0, 0, 1, 1, 1, "launcher"])
            family = psutil.Process(run.pid).children(recursive=True)
            os.kill(run.pid if victim == "launcher" else pids[victim], signal.SIGKILL)
            killed.append(victim)
            if victim == "launcher":
                run.wait(10)
                _, alive = psutil.wait_procs(family, timeout=30)
                assert not alive, f"the launcher died, and these live on: {alive}"
                run = start(path)
        assert run.wait(LIFE_S) == 0, (folder / "log.txt").read_text()[-3000:]
    finally:
        for process in psutil.Process(run.pid).children(recursive=True) if run.poll() is None else []:
            process.kill()
        run.kill()
        run.wait()
    return killed


def check_rows(folder, num_steps):
    """Each life reads the batches that follow its checkpoint, and each row comes once an epoch."""
    of_rank = [GlobalBatches(NUM_ROWS, BATCH, SEED, rank, 2) for rank in (0, 1)]
    expected = [[batches.rows(t).tolist() for t in range(num_steps)] for batches in of_rank]
    epoch = [row for t in range(NUM_ROWS // BATCH) for rank in (0, 1) for row in expected[rank][t]]
    assert sorted(epoch) == list(range(NUM_ROWS))
    reached = {0: 0, 1: 0}
    for (rank, _), read in lives(folder).items():
        batches = read[NUM_FIRST_READS:]
        if batches:
            first = expected[rank].index(batches[0])
            assert first % EVERY == 0
            assert batches == expected[rank][first : first + len(batches)]
            # What is lost is the interval, and one more if the save at its beginning was still under way.
            assert first > reached[rank] - 2 * EVERY - 1, (
                f"rank {rank} had come to {reached[rank]}, and began at {first}"
            )
            reached[rank] = max(reached[rank], first + len(batches))
    assert reached == {0: num_steps, 1: num_steps}


def newest(run_dir):
    return max((run_dir / "checkpoints").glob("step-*"))


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_run_of_two_workers_when_killed_at_random_ends_equal_to_the_undisturbed_one(kills, tmp_path):
    num_steps = 45 * kills + 100
    whole, hit = tmp_path / "whole", tmp_path / "hit"
    launch_well(run_config(whole, num_steps))
    killed = kill_at_random(hit, run_config(hit, num_steps), kills)
    assert len(killed) == kills
    check_equal(hit, whole, num_steps)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_run_of_two_workers_when_a_rank_is_killed_in_each_phase_ends_equal_to_the_undisturbed_one(tmp_path):
    num_steps = 200
    whole, hit = tmp_path / "whole", tmp_path / "hit"
    launch_well(run_config(whole, num_steps))
    done = launch(run_config(hit, num_steps, "Dying"), timeout=1100)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert output.count("was killed (SIGKILL)") >= 2 * len(Dying.PHASES), output
    check_equal(hit, whole, num_steps)


def check_equal(hit, whole, num_steps):
    """Two runs ended with equal parameters, optimizer, schedule and noise, the same log, and nothing left over."""
    one, other = newest(hit / "run"), newest(whole / "run")
    assert one.name == other.name == f"step-{num_steps:08d}"
    assert_equal(read_replicated(one), read_replicated(other))
    for rank in (0, 1):
        name = f"rank-{rank:05d}.json.gz"
        assert (one / name).read_bytes() == (other / name).read_bytes()
    assert steps_logged(hit / "run") == steps_logged(whole / "run")
    check_rows(hit, num_steps)
    left = {path.name for path in one.parent.iterdir() if not path.name.startswith("step-")}
    assert left == {".lock"}, f"leftovers: {left}"


def save_twice(directory, point):
    """One rank's body: a good save, then one that meets the failpoint."""
    backend = init(workers.backend_name())
    pyro.param("x", torch.zeros(3))
    with Checkpointer(directory, backend=backend, timeout=timedelta(seconds=5)) as keeper:
        keeper.save(1)
        keeper.wait()
        backend.barrier()
        os.environ["DISTOPT_FAILPOINT"] = point
        with torch.no_grad():
            pyro.param("x").unconstrained().fill_(2.0)
        keeper.save(2)
        keeper.wait()


@pytest.mark.slow
@pytest.mark.parametrize("action", ["kill", "raise"])
def test_run_when_a_rank_is_lost_between_copy_and_write_ends_on_all_ranks_and_the_last_good_one_stands(
    action, tmp_path
):
    cases = [(point, rank) for point in ("after_snapshot", "after_agreement") for rank in (0, 1)]

    def attack(case):
        point, rank = case
        directory = tmp_path / f"{point}-{rank}"
        return workers.run_script("torch_dist", 2, save_twice, str(directory), f"{point}:rank{rank}:{action}")

    with ThreadPoolExecutor(2) as pool:
        ended = dict(zip(cases, pool.map(attack, cases), strict=True))
    for (point, rank), (statuses, started) in ended.items():
        assert None not in statuses, f"{point} on rank {rank}: a rank hangs\n{started.output()}"
        assert 0 not in statuses, f"{point} on rank {rank}: {statuses}\n{started.output()}"
        assert statuses[rank] == (-signal.SIGKILL if action == "kill" else 1)
        pyro.clear_param_store()
        with Checkpointer(tmp_path / f"{point}-{rank}", backend=Single()) as keeper:
            assert keeper.restore().step == 1
            assert pyro.param("x").sum() == 0
            keeper.save(2)
            keeper.wait()
            assert keeper.steps() == [1, 2]
