"""A run on Kubernetes, through its API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from distopt.config import RunConfig

from .jobs import State
from .manifests import LABEL, Manifest

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

TIMEOUT_S = 30
_DONE = {"Complete", "Completed", "Succeeded"}
_PLURALS = {
    "Job": "jobs",
    "JobSet": "jobsets",
    "TrainJob": "trainjobs",
    "PyTorchJob": "pytorchjobs",
    "MPIJob": "mpijobs",
}


class ClusterError(RuntimeError):
    """The cluster refused something; the message has its own words."""


class Cluster:
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

            self._api = kubeconfig.new_client_from_config(context=self.context)
        return self._api

    def submit(self) -> str:
        """Creates the objects, or none: what has been created is deleted when one is refused."""
        made: list[Manifest] = []
        for manifest in self.objects:
            try:
                self._call("POST", _path(manifest, self.namespace), manifest)
            except ClusterError:
                for undone in reversed(made):
                    self._delete(undone)
                raise
            made.append(manifest)
        main = self.objects[-1]
        return f"{main['kind']} {self.namespace}/{self.name}"

    def state(self) -> State:
        """Returns what the run's object says of itself, and of the pod that died first."""
        main = self.objects[-1]
        found = self._call("GET", f"{_path(main, self.namespace)}/{self.name}", missing_ok=True)
        if found is None:
            return State("unknown", f"there is no {main['kind']} {self.name} in namespace {self.namespace}")
        status = found.get("status") or {}
        true = {one["type"]: one for one in status.get("conditions") or [] if one.get("status") == "True"}
        if _DONE & set(true):
            return State("done")
        if "Failed" in true:
            said = true["Failed"].get("message") or true["Failed"].get("reason") or ""
            return State("failed", "; ".join(filter(None, [said, self._first_death()])))
        if found["metadata"].get("deletionTimestamp"):
            return State("stopped", "it is being deleted")
        running = (
            status.get("active") or "Running" in true or any(pod_phase == "Running" for pod_phase in self._phases())
        )
        return State("running" if running and "Suspended" not in true else "pending")

    def logs(self, rank: int) -> str:
        """Returns the output of the pod of the node `rank`, in the order of the pods' names."""
        pods = sorted(self._pods(), key=lambda pod: (_index(pod), str(pod["metadata"]["name"])))
        if rank >= len(pods):
            return ""
        return self._text(f"/api/v1/namespaces/{self.namespace}/pods/{pods[rank]['metadata']['name']}/log")

    def stop(self) -> None:
        """Deletes the objects; pods get SIGTERM and their grace time."""
        for manifest in reversed(self.objects):
            self._delete(manifest)

    def _delete(self, manifest: Manifest) -> None:
        options = {"propagationPolicy": "Background"}
        path = f"{_path(manifest, self.namespace)}/{manifest['metadata']['name']}"
        self._call("DELETE", path, options, missing_ok=True)

    def _pods(self) -> list[dict[str, Any]]:
        found = self._call(
            "GET", f"/api/v1/namespaces/{self.namespace}/pods", query={"labelSelector": self._selector()}
        )
        return list((found or {}).get("items") or [])

    def _selector(self) -> str:
        own = self.objects[-1]["kind"] != "TrainJob"  # whose pods carry the labels of its JobSet
        return f"{LABEL}={self.name}" if own else f"jobset.sigs.k8s.io/jobset-name={self.name}"

    def _phases(self) -> Iterator[str]:
        for pod in self._pods():
            yield (pod.get("status") or {}).get("phase", "")

    def _first_death(self) -> str:
        """Names the container that ended first, and why, as the kubelet saw it."""
        deaths = []
        for pod in self._pods():
            for container in (pod.get("status") or {}).get("containerStatuses") or []:
                for state in (container.get("state") or {}, container.get("lastState") or {}):
                    ended = state.get("terminated")
                    if ended and ended.get("exitCode"):
                        deaths.append((ended.get("finishedAt") or "", pod["metadata"]["name"], ended))
        if not deaths:
            return ""
        _, name, ended = min(deaths, key=lambda death: death[:2])
        why = "out of memory (OOMKilled)" if ended.get("reason") == "OOMKilled" else ended.get("reason") or "an error"
        return f"pod {name} died first: {why}, exit status {ended['exitCode']}"

    def _call(
        self, method: str, path: str, body: Any = None, *, query: dict[str, str] | None = None, missing_ok: bool = False
    ) -> dict[str, Any] | None:
        import json

        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            answer = self.api.call_api(
                path, method, query_params=list((query or {}).items()), body=body, auth_settings=["BearerToken"],
                header_params={"Accept": "application/json", "Content-Type": "application/json"},
                _preload_content=False, _return_http_data_only=True, _request_timeout=TIMEOUT_S,
            )  # fmt: skip
        except ApiException as error:
            if missing_ok and error.status == 404:
                return None
            raise ClusterError(f"{method} {path}: {error.status} {error.reason}: {_message(error.body)}") from error
        except HTTPError as error:
            raise ClusterError(f"the cluster cannot be reached: {error}; does `kubectl get pods` work?") from error
        found: dict[str, Any] = json.loads(answer.data or b"{}")
        return found

    def _text(self, path: str) -> str:
        from kubernetes.client import ApiException

        try:
            answer = self.api.call_api(
                path, "GET", auth_settings=["BearerToken"], _preload_content=False, _return_http_data_only=True,
                _request_timeout=TIMEOUT_S,
            )  # fmt: skip
        except ApiException as error:
            if error.status in (400, 404):  # the container has not started yet
                return ""
            raise ClusterError(f"GET {path}: {error.status} {error.reason}") from error
        return bytes(answer.data).decode("utf-8", "replace")


def _path(manifest: Manifest, namespace: str) -> str:
    version = manifest["apiVersion"]
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    plural = _PLURALS.get(manifest["kind"]) or manifest["kind"].lower() + "s"
    return f"{root}/namespaces/{namespace}/{plural}"


def _index(pod: dict[str, Any]) -> int:
    labels = pod["metadata"].get("labels") or {}
    return int(labels.get("batch.kubernetes.io/job-completion-index", 0))


def _message(body: Any) -> str:
    import json

    try:
        return str(json.loads(body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(body)[:300]
