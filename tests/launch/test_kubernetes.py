"""Kubernetes: manifests held against the published schemas, and the API spoken to a server of the real protocol.

The server is kmock's emulator, since the real one cannot run in every test; no operator and no kubelet stand behind it,
so a test writes the statuses that these would write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from distopt.config import parse_config
from distopt.launch import asking
from distopt.launch import manifests as module
from distopt.launch.cli import app
from distopt.launch.cluster import Cluster, ClusterError, _place
from distopt.launch.manifests import manifests
from distopt.launch.platforms import platform
from tests.launch.api_server import Server

CRDS = Path(__file__).parents[3] / "shared" / "crds"
BASE = """
name: flights
task: distopt.examples.flights:Flights
run_dir: /runs/flights
data: {global_batch: 4096}
launch:
  platform: kubernetes
  workers: 2
  nodes: 2
  env: {GREETING: "it's $(HOSTNAME); $x"}
  kubernetes:
    image: registry.example/distopt:1
    gpus: 2
    volumes: [{claim: runs, path: /runs}, {claim: data, path: /data, read_only: true}]
    secrets: {HUB_TOKEN: {secret: hub, key: token}}
    queue: research
"""
MORE = {"job": ["launch.kubernetes.service_account=trainer", "launch.kubernetes.node_selector={pool: gpu, zone: 1}",
                "launch.kubernetes.time_limit_s=3600", "launch.kubernetes.image_pull_secrets=[registry]"],
        "mpijob": ["reduce.backend=horovod"]}  # fmt: skip
CONTAINER = {"name": "worker", "image": "x", "imageID": "x", "ready": False, "restartCount": 0}
KINDS = ["job", "jobset", "trainjob", "pytorchjob", "mpijob"]


def config_of(kind: str, *more: str):
    return parse_config(BASE, [f"launch.kubernetes.kind={kind}", *MORE.get(kind, []), *more])


@pytest.mark.parametrize("kind", KINDS)
def test_manifest_is_the_golden_one(kind, golden, monkeypatch):
    config = config_of(kind)
    assert platform("kubernetes").problems(config) == []
    monkeypatch.setattr(module, "dump_yaml", lambda config: "the configuration")  # any new key would change it
    plan = platform("kubernetes").plan(config)
    (text,) = [text for path, text in plan.files.items() if path.name == "manifest.yaml"]
    golden(f"kubernetes-{kind}.yaml", text)


@pytest.mark.parametrize("kind", KINDS)
def test_built_in_objects_and_pod_templates_keep_to_the_published_schema(kind):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    version = kubernetes_validate.latest_version()
    for manifest in manifests(config_of(kind)):
        if "." not in manifest["apiVersion"].split("/")[0]:
            kubernetes_validate.validate(manifest, version, strict=True)
        for template in pod_templates(manifest):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}
            kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.parametrize(
    ("kind", "file"),
    [("jobset", "jobset"), ("trainjob", "trainjob"), ("pytorchjob", "pytorchjob"), ("mpijob", "mpijob")],
)
def test_custom_resource_keeps_to_its_projects_definition_and_has_no_field_of_its_own(kind, file):
    jsonschema = pytest.importorskip("jsonschema")
    path = CRDS / f"{file}.yaml"
    if not path.exists():
        pytest.skip(f"the published definitions are not at {CRDS}")
    (manifest,) = manifests(config_of(kind))
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
            (found,) = [one for one in document["spec"]["versions"] if one["name"] == version]
            return found["schema"]["openAPIV3Schema"]
    raise AssertionError(f"no {manifest['apiVersion']} in {path}")


def closed(schema: dict) -> dict:
    """Forbids fields that a definition does not name, which the API server would silently drop."""
    schema = {key: value for key, value in schema.items() if not key.startswith("x-")}
    for key in ("properties",):
        if key in schema and schema.get("properties"):
            schema[key] = {name: closed(part) for name, part in schema[key].items()}
            names = set(schema[key]) | ({"apiVersion", "kind", "metadata"} if "spec" in schema[key] else set())
            open_object = schema[key].keys() == {"apiVersion", "kind", "metadata"}
            if not open_object and "additionalProperties" not in schema and names:
                schema["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            schema[key] = closed(schema[key])
    return schema


def pod_templates(part) -> Iterator[dict]:
    if isinstance(part, dict):
        if "containers" in part.get("spec", {}):
            yield part
        for value in part.values():
            yield from pod_templates(value)
    elif isinstance(part, list):
        for value in part:
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
    commands = [words for words in commands or [main["trainer"]["command"]] if "a b/train.py" in words]
    assert commands
    for words in commands:
        found = [expanded(word, {"A": "expanded"}) for word in words]
        assert found[len(found) - len(arguments) - 1 :] == ["a b/train.py", *arguments]


def test_trainjob_sets_nothing_that_the_operator_sets():
    (manifest,) = manifests(config_of("trainjob"))
    assert set(manifest["spec"]) == {"runtimeRef", "trainer"}
    assert [entry["name"] for entry in manifest["spec"]["trainer"]["env"] if entry["name"].startswith("PET_")] == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["launch.kubernetes.image=null"], "launch.kubernetes.image: missing"),
        (["name=Flights_1"], "name: found 'Flights_1'; Kubernetes takes a-z"),
        (["name=" + "x" * 51], "at most 50"),
        (["run_dir=runs/flights"], "run_dir: runs/flights lies on no writable volume"),
        (["run_dir=/data/flights"], "run_dir: /data/flights lies on no writable volume"),
        (["reduce.backend=horovod"], "horovod needs launch.kubernetes.kind=mpijob"),
        (["launch.kubernetes.kind=mpijob"], "an mpijob starts workers of horovod or mpi"),
        (["launch.kubernetes.kind=trainjob", "launch.kubernetes.time_limit_s=5"], "takes it from its Cluster"),
        (["launch.nodes=null", "launch.hosts=[a,b]"], "launch.hosts: Kubernetes finds the hosts itself"),
        (["launch.secrets=[HUB_TOKEN]"], "use launch.kubernetes.secrets"),
    ],
)
def test_bad_input_is_refused(overrides, said):
    found = platform("kubernetes").problems(parse_config(BASE, overrides))
    assert said in "\n".join(found)


@pytest.fixture
def server() -> Iterator[Server]:
    pytest.importorskip("kmock")
    with Server() as running:
        yield running


@pytest.fixture
def api(server):
    client = pytest.importorskip("kubernetes.client")
    with client.ApiClient(client.Configuration(host=server.url)) as api:
        yield api


def cluster_of(kind: str, api) -> Cluster:
    config = config_of(kind)
    return Cluster(config, manifests(config), api)


def create_pod(api, name: str) -> None:
    """Does what the controller of Jobs would do."""
    from kubernetes.client import CoreV1Api

    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"distopt.run": "flights"}}}
    CoreV1Api(api).create_namespaced_pod("default", pod)


def write_status(cluster: Cluster, status: dict) -> None:
    """Does what the controller of the run's kind would do."""
    from kubernetes.client import CustomObjectsApi

    place = (*_place(cluster.objects[-1], cluster.namespace), cluster.name)
    CustomObjectsApi(cluster.api).patch_namespaced_custom_object(*place, {"status": status})


