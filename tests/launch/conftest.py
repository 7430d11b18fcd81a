"""Runs that are really started."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from distopt.launch.platforms import horovodrun, mpirun
from tests.launch import slurm
from tests.launch.hosts import Hosts, missing
from tests.launch.launching import Launched, write_config

SUM = Path(__file__).with_name("sum_script.py")


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Launched]]:
    """Starts `distopt launch` in the test's folder; whatever still runs at the end of the test is killed."""
    running: list[Launched] = []

    def launched(*args: str, **options) -> Launched:
        running.append(Launched(tmp_path, *args, **options))
        return running[-1]

    yield launched
    for run in running:
        run.end()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    """Three hosts, emulated by network namespaces with an sshd in each."""
    lacking = missing()
    if lacking:
        pytest.skip(lacking)
    with Hosts(tmp_path_factory.mktemp("hosts"), 3) as network:
        yield network


@pytest.fixture(scope="module")
def cluster(hosts) -> Iterator[slurm.Cluster]:
    """A real Slurm over the three hosts."""
    lacking = slurm.missing()
    if lacking:
        pytest.skip(lacking)
    with slurm.Cluster(hosts) as running:
        yield running


@pytest.fixture
def on_hosts(hosts, start, tmp_path) -> Callable[..., Launched]:
    """Starts a run from host 1 over some of the hosts: sum_script.py, unless `text` is another YAML."""

    def launched(
        platform: str, numbers: list[int], *args: str, seconds: float = 0.0, text: str | None = None, **options
    ) -> Launched:
        platform, _, controller = platform.partition(" --")
        if platform == "horovodrun" and find_spec("horovod") is None:
            pytest.skip("Horovod is not installed (make setup-dev builds it)")
        script = [f"script={SUM}", f"script_args=['{seconds}']"] if text is None else []
        if text is None:
            write_config(tmp_path)
        else:
            (tmp_path / "run.yaml").write_text(text)
        names = ",".join(hosts.names[number - 1] for number in numbers)
        keys = f"launch.ssh={{config: {hosts.folder}/ssh_config, known_hosts: {hosts.folder}/known_host}}"
        overrides = [f"launch.platform={platform}", f"launch.hosts=[{names}]", "launch.workers=1", keys]
        chosen = [f"launch.horovod_controller={controller}"] if controller else []
        return start(*script, *overrides, *chosen, *args, prefix=hosts.run(1), **options)

    return launched


@pytest.fixture
def pretended_mpi(monkeypatch) -> Callable[[str, str | None], None]:
    """Pretends which MPI the mpirun here belongs to, and which one Horovod was built for."""

    def pretend(mpirun_of: str, horovod_for: str | None) -> None:
        for module in (mpirun, horovodrun):
            monkeypatch.setattr(module, "find_mpirun", lambda: "mpirun")
            monkeypatch.setattr(module, "is_mpich", lambda program: mpirun_of == "MPICH")
            monkeypatch.setattr(module, "mpi_of_horovod", lambda: horovod_for)

    return pretend
