"""Kubernetes: manifests held against golden files and the published schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.config import load_config
from distopt.launch.platforms import load_platform
from distopt.launch.platforms.kubernetes import manifests as module
from distopt.launch.platforms.kubernetes.manifests import manifests
from tests.kubernetes.run_config import EVERYTHING, KINDS, config_of

ROOT = Path(__file__).parents[2]
CRDS = ROOT.parent / "shared" / "crds"


@pytest.mark.parametrize("kind", KINDS)
def test_manifest_is_the_golden_one(kind, golden, monkeypatch):
    config = config_of(kind)
    assert list(load_platform("kubernetes").check(config)) == []
    monkeypatch.setattr(module, "dump_yaml", lambda config: "the configuration")  # any new key would change it
    plan = load_platform("kubernetes").plan(config)
    (text,) = [text for path, text in plan.files.items() if path.name == "manifest.yaml"]
    golden(f"{kind}.yaml", text)


@pytest.mark.parametrize("kind", KINDS)
def test_manifest_with_every_key_is_the_golden_one(kind, golden, monkeypatch):
    config = config_of(kind, *EVERYTHING[kind])
    assert list(load_platform("kubernetes").check(config)) == []
    monkeypatch.setattr(module, "dump_yaml", lambda config: "the configuration")
    plan = load_platform("kubernetes").plan(config)
    (text,) = [text for path, text in plan.files.items() if path.name == "manifest.yaml"]
    assert not re.search(r"[&*]id\d+", text), "tools that patch YAML do not know its anchors"
    golden(f"{kind}-everything.yaml", text)


@pytest.mark.parametrize("every_key", [False, True], ids=["defaults", "every key"])
@pytest.mark.parametrize("kind", KINDS)
def test_built_in_objects_and_pod_templates_keep_to_the_published_schema(kind, every_key):
    kubernetes_validate = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes_validate is not installed (make setup-dev)"
    )
    version = kubernetes_validate.latest_version()
    for manifest in manifests(config_of(kind, *(EVERYTHING[kind] if every_key else []))):
        if "." not in manifest["apiVersion"].split("/")[0] or manifest["kind"] == "NetworkPolicy":
            kubernetes_validate.validate(manifest, version, strict=True)
        for template in pod_templates(manifest):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}
            kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.parametrize("every_key", [False, True], ids=["defaults", "every key"])
@pytest.mark.parametrize("kind", ["jobset", "trainjob", "pytorchjob", "mpijob"])
def test_custom_resource_keeps_to_its_projects_definition_and_has_no_field_of_its_own(kind, every_key):
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed (make setup-dev)")
    path = CRDS / f"{kind}.yaml"
    if not path.exists():
        pytest.skip(f"{path} is missing: the resource definitions of JobSet and Kubeflow, from their repositories")
    manifest = manifests(config_of(kind, *(EVERYTHING[kind] if every_key else [])))[-1]
    schema = definition(path, manifest)
    validator = jsonschema.Draft202012Validator(closed(schema))
    validator.validate(manifest)
    manifest["spec"]["imag"] = 1
    with pytest.raises(jsonschema.ValidationError, match="imag"):
        validator.validate(manifest)


def definition(path: Path, manifest: dict) -> dict:
    group, version = manifest["apiVersion"].split("/")
    for document in yaml.load_all(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if document and document["kind"] == "CustomResourceDefinition" and document["spec"]["group"] == group:
            (result,) = [one for one in document["spec"]["versions"] if one["name"] == version]
            return result["schema"]["openAPIV3Schema"]
    raise AssertionError(f"no {manifest['apiVersion']} in {path}")


def closed(schema: dict) -> dict:
    """Forbids fields that a definition does not name, which the API server would silently drop."""
    schema = {key: value for key, value in schema.items() if not key.startswith("x-")}
    for key in ("properties",):
        if key in schema and schema.get("properties"):
            schema[key] = {name: closed(node) for name, node in schema[key].items()}
            names = set(schema[key]) | ({"apiVersion", "kind", "metadata"} if "spec" in schema[key] else set())
            open_object = schema[key].keys() == {"apiVersion", "kind", "metadata"}
            if not open_object and "additionalProperties" not in schema and names:
                schema["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            schema[key] = closed(schema[key])
    return schema


def pod_templates(node) -> Iterator[dict]:
    if isinstance(node, dict):
        if "containers" in node.get("spec", {}):
            yield node
        for value in node.values():
            yield from pod_templates(value)
    elif isinstance(node, list):
        for value in node:
            yield from pod_templates(value)


@pytest.mark.parametrize("kind", ["job", "jobset", "pytorchjob", "mpijob"])
def test_pods_have_no_privileges_and_no_secret_value(kind):
    for template in (template for manifest in manifests(config_of(kind)) for template in pod_templates(manifest)):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
        assert spec["automountServiceAccountToken"] is False
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            (token,) = [entry for entry in container["env"] if entry["name"] == "HUB_TOKEN"]
            assert token == {"name": "HUB_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
            (greeting,) = [entry for entry in container["env"] if entry["name"] == "GREETING"]
            assert expanded(greeting["value"], {"HOSTNAME": "x"}) == "it's $(HOSTNAME); $x"


def expanded(text: str, variables: dict[str, str]) -> str:
    """Does what a kubelet does to a container's command and variables (Kubernetes, third_party/…/expand.go)."""
    return re.sub(
        r"\$(\$|\(([^)]*)\))",
        lambda match: "$" if match[1] == "$" else variables.get(match[2], match[0]),
        text,
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(arguments=st.lists(st.text("$()A\"' ;é", max_size=8), max_size=4))
def test_script_arguments_arrive_as_they_are_though_kubernetes_expands_variables(kind, arguments):
    config = config_of(kind, "task=null", "script=a b/train.py")
    config = config.model_copy(update={"script_args": arguments})
    main = manifests(config)[-1]["spec"]
    commands = [template["spec"]["containers"][0]["command"] for template in pod_templates(main)]
    commands = [argv for argv in commands or [main["trainer"]["command"]] if "a b/train.py" in argv]
    assert commands
    for argv in commands:
        result = [expanded(arg, {"A": "expanded"}) for arg in argv]
        assert result[len(result) - len(arguments) - 1 :] == ["a b/train.py", *arguments]


@pytest.mark.parametrize("kind", KINDS)
def test_run_directory_and_python_are_the_same_for_agent_and_worker_though_kubernetes_expands_variables(kind):
    python = "/opt/$(HOME)/python"
    serve = ["serve.port=8080", "serve.host=0.0.0.0"]
    config = config_of(kind, "run_dir='/runs/$(A)$$x'", f"launch.kubernetes.python='{python}'", *serve)
    main = manifests(config)[-1]["spec"]
    containers = [template["spec"]["containers"][0] for template in pod_templates(main)] or [main["trainer"]]
    for container in containers:
        argv = [expanded(argument, {"A": "expanded", "HOME": "/tmp"}) for argument in container["command"]]
        if "--run-dir" in argv:
            assert argv[0] == python and argv.count("/runs/$(A)$$x") == 2
            assert {argument for argument in argv if argument.endswith("/python")} == {python}
        if "livenessProbe" in container:
            command = container["livenessProbe"]["exec"]["command"]
            assert expanded(command[0], {"HOME": "/tmp"}) == python


def test_trainjob_sets_nothing_that_the_operator_sets():
    manifest = manifests(config_of("trainjob"))[-1]
    assert set(manifest["spec"]) == {"runtimeRef", "trainer"}
    assert [entry["name"] for entry in manifest["spec"]["trainer"]["env"] if entry["name"].startswith("PET_")] == []


@pytest.mark.parametrize("kind", KINDS)
def test_configuration_reaches_the_worker_through_a_config_map(kind, monkeypatch):
    from distopt.launch.cli import _load

    config = config_of(kind)
    config_map, *_, main = manifests(config)
    containers = [template["spec"]["containers"][0] for template in pod_templates(main)] or [main["spec"]["trainer"]]
    for container in containers:
        (entry,) = [entry for entry in container["env"] if entry["name"] == "DISTOPT_CONFIG"]
        reference = entry["valueFrom"]["configMapKeyRef"]
        assert (config_map["kind"], config_map["metadata"]["name"]) == ("ConfigMap", reference["name"])
        monkeypatch.setenv("DISTOPT_CONFIG", config_map["data"][reference["key"]])
        assert json.loads(_load("@DISTOPT_CONFIG", None).model_dump_json()) == json.loads(config.model_dump_json())
    assert any("@DISTOPT_CONFIG" in container["command"] for container in containers)


def container(kind: str, *overrides: str) -> dict[str, Any]:
    """Returns the first worker's container as the launcher renders it."""
    platform = ["launch.platform=kubernetes", "launch.kubernetes.image=image", f"launch.kubernetes.kind={kind}"]
    config = load_config(ROOT / "configs/flights.yaml", [*platform, *overrides])
    spec = manifests(config)[-1]["spec"]
    template = spec["template"] if kind == "job" else spec["pytorchReplicaSpecs"]["Master"]["template"]
    (result,) = template["spec"]["containers"]
    return dict(result)


def test_probes_ask_what_the_run_serves() -> None:
    worker = container("job", "serve.port=8081", "serve.host=0.0.0.0")
    assert worker["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": 8081}
    alive = ["python", "-m", "distopt.launch.worker.health_probe", "127.0.0.1", "8081"]
    assert worker["livenessProbe"]["exec"] == {"command": alive}
    assert container("job", "serve.port=8081")["livenessProbe"] == worker["livenessProbe"]
    assert "readinessProbe" not in container("job", "serve.port=8081"), "the kubelet does not reach a pod's loopback"
    assert not [key for key in container("job") if key.endswith("Probe")]


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
