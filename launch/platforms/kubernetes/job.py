"""A run on Kubernetes, through its API."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from distopt.config import RunConfig

from ...jobs import Phase, PlatformError, State, SubmittedJob
from .manifests import LABEL, Manifest

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

TIMEOUT_S = 30
_KUBEFLOW = "training.kubeflow.org/"
_DONE = {"Complete", "Completed", "Succeeded"}
_PLURALS = {
    "Job": "jobs",
    "JobSet": "jobsets",
    "TrainJob": "trainjobs",
    "PyTorchJob": "pytorchjobs",
    "MPIJob": "mpijobs",
}


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

    def submit(self) -> str:
        """Creates the objects, or none: what has been created is deleted when one is refused."""
        made: list[Manifest] = []
        for manifest in self.objects:
            try:
                self._create(manifest)
            except PlatformError:
                for undone in reversed(made):
                    self._delete(undone)
                raise
            made.append(manifest)
        main = self.objects[-1]
        return f"{main['kind']} {self.namespace}/{self.name}"

    def state(self) -> State:
        """Returns what the run's object says of itself, and of the pod that died first."""
        from kubernetes import client

        main = self.objects[-1]
        get = client.CustomObjectsApi(self.api).get_namespaced_custom_object
        answer = self._ask(get, *_place(main, self.namespace), self.name, none_for=(404,))
        if answer is None:
            return State("unknown", f"there is no {main['kind']} {self.name} in namespace {self.namespace}")
        found = json.loads(answer)
        status = found.get("status") or {}
        true = {one["type"]: one for one in status.get("conditions") or [] if one.get("status") == "True"}
        if _DONE & set(true):
            return State("done")
        if "Failed" in true:
            said = true["Failed"].get("message") or true["Failed"].get("reason") or ""
            return State("failed", "; ".join(filter(None, [said, self._first_death()])))
        if found["metadata"].get("deletionTimestamp"):
            return State("running", "it is being deleted: its pods save and end")
        pods = self._pods()
        # A Job's own count of active pods has those that still wait for a node or an image.
        running = "Running" in true or any((pod.get("status") or {}).get("phase") == "Running" for pod in pods)
        phase: Phase = "running" if running and "Suspended" not in true else "pending"
        return State(phase, next(filter(None, map(_hindrance, pods)), ""))

    def keeps_name(self, state: State) -> bool:
        """An object keeps its name until it is deleted, whether its run has ended or not."""
        return state.phase != "unknown"

    def logs(self, rank: int) -> str:
        """Returns the output of the node `rank`: of its pods one after the other, where one took another's place."""
        from kubernetes import client

        read = client.CoreV1Api(self.api).read_namespaced_pod_log
        pods = sorted(self._pods(), key=lambda pod: (pod["metadata"].get("creationTimestamp") or "", _name(pod)))
        # 400 is the answer for a container that is still waiting for its image or its volumes.
        said = [self._ask(read, _name(pod), self.namespace, none_for=(400, 404)) for pod in pods if _node(pod) == rank]
        return b"".join(filter(None, said)).decode(errors="replace")

    def stop(self) -> None:
        """Has the objects deleted; pods get SIGTERM and their grace time, and the object is gone when they are."""
        for manifest in reversed(self.objects):
            self._delete(manifest)

    def _create(self, manifest: Manifest) -> None:
        from kubernetes import client

        if manifest["kind"] == "Service":
            self._ask(client.CoreV1Api(self.api).create_namespaced_service, self.namespace, manifest)
        else:
            create = client.CustomObjectsApi(self.api).create_namespaced_custom_object
            self._ask(create, *_place(manifest, self.namespace), manifest)

    def _delete(self, manifest: Manifest) -> None:
        from kubernetes import client

        name = manifest["metadata"]["name"]
        if manifest["kind"] == "Service":
            self._ask(client.CoreV1Api(self.api).delete_namespaced_service, name, self.namespace, none_for=(404,))
        else:
            delete = client.CustomObjectsApi(self.api).delete_namespaced_custom_object
            place = _place(manifest, self.namespace)
            # The object stays until its pods are gone, so that nobody takes the run for ended while they save.
            self._ask(delete, *place, name, propagation_policy="Foreground", none_for=(404,))

    def _pods(self) -> list[dict[str, Any]]:
        from kubernetes import client

        pods = client.CoreV1Api(self.api).list_namespaced_pod
        answer = self._ask(pods, self.namespace, label_selector=self._selector())
        return list(json.loads(answer)["items"]) if answer else []

    def _selector(self) -> str:
        own = self.objects[-1]["kind"] != "TrainJob"  # whose pods carry the labels of its JobSet
        return f"{LABEL}={self.name}" if own else f"jobset.sigs.k8s.io/jobset-name={self.name}"

    def _first_death(self) -> str:
        """Names the container that ended first, and why, as the kubelet saw it."""
        deaths = []
        for pod in self._pods():
            for container in (pod.get("status") or {}).get("containerStatuses") or []:
                for state in (container.get("state") or {}, container.get("lastState") or {}):
                    ended = state.get("terminated")
                    if ended and ended.get("exitCode"):
                        deaths.append((ended.get("finishedAt") or "", _name(pod), pod, ended))
        if not deaths:
            return ""
        _, name, pod, ended = min(deaths, key=lambda death: death[:2])
        killed = ended.get("reason") == "OOMKilled"
        why = "out of memory (OOMKilled)" if killed else ended.get("reason") or "an error"
        words = "" if killed else (ended.get("message") or "").strip()
        said = "".join(f"\n    {line}" for line in words.splitlines())
        where = f"pod {name} on {pod['spec'].get('nodeName') or 'no node'}"
        return f"{where} died first: {why}, exit status {ended['exitCode']}{said}"

    def _ask(
        self, call: Callable[..., Any], *args: Any, none_for: tuple[int, ...] = (), **options: Any
    ) -> bytes | None:
        """Calls the client and returns the body of its answer; None where its status is one of `none_for`.

        The client's own types are not used: they are those of one release, and refuse what another one answers.
        """
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            answer: bytes = call(*args, **options, _preload_content=False, _request_timeout=TIMEOUT_S).data
            return answer
        except ApiException as error:
            if error.status in none_for:
                return None
            said = f"{error.status} {error.reason}: {_message(error.body)}"
            if error.status == 409:
                said += f". Objects of a run of this name are there: `distopt stop {self.name}` removes them"
            raise PlatformError(f"the cluster refused {call.__name__.replace('_', ' ')}: {said}") from error
        except HTTPError as error:
            raise PlatformError(f"the cluster cannot be reached: {error}; does `kubectl get pods` work?") from error


