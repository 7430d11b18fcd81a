"""Help is in colour on a terminal, of all commands, and plain elsewhere."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

COMMANDS = [["--help"], ["config", "diff", "--help"], ["checkpoint", "inspect", "--help"]]
STYLE = re.compile(r"\x1b\[[0-9;]*m")


def on_a_terminal(arguments: list[str], **environment: str) -> str:
    """Returns what the command writes to a terminal."""
    ours, theirs = pty.openpty()
    env = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"COLUMNS": "80", "TERM": "xterm"}
    env |= environment
    process = subprocess.Popen([sys.executable, "-m", "distopt.launch", *arguments], stdout=theirs, env=env)
    os.close(theirs)
    written = b""
    try:
        while chunk := os.read(ours, 65536):
            written += chunk
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(ours)
    assert process.wait(timeout=60) == 0
    return written.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_help_of_a_terminal_is_that_of_a_pipe_with_colours(arguments: list[str]) -> None:
    colored = on_a_terminal(arguments)
    piped = subprocess.run(
        [sys.executable, "-m", "distopt.launch", *arguments],
        env=os.environ | {"COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert STYLE.search(colored) and "\x1b[36m" in colored and not STYLE.search(piped.stdout)
    assert STYLE.sub("", colored) == piped.stdout


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_terminal_that_wants_or_can_show_no_colour_gets_none(environment: dict[str, str]) -> None:
    assert not STYLE.search(on_a_terminal(["--help"], **environment))
