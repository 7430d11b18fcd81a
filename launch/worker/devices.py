"""The GPUs of a host as its driver lists them, and the processor cores beside each: what a worker is bound to.

Nothing here opens a GPU: a supervisor that did would take some of its memory. All is read from /proc and /sys. Only
where GPUs are split (MIG) is `nvidia-smi -L` asked, since instances stand nowhere else.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from distopt.launchers import BINDING_VARIABLE, SINGLE_DEVICE_VARIABLE

DRIVER = Path("/proc/driver/nvidia")
DEV = Path("/dev")
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


def gpus(driver: Path = DRIVER, dev: Path = DEV) -> list[Device]:
    """Returns the GPUs that may be used, in the order of the PCI bus, which is that of nvidia-smi.

    Args:
        driver: The driver's folder in /proc. In many containers and in jobs of Slurm it lists all of the machine.
        dev: The folder of device files, of which such a container has its own alone, and such a job may open its own.
    """
    has_files = any(dev.glob("nvidia[0-9]*"))  # without one they are made when a GPU is first used
    seen = []
    for folder in sorted(driver.glob("gpus/*")):
        information = dict(re.findall(r"^([^:\n]+):\s+(\S+)", _read(folder / "information"), re.MULTILINE))
        uuid = information.get("GPU UUID")
        file = dev / f"nvidia{information.get('Device Minor')}"
        if uuid is not None and (not has_files or os.access(file, os.R_OK | os.W_OK)):
            seen.append(Device(uuid, folder.name))
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
    environ: Mapping[str, str], driver: Path = DRIVER, listing: Callable[[], str] = list_by_smi, dev: Path = DEV
) -> list[Device]:
    """Returns the devices of a process in the order in which CUDA numbers them.

    Args:
        environ: The variables of the process.
        driver: The driver's folder in /proc.
        listing: Returns what `nvidia-smi -L` prints; called only where it is needed.
        dev: The folder of device files.
    """
    whole = gpus(driver, dev)
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    names = None if chosen is None else [name.strip() for name in chosen.split(",")]
    wants_instances = any(name.startswith("MIG-") for name in names or ())
    instances = parse_listing(listing(), whole) if wants_instances or (names is None and has_instances(driver)) else []
    if names is None:
        return instances or whole

    seen: list[Device] = []
    for name in names:
        device = _find(name, whole, instances)
        if device is None:  # CUDA ignores what comes behind one that it does not know
            break
        if device in seen:  # and takes a list that names one twice for an empty one
            return []
        seen.append(device)
    return seen


def _find(name: str, whole: list[Device], instances: list[Device]) -> Device | None:
    """Returns the device of a number or of the beginning of a name; None where there is none, or several."""
    if number := re.match(r"\+?[0-9]+", name):  # CUDA reads as far as there are digits
        return whole[int(number[0])] if int(number[0]) < len(whole) else None
    matching = [device for device in [*whole, *instances] if name and device.uuid.startswith(name)]
    if not matching and name.startswith("MIG-"):
        return Device(name, "", is_instance=True)  # nvidia-smi is missing in many containers
    return matching[0] if len(matching) == 1 else None


def device_env(environ: Mapping[str, str], devices: list[Device], local_rank: int, local_size: int) -> dict[str, str]:
    """Returns the variables by which a worker finds its device.

    CUDA shows a process the first of several instances alone, so each worker is given its own. Whole GPUs are numbered
    as they are here and in nvidia-smi, where CUDA would begin with the fastest.
    """
    if devices and devices[0].is_instance:
        if len(devices) < local_size:  # all of them train on the CPU, and not some
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
        None where there is nothing to choose: one node, or a GPU whose node is not known. None too where the worker
        may use much less of one node than of others: what is lost there is more than what is gained.
    """
    nodes = {number: cpus & allowed for number, cpus in numa_nodes(sys).items() if cpus & allowed}
    sizes = [len(cpus) for cpus in nodes.values()]
    if len(nodes) < 2 or min(sizes) * len(nodes) * 2 < sum(sizes):
        return None
    if device is not None:
        return nodes.get(-1 if (node := node_of(device, sys)) is None else node)
    first = local_rank * len(nodes) // local_size
    last = max(first + 1, (local_rank + 1) * len(nodes) // local_size)
    cpus = set().union(*list(nodes.values())[first:last])
    return None if cpus == set().union(*nodes.values()) else cpus


@dataclass(frozen=True)
class Binding:
    """Where a worker runs.

    Attributes:
        cpus: The cores to which it is bound; None for all.
        num_sharing: How many workers of the host are bound to these, itself among them.
    """

    cpus: set[int] | None = None
    num_sharing: int = 1

    def num_threads(self, available: int, local_size: int) -> int:
        """Returns the worker's share of the cores.

        Args:
            available: How many all workers of the host can keep busy together.
            local_size: How many those are.
        """
        share = available // local_size
        return max(1, share if self.cpus is None else min(share, len(self.cpus) // self.num_sharing))


def binding_of(
    environ: Mapping[str, str], local_rank: int, local_size: int, devices: list[Device], sys: Path = SYS
) -> Binding:
    """Returns where a worker of this process runs: anywhere as `launch.binding: none` wants, else beside its device.

    Where workers have too few devices, some use none, or each has been given one by srun: only they know.
    """
    wanted = environ.get(BINDING_VARIABLE)
    of_workers: list[Device | None] = [*devices[:local_size]] if devices and wanted != "cpu" else [None] * local_size
    if wanted == "none" or not hasattr(os, "sched_getaffinity") or not local_rank < local_size == len(of_workers):
        return Binding()
    device = of_workers[local_rank]
    if device is not None and not device.is_instance and environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID") != "PCI_BUS_ID":
        return Binding()  # which of them has the worker's number is CUDA's to say

    allowed = os.sched_getaffinity(0)
    cpus = [cpus_of_worker(rank, local_size, of_workers[rank], allowed, sys) for rank in range(local_size)]
    bound = cpus[local_rank]
    if bound is None:
        return Binding()
    return Binding(bound, sum(each is not None and not bound.isdisjoint(each) for each in cpus))


def bind(cpus: set[int] | None) -> None:
    """Binds this process to some cores; a kernel that does not let it leaves it where it is."""
    if cpus is not None:
        with suppress(OSError):
            os.sched_setaffinity(0, cpus)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
