"""The platform kubernetes: what it refuses, and what is not on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from distopt.config import parse_config
from distopt.launch.platforms import load_platform
from distopt.launch.platforms.kubernetes import platform
from tests.kubernetes.run_config import BASE, config_of


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["launch.kubernetes.image=null"], "launch.kubernetes.image: missing"),
        (["name=Flights_1"], "name: found 'Flights_1'; Kubernetes takes a-z"),
        (["name=2026-flights"], "name: found '2026-flights'; Kubernetes takes a-z, 0-9 and dashes, first a letter"),
        (
            ["launch.kubernetes.labels={distopt.run: x}"],
            "labels.distopt.run: distopt sets this label itself; remove it",
        ),
        (["launch.kubernetes.labels={kueue.x-k8s.io/queue-name: x}"], "itself; set launch.kubernetes.queue"),
        (["name=" + "x" * 51], "at most 50"),
        (["run_dir=runs/flights"], "run_dir: runs/flights lies on no writable volume"),
        (["run_dir=/data/flights"], "run_dir: /data/flights lies on no writable volume"),
        (["reduce.backend=horovod"], "horovod needs launch.kubernetes.kind=mpijob"),
        (["launch.kubernetes.kind=mpijob"], "an mpijob starts workers of horovod or mpi"),
        (["launch.kubernetes.kind=trainjob", "launch.kubernetes.time_limit_s=5"], "takes it from its Cluster"),
        (["launch.nodes=null", "launch.hosts=[a,b]"], "launch.hosts: Kubernetes finds the hosts itself"),
        (["launch.max_preemptions=2"], "launch.max_preemptions: found 2, but Kubernetes counts no disruptions of pods"),
        *(
            ([f"launch.kubernetes.kind={kind}", "launch.min_hosts=1"], f"launch.min_hosts: a {kind} cannot continue")
            for kind in ("pytorchjob", "mpijob", "trainjob")
        ),
        (["serve.port=65535"], "serve.port: found 65535, but 2 workers of a pod serve from it on; set 65534 or less"),
        (["launch.secrets=[HUB_TOKEN]"], "use launch.kubernetes.secrets"),
    ],
)
def test_bad_input_is_refused(overrides, message):
    findings = load_platform("kubernetes").check(parse_config(BASE, overrides))
    assert message in "\n".join(map(str, findings))


def test_worker_each_needs_a_gpu_of_its_pod():
    (finding,) = load_platform("kubernetes").check(config_of("job", "launch.workers=3"))
    assert str(finding) == "launch.workers: 3 on each host, but launch.kubernetes.gpus is 2; each worker needs one"


# What go-yaml's resolver (resolve.go of sigs.k8s.io/yaml) takes for a number, a boolean or a time.
@pytest.mark.parametrize("text", "y Y n N 1e3 1E5 1e-4 .5e3 +1e3 0o17 0B1 0X1f 1e3_0 2026-1-2 1234e56 -_1 -.5".split())
def test_text_that_another_reader_of_yaml_takes_for_a_number_is_quoted(text):
    document = platform.yaml.dump({text: text, "list": [text]}, Dumper=platform._PlainDumper)
    assert document.splitlines().count(f"'{text}': '{text}'") == 1 and f"- '{text}'" in document


def test_other_text_is_not_quoted():
    document = platform.yaml.dump(["--nnodes=2", "-m", "python", "yes and no"], Dumper=platform._PlainDumper)
    assert "'" not in document


def test_client_that_is_missing_is_refused(monkeypatch):
    monkeypatch.setattr(platform, "find_spec", lambda name: None)
    (finding,) = load_platform("kubernetes").check_machine(config_of("job"))
    assert str(finding).endswith("the Kubernetes client is missing; `pip install 'distopt[kubernetes]'`")


def test_run_is_recorded_here_while_its_folder_and_code_are_in_the_cluster():
    config = config_of("job")
    chosen = load_platform("kubernetes")
    plan = chosen.plan(config)
    assert chosen.record_dir(config) == Path("runs/flights")
    assert {path.parent for path in plan.files} == {Path("runs/flights")}
    assert chosen.image(config) == "registry.example/distopt:1"
    assert chosen.ranks(config) == range(2)  # nodes, of two workers each
    assert plan.commands == () and chosen.finds_hosts