@pytest.mark.parametrize("kind", KINDS)
def test_run_is_submitted_asked_about_and_stopped(kind, api):
    cluster = cluster_of(kind, api)
    assert cluster.state().phase == "unknown"
    assert cluster.submit() == f"{cluster.objects[-1]['kind']} default/flights"
    assert cluster.state().phase == "pending"
    done = {"job": "Complete", "jobset": "Completed", "trainjob": "Complete"}.get(kind, "Succeeded")
    write_status(cluster, {"conditions": [{"type": "Running", "status": "True"}]})
    assert cluster.state().phase == "running"
    write_status(cluster, {"conditions": [{"type": done, "status": "True"}]})
    assert cluster.state().phase == "done"
    cluster.stop()
    assert cluster.state().phase == "unknown"


@pytest.fixture
def distopt(api, tmp_path, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """Gives a command, with a kubeconfig of the API server, and returns its exit status, output and errors."""
    kubeconfig = {
        "apiVersion": "v1", "kind": "Config", "current-context": "here",
        "clusters": [{"name": "here", "cluster": {"server": api.configuration.host}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        "users": [{"name": "me", "user": {}}],
    }  # fmt: skip
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
    (tmp_path / "run.yaml").write_text(BASE)
    kube_config = pytest.importorskip("kubernetes.config.kube_config")
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(asking, "POLL_S", 0.05)
    monkeypatch.chdir(tmp_path)

    def command(*words: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, words)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout, result.stderr

    return command


def test_commands_submit_a_run_ask_about_it_read_it_and_stop_it(distopt, api):
    status, _, said = distopt("launch", "run.yaml", "--detach")
    assert (status, "submitted: Job default/flights" in said) == (0, True)
    assert distopt("status") == (0, "runs/flights\tpending\t\n", "")
    create_pod(api, "running")
    assert distopt("logs", "flights") == (0, "step 1\n", "")
    assert distopt("logs", "flights", "--rank", "2")[0] == 2
    write_status(cluster_of("job", api), {"conditions": [{"type": "Complete", "status": "True"}]})
    assert distopt("logs", "flights", "--follow") == (0, "step 1\n", "")
    # The object of a run that has ended keeps its name.
    status, _, said = distopt("launch", "run.yaml")
    assert (status, "the engine has a run flights already (done); `distopt stop runs/flights`" in said) == (2, True)
    assert distopt("stop", "flights") == (0, "stopped\tthere is no Job flights in namespace default\n", "")
    assert distopt("status")[1].startswith("runs/flights\tunknown\tthere is no Job flights")
    assert distopt("launch", "run.yaml", "--detach")[0] == 0


def test_launcher_that_gets_no_answer_asks_again_and_tells_the_end(distopt, server):
    asked = server.emulator["get /apis/batch/v1/namespaces/default/jobs/flights"]
    asked[1:4] << 503
    asked[4:] << {"metadata": {"name": "flights"}, "status": {"conditions": [{"type": "Complete", "status": "True"}]}}
    status, _, said = distopt("launch", "run.yaml")
    assert status == 0, said
    assert said.count("no answer: ") == 1 and "503" in said and said.endswith("distopt: done\n")


def test_machine_without_a_kubeconfig_is_refused(distopt, tmp_path):
    (tmp_path / "kubeconfig").unlink()
    status, _, said = distopt("launch", "run.yaml")
    assert (status, "launch.kubernetes.context: no cluster is known here: " in said) == (2, True)


def test_second_run_of_the_same_name_is_refused_and_the_first_stays(api):
    cluster = cluster_of("job", api)
    cluster.submit()
    with pytest.raises(ClusterError, match=r"409 Conflict.*`distopt stop flights` removes them"):
        cluster.submit()
    assert cluster.state().phase == "pending"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"reason": "OOMKilled", "message": "step 7"}, "out of memory (OOMKilled), exit status 137"),
        ({"reason": "Error", "message": "rank 1: Traceback\nValueError: boom\n"},
         "Error, exit status 137\n    rank 1: Traceback\n    ValueError: boom"),
    ],
)  # fmt: skip
def test_failed_run_names_the_pod_that_died_first_its_node_and_of_what(how, said, api):
    cluster = cluster_of("job", api)
    cluster.submit()
    for index, ended in enumerate(
        [
            {"exitCode": 1, "reason": "Error", "finishedAt": "2026-01-01T00:00:09Z", "message": "PeerError: rank 1"},
            {"exitCode": 137, "finishedAt": "2026-01-01T00:00:05Z", **how},
        ]
    ):
        status = {"phase": "Failed", "containerStatuses": [{**CONTAINER, "state": {"terminated": ended}}]}
        add_pod(cluster, f"flights-{index}-abc", index, status)
    write_status(cluster, {"conditions": [{"type": "Failed", "status": "True", "message": "BackoffLimitExceeded"}]})
    state = cluster.state()
    assert state.phase == "failed"
    assert state.detail == f"BackoffLimitExceeded; pod flights-1-abc on node1 died first: {said}"


