"""The pods of a run: what they may do, what they have, and what is merged into them."""

from __future__ import annotations

import ipaddress
import re
from fractions import Fraction
from typing import Any

from distopt.config import RunConfig
from distopt.config.kubernetes import VolumeConfig
from distopt.config.values import DNS_LABEL
from distopt.launchers import CONFIG_FILE, CONFIG_VARIABLE, ECHO_VARIABLE

from ...plan import env_of_workers
from ..torchrun import FRESH_STORE

Manifest = dict[str, Any]

LABEL = "distopt.run"
HOME = "/tmp"  # the only folder besides volumes that a worker can write to
SHARED_MEMORY = "/dev/shm"

_RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def pod_template(
    config: RunConfig, command: list[str], container: str = "worker", subdomain: str | None = None, gpus: bool = True
) -> Manifest:
    """Returns a pod template whose processes have no privileges and can write only to volumes, /tmp and /dev/shm.

    It fulfils the `restricted` Pod Security Standard. Torch's data loaders and NCCL need /dev/shm, which is 64 MiB in a
    container unless it is a volume.
    """
    kubernetes = config.launch.kubernetes
    worker = _container(config, command, gpus)
    spec: Manifest = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": round(config.launch.grace_s) + 15,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": kubernetes.user,
            "runAsGroup": kubernetes.user,
            "fsGroup": kubernetes.user,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [{"name": container, **worker}],
        "volumes": _volumes(config),
    }

    inherited = {key: worker[key] for key in ("image", "env", "resources", "securityContext", "volumeMounts")}
    optional = {
        "subdomain": subdomain,
        "serviceAccountName": kubernetes.service_account,
        "nodeSelector": dict(kubernetes.node_selector),
        "imagePullSecrets": [{"name": name} for name in kubernetes.image_pull_secrets],
        "initContainers": [merged(inherited, wanted) for wanted in kubernetes.init_containers],
        "tolerations": kubernetes.tolerations,
        "affinity": kubernetes.affinity,
        "topologySpreadConstraints": [{"labelSelector": selector(config), **one} for one in kubernetes.topology_spread],
        "priorityClassName": kubernetes.priority_class,
        "hostNetwork": kubernetes.host_network,
        "dnsPolicy": "ClusterFirstWithHostNet" if kubernetes.host_network else None,
    }
    spec |= {key: value for key, value in optional.items() if value}
    return {"metadata": pod_metadata(config), "spec": merged(spec, kubernetes.pod)}


def container_name(config: RunConfig) -> str:
    """Returns what the container of the workers is called, where an operator finds it by its name."""
    return {"pytorchjob": "pytorch", "trainjob": "node"}.get(config.launch.kubernetes.kind, "worker")


def selector(config: RunConfig) -> Manifest:
    """Returns what selects the pods of a run; a TrainJob's have the label of the JobSet that its operator makes."""
    if config.launch.kubernetes.kind == "trainjob":
        return {"matchLabels": {"jobset.sigs.k8s.io/jobset-name": config.name}}
    return {"matchLabels": {LABEL: config.name}}


def pod_metadata(config: RunConfig) -> Manifest:
    """Returns labels and annotations of the pods."""
    kubernetes = config.launch.kubernetes
    annotations = {"annotations": dict(kubernetes.annotations)} if kubernetes.annotations else {}
    return {"labels": {**kubernetes.labels, LABEL: config.name}, **annotations}


def literal(value: str) -> str:
    """Keeps Kubernetes from expanding `$(NAME)`; it takes two dollars for one, wherever they stand."""
    return value.replace("$", "$$")


def plain_env(config: RunConfig) -> dict[str, str]:
    """Returns the variables of the pods whose values are no references."""
    threads = {"OMP_NUM_THREADS": str(_threads(config))}
    return env_of_workers(config, **FRESH_STORE, **{ECHO_VARIABLE: "1"}, **threads, HOME=HOME)


