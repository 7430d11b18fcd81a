"""Runs of which one rank really dies, in every way and by every launcher: the report names it and its cause."""

from __future__ import annotations

import re
import shutil
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest

from tests.launch import order_task

# How a rank dies, where, and how the report describes it.
DEATHS = {
    ("raise", "constructor"): "failed at .*ValueError: the culprit",
    ("raise", "model"): "failed at .*ValueError: the culprit",
    ("raise", "guide"): "failed at .*ValueError: the culprit",
    ("raise", "batch"): "failed at .*ValueError: the culprit",
    ("raise", "report"): "failed at .*ValueError: the culprit",
    ("memory", "batch"): "failed at .*(MemoryError|can't allocate memory)",
    ("exit 0", "batch"): "(exited after step|ended with exit status 0)",
    ("_exit 0", "model"): "(exited after step|ended with exit status 0)",
    ("exit 3", "model"): "(ended with exit status 3|exited after step|failed at step 2: SystemExit: 3)",
    ("_exit 7", "batch"): "ended with exit status 7",
    ("SIGKILL", "batch"): "was killed",
    ("SIGSEGV", "model"): "died of SIGSEGV",
    ("abort", "guide"): "died of SIGABRT",
}
LAUNCHERS = ("torchrun", "horovodrun", "mpirun")
IN_CI = {  # one of each mechanism: recorded by the worker, seen by its supervisor, seen by the others
    ("torchrun", ("raise", "guide"), 1),
    ("torchrun", ("_exit 0", "model"), 0),
    ("horovodrun", ("SIGSEGV", "model"), 0),
    ("mpirun", ("memory", "batch"), 1),
}


def cases():
    for launcher, death, who in product(LAUNCHERS, DEATHS, (0, 1)):
        if death[1] == "report" and who:
            continue  # rank 0 writes it
        marks = () if (launcher, death, who) in IN_CI else (pytest.mark.slow,)
        yield pytest.param(launcher, *death, who, marks=marks, id=f"{launcher}-{'-'.join(death)}-{who}")


def write_run(folder: Path, how: str, where: str, who: int) -> None:
    config = order_task.CONFIG.replace("order_task:Order", "tests.launch.dying_task:Dying")
    config = config.replace("task: ", "name: run\ntask: ")
    (folder / "run.yaml").write_text(
        f"{config}task_args: {{how: {how}, where: {where}, who: {who}}}\ntrain: {{num_steps: 9}}\n"
        "reduce: {timeout_s: 60}\nlaunch: {workers: 2, max_restarts: 0}\n"
    )
    shutil.copy(order_task.__file__, folder)


def assert_named(run, how: str, where: str, who: int) -> None:
    assert run.wait() == 1, run.everything()
    report = run.err[run.err.index("the run failed") :]
    pattern = rf"rank {who} on \S+ died first: it {DEATHS[how, where]}"
    assert re.search(pattern, report.splitlines()[1]), report
    assert f"rank {1 - who} on" not in report.splitlines()[1], report


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("launcher", "how", "where", "who"), list(cases()))
def test_rank_that_dies_is_named_with_its_cause(launcher, how, where, who, start, tmp_path):
    needed = {"horovodrun": "horovod", "mpirun": "mpi4py"}.get(launcher)
    if needed and find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed (make setup-dev)")
    write_run(tmp_path, how, where, who)
    root = str(Path(__file__).parents[2])
    run = start(f"launch.platform={launcher}", env={"PYTHONPATH": root})
    assert_named(run, how, where, who)
    assert run.processes() == []


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("launcher", "who"),
    [("torchrun", 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in product(LAUNCHERS, (0, 1)))],
)
def test_rank_whose_supervisor_alone_is_killed_is_named(launcher, who, start, tmp_path):
    needed = {"horovodrun": "horovod", "mpirun": "mpi4py"}.get(launcher)
    if needed and find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed (make setup-dev)")
    write_run(tmp_path, "supervisor", "batch", who)
    run = start(f"launch.platform={launcher}", env={"PYTHONPATH": str(Path(__file__).parents[2])})
    assert run.wait() == 1, run.everything()
    report = run.err[run.err.index("the run failed") :]
    first = report.splitlines()[1]
    if launcher == "mpirun":  # it kills all supervisors at once, and knows itself which one was the first
        assert re.search(rf"process rank {who} with PID \d+ on node \S+ exited on\s+signal 9", report), report
        return
    assert re.search(rf"No exit status from rank {who} on \S+: its supervisor was killed", first), first
    assert f"rank {1 - who} on" not in first
    assert run.processes() == []


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("how", "where", "who"), [(*death, who) for death in DEATHS for who in (0, 1)])
def test_rank_that_dies_under_slurm_is_named_with_its_cause(how, where, who, cluster, start, tmp_path):
    if where == "report" and who:
        pytest.skip("rank 0 writes the report")
    write_run(tmp_path, how, where, who)
    root = str(Path(__file__).parents[2])
    run = start(
        "launch.platform=slurm", "launch.nodes=2", "launch.workers=1",
        env={**cluster.env, "PYTHONPATH": root}, prefix=cluster.hosts.run(1),
    )  # fmt: skip
    assert_named(run, how, where, who)
