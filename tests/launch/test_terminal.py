"""The terminal that rank 0 gets, and what of it goes into the log."""

from __future__ import annotations

import os
import pty
import socket
import termios

import pytest

from distopt.launch.worker import terminal
from distopt.launchers import TERMINAL_VARIABLE


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"step 1", b"step 1"),
        (b"step 1\rstep 2\r", b"step 2"),
        (b"\x1b[?25l\x1b[32mstep 3\x1b[0m\x1b[K", b"step 3"),
        (b"\x1b]0;a title\x07step 4", b"step 4"),
        (b"\r  \r", b""),
        ("\x1b[1mü".encode(), "ü".encode()),
    ],
)
def test_last_state_of_a_line_is_kept_without_escape_sequences(line, text):
    assert terminal.plain(line) == text


@pytest.fixture
def screen():
    """A terminal of 71 columns; yields its file and the end that reads what is drawn."""
    reading_end, device = pty.openpty()
    termios.tcsetwinsize(device, (24, 71))
    with os.fdopen(device, "wb", buffering=0) as file:
        yield file, reading_end
    os.close(reading_end)


def test_only_rank_0_on_the_terminals_own_machine_gets_it(screen, monkeypatch):
    file, _ = screen
    device = os.ttyname(file.fileno())
    monkeypatch.setenv(TERMINAL_VARIABLE, f"{socket.gethostname()}:{device}")
    opened = terminal.open_for(0)
    assert opened is not None
    opened.close()
    assert terminal.open_for(1) is None
    for elsewhere in (
        f"otherhost:{device}",
        f"{socket.gethostname()}:/dev/null",
        f"{socket.gethostname()}:/nosuch",
        "",
    ):
        monkeypatch.setenv(TERMINAL_VARIABLE, elsewhere)
        assert terminal.open_for(0) is None


def test_process_without_a_terminal_lends_none(monkeypatch, tmp_path):
    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr("sys.stdout", out)
        assert terminal.lend() == {}


def test_pseudo_terminal_has_the_screens_size_and_changes_no_byte(screen):
    file, _ = screen
    reading_end, worker_end = terminal.open_pseudo_terminal(file)
    try:
        assert os.get_terminal_size(worker_end).columns == 71
        os.write(worker_end, b"a\nb\r\n")
        assert os.read(reading_end, 100) == b"a\nb\r\n"
    finally:
        os.close(reading_end)
        os.close(worker_end)


def test_output_goes_to_the_terminal_as_it_is_and_to_the_log_in_lines(screen, tmp_path):
    file, drawn = screen
    source, sink = terminal.open_pseudo_terminal(file)
    with (tmp_path / "log").open("wb", buffering=0) as log:
        tee = terminal.Tee(log, file)
        for data in (b"step 1\r", b"\x1b[32mstep 2", b"\x1b[0m\ndone"):
            os.write(sink, data)
            assert tee.copy(source)
        assert (tmp_path / "log").read_bytes() == b"step 2\n"
        os.close(sink)
        assert not tee.copy(source)
        tee.close()
    os.close(source)
    assert (tmp_path / "log").read_bytes() == b"step 2\ndone\n"
    seen = b""
    while b"done" not in seen:
        seen += os.read(drawn, 1000)
    assert seen == b"step 1\r\x1b[32mstep 2\x1b[0m\r\ndone"
