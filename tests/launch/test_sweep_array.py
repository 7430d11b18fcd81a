"""Sweeps as one job array, on a real Slurm, and what becomes of trials that the cluster has forgotten."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from distopt.config import parse_config
from launch import sweep_array
from launch.jobs import JobError, PlatformError, State
from launch.platforms import load_platform
from launch.platforms.slurm.array import SlurmArray
from tests.launch.launching import wait_until
from tests.train.runs import ROOT

RUN = {
    "name": "line",
    "task": "tests.train.tasks:Line",
    "optim": {"name": "Adam", "args": {"lr": 0.05}},
    "train": {"num_steps": 30},
    "log": {"every_steps": 10, "tensorboard": False},
    "launch": {"platform": "slurm", "workers": 1},
}
BASE = yaml.safe_dump(RUN)


class OnSlurm:
    """`distopt sweep` on the first host of a real cluster."""

    def __init__(self, cluster, folder: Path) -> None:
        self._cluster = cluster
        self.folder = folder

    def start(self, **sweep: Any) -> subprocess.Popen[str]:
        (self.folder / "line.yaml").write_text(BASE)
        (self.folder / "sweep.yaml").write_text(yaml.safe_dump({"name": "demo", "run": "line.yaml", **sweep}))
        return subprocess.Popen(
            self._cluster.hosts.run(1, sys.executable, "-m", "distopt.launch", "sweep", "sweep.yaml"),
            cwd=self.folder, env={**os.environ, **self._cluster.env, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def trials(self) -> list[dict[str, Any]]:
        return json.loads((self.folder / "runs/demo/sweep.json").read_text())["trials"]

    def references(self) -> list[str]:
        paths = sorted(self.folder.glob("runs/demo-*/launch.json"))
        return [json.loads(path.read_text()).get("reference", "") for path in paths]

    def everything(self) -> str:
        return "\n".join(f"== {path}\n{path.read_text()}" for path in sorted(self.folder.glob("runs/demo-*/logs/*log")))


@pytest.mark.timeout(240)
def test_grid_is_one_job_array_whose_tasks_are_the_runs(cluster, tmp_path):
    slurm = OnSlurm(cluster, tmp_path)
    sweep = slurm.start(grid={"seed": [1, 2, 3]}, parallel=2)
    output, _ = sweep.communicate(timeout=200)
    assert sweep.returncode == 0, output + slurm.everything()

    assert [(trial["state"], trial["step"]) for trial in slurm.trials()] == [("done", 30)] * 3
    assert len({trial["value"] for trial in slurm.trials()}) == 3
    assert "demo-000" in output and (tmp_path / "runs/demo/sweep.html").exists()

    (array,) = {reference.partition("_")[0] for reference in slurm.references()}
    assert slurm.references() == [f"{array}_{number}" for number in range(3)]
    job = cluster.ask("scontrol", "--oneliner", "show", "job", array)
    assert len(re.findall("JobState=COMPLETED", job)) == 3 and "ArrayTaskThrottle=2" in job, job
    # Each task has its log in the directory of its run, which was made before: Slurm makes no folders.
    assert all((tmp_path / f"runs/demo-{number:03d}/logs/slurm.log").exists() for number in range(3))


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_array_goes_on_without_the_sweep_and_is_stopped_and_resumed_with_it(cluster, tmp_path):
    slurm = OnSlurm(cluster, tmp_path)
    grid = {"grid": {"seed": [1, 2, 3]}, "parallel": 2, "overrides": ["train.num_steps=4000"]}

    def under_way() -> int:
        return len(list(tmp_path.glob("runs/demo-*/metrics.jsonl")))

    first = slurm.start(**grid)
    wait_until(lambda: under_way() == 2, "two trials under way")
    first.kill()
    first.communicate()
    before = slurm.references()

    second = slurm.start(**grid)
    assert second.stdout is not None
    assert [second.stdout.readline().endswith("is followed\n") for _ in range(3)] == [True] * 3
    assert slurm.references() == before
    # The signal goes to the command behind those that enter the host, which exec it.
    second.send_signal(signal.SIGTERM)
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 143, output
    assert {trial["state"] for trial in slurm.trials()} == {"stopped"}
    assert cluster.ask("squeue", "-h").strip() == ""
    assert len(list(tmp_path.glob("runs/demo-*/checkpoints/*"))) >= 2

    third = slurm.start(**grid)
    output, _ = third.communicate(timeout=300)
    assert third.returncode == 0, output + slurm.everything()
    assert [trial["state"] for trial in slurm.trials()] == ["done"] * 3
    assert "resuming from step" in (tmp_path / "runs/demo-000/logs/rank-0.log").read_text()
    (array,) = {reference.partition("_")[0] for reference in slurm.references()}
    assert array != before[0].partition("_")[0]


def test_tasks_of_several_arrays_on_a_real_cluster_are_their_runs_one_array_after_the_other(cluster, tmp_path):
    for number in range(10, 22):
        folder = tmp_path / f"demo-{number:03d}"
        (folder / "logs").mkdir(parents=True)
        (folder / "job.sh").write_text(f"echo run {number}\n")
    array = SlurmArray("demo", f"{tmp_path}/demo-", dict.fromkeys(range(22), configs()[0]), 3, 10)

    references: list[str] = []
    for numbers in ([10, 11, 19], [20, 21]):
        script = tmp_path / f"{numbers[0]}.sh"
        script.write_text(array.script(numbers, references[-1] if references else None))
        references.append(cluster.ask("sbatch", "--parsable", str(script)).strip())
    wait_until(lambda: cluster.ask("squeue", "-h") == "", "the end of both arrays")

    logs = {int(path.parts[-3][-3:]): path.read_text() for path in tmp_path.glob("demo-*/logs/slurm.log")}
    assert logs == {number: f"run {number}\n" for number in (10, 11, 19, 20, 21)}
    jobs = cluster.ask("scontrol", "--oneliner", "show", "job")
    times = [re.findall(rf"ArrayJobId={each} .*?StartTime=(\S+) EndTime=(\S+)", jobs) for each in references]
    assert max(end for _, end in times[0]) <= min(start for start, _ in times[1]), jobs


def configs(*overrides: str) -> dict[int, Any]:
    return {
        number: parse_config(BASE, [f"name=demo-{number:03d}", f"seed={number}", *overrides]) for number in range(4)
    }


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Stands for a cluster with a limit: its scontrol says one, and its sbatch numbers arrays and notes their lines."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")

    def install(settings: str, num_arrays: int = 99) -> None:
        scontrol = f"#!/bin/sh\n[ \"$*\" = 'show config' ] && cat <<'END'\n{settings}\nEND\n"
        sbatch = f"""#!/bin/sh
            number=$(ls {tmp_path}/submitted | wc -l)
            [ $number -lt {num_arrays} ] || {{ echo too many >&2; exit 1; }}
            cat > {tmp_path}/submitted/$number
            echo $((40 + number))\n"""
        for name, text in {
            "scontrol": scontrol,
            "sbatch": sbatch,
            "scancel": f"#!/bin/sh\necho $* >> {tmp_path}/cancelled\n",
        }.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        (tmp_path / "submitted").mkdir(exist_ok=True)

    return install


def array_of(num_runs: int, parallel: int = 4) -> SlurmArray | None:
    array = load_platform("slurm").array("demo", "/runs/demo-", dict.fromkeys(range(num_runs), configs()[0]), parallel)
    assert array is None or isinstance(array, SlurmArray)
    return array


def test_script_of_the_array_is_the_golden_one(golden, monkeypatch):
    monkeypatch.setattr(os, "getcwd", lambda: "/home/me")
    array = load_platform("slurm").array("demo", "/home/me/50% of runs/demo-", configs("launch.nodes=2"), 8)
    assert isinstance(array, SlurmArray)
    golden("slurm-array.txt", array.script([0, 2, 3]))


def test_script_of_a_later_array_is_the_golden_one(golden, monkeypatch, client):
    client("MaxArraySize            = 101")
    monkeypatch.setattr(os, "getcwd", lambda: "/home/me")
    array = array_of(250)
    assert array is not None
    golden("slurm-later-array.txt", array.script([200, 207, 249], after="41"))


@pytest.mark.parametrize(
    ("settings", "num_runs", "size"),
    [
        ("MaxArraySize            = 1001\nMaxBatchRequeue = 5", 1001, 1001),
        ("MaxArraySize            = 1001", 1002, 1000),
        ("MaxArraySize            = 50", 51, 10),
        ("MaxArraySize            = 20001", 12_000, 12_000),
        ("MaxArraySize = 20001\nSchedulerParameters = bf_continue,max_array_tasks=500,defer", 600, 100),
        ("MaxArraySize = 10", 10, 10),
        ("MaxArraySize = 9", 10, None),
        ("MaxArraySize = 0", 2, None),
        ("a version that words it otherwise", 1001, 1000),
    ],
)
def test_array_has_no_more_tasks_than_the_cluster_allows(settings, num_runs, size, client):
    client(settings)
    array = array_of(num_runs)
    assert (array and array.size) == size


def test_cluster_that_does_not_say_its_limit_is_taken_for_one_of_1000_and_that_is_said(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PATH", str(tmp_path))
    array = array_of(1001)
    assert array is not None and array.size == 1000
    shown = capfd.readouterr().err
    assert "there is no scontrol on PATH" in shown and "at most 1,000 tasks" in shown


@pytest.mark.parametrize(("parallel", "throttle", "waits_for"), [(4, 4, [None, 40, 41]), (15, 7, [None, None, 40])])
def test_longer_grid_becomes_several_arrays_of_which_no_more_than_parallel_tasks_run(
    parallel, throttle, waits_for, client, tmp_path
):
    client("MaxArraySize            = 11")
    array = array_of(25, parallel)
    assert array is not None
    numbers = [0, 9, 10, 19, 23]
    assert array.submit(numbers) == {0: "40_0", 9: "40_9", 10: "41_0", 19: "41_9", 23: "42_3"}

    scripts = [path.read_text() for path in sorted((tmp_path / "submitted").iterdir())]
    lines = [re.findall(r"^#SBATCH --array=(.*)", script, re.MULTILINE)[0] for script in scripts]
    assert lines == [f"{tasks}%{throttle}" for tasks in ("0,9", "0,9", "3")]
    waiting = [re.findall(r"^#SBATCH --dependency=afterany:(\d+)$", script, re.MULTILINE) for script in scripts]
    assert waiting == [[] if each is None else [str(each)] for each in waits_for]


@pytest.mark.parametrize("size", [10, 100, 1000, 10_000])
@pytest.mark.parametrize("number", [0, 7, 10, 99, 100, 123, 999, 1000, 4567, 12_345])
def test_log_of_a_task_is_in_the_directory_that_its_script_runs(size, number):
    array = SlurmArray("demo", "/runs/demo-", dict.fromkeys(range(20_000), configs()[0]), 1, size)
    script = array.script([number])
    (task,) = re.findall(r"^#SBATCH --array=(\d+)%1$", script, re.MULTILINE)
    assert int(task) < size
    (log,) = re.findall(r"^#SBATCH --output=(.*)$", script, re.MULTILINE)
    # As Slurm does: %3a is the task's number in three digits or more.
    log = re.sub(r"%(\d)a", lambda match: task.zfill(int(match[1])), log)
    assert log == f"/runs/demo-{number:03d}/logs/slurm.log"


def test_arrays_are_withdrawn_when_a_later_one_is_refused(client, tmp_path):
    client("MaxArraySize            = 11", num_arrays=2)
    array = array_of(25)
    assert array is not None
    with pytest.raises(PlatformError, match="sbatch: too many"):
        array.submit(range(25))
    assert (tmp_path / "cancelled").read_text() == "40\n41\n"


@pytest.mark.parametrize(("size", "task"), [(8, "7"), (5, "2")])
def test_task_becomes_the_script_of_its_run(size, task, tmp_path):
    array = SlurmArray("demo", f"{tmp_path}/it's a/demo-", configs(), 1, size)
    (tmp_path / "it's a/demo-007").mkdir(parents=True)
    (tmp_path / "it's a/demo-007/job.sh").write_text('echo "task $SLURM_ARRAY_TASK_ID"\nexit 3\n')
    done = subprocess.run(
        ["bash"], input=array.script([7]), env={"SLURM_ARRAY_TASK_ID": task, "PATH": os.environ["PATH"]},
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (3, f"task {task}\n"), done.stderr


@pytest.mark.parametrize(
    ("number", "means"),
    [
        ({}, "5"),
        ({"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}, "5_3"),
        # Task 3 of array 4, and as well a job that a task of array 4 has submitted: sbatch passes variables on.
        ({"SLURM_ARRAY_JOB_ID": "4", "SLURM_ARRAY_TASK_ID": "3"}, "5"),
    ],
)
def test_task_requeues_itself_and_not_the_array(number, means, tmp_path):
    """The last task of array 5 is job 5 itself, and a plain `scontrol requeue 5` would be for all."""
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/calls; echo h1 PreemptTime=2026-01-01\n")
    (tmp_path / "srun").write_text("#!/bin/sh\nexit 7\n")
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    (script,) = [
        text for path, text in load_platform("slurm").plan(parse_config(BASE)).files.items() if path.name == "job.sh"
    ]
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "h1", **number}
    done = subprocess.run(["bash"], input=script, env=env, capture_output=True, text=True, timeout=60)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert (done.returncode, calls[-2:]) == (7, [f"show job {means}", f"requeue {means}"])


def test_options_of_the_user_come_after_those_of_the_array_so_that_they_win():
    chosen = configs("launch.slurm.extra_args=[--job-name=mine, --nice]")
    array = load_platform("slurm").array("demo", "/runs/demo-", chosen, 4)
    assert isinstance(array, SlurmArray)
    names = [line for line in array.script([0]).splitlines() if "job-name" in line or "nice" in line]
    assert names == ["#SBATCH --job-name=demo", "#SBATCH --job-name=mine", "#SBATCH --nice"]


def test_trials_that_ask_for_different_things_are_jobs_of_their_own():
    different = configs() | {3: parse_config(BASE, ["launch.nodes=2"])}
    assert load_platform("slurm").array("demo", "demo-", different, 1) is None
    assert sweep_array.array_of_trials("demo", "demo-", different, 1) is None
    assert sweep_array.array_of_trials("demo", "demo-", configs("launch.platform=local"), 1) is None
    assert sweep_array.array_of_trials("demo", "demo-", {}, 1) is None  # a search


class Array:
    """Stands for the answers of a cluster."""

    def __init__(self) -> None:
        self.listed: set[str] = set()
        self.error: str | None = None
        self.job: str = "unknown"
        self.job_error: str | None = None

    def state(self) -> State:
        if self.job_error is not None:
            raise PlatformError(self.job_error)
        return State(self.job)

    def unfinished(self, references) -> set[str]:
        if self.error is not None:
            raise PlatformError(self.error)
        return self.listed & set(references)


@pytest.fixture
def trials(tmp_path, monkeypatch):
    array = Array()
    (tmp_path / "launch.json").write_text('{"reference": "12_0"}')
    monkeypatch.setattr(sweep_array, "POLL_S", 0.0)
    monkeypatch.setattr(sweep_array.runs, "job_of", lambda directory: array)
    return array, sweep_array.TrialArray(load_platform("slurm"), array, {})


@pytest.mark.parametrize(
    ("events", "phase"),
    [
        ([], "failed"),
        (["start"], "failed"),
        (["start", "end 0"], "done"),
        (["start", "end 1"], "failed"),
        (["start", "end 1", "start", "end 0"], "done"),
    ],
)
def test_trial_that_the_cluster_has_forgotten_ended_as_its_supervisors_say(events, phase, trials, tmp_path):
    _, followed = trials
    (tmp_path / "logs").mkdir()
    lines = [
        {"event": each.split()[0], "rank": 0, "attempt": 0, "host": "h", "pid": 1, "time": float(time),
         "status": int(each.split()[1]) if " " in each else None}
        for time, each in enumerate(events)
    ]  # fmt: skip
    (tmp_path / "logs/rank-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert followed.state(tmp_path, [tmp_path]).phase == phase


def test_controller_that_does_not_answer_for_a_while_changes_nothing(trials, tmp_path, monkeypatch):
    array, followed = trials
    array.listed = {"12_0"}
    assert followed.state(tmp_path, [tmp_path]) == State("running")
    array.error = "no answer"
    assert followed.state(tmp_path, [tmp_path]) == State("running")
    array.listed = set()  # it has left the queue meanwhile
    assert followed.state(tmp_path, [tmp_path]) == State("running")
    monkeypatch.setattr(sweep_array.runs, "PATIENCE_S", -1.0)
    with pytest.raises(JobError, match="no answer"):
        followed.state(tmp_path, [tmp_path])


@pytest.mark.parametrize("failing", ["error", "job_error"])
def test_controller_that_does_not_answer_at_first_has_forgotten_no_trial(failing, trials, tmp_path):
    """One that fails right after the array was submitted, or between the queue and the question for one task."""
    array, followed = trials
    setattr(array, failing, "no answer")
    assert followed.state(tmp_path, [tmp_path]) == State("running")
    setattr(array, failing, None)
    assert followed.state(tmp_path, [tmp_path]).phase == "failed"


@pytest.mark.parametrize(("phase", "expected"), [("running", True), ("done", True), ("unknown", False)])
def test_trial_is_submitted_again_only_if_the_controller_says_that_it_is_not_under_way(
    phase, expected, trials, tmp_path
):
    array, followed = trials
    array.job = phase
    assert followed.is_under_way(tmp_path) is expected
    array.job_error = "no answer"
    with pytest.raises(PlatformError, match="no answer"):
        followed.is_under_way(tmp_path)


def test_running_trials_are_stopped_though_waiting_ones_cannot_be_cancelled(trials, tmp_path, monkeypatch, capfd):
    array, followed = trials

    def refuse(references):
        raise PlatformError("scancel: no answer")

    stopped = []
    monkeypatch.setattr(array, "cancel_waiting", refuse, raising=False)
    monkeypatch.setattr(sweep_array.runs, "stop_all", stopped.extend)
    followed.stop([tmp_path])
    assert stopped == [tmp_path] and "scancel: no answer" in capfd.readouterr().err
