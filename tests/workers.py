"""Real worlds for tests: processes started by the real launchers, that stay up and run many bodies.

A start costs 3 to 5 s on a small machine, so `world(kind, size)` keeps worlds alive and hands them to every test that
asks; `World.run(body, *args)` calls a module-level function on all its ranks and returns their results in the order of
ranks. A body uses `distopt.backends.current()`. `run_script` starts processes that may die.
"""

from __future__ import annotations

import atexit
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import distopt
from distopt.backends.shared_memory import VARIABLE as SHARED_MEMORY

ROOT = Path(__file__).parent.parent
KINDS = ("torch_dist", "horovod", "horovod-mpi", "mpirun-horovod", "mpi")
WORLDS = [("single", 1), *((kind, size) for kind in ("torch_dist", "horovod", "mpi") for size in (2, 4, 1))]
"""What a property of several ranks is shown on: every backend, with ranks in pairs, in twos of pairs, and alone."""
QUICK_WORLDS = {("single", 1), ("torch_dist", 2), ("torch_dist", 4), ("horovod", 2), ("mpi", 2)}
"""Those of them that start without `--slow` too."""
START_S = 160.0
GRACE_S = 15.0
_ADDRESS = "DISTOPT_TEST_ADDRESS"
_KIND = "DISTOPT_TEST_KIND"


class RankFailed(AssertionError):
    """A body raised on some rank; the message holds that rank's traceback."""


class World:
    """`size` processes started by the launcher of `kind`, each with a distopt backend.

    Args:
        kind: `torch_dist` (plain processes), `torch_dist-network` (the same, without shared memory), `horovod`
            (horovodrun --gloo), `horovod-mpi` (horovodrun --mpi), `mpirun-horovod` (mpirun, Horovod inside), `mpi`
            (mpirun, mpi4py inside).
        size: Number of ranks.
    """

    def __init__(self, kind: str, size: int) -> None:
        self.kind = kind
        self.size = size
        self.broken = False
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(START_S)
            variables = {_ADDRESS: str(listener.getsockname()[1]), _KIND: kind}
            self._started = start(kind, size, [sys.executable, "-m", "tests.workers"], variables)
            self._connections = self._accept(listener)

    def run(self, body: Callable[..., Any], *args: Any, timeout_s: float = 150.0) -> list[Any]:
        """Calls `body(*args)` on every rank, each with an empty parameter store and the noise of seed 0.

        Raises:
            RankFailed: It raised on a rank or did not end in time; the world is ended then.
        """
        assert not self.broken, "this world has ended"
        for connection in self._connections:
            connection.send((body.__module__, body.__qualname__, args))
        deadline, replies = time.monotonic() + timeout_s, {}
        waiting = dict(enumerate(self._connections))
        while waiting and time.monotonic() < deadline:
            ready = wait(list(waiting.values()), timeout=deadline - time.monotonic())
            for rank, connection in list(waiting.items()):
                if connection in ready:
                    del waiting[rank]
                    replies[rank] = _receive(connection)
            if any(not succeeded for succeeded, _ in replies.values()):
                # The others may be waiting for the failed one; give them a moment to fail by themselves.
                deadline = min(deadline, time.monotonic() + 5)
        failed = {rank: text for rank, (succeeded, text) in replies.items() if not succeeded}
        if failed or waiting:
            self.close(kill=True)
            message = "\n".join(f"--- rank {rank} of {self.size}, {self.kind}\n{text}" for rank, text in failed.items())
            late = f"ranks {sorted(waiting)} had not ended after {timeout_s} s" if waiting else ""
            raise RankFailed(f"{body.__qualname__}: {late}\n{message}\n{self._started.output()[-4000:]}")
        return [replies[rank][1] for rank in range(self.size)]

    def close(self, kill: bool = False) -> None:
        """Ends the processes."""
        self.broken = True
        for connection in self._connections:
            connection.close()
        self._started.end(0 if kill else 15)

    def _accept(self, listener: socket.socket) -> list[Connection]:
        connections: dict[int, Connection] = {}
        try:
            while len(connections) < self.size:
                accepted, _ = listener.accept()
                connection = Connection(accepted.detach())
                connections[connection.recv()] = connection
        except TimeoutError:
            self._started.end(0)
            raise RankFailed(
                f"{self.kind}: {len(connections)} of {self.size} ranks came up\n{self._started.output()}"
            ) from None
        return [connections[rank] for rank in range(self.size)]


