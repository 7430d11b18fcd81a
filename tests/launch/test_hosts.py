"""Runs over several hosts, emulated by network namespaces with an sshd in each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.launch.hosts import Hosts, missing
from tests.launch.launching import wait_until, write_config

SCRIPT = Path(__file__).with_name("sum_script.py")
ENGINES = ["torchrun", "horovodrun", "mpirun"]
LIBRARIES = {"torchrun": "torch_dist", "horovodrun": "horovod"}

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    lacking = missing()
    if lacking:
        pytest.skip(lacking)
    with Hosts(tmp_path_factory.mktemp("hosts"), 3) as network:
        yield network


@pytest.fixture
def on_hosts(hosts, start, tmp_path):
    """Starts a run from host 1 over some of the hosts."""

    def launched(platform: str, numbers: list[int], *args: str, seconds: float = 0.0, **options):
        if platform == "horovodrun" and find_spec("horovod") is None:
            pytest.skip("Horovod is not installed (make setup-dev builds it)")
        write_config(tmp_path)
        names = ",".join(hosts.names[number - 1] for number in numbers)
        keys = f"launch.ssh={{config: {hosts.folder}/ssh_config, known_hosts: {hosts.folder}/known_host}}"
        places = [f"launch.platform={platform}", f"launch.hosts=[{names}]", "launch.workers=1", keys]
        script = [f"script={SCRIPT}", f"script_args=['{seconds}']"]
        return start(*script, *places, *args, prefix=hosts.run(1), **options)

    return launched


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("platform", ENGINES)
def test_one_yaml_runs_on_hosts_through_each_engine(platform, count, hosts, on_hosts, tmp_path):
    run = on_hosts(platform, list(range(1, count + 1)))
    assert run.wait() == 0, run.everything()
    found = [json.loads((tmp_path / f"sum-{rank}.json").read_text()) for rank in range(count)]
    assert [one["total"] for one in found] == [count] * count
    assert sorted(one["host"] for one in found) == hosts.names[:count]
    assert {one["library"] for one in found} == {LIBRARIES.get(platform, found[0]["library"])}
    wait_until(lambda: run.processes() == [], "all processes of the run gone", timeout_s=20)
