"""The batch script: torchrun on each node under srun, or srun starting workers of Horovod and MPI.

Everything stands in the script, the options of sbatch as `#SBATCH` lines, so that `sbatch job.sh` by hand is the same
job.
"""

from __future__ import annotations

import os
import re
import shlex
import sys

from distopt.config import RunConfig
from distopt.launchers import HOSTS_VARIABLE, LOGS, MAX_PORT, RENDEZVOUS_PORT, format_range

from ...plan import delimiter, env_of_workers, worker_argv
from ..torchrun import FRESH_STORE, torchrun_argv
from .job import BATCH_LOG

SCRIPT = "job.sh"


def batch_script(config: RunConfig) -> str:
    """Returns the batch script.

    Slurm sends USR1 before it ends or preempts the job: workers save, and the job queues again. The step runs in the
    background, because a shell handles no signal while it waits for a command.
    """
    env = _env(config)
    ports = rendezvous_ports(config)
    return _SCRIPT.format(
        name=config.name,
        options="\n".join(f"#SBATCH {quote_option(option)}" for option in options_of(config)),
        setup=_setup(config.launch.slurm.setup),
        exports="\n".join(f"export {key}={shlex.quote(value)}" for key, value in sorted(env.items())),
        step=_step(config),
        limit=_limit(config.launch.max_preemptions),
        spent=_spent(config.launch.max_preemptions),
        hosts=HOSTS_VARIABLE,
        port=ports[0],
        num_ports=len(ports),
    )


def _is_torchrun(config: RunConfig) -> bool:
    """Returns whether torchrun starts the workers, one task per node; otherwise each worker is a task of srun."""
    return config.reduce.backend in ("auto", "torch_dist")


def rendezvous_ports(config: RunConfig) -> range:
    """Returns the ports of which a job takes one for its rendezvous."""
    port = config.launch.port or RENDEZVOUS_PORT
    return range(port, min(port + 1000, MAX_PORT + 1))


def _env(config: RunConfig) -> dict[str, str]:
    return env_of_workers(config, **(FRESH_STORE if _is_torchrun(config) else {}))


def quote_option(option: str) -> str:
    """Quotes what sbatch would take for quotes, comments and ends of words; its backslash does not escape a space."""
    if not re.search(r"[\s\\'\"#]", option):
        return option
    return '"' + re.sub(r'(["\\])', r"\\\1", option) + '"'


def options_of(config: RunConfig) -> list[str]:
    """Returns sbatch's options: those of this run, then those that runs of a sweep may have in common."""
    # Slurm replaces %j and the like in the path of the log. A job that was requeued continues the log of its first try.
    log_folder = str(config.run_dir.resolve() / LOGS).replace("%", "%%")
    return [f"--job-name={config.name}", f"--output={log_folder}/{BATCH_LOG}", *common_options(config)]


def common_options(config: RunConfig) -> list[str]:
    """Returns sbatch's options but for the name of the job and its log; the user's come last, so that they win."""
    launch = config.launch
    slurm = config.launch.slurm

    # With torchrun a task is a node, and has the cores of all its workers.
    tasks = 1 if _is_torchrun(config) else launch.workers
    cpus = slurm.cpus_per_worker * (launch.workers if _is_torchrun(config) else 1)

    optional = {
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": slurm.time,
        "mem": slurm.memory,
        "constraint": slurm.constraint,
        "gpus-per-node": slurm.gpus_per_node or None,
        "gres": slurm.gres,
        "nodelist": slurm.nodelist,
        "exclude": slurm.exclude,
        "reservation": slurm.reservation,
        "licenses": slurm.licenses,
        "mail-type": ",".join(slurm.mail_type) or None,
        "mail-user": slurm.mail_user,
    }

    return [
        f"--nodes={format_range(launch.host_counts).replace(':', '-')}",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={cpus}",
        f"--chdir={os.getcwd()}",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{slurm.requeue_before_end_s}",
        *(f"--{key}={value}" for key, value in optional.items() if value is not None),
        *(["--exclusive"] if slurm.exclusive else []),
        *slurm.extra_args,
    ]


def _setup(lines: list[str]) -> str:
    """Returns the user's lines. A job on nodes without its modules would fail later, and say something else."""
    if not lines:
        return ""
    text = "\n".join(lines)
    # A file that a line sources may have commands that fail within, and counts by its own status.
    failed = "launch.slurm.setup: $BASH_COMMAND failed on $(hostname) with exit status $distopt_status"
    trap = f'distopt_status=$?; [ ${{#BASH_SOURCE[@]}} -gt 1 ] || {{ echo "distopt: {failed}" >&2; exit 1; }}'
    return _SETUP.format(text=text, end=delimiter(text, "SETUP"), trap=trap)


# As text the lines cannot swallow those after them, as an open quote would. Options that they set, such as `set -e`,
# would end the script where its step fails or a signal comes.
_SETUP = """
distopt_options=$(set +o; shopt -p)
IFS= read -r -d '' distopt_setup <<'{end}'
{text}
{end}
trap '{trap}' ERR
eval "$distopt_setup"
trap - ERR DEBUG RETURN
eval "$distopt_options"
unset IFS
"""


def _limit(max_preemptions: int | None) -> str:
    """Returns lines that end a job which Slurm has requeued once too often; it does so by itself, too."""
    if max_preemptions is None:
        return ""
    message = f"launch.max_preemptions: requeued more often than {max_preemptions} times"
    return f"""
if [ "${{SLURM_RESTART_COUNT:-0}}" -gt {max_preemptions} ]; then
  echo "distopt: {message}" >&2
  exit 1
fi
"""