def env_entries(config: RunConfig) -> list[Manifest]:
    """Returns the variables of the pods; the configuration and secrets are references."""
    values = plain_env(config)
    secrets = config.launch.kubernetes.secrets
    return [
        *({"name": name, "value": literal(value)} for name, value in values.items()),
        {"name": CONFIG_VARIABLE, "valueFrom": {"configMapKeyRef": {"name": config.name, "key": CONFIG_FILE}}},
        *(
            {"name": name, "valueFrom": {"secretKeyRef": {"name": secret.secret, "key": secret.key}}}
            for name, secret in secrets.items()
        ),
    ]


def resources(config: RunConfig, gpus: bool = True) -> Manifest:
    """Returns requests and limits of a pod: equal, but for what the configuration sets apart."""
    kubernetes = config.launch.kubernetes
    amounts: dict[str, str] = {"cpu": kubernetes.cpu, "memory": kubernetes.memory}
    if gpus:
        amounts |= {kubernetes.gpu_resource: str(kubernetes.gpus)} if kubernetes.gpus else {}
        amounts |= kubernetes.resources
    limits = {name: amount for name, amount in {**amounts, **kubernetes.limits}.items() if amount is not None}
    requests = {**amounts, **kubernetes.requests}
    if not gpus:  # devices, which have a domain in their name, are for those who compute
        requests = {name: one for name, one in requests.items() if "/" not in name}
        limits = {name: one for name, one in limits.items() if "/" not in name}
    return {"requests": requests, "limits": limits}


def _threads(config: RunConfig) -> int:
    """Returns the threads of each worker: a node may have many more cores than its pod may use."""
    of_pod = resources(config)
    cpus = amount(of_pod["limits"].get("cpu", of_pod["requests"]["cpu"]))
    return max(1, int(cpus / config.launch.workers))


_UNITS = {
    "m": Fraction(1, 1000),
    "k": Fraction(1000),
    **{unit: Fraction(1000) ** power for power, unit in enumerate("MGTPE", start=2)},
    **{f"{unit}i": Fraction(1024) ** power for power, unit in enumerate("KMGTPE", start=1)},
}


def amount(quantity: str) -> Fraction:
    """Returns the number that a quantity of Kubernetes stands for.

    Example:
        >>> amount("500m"), amount("1e3"), amount("2Ki")
        (Fraction(1, 2), Fraction(1000, 1), Fraction(2048, 1))
    """
    number = quantity.rstrip("mkKMGTPEi")
    unit = quantity[len(number) :]
    return Fraction(number) * (_UNITS[unit] if unit else 1)


# Volumes. One claim may be mounted at several paths.


_RESERVED = re.compile(r"tmp|shm|volume-\d+")


def _volume_name(volume: VolumeConfig, index: int) -> str:
    # A claim's name may have dots and 253 characters, the name of a volume neither.
    is_label = volume.claim is not None and re.fullmatch(DNS_LABEL, volume.claim)
    if volume.claim is None or not is_label or _RESERVED.fullmatch(volume.claim):
        return f"volume-{index}"
    return volume.claim


def _volumes(config: RunConfig) -> list[Manifest]:
    volumes = {
        _volume_name(volume, index): _source(volume) for index, volume in enumerate(config.launch.kubernetes.volumes)
    }
    return [
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
        *({"name": name, **source} for name, source in volumes.items()),
    ]


def _source(volume: VolumeConfig) -> Manifest:
    if volume.claim is not None:
        return {"persistentVolumeClaim": {"claimName": volume.claim}}
    if volume.config_map is not None:
        return {"configMap": {"name": volume.config_map}}
    if volume.empty_dir is not None:
        return {"emptyDir": {"sizeLimit": volume.empty_dir}}
    if volume.host_path is not None:
        return {"hostPath": {"path": volume.host_path}}

    claim: Manifest = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": volume.ephemeral}}}
    if volume.storage_class is not None:
        claim["storageClassName"] = volume.storage_class
    return {"ephemeral": {"volumeClaimTemplate": {"spec": claim}}}


def _mounts(config: RunConfig) -> list[Manifest]:
    wanted = {volume.path for volume in config.launch.kubernetes.volumes}
    built_in = [{"name": "tmp", "mountPath": HOME}, {"name": "shm", "mountPath": SHARED_MEMORY}]
    return [
        *(mount for mount in built_in if mount["mountPath"] not in wanted),
        *(
            {
                "name": _volume_name(volume, index),
                "mountPath": volume.path,
                "readOnly": volume.read_only,
                **({"subPath": volume.sub_path} if volume.sub_path is not None else {}),
            }
            for index, volume in enumerate(config.launch.kubernetes.volumes)
        ),
    ]


