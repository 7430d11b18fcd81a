"""Starts a plan's commands and stays with them: live output, signals, and no process left at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from distopt.launchers import FAILURE_FILE, LOGS
from distopt.worker_error import WorkerError

from . import failure_report, output
from .jobs import JobError
from .plan import Command, Plan
from .run_dir import ask_to_stop
from .worker import events, host_agent, streams, terminal
from .worker.processes import REQUESTS, adopt_orphans, die_with_parent, heeded, kill_descendants
from .worker.rank_log import read_from

LAUNCHER_LOG = "launcher.log"  # the output of torchrun, horovodrun, mpirun
PREFIX = "distopt: "  # of lines that distopt itself prints, here and into that log

POLL_S = 0.1
HEARTBEAT_S = 2.0
REJOIN_S = 5.0
FINISH_S = 20.0  # for the others, once one host has finished or one worker has died
EVENT_DELAY_S = 5.0  # until what a supervisor on another host has written is seen here
KILL_MARGIN_S = 7.0  # supervisors kill at the end of the grace time, launchers 5 s after them

# One Ctrl-C may come twice, as from a terminal and a process manager that both signal; workers take it the same way.
ECHO_S = 1.0

SAVING = "saving a checkpoint and stopping"
SCRIPT_STOPPING = "asking the script to stop"

NEVER = float("inf")
SSH_CONNECTION_LOST = 255


def run_plan(plan: Plan, run_dir: Path, grace_s: float, ranks: Sequence[int] = (0,), *, stopping: str = SAVING) -> int:
    """Runs the plan's commands to their end and shows what some ranks print.

    Each of `REQUESTS`, such as Ctrl-C, asks the workers once to save a checkpoint and stop. What still runs after the
    grace time, or at a second signal that is no echo of the first, is killed.

    Args:
        plan: What to start; its files have been written.
        run_dir: Where supervisors write logs and events.
        grace_s: Seconds for the last checkpoint.
        ranks: Whose output is shown; rank 0 alone gets the terminal.
        stopping: What workers do that are asked to stop, for messages.

    Returns:
        0 when the run is done, 128 and the signal's number (143 for SIGTERM, 130 for Ctrl-C) if it was asked to stop
        and all workers ended in time, 1 otherwise.
    """
    adopt_orphans()
    run = _AttachedRun(plan, run_dir, grace_s, ranks, stopping)
    try:
        with _signals_to(run), _open_log(run_dir / LOGS / LAUNCHER_LOG) as log:
            run.start(log)
            while run.is_alive():
                run.poll()
                time.sleep(POLL_S)
            run.poll()
            kill_descendants(os.getpid())
            return run.result()
    finally:
        kill_descendants(os.getpid())
        if plan.stop_by_file:
            with suppress(OSError):
                ask_to_stop(run_dir)  # for supervisors on hosts that the launcher has lost


class _AttachedRun:
    """A plan's processes, from start to end.

    Nothing here blocks: `is_alive` and `poll` are called in turn, look at what has changed since, and set the times at
    which something is due if nothing else happens before.
    """

    def __init__(self, plan: Plan, run_dir: Path, grace_s: float, ranks: Sequence[int], stopping: str) -> None:
        self.plan = plan
        self.run_dir = run_dir
        self.grace_s = grace_s
        self.stopping = stopping
        self.processes: list[subprocess.Popen[bytes]] = []
        self.signal: int | None = None  # the first that came
        self.second_signal: int | None = None  # another one, that is no echo of it
        self.hangs_up = True  # when nobody reads the output any more

        self._started = time.monotonic()
        self._signal_at = NEVER
        self._has_asked = False  # the workers to stop
        self._has_killed = False  # what had not ended in time
        self._ask_at = NEVER
        self._kill_at = NEVER
        self._heartbeat_at = 0.0
        self._rejoin_at: dict[int, float] = {}  # by the index of a lost host's command

        self._log: IO[bytes] | None = None
        self._forwarded_bytes = 0  # of that log
        self._events = events.Reader(run_dir)
        self._errors: list[tuple[int, WorkerError]] = []  # of workers that raised them, and in which attempt
        self._final_attempt: int | None = None  # the one in which an error was raised that no restart heals
        self._terminal_env = terminal.lend() if list(ranks) == [0] else {}
        read = output.of_files(run_dir)
        self._output = output.Output(ranks, read, [len(read(rank, 0)) for rank in ranks])

    def start(self, log: IO[bytes]) -> None:
        self._log = log
        self.processes = [self._start(command) for command in self.plan.commands]

    def is_alive(self) -> bool:
        """Returns whether something runs; asks it to stop when too few launchers are left to continue."""
        statuses = [process.poll() for process in self.processes]
        if None not in statuses or self._has_asked:
            return None in statuses

        # With one launcher on each host, the first that ends well tells that the run is done, and the others follow.
        if 0 in statuses:
            self._kill_at = min(self._kill_at, time.monotonic() + FINISH_S)
        elif any(statuses):
            lost = [index for index, status in enumerate(statuses) if status]
            if statuses.count(None) < (self.plan.min_hosts or len(statuses)):
                self._ask_to_stop()
            else:
                self._rejoin(lost)
        return True

    def _rejoin(self, lost: list[int]) -> None:
        """Restarts the launchers of an elastic run's lost hosts; while a host is unreachable, ssh fails again."""
        for index in lost:
            host = self.plan.commands[index].host
            if index not in self._rejoin_at:
                say(f"{host} was lost; the run continues without it, and it may rejoin")
            due = self._rejoin_at.setdefault(index, time.monotonic() + REJOIN_S)
            if time.monotonic() >= due:
                self._rejoin_at[index] = time.monotonic() + REJOIN_S + self.grace_s
                self.processes[index] = self._start(self.plan.commands[index])

    def poll(self) -> None:
        """Shows what is new, and does what is due."""
        if not self._terminal_env:
            self._show()
        self._forward_launcher_log()
        self._send_heartbeat()
        self._report_deaths()

        if time.monotonic() > self._ask_at:
            self._ask_to_stop()
        if self.signal is not None and not self._has_asked:
            say(describe_request(self.signal, self.stopping, self.grace_s))
            self._ask_to_stop()
        if time.monotonic() > self._kill_at:
            self._has_killed = True
            kill_descendants(os.getpid())

    def _show(self) -> None:
        self._output.show()
        if streams.has_lost_its_reader(sys.stdout) and self.signal is None and self.hangs_up:
            self.on_signal(signal.SIGHUP)

    def _forward_launcher_log(self) -> None:
        """Prints the lines that programs of distopt have written into the launcher's log."""
        new = read_from(self.run_dir / LOGS / LAUNCHER_LOG, self._forwarded_bytes)
        whole_lines = new[: new.rfind(b"\n") + 1]
        self._forwarded_bytes += len(whole_lines)
        for line in whole_lines.decode("utf-8", "replace").splitlines():
            if line.startswith(PREFIX):
                say(line.removeprefix(PREFIX))

    def _send_heartbeat(self) -> None:
        if self.plan.heartbeat and time.monotonic() >= self._heartbeat_at:
            self._heartbeat_at = time.monotonic() + HEARTBEAT_S
            self._send(host_agent.ALIVE)

    def _report_deaths(self) -> None:
        for event in self._events.new():
            if isinstance(event, events.Unwritable):
                say(f"{event.path} cannot be written: {event.error}; the run continues, without it in its record")
            elif isinstance(event, events.Preemption) and self.signal is None:
                say(f"{event.host} will be taken away")
                self.on_signal(signal.SIGTERM)
            elif isinstance(event, events.End) and self._is_final(event):
                continue
            elif isinstance(event, events.End) and event.failed and self._final_attempt is None:
                cause = f"{failure_report.describe_end(event)}{failure_report.quote_last_line(self.run_dir, event)}"
                say(f"{failure_report.describe_rank(event)} {cause}")
                # The launcher should end the others by itself; MPICH's does not for one that dies before MPI_Init.
                if self.plan.ends_together:
                    self._ask_at = min(self._ask_at, time.monotonic() + FINISH_S)

    def _is_final(self, end: events.End) -> bool:
        """Returns whether a worker has ended by an error that no restart heals, and then ends the run, once.

        Such is an error that the worker calls permanent, and one that has ended an earlier attempt, too, at the same
        place, while no checkpoint was made between them.
        """
        error = end.worker_error
        if error is None or error.from_peer or self._final_attempt is not None:
            return False
        repeated = any(error.repeats(other) for attempt, other in self._errors if attempt < end.attempt)
        self._errors.append((end.attempt, error))
        if not (error.permanent or repeated):
            return False

        self._final_attempt = end.attempt
        again = "the same error ended an attempt before, and no checkpoint was made since" if repeated else ""
        reason = again or "a restart would end in the same way"
        say(f"{failure_report.describe_rank(end)} failed: {error.text} ({reason}; the run ends)")
        self._ask_to_stop()
        return True

    def on_signal(self, number: int) -> None:
        """Notes a request to stop; one that comes behind the echo of the first is a request to kill."""
        now = time.monotonic()
        if self.signal is None:
            self.signal = number
            self._signal_at = now
        elif now - self._signal_at > ECHO_S:
            self.second_signal = self.second_signal or number
            self._kill_at = 0.0

    def _ask_to_stop(self) -> None:
        """Asks the workers once to save and stop, in the way in which this plan's workers can be asked."""
        if self._has_asked:
            return
        self._has_asked = True
        self._kill_at = min(self._kill_at, time.monotonic() + self.grace_s + KILL_MARGIN_S)
        if self.plan.stop_by_file:
            try:
                ask_to_stop(self.run_dir)
            except OSError as error:
                say(f"{error.filename}: {error.strerror}; stopping the launcher, which may leave less time to save")
                self._terminate()
        elif self.plan.heartbeat:
            self._send(host_agent.STOP)
        else:
            self._terminate()

    def _terminate(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.terminate()

    def _send(self, line: bytes) -> None:
        """Sends a line to the agents on all hosts; one that has gone is noticed by its exit status."""
        for process in self.processes:
            if process.stdin is not None and process.poll() is None:
                with suppress(OSError):
                    process.stdin.write(line)
                    process.stdin.flush()

    def _start(self, command: Command) -> subprocess.Popen[bytes]:
        env = {**os.environ, **command.env, **self._terminal_env}
        # In its own session, so that Ctrl-C on the terminal reaches only this process, which then asks once.
        try:
            process = subprocess.Popen(
                command.argv, env=env, stdin=subprocess.PIPE if self.plan.heartbeat else subprocess.DEVNULL,
                stdout=self._log, stderr=self._log, start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
        except OSError as error:
            raise JobError(
                f"{command.argv[0]} cannot be started: {error.strerror}; check that it is installed and on PATH"
            ) from error
        if process.stdin is not None:
            secrets = {name: os.environ[name] for name in command.secrets if name in os.environ}
            with suppress(OSError):
                process.stdin.write(json.dumps(secrets).encode() + b"\n")
                process.stdin.flush()
        return process

    def result(self) -> int:
        """Returns the run's exit status; prints how it ended unless it is done."""
        statuses = [process.wait() for process in self.processes]
        self._events.new()
        last_attempt = self._last_attempt()
        # Asked to stop, workers that did so and workers that were killed can both leave a launcher with status 0.
        may_be_done = self.signal is None and self._final_attempt is None
        if may_be_done or failure_report.all_succeeded(last_attempt):
            if (not any(statuses) and self._workers_confirm()) or (self.plan.min_hosts is not None and 0 in statuses):
                return 0

        last_attempt = self._last_attempt()
        ends_together = self.plan.ends_together and not self._has_killed
        if self.signal is not None and failure_report.all_stopped(last_attempt, ends_together=ends_together):
            say("; ".join(filter(None, ["stopped", failure_report.resume_hint(self.run_dir)])))
            return 128 + self.signal

        self._print_failure(statuses, last_attempt)
        return 1

    def _last_attempt(self) -> list[events.Event]:
        """Returns the events of the attempt that ended the run; one that a launcher has begun since tells nothing."""
        seen = self._events.seen
        if self._final_attempt is not None:
            seen = [event for event in seen if event.attempt <= self._final_attempt]
        return failure_report.last_attempt(seen)

    def _print_failure(self, statuses: list[int], last_attempt: list[events.Event]) -> None:
        for command, status in zip(self.plan.commands, statuses, strict=True):
            if command.host is not None and status:
                lost = status == SSH_CONNECTION_LOST
                say(f"{command.host}: {'the connection was lost' if lost else f'exit status {status}'}")

        first_status = next((status for status in statuses if status), 0)
        seconds = time.monotonic() - self._started
        is_final = self._final_attempt is not None
        text = failure_report.describe_failure(
            self.run_dir, last_attempt, first_status, seconds, LAUNCHER_LOG, is_final=is_final
        )
        if self.second_signal is not None:
            name = signal.Signals(self.second_signal).name
            text = text.replace("\n", f"\n  Killed by a second signal ({name}) before all workers had stopped.\n", 1)
        print(text, file=sys.stderr, flush=True)
        try:
            (self.run_dir / LOGS / FAILURE_FILE).write_text(text + "\n")
        except OSError as error:
            say(f"{error.filename} cannot be written: {error.strerror}")

    def _workers_confirm(self) -> bool:
        """Returns whether the workers too say that all is done.

        Open MPI's mpirun exits with 0 when the connection to a host is reset, so its status alone proves nothing.
        """
        end = time.monotonic() + EVENT_DELAY_S
        while self.plan.ends_together and self.signal is None:
            self._events.new()
            if failure_report.all_succeeded(failure_report.last_attempt(self._events.seen)):
                break
            if time.monotonic() > end:
                return False
            time.sleep(POLL_S)
        return True


@contextmanager
def _signals_to(run: _AttachedRun) -> Iterator[None]:
    numbers = heeded(REQUESTS)
    run.hangs_up = signal.SIGHUP in numbers
    handlers = {number: signal.signal(number, lambda number, _: run.on_signal(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def _open_log(path: Path) -> Iterator[IO[bytes]]:
    """Opens the launcher's log; where it cannot be made, there is none."""
    try:
        log = path.open("wb")
    except OSError as error:
        say(f"{path} cannot be written: {error.strerror}; the run continues without it")
        log = open(os.devnull, "wb")
    with log:
        yield log


def describe_request(number: int, stopping: str, grace_s: float) -> str:
    """Returns what a signal to stop makes the workers do, and what a second one will do."""
    name = signal.Signals(number).name
    return f"received {name}: {stopping} (at most {grace_s:g} s); a second signal kills the run at once"


def say(text: str) -> None:
    """Prints a line of distopt's own, marked as such."""
    print(f"{PREFIX}{text}", file=sys.stderr, flush=True)
