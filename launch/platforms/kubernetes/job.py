"""A run on Kubernetes, through its API."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from distopt.config import RunConfig

from ...jobs import Phase, PlatformError, State, SubmittedJob
from .pods import LABEL, Manifest

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

TIMEOUT_S = 30

# The condition that says that all is well, as the kinds call it.
_DONE = {"Complete", "Completed", "Succeeded"}

_PLURALS = {
    "Job": "jobs",
    "JobSet": "jobsets",
    "TrainJob": "trainjobs",
    "PyTorchJob": "pytorchjobs",
    "MPIJob": "mpijobs",
    "NetworkPolicy": "networkpolicies",
    "PodDisruptionBudget": "poddisruptionbudgets",
}
_CORE = {"ConfigMap": "config_map", "Service": "service"}  # as the client's methods for the core group name them

# Labels of pods: the first is an annotation before Kubernetes 1.28, the others are of Kubeflow's training operator.
_COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"
_REPLICA_TYPE = "training.kubeflow.org/replica-type"
_REPLICA_INDEX = "training.kubeflow.org/replica-index"
_JOB_ROLE = "training.kubeflow.org/job-role"


class KubernetesJob(SubmittedJob):
    """The objects of one run on a cluster.

    Args:
        config: The run; its `launch.kubernetes` names context and namespace.
        objects: What to create, the object that stands for the run last.
        api: A client, in place of one of the user's kubeconfig.
    """

    def __init__(self, config: RunConfig, objects: list[Manifest], api: ApiClient | None = None) -> None:
        self.name = config.name
        self.context = config.launch.kubernetes.context
        self.namespace = config.launch.kubernetes.namespace
        self.objects = objects
        self._api = api

    @property
    def api(self) -> ApiClient:
        """The client, made at first use."""
        if self._api is None:
            from kubernetes import config as kubeconfig

            try:
                self._api = kubeconfig.new_client_from_config(context=self.context)
            except kubeconfig.ConfigException as error:
                raise PlatformError(
                    f"launch.kubernetes.context: no cluster is known here: {error}; `kubectl config get-contexts` "
                    "shows those of your kubeconfig, KUBECONFIG names another file"
                ) from error
        return self._api

    # The contract of a submitted job.

    def submit(self) -> str:
        """Creates all objects, or none: those that were created are deleted when one is refused.

        The run's object is created first, and owns the others, so that however it is deleted (`kubectl delete`, its
        `ttl_s`) they go too. Its pods wait for them.
        """
        *others, run_object = self.objects
        created: list[Manifest] = []
        owner: Manifest = {}
        try:
            for manifest in (run_object, *others):
                answer = self._create(_owned(manifest, owner))
                created.append(manifest)
                owner = owner or answer
        except PlatformError:
            for earlier in reversed(created):
                self._delete(earlier)
            raise
        return f"{run_object['kind']} {self.namespace}/{self.name}"

    def state(self) -> State:
        """Returns the state in the run's object, and which pod died first or cannot start."""
        run_object = self._read()
        if run_object is None:
            kind = self.objects[-1]["kind"]
            return State("unknown", f"there is no {kind} {self.name} in namespace {self.namespace}")

        status = run_object.get("status") or {}
        conditions = {each["type"]: each for each in status.get("conditions") or [] if each.get("status") == "True"}
        if _DONE & set(conditions):
            return State("done")
        if failed := conditions.get("Failed"):
            reason = failed.get("message") or failed.get("reason") or ""
            return State("failed", "; ".join(filter(None, [reason, self._first_death()])))
        if run_object["metadata"].get("deletionTimestamp"):
            return State("running", "it is being deleted: its pods save a checkpoint and stop")

        # The pods are asked too, since a Job counts pods as active that still wait for a node or an image.
        pods = self._pods()
        is_running = "Running" in conditions or any(_status(pod).get("phase") == "Running" for pod in pods)
        phase: Phase = "running" if is_running and "Suspended" not in conditions else "pending"
        return State(phase, next(filter(None, map(_obstacle, pods)), ""))

    def keeps_name(self, state: State) -> bool:
        """Returns whether there is an object of this name, which stays after its run has ended until it is deleted."""
        return state.phase != "unknown"

    def logs(self, rank: int) -> str:
        """Returns the output of the node `rank`: of all its pods one after the other, where one replaced another."""
        from kubernetes import client

        read = client.CoreV1Api(self.api).read_namespaced_pod_log
        pods = [pod for pod in self._pods() if _node_rank(pod) == rank]
        pods.sort(key=lambda pod: (pod["metadata"].get("creationTimestamp") or "", _name(pod)))
        # Bad request is the answer for a container that is still waiting for its image or its volumes.
        logs = [
            self._ask(read, _name(pod), self.namespace, none_for=(HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND))
            for pod in pods
        ]
        return b"".join(filter(None, logs)).decode(errors="replace")

    def stop(self) -> None:
        """Asks for the objects to be deleted. Pods get SIGTERM and their grace time; the run's object goes last."""
        for manifest in reversed(self.objects):
            self._delete(manifest)

    # Requests. `CustomObjectsApi` takes any kind by its group, version and plural, so one call does for all kinds of a
    # run; the core group is the only one that it cannot address.

    def _create(self, manifest: Manifest) -> Manifest:
        """Creates an object and returns it as the cluster has it."""
        from kubernetes import client

        if manifest["kind"] in _CORE:
            create = getattr(client.CoreV1Api(self.api), f"create_namespaced_{_CORE[manifest['kind']]}")
            answer = self._ask(create, self.namespace, manifest)
        else:
            create = client.CustomObjectsApi(self.api).create_namespaced_custom_object
            answer = self._ask(create, *_address(manifest, self.namespace), manifest)
        return dict(json.loads(answer or b"{}"))

    def _read(self) -> Manifest | None:
        """Returns the object that stands for the run, None if there is none."""
        from kubernetes import client

        get = client.CustomObjectsApi(self.api).get_namespaced_custom_object
        answer = self._ask(
            get, *_address(self.objects[-1], self.namespace), self.name, none_for=(HTTPStatus.NOT_FOUND,)
        )
        return None if answer is None else dict(json.loads(answer))

    def _delete(self, manifest: Manifest) -> None:
        from kubernetes import client

        name = manifest["metadata"]["name"]
        if manifest["kind"] in _CORE:
            delete = getattr(client.CoreV1Api(self.api), f"delete_namespaced_{_CORE[manifest['kind']]}")
            self._ask(delete, name, self.namespace, none_for=(HTTPStatus.NOT_FOUND,))
        else:
            delete = client.CustomObjectsApi(self.api).delete_namespaced_custom_object
            address = _address(manifest, self.namespace)
            # In the foreground the object stays until its pods are gone, so the run has not ended while they save.
            self._ask(delete, *address, name, propagation_policy="Foreground", none_for=(HTTPStatus.NOT_FOUND,))

    def _pods(self) -> list[Manifest]:
        from kubernetes import client

        # The pods of a TrainJob do not have its labels, but those of the JobSet that its operator makes.
        is_trainjob = self.objects[-1]["kind"] == "TrainJob"
        selector = f"jobset.sigs.k8s.io/jobset-name={self.name}" if is_trainjob else f"{LABEL}={self.name}"
        answer = self._ask(client.CoreV1Api(self.api).list_namespaced_pod, self.namespace, label_selector=selector)
        return list(json.loads(answer)["items"]) if answer else []

    def _first_death(self) -> str:
        """Returns which container ended first and why, as the kubelet saw it; empty where none did."""
        deaths = [
            (death.get("finishedAt") or "", _name(pod), pod, death) for pod in self._pods() for death in _deaths(pod)
        ]
        if not deaths:
            return ""

        _, name, pod, death = min(deaths, key=lambda each: each[:2])
        message = ""
        if death.get("reason") == "OOMKilled":
            cause = "out of memory (OOMKilled)"
        else:
            cause = death.get("reason") or "an error"
            message = "".join(f"\n    {line}" for line in (death.get("message") or "").strip().splitlines())
        node = pod["spec"].get("nodeName") or "no node"
        return f"pod {name} on {node} died first: {cause}, exit status {death['exitCode']}{message}"

    def _ask(
        self, call: Callable[..., Any], *args: Any, none_for: tuple[int, ...] = (), **options: Any
    ) -> bytes | None:
        """Calls the client and returns the body of its answer; None where its status is one of `none_for`.

        The client's types are not used: each release has those of one release of Kubernetes, and refuses the answers of
        others.
        """
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            body: bytes = call(*args, **options, _preload_content=False, _request_timeout=TIMEOUT_S).data
            return body
        except ApiException as error:
            if error.status in none_for:
                return None
            message = f"{error.status} {error.reason}: {_message(error.body)}"
            if error.status == HTTPStatus.CONFLICT:
                message += f". A run of this name has left its objects: `distopt stop {self.name}` removes them"
            raise PlatformError(f"the cluster refused {call.__name__.replace('_', ' ')}: {message}") from error
        except HTTPError as error:
            raise PlatformError(f"the cluster cannot be reached: {error}; does `kubectl get pods` work?") from error


