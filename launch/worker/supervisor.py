"""Stands between a launcher and one worker: `python -m distopt.launch.worker.supervisor RUN_DIR -- COMMAND…`.

It keeps the worker's log, passes one request to stop on, kills what has not ended in time, takes the worker with it
when the launcher dies, and records when the worker ended and how (`events.End`), so that on every platform the same
report says which rank died first.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO

from distopt.cgroups import available_cores
from distopt.launchers import (
    CWD_VARIABLE,
    ECHO_VARIABLE,
    ERROR_FILE_VARIABLE,
    GRACE_VARIABLE,
    PREEMPTION_VARIABLE,
    RUN_DIR_VARIABLE,
    STDIN_SECRETS_VARIABLE,
    STOP_FILE,
    WATCH_STOP_VARIABLE,
    WORLD_SIZE_VARIABLE,
    LauncherError,
    RankInfo,
    count_restarts,
    find_rank,
    parse_range,
)
from distopt.worker_error import WorkerError, read_error

from . import devices, elastic, events, rank_log, terminal
from .network import library_env
from .processes import REQUESTS, die_with_parent, heeded
from .streams import read_secrets

POLL_S = 0.5

# `distopt launch` hears of a preemption too, and stops the workers of all hosts. Where there is none, each supervisor
# stops its own; not at once, since a launcher that sees workers end without having been asked starts them again.
LAUNCHER_DELAY_S = 2.0
WRONG_WORLD_SIZE = 3
"""Exit status where the launcher started another number of workers than the run allows."""

NO_FURTHER_ATTEMPT = 4
"""Exit status where the worker is not started again, since it would end in the same error."""

LIBRARY_SETTINGS = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
}
"""Variables of a worker that its environment does not set, as `launch.env` may.

