"""What docker/kubernetes says to apply and to run is what Kubernetes and `distopt launch` accept."""

from __future__ import annotations

import re
import shlex

import kubernetes_validate
import pytest

from distopt.config import load_config
from distopt.launch.findings import failures
from distopt.launch.platforms.kubernetes.manifests import manifests
from distopt.launch.platforms.kubernetes.platform import KubernetesPlatform
from tests.kubernetes.guide import README, ROOT, launches, objects

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
    result = objects()
    assert {o["metadata"].get("namespace", o["metadata"]["name"]) for o in result.values()} == {"distopt"}
    (claim,) = [v for v in result["Pod/reader"]["spec"]["volumes"] if "persistentVolumeClaim" in v]
    assert f"PersistentVolumeClaim/{claim['persistentVolumeClaim']['claimName']}" in result


def test_the_runtime_gives_the_pods_of_a_trainjob_what_the_launcher_gives_those_of_a_job() -> None:
    (node,) = objects()[RUNTIME]["spec"]["template"]["spec"]["replicatedJobs"]
    result = node["template"]["spec"]["template"]["spec"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "node"}, "spec": result}
    for version in VERSIONS:
        kubernetes_validate.validate(pod, version, strict=True)
    (command,) = [line for line in launches() if "kind=trainjob" in line]
    job = [arg.replace("trainjob", "job") for arg in shlex.split(command)[3:]]
    ours = manifests(load_config(ROOT / "configs/flights.yaml", job))[-1]["spec"]["template"]["spec"]
    for key in ("automountServiceAccountToken", "terminationGracePeriodSeconds", "securityContext"):
        assert result[key] == ours[key]
    (theirs,), (rendered,) = result["containers"], ours["containers"]
    assert (theirs["name"], theirs["securityContext"]) == ("node", rendered["securityContext"])
    for things, expected in ((result["volumes"], ours["volumes"]), (theirs["volumeMounts"], rendered["volumeMounts"])):
        writable = [{key: value for key, value in thing.items() if key != "readOnly"} for thing in expected]
        assert sorted(things, key=str) == sorted(writable, key=str)


def test_the_reader_meets_the_restricted_standard_of_the_namespace() -> None:
    result = objects()
    assert result["Namespace/distopt"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    pod = result["Pod/reader"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("command", launches())
def test_every_launch_command_of_the_guide_is_a_valid_configuration(command: str) -> None:
    _, _, path, *overrides = shlex.split(command)
    config = load_config(ROOT / path, [arg for arg in overrides if "=" in arg])
    assert (config.launch.platform, config.serve.port) == ("kubernetes", 8080)
    assert failures(KubernetesPlatform().check(config)) == []
    (run,) = [manifest for manifest in manifests(config) if manifest["kind"].lower() == config.launch.kubernetes.kind]
    assert run["metadata"]["namespace"] == "distopt"


def test_the_guide_shows_each_kind() -> None:
    shown = set(re.findall(r"launch\.kubernetes\.kind=(\w+)", " ".join(launches())))
    assert shown | {"job"} == {"job", "jobset", "trainjob", "pytorchjob", "mpijob"}


def test_files_named_in_the_guide_exist() -> None:
    for path in re.findall(r"docker/[\w./-]+", README):
        assert (ROOT / path).exists(), path
