"""Jobs of Slurm: a real one, on emulated hosts, and the answers of its client that are hard to get from a real one."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from distopt.launch.jobs import PlatformError, State
from distopt.launch.platforms.slurm.job import SlurmJob
from distopt.launchers import first_host
from tests.launch import order_task
from tests.launch.launching import wait_until, write_config

SUM = Path(__file__).with_name("sum_script.py")
NUM_STEPS = 40

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def submit(cluster, start, tmp_path):
    def launched(*args: str, script_args: tuple[str, ...] = (), **options):
        write_config(tmp_path, *script_args, launch="platform: slurm")
        return start("launch.workers=1", *args, env=cluster.env, prefix=cluster.hosts.run(1), **options)

    return launched


def distopt(cluster, folder: Path, *tokens: str) -> subprocess.CompletedProcess:
    argv = cluster.hosts.run(1, sys.executable, "-m", "distopt.launch", *tokens)
    return subprocess.run(
        argv, cwd=folder, env={**os.environ, **cluster.env}, capture_output=True, text=True, timeout=90
    )


@pytest.mark.parametrize("nodes", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_run_on_nodes_is_submitted_followed_and_done(nodes, submit, tmp_path, cluster):
    run = submit(f"launch.nodes={nodes}", f"script={SUM}", "script_args=['0']")
    assert run.wait() == 0, run.everything() + (run.run_dir / "logs/slurm.log").read_text()
    sums = [json.loads((tmp_path / f"sum-{rank}.json").read_text()) for rank in range(nodes)]
    assert [one["total"] for one in sums] == [nodes] * nodes
    assert len({one["host"] for one in sums}) == nodes
    asked = distopt(cluster, tmp_path, "status", "run")
    assert "\tdone\t" in asked.stdout, asked.stderr


@pytest.mark.slow
def test_script_that_is_submitted_by_hand_is_the_same_job_with_its_options_and_its_setup(cluster, tmp_path):
    folder = tmp_path / 'it\'s a #1 "folder"'
    folder.mkdir()
    write_config(folder, launch="platform: slurm")
    setup = "setup: ['export GREETING=\"it is set up\"']"
    slurm = f"{{{setup}, extra_args: ['--comment=a \"b\" #c'], exclusive: true, memory: 300M}}"
    launch = ["launch", "run.yaml", f"script={SUM}", "script_args=['0']", "launch.workers=1", "launch.nodes=2"]
    shown = distopt(cluster, folder, *launch, f"launch.slurm={slurm}", "--dry-run", "--output", "runs/run")
    assert shown.returncode == 0, shown.stderr

    argv = cluster.hosts.run(1, "sbatch", "--parsable", "--wait", str(folder / "runs/run/job.sh"))
    done = subprocess.run(argv, env={**os.environ, **cluster.env}, capture_output=True, text=True, timeout=120, cwd="/")
    logs = "".join(path.read_text() for path in (folder / "runs/run/logs").iterdir())
    assert done.returncode == 0, done.stderr + logs
    sums = [json.loads((folder / f"sum-{rank}.json").read_text()) for rank in range(2)]
    assert [one["total"] for one in sums] == [2, 2] and len({one["host"] for one in sums}) == 2
    assert [one["greeting"] for one in sums] == ["it is set up"] * 2

    job = cluster.ask("scontrol", "show", "job", done.stdout.strip())
    named = ["JobName=run", "NumNodes=2", "MinMemoryNode=300M", 'Comment=a "b" #c', f"WorkDir={folder}"]
    assert [field for field in named if field not in job] == [], job


@pytest.mark.parametrize("nodelist", ["dn[03-07,12],gpu1", "rack[2-3]n[08-09],gpu1", "login,dn2", "a[1-2][3-4]"])
def test_first_host_of_a_list_is_the_one_that_slurm_names_first(nodelist, cluster):
    assert first_host(nodelist) == cluster.ask("scontrol", "show", "hostnames", nodelist).split()[0]


@pytest.mark.slow
def test_detached_run_is_asked_read_and_stopped_with_its_workers_saved(submit, tmp_path, cluster):
    run = submit("launch.nodes=3", "--detach", script_args=("wait",))
    assert run.wait() == 0, run.everything()
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 3, "all workers ready")
    assert "\trunning\t" in distopt(cluster, tmp_path, "status").stdout
    second = distopt(cluster, tmp_path, "launch", "run.yaml", "launch.workers=1", "launch.nodes=3")
    assert (second.returncode, "slurm already has a run run (running, job" in second.stderr) == (2, True)
    assert "rank 2 does wait" in distopt(cluster, tmp_path, "logs", "run", "--rank", "2").stdout
    stopped = distopt(cluster, tmp_path, "stop", "run")
    assert stopped.stdout.startswith("stopped\t"), stopped.stdout + stopped.stderr
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1", "saved-2"]
    wait_until(lambda: run.processes() == [], "all processes of the run gone", timeout_s=20)


# srun alone, without torchrun, which takes seconds to start and is in the tests above.
BARE = ("launch.nodes=2", "reduce.backend=mpi", "launch.slurm={mpi: none}")


def test_worker_that_dies_fails_the_job_and_is_named(submit, tmp_path):
    run = submit(*BARE, script_args=("raise", "1"))
    assert run.wait() == 1
    assert "rank 1 on dh" in run.err and "the culprit's own words" in run.err


def test_signal_to_the_launcher_stops_the_job(submit, tmp_path):
    run = submit(*BARE, script_args=("wait",))
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "all workers ready")
    run.signal(signal.SIGTERM)
    assert run.wait() == 143, run.everything()
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]


@pytest.fixture(params=["nodes: 2"])
def order(request, cluster, start, tmp_path):
    """Starts order_task.py on two nodes and returns the run and its job's number when it is well under way."""
    shutil.copy(order_task.__file__, tmp_path)
    (tmp_path / "run.yaml").write_text(
        f"name: run\n{order_task.CONFIG}task_args: {{seconds_per_step: 0.3}}\ntrain: {{num_steps: {NUM_STEPS}}}\n"
        f"reduce: {{timeout_s: 8}}\nlaunch: {{platform: slurm, workers: 1, {request.param}}}\n"
    )
    run = start("--detach", env=cluster.env, prefix=cluster.hosts.run(1))
    assert run.wait() == 0, run.everything()
    wait_until(lambda: run.steps() >= 12, "twelve steps")
    (number,) = cluster.ask("squeue", "-h", "-o", "%i").split()
    return run, number