Threads of OpenMP that wait give up their core, which other workers need. Memory of freed tensors stays with the process
for the next step, instead of being mapped and cleared again: it shows in its size until the process ends.
"""

TERMINATION_LOG = Path("/dev/termination-log")
TERMINATION_LOG_BYTES = 3000  # of the 4096 that Kubernetes keeps


class Supervisor:
    """What supervises one worker, from its start to its end.

    Only elastic Horovod starts a worker again below the same supervisor, which asks for its next rank; every other
    launcher starts the supervisor again as well.

    Args:
        run_dir: The run directory, where logs and events are kept.
        command: The worker's command.

    Attributes:
        launcher: What started this process.
        rank: The worker's rank.
        world_size: The number of workers.
        local_size: Those of them on this host, as far as the launcher says.
        local_rank: The worker's number among those.
        attempt: How often the workers had been started before.
        asked_to_stop: Whether this worker is to end for good.
        has_permanent_error: Whether it ended by an error that another attempt would end in as well.
    """

    def __init__(self, run_dir: Path, command: Sequence[str]) -> None:
        self._read_rank()
        self.command = list(command)
        self.run_dir = run_dir
        self.attempt = count_restarts()
        self.grace_s = float(os.environ.get(GRACE_VARIABLE, "30"))
        self.stop_file = run_dir / STOP_FILE if WATCH_STOP_VARIABLE in os.environ else None
        self._preemption_file = _preemption_file()
        self._stop_at = float("inf")
        self.asked_to_stop = False
        self.has_permanent_error = False

        self._secrets = read_secrets() if STDIN_SECRETS_VARIABLE in os.environ else {}
        self._is_elastic = elastic.is_elastic(os.environ)
        self._round = 0
        self._signalled = False  # the worker of this attempt, to save and end
        self._kill_at = float("inf")
        self._check_files_at = 0.0
        self._oom_kills = events.oom_kills()

        # A signal, the end of the worker among them, becomes a byte in a pipe. So one `select` waits for signals and
        # for output alike, and no signal is lost between two looks at a flag.
        self._wake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, *heeded(REQUESTS), signal.SIGCHLD):
            signal.signal(number, lambda *_: None)

    def run(self) -> int:
        """Runs the worker to its end and returns its exit status, negative for a signal."""
        status = self._run_attempt()

        # A worker that was killed, but not from here, is left to horovodrun: its host may be unfit for another.
        while self._is_elastic and self._may_continue and (status > 0 or (status and self._signalled)):
            variables = elastic.next_rank(os.environ, self._wait_while_wanted)
            if not variables:
                break
            os.environ.update(variables)
            self._read_rank()
            self.attempt += 1
            status = self._run_attempt()
        return status

    @property
    def _may_continue(self) -> bool:
        return not self.asked_to_stop and not self.has_permanent_error

    def _read_rank(self) -> None:
        """Takes the rank and world size from whichever launcher started this process; alone it is rank 0 of 1."""
        rank_info = find_rank() or RankInfo("by hand", 0, 1)
        self.launcher = rank_info.launcher
        self.rank = rank_info.rank
        self.world_size = rank_info.world_size
        self.local_size = rank_info.local_size or 1
        self.local_rank = rank_info.local_rank or 0

    def _wait_while_wanted(self) -> bool:
        """Waits a moment; false when this worker has been asked to stop."""
        if select.select([self._wake], [], [], POLL_S)[0] and self._read_signals():
            self.asked_to_stop = True
        return not self.asked_to_stop and not (self.stop_file is not None and self.stop_file.exists())

    def _read_signals(self) -> set[int]:
        """Empties the pipe, and returns the requests to stop that were in it."""
        return set(os.read(self._wake, 512)) & set(REQUESTS)

    def _run_attempt(self) -> int:
        self._signalled = False
        self._kill_at = float("inf")
        if self._is_elastic and (number := elastic.read_round(self.run_dir)[0]):
            self._round = number
            self.attempt = number - 1

        with rank_log.RankLog(self.run_dir, self.rank, self._report_unwritable) as log:
            # Not recorded as an attempt: the report is of the one before, whose traceback is the last in the log.
            if self._refuse_attempt(log):
                self.has_permanent_error = True
                return NO_FURTHER_ATTEMPT
            log.write(rank_log.header(self.rank, self.world_size, self.attempt))
            self._record(events.Start)
            status = WRONG_WORLD_SIZE if self._refuse_world_size(log) else self._run_worker(log)
        self._record(events.End, status)
        return status

    @property
    def _error_file(self) -> Path:
        # Of this process: an attempt that ends late must not write into the file of the next one.
        return events.error_file(self.run_dir.absolute(), self.rank, os.getpid())

    def _take_error(self) -> WorkerError | None:
        """Returns the error that the worker has recorded, and removes the record."""
        error = read_error(self._error_file)
        with suppress(OSError):
            self._error_file.unlink()
        return error

    def _refuse_world_size(self, log: rank_log.RankLog) -> bool:
        """Refuses a world of another size than the run's: a launcher may continue with fewer workers, and exit 0."""
        allowed = os.environ.get(WORLD_SIZE_VARIABLE)
        if not allowed or self.world_size in parse_range(allowed):
            return False
        log.write(
            f"distopt: the launcher started {self.world_size} worker(s), expected {parse_range(allowed)[0]}. "
            "Did a host not join? launch.min_hosts allows a world of changing size. "
            "Does a platform of your own set RANK and WORLD_SIZE?\n".encode()
        )
        return True

    def _refuse_attempt(self, log: rank_log.RankLog) -> bool:
        """Refuses to start a worker again where the attempt before has ended by an error that would come again.

        `distopt launch` ends such a run itself. In a pod, say, torchrun is alone, and restarts whatever the status was.
        """
        if self.attempt == 0:
            return False
        ends: dict[int, events.End] = {}
        for event in events.Reader(self.run_dir, from_start=True).new():
            if event.attempt != self.attempt - 1 or event.rank >= self.world_size:
                continue
            # Earlier runs in this directory have had an attempt of that number, too.
            if isinstance(event, events.Start):
                ends.pop(event.rank, None)
            elif isinstance(event, events.End):
                ends[event.rank] = event

        for end in ends.values():
            error = end.worker_error
            if error is not None and error.permanent:
                log.write(f"distopt: not started again: rank {end.rank} failed: {error.text}\n".encode())
                return True
        return False

    def _run_worker(self, log: rank_log.RankLog) -> int:
        screen = terminal.open_for(self.rank)
        worker, output = self._start(screen)
        sink = terminal.Tee(log, screen, echo=ECHO_VARIABLE in os.environ)
        watched = [output, self._wake]
        try:
            # Until the output has ended and the worker has. A process that the worker leaves behind holds the output
            # open, so that is killed once the worker has ended, and what it still printed is read.
            while watched != [self._wake] or worker.poll() is None:
                ready, _, _ = select.select(watched, [], [], POLL_S)
                if self._wake in ready and self._read_signals():
                    self._ask_to_stop(worker, for_good=True)
                if output in ready and not sink.copy(output):
                    watched.remove(output)
                self._check_files(worker)
                if time.monotonic() > self._kill_at:
                    _signal_group(worker.pid, signal.SIGKILL)
                if worker.poll() is not None:
                    _signal_group(worker.pid, signal.SIGKILL)
                    if not ready:
                        break
        finally:
            _signal_group(worker.pid, signal.SIGKILL)
            sink.close()
            os.close(output)
        return worker.wait()

    def _start(self, screen: IO[bytes] | None) -> tuple[subprocess.Popen[bytes], int]:
        """Starts the worker, and returns it with the file descriptor of its output."""
        self._take_error()
        env = {**os.environ, **library_env(os.environ), "PYTHONUNBUFFERED": "1", **self._secrets}
        env[ERROR_FILE_VARIABLE] = str(self._error_file)
        env[RUN_DIR_VARIABLE] = str(self.run_dir)
        for name, value in LIBRARY_SETTINGS.items():
            env.setdefault(name, value)
        visible = devices.visible(env)
        binding = devices.binding_of(env, self.local_rank, self.local_size, visible)
        env |= devices.device_env(env, visible, self.local_rank, self.local_size)
        env.setdefault("OMP_NUM_THREADS", str(self._num_threads(binding)))

        def prepare() -> None:
            die_with_parent()
            devices.bind(binding.cpus)

        if screen is not None:
            reading_end, worker_end = terminal.open_pseudo_terminal(screen)
        else:
            reading_end, worker_end = os.pipe()

        # In a new session nothing but this process signals the worker: not Ctrl-C on a terminal, and not a launcher
        # that signals its process group before the worker has had its grace time. MPICH's workers find their process
        # manager at the file descriptor PMI_FD.
        worker = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=worker_end, stderr=worker_end, env=env,
            start_new_session=True, preexec_fn=prepare,
            pass_fds=[int(os.environ[name]) for name in ("PMI_FD",) if name in os.environ],
        )  # fmt: skip
        os.close(worker_end)
        return worker, reading_end

    def _num_threads(self, binding: devices.Binding) -> int:
        """Returns the worker's share of the cores; a task of srun has been given its own."""
        cores = os.environ.get("SLURM_CPUS_PER_TASK", "")
        if self.launcher == "srun" and cores.isdecimal():
            return max(1, min(int(cores), available_cores()))
        # Without a number Slurm may still have bound each task to cores of its own, which are then not to be divided.
        return binding.num_threads(available_cores(), 1 if self.launcher == "srun" else self.local_size)

    def _ask_to_stop(self, worker: subprocess.Popen[bytes], *, for_good: bool) -> None:
        """Passes a request to stop on, once: a second signal could interrupt the worker's last checkpoint."""
        self.asked_to_stop |= for_good
        if not self._signalled:
            self._signalled = True
            self._kill_at = time.monotonic() + self.grace_s
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)

    def _check_files(self, worker: subprocess.Popen[bytes]) -> None:
        """Looks for the stop file and for the end of the round; not at every line of output."""
        if time.monotonic() <= self._check_files_at:
            return
        self._check_files_at = time.monotonic() + POLL_S
        if self.stop_file is not None and self.stop_file.exists():
            self._ask_to_stop(worker, for_good=True)
        if self._preemption_file is not None and self._preemption_file.exists():
            self._preemption_file = None
            self._stop_at = time.monotonic() + LAUNCHER_DELAY_S
            self._record(events.Preemption)
        if time.monotonic() > self._stop_at:
            self._ask_to_stop(worker, for_good=True)
        if self._round:
            number, is_over = elastic.read_round(self.run_dir)
            if is_over or number > self._round:
                self._ask_to_stop(worker, for_good=number > self._round)

    def _record(self, kind: type[events.Event], status: int | None = None, **more: str) -> None:
        error = self._take_error() if kind is events.End else None
        if error is None and status and kind is events.End and not (self._signalled or self.asked_to_stop):
            error = rank_log.final_error(self.run_dir, self.rank, status)
        self.has_permanent_error = error is not None and error.permanent
        event = kind(
            rank=self.rank,
            attempt=self.attempt,
            host=socket.gethostname(),
            pid=os.getpid(),
            time=time.time(),
            status=status,
            stopped=self._signalled or self.asked_to_stop,
            out_of_memory=status == -signal.SIGKILL and events.oom_kills() > self._oom_kills,
            raised=None if error is None else asdict(error),
            **more,
        )
        try:
            events.append(self.run_dir, event)
        except OSError as error:  # the worker does not depend on it
            print(f"distopt: {error.filename}: {error.strerror}; lost: {event}", file=sys.stderr, flush=True)

    def _report_unwritable(self, path: Path, error: OSError) -> None:
        self._record(events.Unwritable, path=str(path), error=error.strerror or str(error))


