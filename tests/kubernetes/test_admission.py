"""The pod once a user's values are in it: what Kubernetes would refuse, and folders that would end with it."""

from __future__ import annotations

import pytest

from distopt.launch.platforms import load_platform
from tests.kubernetes.run_config import KINDS, config_of
from tests.kubernetes.test_pods import specs

VOLUMES = "launch.kubernetes.volumes="
POD = "launch.kubernetes.pod="
RUNS = "{claim: runs, path: /runs}"
MOUNTED = "containers: [{name: worker, volumeMounts: [{name: nfs, mountPath: /runs}]}]"
NFS = f"{POD}{{volumes: [{{name: nfs, nfs: {{server: s, path: /e}}}}], {MOUNTED}}}"


def findings(kind: str, *more: str) -> list[str]:
    return [str(finding) for finding in load_platform("kubernetes").check(config_of(kind, *more))]


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ([f"{VOLUMES}[{RUNS}, {{empty_dir: 1Gi, path: /runs/flights}}]"], "run_dir"),
        ([f"{VOLUMES}[{RUNS}, {{claim: data, path: /runs/flights, read_only: true}}]"], "run_dir"),
        (["run_dir=/runs/../tmp/x"], "run_dir"),
        (["run_dir=/runs/../runs2/x"], "run_dir"),
        (["checkpoint.directory=/ckpt/x"], "checkpoint.directory"),
        (["checkpoint.directory=checkpoints"], "checkpoint.directory"),
        (["checkpoint.directory='file:///tmp/x'"], "checkpoint.directory"),
        ([f"{VOLUMES}[]", NFS.replace("nfs: {", "emptyDir: {").replace("server: s, path: /e", "")], "run_dir"),
        ([f"{VOLUMES}[]", NFS.replace("path: /e", "path: /e, readOnly: true")], "run_dir"),
    ],
)
def test_folder_that_would_be_lost_with_the_pods_is_refused(more, key):
    (finding,) = findings("job", *more)
    assert finding.startswith(f"{key}: ") and "lies on no writable volume that outlives the pods" in finding


@pytest.mark.parametrize(
    "more",
    [
        [f"{VOLUMES}[{{empty_dir: 1Gi, path: /runs}}, {{claim: runs, path: /runs/flights}}]"],
        [f"{VOLUMES}[]", NFS],
        [f"{VOLUMES}[]", NFS.replace("nfs: {server: s, path: /e}", "csi: {driver: d}")],
        ["run_dir=/tmp/../runs/x"],
        ["run_dir=//runs/x"],
        ["checkpoint.directory=/runs/elsewhere"],
        ["checkpoint.directory='s3://bucket/x'"],
        ["checkpoint.directory='file:///runs/x'"],
    ],
)
def test_folder_on_a_volume_that_stays_is_accepted_whoever_named_the_volume(more):
    assert findings("job", *more) == []


@pytest.mark.parametrize("kind", KINDS)
def test_container_of_another_kind_is_refused_with_the_name_of_this_ones(kind):
    name = {"pytorchjob": "pytorch", "trainjob": "node"}.get(kind, "worker")
    for other in {"worker", "pytorch"} - {name} if kind != "trainjob" else ():
        (finding,) = findings(kind, f"{POD}{{containers: [{{name: {other}, tty: true}}]}}")
        assert f"the container {other} has no image; give it one; the workers' container is {name}" in finding


@pytest.mark.parametrize(
    ("pod", "message"),
    [
        ("{containers: [{name: [x]}]}", "an item of containers has no name"),
        ("{containers: [{tty: true}]}", "an item of containers has no name"),
        ("{containers: [{name: worker, env: [{name: {a: b}, value: x}]}]}", "an item of containers.env has no name"),
        ("{containers: [{name: worker, volumeMounts: [{name: tmp}]}]}", "of containers.volumeMounts has no mountPath"),
        ("{containers: null}", "containers leaves out worker"),
        ("{containers: 5}", "containers is no list"),
        ("{volumes: x}", "volumes is no list"),
        ("{volumes: [x]}", "an item of volumes has no name"),
        ("{initContainers: [{name: a, image: x}, {name: a, image: y}]}", "initContainers has two items of the name a"),
        ("{initContainers: [{name: a}]}", "the container a has no image"),
        ("{containers: [{name: worker, volumeMounts: [{name: x, mountPath: /x}]}]}", "volume that is not there"),
        ("{containers: [{name: worker, volumeMounts: [{name: [x], mountPath: /x}]}]}", "volume that is not there"),
        ("{restartPolicy: OnFailure}", "found restartPolicy OnFailure"),
        ("{spec: {hostPID: true}}", "found spec, which is no field of a pod's spec"),
        ("{metadata: {labels: {}}}", "found metadata, which is no field"),
    ],
)
def test_pod_that_kubernetes_would_refuse_is_refused_here(pod, message):
    (finding,) = findings("job", f"{POD}{pod}")
    assert finding.startswith("launch.kubernetes.pod: ") and message in finding


