"""Kubernetes: the API spoken to a server of the real protocol.

The server is kmock's emulator, since the real one cannot run in every test; no operator and no kubelet stand behind it,
so a test writes the statuses that these would write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import yaml
from typer.testing import CliRunner

from distopt.launch import runs
from distopt.launch.cli import app
from distopt.launch.jobs import PlatformError
from distopt.launch.platforms.kubernetes.job import KubernetesJob, _address
from distopt.launch.platforms.kubernetes.manifests import manifests
from tests.kubernetes.api_server import Server
from tests.kubernetes.run_config import BASE, KINDS, config_of

POLICIES = ("NetworkPolicy", "PodDisruptionBudget")
CONTAINER = {"name": "worker", "image": "x", "imageID": "x", "ready": False, "restartCount": 0}


@pytest.fixture
def server() -> Iterator[Server]:
    pytest.importorskip("kmock", reason="kmock is not installed (make setup-dev)")
    with Server() as running:
        yield running


@pytest.fixture
def api(server):
    client = pytest.importorskip("kubernetes.client", reason="kubernetes is not installed (make setup-dev)")
    with client.ApiClient(client.Configuration(host=server.url)) as api:
        yield api


def cluster_of(kind: str, api) -> KubernetesJob:
    config = config_of(kind)
    return KubernetesJob(config, manifests(config), api)


def create_pod(api, name: str) -> None:
    """Does what the controller of Jobs would do."""
    from kubernetes.client import CoreV1Api

    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"distopt.run": "flights"}}}
    CoreV1Api(api).create_namespaced_pod("default", pod)


def write_status(cluster: KubernetesJob, status: dict) -> None:
    """Does what the controller of the run's kind would do."""
    from kubernetes.client import CustomObjectsApi

    address = (*_address(cluster.objects[-1], cluster.namespace), cluster.name)
    CustomObjectsApi(cluster.api).patch_namespaced_custom_object(*address, {"status": status})


@pytest.mark.parametrize("kind", KINDS)
def test_run_is_submitted_asked_about_and_stopped_with_all_its_objects(kind, api):
    wanted = ["launch.kubernetes.network_policy=true", "launch.kubernetes.disruption_budget=true"]
    config = config_of(kind, *wanted)
    cluster = KubernetesJob(config, manifests(config), api)
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


def test_run_is_stopped_on_a_server_that_answers_with_a_status_where_later_ones_give_the_object(api):
    config = config_of("job", "name=old")
    cluster = KubernetesJob(config, manifests(config), api)
    cluster.submit()
    cluster.stop()
    assert cluster.state().phase == "unknown"


def test_object_of_the_run_owns_the_others_so_that_they_are_deleted_with_it(api, server):
    from kubernetes.client import CoreV1Api, CustomObjectsApi

    config = config_of("job", "launch.kubernetes.network_policy=true", "launch.kubernetes.disruption_budget=true")
    cluster = KubernetesJob(config, manifests(config), api)
    # The emulator gives objects no identity; a server's answer has one.
    created = {**cluster.objects[-1], "metadata": {**cluster.objects[-1]["metadata"], "uid": "1234"}}
    server.emulator["post /apis/batch/v1/namespaces/default/jobs"] << created
    cluster.submit()

    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "flights", "uid": "1234"}
    core = CoreV1Api(api)
    get = CustomObjectsApi(api).get_namespaced_custom_object
    others = [core.read_namespaced_service("flights", "default"), core.read_namespaced_config_map("flights", "default")]
    stored = [api.sanitize_for_serialization(other) for other in others]
    stored += [get(*_address(one, "default"), "flights") for one in cluster.objects if one["kind"] in POLICIES]
    assert [one["metadata"]["ownerReferences"] for one in stored] == [[owner]] * 4


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
    kube_config = pytest.importorskip(
        "kubernetes.config.kube_config", reason="kubernetes is not installed (make setup-dev)"
    )
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(runs, "POLL_S", 0.05)
    monkeypatch.chdir(tmp_path)

    def command(*args: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, args)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout, result.stderr

    return command