def _preemption_file() -> Path | None:
    """Returns the file that announces the end of this host; None for one that an earlier announcement has left."""
    path = Path(os.environ[PREEMPTION_VARIABLE]) if PREEMPTION_VARIABLE in os.environ else None
    return None if path is None or path.exists() else path


def write_termination_message(run_dir: Path, rank: int) -> None:
    """Writes a rank's traceback where a pod's kubelet reads it, which puts it into the pod's status."""
    if TERMINATION_LOG.exists():
        text = "\n".join(rank_log.traceback_of(run_dir, rank)).encode()[-TERMINATION_LOG_BYTES:]
        TERMINATION_LOG.write_bytes(f"rank {rank}: ".encode() + text)


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def main(argv: Sequence[str]) -> int:
    """Runs the worker; the exit status is the worker's, for a signal n that of a shell, 128 + n.

    A worker that was asked to stop by the stop file, and did, counts as ended well: mpirun and horovodrun kill all
    others at the first status that is not 0, and with them supervisors that have not yet recorded the same. The
    launcher takes what happened from the records.
    """
    die_with_parent()
    if len(argv) < 3 or argv[1] != "--":
        print("usage: python -m distopt.launch.worker.supervisor RUN_DIR -- COMMAND [ARGUMENT …]", file=sys.stderr)
        return 2
    if directory := os.environ.get(CWD_VARIABLE):
        os.chdir(directory)

    try:
        supervisor = Supervisor(Path(argv[0]), argv[2:])
    except LauncherError as error:
        print(f"distopt: {error}", file=sys.stderr)
        return 2
    status = supervisor.run()
    if status and not supervisor.asked_to_stop:
        write_termination_message(supervisor.run_dir, supervisor.rank)
    if supervisor.stop_file is not None and supervisor.asked_to_stop and status in events.STOPPED_STATUSES:
        return 0
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