def _place(manifest: Manifest, namespace: str) -> tuple[str, str, str, str]:
    """Returns group, version, namespace and plural name of an object."""
    group, _, version = manifest["apiVersion"].partition("/")
    return group, version, namespace, _PLURALS[manifest["kind"]]


def _name(pod: dict[str, Any]) -> str:
    return str(pod["metadata"]["name"])


def _node(pod: dict[str, Any]) -> int:
    """Returns the number of a pod's node: an Indexed Job's index; or 0 for master or launcher, then the workers."""
    found = {**(pod["metadata"].get("annotations") or {}), **(pod["metadata"].get("labels") or {})}
    index = found.get("batch.kubernetes.io/job-completion-index")  # an annotation, and since 1.28 a label
    if index is None:
        role = found.get(f"{_KUBEFLOW}replica-type") or found.get(f"{_KUBEFLOW}job-role")
        return int(found.get(f"{_KUBEFLOW}replica-index", 0)) + (role == "worker")
    return int(index)


def _hindrance(pod: dict[str, Any]) -> str:
    """Says what keeps a pod from starting, as the scheduler or the kubelet saw it; nothing where it is only early."""
    status = pod.get("status") or {}
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"pod {_name(pod)}: {condition.get('message') or condition.get('reason')}"
    for container in status.get("containerStatuses") or []:
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            return ": ".join(filter(None, [f"pod {_name(pod)}", waiting["reason"], waiting.get("message")]))
    return ""


def _message(body: Any) -> str:
    try:
        return str(json.loads(body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(body)[:300]
