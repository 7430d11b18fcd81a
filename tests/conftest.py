"""What holds for every test: one thread, a fresh parameter store, and nothing left behind."""

from __future__ import annotations

import compileall
import fcntl
import inspect
import os
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

from tests import workers

# Set before torch is imported, and inherited by every process a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts what it puts into the background with SIGINT ignored, and `nohup` ignores SIGHUP. Launchers would
# inherit that from pytest and keep to it, as they should, and tests that stop them by signals would wait in vain.
for _signal, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_signal) is signal.SIG_IGN:
        signal.signal(_signal, _handler)

# What stops launchers and workers. Not SIGCHLD: a DataLoader of torch handles it for as long as the process lives.
HANDLED_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)

# A busy machine is no reason to fail: no test asserts a time.
settings.register_profile("distopt", deadline=None)
settings.load_profile("distopt")

# Threads that a library keeps for the whole process, so that no test is to blame for them.
LASTING_THREADS = ("tqdm_monitor", "fsspecIO", "ThreadPoolExecutor", "asyncio_", "pydevd")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")
    parser.addoption("--update-golden", action="store_true", help="write the launcher's golden files anew")


def pytest_sessionstart(session):
    # With PYTHONDONTWRITEBYTECODE, as images set it, each process that a test starts would compile the package anew:
    # a tenth of what a small run computes.
    for folder in ("distopt", "launch", "tests"):
        compileall.compile_dir(workers.ROOT / folder, quiet=2)


def process_of(nodeid: str) -> str:
    """Returns what tests of one process of pytest have in common: worlds that start once for them, or a file.

    Worlds of Horovod and MPI poll while they wait, so two of them on the same cores would both crawl.
    """
    file, _, name = nodeid.partition("::")
    has_world = any(f"{kind}-{size}" in name for kind, size in workers.WORLDS)
    return "worlds" if has_world or file.startswith("tests/backends/") else file


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, for `-n`
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return process_of(nodeid)

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config, items):
    mark_slow_cases(items)
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="takes minutes: pytest tests --slow runs it")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


def mark_slow_cases(items: list[pytest.Item]) -> None:
    """Marks cases of sampled tests as slow, but for some of them, as far apart as can be."""
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for each in cases.values():
        (num_quick,) = each[0].get_closest_marker("sampled").args
        quick = {number * len(each) // num_quick for number in range(num_quick)}
        for number, item in enumerate(each):
            if number not in quick:
                item.add_marker(pytest.mark.slow)


@contextmanager
def share_of_machine(folder: Path, *, alone: bool) -> Iterator[None]:
    """Holds one share of this machine beside the other processes of pytest, or waits until all of it is free."""
    with open(folder / "machine.lock", "a") as machine, open(folder / "gate.lock", "a") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)  # who waits for all of it is overtaken by nobody
        fcntl.flock(machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before the timeout of the test begins
def pytest_runtest_protocol(item, nextitem):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    shared_folder = item.config._tmp_path_factory.getbasetemp().parent
    with share_of_machine(shared_folder, alone="alone" in item.keywords):
        return (yield)


RAN = ("passed", "failed", "error", "xfailed", "xpassed")


def has_run_nothing(reporter) -> bool:
    """Returns whether every test of the selection was skipped, so that what was asked for has not been tested.

    The processes of xdist have no reporter: the one that started them has, and judges.
    """
    return reporter is not None and bool(reporter.stats.get("skipped")) and not any(map(reporter.stats.get, RAN))


def pytest_sessionfinish(session, exitstatus):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == pytest.ExitCode.OK and has_run_nothing(reporter):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def pytest_terminal_summary(terminalreporter):
    if has_run_nothing(terminalreporter):
        skipped = terminalreporter.stats["skipped"]
        reasons = sorted({report.longrepr[2].removeprefix("Skipped: ") for report in skipped})
        terminalreporter.write_line(f"nothing ran: {'; '.join(reasons)}", red=True)


WORLDS = [
    pytest.param(world, id=f"{world[0]}-{world[1]}", marks=() if world in workers.QUICK_WORLDS else pytest.mark.slow)
    for world in workers.WORLDS
]


@pytest.fixture(scope="session", params=WORLDS)
def ranks(request: pytest.FixtureRequest) -> workers.Ranks:
    """Every backend with every number of ranks; pytest runs all tests of one world together, so that it starts once."""
    return workers.Ranks(*request.param)


@pytest.fixture
def golden(request) -> Callable[[str, str], None]:
    """Compares a text with a file in `golden` beside the test, or writes that file anew with --update-golden."""

    def compare(name: str, text: str) -> None:
        program = Path(sys.executable)
        for path, stand_in in ((program, "PYTHON"), (program.parent, "BIN"), (Path.cwd(), "FOLDER")):
            text = text.replace(str(path), stand_in)

        golden_file = Path(inspect.getfile(request.function)).with_name("golden") / name
        if request.config.getoption("--update-golden"):
            golden_file.parent.mkdir(exist_ok=True)
            golden_file.write_text(text)
        assert text == golden_file.read_text(), f"{name} differs; `make golden` writes it anew, if that is meant"

    return compare


@pytest.fixture(autouse=True)
def fresh_pyro() -> Iterator[None]:
    """Starts each test with an empty parameter store and known noise, and ends it without validation settings."""
    import pyro

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fails a test that leaves environment variables, threads, signal handlers or a process group to the next one."""
    import torch.distributed

    environment = dict(os.environ)
    threads = set(threading.enumerate())
    handlers = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    yield
    # Every process that a later test starts inherits an ignored signal, and cannot be stopped by it any more.
    replaced = [number.name for number, handler in handlers.items() if signal.getsignal(number) != handler]
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert not replaced, f"the test left these signals with other handlers: {replaced}"
    changed = {name for name in environment.keys() | os.environ.keys() if environment.get(name) != os.environ.get(name)}
    changed -= {
        "PYTEST_CURRENT_TEST",
        "TORCHINDUCTOR_CACHE_DIR",  # torch sets it when a first optimizer is made
        "PYTORCH_NVML_BASED_CUDA_CHECK",  # Lightning sets it when it is first imported
    }
    os.environ.clear()
    os.environ.update(environment)
    assert not changed, f"the test left these environment variables changed: {sorted(changed)}"
    left = [
        thread
        for thread in threading.enumerate()
        if thread not in threads and not thread.name.startswith(LASTING_THREADS)
    ]
    for thread in left:
        thread.join(timeout=5)
    assert not any(thread.is_alive() for thread in left), f"the test left threads running: {left}"
    assert not torch.distributed.is_initialized(), "the test left torch.distributed initialised"