@dataclass
class Started:
    """Processes that a launcher of a kind has started: one per rank, or the launcher's own."""

    processes: list[subprocess.Popen[bytes]]
    outputs: list[IO[bytes]]
    texts: list[str] = field(default_factory=list)  # once they have ended

    def wait(self, timeout_s: float, grace_s: float = GRACE_S) -> list[int | None]:
        """Returns the exit statuses; None for a process that had to be killed when the time was up.

        Args:
            timeout_s: For the first to end.
            grace_s: For the others after it.
        """
        deadline, statuses = time.monotonic() + timeout_s, []
        for process in self.processes:
            try:
                statuses.append(process.wait(max(0.1, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                statuses.append(None)
            # Once the first has ended, so do the others, unless they never will.
            deadline = min(deadline, time.monotonic() + grace_s)
        self.end(0)
        return statuses

    def end(self, patience_s: float) -> None:
        """Ends all processes: by themselves within `patience_s`, else by SIGKILL."""
        deadline = time.monotonic() + patience_s
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        if not self.texts:
            self.texts = [_read(output) for output in self.outputs]
            for output in self.outputs:
                output.close()

    def output(self, rank: int | None = None) -> str:
        """What one rank, or all, wrote to stdout and stderr."""
        texts = self.texts or [_read(output) for output in self.outputs]
        return "\n".join(texts) if rank is None else texts[rank]


def _read(output: IO[bytes]) -> str:
    output.seek(0)
    return output.read().decode(errors="replace")


def start(kind: str, size: int, argv: Sequence[str], variables: Mapping[str, str] | None = None) -> Started:
    """Starts `argv` on `size` ranks by the launcher of `kind`."""
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{binaries}{os.pathsep}{environment.get('PATH', '')}"
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", **(variables or {})}
    mpirun = [str(binaries / "mpirun"), "-n", str(size), "--oversubscribe", "--bind-to", "none"]
    horovodrun = [str(binaries / "horovodrun"), "-np", str(size)]
    commands: dict[str, list[str]] = {
        "horovod": [*horovodrun, "--gloo"],
        "horovod-mpi": [*horovodrun, "--mpi", "--binding-args=--bind-to none --map-by slot:OVERSUBSCRIBE"],
        "mpirun-horovod": mpirun,
        "mpi": mpirun,
    }
    if kind in commands:
        return Started(*_popen([(*commands[kind], *argv)], [environment]))
    port = str(free_port())
    if kind == "torch_dist-network":
        environment[SHARED_MEMORY] = "0"
    environments = [
        environment
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
        | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": "lo"}
        for rank in range(size)
    ]
    return Started(*_popen([argv] * size, environments))


def run_script(
    kind: str,
    size: int,
    body: Callable[..., Any],
    *args: str,
    timeout_s: float = 150.0,
    grace_s: float = GRACE_S,
    **variables: str,
) -> tuple[list[int | None], Started]:
    """Runs `body(*args)` (strings) once per rank in fresh processes that may die; returns their exit statuses.

    Only `torch_dist` has one status and one output per rank; launchers have one for all.
    """
    script = f"import {body.__module__} as m, sys; m.{body.__qualname__}(*sys.argv[1:])"
    started = start(kind, size, [sys.executable, "-c", script, *args], variables | {_KIND: kind})
    return started.wait(timeout_s, grace_s), started


def backend_name(kind: str | None = None) -> str:
    """The name to give `distopt.init` in a process of `kind`; of this process when None."""
    kind = kind or os.environ[_KIND]
    return "horovod" if "horovod" in kind else kind.removesuffix("-network")


_worlds: dict[tuple[str, int], World] = {}


def world(kind: str, size: int) -> World:
    """Returns a running world, started anew when a test has broken it.

    Of the kinds that poll while they are idle (Horovod, MPI) one world lives at a time.
    """
    for wanted, each in _worlds.items():
        polls = not kind.startswith("torch_dist") and not wanted[0].startswith("torch_dist")
        if polls and wanted != (kind, size) and not each.broken:
            each.close()
    running = _worlds.get((kind, size))
    if running is None or running.broken:
        running = _worlds[kind, size] = World(kind, size)
    return running


@dataclass(frozen=True)
class Ranks:
    """Ranks that run bodies: those of a world, or this process alone for the kind `single`."""

    kind: str
    size: int

    def run(self, body: Callable[..., Any], *args: Any) -> list[Any]:
        """Returns what `body(*args)` returns on each rank."""
        if self.kind != "single":
            return world(self.kind, self.size).run(body, *args, timeout_s=90)
        backend = distopt.init("single")
        try:
            return [body(*args)]
        finally:
            backend.close()

    def run_alike(self, body: Callable[..., Any], *args: Any) -> None:
        """Runs `body(*args)`, whose checks must pass and whose results must be the same on every rank."""
        results = self.run(body, *args)
        assert all(result == results[0] for result in results)


@atexit.register
def close_worlds() -> None:
    """Ends all worlds."""
    for each in _worlds.values():
        if not each.broken:
            each.close()


def free_port() -> int:
    """Returns a port of the loopback interface that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _popen(
    commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]]
) -> tuple[list[subprocess.Popen[bytes]], list[IO[bytes]]]:
    outputs: list[IO[bytes]] = [TemporaryFile() for _ in commands]
    processes = [
        subprocess.Popen(
            list(command),
            env=dict(environment),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for command, environment, output in zip(commands, environments, outputs, strict=True)
    ]
    return processes, outputs


def _receive(connection: Connection) -> tuple[bool, Any]:
    try:
        return connection.recv()
    except (EOFError, OSError):
        return False, "the process ended"


def _serve() -> None:
    """One rank: runs what the test process sends until that hangs up."""
    import pyro

    backend = distopt.init(backend_name())
    with socket.create_connection(("127.0.0.1", int(os.environ[_ADDRESS]))) as link:
        connection = Connection(link.detach())
    connection.send(backend.rank)
    while True:
        try:
            module, name, args = connection.recv()
        except (EOFError, OSError):
            backend.close()
            return
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        try:
            reply = (True, getattr(importlib.import_module(module), name)(*args))
        except Exception:
            reply = (False, traceback.format_exc())
        connection.send(reply)


if __name__ == "__main__":
    _serve()