def test_commands_submit_a_run_ask_about_it_read_it_and_stop_it(distopt, api):
    status, _, message = distopt("launch", "run.yaml", "--detach")
    assert (status, "submitted: Job default/flights" in message) == (0, True)
    assert distopt("status") == (0, "runs/flights\tpending\t\n", "")
    create_pod(api, "running")
    assert distopt("logs", "flights") == (0, "step 1\n", "")
    assert distopt("logs", "flights", "--rank", "2")[0] == 2
    write_status(cluster_of("job", api), {"conditions": [{"type": "Complete", "status": "True"}]})
    assert distopt("logs", "flights", "--follow") == (0, "step 1\n", "")
    # The object of a run that has ended keeps its name.
    status, _, message = distopt("launch", "run.yaml")
    assert (status, "kubernetes already has a run flights (done); `distopt stop runs/flights`" in message) == (2, True)
    assert distopt("stop", "flights") == (0, "stopped\tthere is no Job flights in namespace default\n", "")
    assert distopt("stop", "flights") == (0, "unknown\tthere is no Job flights in namespace default\n", "")
    assert distopt("status")[1].startswith("runs/flights\tunknown\tthere is no Job flights")
    assert distopt("launch", "run.yaml", "--detach")[0] == 0


def test_launcher_that_gets_no_answer_asks_again_and_tells_the_end(distopt, server):
    asked = server.emulator["get /apis/batch/v1/namespaces/default/jobs/flights"]
    asked[1:4] << 503
    asked[4:] << {"metadata": {"name": "flights"}, "status": {"conditions": [{"type": "Complete", "status": "True"}]}}
    status, _, message = distopt("launch", "run.yaml")
    assert status == 0, message
    assert message.count("no answer: ") == 1 and "503" in message and message.endswith("distopt: done\n")


def test_machine_without_a_kubeconfig_is_refused(distopt, tmp_path):
    (tmp_path / "kubeconfig").unlink()
    status, _, message = distopt("launch", "run.yaml")
    assert (status, "launch.kubernetes.context: no cluster is known here: " in message) == (2, True)


def test_second_run_of_the_same_name_is_refused_and_the_first_stays(api):
    cluster = cluster_of("job", api)
    cluster.submit()
    with pytest.raises(PlatformError, match=r"409 Conflict.*`distopt stop flights` removes them"):
        cluster.submit()
    assert cluster.state().phase == "pending"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"reason": "OOMKilled", "message": "step 7"}, "out of memory (OOMKilled), exit status 137"),
        ({"reason": "Error", "message": "rank 1: Traceback\nValueError: boom\n"},
         "Error, exit status 137\n    rank 1: Traceback\n    ValueError: boom"),
    ],
)  # fmt: skip
def test_failed_run_names_the_pod_that_died_first_its_node_and_of_what(how, message, api):
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
    assert state.detail == f"BackoffLimitExceeded; pod flights-1-abc on node1 died first: {message}"


SPEC = {"nodeName": "node1", "containers": [{"name": "worker", "image": "x"}]}


def add_pod(cluster: KubernetesJob, name: str, second: int, status: dict, **labels: str) -> None:
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
    ("status", "message"),
    [
        ({"phase": "Pending", "containerStatuses": [{**CONTAINER, "state": UNPULLED}]},
         "pod flights-0-abc: ErrImagePull: no such host: registry.example"),
        ({"phase": "Pending", "conditions": [UNSCHEDULED]}, "pod flights-0-abc: 0/2 nodes have room"),
        ({"phase": "Pending", "containerStatuses": [{**CONTAINER, "state": CREATING}]}, ""),
    ],
)  # fmt: skip
def test_run_whose_pods_cannot_start_is_pending_and_says_why(status, message, api):
    cluster = cluster_of("job", api)
    cluster.submit()
    add_pod(cluster, "flights-0-abc", 1, status)
    write_status(cluster, {"active": 2})  # a Job counts pods that have not started
    assert (cluster.state().phase, cluster.state().detail) == ("pending", message)
    add_pod(cluster, "flights-1-abc", 1, {"phase": "Running"})
    assert (cluster.state().phase, cluster.state().detail) == ("running", message)


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
def test_log_of_a_node_is_that_of_its_pods_in_the_order_in_which_they_came(kind, pods, api, server):
    cluster = cluster_of(kind, api)
    cluster.submit()
    for second, (name, (_, labels)) in enumerate(pods.items()):
        add_pod(cluster, name, second, {"phase": "Running"}, **labels)
        # The emulator has no kubelet, which is who keeps logs.
        server.emulator[f"get /api/v1/namespaces/default/pods/{name}/log"] << f"{name} said\n".encode()
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
    client = pytest.importorskip("kubernetes.client", reason="kubernetes is not installed (make setup-dev)")
    with client.ApiClient(client.Configuration(host="http://127.0.0.1:9")) as api:
        api.rest_client.pool_manager.connection_pool_kw["retries"] = False
        with pytest.raises(PlatformError, match="the cluster cannot be reached"):
            cluster_of("job", api).state()
