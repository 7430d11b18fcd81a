"""The GPUs of a host as its driver lists them, and the processor cores beside each: what a worker is bound to.

Nothing here opens a GPU: a supervisor that did would take some of its memory. All is read from /proc and /sys. Only
where GPUs are split (MIG) is `nvidia-smi -L` asked, since instances stand nowhere else.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from distopt.launchers import BINDING_VARIABLE, SINGLE_DEVICE_VARIABLE

DRIVER = Path("/proc/driver/nvidia")
SYS = Path("/sys")
SMI_TIMEOUT_S = 30


@dataclass(frozen=True)
class Device:
    """What CUDA takes for one device: a GPU, or an instance of one that is split by MIG.

    Attributes:
        uuid: Its name in `CUDA_VISIBLE_DEVICES`.
        pci: The address of the GPU on the PCI bus; empty where it is not known.
        is_instance: Whether it is an instance of MIG.
    """

    uuid: str
    pci: str
    is_instance: bool = False


def gpus(driver: Path = DRIVER) -> list[Device]:
    """Returns the GPUs in the order of the PCI bus, which is that of nvidia-smi."""
    seen = []
    for folder in sorted(driver.glob("gpus/*")):
        uuid = re.search(r"^GPU UUID:\s+(\S+)", _read(folder / "information"), re.MULTILINE)
        if uuid is not None:
            seen.append(Device(uuid[1], folder.name))
    return seen


def has_instances(driver: Path = DRIVER) -> bool:
    """Returns whether a GPU is split by MIG."""
    return any(driver.glob("capabilities/gpu*/mig/gi*"))


def parse_listing(text: str, whole: list[Device]) -> list[Device]:
    r"""Returns the instances that `nvidia-smi -L` lists, each with the address of its GPU.

    Example:
        >>> text = "GPU 0: A100 (UUID: GPU-1)\n  MIG 1g.5gb Device 0: (UUID: MIG-a)\n"
        >>> parse_listing(text, [Device("GPU-1", "0000:07:00.0")])
        [Device(uuid='MIG-a', pci='0000:07:00.0', is_instance=True)]
    """
    addresses = {device.uuid: device.pci for device in whole}
    pci = ""
    seen = []
    for uuid in re.findall(r"\(UUID: ([^)\s]+)\)", text):
        if uuid.startswith("MIG-"):
            seen.append(Device(uuid, pci, is_instance=True))
        else:
            pci = addresses.get(uuid, "")
    return seen


def list_by_smi() -> str:
    """Returns what `nvidia-smi -L` prints; empty where it cannot be run."""
    try:
        return subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=SMI_TIMEOUT_S, stdin=subprocess.DEVNULL
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def visible(
    environ: Mapping[str, str], driver: Path = DRIVER, listing: Callable[[], str] = list_by_smi
) -> list[Device]:
    """Returns the devices of a process in the order in which CUDA numbers them.

    Args:
        environ: The variables of the process.
        driver: The driver's folder in /proc.
        listing: Returns what `nvidia-smi -L` prints; called only where it is needed.
    """
    whole = gpus(driver)
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    names = None if chosen is None else [name.strip() for name in chosen.split(",")]
    wants_instances = any(name.startswith("MIG-") for name in names or ())
    instances = parse_listing(listing(), whole) if wants_instances or (names is None and has_instances(driver)) else []
    if names is None:
        return instances or whole

    seen = []
    for name in names:
        # A number, or the beginning of a name; CUDA ignores what comes behind one that it does not know.
        if name.isdecimal():
            device = whole[int(name)] if int(name) < len(whole) else None
        else:
            device = next((each for each in [*whole, *instances] if name and each.uuid.startswith(name)), None)
            if device is None and name.startswith("MIG-"):
                device = Device(name, "", is_instance=True)  # nvidia-smi is missing in many containers
        if device is None:
            break
        seen.append(device)
    return seen


def device_env(environ: Mapping[str, str], devices: list[Device], local_rank: int) -> dict[str, str]:
    """Returns the variables by which a worker finds its device.

    CUDA shows a process the first of several instances alone, so each worker is given its own. Whole GPUs are numbered
    as they are here and in nvidia-smi, where CUDA would begin with the fastest.
    """
    if devices and devices[0].is_instance:
        if local_rank >= len(devices):
            return {}
        return {"CUDA_VISIBLE_DEVICES": devices[local_rank].uuid, SINGLE_DEVICE_VARIABLE: "1"}
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if devices and "CUDA_DEVICE_ORDER" not in environ else {}


# NUMA. Memory belongs to the socket of the core that touches it first, and a GPU hangs on one socket: a worker whose
# threads wander between sockets waits for memory and copies over the link between them.


def numa_nodes(sys: Path = SYS) -> dict[int, set[int]]:
    """Returns the processor cores of each NUMA node that has some."""
    lists = {int(path.parent.name[4:]): _read(path) for path in sys.glob("devices/system/node/node[0-9]*/cpulist")}
    nodes = {number: parse_cpus(lists[number]) for number in sorted(lists)}
    return {number: cpus for number, cpus in nodes.items() if cpus}


def parse_cpus(text: str) -> set[int]:
    """Returns the numbers of a list as the kernel writes it.

    Example:
        >>> sorted(parse_cpus("0-2,8,10-11"))
        [0, 1, 2, 8, 10, 11]
    """
    ranges = [element.split("-") for element in text.strip().split(",") if element]
    return {cpu for bounds in ranges for cpu in range(int(bounds[0]), int(bounds[-1]) + 1)}


def node_of(device: Device, sys: Path = SYS) -> int | None:
    """Returns the NUMA node beside which a GPU is; None where the machine does not tell."""
    text = _read(sys / "bus/pci/devices" / device.pci.lower() / "numa_node").strip() if device.pci else ""
    return int(text) if text.isdecimal() else None  # -1 is a machine that does not tell


def cpus_of_worker(
    local_rank: int, local_size: int, device: Device | None, allowed: set[int], sys: Path = SYS
) -> set[int] | None:
    """Returns the cores to which a worker is bound: those beside its GPU, else its share of the NUMA nodes, in order.

    Args:
        local_rank: The worker among those of its host.
        local_size: How many those are.
        device: Its GPU; None without one.
        allowed: The cores that the worker may use; whoever started it may have bound it already.
        sys: The kernel's folder.

    Returns:
        None where there is nothing to choose: one node, or a GPU whose node is not known.
    """
    nodes = {number: cpus & allowed for number, cpus in numa_nodes(sys).items() if cpus & allowed}
    if len(nodes) < 2:
        return None
    if device is not None:
        return nodes.get(-1 if (node := node_of(device, sys)) is None else node)
    first = local_rank * len(nodes) // local_size
    last = max(first + 1, (local_rank + 1) * len(nodes) // local_size)
    cpus = set().union(*list(nodes.values())[first:last])
    return None if cpus == set().union(*nodes.values()) else cpus


def binding_of(environ: Mapping[str, str], local_rank: int, local_size: int, devices: list[Device]) -> set[int] | None:
    """Returns the cores to bind a worker of this process to; None for all, as `launch.binding: none` wants."""
    if environ.get(BINDING_VARIABLE) == "none" or not hasattr(os, "sched_getaffinity"):
        return None
    # One alone is the worker's own, as srun may give them out, or shared by all.
    fits = len(devices) >= local_size and local_rank < len(devices)
    device = devices[local_rank] if fits else devices[0] if len(devices) == 1 else None
    if device is not None and not device.is_instance and environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID") != "PCI_BUS_ID":
        return None  # which of them has the worker's number is CUDA's to say
    return cpus_of_worker(local_rank, local_size, device, os.sched_getaffinity(0))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
