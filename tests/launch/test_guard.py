"""The process between an engine and a worker, alone: no engine, no torch."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from distopt.launch import failure_report
from distopt.launch.worker import elastic, events, horovod_driver, terminal
from distopt.launch.worker.supervisor import LAST_WORDS_BYTES
from distopt.launchers import TERMINAL_VARIABLE
from tests.launch.launching import wait_until
from tests.test_launchers import exported, horovodrun, mpich, open_mpi, srun, torchrun

TIMEOUT_S = 30
HEADER = "--- 2026-01-01T00:00:00.000+00:00 rank 0 of 2, attempt 0\nTraceback (most recent call last):\n"


def guard(folder: Path, code: str, env: dict[str, str] | None = None, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "distopt.launch.worker.supervisor", "run", "--", sys.executable, "-c", code],
        cwd=folder, env={**os.environ, **(env or {})}, **options,
    )  # fmt: skip


def endings(folder: Path) -> list[dict]:
    lines = [line for path in (folder / "run/logs").glob("*.jsonl") for line in path.read_text().splitlines()]
    return [event for event in map(json.loads, lines) if event["event"] == "end"]


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, "rank 0 of 1"),
        (torchrun(1, 4) | srun(0, 2), "rank 1 of 4"),
        (horovodrun(2, 3), "rank 2 of 3"),
        (exported(0, 2) | open_mpi(1, 4), "rank 1 of 4"),
        (mpich(5, 6), "rank 5 of 6"),
        (srun(7, 8), "rank 7 of 8"),
    ],
)
def test_rank_is_read_from_whichever_launcher_started_the_worker(env, expected, tmp_path):
    assert guard(tmp_path, "", env).wait(TIMEOUT_S) == 0
    (log,) = (tmp_path / "run/logs").glob("rank-*.log")
    assert expected in log.read_text()


def test_rank_that_makes_no_sense_is_refused(tmp_path):
    refused = guard(tmp_path, "", torchrun(4, 4), stderr=subprocess.PIPE, text=True)
    _, message = refused.communicate(timeout=TIMEOUT_S)
    assert refused.returncode == 2
    assert message.startswith("distopt: torchrun says RANK='4' of WORLD_SIZE='4'")
    assert not (tmp_path / "run").exists()


def test_output_of_every_kind_is_in_the_log_and_the_exit_status_is_the_workers(tmp_path):
    code = "import sys, os; print('out'); print('err', file=sys.stderr); os.write(1, b'\\xff no newline'); sys.exit(7)"
    assert guard(tmp_path, code).wait(TIMEOUT_S) == 7
    assert (tmp_path / "run/logs/rank-0.log").read_bytes().split(b"\n", 1)[1] == b"out\nerr\n\xff no newline"
    assert [event["status"] for event in endings(tmp_path)] == [7]


def test_death_by_signal_is_written_down_and_told_as_a_shell_does(tmp_path):
    assert guard(tmp_path, "import os; os.kill(os.getpid(), 11)").wait(TIMEOUT_S) == 128 + 11
    assert [event["status"] for event in endings(tmp_path)] == [-11]


def test_world_of_another_size_than_asked_for_is_refused(tmp_path):
    env = {"DISTOPT_WORLD_SIZE": "2", **torchrun(0, 1)}
    assert guard(tmp_path, "print('trained')", env).wait(TIMEOUT_S) == 3
    log = (tmp_path / "run/logs/rank-0.log").read_text()
    assert "the engine started 1 workers, 2 were asked for" in log and "trained" not in log


def test_world_of_any_size_that_is_allowed_runs(tmp_path):
    env = {"DISTOPT_WORLD_SIZE": "1:3", **torchrun(0, 2)}
    assert guard(tmp_path, "").wait(TIMEOUT_S) == 0
    assert guard(tmp_path, "", env).wait(TIMEOUT_S) == 0


def test_processes_that_a_worker_leaves_behind_are_ended(tmp_path):
    code = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid)"
    )
    assert guard(tmp_path, code).wait(TIMEOUT_S) == 0
    pid = int((tmp_path / "run/logs/rank-0.log").read_text().splitlines()[-1])
    wait_until(lambda: not psutil.pid_exists(pid), "the child gone", TIMEOUT_S)


def test_worker_dies_with_its_guard(tmp_path):
    running = guard(tmp_path, "import os, time; print(os.getpid()); time.sleep(600)")
    log = tmp_path / "run/logs/rank-0.log"
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) == 2, "a pid in the log", TIMEOUT_S)
    pid = int(log.read_text().splitlines()[1])
    running.kill()
    running.wait(TIMEOUT_S)
    wait_until(lambda: not psutil.pid_exists(pid), "the worker gone", TIMEOUT_S)


def test_rank_0_has_the_terminal_and_its_log_has_plain_lines(tmp_path):
    ours, theirs = pty.openpty()
    code = (
        "import os, sys\n"
        "print(sys.stdout.isatty(), os.get_terminal_size().columns)\n"
        "print('\\x1b[32mstep 1\\x1b[0m', end='\\r'); print('\\x1b[2Kstep 2')"
    )
    terminal.fcntl.ioctl(theirs, terminal.termios.TIOCSWINSZ, b"\x18\x00\x47\x00" + b"\0" * 4)
    env = {TERMINAL_VARIABLE: f"{os.uname().nodename}:{os.ttyname(theirs)}"}
    try:
        assert guard(tmp_path, code, env).wait(TIMEOUT_S) == 0
        drawn = os.read(ours, 65536)
    finally:
        os.close(ours)
        os.close(theirs)
    assert drawn == b"True 71\r\n\x1b[32mstep 1\x1b[0m\r\x1b[2Kstep 2\r\n"
    assert (tmp_path / "run/logs/rank-0.log").read_text().splitlines()[1:] == ["True 71", "step 2"]


def test_report_puts_the_culprit_before_ranks_that_lost_their_connection_earlier(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank-0.log").write_text(f"{HEADER}Connection reset by peer\n")
    (tmp_path / "logs/rank-1.log").write_text(f"{HEADER}ValueError: no\n")
    ends = [events.End(rank, 0, "host", 1, time, 1) for rank, time in ((0, 10.0), (1, 11.0))]
    said = failure_report.failure(tmp_path, ends, 1, 3.0, "engine.log")
    assert "rank 1 on host died first" in said
    assert "After it: rank 0 on host ended with exit status 1 (Connection reset by peer)" in said


def test_report_names_the_rank_that_told_the_others_of_its_error_though_it_ended_last(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank-0.log").write_text(
        f"{HEADER}PeerError: rank 1 of 2 failed at step 3: ValueError: no\n--- traceback of rank 1\nValueError: no\n"
    )
    (tmp_path / "logs/rank-1.log").write_text(f"{HEADER}ValueError: no\nTrace Shapes:\n")
    ends = [events.End(0, 0, "host", 1, 10.0, 1), events.End(1, 0, "host", 2, 11.0, -15, stopped=True)]
    said = failure_report.failure(tmp_path, ends, 1, 3.0, "engine.log")
    assert "rank 1 on host died first: it failed at step 3: ValueError: no" in said
    assert "Told of its error, and ended by that: rank 0 on host." in said
    assert "rank-1.log ends with" in said and "waiting" not in said


def test_report_is_of_the_last_life_though_an_earlier_one_had_more_attempts():
    lives = [(0, 1.0), (1, 2.0), (0, 3.0)]  # attempts and times: one restart, then the job was requeued
    seen = [
        kind(rank, attempt, "host", 1, time + later, status)
        for attempt, time in lives
        for kind, later, status in ((events.Start, 0.0, None), (events.End, 0.5, 1))
        for rank in (0, 1)
    ]
    assert failure_report.last_attempt(seen) == seen[-4:]
    shrunk = [*seen, events.Start(0, 1, "host", 1, 4.0)]  # an elastic world went on with one rank
    assert failure_report.last_attempt(shrunk) == shrunk[-1:]
    assert failure_report.last_attempt([]) == []


def test_out_of_memory_is_told_as_such():
    assert "out of memory" in failure_report.cause(events.End(0, 0, "host", 1, 0.0, -9, out_of_memory=True))


@pytest.fixture
def rendezvous(tmp_path) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Answers guards as horovodrun's does, the real one is in test_elastic.py; yields variables and questions."""
    asked: list[str] = []

    class Rendezvous(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if elastic.read(tmp_path / "run")[0]:
                elastic.begin(tmp_path / "run", 2)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"0,2,0,1,0,2")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Rendezvous) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        env = {
            "HOROVOD_ELASTIC": "1", "HOROVOD_RANK": "1", "HOROVOD_SIZE": "3", "HOROVOD_HOSTNAME": "here",
            "HOROVOD_LOCAL_RANK": "0", "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
            "HOROVOD_GLOO_RENDEZVOUS_PORT": str(server.server_port),
        }  # fmt: skip
        yield env, asked
        server.shutdown()
        serving.join(TIMEOUT_S)


