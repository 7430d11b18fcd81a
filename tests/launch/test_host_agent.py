"""The process between ssh and a launcher on each host: it ends the launcher when nothing else would."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

from distopt.launch.worker import events, host_agent
from tests.launch.launching import wait_until

TIMEOUT_S = 30
# A launcher that tells that it runs and when it is asked to stop, and ends then with the status of its argument.
LAUNCHER = (
    "import signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: (print('asked', flush=True), sys.exit(int(sys.argv[1]))))\n"
    "print('running', flush=True)\n"
    "time.sleep(600)"
)
DEAF = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('running', flush=True); time.sleep(600)"
)


@pytest.fixture
def agent():
    """Starts an agent; whatever still runs of it at the end is killed."""
    started = []

    def start(*command: str, options: tuple[str, ...] = (), **variables: str) -> subprocess.Popen:
        argv = [sys.executable, "-m", "distopt.launch.worker.host_agent", *options, "--", *command]
        started.append(
            subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env={**os.environ, **variables},
            )
        )  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait(TIMEOUT_S)
        for stream in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def python(code: str, *args: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code, *args)


def test_exit_status_is_the_launchers(agent):
    assert agent(*python("raise SystemExit(7)")).wait(TIMEOUT_S) == 7
    assert agent(*python("import os; os.kill(os.getpid(), 11)")).wait(TIMEOUT_S) == 128 + 11


@pytest.mark.parametrize("argv", [[], ["--"], ["--meet", "--", "true"], ["--nosuch", "a:1", "--", "true"]])
def test_wrong_usage_is_refused(argv):
    command = [sys.executable, "-m", "distopt.launch.worker.host_agent", *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 2 and done.stderr.startswith("usage: ")


@pytest.mark.parametrize(("status", "expected"), [(0, 0), (1, 128 + signal.SIGTERM)])
def test_signal_in_a_pod_asks_the_launcher_once_and_is_in_the_status(agent, status, expected):
    process = agent(*python(LAUNCHER, str(status)))
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out) == (expected, "asked\n")


def test_launcher_that_ignores_the_signal_is_killed_after_the_grace_time(agent, monkeypatch):
    process = agent(*python(DEAF), DISTOPT_GRACE_S="-5.9")  # 6 s are added for supervisors and launchers
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT_S) == 128 + signal.SIGTERM


def send_secrets(process: subprocess.Popen, line: str = "{}") -> None:
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def test_secrets_come_in_the_first_line_and_are_variables_of_the_launcher(agent):
    process = agent(*python("import os; print(os.environ['MY_TOKEN'])"), DISTOPT_HEARTBEAT="1")
    send_secrets(process, '{"MY_TOKEN": "s3cret"}')
    assert process.stdout.readline() == "s3cret\n"
    assert process.wait(TIMEOUT_S) == 0


def test_line_on_standard_input_asks_the_launcher_to_stop(agent):
    process = agent(*python(LAUNCHER, "3"), DISTOPT_HEARTBEAT="1")
    send_secrets(process)
    assert process.stdout.readline() == "running\n"
    process.stdin.write((host_agent.ALIVE + host_agent.STOP).decode())
    process.stdin.flush()
    assert process.wait(TIMEOUT_S) == 3  # over ssh the launcher's own status counts
    assert process.stdout.read() == "asked\n"


def test_end_of_distopt_launch_ends_everything_on_the_host(agent):
    process = agent(*python(DEAF), DISTOPT_HEARTBEAT="1")
    send_secrets(process)
    assert process.stdout.readline() == "running\n"
    (launcher,) = psutil.Process(process.pid).children()
    process.stdin.close()
    assert process.wait(TIMEOUT_S) == 1
    assert process.stderr.read() == "agent: `distopt launch` has ended\n"
    wait_until(lambda: not launcher.is_running(), "the launcher gone", TIMEOUT_S)


def test_silence_of_distopt_launch_ends_everything_on_the_host(agent):
    code = (
        "import sys; from distopt.launch.worker import host_agent; host_agent.SILENCE_S = 1.0\n"
        f"sys.exit(host_agent.main(['--', sys.executable, '-c', {DEAF!r}]))"
    )
    process = subprocess.Popen(
        python(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "DISTOPT_HEARTBEAT": "1"},
    )  # fmt: skip
    errors = ""
    try:
        send_secrets(process)
        assert process.stdout.readline() == "running\n"
        assert process.wait(TIMEOUT_S) == 1
        errors = process.stderr.read()
    finally:
        process.kill()
        process.communicate()
    assert errors == "agent: no heartbeat from `distopt launch` for 1 s\n"


def test_launcher_waits_for_the_rendezvous_and_says_so(capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
    host_agent.wait_for_rendezvous("localhost:1", [])  # this host is the one that listens
    received: list[int] = []
    threading.Timer(0.5, received.append, [signal.SIGTERM]).start()
    host_agent.wait_for_rendezvous("nosuchhost.invalid:29400", received)
    printed = capsys.readouterr().err
    assert printed == "agent: waiting for nosuchhost.invalid:29400: it has no address yet\n"


def test_rendezvous_on_another_host_is_there_when_it_answers(monkeypatch, capsys):
    monkeypatch.setattr(host_agent, "is_here", lambda name: False)
    monkeypatch.setattr(host_agent, "POLL_S", 0.05)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        threading.Timer(0.3, listener.listen).start()
        started = time.monotonic()
        host_agent.wait_for_rendezvous(f"127.0.0.1:{port}", [])
        assert time.monotonic() - started < TIMEOUT_S
    assert capsys.readouterr().err == f"agent: waiting for 127.0.0.1:{port}: 127.0.0.1 does not answer yet\n"


PERMANENT = {"text": "TypeError", "location": "", "time": 1.0, "permanent": True}


@pytest.mark.parametrize(
    ("ended", "status"),
    [
        ({"status": 2, "raised": PERMANENT}, 2),
        ({"status": 2}, 1),  # of a script, for reasons of its own
        ({"status": 1}, 1),
        ({"status": 2, "stopped": True}, 1),
        ({}, 1),
        ({"status": 1, "raised": PERMANENT}, 2),
        ({"status": 1, "raised": PERMANENT | {"permanent": False}}, 1),
    ],
)
def test_agent_ends_with_2_where_a_worker_has_ended_as_it_would_again(ended, status, agent, tmp_path):
    (tmp_path / "logs").mkdir()
    earlier = events.End(rank=0, attempt=0, host="h", pid=1, time=0.0, status=2, raised=PERMANENT)
    events.append(tmp_path, earlier)
    event = f"events.End(rank=0, attempt=0, host='h', pid=1, time=1.0, **{ended})" if ended else None
    code = (
        "import sys; from pathlib import Path; from distopt.launch.worker import events\n"
        f"if {bool(ended)}: events.append(Path({str(tmp_path)!r}), {event})\n"
        "sys.exit(1)"
    )
    assert agent(*python(code), options=("--run-dir", str(tmp_path))).wait(TIMEOUT_S) == status


@pytest.mark.parametrize("options", [("--meet",), ("--nosuch", "x"), ("--meet", "a:1", "b")])
def test_options_that_make_no_sense_are_refused(options, agent):
    process = agent("true", options=options)
    assert process.wait(TIMEOUT_S) == 2
    assert process.stderr.read().startswith("usage: ")
