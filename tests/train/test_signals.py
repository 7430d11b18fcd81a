from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from distopt.train.signals import StopSignals

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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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


def test_first_of_two_kinds_is_the_one_that_counts() -> None:
    with StopSignals() as stop:
        stop.hold()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == signal.SIGINT


def test_second_signal_ends_the_process_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", IMPATIENT], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (143, ""), done.stderr