PLACE = "import os, signal, sys, time; print(os.environ['HOROVOD_RANK'], 'of', os.environ['HOROVOD_SIZE'])\n"
UNTIL_ASKED = PLACE + (
    "if os.environ['HOROVOD_SIZE'] == '2': sys.exit(0)\n"
    "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(143)))\n"
    "open('ready', 'w').close()\n"
    "time.sleep(600)"
)


def elastic_guard(folder: Path, code: str, env: dict[str, str]) -> subprocess.Popen:
    """Starts a guard in the first round, and returns when its worker is at work."""
    (folder / "run").mkdir()
    elastic.begin(folder / "run", 1)
    running = guard(folder, code, env)
    wait_until(lambda: (folder / "ready").exists(), "the worker ready", TIMEOUT_S)
    return running


def ends_in_order(folder: Path) -> list[tuple[int, int, bool]]:
    ends = sorted(endings(folder), key=lambda event: event["time"])
    return [(event["attempt"], event["status"], event["stopped"]) for event in ends]


def test_worker_of_elastic_horovod_that_lost_the_others_starts_again_in_its_new_place(tmp_path, rendezvous):
    env, asked = rendezvous
    code = PLACE + "sys.exit(os.environ['HOROVOD_SIZE'] == '3')"
    assert guard(tmp_path, code, env).wait(TIMEOUT_S) == 0
    assert asked == ["/rank_and_size/here:0"]
    assert (tmp_path / "run/logs/rank-1.log").read_text().splitlines()[1:] == ["1 of 3"]
    assert (tmp_path / "run/logs/rank-0.log").read_text().splitlines()[1:] == ["0 of 2"]
    assert ends_in_order(tmp_path) == [(0, 1, False), (1, 0, False)]


