"""Checkpoints against `torch.save`, `torch.load` and `PyroOptim.save`, as ratios of times in one run.

Run by `make bench ARGS=checkpoint`, or with `small` or `large` behind it. Each row is measured on the disk of the
temporary directory and, to tell the work of the processor from the disk's, in `/dev/shm`. In each round all sides take
turns, in the other order each time, with nothing left to be written from the one before; a ratio is the median over
rounds. A checkpoint is on the disk when it is done, so what is required of the large one is to be as fast as
`torch.save` with `fsync` of the file and its folder; beside it stands the plain `torch.save`, which leaves its bytes to
the kernel. `PyroOptim.save` is taken as it is. Both loads read what the page cache holds.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

import pyro
import torch
from pyro.optim import Adam

from distopt.backends.single import Single
from distopt.checkpoint import Checkpointer, Retention
from distopt.checkpoint.reader import read_manifest
from distopt.checkpoint.restore import REPLICATED, load_replicated
from distopt.checkpoint.statefile import StateReader
from distopt.checkpoint.storage.base import open_storage
from distopt.optim import PackedState

LARGE_MIB = 1024
LARGE_ROUNDS, LARGE_S = (3, 7), 25.0
"""Fewest and most, and no new one after so many seconds: a throttled disk may take tens of them for one."""
SMALL_ROUNDS = 9
Work: TypeAlias = Callable[[], object]
MEMORY = Path("/dev/shm")
missed = 0


def report(what: str, ratios: Iterable[float], limit: float) -> None:
    """Prints the median of some ratios beside what it may not exceed, and their range."""
    global missed
    ordered = sorted(ratios)
    ratio = statistics.median(ordered)
    missed += ratio > limit
    verdict = "ok    " if ratio <= limit else "MISSED"
    print(f"{verdict} {what}: {ratio:.3f} (at most {limit:.4g}; {ordered[0]:.3f} to {ordered[-1]:.3f})", flush=True)


def remark(what: str, ratios: Iterable[float]) -> None:
    """Prints the median of some ratios to which nothing is required."""
    print(f"      {what}: {statistics.median(ratios):.3f}", flush=True)


def timed(work: Work, *, ready_mib: int = 0) -> float:
    """Returns the seconds of one call, once the machine has `ready_mib` of memory at hand.

    A virtual machine's free memory may have been handed back to its host, which takes longer to get than to write.
    """
    torch.ones(ready_mib << 20, dtype=torch.uint8)
    os.sync()  # what one side leaves to be written, or to be discarded, is not to slow down the next
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def torch_save(state: object, path: Path, *, sync: bool) -> None:
    """`torch.save` to a new file, and with `sync` the bytes and the name on the disk."""
    with path.open("xb") as file:
        torch.save(state, file)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    if sync:
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def peak_mib() -> float:
    """Returns the highest resident memory since `resident_mib`."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def resident_mib() -> float:
    """Returns the resident memory now, and starts its highest mark anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024


def in_turn(works: list[tuple[str, Work]], round_: int) -> list[tuple[str, Work]]:
    """Returns the sides in the order of a round: the other way round each time."""
    return works[:: 1 if round_ % 2 else -1]


class Sides:
    """Seconds of each round by side."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def add(self, name: str, seconds: float) -> None:
        """Notes the time of one side in one round."""
        self.seconds.setdefault(name, []).append(seconds)

    def ratios(self, one: str, other: str) -> list[float]:
        """Returns one side's time by the other's, round by round."""
        return [mine / theirs for mine, theirs in zip(self.seconds[one], self.seconds[other], strict=True)]

    def median(self, name: str) -> float:
        """Returns the median of one side's times."""
        return statistics.median(self.seconds[name])

    def show(self) -> None:
        """Prints all times."""
        for name, seconds in self.seconds.items():
            print(f"  {name}: " + " ".join(f"{one:.3f}" for one in seconds) + " s")