SPEC = {"nodeName": "node1", "containers": [{"name": "worker", "image": "x"}]}


def add_pod(cluster: Cluster, name: str, second: int, status: dict, **labels: str) -> None:
    """Does what the controller of the run's kind and a kubelet would do."""
    from kubernetes.client import CoreV1Api

    created = f"2026-01-01T00:00:{second:02}Z"
    metadata = {"name": name, "creationTimestamp": created, "labels": {"distopt.run": cluster.name, **labels}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": SPEC, "status": status}
    CoreV1Api(cluster.api).create_namespaced_pod(cluster.namespace, pod)


UNPULLED = {"waiting": {"reason": "ErrImagePull", "message": "no such host: registry.example"}}
UNSCHEDULED = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes have room"}
CREATING = {"waiting": {"reason": "ContainerCreating"}}


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ({"phase": "Pending", "containerStatuses": [{**CONTAINER, "state": UNPULLED}]},
         "pod flights-0-abc: ErrImagePull: no such host: registry.example"),
        ({"phase": "Pending", "conditions": [UNSCHEDULED]}, "pod flights-0-abc: 0/2 nodes have room"),
        ({"phase": "Pending", "containerStatuses": [{**CONTAINER, "state": CREATING}]}, ""),
    ],
)  # fmt: skip
def test_run_whose_pods_cannot_start_is_pending_and_says_why(status, said, api):
    cluster = cluster_of("job", api)
    cluster.submit()
    add_pod(cluster, "flights-0-abc", 1, status)
    write_status(cluster, {"active": 2})  # a Job counts pods that have not started
    assert (cluster.state().phase, cluster.state().detail) == ("pending", said)
    add_pod(cluster, "flights-1-abc", 1, {"phase": "Running"})
    assert (cluster.state().phase, cluster.state().detail) == ("running", said)


