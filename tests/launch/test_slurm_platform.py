"""Slurm's batch scripts: held against golden files and read by bash; what is refused before anything is submitted."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distopt.config import ConfigError, RunConfig, parse_config
from distopt.launch import checks
from distopt.launch.platforms import load_platform
from distopt.launch.platforms.slurm import platform
from distopt.launch.platforms.slurm import script as module

BASE = "name: flights\ntask: distopt.examples.flights:Flights\ndata: {global_batch: 4096}\nlaunch: {platform: slurm}\n"
OPTIONS = """{
  account: lab, qos: high, memory: 64G, constraint: 'a100&ib', gres: 'gpu:a100:4', exclusive: true, reservation: class,
  nodelist: 'gpu[01-03]', exclude: 'gpu[07-08],old1', licenses: 'data:1', mail_type: [END, FAIL],
  mail_user: me@lab.example, extra_args: ['--comment=it is "mine" #1', --nice], srun_args: [--cpu-bind=cores],
  setup: [module load cuda/13.0, 'export A="b c"']}"""
PYXIS = """{runtime: pyxis, image: 'nvcr.io#nvidia/pytorch:25.01-py3', mounts: [/data, '/scratch:/tmp:rw'],
  extra_args: [--no-container-mount-home]}"""
APPTAINER = "{runtime: apptainer, image: images/torch.sif, mounts: ['/data:/data:ro'], python: /opt/venv/bin/python}"
TEXT = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=200)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        (
            "torchrun",
            ["launch.nodes=3", "launch.workers=2", 'launch.slurm={partition: gpu, time: "8:00:00", gpus_per_node: 2}'],
        ),
        ("elastic", ["launch.nodes=3", "launch.min_hosts=1"]),
        ("mpi", ["launch.nodes=2", "launch.workers=4", "reduce.backend=horovod"]),
        ("options", [f"launch.slurm={OPTIONS}", "launch.max_preemptions=2"]),
        ("pyxis", ["launch.nodes=2", f"launch.slurm={{gpus_per_node: 1, container: {PYXIS}}}"]),
        ("apptainer", ["launch.nodes=2", f"launch.slurm={{gres: 'gpu:a100:1', container: {APPTAINER}}}"]),
        ("apptainer-mpi", ["launch.workers=2", "reduce.backend=mpi", f"launch.slurm={{container: {APPTAINER}}}"]),
    ],
)  # fmt: skip
def test_job_is_the_golden_one(name, overrides, golden):
    golden(f"slurm-{name}.txt", str(load_platform("slurm").plan(parse_config(BASE, overrides))).split("END\n\n", 1)[1])


@pytest.mark.parametrize("name", ["torchrun", "mpi"])
def test_job_is_one_that_bash_can_read(name, tmp_path):
    backend = {"torchrun": "torch_dist", "mpi": "mpi"}[name]
    odd = parse_config(BASE, [f"reduce.backend={backend}", 'launch.env={ODD: "\'; touch canary; $(id) \\" é"}'])
    plan = load_platform("slurm").plan(odd)
    (script,) = [text for path, text in plan.files.items() if path.name == "job.sh"]
    check = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, timeout=30)
    assert (check.returncode, check.stderr) == (0, "")
    only_exports = "\n".join(line for line in script.splitlines() if line.startswith("export ODD"))
    shown = ["bash", "-c", only_exports + '\nprintf %s "$ODD"']
    done = subprocess.run(shown, capture_output=True, text=True, timeout=30, cwd=tmp_path)
    assert (done.stdout, list(tmp_path.iterdir())) == ("'; touch canary; $(id) \" é", [])


@pytest.mark.parametrize("backend", ["torch_dist", "mpi"])
@given(arguments=st.lists(TEXT, max_size=4))
def test_script_arguments_survive_both_shells_of_a_slurm_job(backend, arguments):
    raw = {"name": "run", "script": "a b/train.py", "script_args": arguments, "launch": {"platform": "slurm"},
           "reduce": {"backend": backend}}  # fmt: skip
    config = RunConfig.model_validate(raw)
    tokens = shlex.split(module._step(config))  # the batch script's shell
    if backend == "torch_dist":
        tokens = shlex.split(tokens[tokens.index("-c") + 1])  # the shell on each node
    assert tokens[len(tokens) - len(arguments) - 1 :] == ["a b/train.py", *arguments]


@pytest.mark.parametrize("container", [PYXIS, APPTAINER], ids=["pyxis", "apptainer"])
@pytest.mark.parametrize("backend", ["torch_dist", "mpi"])
def test_worker_in_a_container_is_started_by_its_python_where_the_run_is(backend, container, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse_config(BASE, [f"reduce.backend={backend}", f"launch.slurm={{container: {container}}}"])
    argv = shlex.split(module._step(config))
    if backend == "torch_dist":
        argv += shlex.split(argv.pop())
    text = " ".join(argv)
    assert sys.executable not in text
    assert f"{config.launch.slurm.container.python} -m distopt.launch.worker.supervisor runs/flights" in text
    assert f"{tmp_path}:{tmp_path}" in text and f"{tmp_path}/runs/flights:{tmp_path}/runs/flights" in text
    assert load_platform("slurm").image(config) == config.launch.slurm.container.image


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('{setup: ["a\\nb"]}', "launch.slurm.setup"),
        ("{extra_args: [wrap]}", "launch.slurm.extra_args"),
        ("{extra_args: [--partition gpu]}", "in one word: write --partition=gpu"),
        ("{srun_args: ['-p  gpu']}", "in one word: write -pgpu"),
        ("{nodelist: '--wrap=id'}", "launch.slurm.nodelist"),
        *((f"{{time: '{time}'}}", "launch.slurm.time: found") for time in ("-", "::", "1-2-3", "-5", "1:", "soon")),
        *((f"{{memory: {memory}}}", "launch.slurm.memory: found") for memory in ("lots", "16 G", "1.5G", "-1")),
        ("{requeue_before_end_s: 65536}", "launch.slurm.requeue_before_end_s"),
        ("{container: {runtime: docker, image: x}}", "launch.slurm.container.runtime"),
        ("{container: {runtime: pyxis, image: x, mounts: [data]}}", "launch.slurm.container.mounts"),
        ("{mail_type: [SOMETIMES]}", "launch.slurm.mail_type"),
    ],
)
def test_value_that_would_be_another_option_or_line_is_refused(value, message):
    with pytest.raises(ConfigError) as refused:
        parse_config(BASE, [f"launch.slurm={value}"])
    assert message in str(refused.value)


def test_gpus_are_asked_for_in_one_way():
    (finding,) = load_platform("slurm").check(parse_config(BASE, ["launch.slurm={gres: 'gpu:1', gpus_per_node: 1}"]))
    assert str(finding) == "launch.slurm.gres: found gpus_per_node too; remove one of them"


def test_setup_line_that_fails_ends_the_script_and_is_named(tmp_path):
    def run(*lines: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "job.sh").write_text(module._setup(list(lines)) + '\necho "then $X"\n')
        return subprocess.run(["bash", "job.sh"], cwd=tmp_path, capture_output=True, text=True, timeout=30)

    assert run("export X=1", "false || true", "if false; then", "exit 3", "fi").stdout == "then 1\n"
    failed = run("export X=1", "cat /nosuch", "export X=2")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "distopt: launch.slurm.setup: cat /nosuch failed on " in failed.stderr
    assert failed.stderr.endswith(" with exit status 1\n")

    # Files such as those of conda and modules have commands that fail within.
    (tmp_path / "activate").write_text("grep -q conda /dev/null\nX=2\n")
    (tmp_path / "broken").write_text("return 5\n")
    assert run("source ./activate").stdout == "then 2\n"
    assert "source ./broken failed on " in run("source ./broken").stderr


@pytest.mark.parametrize(
    ("key", "value", "option"),
    [("time", "UNLIMITED", "time=UNLIMITED"), ("time", "1-02:30", "time=1-02:30"), ("memory", "16000", "mem=16000"),
     ("memory", "16GB", "mem=16GB"), ("partition", "12", "partition=12"), ("account", "0123", "account=0123"),
     ("qos", "7", "qos=7"),
     ("mail_type", "[end, TIME_LIMIT_80, ARRAY_TASKS]", "mail-type=END,TIME_LIMIT_80,ARRAY_TASKS")],
)  # fmt: skip
def test_value_that_sbatch_takes_needs_no_quotes(key, value, option):
    assert f"--{option}" in module.options_of(parse_config(BASE, [f"launch.slurm={{{key}: {value}}}"]))


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("1", 60), ("1:30", 90), ("1:02:03", 3723), ("1-2", 93600), ("1-2:3", 93780), ("1-2:3:4", 93784), ("0", 0),
     ("UNLIMITED", None), (None, None)],
)  # fmt: skip
def test_time_limit_has_the_seconds_that_sbatch_gives_it(time, seconds):
    assert platform._seconds(time) == seconds


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["launch.slurm={time: 1}"], "launch.slurm.requeue_before_end_s: found 120, but launch.slurm.time=1 gives the"),
        (["launch.slurm={time: '1:30', requeue_before_end_s: 90}"], "launch.slurm.requeue_before_end_s: found 90, but"),
        (["launch.grace_s=600"], "launch.grace_s: found 600, but the job may end 120 s after workers are told to save"),
        (
            ["launch.port=29400", "serve.port=30399"],
            "serve.port: workers serve from 30399, and a job takes one of 29400",
        ),
    ],
)
def test_times_and_ports_that_do_not_agree_are_named(overrides, message):
    (finding,) = load_platform("slurm").check(parse_config(BASE, overrides))
    assert str(finding).startswith(message)


@pytest.mark.parametrize("overrides", [["launch.slurm={time: 3}"], ["launch.slurm={time: 0}"], ["serve.port=8000"]])
def test_times_and_ports_that_agree_are_not_named(overrides):
    assert list(load_platform("slurm").check(parse_config(BASE, overrides))) == []


@pytest.mark.parametrize("container", [PYXIS, APPTAINER], ids=["pyxis", "apptainer"])
def test_folder_whose_name_a_container_would_split_is_refused(container, tmp_path, monkeypatch):
    (tmp_path / "a,b").mkdir()
    monkeypatch.chdir(tmp_path / "a,b")
    chosen = [f"launch.slurm={{container: {container}}}", f"run_dir={tmp_path}/c:d"]
    findings = load_platform("slurm").check(parse_config(BASE, chosen))
    assert [finding.subject for finding in findings] == ["launch.slurm.container", "run_dir"]
    assert list(load_platform("slurm").check(parse_config(BASE, [f"run_dir={tmp_path}/c:d"]))) == []


@pytest.mark.parametrize(
    ("option", "name"),
    [("--array=0-3", "array"), ("-a0-3", "array"), ("--nodes=7", "nodes"), ("-N7", "nodes"), ("-HN7", "nodes"),
     ("--nod=7", "nodes"), ("--ntasks=3", "ntasks"), ("-n3", "ntasks"), ("--tasks-per-node=2", "tasks-per-node"),
     ("-c8", "cpus-per-task"), ("--no-requeue", "no-requeue"), ("--output=x", "output"), ("-o", "output"),
     ("--export=NONE", "export"), ("-D/tmp", "chdir"), ("--signal=USR2", "signal"), ("--wrap=id", "wrap"),
     ("-W", "wait"), ("--test-only", "test-only")],
)  # fmt: skip
def test_option_on_which_the_job_is_built_is_refused(option, name):
    (finding,) = load_platform("slurm").check(parse_config(BASE, [f"launch.slurm.extra_args={['--nice', option]}"]))
    assert str(finding).startswith(f"launch.slurm.extra_args.1: found {option}, but distopt sets --{name} itself; ")


def test_options_of_srun_are_the_users_but_for_those_on_which_the_step_is_built():
    chosen = "launch.slurm.srun_args=[--mpi=pmi2, -W30, --output=x, -N7, --export=NONE]"
    config = parse_config(BASE, ["reduce.backend=mpi", chosen])
    assert [finding.subject[-1] for finding in load_platform("slurm").check(config)] == ["3", "4"]
    options = shlex.split(module._step(config))
    assert options.index("--mpi=pmix") < options.index("--mpi=pmi2")  # the last one counts


def test_options_that_are_the_users_alone_are_left_to_slurm():
    options = ["--comment=a b", "-Jname", "--nice", "--gres-flags=disable-binding", "-H", "--hold", "--mem=0", "-xn1"]
    config = parse_config(BASE, [f"launch.slurm.extra_args={options}"])
    assert list(load_platform("slurm").check(config)) == []
    assert module.options_of(config)[-len(options) :] == options


def test_option_without_its_value_is_refused_since_it_would_take_the_next_one():
    (finding,) = load_platform("slurm").check(parse_config(BASE, ["launch.slurm.extra_args=[-J, --nice]"]))
    assert str(finding) == "launch.slurm.extra_args.0: found -J without its value; write both as one entry, -JVALUE"


def run_job(folder, *overrides: str, srun: str = "exit 7", **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a batch script among programs that stand for those of Slurm; `folder/calls` has what they were asked."""
    programs = {"scontrol": "echo h1", "scancel": f"touch {folder}/cancelled", "srun": srun}
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\necho {name} $* >> {folder}/calls\n{text}\n")
        (folder / name).chmod(0o755)
    (folder / "job.sh").write_text(module.batch_script(parse_config(BASE, [*overrides])))
    job = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "h1"}
    return subprocess.run(
        ["bash", "job.sh"], cwd=folder, env=job | variables, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "line",
    ["set -euo pipefail", "set -C -f", "shopt -s failglob", "trap 'exit 3' ERR", "IFS=5h",
     "readonly status=1 job=2", "source ./strict"],
)  # fmt: skip
def test_job_yields_as_ever_whatever_setup_has_set(line, tmp_path):
    (tmp_path / "strict").write_text("set -eu\n")
    # The step ends when its workers have been told to save, which the signal to the script asks for.
    srun = f"kill -USR1 $PPID_OF_JOB; while [ ! -e {tmp_path}/cancelled ]; do sleep 0.05; done; sleep 0.2; exit 7"
    setup = f"launch.slurm.setup={[line, 'export PPID_OF_JOB=$$']}"
    done = run_job(tmp_path, setup, srun=srun)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert (done.returncode, calls[-1], done.stderr) == (7, "scontrol requeue 5", "")


