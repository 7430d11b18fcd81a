"""Starting a plan's commands and staying with them: live output, signals, and no process left at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from distopt.launchers import FAILURE_FILE, LOGS, STOP_FILE

from . import failure_report, output
from .plan import Command, Plan
from .worker import events, host_agent, terminal
from .worker.processes import adopt_orphans, die_with_parent, kill_descendants

POLL_S = 0.1
ENGINE_LOG = "engine.log"
OURS = "distopt: "
HEARTBEAT_S = 2.0
REJOIN_S = 5.0
FINISH_S = 20.0  # for the others, once one host has finished or one worker has died
SHOWN_S = 5.0  # until what a worker on another host has written is seen here
KILL_MARGIN_S = 7.0  # guards kill at the end of the grace time, engines 5 s after them


def follow(plan: Plan, run_dir: Path, grace_s: float, ranks: Sequence[int] = (0,)) -> int:
    """Runs the plan's commands to their end, showing what some ranks print.

    Ctrl-C or SIGTERM asks the workers once to write a last checkpoint and end; what still runs after the grace time, or
    at a second Ctrl-C, is killed.

    Args:
        plan: What to start; its files have been written.
        run_dir: Where guards write logs and events.
        grace_s: Seconds for the last checkpoint.
        ranks: Whose output is shown; rank 0 alone gets the terminal.

    Returns:
        0 when the run is done, 143 after SIGTERM and 130 after Ctrl-C with all workers ended in time, 1 otherwise.
    """
    adopt_orphans()
    run = _Run(plan, run_dir, grace_s, ranks)
    try:
        with _signals(run), (run_dir / LOGS / ENGINE_LOG).open("w") as log:
            run.start(log)
            while run.alive():
                run.look()
                time.sleep(POLL_S)
            run.look()
    finally:
        kill_descendants(os.getpid())
        if plan.stop_by_file:
            (run_dir / STOP_FILE).touch()  # for guards on hosts that the engine lost
    return run.result()


class _Run:
    """A plan's processes, from start to end."""

    def __init__(self, plan: Plan, run_dir: Path, grace_s: float, ranks: Sequence[int]) -> None:
        self.plan = plan
        self.run_dir = run_dir
        self.grace_s = grace_s
        self.started = time.monotonic()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.signal: int | None = None
        self._signalled = False
        self._kill_at = self._end_at = float("inf")
        self._late = False
        self._events = events.Reader(run_dir)
        self._lent = terminal.lend() if list(ranks) == [0] else {}
        self._log: TextIO | None = None
        self._repeated = 0
        self._beat_at = 0.0
        self._rejoin_at: dict[int, float] = {}
        read = output.of_files(run_dir)
        self._output = output.Output(ranks, read, [len(read(rank, 0)) for rank in ranks])

    def start(self, log: TextIO) -> None:
        self._log = log
        self.processes = [_start(command, self._lent, log, self.plan.heartbeat) for command in self.plan.commands]

    def alive(self) -> bool:
        """Whether something runs; engines that are too few to go on are asked to end."""
        states = [process.poll() for process in self.processes]
        if None not in states or self._signalled:
            return None in states
        if 0 in states:
            self._kill_at = min(self._kill_at, time.monotonic() + FINISH_S)
        elif any(states):
            lost = [index for index, state in enumerate(states) if state]
            if states.count(None) < (self.plan.least or len(states)):
                self.ask_to_stop()
            else:
                self._rejoin(lost)
        return True

    def _rejoin(self, lost: list[int]) -> None:
        """Starts the engines of lost hosts of an elastic run again; where a host is still out of reach, ssh says so."""
        assert self._log is not None
        for index in lost:
            command = self.plan.commands[index]
            if index not in self._rejoin_at:
                say(f"{command.host} was lost; the run goes on, and the host may join again")
            due = self._rejoin_at.setdefault(index, time.monotonic() + REJOIN_S)
            if time.monotonic() >= due:
                self._rejoin_at[index] = time.monotonic() + REJOIN_S + self.grace_s
                self.processes[index] = _start(command, self._lent, self._log, self.plan.heartbeat)

    def look(self) -> None:
        """Shows what is new and ends what is late."""
        if not self._lent:
            self._show()
        self._repeat()
        if self.plan.heartbeat and time.monotonic() >= self._beat_at:
            self._beat_at = time.monotonic() + HEARTBEAT_S
            self._tell(host_agent.ALIVE)
        for event in self._events.new():
            if isinstance(event, events.End) and event.failed:
                what = f"{failure_report.cause(event)}{failure_report.why(self.run_dir, event)}"
                say(f"{failure_report.name(event)} {what}")
                if self.plan.together:
                    self._end_at = min(self._end_at, time.monotonic() + FINISH_S)
        if time.monotonic() > self._end_at:
            self.ask_to_stop()  # the engine should have ended the others; MPICH's does not before MPI_Init
        if self.signal is not None and not self._signalled:
            say(f"{signal.Signals(self.signal).name}: a last checkpoint, then the end, {self.grace_s:g} s at most")
            self.ask_to_stop()
        if time.monotonic() > self._kill_at:
            self._late = bool(kill_descendants(os.getpid()))

    def _show(self) -> None:
        try:
            self._output.show()
        except BrokenPipeError:  # nobody reads any more, as when a terminal hangs up
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.on_signal(signal.SIGHUP)

    def _repeat(self) -> None:
        """Shows what programs of ours have written into the engine's log."""
        with (self.run_dir / LOGS / ENGINE_LOG).open("rb") as log:
            log.seek(self._repeated)
            new = log.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._repeated += len(whole)
        for line in whole.decode("utf-8", "replace").splitlines():
            if line.startswith(OURS):
                say(line.removeprefix(OURS))

    def on_signal(self, number: int) -> None:
        if self.signal is not None:
            self._kill_at = 0.0  # asked twice
        else:
            self.signal = number

    def ask_to_stop(self) -> None:
        if self._signalled:
            return
        self._signalled = True
        self._kill_at = min(self._kill_at, time.monotonic() + self.grace_s + KILL_MARGIN_S)
        if self.plan.stop_by_file:
            (self.run_dir / STOP_FILE).touch()
        elif self.plan.heartbeat:
            self._tell(host_agent.STOP)
        else:
            for process in self.processes:
                if process.poll() is None:
                    process.terminate()

    def _tell(self, line: bytes) -> None:
        """Sends a line to the agents on all hosts; one that has gone is noticed by its exit status."""
        for process in self.processes:
            if process.stdin is not None and process.poll() is None:
                with suppress(BrokenPipeError):
                    process.stdin.write(line)
                    process.stdin.flush()

    def result(self) -> int:
        statuses = [process.wait() for process in self.processes]
        if (not any(statuses) and self._all_finished()) or (self.plan.least is not None and 0 in statuses):
            return 0
        last = failure_report.last_attempt(self._events.seen)
        if self.signal is not None and not self._late and failure_report.stopped_well(last):
            say("; ".join(filter(None, ["stopped", failure_report.going_on(self.run_dir)])))
            return 130 if self.signal == signal.SIGINT else 143
        seconds = time.monotonic() - self.started
        engine = next((status for status in statuses if status), 0)
        for command, status in zip(self.plan.commands, statuses, strict=True):
            if command.host is not None and status:
                say(f"{command.host}: " + ("the connection was lost" if status == 255 else f"exit status {status}"))
        sys.stdout.flush()
        text = failure_report.failure(self.run_dir, last, engine, seconds, ENGINE_LOG)
        (self.run_dir / LOGS / FAILURE_FILE).write_text(text + "\n")
        print(text, file=sys.stderr)
        return 1

    def _all_finished(self) -> bool:
        """Whether the workers say so too: Open MPI's mpirun exits with 0 when the connection to a host is reset."""
        end = time.monotonic() + SHOWN_S
        while self.plan.together and self.signal is None:
            self._events.new()
            if failure_report.finished(failure_report.last_attempt(self._events.seen)):
                break
            if time.monotonic() > end:
                return False
            time.sleep(POLL_S)
        return True


def _start(command: Command, lent: Mapping[str, str], log: TextIO, heartbeat: bool) -> subprocess.Popen[bytes]:
    env = {name: value for name, value in os.environ.items() if name not in command.hidden}
    env |= {**command.env, **lent}
    # Its own session: Ctrl-C on the terminal reaches the launcher alone, which then asks once.
    return subprocess.Popen(
        command.argv, env=env, stdin=subprocess.PIPE if heartbeat else subprocess.DEVNULL, stdout=log, stderr=log,
        start_new_session=True, preexec_fn=die_with_parent,
    )  # fmt: skip


@contextmanager
def _signals(run: _Run) -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda got, _: run.on_signal(got)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(text: str) -> None:
    """Prints a line of the launcher's own."""
    print(f"{OURS}{text}", file=sys.stderr, flush=True)
