"""A TrainJob: the fields by which the releases of Kubeflow's trainer let it describe pods that its runtime owns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from distopt.config import RunConfig
from distopt.config.kubernetes import KubernetesConfig

from ...findings import Finding
from .pods import Manifest, container_name, pod_metadata, pod_template

NODE = "node"  # of the runtime's replicated job
MANAGER = "distopt"

# The fields of a pod and of a container that each release takes: `PodSpecOverride` of 2.0, `PodTemplateOverride` of
# 2.1, `RuntimePatch` since 2.2. The trainer's own fields have image, command, variables and resources.
_SHARED = frozenset({"containers", "nodeSelector", "serviceAccountName", "tolerations", "volumes"})
_POD_FIELDS: Mapping[str, frozenset[str]] = {
    "2.0": _SHARED,
    "2.1": _SHARED | {"affinity", "imagePullSecrets"},
    "2.2": _SHARED | {"affinity", "imagePullSecrets", "securityContext"},
    "2.3": _SHARED | {"affinity", "imagePullSecrets", "securityContext", "terminationGracePeriodSeconds"},
}
_CONTAINER_FIELDS = {
    "2.0": ("name", "volumeMounts"),
    "2.1": ("name", "volumeMounts"),
    "2.2": ("name", "volumeMounts", "securityContext"),
    "2.3": ("name", "volumeMounts", "securityContext"),
}
_HAS_DEADLINE = ("2.2", "2.3")
_HAS_METADATA = ("2.1", "2.2", "2.3")


def trainjob_spec(config: RunConfig, trainer: Manifest, command: list[str]) -> Manifest:
    """Returns the spec of a TrainJob.

    Args:
        config: The run.
        trainer: The trainer's fields.
        command: What a pod runs.
    """
    kubernetes = config.launch.kubernetes
    spec: Manifest = {"runtimeRef": {"name": kubernetes.runtime}, "trainer": trainer}
    version = kubernetes.trainer_version
    if version is None:
        return spec

    if kubernetes.time_limit_s and version in _HAS_DEADLINE:
        spec["activeDeadlineSeconds"] = kubernetes.time_limit_s
    return {**spec, **_patch(version, _pod_of(config, version, command), pod_metadata(config))}


def _pod_of(config: RunConfig, version: str, command: list[str]) -> Manifest:
    """Returns what a pod's spec may have in a release."""
    pod = pod_template(config, command, container=container_name(config))["spec"]
    result = {key: value for key, value in pod.items() if key in _POD_FIELDS[version]}
    result["containers"] = [
        {key: container[key] for key in _CONTAINER_FIELDS[version] if key in container}
        for container in pod["containers"]
    ]
    return result


def _patch(version: str, pod: Manifest, metadata: Manifest) -> Manifest:
    target = [{"name": NODE}]
    if version == "2.0":
        return {"podSpecOverrides": [{"targetJobs": target, **pod}]}
    if version == "2.1":
        return {"podTemplateOverrides": [{"targetJobs": target, "metadata": metadata, "spec": pod}]}

    job = {"name": NODE, "template": {"spec": {"template": {"metadata": metadata, "spec": pod}}}}
    template = {"spec": {"replicatedJobs": [job]}}
    return {"runtimePatches": [{"manager": MANAGER, "trainingRuntimeSpec": {"template": template}}]}


def check_trainjob(config: RunConfig) -> Iterator[Finding]:
    """Yields what a TrainJob of the chosen release cannot express."""
    kubernetes = config.launch.kubernetes
    version = kubernetes.trainer_version
    fields = _POD_FIELDS[version] if version is not None else frozenset()
    of_pods = {
        "service_account": "serviceAccountName",
        "node_selector": "nodeSelector",
        "tolerations": "tolerations",
        "affinity": "affinity",
        "image_pull_secrets": "imagePullSecrets",
        "topology_spread": "topologySpreadConstraints",
        "priority_class": "priorityClassName",
        "host_network": "hostNetwork",
        "init_containers": "initContainers",
    }

    refused = [key for key, field in of_pods.items() if getattr(kubernetes, key) and field not in fields]
    if kubernetes.time_limit_s and version not in _HAS_DEADLINE:
        refused.append("time_limit_s")
    if kubernetes.ttl_s is not None:
        refused.append("ttl_s")
    if (kubernetes.labels or kubernetes.annotations) and version not in _HAS_METADATA:
        refused += [key for key in ("labels", "annotations") if getattr(kubernetes, key)]
    if kubernetes.user != KubernetesConfig.model_fields["user"].default and "securityContext" not in fields:
        refused.append("user")
    if set(kubernetes.pod) - fields:
        refused.append("pod")

    later = ", or set launch.kubernetes.trainer_version to a release that has a field for it"
    fix = f"set it there{'' if version == '2.3' else later}"
    release = "any release" if version is None else f"trainer {version}"
    for key in refused:
        message = f"a trainjob of {release} takes it from its ClusterTrainingRuntime"
        yield Finding(f"launch.kubernetes.{key}", message, fix)
    if version is not None:
        yield from _check_containers(config, version)

    # The run serves all the same, only nothing asks it whether it is well.
    if config.serve.port is not None:
        message = f"a trainjob of {release} takes probes from its ClusterTrainingRuntime, if it has any"
        yield Finding("serve.port", message, "set them there", severity="warning")


def _check_containers(config: RunConfig, version: str) -> Iterator[Finding]:
    """Yields what `pod` says of containers for which a release has no field; it would be left out."""
    known = _CONTAINER_FIELDS[version]
    containers = config.launch.kubernetes.pod.get("containers")
    for container in containers if isinstance(containers, list) else []:
        unknown = [str(field) for field in container if field not in known] if isinstance(container, dict) else []
        if unknown:
            yield Finding(
                "launch.kubernetes.pod",
                f"a trainjob of trainer {version} has no field for {', '.join(unknown)} of a container, "
                f"only for {', '.join(known[1:])} (of {NODE}, which runs the workers)",
                "use launch.env and the keys of launch.kubernetes, or set it in the ClusterTrainingRuntime",
            )
