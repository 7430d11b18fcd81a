"""Plays a schedule against a real run of two workers, and says what it broke."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import signal
import socket
import subprocess
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml

from distopt.checkpoint.pyro_files import read_replicated
from tests.chaos.schedule import Event, Schedule
from tests.chaos.task import FAULTS, INJECTED
from tests.checkpoint.states import assert_equal
from tests.train.runs import BIN, ROOT, environment, steps_logged

EVERY, BATCH = 20, 100
PACE_S = 0.01
MARK = "DISTOPT_CHAOS"  # in the environment of everything that a run starts
PATIENCE_S = 120.0  # of this machine when it is busy: nothing that hangs is waited for longer
DISK_MIB = 16
LASTING_S = 5.0  # errors that last longer are met at every read, and cannot be waited out
NUM_FIRST_READS = 3  # before the first step: one makes the parameters, two of other sizes show the plates of the model
SLACK_STEPS = 4  # between a batch that was read and its step that is done

PLATFORMS: dict[str, dict[str, Any]] = {
    "local": {"launch": {"platform": "local"}, "reduce": {"backend": "torch_dist"}},
    "torchrun": {"launch": {"platform": "torchrun", "hosts": ["127.0.0.1"]}, "reduce": {"backend": "torch_dist"}},
    "horovodrun": {"launch": {"platform": "horovodrun"}, "reduce": {"backend": "horovod"}},
    "mpirun": {"launch": {"platform": "mpirun"}, "reduce": {"backend": "mpi"}},
}
RESTARTING = ("local", "torchrun")
"""Engines that start workers again by themselves."""
ENDING = ("stop", "stop-twice", "stop-again", "hang-up")
"""Kinds after which the launcher ends."""


def write_config(folder: Path, runner: str, num_steps: int) -> Path:
    """Writes run.yaml of a run on two workers, whose checkpoints hold all there is to compare."""
    platform = PLATFORMS[runner]
    keys = {
        "name": "chaos",
        "run_dir": str(folder / "run"),
        "task": "tests.chaos.task:Recorded",
        "task_args": {"folder": str(folder), "pace_s": PACE_S},
        "seed": 1,
        "train": {"num_steps": num_steps},
        "data": {"global_batch": BATCH},
        "optim": {
            "name": "Adam",
            "args": {"lr": 0.05},
            "scheduler": {"name": "ExponentialLR", "args": {"gamma": 0.999}},
        },
        "checkpoint": {"every_steps": EVERY},
        "log": {"every_steps": 5, "tensorboard": False},
        "reduce": {"timeout_s": 60, **platform["reduce"]},
        "launch": {"workers": 2, "max_restarts": 20, "grace_s": 20, **platform["launch"]},
    }
    if keys["launch"].get("hosts"):
        keys["launch"]["port"] = free_port()  # two runs that are played at once must not meet
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(keys))
    return path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@dataclass
class Life:
    """One process of one rank: what was published when it began, and the batches it has read since."""

    published: list[str]
    batches: list[str]


def lives(folder: Path) -> dict[tuple[int, int], Life]:
    """Returns the lives by (rank, pid), the oldest first; a line may still be half written."""
    known = {}
    for path in sorted(folder.glob("life-*.jsonl"), key=lambda path: path.stat().st_mtime_ns):
        _, rank, pid = path.stem.split("-")
        lines = path.read_text().split("\n")[:-1]
        if lines:
            known[int(rank), int(pid)] = Life(
                json.loads(lines[0])["published"], [json.loads(x) for x in lines[1 + NUM_FIRST_READS :]]
            )
    return known


def step_of(name: str) -> int:
    return int(name.partition("-")[2])


@dataclass
class Launch:
    """One `distopt launch`, from its start to its end."""

    process: subprocess.Popen[bytes]
    output: Path
    terminal: int | None
    known: set[tuple[int, int]]
    """Lives that began before, or that an event has ended."""
    began: float = field(default_factory=time.monotonic)
    fired: list[Event] = field(default_factory=list)
    judged: bool = False
    progress: int = 0
    """The step that both ranks had come to when it was asked to stop; 0 when it was not, or they had not begun."""

    def text(self) -> str:
        return self.output.read_text(errors="replace")


class Disturbed:
    """A run that is disturbed by a schedule; `play` returns what went wrong.

    Args:
        schedule: What happens to it.
        folder: A new folder for the run and everything about it.
        undisturbed: The folder of the same run that nothing happened to.
        num_steps: Of the run; all events must find it running.
    """

    def __init__(self, schedule: Schedule, folder: Path, undisturbed: Path | None, num_steps: int) -> None:
        self.schedule = schedule
        self.num_steps = num_steps
        self.folder = folder
        self.undisturbed = undisturbed
        self.problems: list[str] = []
        self.history: list[str] = []
        self.num_launches = 0
        self._began = time.monotonic()
        self._path = write_config(folder, schedule.runner, num_steps)
        self._steps = reference_steps(undisturbed) if undisturbed else {}

    def play(self) -> list[str]:
        """Plays the schedule and lets the run end; returns the problems, none when all is as it must be."""
        self._say(str(self.schedule))
        with self._disk():
            try:
                self._play()
            except Exception as error:
                self._problem(f"the harness stopped: {type(error).__name__}: {error}")
            finally:
                for process in self.processes():
                    with suppress(psutil.Error):
                        process.kill()
        return self.problems

    def report(self) -> str:
        """Returns what happened, for the message of a failed test."""
        outputs = [f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in self._outputs()]
        replay = f"replay: DISTOPT_CHAOS_SEEDS={self.schedule.seed} python -m pytest tests/chaos"
        return "\n".join([*self.problems, replay, *self.history, *outputs])

    def _play(self) -> None:
        launch = self._launch()
        for event in self.schedule.events:
            if not self._wait_for(event, launch):
                self._end(launch)
                if self._done():
                    break
                launch = self._launch()
                if not self._wait_for(event, launch):
                    continue
            self._fire(event, launch)
        self._end(launch)
        if not self._done():
            self._end(self._launch())
        self._compare()

    # -- one launch ----------------------------------------------------------------------------------------------------

    def _launch(self) -> Launch:
        self.num_launches += 1
        output = self.folder / f"launch-{self.num_launches}.txt"
        command = [str(BIN / "distopt"), "launch", str(self._path)]
        env = environment() | {MARK: str(self.folder), "OMP_NUM_THREADS": "1"}
        start = partial(subprocess.Popen, command, cwd=ROOT, env=env, start_new_session=True)
        known = set(lives(self.folder))
        self._say(f"launch {self.num_launches}, checkpoints {self._published()}")
        if not any(event.kind == "hang-up" for event in self.schedule.events):
            with output.open("wb") as file:
                process = start(stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
            return Launch(process, output, None, known)
        ours, theirs = pty.openpty()
        process = start(stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=partial(_take_terminal, theirs))
        os.close(theirs)
        output.touch()
        threading.Thread(target=_copy, args=(ours, output), daemon=True).start()
        return Launch(process, output, ours, known)

    def _wait_for(self, event: Event, launch: Launch) -> bool:
        """Waits for the event's moment; false when the launch has ended before."""
        deadline = time.monotonic() + PATIENCE_S
        while launch.process.poll() is None:
            if event.moment == "start" and time.monotonic() >= launch.began + event.after:
                return True
            if event.moment == "start":
                time.sleep(0.005)
                continue
            fresh = {key: life for key, life in lives(self.folder).items() if key not in launch.known}
            if {rank for rank, _ in fresh} == {0, 1}:
                num_batches = min(len(life.batches) for life in fresh.values())
                saving = event.moment == "step" or any((self.folder / "run" / "checkpoints").glob(".tmp-*"))
                if num_batches >= event.after and saving:
                    return True
            if time.monotonic() > deadline:
                raise AssertionError(f"no moment for {event} in {PATIENCE_S:g} s\n{launch.text()[-3000:]}")
            time.sleep(0.002)
        return False

    def _fire(self, event: Event, launch: Launch) -> None:
        self._say(str(event))
        launch.fired.append(event)
        if event.kind in ENDING:
            launch.progress = self._progress(launch)
        if event.kind == "disk-full":
            self._fill(event.seconds)
        elif event.kind == "hang-up":
            assert launch.terminal is not None
            os.close(launch.terminal)
            launch.terminal = None
        elif event.kind == "pause":
            self._send(event, launch)
            time.sleep(event.seconds)
            self._send(event, launch, signal.SIGCONT)
        elif event.kind == "read-errors":
            self._fail_reads(event, launch)
        else:
            self._send(event, launch)
            if event.kind in ("stop-twice", "stop-again"):
                time.sleep(event.seconds)
                self._send(event, launch)
        if event.signal == "SIGKILL":
            launch.known |= set(lives(self.folder))
        if event.kind in ENDING or event.target == "launcher" and event.kind == "kill":
            self._end(launch)

    def _fail_reads(self, event: Event, launch: Launch) -> None:
        """Kills, and lets those who start again meet errors for a while: by trying again, or by an end that says so."""
        before = self._num_injected()
        (self.folder / FAULTS).write_text("0.2" if event.seconds < LASTING_S else "1")
        self._send(event, launch)
        if event.target == "launcher" or self.schedule.runner not in RESTARTING:
            self._end(launch)
            launch = self._launch()
            launch.fired.append(event)
        deadline = time.monotonic() + PATIENCE_S
        while self._num_injected() == before and launch.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with suppress(subprocess.TimeoutExpired):
            launch.process.wait(event.seconds)
        (self.folder / FAULTS).unlink()
        self._end(launch)

    def _num_injected(self) -> int:
        path = self.folder / INJECTED
        return path.read_text().count("\n") if path.exists() else 0

    def _send(self, event: Event, launch: Launch, number: int | None = None) -> None:
        number = number or signal.Signals[event.signal]
        with suppress(ProcessLookupError):
            if event.target == "launcher":
                launch.process.send_signal(number)
            elif event.target == "group":
                os.killpg(launch.process.pid, number)
            else:
                for pid in self._pids(event, launch):
                    os.kill(pid, number)

    def _pids(self, event: Event, launch: Launch) -> list[int]:
        """The process of a rank, or any one of the run, the same for both signals of an event."""
        fresh = [
            pid for rank, pid in lives(self.folder) if str(rank) == event.target and (rank, pid) not in launch.known
        ]
        if fresh:
            return fresh[-1:]
        # The rank has not come so far that it would have said who it is.
        family = sorted(process.pid for process in self.processes() if process.pid != launch.process.pid)
        return [family[int(event.after * 1000) % len(family)]] if family else []

    def _end(self, launch: Launch) -> None:
        """Waits for a launch's end and looks at its exit status, and for what it has left running."""
        if launch.judged:
            return
        launch.judged = True
        try:
            status = launch.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._problem(f"the launch still runs {PATIENCE_S:g} s after its last event")
            for process in self.processes():
                process.kill()
            status = launch.process.wait()
        if launch.terminal is not None:
            os.close(launch.terminal)
            launch.terminal = None
        self._no_orphans(status)
        self._say(f"exit status {status}, checkpoints {self._published()}")
        self._judge(launch, status)

    # -- what must hold ------------------------------------------------------------------------------------------------

    def _judge(self, launch: Launch, status: int) -> None:
        """Compares the exit status with what happened."""
        kinds = [event.kind for event in launch.fired]
        done = self._done()
        if status == 0 and not done:
            self._problem(
                f"exit status 0, but the newest checkpoint is {self._published()[-1:]} of {self.num_steps} steps"
            )
        if not done and not self._may_fail(launch):
            self._problem(f"exit status {status} after {kinds}: the run had to go on to its end")
        if len(kinds) == 1 and kinds[0] in ("stop", "stop-twice", "hang-up") and not done:
            number = signal.Signals[launch.fired[0].signal]
            good = {128 + number, -number} if not launch.progress else {128 + number}
            if number == signal.SIGHUP:
                good.add(128 + signal.SIGTERM)  # what workers are sent in its place
            if status not in good:
                self._problem(f"exit status {status} after {number.name}, expected one of {sorted(good)}")
            newest = max(map(step_of, self._published()), default=0)
            if launch.progress and newest < launch.progress - SLACK_STEPS:
                self._problem(f"stopped at step {launch.progress}, but the last checkpoint is of step {newest}")
        if "Traceback" in _of_launcher(launch.text()):
            self._problem("the launcher printed a traceback")

    def _may_fail(self, launch: Launch) -> bool:
        """Whether what happened lets a launch end before its run is done."""
        if self.schedule.runner in RESTARTING:
            return any(event.kind not in ("pause",) and not _healed(event) for event in launch.fired)
        return any(event.kind != "pause" for event in launch.fired)

    def _no_orphans(self, status: int) -> None:
        # A launcher that was killed cannot wait for the others: they notice.
        deadline = time.monotonic() + (30 if status == -signal.SIGKILL else 5)
        while left := self.processes():
            if time.monotonic() > deadline:
                names = [" ".join(process.cmdline()) for process in left if process.is_running()]
                self._problem(f"still running after the launcher's end: {names}")
                for process in left:
                    process.kill()
            time.sleep(0.1)

    def _compare(self) -> None:
        """The run ended as the undisturbed one did, and no life lost a checkpoint that was there when it began."""
        if not self._done():
            self._problem(f"the last, undisturbed launch did not end the run: checkpoints {self._published()}")
            return
        if self.undisturbed is None:
            return
        one, other = (
            max((folder / "run" / "checkpoints").glob("step-*")) for folder in (self.folder, self.undisturbed)
        )
        try:
            assert_equal(read_replicated(one), read_replicated(other))
        except AssertionError as error:
            self._problem(f"the last checkpoint differs from the undisturbed run's: {error}")
        for rank in (0, 1):
            name = f"rank-{rank:05d}.json.gz"
            if (one / name).read_bytes() != (other / name).read_bytes():
                self._problem(f"{name} differs from the undisturbed run's")
        if not any(event.kind == "disk-full" for event in self.schedule.events):
            if steps_logged(self.folder / "run") != steps_logged(self.undisturbed / "run"):
                self._problem(f"metrics.jsonl has the steps {steps_logged(self.folder / 'run')}")
        left = sorted(path.name for path in one.parent.iterdir() if not path.name.startswith("step-"))
        if left != [".lock"]:
            self._problem(f"left among the checkpoints: {left}")
        self._check_lives()

    def _check_lives(self) -> None:
        for (rank, pid), life in lives(self.folder).items():
            steps = [self._steps[rank].get(batch, -1) for batch in life.batches]
            if not steps:
                continue
            if steps != list(range(steps[0], steps[0] + len(steps))):
                self._problem(f"rank {rank}, process {pid} read the batches of steps {steps}")
            newest = max(map(step_of, life.published), default=0)
            if steps[0] < newest:
                self._problem(f"rank {rank}, process {pid} began at step {steps[0]}; step {newest} had been saved")

    # -- looking at the run --------------------------------------------------------------------------------------------

    def processes(self) -> list[psutil.Process]:
        """Everything that the run has started and that still runs, wherever it hangs."""
        ours = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    ours.append(process)
        return ours

    def _published(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "run" / "checkpoints").glob("step-*"))

    def _done(self) -> bool:
        return max(map(step_of, self._published()), default=0) == self.num_steps

    def _progress(self, launch: Launch) -> int:
        """The step that both ranks have come to in this life; 0 before they have begun to train."""
        fresh = {rank: life for (rank, pid), life in lives(self.folder).items() if (rank, pid) not in launch.known}
        if set(fresh) != {0, 1} or any(len(life.batches) <= SLACK_STEPS for life in fresh.values()):
            return 0
        return min(self._steps[rank].get(life.batches[-1], 0) for rank, life in fresh.items()) if self._steps else 0

    def _outputs(self) -> list[Path]:
        logs = (self.folder / "run" / "logs").glob("*.log")
        return [*sorted(self.folder.glob("launch-*.txt")), *sorted(logs)]

    def _say(self, text: str) -> None:
        self.history.append(f"{time.monotonic() - self._began:7.2f} s: {text}")

    def _problem(self, text: str) -> None:
        self._say(f"PROBLEM: {text}")
        self.problems.append(text)

    # -- a disk that can be full ---------------------------------------------------------------------------------------

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Puts the run on a file system of its own where the schedule fills it."""
        if not any(event.kind == "disk-full" for event in self.schedule.events):
            yield
            return
        mount = self.folder / "run"
        mount.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "none", str(mount)], check=True)
        try:
            yield
        finally:
            kept = self.folder / "kept"
            subprocess.run(["cp", "-a", str(mount), str(kept)], check=False)
            subprocess.run(["umount", "--lazy", str(mount)], check=True)
            mount.rmdir()
            kept.rename(mount)

    def _fill(self, seconds: float) -> None:
        filler = self.folder / "run" / "filler"
        try:
            with filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        time.sleep(seconds)
        filler.unlink()


def _healed(event: Event) -> bool:
    """Whether a runner that restarts workers must get over it."""
    return event.kind == "kill" and event.target in ("0", "1") and event.moment != "start"


def _of_launcher(text: str) -> str:
    """The launcher's own lines: what workers print is shown before them, and quoted indented in a report."""
    return "\n".join(line for line in text.splitlines() if not line.startswith((" ", "\t")))


def _take_terminal(fd: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSCTTY, 0)


def _copy(terminal: int, output: Path) -> None:
    with output.open("ab", buffering=0) as file, suppress(OSError):
        while data := os.read(terminal, 65536):
            file.write(data)


def reference_steps(folder: Path) -> dict[int, dict[str, int]]:
    """Returns the step of each batch by its digest, of each rank, as an undisturbed run has read them."""
    return {rank: {batch: step for step, batch in enumerate(life.batches)} for (rank, _), life in lives(folder).items()}


def run_undisturbed(folder: Path, runner: str, num_steps: int) -> None:
    """Makes the run that disturbed ones are compared with."""
    folder.mkdir()
    problems = (run := Disturbed(Schedule(-1, runner, ()), folder, None, num_steps)).play()
    assert not problems, run.report()
