"""What the API server would refuse of a pod and what would be lost with it, after a user's values are merged in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from posixpath import normpath
from typing import Any

from distopt.config import RunConfig
from distopt.config.paths import is_url
from distopt.launchers import CONFIG_VARIABLE

from ...findings import Finding
from .pods import Manifest, amount, container_name, plain_env, pod_template, resources

POD = "launch.kubernetes.pod"

# Sources of a volume whose files end with the pod, or that cannot be written to. Those that are not named here (NFS,
# CSI, a cloud's disk) are kept, so that one which is new in Kubernetes is not refused.
_NOT_KEPT = {"configMap", "downwardAPI", "emptyDir", "ephemeral", "gitRepo", "image", "projected", "secret"}


def check_pod(config: RunConfig) -> Iterator[Finding]:
    """Yields what is wrong with the pod, and the folders of the run that would be lost with it."""
    nested = sorted({"apiVersion", "kind", "metadata", "spec", "template"} & config.launch.kubernetes.pod.keys())
    if nested:
        yield Finding(POD, f"found {nested[0]}, which is no field of a pod's spec", "write the fields of the spec here")
        return

    name = container_name(config)
    spec = pod_template(config, [], container=name)["spec"]
    problems = [*_unnamed(config, spec)] or [*_refused(config, spec, name)]
    yield from problems or _check_folders(config, spec, name)


def check_env(config: RunConfig) -> Iterator[Finding]:
    """Yields variables that would stand twice in a container, of which Kubernetes takes the last."""
    rendered = plain_env(config)
    for name in config.launch.kubernetes.secrets:
        if name in rendered or name == CONFIG_VARIABLE:
            setter = "launch.env" if name in config.launch.env else "distopt"
            yield Finding(f"launch.kubernetes.secrets.{name}", f"{setter} sets {name}, too", "remove one of the two")
    if CONFIG_VARIABLE in config.launch.env:
        yield Finding(f"launch.env.{CONFIG_VARIABLE}", "distopt sets it to the configuration of the run", "remove it")


# Kubernetes lets pods request less of these than their limits, and gives what is left to others.
_SHARED = {"cpu", "memory", "ephemeral-storage"}


def check_resources(config: RunConfig) -> Iterator[Finding]:
    """Yields requests above their limits, and numbers of devices that are not whole or not those of their limits."""
    kubernetes = config.launch.kubernetes
    of_pod = resources(config)
    limits = of_pod["limits"]
    for name, requested in {**limits, **of_pod["requests"]}.items():
        section = next((key for key in ("requests", "limits") if name in getattr(kubernetes, key)), "resources")
        key = f"launch.kubernetes.{section}.{name}"
        limit = limits.get(name)
        if name in _SHARED:
            if limit is not None and amount(requested) > amount(limit):
                is_key = name in ("cpu", "memory") and name not in kubernetes.limits
                raised = f"launch.kubernetes.{'' if is_key else 'limits.'}{name}"
                message = f"{requested} are requested, more than the limit of {limit}"
                yield Finding(key, message, f"request less, or set {raised} to {requested}")
        elif limit is None or amount(requested) != amount(limit):
            message = f"{requested} are requested with a limit of {limit or 'none'}, but the two must be equal"
            yield Finding(key, message, "set launch.kubernetes.resources alone, or gpus")
        elif amount(requested).denominator != 1:
            yield Finding(key, f"found {requested}, but a pod gets whole ones", "set a whole number")


def _unnamed(config: RunConfig, spec: Manifest) -> Iterator[Finding]:
    """Yields lists in which Kubernetes, and distopt when it merges, would not tell items apart."""
    for field in ("volumes", "containers", "initContainers"):
        is_key = field == "initContainers" and bool(config.launch.kubernetes.init_containers)
        subject = "launch.kubernetes.init_containers" if is_key else POD
        yield from _check_items(subject, field, spec.get(field, []), "name")
        for container in _mappings(spec.get(field)) if field != "volumes" else ():
            yield from _check_items(subject, f"{field}.env", container.get("env", []), "name", may_repeat=True)
            yield from _check_items(subject, f"{field}.volumeMounts", container.get("volumeMounts", []), "mountPath")


def _check_items(subject: str, field: str, items: Any, key: str, may_repeat: bool = False) -> Iterator[Finding]:
    if not isinstance(items, list):
        yield Finding(subject, f"{field} is no list", f"write a list of items with a {key} each")
        return

    names = [item.get(key) if isinstance(item, dict) else None for item in items]
    unnamed = [name for name in names if not isinstance(name, str) or not name]
    if unnamed:
        yield Finding(subject, f"an item of {field} has no {key}", f"write {key}: and a string; items are merged by it")
    elif len(set(names)) < len(names) and not may_repeat:
        repeated = next(name for name in names if names.count(name) > 1)
        yield Finding(subject, f"{field} has two items of the {key} {repeated}", f"give each a {key} of its own")


def _mappings(items: Any) -> list[Manifest]:
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def _refused(config: RunConfig, spec: Manifest, worker: str) -> Iterator[Finding]:
    """Yields what the API server refuses in a pod whose items have names."""
    containers = [*spec.get("containers", []), *spec.get("initContainers", [])]
    if worker not in [container["name"] for container in spec.get("containers", [])]:
        yield Finding(POD, f"containers leaves out {worker}, which runs the workers", f"add to the container {worker}")
    if spec.get("restartPolicy") != "Never":
        message = f"found restartPolicy {spec.get('restartPolicy')}, but the run's own restarts need Never"
        yield Finding(POD, message, "remove it; launch.max_restarts is how often pods are started again")

    # A TrainJob only adds to the containers and volumes of its runtime.
    if config.launch.kubernetes.kind == "trainjob":
        return
    volumes = [volume["name"] for volume in spec.get("volumes", [])]
    for container in containers:
        if not container.get("image"):
            hint = f"the workers' container is {worker} in a {config.launch.kubernetes.kind}"
            yield Finding(POD, f"the container {container['name']} has no image", f"give it one; {hint}")
        for mount in container.get("volumeMounts", []):
            if mount.get("name") not in volumes:
                missing = f"{container['name']} mounts {mount['mountPath']} from a volume that is not there"
                yield Finding(POD, missing, f"add it to volumes, found {', '.join(volumes) or 'none'}")


def _check_folders(config: RunConfig, spec: Manifest, worker: str) -> Iterator[Finding]:
    """Yields the folders that workers write to but that are not kept: the deepest mount above each decides."""
    container = next(one for one in spec["containers"] if one["name"] == worker)
    kept = {volume["name"]: _is_kept(volume) for volume in spec.get("volumes", [])}
    is_writable = {
        _normal(mount["mountPath"]): not mount.get("readOnly") and kept.get(str(mount.get("name")), True)
        for mount in container.get("volumeMounts", [])
    }

    folders = {"run_dir": str(config.run_dir)}
    if config.checkpoint.directory is not None:
        folders["checkpoint.directory"] = str(config.checkpoint.directory).removeprefix("file://")
    for key, folder in folders.items():
        above = [path for path in is_writable if _normal(folder).is_relative_to(path)]
        if is_url(folder) or (above and is_writable[max(above, key=lambda path: len(path.parts))]):
            continue
        yield Finding(
            key,
            f"{folder} lies on no writable volume that outlives the pods, so checkpoints would be lost",
            f"name a claim in launch.kubernetes.volumes, and a {key} below its path",
        )


def _normal(path: str) -> PurePosixPath:
    return PurePosixPath(re.sub("^//+", "/", normpath(path)))  # two slashes at the front would stay


def _is_kept(volume: Manifest) -> bool:
    """Returns whether what is written to a volume is there after its pods have ended."""
    sources = volume.keys() - {"name"}
    is_read_only = any(isinstance(volume[source], dict) and volume[source].get("readOnly") for source in sources)
    return bool(sources) and not sources & _NOT_KEPT and not is_read_only
