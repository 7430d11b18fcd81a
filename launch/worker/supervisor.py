"""Stands between an engine and one worker: `python -m distopt.launch.worker.supervisor RUN_DIR -- COMMAND…`.

It keeps the worker's log, passes one signal on and kills what has not ended in time, takes the worker with it when the
engine dies, and writes down when, how and of what the worker ended (`events.Ending`). It imports the standard library
alone, since every worker waits for it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from distopt.launchers import (
    CWD_VARIABLE,
    ECHO_VARIABLE,
    GRACE_VARIABLE,
    LOGS,
    SECRETS_FILE,
    STOP_FILE,
    WATCH_STOP_VARIABLE,
    WORLD_SIZE_VARIABLE,
    LauncherError,
    RankInfo,
    find_rank,
    parse_range,
)

from . import elastic, events, rank_log, terminal
from .host_agent import interface_env
from .processes import die_with_parent

POLL_S = 0.5
LAST_WORDS, LAST_WORDS_BYTES = Path("/dev/termination-log"), 3000
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Guard:
    """One worker's keeper, from its start to its end."""

    def __init__(self, run_dir: Path, command: Sequence[str]) -> None:
        self._read_rank()
        self.command = list(command)
        self.run_dir = run_dir
        self.attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self.grace_s = float(os.environ.get(GRACE_VARIABLE, "30"))
        self.stop_file = run_dir / STOP_FILE if WATCH_STOP_VARIABLE in os.environ else None
        self.asked_to_stop = False
        self._elastic = elastic.is_elastic(os.environ)
        self._round = 0
        self._told = False  # the worker of this attempt, to save and end
        self._kill_at = float("inf")
        self._look_at = 0.0
        self._oom_kills = events.oom_kills()
        self._wake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in (*SIGNALS, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)  # the number arrives through the pipe

    def run(self) -> int:
        """Runs the worker to its end and returns its exit status, negative for a signal."""
        status = self._attempt()
        # One that was killed, but not from here, is for the engine to judge: its host may be no good.
        while self._elastic and not self.asked_to_stop and (status > 0 or (status and self._told)):
            place_now = elastic.next_place(os.environ, self._still_wanted)
            if not place_now:
                break
            os.environ.update(place_now)
            self._read_rank()
            self.attempt += 1
            status = self._attempt()
        return status

    def _read_rank(self) -> None:
        """Takes the rank and world size from whichever launcher started this process; alone it is rank 0 of 1."""
        rank_info = find_rank() or RankInfo("by hand", 0, 1)
        self.rank = rank_info.rank
        self.world_size = rank_info.world_size

    def _still_wanted(self) -> bool:
        """Waits a moment; false when this worker has been asked to end."""
        if select.select([self._wake], [], [], POLL_S)[0] and set(os.read(self._wake, 512)) & set(SIGNALS):
            self.asked_to_stop = True
        return not self.asked_to_stop and not (self.stop_file is not None and self.stop_file.exists())

    def _attempt(self) -> int:
        self._told, self._kill_at = False, float("inf")
        if self._elastic and (number := elastic.read(self.run_dir)[0]):
            self._round, self.attempt = number, number - 1
        (self.run_dir / LOGS).mkdir(parents=True, exist_ok=True)
        with rank_log.log_of(self.run_dir, self.rank).open("ab", buffering=0) as log:
            log.write(rank_log.header(self.rank, self.world_size, self.attempt))
            status = self._refused(log)
            if status is None:
                self._record(events.Start)
                status = self._watch(log)
        self._record(events.End, status)
        return status

    def _refused(self, log: IO[bytes]) -> int | None:
        """Refuses a world that is not the one asked for: an engine may go on with fewer workers, and exit 0."""
        allowed = os.environ.get(WORLD_SIZE_VARIABLE)
        if not allowed or self.world_size in parse_range(allowed):
            return None
        log.write(
            f"distopt: the engine started {self.world_size} workers, {parse_range(allowed)[0]} were asked for. "
            "Did a host not join? launch.min_hosts allows a world of changing size.\n".encode()
        )
        self._record(events.Start)
        return 3

    def _watch(self, log: IO[bytes]) -> int:
        screen = terminal.open_for(self.rank)
        worker, output = self._start(screen)
        sink = terminal.Tee(log, screen, echo=ECHO_VARIABLE in os.environ)
        watched = [output, self._wake]
        try:
            while watched != [self._wake] or worker.poll() is None:
                ready, _, _ = select.select(watched, [], [], POLL_S)
                if self._wake in ready and set(os.read(self._wake, 512)) & set(SIGNALS):
                    self._ask_to_stop(worker)
                if output in ready and not sink.copy(output):
                    watched.remove(output)
                self._check_time(worker)
                if worker.poll() is not None:
                    _signal_group(worker.pid, signal.SIGKILL)  # what it left behind
                    if not ready:
                        break
        finally:
            _signal_group(worker.pid, signal.SIGKILL)
            sink.close()
            os.close(output)
        return worker.wait()

    def _start(self, screen: IO[bytes] | None) -> tuple[subprocess.Popen[bytes], int]:
        env = {**os.environ, **interface_env(os.environ), "PYTHONUNBUFFERED": "1", **self._secrets()}
        if screen is not None:
            ours, theirs = terminal.imitation(screen)
        else:
            ours, theirs = os.pipe()
        # A session of its own, so that nothing else signals the worker, and a death that follows this process's.
        worker = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=env, start_new_session=True,
            preexec_fn=die_with_parent, pass_fds=[int(os.environ[name]) for name in ("PMI_FD",) if name in os.environ],
        )  # fmt: skip
        os.close(theirs)
        return worker, ours

    def _secrets(self) -> dict[str, str]:
        try:
            secrets = json.loads((self.run_dir / SECRETS_FILE).read_text())
        except FileNotFoundError:
            return {}
        return {str(name): str(value) for name, value in secrets.items()}

    def _ask_to_stop(self, worker: subprocess.Popen[bytes], *, for_good: bool = True) -> None:
        self.asked_to_stop |= for_good
        if not self._told:
            self._told = True
            self._kill_at = time.monotonic() + self.grace_s
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)

    def _check_time(self, worker: subprocess.Popen[bytes]) -> None:
        if time.monotonic() > self._look_at:
            self._look_at = time.monotonic() + POLL_S
            self._look_at_files(worker)
        if time.monotonic() > self._kill_at:
            _signal_group(worker.pid, signal.SIGKILL)

    def _look_at_files(self, worker: subprocess.Popen[bytes]) -> None:
        if self.stop_file is not None and self.stop_file.exists():
            self._ask_to_stop(worker)
        if self._round:
            number, over = elastic.read(self.run_dir)
            if over or number > self._round:
                self._ask_to_stop(worker, for_good=number > self._round)

    def _record(self, kind: type[events.Event], status: int | None = None) -> None:
        event = kind(
            rank=self.rank,
            attempt=self.attempt,
            host=socket.gethostname(),
            pid=os.getpid(),
            time=time.time(),
            status=status,
            stopped=self._told or self.asked_to_stop,
            out_of_memory=status == -signal.SIGKILL and events.oom_kills() > self._oom_kills,
        )
        events.append(self.run_dir, event)


def leave_last_words(run_dir: Path, rank: int) -> None:
    """Tells Kubernetes of what a rank died, where this is a pod: the kubelet puts it into the pod's status."""
    if LAST_WORDS.exists():
        text = "\n".join(rank_log.traceback_of(run_dir, rank)).encode()[-LAST_WORDS_BYTES:]
        LAST_WORDS.write_bytes(f"rank {rank}: ".encode() + text)


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def main(argv: Sequence[str]) -> int:
    """Runs the guard; its exit status is the worker's, 128 + n for signal n as a shell would say it."""
    die_with_parent()
    if len(argv) < 3 or argv[1] != "--":
        print("usage: python -m distopt.launch.worker.supervisor RUN_DIR -- COMMAND [ARGUMENT …]", file=sys.stderr)
        return 2
    if directory := os.environ.get(CWD_VARIABLE):
        os.chdir(directory)
    try:
        guard = Guard(Path(argv[0]), argv[2:])
    except LauncherError as error:
        print(f"distopt: {error}", file=sys.stderr)
        return 2
    status = guard.run()
    if status and not guard.asked_to_stop:
        leave_last_words(guard.run_dir, guard.rank)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