def large(root: Path, where: str) -> None:
    """1 GiB of state: stall, whole save, whole load, memory."""
    for index in range(8):
        pyro.param(f"large.{index}", torch.randn(LARGE_MIB // 8 * (1 << 18)))
    sides = Sides()
    with Checkpointer(root / "ours", backend=Single(), keep=Retention(2)) as keeper:
        before = resident_mib()
        first = timed(lambda: keeper.save(0))
        keeper.wait()
        memory = (peak_mib() - before) / LARGE_MIB
        began = time.perf_counter()
        for step in range(1, LARGE_ROUNDS[1] + 1):
            save_large(root, sides, keeper, step)
            load_large(root, sides, step)
            if step >= LARGE_ROUNDS[0] and time.perf_counter() - began > LARGE_S:
                break
    sides.show()
    synced, plain = "torch.save + fsync", "torch.save"
    report(f"{where}: whole save / {synced}", sides.ratios("save", synced), 1)
    remark(f"{where}: whole save / {plain}", sides.ratios("save", plain))
    report(f"{where}: whole load / torch.load", sides.ratios("load", "torch.load"), 1)
    stall = f"{where}: stall of a background save / {synced}"
    if where == "disk":
        report(stall, sides.ratios("stall", synced), 0.1)
    else:  # where torch.save is itself hardly more than a copy
        remark(stall, sides.ratios("stall", synced))
    remark(f"{where}: stall of a background save / {plain}", sides.ratios("stall", plain))
    remark(f"{where}: stall of the first one, whose memory is new / {synced}", [first / sides.median(synced)])
    report(f"{where}: peak memory of a save / one copy of the state", [memory], 1.1)


def save_large(root: Path, sides: Sides, keeper: Checkpointer, step: int) -> None:
    """One round of saves; the files of `torch.save` stay."""
    state = {name: value.detach() for name, value in pyro.get_param_store().named_parameters()}
    for name in ("synced.pt", "plain.pt"):
        (root / name).unlink(missing_ok=True)

    def save() -> None:
        began = time.perf_counter()
        keeper.save(step)
        sides.add("stall", time.perf_counter() - began)
        keeper.wait()

    works: list[tuple[str, Work]] = [
        ("save", save),
        ("torch.save + fsync", lambda: torch_save(state, root / "synced.pt", sync=True)),
        ("torch.save", lambda: torch_save(state, root / "plain.pt", sync=False)),
    ]
    for name, work in in_turn(works, step):
        sides.add(name, timed(work, ready_mib=2 * LARGE_MIB))
        keeper._finish()  # the deletion of an older one


def load_large(root: Path, sides: Sides, step: int) -> None:
    """One round of loads, of what `save_large` has saved."""
    storage, folder = open_storage(root / "ours"), f"step-{step:08d}"

    def load() -> object:
        return load_replicated(StateReader(storage, folder, read_manifest(storage, folder), REPLICATED))

    works: list[tuple[str, Work]] = [("load", load), ("torch.load", lambda: torch.load(root / "plain.pt"))]
    for name, work in in_turn(works, step):
        sides.add(name, timed(work, ready_mib=2 * LARGE_MIB))


def small(root: Path, where: str) -> None:
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
    sides = Sides()
    with Checkpointer(root / "small", {"optimizer": optimizer}, backend=Single()) as keeper:
        for step in range(SMALL_ROUNDS):

            def save(step: int = step) -> None:
                keeper.save(step)
                keeper.wait()  # until it is committed

            works: list[tuple[str, Work]] = [
                ("PyroOptim.save", lambda: optimizer.save(str(root / "pyro.pt"))),
                ("save", save),
            ]
            for name, work in in_turn(works, step):
                sides.add(name, timed(work))
                keeper._finish()
        folder = root / "small" / f"step-{keeper.steps()[-1]:08d}"
        written = sum(file.stat().st_size for file in folder.iterdir())
    states = optimizer.get_state()
    for step in range(SMALL_ROUNDS):
        for name, work in in_turn(
            [("from_states", lambda: PackedState.from_states(states)), ("get_state", optimizer.get_state)], step
        ):
            sides.add(name, timed(work))
    sides.show()
    report(f"{where}: packing of pyro.optim's state / its get_state", sides.ratios("from_states", "get_state"), 1.5)
    report(f"{where}: files / bytes of the tensors", [written / size], 1.2)
    report(
        f"{where}: save of everything / PyroOptim.save of the optimizer", sides.ratios("save", "PyroOptim.save"), 1 / 3
    )


def main(names: list[str]) -> int:
    """Runs all, or those named; returns how many ratios were missed."""
    torch.set_num_threads(1)
    folders = {"disk": Path(tempfile.gettempdir())}
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 8 * LARGE_MIB << 20:
        folders["memory"] = MEMORY
    for name, work in (("small", small), ("large", large)):
        for where, base in folders.items():
            if not names or name in names:
                with tempfile.TemporaryDirectory(dir=base) as root:
                    work(Path(root), where)
                pyro.clear_param_store()
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