def _address(manifest: Manifest, namespace: str) -> tuple[str, str, str, str]:
    """Returns group, version, namespace and plural name of an object."""
    group, _, version = manifest["apiVersion"].partition("/")
    return group, version, namespace, _PLURALS[manifest["kind"]]


def _owned(manifest: Manifest, owner: Manifest) -> Manifest:
    """Returns an object that is deleted with its owner, where there is one."""
    uid = owner.get("metadata", {}).get("uid")
    if uid is None:
        return manifest
    reference = {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": uid,
    }
    return {**manifest, "metadata": {**manifest["metadata"], "ownerReferences": [reference]}}


def _name(pod: Manifest) -> str:
    return str(pod["metadata"]["name"])


def _status(pod: Manifest) -> Manifest:
    return pod.get("status") or {}


def _node_rank(pod: Manifest) -> int:
    """Returns the number of a pod's node: an Indexed Job's index; or 0 for master or launcher, then the workers."""
    labels = {**(pod["metadata"].get("annotations") or {}), **(pod["metadata"].get("labels") or {})}
    if _COMPLETION_INDEX in labels:
        return int(labels[_COMPLETION_INDEX])
    is_worker = (labels.get(_REPLICA_TYPE) or labels.get(_JOB_ROLE)) == "worker"
    return int(labels.get(_REPLICA_INDEX, 0)) + is_worker


def _deaths(pod: Manifest) -> Iterator[Manifest]:
    """Yields how the containers of a pod ended that ended badly, those included that were started again."""
    for container in _status(pod).get("containerStatuses") or []:
        for state in (container.get("state") or {}, container.get("lastState") or {}):
            ended = state.get("terminated")
            if ended and ended.get("exitCode"):
                yield ended


def _obstacle(pod: Manifest) -> str:
    """Returns what keeps a pod from starting, as scheduler or kubelet saw it; empty where it only needs time."""
    for condition in _status(pod).get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"pod {_name(pod)}: {condition.get('message') or condition.get('reason')}"
    for container in _status(pod).get("containerStatuses") or []:
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            return ": ".join(filter(None, [f"pod {_name(pod)}", waiting["reason"], waiting.get("message")]))
    return ""


def _message(body: Any) -> str:
    try:
        return str(json.loads(body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(body)[:300]
