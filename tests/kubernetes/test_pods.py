"""The pod template of a run: its rights, its volumes, its processors, and what a user merges into it."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest

from distopt.config import ConfigError, parse_config
from distopt.launch.platforms.kubernetes.manifests import manifests
from distopt.launch.platforms.kubernetes.pods import amount, merged
from tests.kubernetes.run_config import BASE, config_of
from tests.kubernetes.test_manifests import pod_templates

PRIVILEGED = "{name: worker, securityContext: {privileged: true}}"
RUNS = "{claim: runs, path: /runs}"
PODS = ["job", "jobset", "pytorchjob", "mpijob"]

# The controls of the Pod Security Standards, "restricted" (which has those of "baseline"), each as a function of the
# pod's spec. kubernetes.io/docs/concepts/security/pod-security-standards
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def violations(spec: dict) -> list[str]:
    pod = spec.get("securityContext", {})
    broken = [key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    broken += [volume["name"] for volume in spec.get("volumes", []) if not VOLUMES & volume.keys()]
    if pod.get("sysctls") or pod.get("windowsOptions") or pod.get("seLinuxOptions"):
        broken.append("sysctls and other options of the pod")
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        context = container.get("securityContext", {})
        capabilities = context.get("capabilities", {})
        controls = {
            "privileged": not context.get("privileged"),
            "procMount": "procMount" not in context,
            "hostPort": not any(port.get("hostPort") for port in container.get("ports", [])),
            "allowPrivilegeEscalation": context.get("allowPrivilegeEscalation") is False,
            "capabilities": "ALL" in capabilities.get("drop", []),
            "added capabilities": set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"},
            "runAsNonRoot": context.get("runAsNonRoot", pod.get("runAsNonRoot")) is True,
            "runAsUser": context.get("runAsUser", pod.get("runAsUser")) != 0,
            "seccomp": (context.get("seccompProfile") or pod.get("seccompProfile", {})).get("type")
            in ("RuntimeDefault", "Localhost"),
        }
        broken += [f"{container['name']}: {name}" for name, is_kept in controls.items() if not is_kept]
    return broken


def specs(kind: str, *more: str) -> list[dict]:
    return [template["spec"] for template in pod_templates(manifests(config_of(kind, *more))[-1])]


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("serve.port=8080", "serve.host=0.0.0.0"),
        ("launch.kubernetes.init_containers=[{name: fetch, command: [fetch]}]",),
        (f"launch.kubernetes.volumes=[{RUNS}, {{empty_dir: 1Gi, path: /c}}, {{ephemeral: 1Gi, path: /e}}]",),
        ("launch.kubernetes.pod={runtimeClassName: nvidia, containers: [{name: worker, tty: true}]}",),
    ],
)
@pytest.mark.parametrize("kind", PODS)
def test_pods_keep_to_the_restricted_standard(kind, more):
    if kind == "pytorchjob":
        more = tuple(one.replace("name: worker", "name: pytorch") for one in more)
    assert [violations(spec) for spec in specs(kind, *more)] == [[]] * (1 if kind in ("job", "jobset") else 2)


def test_names_and_paths_of_volumes_are_unique_whatever_a_claim_is_called_and_wherever_it_is_mounted():
    claims = "{claim: shm, path: /tmp}, {claim: volume-0, path: /x}, {empty_dir: 1Gi, path: /dev/shm}"
    (spec,) = specs("job", f"launch.kubernetes.volumes=[{RUNS}, {claims}]")
    names = [volume["name"] for volume in spec["volumes"]]
    paths = {mount["mountPath"]: mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
    assert len(set(names)) == len(names) and set(paths.values()) <= set(names)
    assert len(paths) == len(spec["containers"][0]["volumeMounts"]) == 4
    assert {"name": paths["/tmp"], "persistentVolumeClaim": {"claimName": "shm"}} in spec["volumes"]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("launch.kubernetes.host_network=true", ["hostNetwork"]),
        (f"launch.kubernetes.volumes=[{RUNS}, {{host_path: /x, path: /x}}]", ["volume-1"]),
        (f"launch.kubernetes.pod={{containers: [{PRIVILEGED}]}}", ["worker: privileged"]),
    ],
)
def test_what_gives_the_standard_up_is_what_was_asked_for(more, expected):
    assert violations(specs("job", more)[0]) == expected


@pytest.mark.parametrize(
    ("more", "requests", "limits", "threads"),
    [
        (["cpu: 8"], "8", "8", "4"),
        (["cpu: 3000m"], "3000m", "3000m", "1"),
        (["cpu: 8", "requests: {cpu: 500m}"], "500m", "8", "4"),
        (["cpu: 2", "limits: {cpu: 16}"], "2", "16", "8"),
        (["cpu: 6", "limits: {cpu: null}"], "6", None, "3"),
    ],
)
def test_threads_of_a_worker_follow_from_the_processors_that_its_pod_may_use(more, requests, limits, threads):
    (spec,) = specs("job", *(f"launch.kubernetes.{one.replace(': ', '=', 1)}" for one in more))
    (worker,) = spec["containers"]
    assert worker["resources"]["requests"]["cpu"] == requests
    assert worker["resources"]["limits"].get("cpu") == limits
    assert [entry["value"] for entry in worker["env"] if entry["name"] == "OMP_NUM_THREADS"] == [threads]


def test_devices_of_the_network_are_asked_for_by_those_who_compute():
    launcher, worker = specs("mpijob", "launch.kubernetes.resources={rdma/hca: 1}")
    assert "rdma/hca" not in launcher["containers"][0]["resources"]["limits"]
    assert worker["containers"][0]["resources"]["requests"]["rdma/hca"] == "1"


def test_init_container_has_the_workers_image_variables_and_volumes_but_where_it_says_otherwise():
    (spec,) = specs(
        "job", "launch.kubernetes.init_containers=[{name: fetch, image: other, env: [{name: GREETING, value: x}]}]"
    )
    (init,), (worker,) = spec["initContainers"], spec["containers"]
    assert (init["name"], init["image"], init["volumeMounts"]) == ("fetch", "other", worker["volumeMounts"])
    assert "command" not in init
    greeting = {"name": "GREETING", "value": "x"}
    assert greeting in init["env"] and len(init["env"]) == len(worker["env"])


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        ("{path: /x}", "found none of claim, config_map, empty_dir, ephemeral, host_path, expected one of them"),
        ("{path: /x, claim: a, empty_dir: 1Gi}", "found claim and empty_dir of claim"),
        ("{path: /x, claim: a, storage_class: fast}", "storage_class: only an ephemeral volume has one"),
        ("{path: /x, empty_dir: much}", "launch.kubernetes.volumes"),
        ("{path: /, claim: a}", "found '/', expected a folder below /"),
        ("{path: /x/../y, claim: a}", "found '/x/../y', expected a path without `..`"),
        ("{path: /x, claim: a, sub_path: ../etc}", "found '../etc', expected a path without `..`"),
        ("{path: /x, host_path: /a/../b}", "found '/a/../b', expected a path without `..`"),
        ("{path: /x, claim: a}, {path: /x/, claim: b}", "found two volumes with the path /x"),
        ("{path: /x, claim: a..b}", "expected a-z, 0-9, dashes and dots"),
    ],
)
def test_volume_that_makes_no_sense_is_refused(volume, message):
    with pytest.raises(ConfigError) as refused:
        parse_config(BASE, [f"launch.kubernetes.volumes=[{volume}]"])
    assert message in str(refused.value)


@pytest.mark.parametrize("volume", ["{path: /runs, empty_dir: 1Gi}", "{path: /runs, ephemeral: 1Gi}"])
def test_run_directory_on_a_volume_that_ends_with_its_pod_is_refused(volume):
    from distopt.launch.platforms import load_platform

    findings = load_platform("kubernetes").check(parse_config(BASE, [f"launch.kubernetes.volumes=[{volume}]"]))
    assert "lies on no writable volume that outlives the pods" in "".join(map(str, findings))


def test_exit_status_of_a_refused_config_ends_a_job_and_a_disruption_does_not_count():
    for kind in ("job", "jobset"):
        text = json.dumps(manifests(config_of(kind))[-1])
        (rules,) = [policy["rules"] for policy in _values_of(json.loads(text), "podFailurePolicy")]
        assert [rule["action"] for rule in rules] == ["Ignore", "FailJob"]
        assert rules[0]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
        assert rules[1]["onExitCodes"] == {"containerName": "worker", "operator": "In", "values": [2]}


def test_disruptions_count_as_restarts_where_none_is_allowed():
    policy = manifests(config_of("job", "launch.max_preemptions=0"))[-1]["spec"]["podFailurePolicy"]
    assert [rule["action"] for rule in policy["rules"]] == ["FailJob"]


def _values_of(node, key: str) -> list:
    if isinstance(node, dict):
        return [
            *([node[key]] if key in node else []),
            *(one for value in node.values() for one in _values_of(value, key)),
        ]
    return [one for item in node for one in _values_of(item, key)] if isinstance(node, list) else []


@pytest.mark.parametrize(
    ("base", "patch", "expected"),
    [
        ({"a": {"b": 1, "c": 2}}, {"a": {"c": 3, "d": 4}}, {"a": {"b": 1, "c": 3, "d": 4}}),
        ({"a": 1, "b": 2}, {"a": None, "nosuch": None}, {"b": 2}),
        ({"args": ["a", "b"]}, {"args": ["c"]}, {"args": ["c"]}),
        (
            {"volumeMounts": [{"name": "x", "mountPath": "/a"}, {"name": "x", "mountPath": "/b"}]},
            {"volumeMounts": [{"name": "y", "mountPath": "/b"}]},
            {"volumeMounts": [{"name": "x", "mountPath": "/a"}, {"name": "y", "mountPath": "/b"}]},
        ),
        (
            {"containers": [{"name": "w", "env": [{"name": "A", "value": "1"}], "image": "i"}]},
            {"containers": [{"name": "w", "env": [{"name": "A", "value": "2"}]}, {"name": "side"}]},
            {"containers": [{"name": "w", "env": [{"name": "A", "value": "2"}], "image": "i"}, {"name": "side"}]},
        ),
        ({}, {"dnsConfig": {"options": [{"name": "ndots"}]}}, {"dnsConfig": {"options": [{"name": "ndots"}]}}),
    ],
)
def test_what_is_merged_wins_and_what_it_does_not_name_stays(base, patch, expected):
    before = json.dumps(base)
    assert merged(base, patch) == expected
    assert json.dumps(base) == before


def test_volume_at_a_folder_that_pods_always_have_takes_its_place_however_the_path_is_written():
    (spec,) = specs("job", f"launch.kubernetes.volumes=[{RUNS}, {{empty_dir: 1Gi, path: /tmp/}}]")
    mounts = [mount for mount in spec["containers"][0]["volumeMounts"] if mount["mountPath"].startswith("/tmp")]
    assert mounts == [{"name": "volume-1", "mountPath": "/tmp", "readOnly": False}]


def test_names_with_dots_are_accepted_where_kubernetes_takes_them():
    names = "service_account: a.b, image_pull_secrets: [ghcr.io], secrets: {A: {secret: a.b, key: k}}"
    volumes = "volumes: [{claim: my.claim, path: /runs}]"
    (spec,) = specs("job", f"launch.kubernetes={{image: x, {names}, {volumes}}}")
    assert {"name": "volume-0", "persistentVolumeClaim": {"claimName": "my.claim"}} in spec["volumes"]
    assert (spec["serviceAccountName"], spec["imagePullSecrets"]) == ("a.b", [{"name": "ghcr.io"}])


@pytest.mark.parametrize("memory", ["lots", "16GB", "10K", "1mi", ".", "1.2.3", "-1", "1e", "true", "''", '"1\\n"'])
@pytest.mark.parametrize("key", ["memory", "cpu", "requests.cpu", "limits.memory"])
def test_text_that_is_no_quantity_is_refused_with_the_units(key, memory):
    with pytest.raises(ConfigError, match=f"launch.kubernetes.{key}: .*expected a number, and no unit or one of m, k"):
        parse_config(BASE, [f"launch.kubernetes.{key}={memory}"])


@pytest.mark.parametrize(
    ("text", "number"),
    [("16000000000", 16e9), ("1e3", 1e3), ("1E3", 1e3), ("1.5Gi", 1.5 * 2**30), ("500m", 0.5), (".5", 0.5), ("2.", 2),
     ("3k", 3e3), ("1E", 1e18), ("1Ei", 2**60), ("1e-3", Fraction(1, 1000))],
)  # fmt: skip
def test_quantity_is_text_with_the_number_that_kubernetes_reads(text, number):
    assert parse_config(BASE, [f"launch.kubernetes.memory={text}"]).launch.kubernetes.memory == text
    assert amount(text) == number


@pytest.mark.parametrize(
    ("wanted", "key"),
    [
        ("resources={gpu: 1}", "resources"),
        ("labels={a b: c}", "labels"),
        ("labels={a: -b}", "labels.a"),
        (f"labels={{a: {'x' * 64}}}", "labels.a"),
        ("labels={A.b/c: d}", "labels"),
        ("annotations={/a: b}", "annotations"),
        ("node_selector={a: b c}", "node_selector.a"),
        ("secrets={'MY KEY': {secret: a, key: b}}", "secrets"),
        ("user=3000000000", "user"),
        ("python=''", "python"),
    ],
)
def test_name_that_kubernetes_refuses_is_refused_with_its_key(wanted, key):
    with pytest.raises(ConfigError, match=f"launch.kubernetes.{key}"):
        parse_config(BASE, [f"launch.kubernetes.{wanted}"])


def test_labels_and_annotations_that_kubernetes_takes_are_accepted():
    labels = {"a.b/C_d.e": "X-1", "empty": "", "zone": "1"}
    config = config_of(
        "job", f"launch.kubernetes.labels={json.dumps(labels)}", "launch.kubernetes.annotations={a: b c}"
    )
    assert (config.launch.kubernetes.labels, config.launch.kubernetes.annotations) == (labels, {"a": "b c"})


def test_name_of_a_variable_that_ends_with_a_newline_is_refused():
    with pytest.raises(ConfigError, match="is not the name of an environment variable"):
        parse_config(BASE.replace("GREETING:", '"B\\n":'))