def test_init_container_without_a_name_is_refused_with_its_key():
    (finding,) = findings("job", "launch.kubernetes.init_containers=[{command: [fetch]}]")
    assert finding.startswith("launch.kubernetes.init_containers: an item of initContainers has no name")


def test_users_source_of_a_variable_or_volume_replaces_the_rendered_one():
    greeting = "env: [{name: GREETING, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}]"
    token = "{name: HUB_TOKEN, valueFrom: {configMapKeyRef: {name: c, key: k}}}"
    worker = f"{{name: worker, {greeting.replace(']', f', {token}]')}}}"
    (spec,) = specs("job", f"{POD}{{containers: [{worker}], volumes: [{{name: data, nfs: {{server: s, path: /e}}}}]}}")
    env = {entry["name"]: entry for entry in spec["containers"][0]["env"]}
    assert env["GREETING"] == {"name": "GREETING", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}
    assert env["HUB_TOKEN"]["valueFrom"] == {"configMapKeyRef": {"name": "c", "key": "k"}}
    assert {"name": "data", "nfs": {"server": "s", "path": "/e"}} in spec["volumes"]


def test_users_field_of_the_same_source_is_merged_into_it():
    (spec,) = specs("job", f"{POD}{{volumes: [{{name: shm, emptyDir: {{sizeLimit: 1Gi}}}}]}}")
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}} in spec["volumes"]


@pytest.mark.parametrize(
    ("more", "messages"),
    [
        ("requests={cpu: '4'}", ["requests.cpu: 4 are requested, more than the limit of 1; request less"]),
        ("requests={memory: 64Gi}", ["requests.memory: 64Gi are requested, more than the limit of 4Gi"]),
        (
            "limits={memory: 4194303Ki}",
            ["the limit of 4194303Ki; request less, or set launch.kubernetes.limits"],
        ),
        ("requests={nvidia.com/gpu: 1}", ["requests.nvidia.com/gpu: 1 are requested with a limit of 2"]),
        ("requests={a.b/c: 1}", ["requests.a.b/c: 1 are requested with a limit of none"]),
        ("resources={a.b/c: 500m}", ["resources.a.b/c: found 500m, but a pod gets whole ones"]),
        ("requests={cpu: 1000m, memory: 4096Mi}", []),
        ("resources={a.b/c: '2.0', hugepages-2Mi: 64Mi}", []),
        ("limits={memory: null}", []),
    ],
)
def test_requests_are_compared_with_limits_as_kubernetes_reads_both(more, messages):
    refused = findings("job", f"launch.kubernetes.{more}")
    assert len(refused) == len(messages)
    assert all(message in finding for message, finding in zip(messages, refused, strict=True))


def test_requests_for_devices_are_not_made_for_the_launcher_of_an_mpijob():
    device = "{nvidia.com/gpu: 2}"
    launcher, worker = specs("mpijob", f"launch.kubernetes.requests={device}", f"launch.kubernetes.limits={device}")
    assert {*launcher["containers"][0]["resources"]["requests"]} == {"cpu", "memory"}
    assert {*launcher["containers"][0]["resources"]["limits"]} == {"cpu", "memory"}
    assert worker["containers"][0]["resources"]["requests"]["nvidia.com/gpu"] == "2"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("launch.kubernetes.secrets={HOME: {secret: a, key: b}}", "secrets.HOME: distopt sets HOME, too"),
        ("launch.kubernetes.secrets={DISTOPT_CONFIG: {secret: a, key: b}}", "secrets.DISTOPT_CONFIG: distopt sets"),
        ("launch.kubernetes.secrets={GREETING: {secret: a, key: b}}", "secrets.GREETING: launch.env sets GREETING"),
        ("launch.env={DISTOPT_CONFIG: x}", "launch.env.DISTOPT_CONFIG: distopt sets it"),
    ],
)
def test_variable_that_would_stand_twice_in_a_container_is_refused(more, message):
    (finding,) = findings("job", more)
    assert message in finding
