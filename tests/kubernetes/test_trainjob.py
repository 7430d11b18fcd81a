"""TrainJobs: what each release of Kubeflow's trainer lets them say about their pods."""

from __future__ import annotations

import pytest

from distopt.config import parse_config
from distopt.launch.platforms import load_platform
from distopt.launch.platforms.kubernetes.manifests import manifests
from tests.kubernetes.run_config import BASE, config_of

# Read off the models of kubeflow-trainer-api 2.0.0, 2.1.0, 2.2.0 and 2.3.0.
FIELDS = {"2.0": "podSpecOverrides", "2.1": "podTemplateOverrides", "2.2": "runtimePatches", "2.3": "runtimePatches"}
KIND = "launch.kubernetes.kind=trainjob"


def pod_of(version: str, *more: str) -> dict:
    spec = manifests(config_of("trainjob", f"launch.kubernetes.trainer_version={version}", *more))[-1]["spec"]
    (patch,) = spec[FIELDS[version]]
    if version == "2.0":
        assert patch["targetJobs"] == [{"name": "node"}]
        return patch
    if version == "2.1":
        assert (patch["targetJobs"], patch["metadata"]["labels"]) == ([{"name": "node"}], {"distopt.run": "flights"})
        return patch["spec"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert (patch["manager"], job["name"]) == ("distopt", "node")
    return job["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("version", FIELDS)
def test_pods_get_their_volumes_and_where_they_may_run(version):
    wishes = ["launch.kubernetes.service_account=trainer", "launch.kubernetes.tolerations=[{operator: Exists}]"]
    pod = pod_of(version, *wishes, "launch.kubernetes.node_selector={pool: gpu}")
    (node,) = pod["containers"]
    assert [mount["mountPath"] for mount in node["volumeMounts"]] == ["/tmp", "/dev/shm", "/runs", "/data"]
    assert {mount["name"] for mount in node["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert (pod["serviceAccountName"], pod["nodeSelector"]) == ("trainer", {"pool": "gpu"})
    assert pod["tolerations"] == [{"operator": "Exists"}]
    assert ("securityContext" in pod, "securityContext" in node) == ((version >= "2.2"),) * 2


@pytest.mark.parametrize(
    ("version", "wanted", "refused"),
    [
        (None, "time_limit_s=5", True),
        (None, "tolerations=[{operator: Exists}]", True),
        (None, "labels={a: b}", True),
        ("2.0", "labels={a: b}", True),
        ("2.0", "affinity={podAffinity: {}}", True),
        ("2.1", "affinity={podAffinity: {}}", False),
        ("2.1", "time_limit_s=5", True),
        ("2.3", "time_limit_s=5", False),
        ("2.3", "init_containers=[{name: fetch}]", True),
        ("2.3", "ttl_s=5", True),
        (None, "user=2000", True),
        ("2.1", "user=2000", True),
        ("2.2", "user=2000", False),
        ("2.3", "pod={runtimeClassName: nvidia}", True),
        ("2.3", "pod={tolerations: [{operator: Exists}]}", False),
    ],
)
def test_what_a_release_has_no_field_for_is_refused_and_left_to_the_runtime(version, wanted, refused):
    chosen = [] if version is None else [f"launch.kubernetes.trainer_version={version}"]
    config = parse_config(BASE, [KIND, *chosen, f"launch.kubernetes.{wanted}"])
    findings = [str(finding) for finding in load_platform("kubernetes").check(config)]
    assert [finding.partition(":")[0] for finding in findings] == (
        [f"launch.kubernetes.{wanted.partition('=')[0]}"] if refused else []
    )
    assert all("takes it from its ClusterTrainingRuntime; set it there" in finding for finding in findings)


@pytest.mark.parametrize("version", FIELDS)
def test_fields_of_a_container_that_a_release_does_not_have_are_refused_by_name(version):
    mine = "{name: node, volumeMounts: [{name: tmp, mountPath: /x}], tty: true, env: [{name: A, value: b}]}"
    chosen = [f"launch.kubernetes.trainer_version={version}", f"launch.kubernetes.pod={{containers: [{mine}]}}"]
    (finding,) = load_platform("kubernetes").check(config_of("trainjob", *chosen))
    assert finding.subject == "launch.kubernetes.pod" and "has no field for tty, env of a container" in finding.message
    assert "launch.env" in finding.fix


@pytest.mark.parametrize("version", ["null", *FIELDS])
def test_probes_that_a_trainjob_leaves_out_are_a_warning(version):
    config = config_of("trainjob", f"launch.kubernetes.trainer_version={version}", "serve.port=8080")
    (finding,) = load_platform("kubernetes").check(config)
    assert (finding.subject, finding.severity) == ("serve.port", "warning")