def _spent(max_preemptions: int | None) -> str:
    """Returns lines that leave the script, which would requeue the job, where it has been as often as it may."""
    if max_preemptions is None:
        return ""
    message = f"launch.max_preemptions: {max_preemptions} of {max_preemptions} are used up, so the job is not requeued"
    return f"""
  if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {max_preemptions} ]; then
    echo "distopt: {message}" >&2
    exit "${{distopt_status:-1}}"
  fi"""


# The step.


def _step(config: RunConfig) -> str:
    """Returns srun's command line, quoted for a shell."""
    slurm = config.launch.slurm
    python = sys.executable if slurm.container is None else slurm.container.python
    mpi = [] if _is_torchrun(config) else [f"--mpi={slurm.mpi}"]
    srun = ["srun", "--kill-on-bad-exit=1", "--unbuffered", *mpi, *_pyxis(config), *slurm.srun_args]
    if not _is_torchrun(config):
        return shlex.join([*srun, *_apptainer(config), *worker_argv(config, python)])

    nodes = [f"--nnodes={format_range(config.launch.host_counts)}", "--rdzv-backend=c10d"]
    torchrun = torchrun_argv(config, nodes, worker_argv(config, python), python)
    program = torchrun[:3]
    options = torchrun[3:]
    agent = shlex.join([*_apptainer(config), python, "-m", "distopt.launch.worker.host_agent", "--", *program])

    # These variables differ between nodes, so a shell on each node expands them, and they stand outside of the quotes.
    rendezvous = (
        '--rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$DISTOPT_FIRST_HOST:$DISTOPT_PORT" --local-addr="$SLURMD_NODENAME"'
    )
    is_host = "--rdzv-conf=is_host=$((SLURM_NODEID == 0))"
    return shlex.join([*srun, "bash", "-c", f"exec {agent} {rendezvous} {is_host} {shlex.join(options)}"])


# Containers. The paths of a run are those of this machine: the folder of the command and the run directory are mounted
# where they are, and the rest of the environment is the image's.


def _mounts(config: RunConfig) -> list[str]:
    container = config.launch.slurm.container
    assert container is not None
    folders = dict.fromkeys([os.getcwd(), str(config.run_dir.resolve())])
    return [*(f"{folder}:{folder}" for folder in folders), *container.mounts]


def _pyxis(config: RunConfig) -> list[str]:
    container = config.launch.slurm.container
    if container is None or container.runtime != "pyxis":
        return []
    return [
        f"--container-image={container.image}",
        # Pyxis takes a mount without a target for a mistake.
        f"--container-mounts={','.join(mount if ':' in mount else f'{mount}:{mount}' for mount in _mounts(config))}",
        f"--container-workdir={os.getcwd()}",
        # Variables of the image would win over those of the job.
        f"--container-env={','.join(sorted(_env(config)))}",
        *container.extra_args,
    ]


def _apptainer(config: RunConfig) -> list[str]:
    container = config.launch.slurm.container
    if container is None or container.runtime != "apptainer":
        return []
    slurm = config.launch.slurm
    gpus = ["--nv"] if slurm.gpus_per_node or (slurm.gres or "").startswith("gpu") else []
    binds = [argument for mount in _mounts(config) for argument in ("--bind", mount)]
    return ["apptainer", "exec", *gpus, *binds, "--pwd", os.getcwd(), *container.extra_args, container.image]


# Two jobs may run on one node, so the port depends on the job's number. The step's shells read DISTOPT_FIRST_HOST and
# DISTOPT_PORT. Variables of the run come last, since they override all others, and the script's own are called
# distopt_…, so that none is overwritten.
_SCRIPT = """\
#!/bin/bash
# distopt: run {name}
{options}
{limit}{setup}
set -u
# By itself srun gives each task one core since Slurm 22.05, whatever sbatch was asked for.
export SRUN_CPUS_PER_TASK=${{SLURM_CPUS_PER_TASK:-1}}

distopt_hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export {hosts}=$(echo "$distopt_hosts" | paste -sd ,)
export DISTOPT_FIRST_HOST=$(echo "$distopt_hosts" | head -n 1)
export DISTOPT_PORT=$(({port} + SLURM_JOB_ID % {num_ports}))

# One task of an array has the number of the array, which would mean all of its tasks. A job that was submitted from
# within the task of another one has inherited the number of that array, which is never its own.
distopt_job=$SLURM_JOB_ID
if [ "${{SLURM_ARRAY_JOB_ID:-}}" = "$distopt_job" ]; then
  distopt_job=${{distopt_job}}_$SLURM_ARRAY_TASK_ID
fi

# Before the time limit or a preemption: save a last checkpoint, then requeue the job.
distopt_requeue=
distopt_save() {{
  distopt_requeue=1
  scancel --signal=TERM "$distopt_job"
}}
trap distopt_save USR1

{exports}

# Where a signal and the end of the step meet, bash loses the status that its wait should give, so it is written down.
distopt_ended=$(mktemp)
{{ {step}; echo $? > "$distopt_ended"; }} &
distopt_step=$!
while kill -0 "$distopt_step" 2> /dev/null; do
  wait "$distopt_step"
done
distopt_status=$(cat "$distopt_ended")
rm "$distopt_ended"
# A preemption with a time of grace signals the workers alone, and Slurm requeues no job that has ended by itself.
distopt_preempted='PreemptTime=[0-9]'
if [ -n "$distopt_requeue" ] || [[ $(scontrol show job "$distopt_job") =~ $distopt_preempted ]]; then{spent}
  scontrol requeue "$distopt_job"
fi
exit "${{distopt_status:-1}}"
"""