@pytest.mark.parametrize("line", ["echo it's", 'echo "', "cat <<EOF", "echo a \\", "if true; then", "( true", "SETUP"])
def test_setup_line_without_its_end_swallows_no_line_of_the_script(line, tmp_path):
    done = run_job(tmp_path, f"launch.slurm.setup={[line]}", srun='test "$DISTOPT_HOSTS" = h1')
    is_reported = "distopt: launch.slurm.setup: " in done.stderr
    assert (done.returncode, is_reported) in ((1, True), (0, False)), done.stderr


@pytest.mark.parametrize("line", ["echo it's", "cat <<EOF", "if true; then"])
def test_setup_line_without_its_end_is_refused(line):
    (finding,) = load_platform("slurm").check(parse_config(BASE, [f"launch.slurm.setup={[line]}"]))
    assert str(finding).startswith("launch.slurm.setup: bash cannot read it: bash: ")


def test_setup_that_bash_can_read_is_not_refused():
    lines = ["shopt -s extglob", "ls !(a|b)", "if true; then", "  echo it\\'s", "fi"]
    assert list(load_platform("slurm").check(parse_config(BASE, [f"launch.slurm.setup={lines}"]))) == []


def test_variables_of_the_run_reach_the_workers_whatever_the_script_calls_its_own(tmp_path):
    assigned = re.findall(r"^\s*(?:export )?([A-Za-z_]+)=", module._SCRIPT, re.MULTILINE)
    assert [name for name in assigned if not name.lower().startswith("distopt_")] == ["SRUN_CPUS_PER_TASK"]
    names = ["PORT", "FIRST_HOST", "hosts", "job", "step", "status", "ended", "requeue", "preempted", *assigned[:1]]
    env = {name: f"of {name}" for name in names}
    done = run_job(tmp_path, f"launch.env={env}", srun="env")
    assert {f"{name}=of {name}" for name in names} <= set(done.stdout.splitlines())


