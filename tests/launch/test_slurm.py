"""Slurm: a real one, on emulated hosts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distopt.config import parse_config
from distopt.launch.platforms import platform
from tests.launch import hosts as emulated
from tests.launch import slurm
from tests.launch.launching import wait_until, write_config

SUM = Path(__file__).with_name("sum_script.py")
BASE = "name: flights\ntask: distopt.examples.flights:Flights\ndata: {global_batch: 4096}\nlaunch: {platform: slurm}\n"

pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        (
            "torchrun",
            ["launch.nodes=3", "launch.workers=2", 'launch.slurm={partition: gpu, time: "8:00:00", gpus_per_node: 2}'],
        ),
        ("elastic", ["launch.nodes=3", "launch.min_hosts=1"]),
        ("mpi", ["launch.nodes=2", "launch.workers=4", "reduce.backend=horovod"]),
    ],
)  # fmt: skip
def test_job_is_the_golden_one(name, overrides, golden):
    golden(f"slurm-{name}.txt", str(platform("slurm").plan(parse_config(BASE, overrides))).split("END\n\n", 1)[1])


@pytest.mark.parametrize("name", ["torchrun", "mpi"])
def test_job_is_one_that_bash_can_read(name, tmp_path):
    backend = {"torchrun": "torch_dist", "mpi": "mpi"}[name]
    odd = parse_config(BASE, [f"reduce.backend={backend}", 'launch.env={ODD: "\'; touch canary; $(id) \\" é"}'])
    plan = platform("slurm").plan(odd)
    (script,) = [text for path, text in plan.files.items() if path.name == "job.sh"]
    check = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, timeout=30)
    assert (check.returncode, check.stderr) == (0, "")
    only_exports = "\n".join(line for line in script.splitlines() if line.startswith("export ODD"))
    shown = ["bash", "-c", only_exports + '\nprintf %s "$ODD"']
    said = subprocess.run(shown, capture_output=True, text=True, timeout=30, cwd=tmp_path)
    assert (said.stdout, list(tmp_path.iterdir())) == ("'; touch canary; $(id) \" é", [])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[slurm.Cluster]:
    lacking = emulated.missing() or slurm.missing()
    if lacking:
        pytest.skip(lacking)
    with emulated.Hosts(tmp_path_factory.mktemp("hosts"), 3) as hosts, slurm.Cluster(hosts) as running:
        yield running


@pytest.fixture
def submit(cluster, start, tmp_path):
    def launched(*args: str, script_args: tuple[str, ...] = (), **options):
        write_config(tmp_path, *script_args, launch="platform: slurm")
        return start("launch.workers=1", *args, env=cluster.env, prefix=cluster.hosts.run(1), **options)

    return launched


def distopt(cluster, folder: Path, *words: str) -> subprocess.CompletedProcess:
    argv = cluster.hosts.run(1, sys.executable, "-m", "distopt.launch", *words)
    return subprocess.run(
        argv, cwd=folder, env={**os.environ, **cluster.env}, capture_output=True, text=True, timeout=90
    )


@pytest.mark.parametrize("nodes", [1, 3])
def test_run_on_nodes_is_submitted_followed_and_done(nodes, submit, tmp_path, cluster):
    run = submit(f"launch.nodes={nodes}", f"script={SUM}", "script_args=['0']")
    assert run.wait() == 0, run.everything() + (run.run_dir / "logs/slurm.log").read_text()
    found = [json.loads((tmp_path / f"sum-{rank}.json").read_text()) for rank in range(nodes)]
    assert [one["total"] for one in found] == [nodes] * nodes
    assert len({one["host"] for one in found}) == nodes
    asked = distopt(cluster, tmp_path, "status", "run")
    assert "\tdone\t" in asked.stdout, asked.stderr


def test_detached_run_is_asked_read_and_stopped_with_its_workers_saved(submit, tmp_path, cluster):
    run = submit("launch.nodes=3", "--detach", script_args=("wait",))
    assert run.wait() == 0, run.everything()
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 3, "all workers ready")
    assert "\trunning\t" in distopt(cluster, tmp_path, "status").stdout
    assert "rank 2 does wait" in distopt(cluster, tmp_path, "logs", "run", "--rank", "2").stdout
    stopped = distopt(cluster, tmp_path, "stop", "run")
    assert stopped.stdout.startswith("stopped\t"), stopped.stdout + stopped.stderr
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1", "saved-2"]
    wait_until(lambda: run.processes() == [], "all processes of the run gone", timeout_s=20)


def test_worker_that_dies_fails_the_job_and_is_named(submit, tmp_path):
    run = submit("launch.nodes=2", script_args=("raise", "1"))
    assert run.wait() == 1
    assert "rank 1 on dh" in run.err and "the culprit's own words" in run.err


def test_signal_to_the_launcher_stops_the_job(submit, tmp_path):
    run = submit("launch.nodes=2", script_args=("wait",))
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "all workers ready")
    run.signal(signal.SIGTERM)
    assert run.wait() == 143, run.everything()
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_lost_node_puts_the_job_in_the_queue_again_and_it_ends_well(submit, tmp_path, cluster):
    run = submit("launch.nodes=2", f"script={SUM}", "script_args=['6']", "--detach", "reduce.timeout_s=10")
    assert run.wait() == 0, run.everything()
    wait_until(lambda: len(list(tmp_path.glob("summed-2-*"))) == 2, "both workers at work")
    (number,) = cluster.ask("squeue", "-h", "-o", "%i").split()
    lost = cluster.ask("squeue", "-h", "-o", "%N").strip()
    lost = cluster.ask("scontrol", "show", "hostnames", lost).split()[-1]
    index = cluster.hosts.names.index(lost) + 1
    cluster.hosts.link(index, "down")
    try:
        wait_until(lambda: "Restarts=1" in cluster.ask("scontrol", "show", "job", number), "the job requeued", 120)

        def done() -> bool:
            # Slurm holds a requeued job back for two minutes; an operator who does not want to wait does this.
            cluster.ask("scontrol", "update", f"JobId={number}", "StartTime=now")
            return "JobState=COMPLETED" in cluster.ask("scontrol", "show", "job", number)

        wait_until(done, "the job done", 120)
    finally:
        cluster.hosts.link(index, "up")
    assert (tmp_path / "sum-1.json").exists()
    assert "requeued 1 times" in distopt(cluster, tmp_path, "status", "run").stdout


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["launch.nodes=4"], "the cluster refuses the job: "),
        (["launch.workers=9"], "the cluster refuses the job: "),
        (["launch.slurm={partition: nosuch}"], "invalid partition specified: nosuch"),
        (["launch.hosts=[a]"], "launch.hosts: Slurm finds the hosts itself"),
    ],
    ids=["more nodes", "more processes", "partition", "hosts"],
)
def test_job_that_the_cluster_cannot_run_is_refused(overrides, said, submit):
    run = submit(*overrides)
    assert run.wait() == 2
    assert said in run.err
    assert not run.run_dir.exists()
