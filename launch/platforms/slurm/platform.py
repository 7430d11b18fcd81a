"""Slurm: a batch script that is submitted from here."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping

from distopt.config import RunConfig
from distopt.launchers import LOGS

from ...findings import Finding
from ...plan import Command, Plan, run_files
from ..base import Platform, check_gpus
from .array import SlurmArray, make_array
from .job import SlurmJob
from .owned_options import check_options
from .script import SCRIPT, batch_script, rendezvous_ports

TIMEOUT_S = 60

# Variables that bash does not let a script set, or sets itself, so that what a script exports reaches nobody.
_VARIABLES_OF_BASH = frozenset(
    "BASHOPTS BASHPID BASH_ALIASES BASH_ARGC BASH_ARGV BASH_CMDS BASH_COMMAND BASH_LINENO BASH_SOURCE BASH_SUBSHELL "
    "BASH_VERSINFO DIRSTACK EPOCHREALTIME EPOCHSECONDS EUID FUNCNAME GROUPS HISTCMD IFS LINENO OLDPWD OPTIND PPID PWD "
    "RANDOM SECONDS SHELLOPTS SHLVL SRANDOM UID _".split()
)


class SlurmPlatform(Platform):
    """Submits a batch job; the cluster finds the nodes."""

    finds_hosts = True

    def check(self, config: RunConfig) -> Iterator[Finding]:
        """Yields what keeps the run from being a job of Slurm."""
        if config.launch.hosts:
            yield Finding("launch.hosts", "Slurm finds the hosts itself", "set launch.nodes to their number")
        if config.reduce.backend == "single":
            yield Finding("reduce.backend", "found single, a world of one worker", "set reduce.backend=auto")
        slurm = config.launch.slurm
        yield from check_options(slurm)
        yield from _check_times(config)
        yield from _check_mounts(config)
        yield from _check_ports(config)
        yield from _check_setup(slurm.setup)
        yield from _check_env(config.launch.env)
        yield from check_gpus(config, "launch.slurm.gpus_per_node", slurm.gpus_per_node)
        if slurm.gpus_per_node and slurm.gres:
            yield Finding("launch.slurm.gres", "found gpus_per_node too", "remove one of them")
        if not os.getcwd().isprintable() or not str(config.run_dir).isprintable():
            yield Finding(
                "run_dir",
                f"{os.getcwd()!r} and {str(config.run_dir)!r} are written on lines of the batch script",
                "use folders without control characters in their names",
            )

    def check_machine(self, config: RunConfig) -> Iterator[Finding]:
        """Yields that Slurm's client is not here."""
        if shutil.which("sbatch") is None:
            yield Finding("launch.platform", "there is no sbatch on PATH", "submit from a login node of the cluster")

    def check_hosts(self, config: RunConfig) -> Iterator[Finding]:
        """Asks the cluster whether it would take the job: more processes than slots, an unknown partition, …."""
        argv = ["sbatch", "--test-only"]
        try:
            done = subprocess.run(argv, input=batch_script(config), capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            yield Finding("launch.platform", f"sbatch gave no answer within {TIMEOUT_S} s", "does `sinfo` work?")
            return
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
        files = {**run_files(config), path: batch_script(config)}
        submit = Command(("sbatch", "--parsable", "--", str(path)))
        return Plan("slurm", (submit,), files, folders=(config.run_dir / LOGS,))

    def job(self, config: RunConfig) -> SlurmJob:
        """Returns the run on the cluster, submitted or not."""
        return SlurmJob(config.run_dir, self.plan(config).commands[0].argv)

    def array(self, name: str, prefix: str, runs: Mapping[int, RunConfig], parallel: int) -> SlurmArray | None:
        """Returns the runs as a job array, unless they ask for different resources."""
        return make_array(name, prefix, runs, parallel)

    def image(self, config: RunConfig) -> str | None:
        """Returns the image of the workers' container, if they have one."""
        container = config.launch.slurm.container
        return None if container is None else container.image


def _check_setup(lines: list[str]) -> Iterator[Finding]:
    """Yields that bash cannot read the lines: a quote that is not closed, say, or a here-document without its end."""
    if not lines or shutil.which("bash") is None:
        return
    # With extglob, which a line may switch on; in C, so that it does not warn of a locale that is not here.
    argv = ["bash", "--norc", "-O", "extglob", "-n"]
    env = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"}
    done = subprocess.run(
        argv, input="\n".join(lines) + "\n", env=env, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    if done.returncode or done.stderr:
        message = " ".join(done.stderr.split())[:300]
        yield Finding("launch.slurm.setup", f"bash cannot read it: {message}", "write whole commands")


def _check_times(config: RunConfig) -> Iterator[Finding]:
    """Yields that the job would be requeued as soon as it starts, or killed while its workers save."""
    before_end_s = config.launch.slurm.requeue_before_end_s
    limit_s = _seconds(config.launch.slurm.time)
    if limit_s and limit_s <= before_end_s:
        message = f"found {before_end_s}, but launch.slurm.time={config.launch.slurm.time} gives the job {limit_s} s"
        yield Finding("launch.slurm.requeue_before_end_s", message, "set a smaller one, or a longer time")
    if config.launch.grace_s >= before_end_s:
        message = (
            f"found {config.launch.grace_s:g}, but the job may end {before_end_s} s after workers are told to save"
        )
        fix = f"set launch.slurm.requeue_before_end_s={int(config.launch.grace_s) + 30}, or a shorter grace_s"
        yield Finding("launch.grace_s", message, fix, severity="warning")


def _seconds(time: str | None) -> int | None:
    """Returns a time limit of sbatch in seconds, where 0 is none; None for one that is not written as a number."""
    if time is None or not time[0].isdigit():
        return None
    days, dash, rest = time.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    # One number is minutes, two are minutes and seconds; behind days they are hours, or hours and minutes.
    first = {1: 60, 2: 60, 3: 3600}[len(numbers)] if not dash else 3600
    units = [first, first // 60, first // 3600]
    return int(days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def _check_mounts(config: RunConfig) -> Iterator[Finding]:
    """Yields the folders that a container cannot be given, since its runtime splits mounts at these characters."""
    if config.launch.slurm.container is None:
        return
    for key, folder in {"launch.slurm.container": os.getcwd(), "run_dir": str(config.run_dir.resolve())}.items():
        if set(",:") & set(folder):
            message = f"{folder} is mounted in the container, which takes no comma or colon in its name"
            yield Finding(key, message, "use a folder without them")


def _check_ports(config: RunConfig) -> Iterator[Finding]:
    """Yields that workers would serve at a port that the rendezvous of some jobs takes."""
    first = config.serve.port
    ports = rendezvous_ports(config)
    if first is not None and ports[0] < first <= ports[-1]:  # the first one is launch.port, which all platforms check
        message = f"workers serve from {first}, and a job takes one of {ports[0]} to {ports[-1]} for launch.port"
        yield Finding("serve.port", message, "set another one")


def _check_env(env: Mapping[str, str]) -> Iterator[Finding]:
    """Yields the variables that workers would not get, since the batch script exports them and bash refuses to."""
    for name in sorted(_VARIABLES_OF_BASH & env.keys()):
        yield Finding(f"launch.env.{name}", "bash keeps this variable for itself", "choose another name")
