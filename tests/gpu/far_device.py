"""A device whose memory the host cannot read, for a machine that has no GPU; see `_far_device.cpp`.

It is registered with torch when this module is imported, for good: import it in a process of its own only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sysconfig
import traceback
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.utils.dlpack as dlpack
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from distopt.backends.base import DEFAULT_TIMEOUT, Backend
from distopt.backends.single import Single
from distopt.launchers import RankInfo
from distopt.optim import kernels, packing, trial

SOURCE = Path(__file__).with_name("_far_device.cpp")
ROOT = SOURCE.parents[2]
NAME = "far"


def build() -> Path:
    """Compiles the device for this torch, once: about a minute. Returns the library.

    Raises:
        RuntimeError: There is no C++ compiler, or it failed; has its output.
    """
    digest = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    library = ROOT / "build" / f"far-device-{digest}" / f"_far_device{sysconfig.get_config_var('EXT_SUFFIX')}"
    if library.exists():
        return library

    library.parent.mkdir(parents=True, exist_ok=True)
    partial = library.with_name(f"{os.getpid()}.so")
    command = [os.environ.get("CXX", "c++"), "-shared", "-fPIC", "-std=c++20", "-O0", "-g0"]
    command += ["-DTORCH_EXTENSION_NAME=_far_device", str(SOURCE), "-o", str(partial)]
    command += [f"-I{path}" for path in [*include_paths(), sysconfig.get_paths()["include"]]]
    for path in library_paths():
        command += [f"-L{path}", f"-Wl,-rpath,{path}"]
    command += ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(f"no C++ compiler {command[0]!r}: install one, or set CXX") from None
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed on {SOURCE.name}:\n{done.stderr[-3000:]}")
    partial.rename(library)
    return library


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("_far_device", build())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _DeviceModule:
    """What torch asks of the module `torch.far`."""

    is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])


_device = _load()
torch.utils.rename_privateuse1_backend(NAME)
torch._register_device_module(NAME, _DeviceModule)  # type: ignore[no-untyped-call]
torch.utils.generate_methods_for_privateuse1_backend()

# DLPack knows the device, but torch 2.13 looks it up by a name that it does not let anybody take.
_device_of = Tensor.__dlpack_device__
Tensor.__dlpack_device__ = lambda t: (  # type: ignore[method-assign,assignment]
    (dlpack.DLDeviceType.kDLExtDev, 0) if t.device.type == NAME else _device_of(t)
)

# The optimizer takes its quick paths on devices that were tried. This one stands for a GPU.
packing.DEVICE_TYPES |= {NAME}
kernels.DEVICE_TYPES |= {NAME}
# A GPU's kernels compute an element alike wherever it stands; torch's for the CPU, which stand in for them, do not.
trial._is_position_independent = lambda *_: True

FAR = torch.device(NAME, 0)


class Waits:
    """Counts, while it is entered, how often the host waits for the device, and notes which lines do.

    Attributes:
        waits: How often each line waited: a blocking copy, a number that was read, a shape that follows from values.
        copies: How often each line copied to or from the host without waiting.
        num_operations: Kernels that were started.
    """

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.num_operations = 0

    def __enter__(self) -> Waits:
        _device.listen(self._listen)
        return self

    def __exit__(self, *exc: object) -> None:
        _device.listen(None)

    @property
    def num_waits(self) -> int:
        return sum(self.waits.values())

    @property
    def num_copies(self) -> int:
        return sum(self.copies.values())

    def _listen(self, kind: str, name: str) -> None:
        if kind == "op":
            self.num_operations += 1
        elif kind in ("wait", "copy"):
            counts = self.waits if kind == "wait" else self.copies
            counts[f"{name} at {_line()}"] += 1


def _line() -> str:
    """Returns the innermost line of distopt or Pyro that is running."""
    for frame in reversed(traceback.extract_stack()):
        for package in ("distopt", "pyro"):
            _, separator, rest = frame.filename.rpartition(f"/{package}/")
            if separator:
                return f"{package}/{rest}:{frame.lineno}"
    return "the test"


class FarSingle(Single):
    """A world of one whose parameters live on the device; a YAML may name it as `reduce.backend`."""

    name = "far"

    def __init__(self, device: torch.device | None = None, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
        super().__init__(device or FAR, timeout)


class _Done:
    def wait(self, timeout: timedelta | None = None) -> None:
        pass


class Mirror(Backend):
    """Rank 0 of two, where rank 1 does whatever rank 0 does: a sum is twice what is summed.

    As with NCCL, results stay on the device and nothing waits for them.
    """

    name = "mirror"

    def __init__(self) -> None:
        super().__init__(RankInfo("this process", 0, 2), device=FAR)

    @property
    def control_device(self) -> torch.device:
        return FAR

    @classmethod
    def start(cls, rank_info: RankInfo | None, *, timeout: timedelta) -> Mirror:
        return cls()

    def all_reduce(self, tensor: Tensor, op: Any = "sum") -> Any:
        if op == "sum":
            tensor.mul_(2)
        return _Done()

    def broadcast(self, tensor: Tensor, root: int = 0) -> Any:
        return _Done()

    def all_gather(self, tensor: Tensor, timeout: timedelta | None = None) -> Tensor:
        return torch.stack([tensor, tensor])