def test_worker_of_a_round_that_is_over_saves_and_starts_again_in_its_new_place(tmp_path, rendezvous):
    env, asked = rendezvous
    running = elastic_guard(tmp_path, UNTIL_ASKED, env)
    elastic.end(tmp_path / "run", 1)
    assert running.wait(TIMEOUT_S) == 0
    assert asked == ["/rank_and_size/here:0"]
    assert (tmp_path / "run/logs/rank-1.log").read_text().splitlines()[1:] == ["1 of 3", "saved"]
    assert (tmp_path / "run/logs/rank-0.log").read_text().splitlines()[1:] == ["0 of 2"]
    assert ends_in_order(tmp_path) == [(0, 143, True), (1, 0, False)]


def test_worker_left_behind_on_a_lost_host_ends_for_good_when_it_sees_a_later_round(tmp_path, rendezvous):
    env, asked = rendezvous
    running = elastic_guard(tmp_path, UNTIL_ASKED, env)
    elastic.begin(tmp_path / "run", 3)
    assert running.wait(TIMEOUT_S) == 143
    assert asked == []
    assert ends_in_order(tmp_path) == [(0, 143, True)]


@pytest.fixture
def ssh(tmp_path, monkeypatch) -> Path:
    """An ssh in place of the run's own: it reaches the hosts whose names are files in its folder."""
    program = tmp_path / "ssh"
    program.write_text(f'#!/bin/sh\ntest "$1 $2 $4" = "-T -- true" && test -e "{tmp_path}/$3"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(horovod_driver, "ASK_EVERY_S", 0.0)
    return tmp_path


def test_lost_host_is_named_again_when_it_answers_and_the_others_are_not_asked(ssh):
    lost: set[str] = set()
    hosts = horovod_driver.Answering(lambda: {"one.invalid": 1, "two.invalid": 2}, lost.__contains__)
    find = hosts.find_available_hosts_and_slots
    assert find() == {"one.invalid": 1, "two.invalid": 2}
    lost.add("two.invalid")
    assert find() == {"one.invalid": 1}
    wait_until(lambda: hosts._answered == {"two.invalid": False}, "an answer of ssh", TIMEOUT_S)
    assert find() == {"one.invalid": 1}
    (ssh / "two.invalid").touch()
    wait_until(lambda: find() == {"one.invalid": 1, "two.invalid": 2}, "the host back", TIMEOUT_S)
    lost.clear()
    assert find() == {"one.invalid": 1, "two.invalid": 2}
    (ssh / "two.invalid").unlink()
    lost.add("two.invalid")
    assert find() == {"one.invalid": 1}  # what it answered before is no answer now


def test_last_words_of_a_worker_that_died_are_left_where_a_pod_s_kubelet_reads_them(tmp_path):
    words = tmp_path / "termination-log"
    words.touch()
    command = [sys.executable, "-c", f"print('é' * {LAST_WORDS_BYTES}); raise ValueError('boom')"]
    script = (
        "import sys; from pathlib import Path; from distopt.launch.worker import supervisor\n"
        f"supervisor.LAST_WORDS = Path('termination-log'); sys.exit(supervisor.main(['run', '--', *{command!r}]))"
    )
    env = {**os.environ, **torchrun(1, 2)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, timeout=TIMEOUT_S)
    assert done.returncode == 1
    text = words.read_text()
    assert text.startswith("rank 1: Traceback") and text.endswith("ValueError: boom")
