"""Which backend a process gets, and what it is told when it cannot have one."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

import distopt.config
from distopt.backends import BACKENDS, Backend, BackendError, current, init
from distopt.backends.single import Single
from tests.backends import store_backend
from tests.launch import order_task
from tests.launch.launching import Launched
from tests.test_launchers import exported, horovodrun, mpich, open_mpi, srun, torchrun
from tests.workers import free_port

REFERENCE = "tests.backends.store_backend:StoreBackend"


def test_lone_process_gets_a_world_of_one():
    backend = init()
    assert isinstance(backend, Single) and isinstance(backend, Backend)
    assert init() is backend is current()
    with pytest.raises(BackendError, match="already uses single"):
        init("torch_dist")
    backend.close()
    assert init() is not backend


@pytest.mark.parametrize(
    ("launcher", "names"),
    [
        (torchrun, {"torch_dist"}),
        (srun, {"torch_dist"}),
        (exported, {"torch_dist"}),
        (horovodrun, {"horovod"}),
        (open_mpi, {"horovod", "mpi"}),  # whichever is installed here
        (mpich, {"horovod", "mpi"}),
    ],
)
def test_auto_takes_what_the_launchers_processes_can_use(launcher, names, started_as, monkeypatch):
    started_as(launcher(3, 4))
    started = []
    for name in BACKENDS:

        class Chosen(Single):
            @classmethod
            def start(cls, rank_info, *, timeout, name=name):
                started.append((name, rank_info.rank, rank_info.world_size))
                return cls()

        monkeypatch.setattr("distopt.backends." + BACKENDS[name].partition(".backends.")[2].replace(":", "."), Chosen)
    init().close()
    ((name, rank, world_size),) = started
    assert name in names and (rank, world_size) == (3, 4)


def test_init_that_was_left_out_is_named(started_as):
    started_as(torchrun(3, 4))
    with pytest.raises(BackendError, match=r"started by torchrun as rank 3 of 4, but distopt.init\(\) was never"):
        current()


def test_rank_that_makes_no_sense_is_an_error_of_init(started_as):
    started_as(torchrun(4, 4))
    for start in (init, current):
        with pytest.raises(BackendError, match="torchrun says RANK='4' of WORLD_SIZE='4'"):
            start()


def test_world_of_another_size_is_refused():
    with pytest.raises(
        BackendError, match="expected 4 workers, but this world has 1. Start 4 processes with a launcher"
    ):
        init(world_size=4)


def test_timeout_that_is_no_timedelta_is_refused():
    with pytest.raises(BackendError, match=r"init\(timeout=3\): expected a datetime.timedelta"):
        init("single", timeout=3)


def test_unknown_backend_is_answered_with_the_known_ones():
    with pytest.raises(BackendError, match="backend='gloo': unknown. Known: auto, single, torch_dist, horovod, mpi"):
        init("gloo")


@pytest.mark.parametrize(
    ("name", "module", "fix"), [("horovod", "horovod", "make setup-dev"), ("mpi", "mpi4py", "distopt")]
)
def test_missing_library_names_the_command_that_installs_it(name, module, fix, monkeypatch):
    for loaded in [each for each in sys.modules if each.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendError, match=fix):
        init(name)


def test_backend_of_ones_own_is_started_by_its_name_and_found_again(started_as):
    started_as(exported(0, 1) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())})
    backend = init(REFERENCE)
    assert isinstance(backend, store_backend.StoreBackend) and (backend.rank, backend.world_size) == (0, 1)
    assert init(REFERENCE) is init() is current() is backend
    with pytest.raises(BackendError, match="this process already uses store"):
        init("single")
    backend.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nosuch.module:Ring", "backend: found nosuch.module:Ring, but importing nosuch.module failed"),
        ("tests.backends.store_backend:StoreBackend2", "has no StoreBackend2; did you mean StoreBackend?"),
        ("pathlib:Path", "backend: found pathlib:Path, expected a subclass of distopt.backends.Backend"),
        (
            "distopt.backends.world:World",
            "World lacks methods that distopt.backends.Backend requires: _leave, _make",
        ),
    ],
)
def test_name_that_is_no_backend_is_an_error_that_says_why(name, message):
    with pytest.raises(BackendError, match=message):
        init(name)


@pytest.mark.timeout(180)
def test_backend_of_ones_own_is_named_in_a_yaml_and_trains_to_the_same_numbers(tmp_path):
    num_steps = 12
    for module in (order_task, store_backend):
        shutil.copy(module.__file__, tmp_path)
    text = f"name: run\n{order_task.CONFIG}train: {{num_steps: {num_steps}}}\nlaunch: {{workers: 2}}\n"
    (tmp_path / "run.yaml").write_text(text + "reduce: {backend: 'store_backend:StoreBackend'}\n")
    run = Launched(tmp_path)
    try:
        assert run.wait() == 0, run.everything()
    finally:
        run.end()
    mean = json.loads((tmp_path / "mean.json").read_text())
    assert mean == pytest.approx(order_task.expected_mean(num_steps), 1e-9)


def test_backend_in_a_yaml_must_be_trusted(monkeypatch):
    monkeypatch.setenv("DISTOPT_TRUSTED_TASKS", "distopt.examples")
    with pytest.raises(distopt.config.ConfigError, match="reduce.backend: .* allows only code of distopt.examples"):
        distopt.config.parse_config("name: run\nscript: x.py\nreduce: {backend: 'store_backend:StoreBackend'}\n")