INDEX = "batch.kubernetes.io/job-completion-index"
ROLE, REPLICA = "training.kubeflow.org/job-role", "training.kubeflow.org/replica-index"


@pytest.mark.parametrize(
    ("kind", "pods"),
    [
        ("job", {"b": (0, {INDEX: "0"}), "d": (1, {INDEX: "1"}), "a": (0, {INDEX: "0"})}),
        ("mpijob", {"b": (0, {ROLE: "launcher"}), "c": (1, {ROLE: "worker", REPLICA: "0"}),
                    "a": (0, {ROLE: "launcher"})}),
        ("pytorchjob", {"b": (0, {"training.kubeflow.org/replica-type": "master", REPLICA: "0"}),
                        "c": (1, {"training.kubeflow.org/replica-type": "worker", REPLICA: "0"})}),
    ],
)  # fmt: skip
def test_log_of_a_node_is_that_of_its_pods_in_the_order_in_which_they_came(kind, pods, api, monkeypatch):
    from kubernetes.client import CoreV1Api

    cluster = cluster_of(kind, api)
    cluster.submit()
    for second, (name, (_, labels)) in enumerate(pods.items()):
        add_pod(cluster, name, second, {"phase": "Running"}, **labels)
    # The emulator has no kubelet, which is who keeps logs.
    monkeypatch.setattr(CoreV1Api, "read_namespaced_pod_log", lambda self, name, namespace, **_: f"{name} said\n")
    for node in (0, 1):
        assert cluster.logs(node) == "".join(f"{name} said\n" for name, (number, _) in pods.items() if number == node)
    assert cluster.logs(2) == ""


@pytest.mark.parametrize(("pod", "printed"), [("waiting", ""), ("running", "step 1\n")])
def test_logs_are_what_the_container_has_printed_and_empty_while_it_is_being_created(pod, printed, api):
    cluster = cluster_of("job", api)
    cluster.submit()
    assert cluster.logs(0) == ""  # no pod yet
    create_pod(api, pod)
    assert cluster.logs(0) == printed


def test_cluster_that_is_not_there_is_named():
    client = pytest.importorskip("kubernetes.client")
    with client.ApiClient(client.Configuration(host="http://127.0.0.1:9")) as api:
        api.rest_client.pool_manager.connection_pool_kw["retries"] = False
        with pytest.raises(ClusterError, match="the cluster cannot be reached"):
            cluster_of("job", api).state()


def test_configuration_reaches_the_worker_through_its_variable(monkeypatch):
    from distopt.launch.cli import _load

    config = config_of("job")
    (job,) = [one for one in manifests(config) if one["kind"] == "Job"]
    container = job["spec"]["template"]["spec"]["containers"][0]
    (value,) = [entry["value"] for entry in container["env"] if entry["name"] == "DISTOPT_CONFIG"]
    monkeypatch.setenv("DISTOPT_CONFIG", expanded(value, {}))
    assert container["command"][-1] == "@DISTOPT_CONFIG"
    assert json.loads(_load("@DISTOPT_CONFIG", None).model_dump_json()) == json.loads(config.model_dump_json())
