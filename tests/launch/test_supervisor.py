"""The process between a launcher and a worker, alone: no launcher, no torch."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from distopt.launch.worker import elastic, terminal
from distopt.launch.worker.rank_log import traceback_of
from distopt.launch.worker.supervisor import NO_FURTHER_ATTEMPT, TERMINATION_LOG_BYTES
from distopt.launchers import PREEMPTION_VARIABLE, STOP_FILE, TERMINAL_VARIABLE, WATCH_STOP_VARIABLE
from tests.launch.launching import wait_until
from tests.test_launchers import exported, horovodrun, mpich, open_mpi, srun, torchrun

TIMEOUT_S = 30


def supervise(folder: Path, code: str, env: dict[str, str] | None = None, **options) -> subprocess.Popen:
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
    assert supervise(tmp_path, "", env).wait(TIMEOUT_S) == 0
    (log,) = (tmp_path / "run/logs").glob("rank-*.log")
    assert expected in log.read_text()


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("import helper", "SyntaxError: "),
        ("x = = 1", "SyntaxError: "),
        ("if True:\nx = 1", "IndentationError: "),
        ("import no_module_of_mine", "ModuleNotFoundError: No module named 'no_module_of_mine'"),
        ("from os import no_such_name", "ImportError: cannot import name 'no_such_name'"),
        ("import argparse; argparse.ArgumentParser().parse_args(['--x'])", "s.py: error: unrecognized arguments: --x"),
        (None, "can't open file"),
        ("raise ValueError('no')", None),
        ("raise SystemExit(3)", None),
        ("print('the loss diverged'); raise SystemExit(2)", None),
        ("import traceback\ntry: 1 / 0\nexcept ArithmeticError: traceback.print_exc()\nraise SystemExit(2)", None),
        ("print('ImportError: of a log'); raise SystemExit(1)", None),
        ("raise ImportError('lib.so: cannot open shared object file: Input/output error')", None),
        ("try:\n    import no_module_of_mine\nexcept ImportError:\n    raise ValueError('no')", None),
    ],
)  # fmt: skip
def test_script_that_cannot_be_imported_or_started_has_an_error_that_no_restart_heals(script, error, tmp_path):
    (tmp_path / "helper.py").write_text("def f(:\n")
    if script is not None:
        (tmp_path / "s.py").write_text(script)
    argv = [sys.executable, "-m", "distopt.launch.worker.supervisor", "run", "--", sys.executable, "s.py"]
    assert subprocess.run(argv, cwd=tmp_path, timeout=TIMEOUT_S, check=False).returncode
    (end,) = endings(tmp_path)
    if error is None:
        assert end["raised"] is None
    else:
        assert error in end["raised"]["text"] and end["raised"]["permanent"], end


def test_rank_that_makes_no_sense_is_refused(tmp_path):
    refused = supervise(tmp_path, "", torchrun(4, 4), stderr=subprocess.PIPE, text=True)
    _, message = refused.communicate(timeout=TIMEOUT_S)
    assert refused.returncode == 2
    assert message.startswith("distopt: torchrun says RANK='4' of WORLD_SIZE='4'")
    assert not (tmp_path / "run").exists()


def test_output_of_every_kind_is_in_the_log_and_the_exit_status_is_the_workers(tmp_path):
    code = "import sys, os; print('out'); print('err', file=sys.stderr); os.write(1, b'\\xff no newline'); sys.exit(7)"
    assert supervise(tmp_path, code).wait(TIMEOUT_S) == 7
    assert (tmp_path / "run/logs/rank-0.log").read_bytes().split(b"\n", 1)[1] == b"out\nerr\n\xff no newline"
    assert [event["status"] for event in endings(tmp_path)] == [7]


def test_death_by_signal_is_recorded_and_has_the_exit_status_of_a_shell(tmp_path):
    assert supervise(tmp_path, "import os; os.kill(os.getpid(), 11)").wait(TIMEOUT_S) == 128 + 11
    assert [event["status"] for event in endings(tmp_path)] == [-11]


def test_world_of_another_size_than_asked_for_is_refused(tmp_path):
    env = {"DISTOPT_WORLD_SIZE": "2", **torchrun(0, 1)}
    assert supervise(tmp_path, "print('trained')", env).wait(TIMEOUT_S) == 3
    log = (tmp_path / "run/logs/rank-0.log").read_text()
    assert "the launcher started 1 worker(s), expected 2" in log and "trained" not in log


RECORDS_ERROR = (
    "from distopt.worker_error import record_error\n"
    "print('Traceback (most recent call last):\\nTypeError: no lrr')\n"
    "record_error(TypeError('no lrr'), permanent=True); raise SystemExit(1)"
)


def attempt(number: int, world_size: int = 2) -> dict[str, str]:
    return {**torchrun(0, world_size), "TORCHELASTIC_RESTART_COUNT": str(number)}


def test_worker_is_not_started_again_after_an_error_that_would_come_again_and_the_record_is_of_that_one(tmp_path):
    assert supervise(tmp_path, RECORDS_ERROR, attempt(0)).wait(TIMEOUT_S) == 1
    assert supervise(tmp_path, "print('again')", attempt(1)).wait(TIMEOUT_S) == NO_FURTHER_ATTEMPT
    assert [(end["attempt"], end["status"]) for end in endings(tmp_path)] == [(0, 1)]
    assert traceback_of(tmp_path / "run", 0)[:2] == ["Traceback (most recent call last):", "TypeError: no lrr"]
    assert "not started again: rank 0 failed: TypeError: no lrr" in (tmp_path / "run/logs/rank-0.log").read_text()


def test_worker_is_started_again_whatever_error_has_ended_an_earlier_run_in_its_directory(tmp_path):
    assert supervise(tmp_path, RECORDS_ERROR, attempt(0)).wait(TIMEOUT_S) == 1
    logs = tmp_path / "run/logs"
    of_rank_1 = (logs / "rank-0.jsonl").read_text().replace('"rank": 0', '"rank": 1')
    # The next run's supervisor is lost with its host in the first attempt, and leaves no end.
    lost = supervise(tmp_path, "open('ready', 'w').close(); import time; time.sleep(600)", attempt(0))
    wait_until((tmp_path / "ready").exists, "the worker at work", TIMEOUT_S)
    lost.kill()
    lost.wait(TIMEOUT_S)
    assert supervise(tmp_path, "print('again')", attempt(1)).wait(TIMEOUT_S) == 0
    # Another earlier run was larger.
    (logs / "rank-1.jsonl").write_text(of_rank_1)
    assert supervise(tmp_path, "print('again')", attempt(1, 2)).wait(TIMEOUT_S) == NO_FURTHER_ATTEMPT
    assert supervise(tmp_path, "print('again')", attempt(1, 1)).wait(TIMEOUT_S) == 0


def test_world_of_any_size_that_is_allowed_runs(tmp_path):
    env = {"DISTOPT_WORLD_SIZE": "1:3", **torchrun(0, 2)}
    assert supervise(tmp_path, "").wait(TIMEOUT_S) == 0
    assert supervise(tmp_path, "", env).wait(TIMEOUT_S) == 0


@pytest.mark.parametrize(("worker_status", "expected"), [(143, 0), (0, 0), (3, 3)])
def test_worker_that_stopped_as_the_stop_file_asked_ends_well_for_the_launcher(worker_status, expected, tmp_path):
    # mpirun kills all others at the first status that is not 0, and supervisors that have not recorded the same yet.
    code = (
        f"import os, signal, time; signal.signal(signal.SIGTERM, lambda *_: os._exit({worker_status})); time.sleep(60)"
    )
    supervisor = supervise(tmp_path, code, {WATCH_STOP_VARIABLE: "1"})
    wait_until(lambda: list((tmp_path / "run").glob("logs/*.jsonl")), "the worker started")
    wait_until(lambda: handles_sigterm(psutil.Process(supervisor.pid).children()), "the worker's handler is set")
    (tmp_path / "run" / STOP_FILE).touch()
    assert supervisor.wait(TIMEOUT_S) == expected
    assert [(event["status"], event["stopped"]) for event in endings(tmp_path)] == [(worker_status, True)]


def handles_sigterm(processes: list[psutil.Process]) -> bool:
    """Returns whether the one process has a handler, as the kernel sees it."""
    if len(processes) != 1:
        return False
    status = Path(f"/proc/{processes[0].pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) & 1 << (signal.SIGTERM - 1))


def test_processes_that_a_worker_leaves_behind_are_killed(tmp_path):
    code = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid)"
    )
    assert supervise(tmp_path, code).wait(TIMEOUT_S) == 0
    pid = int((tmp_path / "run/logs/rank-0.log").read_text().splitlines()[-1])
    wait_until(lambda: not psutil.pid_exists(pid), "the child gone", TIMEOUT_S)


def test_worker_dies_with_its_supervisor(tmp_path):
    running = supervise(tmp_path, "import os, time; print(os.getpid()); time.sleep(600)")
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
        assert supervise(tmp_path, code, env).wait(TIMEOUT_S) == 0
        drawn = os.read(ours, 65536)
    finally:
        os.close(ours)
        os.close(theirs)
    assert drawn == b"True 71\r\n\x1b[32mstep 1\x1b[0m\r\x1b[2Kstep 2\r\n"
    assert (tmp_path / "run/logs/rank-0.log").read_text().splitlines()[1:] == ["True 71", "step 2"]


@pytest.fixture
def rendezvous(tmp_path) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Answers supervisors as horovodrun's does; the real one is in test_elastic.py. Yields variables and requests."""
    asked: list[str] = []

    class Rendezvous(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if elastic.read_round(tmp_path / "run")[0]:
                elastic.begin_round(tmp_path / "run", 2)
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


SHOW_RANK = "import os, signal, sys, time; print(os.environ['HOROVOD_RANK'], 'of', os.environ['HOROVOD_SIZE'])\n"
UNTIL_ASKED = SHOW_RANK + (
    "if os.environ['HOROVOD_SIZE'] == '2': sys.exit(0)\n"
    "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(143)))\n"
    "open('ready', 'w').close()\n"
    "time.sleep(600)"
)


def supervise_in_round_1(folder: Path, code: str, env: dict[str, str]) -> subprocess.Popen:
    """Starts a supervisor in the first round, and returns when its worker is at work."""
    (folder / "run").mkdir()
    elastic.begin_round(folder / "run", 1)
    running = supervise(folder, code, env)
    wait_until(lambda: (folder / "ready").exists(), "the worker ready", TIMEOUT_S)
    return running


def ends_in_order(folder: Path) -> list[tuple[int, int, bool]]:
    ends = sorted(endings(folder), key=lambda event: event["time"])
    return [(event["attempt"], event["status"], event["stopped"]) for event in ends]


def test_worker_of_elastic_horovod_that_lost_the_others_starts_again_with_its_new_rank(tmp_path, rendezvous):
    env, asked = rendezvous
    code = SHOW_RANK + "sys.exit(os.environ['HOROVOD_SIZE'] == '3')"
    assert supervise(tmp_path, code, env).wait(TIMEOUT_S) == 0
    assert asked == ["/rank_and_size/here:0"]
    assert (tmp_path / "run/logs/rank-1.log").read_text().splitlines()[1:] == ["1 of 3"]
    assert (tmp_path / "run/logs/rank-0.log").read_text().splitlines()[1:] == ["0 of 2"]
    assert ends_in_order(tmp_path) == [(0, 1, False), (1, 0, False)]


def test_worker_of_a_round_that_is_over_saves_and_starts_again_with_its_new_rank(tmp_path, rendezvous):
    env, asked = rendezvous
    running = supervise_in_round_1(tmp_path, UNTIL_ASKED, env)
    elastic.end_round(tmp_path / "run", 1)
    assert running.wait(TIMEOUT_S) == 0
    assert asked == ["/rank_and_size/here:0"]
    assert (tmp_path / "run/logs/rank-1.log").read_text().splitlines()[1:] == ["1 of 3", "saved"]
    assert (tmp_path / "run/logs/rank-0.log").read_text().splitlines()[1:] == ["0 of 2"]
    assert ends_in_order(tmp_path) == [(0, 143, True), (1, 0, False)]


def test_worker_left_behind_on_a_lost_host_ends_for_good_when_it_sees_a_later_round(tmp_path, rendezvous):
    env, asked = rendezvous
    running = supervise_in_round_1(tmp_path, UNTIL_ASKED, env)
    elastic.begin_round(tmp_path / "run", 3)
    assert running.wait(TIMEOUT_S) == 143
    assert asked == []
    assert ends_in_order(tmp_path) == [(0, 143, True)]


def test_traceback_of_a_worker_that_died_is_written_where_a_pod_s_kubelet_reads_it(tmp_path):
    message = tmp_path / "termination-log"
    message.touch()
    command = [sys.executable, "-c", f"print('é' * {TERMINATION_LOG_BYTES}); raise ValueError('boom')"]
    script = (
        "import sys; from pathlib import Path; from distopt.launch.worker import supervisor\n"
        f"supervisor.TERMINATION_LOG = Path('termination-log'); sys.exit(supervisor.main(['run', '--', *{command!r}]))"
    )
    env = {**os.environ, **torchrun(1, 2)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, timeout=TIMEOUT_S)
    assert done.returncode == 1
    text = message.read_text()
    assert text.startswith("rank 1: Traceback") and text.endswith("ValueError: boom")


def test_worker_waits_passively_and_keeps_its_memory_unless_its_environment_says_otherwise(tmp_path):
    show = (
        "import os, pathlib;"
        "pathlib.Path('seen').write_text(os.environ['OMP_WAIT_POLICY'] + os.environ['MALLOC_TRIM_THRESHOLD_'])"
    )
    for variables, expected in (({}, "PASSIVE4000000000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE4000000000")):
        assert supervise(tmp_path, show, {**torchrun(0, 1), **variables}).wait(TIMEOUT_S) == 0
        assert (tmp_path / "seen").read_text() == expected


def test_file_that_announces_the_end_of_a_host_stops_the_worker_and_is_recorded(tmp_path):
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (open('saved', 'w'), sys.exit(143)));"
        "open('ready', 'w'); time.sleep(600)"
    )
    announced = tmp_path / "preempted"
    supervisor = supervise(tmp_path, code, {PREEMPTION_VARIABLE: str(announced)})
    wait_until((tmp_path / "ready").exists, "the worker ready", TIMEOUT_S)
    announced.touch()
    assert supervisor.wait(TIMEOUT_S) == 143
    assert (tmp_path / "saved").exists()
    events = [json.loads(line)["event"] for line in (tmp_path / "run/logs/rank-0.jsonl").read_text().splitlines()]
    assert events == ["start", "preemption", "end"]
    assert endings(tmp_path)[0]["stopped"]


def test_file_of_an_earlier_announcement_stops_nothing(tmp_path):
    announced = tmp_path / "preempted"
    announced.touch()
    assert (
        supervise(tmp_path, "import time; time.sleep(1.5)", {PREEMPTION_VARIABLE: str(announced)}).wait(TIMEOUT_S) == 0
    )