def assert_requeued_resumed_and_done(cluster, run, number: str, folder: Path) -> None:
    wait_until(lambda: "Restarts=1" in cluster.ask("scontrol", "show", "job", number), "the job requeued")

    def done() -> bool:
        # Slurm holds a requeued job back for two minutes; an operator who does not want to wait does this.
        cluster.ask("scontrol", "update", f"JobId={number}", "StartTime=now")
        return "JobState=COMPLETED" in cluster.ask("scontrol", "show", "job", number)

    wait_until(done, "the job done", 120)
    assert json.loads((folder / "mean.json").read_text()) == pytest.approx(order_task.expected_mean(NUM_STEPS), 1e-9)
    assert "resuming from step" in run.log(0)
    assert "requeued 1 times" in distopt(cluster, folder, "status", "run").stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_lost_node_puts_the_job_in_the_queue_again_and_it_resumes(order, tmp_path, cluster):
    run, number = order
    lost = cluster.ask("scontrol", "show", "hostnames", cluster.ask("squeue", "-h", "-o", "%N").strip()).split()[-1]
    index = cluster.hosts.names.index(lost) + 1
    cluster.hosts.link(index, "down")
    try:
        assert_requeued_resumed_and_done(cluster, run, number, tmp_path)
    finally:
        cluster.hosts.link(index, "up")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["signal", "preemption"])
def test_job_that_must_yield_saves_its_last_step_and_resumes_from_there(how, order, tmp_path, cluster):
    run, number = order
    if how == "signal":  # what Slurm sends before the time limit
        cluster.ask("scancel", "--batch", "--signal=USR1", number)
    else:
        cluster.ask("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    wait_until(lambda: "stopped after step" in run.log(0), "a last checkpoint", 60)
    assert_requeued_resumed_and_done(cluster, run, number, tmp_path)
    (stopped,) = re.findall(r"stopped after step (\d+)", run.log(0))
    assert re.findall(r"resuming from step (\d+)", run.log(0)) == [stopped]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("order", ["nodes: 2, max_preemptions: 1"], indirect=True)
def test_job_is_preempted_as_often_as_its_budget_allows_and_then_fails_with_its_last_step_saved(
    order, tmp_path, cluster
):
    run, number = order
    for preemptions in (1, 2):
        cluster.ask("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        wait_until(lambda: run.log(0).count("stopped after step") == preemptions, "a last checkpoint", 60)  # noqa: B023
        if preemptions == 1:
            saved = int(re.findall(r"stopped after step (\d+)", run.log(0))[0])

            def goes_on() -> bool:
                cluster.ask("scontrol", "update", f"JobId={number}", "StartTime=now")
                return run.steps() > saved + 3  # noqa: B023

            wait_until(goes_on, "the requeued job under way", 120)
    wait_until(lambda: "JobState=FAILED" in cluster.ask("scontrol", "show", "job", number), "the job failed", 60)
    assert "Restarts=1" in cluster.ask("scontrol", "show", "job", number)
    log = (run.run_dir / "logs/slurm.log").read_text()
    assert "launch.max_preemptions" in log, log
    assert re.findall(r"resuming from step (\d+)", run.log(0)) == [str(saved)]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["mpi", "horovod"])
def test_srun_starts_workers_of_mpi(backend, submit, tmp_path, cluster):
    if "COMPLETED" not in cluster.ask("srun", "--mpi=pmix", "echo", "COMPLETED"):
        pytest.skip("Slurm finds no PMIx (Debian: libpmix-dev)")
    if find_spec("horovod" if backend == "horovod" else "mpi4py") is None:
        pytest.skip(f"the library of {backend} is not installed")
    chosen = [f"reduce.backend={backend}", f"launch.env={{SUM_BACKEND: {backend}}}"]
    run = submit("launch.nodes=2", *chosen, f"script={SUM}", "script_args=['0']")
    assert run.wait() == 0, run.everything()
    sums = [json.loads((tmp_path / f"sum-{rank}.json").read_text()) for rank in range(2)]
    assert [(one["total"], one["library"]) for one in sums] == [(2, backend)] * 2
    assert len({one["host"] for one in sums}) == 2


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["launch.nodes=4"], "the cluster refuses the job: "),
        (["launch.workers=9"], "the cluster refuses the job: "),
        (["launch.slurm={partition: nosuch}"], "invalid partition specified: nosuch"),
        (["launch.hosts=[a]"], "launch.hosts: Slurm finds the hosts itself"),
    ],
    ids=["more nodes", "more processes", "partition", "hosts"],
)
def test_job_that_the_cluster_cannot_run_is_refused(overrides, expected, submit):
    run = submit(*overrides)
    assert run.wait() == 2
    assert expected in run.err
    assert not run.run_dir.exists()


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Stands for Slurm's client: programs that print what a test says and note how they were called."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))  # and no Slurm that is installed here

    def answer(program: str, stdout: str = "", stderr: str = "", status: int = 0) -> None:
        lines = [
            "#!/bin/sh",
            f'echo {program} "$@" >> {tmp_path}/calls',
            f"printf %s {shlex.quote(stdout)}",
            f"printf %s {shlex.quote(stderr)} >&2",
            f"exit {status}",
        ]
        (programs / program).write_text("\n".join(lines))
        (programs / program).chmod(0o755)

    return answer