# Containers.


def _health(config: RunConfig) -> Manifest:
    """Returns the probes of a worker that serves, and its port if it serves beyond the pod's loopback interface."""
    serve = config.serve
    kind = config.launch.kubernetes.kind
    # A worker of an MPIJob is an sshd until the launcher, which waits until workers are ready, starts ranks in it.
    if serve.port is None or kind == "mpijob":
        return {}

    # A kubelet's own HTTP probe comes from outside of the pod, so liveness is asked by a command within.
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(serve.host, serve.host)
    python = literal(config.launch.kubernetes.python)
    command = [python, "-m", "distopt.launch.worker.health_probe", address, str(serve.port)]
    timing = {"periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 3}
    probes: Manifest = {"livenessProbe": {"exec": {"command": command}, **timing}}

    if not ipaddress.ip_address(serve.host).is_loopback:
        probes["ports"] = [{"name": "serve", "containerPort": serve.port}]
        # Pods of a PyTorchJob find each other by a Service that names only ready pods, and are ready once they met.
        if kind != "pytorchjob":
            probes["readinessProbe"] = {"httpGet": {"path": "/readyz", "port": serve.port}, **timing}
    return probes


def _container(config: RunConfig, command: list[str], gpus: bool) -> Manifest:
    """Returns what a pod runs; all but its name."""
    return {
        "image": config.launch.kubernetes.image,
        "command": command,
        # Supervisors write why their rank failed into the pod's status; where none could, the end of the log is there.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "env": env_entries(config),
        "resources": resources(config, gpus),
        **_health(config),
        "securityContext": dict(_RESTRICTED),
        "volumeMounts": _mounts(config),
    }


# What a user adds. Items of lists are matched by what Kubernetes matches them by in a strategic merge patch.

_LIST_KEYS = {"volumeMounts": "mountPath", "ports": "containerPort"}

# Kubernetes takes one of each group. A volume has one field besides its name, its source.
_ALTERNATIVES = (
    {"value", "valueFrom"},
    {"configMapKeyRef", "secretKeyRef", "fieldRef", "resourceFieldRef", "fileKeyRef"},
    {"exec", "httpGet", "tcpSocket", "grpc"},
)


def merged(base: Any, patch: Any, field: str = "") -> Any:
    """Returns `base` with a user's values in it: mappings and lists of named things are merged, null removes.

    Args:
        base: What distopt renders.
        patch: The user's.
        field: The field's name, by which the items of a list are matched.

    Example:
        >>> merged({"a": 1, "env": [{"name": "X", "value": "1"}]}, {"a": None, "env": [{"name": "Y", "value": "2"}]})
        {'env': [{'name': 'X', 'value': '1'}, {'name': 'Y', 'value': '2'}]}
    """
    if isinstance(base, dict) and isinstance(patch, dict):
        base = _without_alternatives(base, patch)
        result = {**base, **{key: merged(base.get(key), value, key) for key, value in patch.items()}}
        return {key: value for key, value in result.items() if patch.get(key, "") is not None}

    key = _LIST_KEYS.get(field, "name")
    if isinstance(base, list) and isinstance(patch, list) and all(_has(item, key) for item in [*base, *patch]):
        items = {item[key]: item for item in base}
        for item in patch:
            earlier = items.get(item[key], {})
            has_other_source = field == "volumes" and item.keys() - earlier.keys()
            items[item[key]] = merged({"name": item["name"]} if has_other_source else earlier, item)
        return list(items.values())
    return patch


def _without_alternatives(base: Manifest, patch: Manifest) -> Manifest:
    """Returns `base` without that which stands beside none of a user's values, such as `value` beside `valueFrom`."""
    dropped = {key for group in _ALTERNATIVES if group & patch.keys() for key in group - patch.keys()}
    return {key: value for key, value in base.items() if key not in dropped}


def _has(item: Any, key: str) -> bool:
    return isinstance(item, dict) and isinstance(item.get(key), str | int)