@pytest.mark.parametrize("name", ["UID", "BASHOPTS", "SECONDS"])
def test_variable_that_bash_keeps_for_itself_is_refused(name):
    (finding,) = load_platform("slurm").check(parse_config(BASE, [f"launch.env={{{name}: '1'}}"]))
    assert str(finding) == f"launch.env.{name}: bash keeps this variable for itself; choose another name"


@pytest.mark.parametrize(("port", "job"), [(65000, 999), (65000, 535), (65535, 17), (29400, 1999)])
def test_port_of_a_job_is_one_that_exists(port, job, tmp_path):
    done = run_job(tmp_path, f"launch.port={port}", srun="echo $DISTOPT_PORT", SLURM_JOB_ID=str(job))
    assert port <= int(done.stdout) <= min(port + 999, 65535)


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """Stands for a cluster: an sbatch that refuses what its test says, since the real one is in test_slurm_job.py."""

    def refuse(message: str) -> None:
        program = tmp_path / "sbatch"
        program.write_text(f"#!/bin/sh\ncat > {tmp_path}/script\nprintf %s {shlex.quote(message)} >&2\nexit 1\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.chdir(tmp_path)  # a checkout may hold runs/flights

    return refuse


def test_cluster_is_asked_with_the_script_only_if_nothing_is_wrong_here(sbatch, tmp_path):
    sbatch("sbatch: error: Requested node configuration\n is not available")
    slurm = load_platform("slurm")
    (finding,) = checks.check(parse_config(BASE), slurm)
    assert (
        finding.message == "the cluster refuses the job: sbatch: error: Requested node configuration is not available"
    )
    assert (tmp_path / "script").read_text().startswith("#!/bin/bash\n# distopt: run flights\n")
    (tmp_path / "script").unlink()
    (finding,) = checks.check(parse_config(BASE, ["launch.hosts=[a]"]), slurm)
    assert (finding.subject, (tmp_path / "script").exists()) == ("launch.hosts", False)
    assert checks.check(parse_config(BASE), slurm, dry_run=True) == []
    assert not (tmp_path / "script").exists()


def test_machine_without_sbatch_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    (finding,) = load_platform("slurm").check_machine(parse_config(BASE))
    assert str(finding) == "launch.platform: there is no sbatch on PATH; submit from a login node of the cluster"


@pytest.mark.parametrize(("backend", "tasks", "cpus"), [("auto", 1, 6), ("torch_dist", 1, 6), ("mpi", 3, 2)])
def test_node_gets_one_task_for_torchrun_and_one_per_worker_otherwise(backend, tasks, cpus):
    chosen = [f"reduce.backend={backend}", "launch.workers=3", "launch.slurm={cpus_per_worker: 2}"]
    lines = module.batch_script(parse_config(BASE, chosen)).splitlines()
    assert {f"#SBATCH --ntasks-per-node={tasks}", f"#SBATCH --cpus-per-task={cpus}"} <= set(lines)


@pytest.mark.parametrize(
    ("restarts", "preempted", "requeued", "status"),
    [("0", True, True, 7), ("1", True, True, 7), ("2", True, False, 7), ("0", False, False, 7), ("3", True, False, 1)],
)
def test_job_that_must_yield_is_requeued_as_often_as_is_allowed(restarts, preempted, requeued, status, tmp_path):
    programs = {
        "scontrol": f"echo $* >> {tmp_path}/calls; [ $1 != show ] || echo 'h1 {'PreemptTime=2026-01-01' * preempted}'",
        "srun": f"echo srun >> {tmp_path}/calls; exit 7",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = module.batch_script(parse_config(BASE, ["launch.max_preemptions=2"]))
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": restarts}
    done = subprocess.run(
        ["bash"], input=script, env=variables | {"SLURM_JOB_NODELIST": "h1"}, capture_output=True, text=True, timeout=60
    )
    calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    assert (done.returncode, "requeue 5" in calls) == (status, requeued), done.stderr
    assert ("launch.max_preemptions: requeued more often than 2 times" in done.stderr) == (status == 1)
    is_last = preempted and restarts == "2"
    assert ("launch.max_preemptions: 2 of 2 are used up, so the job is not requeued" in done.stderr) == is_last
    assert ("srun" in calls) == (status == 7)


@pytest.mark.parametrize("pause", ["before its wait", "in its wait", "none"])
@pytest.mark.parametrize("is_stopped", [False, True])
def test_job_has_the_status_of_a_step_that_ends_before_while_or_after_the_script_waits(is_stopped, pause, tmp_path):
    signal = f"kill -USR1 $(cat {tmp_path}/pid); " * is_stopped
    for name, text in {"scontrol": "echo h1", "scancel": "", "srun": f"{signal}exit 7"}.items():
        (tmp_path / name).write_text(
            f"#!/bin/sh\n{'sleep 0.3; ' * (name == 'srun' and pause == 'in its wait')}{text}\n"
        )
        (tmp_path / name).chmod(0o755)
    script = module.batch_script(parse_config(BASE, [])).replace("set -u\n", f"set -u\necho $$ > {tmp_path}/pid\n")
    if pause == "before its wait":
        script = script.replace("distopt_step=$!\n", "distopt_step=$!\nsleep 0.3\n")
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "h1"}
    (tmp_path / "script").write_text(script)
    for _ in range(1 if pause != "none" else 20):
        assert subprocess.run(["bash", tmp_path / "script"], env=variables, timeout=60).returncode == 7
