"""Runs the pods of a Kubernetes Indexed Job as containers on a network of their own, as a kubelet would.

Read from the manifest: command, args with `$(NAME)` filled in, env, volumes, security context, memory. Kubernetes adds
JOB_COMPLETION_INDEX, the host name NAME-INDEX and the Service's name for each pod; so does this.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.docker.engine import Engine

SWITCH = "distopt-switch"
SUBNET = "10.78.0"


@contextmanager
def network(num_hosts: int) -> Iterator[list[str]]:
    """Makes network namespaces joined by a bridge that is in a namespace too, so that nothing else is reached.

    Returns their names; host `i` has the address `SUBNET.(i + 1)` on its interface eth0.
    """
    names = [f"distopt-pod{index}" for index in range(num_hosts)]

    def ip(*args: str) -> None:
        subprocess.run(["ip", *args], check=True, capture_output=True, timeout=20)

    made = []
    try:
        for name in (SWITCH, *names):
            ip("netns", "add", name)
            made.append(name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", SWITCH, "link", "add", "bridge", "type", "bridge")
        ip("-n", SWITCH, "link", "set", "bridge", "up")
        for index, name in enumerate(names):
            ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", f"port{index}", "netns", SWITCH)
            ip("-n", SWITCH, "link", "set", f"port{index}", "master", "bridge", "up")
            ip("-n", name, "addr", "add", f"{SUBNET}.{index + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        yield names
    finally:
        for name in reversed(made):
            ip("netns", "delete", name)


def podman_run(
    engine: Engine, objects: Sequence[Mapping[str, Any]], index: int, hosts: list[str], volumes: Mapping[str, Path]
) -> list[str]:
    """Returns the command that runs the pod of one completion index.

    Args:
        engine: where containers are kept.
        objects: the run's manifests, that of kind Job last.
        index: its completion index, which is also the host it runs on.
        hosts: names of the network namespaces.
        volumes: the folder that stands for each volume of the manifest that is not an emptyDir.
    """
    job = objects[-1]
    config_maps = {one["metadata"]["name"]: one["data"] for one in objects if one["kind"] == "ConfigMap"}
    name = job["metadata"]["name"]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    service = pod.get("subdomain", name)
    env = {entry["name"]: _value(entry, index, config_maps) for entry in container.get("env", ())}
    env["JOB_COMPLETION_INDEX"] = str(index)
    command = ["podman", "run", "--name", f"{name}-{index}", "--hostname", f"{name}-{index}", "--pull=never"]
    command += [f"--network=ns:/run/netns/{hosts[index]}", *_security(pod, container)]
    for number in range(len(hosts)):
        command += [f"--add-host={name}-{number}.{service}:{SUBNET}.{number + 1}"]
        command += [f"--add-host={name}-{number}:{SUBNET}.{number + 1}"] if number == index else []
    command += [f"--env={key}={value}" for key, value in env.items()]
    command += _mounts(pod, container, volumes)
    args = [_fill(arg, env) for arg in [*container.get("command", ()), *container.get("args", ())]]
    if container.get("command"):
        command += ["--entrypoint="]
    if "workingDir" in container:
        command += [f"--workdir={container['workingDir']}"]
    return [*command, container["image"], *args]


def _value(entry: Mapping[str, Any], index: int, config_maps: Mapping[str, Mapping[str, str]]) -> str:
    if "value" in entry:
        return str(entry["value"])
    if reference := entry["valueFrom"].get("configMapKeyRef"):
        return config_maps[reference["name"]][reference["key"]]
    path = entry["valueFrom"]["fieldRef"]["fieldPath"]
    if "job-completion-index" in path:
        return str(index)
    return {"status.podIP": f"{SUBNET}.{index + 1}"}[path]


def _fill(arg: str, env: Mapping[str, str]) -> str:
    """Fills `$(NAME)` in as Kubernetes does: unknown names stay, `$$(NAME)` is the text `$(NAME)`."""
    return re.sub(r"\$(\$\([A-Za-z_]\w*\))|\$\(([A-Za-z_]\w*)\)", lambda m: m[1] or env.get(m[2], m[0]), arg)


def _security(pod: Mapping[str, Any], container: Mapping[str, Any]) -> list[str]:
    context = {**pod.get("securityContext", {}), **container.get("securityContext", {})}
    flags = []
    if "runAsUser" in context:
        flags += [f"--user={context['runAsUser']}:{context.get('runAsGroup', context['runAsUser'])}"]
    if context.get("readOnlyRootFilesystem"):
        flags += ["--read-only", "--read-only-tmpfs=false"]
    if context.get("allowPrivilegeEscalation") is False:
        flags += ["--security-opt=no-new-privileges"]
    for capability in context.get("capabilities", {}).get("drop", ()):
        flags += [f"--cap-drop={capability}"]
    return flags


def _mounts(pod: Mapping[str, Any], container: Mapping[str, Any], volumes: Mapping[str, Path]) -> list[str]:
    kinds = {volume["name"]: volume for volume in pod.get("volumes", ())}
    flags = []
    for mount in container.get("volumeMounts", ()):
        name, target = mount["name"], mount["mountPath"]
        mode = "ro" if mount.get("readOnly") or "configMap" in kinds[name] else "rw"
        if "emptyDir" in kinds[name]:
            flags += [f"--tmpfs={target}:rw,mode=1777"]
        else:
            source = volumes[name] / mount.get("subPath", "")
            flags += [f"--volume={source}:{target}:{mode}"]
    return flags
