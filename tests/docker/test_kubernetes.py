"""What docker/kubernetes says to apply and to run is what Kubernetes and the launcher accept."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
from datetime import timedelta
from typing import Any

import kubernetes_validate
import pytest

from distopt.config import load_config
from distopt.launch.platforms.kubernetes.manifests import manifests
from distopt.launch.platforms.kubernetes.platform import KubernetesPlatform
from distopt.launch.worker import health_probe
from distopt.train.monitor import Status
from distopt.train.serve import StatusServer
from tests.docker.guide import README, ROOT, launches, objects

# The oldest and the newest release whose schemas are published for the validator.
VERSIONS = ("1.25", "1.37")
RUNTIME = "ClusterTrainingRuntime/distopt"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", sorted(objects().keys() - {RUNTIME}))
def test_every_object_is_valid_in_every_release_and_has_no_unknown_field(name: str, version: str) -> None:
    kubernetes_validate.validate(objects()[name], version, strict=True)


def test_a_misspelt_field_would_be_found() -> None:
    claim = objects()["PersistentVolumeClaim/runs"]
    with pytest.raises(kubernetes_validate.ValidationError, match="accessModez"):
        kubernetes_validate.validate(
            {**claim, "spec": {**claim["spec"], "accessModez": ["ReadWriteMany"]}}, "1.31", strict=True
        )


def test_objects_find_each_other_in_one_namespace() -> None:
    found = objects()
    assert {o["metadata"].get("namespace", o["metadata"]["name"]) for o in found.values()} == {"distopt"}
    (claim,) = [v for v in found["Pod/reader"]["spec"]["volumes"] if "persistentVolumeClaim" in v]
    assert f"PersistentVolumeClaim/{claim['persistentVolumeClaim']['claimName']}" in found


def test_the_runtime_gives_the_pods_of_a_trainjob_what_the_launcher_gives_those_of_a_job() -> None:
    (node,) = objects()[RUNTIME]["spec"]["template"]["spec"]["replicatedJobs"]
    found = node["template"]["spec"]["template"]["spec"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "node"}, "spec": found}
    for version in VERSIONS:
        kubernetes_validate.validate(pod, version, strict=True)
    (command,) = [line for line in launches() if "kind=trainjob" in line]
    job = [word.replace("trainjob", "job") for word in shlex.split(command)[3:]]
    ours = manifests(load_config(ROOT / "configs/flights.yaml", job))[-1]["spec"]["template"]["spec"]
    for key in ("automountServiceAccountToken", "terminationGracePeriodSeconds", "securityContext"):
        assert found[key] == ours[key]
    (theirs,), (own,) = found["containers"], ours["containers"]
    assert (theirs["name"], theirs["securityContext"]) == ("node", own["securityContext"])
    for things, expected in ((found["volumes"], ours["volumes"]), (theirs["volumeMounts"], own["volumeMounts"])):
        writable = [{key: value for key, value in thing.items() if key != "readOnly"} for thing in expected]
        assert sorted(things, key=str) == sorted(writable, key=str)


def test_the_reader_meets_the_restricted_standard_of_the_namespace() -> None:
    found = objects()
    assert found["Namespace/distopt"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    pod = found["Pod/reader"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("command", launches())
def test_every_launch_command_of_the_guide_is_a_valid_configuration(command: str) -> None:
    _, _, path, *overrides = shlex.split(command)
    config = load_config(ROOT / path, [word for word in overrides if "=" in word])
    assert (config.launch.platform, config.serve.port) == ("kubernetes", 8080)
    found = [finding for finding in KubernetesPlatform().check(config) if "client is missing" not in finding.message]
    assert found == []
    (run,) = [manifest for manifest in manifests(config) if manifest["kind"].lower() == config.launch.kubernetes.kind]
    assert run["metadata"]["namespace"] == "distopt"


def container(kind: str, *overrides: str) -> dict[str, Any]:
    """Returns the first worker's container as the launcher renders it."""
    platform = ["launch.platform=kubernetes", "launch.kubernetes.image=image", f"launch.kubernetes.kind={kind}"]
    config = load_config(ROOT / "configs/flights.yaml", [*platform, *overrides])
    spec = manifests(config)[-1]["spec"]
    template = spec["template"] if kind == "job" else spec["pytorchReplicaSpecs"]["Master"]["template"]
    (found,) = template["spec"]["containers"]
    return dict(found)


