"""Slurm: one batch script, with torchrun on each node under srun, or srun starting workers of Horovod and MPI."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator

from distopt.config import RunConfig
from distopt.launchers import HOSTS_VARIABLE, LOGS, RENDEZVOUS_PORT, format_range

from ...findings import Finding
from ...plan import Command, Plan, env_of_workers, run_files, worker_argv
from ..base import Platform, check_gpus
from ..torchrun import FRESH_STORE, torchrun_argv
from .job import BATCH_LOG, SlurmJob

SCRIPT = "job.sh"
TIMEOUT_S = 60


class SlurmPlatform(Platform):
    """Submits a batch job; the cluster finds the nodes."""

    finds_hosts = True

    def check(self, config: RunConfig) -> Iterator[Finding]:
        """Yields what would keep the job from being submitted; if nothing here does, the cluster is asked."""
        findings = list(self._check_here(config))
        yield from findings or self._check_with_cluster(config)

    def _check_here(self, config: RunConfig) -> Iterator[Finding]:
        if config.launch.hosts:
            yield Finding("launch.hosts", "Slurm finds the hosts itself", "set launch.nodes to their number")
        if config.reduce.backend == "single":
            yield Finding("reduce.backend", "found single, a world of one worker", "set reduce.backend=auto")
        yield from check_gpus(config, "launch.slurm.gpus_per_node", config.launch.slurm.gpus_per_node)
        if shutil.which("sbatch") is None:
            yield Finding("launch.platform", "there is no sbatch on PATH", "submit from a login node of the cluster")

    def _check_with_cluster(self, config: RunConfig) -> Iterator[Finding]:
        """Asks the cluster whether it would take the job: more processes than slots, an unknown partition, …."""
        argv = ["sbatch", "--test-only", *_options(config)]
        done = subprocess.run(argv, input=_script(config), capture_output=True, text=True, timeout=TIMEOUT_S)
        if done.returncode:
            message = " ".join(done.stderr.split())[:300]
            yield Finding(
                "launch.slurm",
                f"the cluster refuses the job: {message}",
                "`sinfo -o '%P %D %c %m %l'` shows what it has",
            )

    def plan(self, config: RunConfig) -> Plan:
        """Renders the batch script and the command that submits it."""
        path = config.run_dir / SCRIPT
        argv = ["sbatch", "--parsable", *_options(config), "--", str(path)]
        return Plan("slurm", (Command(tuple(argv)),), {**run_files(config), path: _script(config)})

    def job(self, config: RunConfig) -> SlurmJob:
        """Returns the run on the cluster, submitted or not."""
        return SlurmJob(config.run_dir, self.plan(config).commands[0].argv)


def _is_torchrun(config: RunConfig) -> bool:
    """Returns whether torchrun starts the workers, one task per node; otherwise each worker is a task of srun."""
    return config.reduce.backend in ("auto", "torch_dist")


def _options(config: RunConfig) -> list[str]:
    """Returns sbatch's options; they go on the command line, where spaces and quotes in values need no care."""
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
    }

    # Slurm replaces %j and the like in the path of the log. A job that was requeued continues the log of its first try.
    log_folder = str(config.run_dir.resolve() / LOGS).replace("%", "%%")
    return [
        f"--job-name={config.name}",
        f"--nodes={format_range(launch.host_counts).replace(':', '-')}",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={cpus}",
        f"--chdir={os.getcwd()}",
        f"--output={log_folder}/{BATCH_LOG}",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{slurm.requeue_before_end_s}",
        *(f"--{key}={value}" for key, value in optional.items() if value is not None),
    ]


def _script(config: RunConfig) -> str:
    """Returns the batch script.

    Slurm sends USR1 before it ends or preempts the job: workers save, and the job queues again. The step runs in the
    background, because a shell handles no signal while it waits for a command.
    """
    env = env_of_workers(config, **(FRESH_STORE if _is_torchrun(config) else {}))
    exports = "\n".join(f"export {key}={shlex.quote(value)}" for key, value in sorted(env.items()))
    return _SCRIPT.format(
        name=config.name,
        exports=exports,
        step=_step(config),
        hosts=HOSTS_VARIABLE,
        port=config.launch.port or RENDEZVOUS_PORT,
    )


def _step(config: RunConfig) -> str:
    """Returns srun's command line, quoted for a shell."""
    srun = ["srun", "--kill-on-bad-exit=1", "--unbuffered"]
    if not _is_torchrun(config):
        return shlex.join([*srun, f"--mpi={config.launch.slurm.mpi}", *worker_argv(config, sys.executable)])

    torchrun = torchrun_argv(config, [f"--nnodes={format_range(config.launch.host_counts)}", "--rdzv-backend=c10d"])
    program, options = torchrun[:3], torchrun[3:]
    agent = shlex.join([sys.executable, "-m", "distopt.launch.worker.host_agent", "--", *program])

    # These variables differ between nodes, so a shell on each node expands them, and they stand outside of the quotes.
    rendezvous = '--rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$FIRST_HOST:$PORT" --local-addr="$SLURMD_NODENAME"'
    is_host = "--rdzv-conf=is_host=$((SLURM_NODEID == 0))"
    return shlex.join([*srun, "bash", "-c", f"exec {agent} {rendezvous} {is_host} {shlex.join(options)}"])


# Two jobs may run on one node, so the port depends on the job's number. The step's shells read FIRST_HOST and PORT.
_SCRIPT = """\
#!/bin/bash
# distopt: run {name}
set -u
{exports}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export {hosts}=$(echo "$hosts" | paste -sd ,)
export FIRST_HOST=$(echo "$hosts" | head -n 1)
export PORT=$(({port} + SLURM_JOB_ID % 1000))

# Before the time limit or a preemption: save a last checkpoint, then requeue the job.
requeue=
save() {{
  requeue=1
  scancel --signal=TERM "$SLURM_JOB_ID"
}}
trap save USR1

{step} &
step=$!
status=0
while kill -0 "$step" 2> /dev/null; do
  wait "$step"
  status=$?
done
# A preemption with a time of grace signals the workers alone, and Slurm requeues no job that has ended by itself.
preempted='PreemptTime=[0-9]'
if [ -n "$requeue" ] || [[ $(scontrol show job "$SLURM_JOB_ID") =~ $preempted ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""
