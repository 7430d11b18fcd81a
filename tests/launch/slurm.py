"""A real Slurm on the emulated hosts: munged, slurmctld on the first host, slurmd on each."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from tests.launch.hosts import Hosts

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "sinfo", "setpriv")
CONF = """
ClusterName=test
SlurmctldHost={names[0]}({addresses[0]})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmdTimeout=8
KillWait=5
UnkillableStepTimeout=20
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
TmpFS={folder}/tmp.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str | None:
    """Returns what this machine lacks for a Slurm, or None."""
    path = os.environ.get("PATH", "") + ":/usr/sbin"
    lacking = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    return f"{', '.join(lacking)} missing (Debian: slurmctld slurmd slurm-client munge)" if lacking else None


class Cluster:
    """Slurm over some hosts; `env` is what its commands need."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        # Not pytest's own folder, which the user munge may not enter.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.env = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._running: list[subprocess.Popen] = []

    def __enter__(self) -> Cluster:
        self.folder.chmod(0o755)
        (self.folder / "munge").mkdir(mode=0o755)
        (self.folder / "state").mkdir()
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        user = pwd.getpwnam("munge")
        for path in (key, key.parent):
            os.chown(path, user.pw_uid, user.pw_gid)
        files = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munge = [f"--{option}={self.folder}/munge/{name}" for option, name in files.items()]
        as_munge = ["setpriv", "--reuid", "munge", "--regid", "munge", "--clear-groups"]
        self._start([*as_munge, "/usr/sbin/munged", "--force", "--foreground", *munge])
        nodes = [
            f"NodeName={name} NodeAddr={address} CPUs=2 RealMemory=4000\n"
            for name, address in zip(self.hosts.names, self.hosts.addresses, strict=True)
        ]
        text = CONF.format(names=self.hosts.names, addresses=self.hosts.addresses, folder=self.folder)
        (self.folder / "slurm.conf").write_text("".join(nodes) + text)
        conf = str(self.folder / "slurm.conf")
        self._start(self.hosts.run(1, "/usr/sbin/slurmctld", "-D", "-c", "-f", conf))
        for number, name in enumerate(self.hosts.names, start=1):
            (self.folder / f"spool.{name}").mkdir()
            (self.folder / f"tmp.{name}").mkdir()  # PMIx keeps one folder per job in it, and hosts here share /tmp
            self._start(self.hosts.run(number, "/usr/sbin/slurmd", "-D", "-f", conf))
        end = time.monotonic() + 60
        while self.ask("sinfo", "-h", "-o", "%D %t").strip() != f"{self.hosts.count} idle":
            assert time.monotonic() < end, (self.folder / "slurmctld.log").read_text()[-3000:]
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        self.ask("scancel", "--user=root")
        for process in reversed(self._running):
            process.terminate()
        for process in self._running:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)

    def ask(self, *argv: str) -> str:
        """Runs one of Slurm's commands on the first host and returns what it says."""
        done = subprocess.run(
            self.hosts.run(1, *argv), capture_output=True, text=True, timeout=60, env={**os.environ, **self.env}
        )
        return done.stdout

    def _start(self, argv: list[str]) -> None:
        with (self.folder / "daemons.log").open("a") as log:
            self._running.append(
                subprocess.Popen(argv, env={**os.environ, **self.env}, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            )
