"""Checkpoints against `torch.save`, `torch.load` and `PyroOptim.save`, as ratios of times in one run.

Run by `make bench ARGS=checkpoint`. Times are the best of several rounds in which all sides take turns, on the file
system of the temporary directory. What is required of the large save is to be as fast as `torch.save` when both end
with their bytes on the disk (`fsync`); beside it stands `torch.save` that leaves them to the kernel. Both loads read
what the page cache holds.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import torch
from pyro.optim import Adam

from distopt.backends.single import Single
from distopt.checkpoint import Checkpointer
from distopt.checkpoint.manifest import Manifest
from distopt.checkpoint.memory import HostMemory
from distopt.checkpoint.reader import read_manifest
from distopt.checkpoint.statefile import StateReader, take_snapshot
from distopt.checkpoint.storage import open_storage
from distopt.checkpoint.writer import Attempt, write_checkpoint

LARGE_MIB = 1024
READY_MIB = 2 * LARGE_MIB
ROUNDS = 6
missed = 0


def report(what: str, found: float, limit: float) -> None:
    """Prints a ratio beside the one it may not exceed."""
    global missed
    missed += found > limit
    print(f"{'ok    ' if found <= limit else 'MISSED'} {what}: {found:.3f} (at most {limit:g})", flush=True)


def remark(what: str, found: float) -> None:
    """Prints a ratio to which nothing is required."""
    print(f"      {what}: {found:.3f}", flush=True)


def timed(work: Callable[[], object], *, ready_mib: int = 0) -> float:
    """Returns the seconds of one call, once the machine has `ready_mib` of memory at hand.

    A virtual machine's free memory may have been handed back to its host, which takes longer to get than to write.
    """
    torch.ones(ready_mib << 20, dtype=torch.uint8)
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def torch_save(state: object, path: Path, *, sync: bool) -> None:
    """`torch.save`, and with `sync` the bytes on the disk."""
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def write(root: Path, state: object, step: int, memory: HostMemory) -> None:
    """A whole save: copied, hashed, written, synced, committed."""
    storage = open_storage(root)
    attempt = Attempt(step, f"{step:012x}", 0, 1, Single().timeout)
    files = take_snapshot(state, memory, "replicated").files("replicated", {"step": str(step)})
    write_checkpoint(storage, attempt, files, lambda records: Manifest(step, attempt.id, 0, 1, records))


def peak_mib() -> float:
    """Returns the highest resident memory since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def resident_mib() -> float:
    """Returns the resident memory now, and starts its highest mark anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024


def large(root: Path) -> None:
    """1 GiB of state: stall, whole save, whole load, memory."""
    for index in range(8):
        pyro.param(f"large.{index}", torch.randn(LARGE_MIB // 8 * (1 << 18)))
    state = {name: value.detach() for name, value in pyro.get_param_store().named_parameters()}
    memory, ours = HostMemory(), root / "ours"
    ours.mkdir()
    saves: list[tuple[str, Callable[[int], None]]] = [
        ("save", lambda step: write(ours, state, step, memory)),
        ("torch.save + fsync", lambda step: torch_save(state, root / "synced.pt", sync=True)),
        ("torch.save", lambda step: torch_save(state, root / "torch.pt", sync=False)),
    ]
    times: dict[str, list[float]] = {name: [] for name in (*dict(saves), "torch.load", "load")}
    for step in range(1, ROUNDS + 1):
        turn = step % len(saves)
        for name, save in saves[turn:] + saves[:turn]:  # disks are quickest for whoever comes first
            times[name].append(timed(lambda save=save, step=step: save(step), ready_mib=READY_MIB))
            os.sync()  # what one leaves to be written is not to slow down the next
        times["torch.load"].append(timed(lambda: torch.load(root / "torch.pt"), ready_mib=READY_MIB))
        storage, folder = open_storage(ours), f"step-{step:08d}"
        reader = StateReader(storage, folder, read_manifest(storage, folder), "replicated")
        times["load"].append(timed(reader.load, ready_mib=READY_MIB))
        storage.remove(storage.set_aside(folder))
        (root / "torch.pt").unlink()
        (root / "synced.pt").unlink()
    print("  seconds: " + ", ".join(f"{name} {min(found):.2f}" for name, found in times.items()))
    best = {name: min(found) for name, found in times.items()}
    report("whole save / torch.save and fsync", best["save"] / best["torch.save + fsync"], 1.0)
    remark("whole save / torch.save that leaves its bytes in memory", best["save"] / best["torch.save"])
    report("whole load / torch.load", best["load"] / best["torch.load"], 1.0)
    background(root / "background", best["torch.save + fsync"], best["torch.save"])
    pyro.clear_param_store()


def background(root: Path, synced_s: float, unsynced_s: float) -> None:
    """The stall of an asynchronous save, and the memory that it takes."""
    with Checkpointer(root, backend=Single(), keep_last=2) as checkpointer:
        before = resident_mib()
        stalls = []
        for step in range(1, ROUNDS + 2):
            stalls.append(timed(lambda step=step: checkpointer.save(step)))
            checkpointer.wait()
            checkpointer._finish()
        print("  stalls: " + ", ".join(f"{stall:.3f} s" for stall in stalls))
        remark(
            "stall of the first background save, which finds no memory of a save before / torch.save and fsync",
            stalls[0] / synced_s,
        )
        report("stall of a later background save / torch.save and fsync", min(stalls[1:]) / synced_s, 0.1)
        remark(
            "stall of a later background save / torch.save that leaves its bytes in memory",
            min(stalls[1:]) / unsynced_s,
        )
        report("peak memory of saves / one copy of the state", (peak_mib() - before) / LARGE_MIB, 1.1)


def small(root: Path) -> None:
    """1,000 small parameters with Adam's state: the size of the files, and the time."""
    generator = torch.Generator().manual_seed(1)
    optimizer = Adam({"lr": 0.01})
    for index in range(1000):
        pyro.param(f"AutoNormal.locs.site_{index}", torch.randn(100, generator=generator))
    params = [value for _, value in pyro.get_param_store().named_parameters()]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer(params)
    tensors = [param.detach() for param in params]
    for entry in optimizer.get_state().values():
        tensors += [value for value in entry["state"][0].values() if isinstance(value, torch.Tensor)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    path = str(root / "pyro.pt")
    theirs, ours = [], []
    with Checkpointer(root / "small", backend=Single(), optimizer=optimizer) as checkpointer:

        def save(step: int) -> None:
            checkpointer.save(step)
            checkpointer.wait()  # until it is committed

        for step in range(1, 8):
            theirs.append(timed(lambda: optimizer.save(path)))
            os.sync()
            ours.append(timed(lambda step=step: save(step)))
            checkpointer._finish()  # the deletion of older ones
        folder = root / "small" / f"step-{checkpointer.steps()[-1]:08d}"
        written = sum(file.stat().st_size for file in folder.iterdir())
    print(f"  seconds: PyroOptim.save {min(theirs):.4f} (optimizer alone, no fsync), save {min(ours):.4f} (everything)")
    report("files / bytes of the tensors", written / size, 1.2)
    report("save / PyroOptim.save", min(ours) / min(theirs), 1 / 3)


def main(names: list[str]) -> int:
    """Runs all, or those named; returns how many ratios were missed."""
    torch.set_num_threads(1)
    for name, work in (("small", small), ("large", large)):
        if not names or name in names:
            with tempfile.TemporaryDirectory() as root:
                work(Path(root))
            pyro.clear_param_store()
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