def job_of(folder: Path, reference: str | None = "17") -> SlurmJob:
    record = {} if reference is None else {"reference": reference}
    (folder / "launch.json").write_text(json.dumps(record))
    return SlurmJob(folder, ["sbatch", "--parsable", "job.sh"])


@pytest.mark.parametrize(
    ("fields", "phase", "detail"),
    [
        ("JobState=PENDING Reason=Resources", "pending", "job 17 PENDING (Resources)"),
        ("JobState=RUNNING Restarts=2 NodeList=n[1-2]", "running", "job 17 RUNNING, requeued 2 times on n[1-2]"),
        ("JobState=COMPLETED ExitCode=0:0", "done", "job 17 COMPLETED"),
        ("JobState=CANCELLED", "stopped", "job 17 CANCELLED"),
        ("JobState=NODE_FAIL ExitCode=1:0", "failed", "job 17 NODE_FAIL, exit status 1:0 (status:signal)"),
    ],
)
def test_state_is_what_the_controller_answers(fields, phase, detail, client, tmp_path):
    client("scontrol", f"JobId=17 {fields}")
    assert job_of(tmp_path).state() == State(phase, detail)


def test_job_that_failed_after_it_was_asked_to_stop_is_stopped(client, tmp_path):
    client("scontrol", "JobId=17 JobState=FAILED ExitCode=143:0")
    job = job_of(tmp_path)
    assert job.state().phase == "failed"
    (tmp_path / "stop").touch()
    assert job.state().phase == "stopped"


def test_job_that_the_controller_has_forgotten_is_asked_of_the_accounting(client, tmp_path):
    client("scontrol", stderr="slurm_load_jobs error: Invalid job id specified", status=1)
    assert job_of(tmp_path).state() == State("unknown", "Slurm does not know job 17 any more")
    client("sacct", "CANCELLED by 1000\n")
    assert job_of(tmp_path).state() == State("stopped", "job 17 CANCELLED")


def test_directory_from_which_nothing_was_submitted_has_no_job(client, tmp_path):
    job = job_of(tmp_path, None)
    assert job.state().phase == "unknown" and not job.keeps_name(job.state())
    with pytest.raises(PlatformError, match="no job was submitted from here"):
        job.stop()


def test_job_that_runs_is_asked_and_one_that_waits_is_cancelled(client, tmp_path):
    client("scancel")
    for state, call in (("RUNNING", "scancel --signal=TERM 17"), ("PENDING", "scancel 17")):
        client("scontrol", f"JobState={state}")
        job_of(tmp_path).stop()
        assert (tmp_path / "calls").read_text().splitlines()[-1] == call
    assert job_of(tmp_path).kill() is True


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"stderr": "slurm_load_jobs error: Unable to contact\n slurm controller", "status": 1},
         "scontrol: slurm_load_jobs error: Unable to contact slurm controller"),
        (None, "there is no scontrol on PATH; run this on a login node of the cluster"),
    ],
)  # fmt: skip
def test_client_that_gives_no_answer_is_an_error_with_its_message(answer, message, client, tmp_path):
    if answer is not None:
        client("scontrol", **answer)
    with pytest.raises(PlatformError) as refused:
        job_of(tmp_path).state()
    assert str(refused.value) == message
