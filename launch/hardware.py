"""What `distopt doctor` says of this machine's network, shared memory, NUMA nodes and GPUs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from distopt.config import RunConfig

from .findings import Finding
from .platforms import load_platform
from .worker import devices, network

SHARED_MEMORY = Path("/dev/shm")
MIN_SHARED_GIB = 0.25  # a container's default is 0.0625
INFINIBAND = Path("/sys/class/infiniband")


def examine_hardware(config: RunConfig | None) -> Iterator[Finding]:
    """Examines this machine; for a run, with the interface and the variables that its workers will have."""
    yield shared_memory()
    yield interface(config)
    yield infiniband()
    environ = {**os.environ, **(config.launch.env if config is not None else {})}
    yield libraries(environ)
    yield numa(config)
    yield from devices_of_workers(config, devices.visible(environ))


def runs_here(config: RunConfig | None) -> bool:
    """Returns whether workers of a run will be on this machine; a cluster has other ones for them."""
    if config is None or load_platform(config.launch.platform).finds_hosts:
        return False
    return not config.launch.hosts or any(map(network.is_here, config.launch.hosts))


def shared_memory(folder: Path = SHARED_MEMORY) -> Finding:
    """Says how large /dev/shm is, through which NCCL, gloo and data loaders of one host pass data."""
    try:
        size_gib = shutil.disk_usage(folder).total / 2**30
    except OSError as error:
        return Finding(str(folder), f"cannot be used: {error.strerror}", "mount a tmpfs there", "warning")
    if size_gib < MIN_SHARED_GIB:
        fix = "`docker run --shm-size=8g`, in a pod an emptyDir with medium Memory"
        return Finding(str(folder), f"{size_gib:.2f} GiB, which NCCL and data loaders soon fill", fix, "warning")
    return Finding(str(folder), f"{size_gib:.1f} GiB", severity="ok")


def interface(config: RunConfig | None) -> Finding:
    """Says over which interface workers of several hosts talk from here."""
    addresses = network.interfaces()
    listed = ", ".join(f"{name} {address}" for name, address in addresses.items())
    wanted = None if config is None else config.launch.interface
    if wanted is not None and wanted not in addresses:
        return Finding(
            "interface",
            f"{wanted} is none of this machine's: {listed}",
            "set launch.interface to one that all hosts have",
            "failure" if runs_here(config) else "warning",
        )
    hosts = [] if config is None else config.launch.hosts
    chosen = wanted or (network.interface_among(hosts) if hosts else None)
    if chosen is not None:
        return Finding("interface", f"{chosen} {addresses[chosen]}, for gloo, NCCL and Horovod", severity="ok")
    return Finding("interface", f"{listed}; the one with a host's address in launch.hosts is used", severity="ok")


def infiniband(folder: Path = INFINIBAND) -> Finding:
    """Says which InfiniBand or RoCE ports are active, over which NCCL goes by itself."""
    ports = sorted(folder.glob("*/ports/*/state"))
    active = [f"{path.parts[-4]} port {path.parts[-2]}" for path in ports if "ACTIVE" in path.read_text()]
    if ports and not active:
        fix = "`ibstat` shows why; NCCL_IB_DISABLE=1 in launch.env has NCCL not try"
        return Finding("InfiniBand", f"none of {len(ports)} ports is active", fix, "warning")
    return Finding("InfiniBand", ", ".join(active) or "none; NCCL and gloo use sockets", severity="ok")


def libraries(environ: Mapping[str, str]) -> Finding:
    """Says which variables of NCCL, gloo and Horovod workers will have, and warns of those that cost speed or hang."""
    subject = "NCCL and gloo"
    seen = {name: value for name, value in sorted(environ.items()) if name.startswith(network.LIBRARY_PREFIXES)}
    shown = ", ".join(f"{name}={value}" for name, value in {**network.LIBRARY_DEFAULTS, **seen}.items())
    if environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == "0":
        fix = "unset TORCH_NCCL_ASYNC_ERROR_HANDLING"
        return Finding(subject, f"{shown}: a collective that has failed is waited for without end", fix, "warning")
    slow = [name for name in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE") if environ.get(name) == "1"]
    if slow:
        return Finding(subject, f"{shown}: NCCL takes a slower way", f"unset {' and '.join(slow)}", "warning")
    return Finding(subject, f"{shown}; the rest is as the libraries have it", severity="ok")


def numa(config: RunConfig | None = None, sys: Path = devices.SYS) -> Finding:
    """Says how many NUMA nodes there are, and the cores of each."""
    nodes = devices.numa_nodes(sys)
    if len(nodes) < 2:
        return Finding("NUMA", "one node; workers are not bound", severity="ok")
    shown = ", ".join(f"node {number} with {len(cpus)} cores" for number, cpus in nodes.items())
    if config is not None and config.launch.binding == "none":
        return Finding("NUMA", f"{shown}; workers are not bound, as launch.binding says", severity="ok")
    return Finding("NUMA", f"{shown}; each worker is bound to the cores beside its GPU, or its share", severity="ok")


def devices_of_workers(
    config: RunConfig | None, seen: list[devices.Device], sys: Path = devices.SYS
) -> Iterator[Finding]:
    """Says which device each worker gets, instances of MIG counted each, and where it is; nothing without a GPU."""
    if not seen:
        return
    described = [
        f"{number}: {device.uuid}{'' if (node := devices.node_of(device, sys)) is None else f' on node {node}'}"
        for number, device in enumerate(seen)
    ]
    kind = "instances of MIG, averaged over gloo" if seen[0].is_instance else "GPUs"
    message = f"{len(seen)} {kind}: {'; '.join(described)}"
    workers = config.launch.workers if config is not None and runs_here(config) else 1
    if workers > len(seen):
        fix = f"set launch.workers={len(seen)}"
        yield Finding("devices", f"{message}; {workers} workers will train on the CPU", fix, "warning")
        return
    yield Finding("devices", message, severity="ok")
