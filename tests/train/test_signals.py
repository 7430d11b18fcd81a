from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distopt.train.signals import StopSignals
from tests.train.runs import BIN, ROOT, config, environment, steps_logged

# Sends itself two signals further apart than one Ctrl-C's echo, and would then go on.
IMPATIENT = """
import os, signal, time
from distopt.train.signals import StopSignals
with StopSignals() as stop:
    stop.hold()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == signal.SIGTERM
    time.sleep(1.1)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here")
"""


ALSO = [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, *ALSO])
def test_signal_is_noted_in_the_block_and_handled_as_before_after_it(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert signal.getsignal(number) is signal.SIG_DFL, "nothing to save yet"
        stop.hold()
        assert stop.received == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # the echo: terminal and launcher pass on the same one
        assert stop.received == number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", ALSO)
def test_handler_that_a_program_has_for_another_use_keeps_its_signal(number: signal.Signals, tmp_path) -> None:
    received: list[int] = []
    before = signal.signal(number, lambda *_: received.append(number))
    try:
        with StopSignals() as stop:
            stop.hold()
            os.kill(os.getpid(), number)
            assert received == [number] and stop.received == 0
    finally:
        signal.signal(number, before)
    if number not in (signal.SIGUSR1, signal.SIGUSR2):
        return

    with open(tmp_path / "stacks", "w") as stacks:  # a handler in C
        faulthandler.register(number, file=stacks)
        try:
            with StopSignals() as stop:
                stop.hold()
                os.kill(os.getpid(), number)
                assert stop.received == 0
        finally:
            faulthandler.unregister(number)
    assert "test_handler_that_a_program" in (tmp_path / "stacks").read_text()


def test_first_of_two_kinds_is_the_one_that_counts() -> None:
    with StopSignals() as stop:
        stop.hold()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == signal.SIGINT


def test_second_signal_ends_the_process_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", IMPATIENT], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (143, ""), done.stderr


# A library is left behind the interpreter's own clean-up, where handlers written in Python are gone already.
ENDING = """
import os, signal, sys
from distopt.train.signals import StopSignals

class Library:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGTERM, write=os.write):
        kill(pid, number)
        write(1, b"left")

sys.library = Library()
with StopSignals(until_exit=True) as stop:
    stop.hold()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == signal.SIGTERM
os.kill(os.getpid(), signal.SIGTERM)
sys.exit(7)
"""


def test_signal_while_the_process_ends_does_not_keep_it_from_leaving_in_order() -> None:
    done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (7, "left"), done.stderr


@pytest.mark.parametrize("until_exit", [False, True])
def test_signal_that_was_ignored_before_the_block_stays_ignored(until_exit: bool) -> None:
    code = f"""
import os, signal
from distopt.train.signals import StopSignals
signal.signal(signal.SIGINT, signal.SIG_IGN)
with StopSignals(until_exit={until_exit}) as stop:
    os.kill(os.getpid(), signal.SIGINT)
    stop.hold()
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.received == 0
assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "number", [signal.SIGUSR2, *(pytest.param(each, marks=pytest.mark.slow) for each in ALSO if each != signal.SIGUSR2)]
)
def test_train_without_a_launcher_saves_and_stops_at_signals_of_terminals_and_batch_systems(
    number: signal.Signals, tmp_path: Path
) -> None:
    command = [str(BIN / "distopt"), "train", str(config(tmp_path)), "train.num_steps=1000000"]
    run = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        while not steps_logged(tmp_path / "run") and run.poll() is None:
            time.sleep(0.1)  # the test's own timeout ends it
        run.send_signal(number)
        output, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 128 + number, output
    newest = max((tmp_path / "run/checkpoints").glob("step-*"))
    assert f"stopped after step {int(newest.name.removeprefix('step-')):,}" in output, output