def test_probes_ask_what_the_run_serves() -> None:
    worker = container("job", "serve.port=8081", "serve.host=0.0.0.0")
    assert worker["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": 8081}
    alive = ["python", "-m", "distopt.launch.worker.health_probe", "127.0.0.1", "8081"]
    assert worker["livenessProbe"]["exec"] == {"command": alive}
    assert container("job", "serve.port=8081")["livenessProbe"] == worker["livenessProbe"]
    assert "readinessProbe" not in container("job", "serve.port=8081"), "the kubelet does not reach a pod's loopback"
    assert not [key for key in container("job") if key.endswith("Probe")]


@pytest.mark.parametrize(("stalled", "expected"), [(timedelta(0), 1), (timedelta(hours=1), 0)])
def test_a_pod_is_alive_unless_its_worker_says_that_it_is_stalled(stalled: timedelta, expected: int) -> None:
    with StatusServer(Status(), port=0, stall=stalled) as server:
        assert health_probe.main(["127.0.0.1", str(server.port)]) == expected
    assert health_probe.main(["127.0.0.1", str(server.port)]) == 0, "its engine is starting it again"


def test_a_worker_that_listens_and_says_nothing_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_probe, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        assert health_probe.main(["127.0.0.1", str(mute.getsockname()[1])]) == 1


def test_no_probe_waits_for_what_waits_for_readiness() -> None:
    assert "readinessProbe" not in container("pytorchjob", "serve.port=8081", "serve.host=0.0.0.0")
    worker = manifests(
        load_config(
            ROOT / "configs/flights.yaml",
            [
                "launch.platform=kubernetes",
                "launch.kubernetes.image=image",
                "launch.kubernetes.kind=mpijob",
                "reduce.backend=horovod",
                "serve.port=8081",
                "serve.host=0.0.0.0",
            ],
        )
    )[-1]
    assert "Probe" not in json.dumps(worker)


def test_process_1_of_a_pod_that_is_told_to_stop_ends_with_143_as_its_workers_do() -> None:
    engine = ["sh", "-c", "trap 'exit 1' TERM; echo up; while :; do sleep 0.1; done"]
    agent = [sys.executable, "-m", "distopt.launch.worker.host_agent", "--", *engine]
    with subprocess.Popen(agent, stdout=subprocess.PIPE, text=True) as pod:
        assert pod.stdout is not None
        assert pod.stdout.readline() == "up\n"
        pod.terminate()
        assert pod.wait(timeout=30) == 143


def test_a_pod_that_is_there_before_the_first_one_has_an_address_waits_for_it_and_can_be_stopped() -> None:
    agent = [
        sys.executable,
        "-m",
        "distopt.launch.worker.host_agent",
        "--meet",
        "flights-0.invalid:29400",
        "--",
        "echo",
        "started",
    ]
    with subprocess.Popen(agent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as pod:
        assert pod.stderr is not None
        assert pod.stderr.readline() == "agent: waiting for flights-0.invalid:29400: it has no address yet\n"
        pod.terminate()
        assert pod.communicate(timeout=60) == ("", "")
        assert pod.returncode == 143


def test_the_first_pod_starts_its_engine_once_its_own_name_has_an_address() -> None:
    agent = [
        sys.executable,
        "-m",
        "distopt.launch.worker.host_agent",
        "--meet",
        "localhost:29400",
        "--",
        "echo",
        "started",
    ]
    assert subprocess.run(agent, capture_output=True, text=True, timeout=60, check=True).stdout == "started\n"


def test_the_guide_shows_each_kind() -> None:
    shown = set(re.findall(r"launch\.kubernetes\.kind=(\w+)", " ".join(launches())))
    assert shown | {"job"} == {"job", "jobset", "trainjob", "pytorchjob", "mpijob"}


def test_files_named_in_the_guide_exist() -> None:
    for path in re.findall(r"docker/[\w./-]+", README):
        assert (ROOT / path).exists(), path
