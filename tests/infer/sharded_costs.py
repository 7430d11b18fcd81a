"""What a sharded plate costs a rank: memory at the peak, bytes on the wire."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from torch import Tensor

from distopt import backends, optim
from distopt.infer import shard

NUM_DIMS = 8
_M_MMAP_THRESHOLD = -3  # malloc.h


def model(x: Tensor) -> None:
    """Eight numbers per datapoint around eight common ones."""
    loc = pyro.sample("loc", dist.Normal(torch.zeros(NUM_DIMS), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def start(site: dict[str, Any]) -> Tensor:
    return torch.zeros(site["fn"].shape())


def status_bytes(key: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) * 1024


def forget_peak() -> int:
    """Has the peak of resident memory start anew, and returns the bytes that are resident now."""
    # Big blocks go back to the system when they are freed, so that the peak is what is held, not how it lies in the
    # heap.
    library = ctypes.CDLL(None)
    library.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    gc.collect()  # what an earlier run has left is not freed in the middle of this one
    library.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def train(num_rows: int, num_steps: int) -> dict[str, Any]:
    """Trains on this rank's part of `num_rows`; returns its rows, peak memory and the bytes it gave to all-reduces.

    Bytes are those of the last step. Memory is the peak of resident memory over what was there before.
    """
    backend = backends.current()
    num_local = num_rows * (backend.rank + 1) // backend.world_size - num_rows * backend.rank // backend.world_size
    sent: list[int] = []
    all_reduce = backend.all_reduce

    def counting(tensor: Tensor, *args: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args)

    sharded = shard(model, "rows")
    guide = shard(AutoDelta(sharded, init_loc_fn=start), "rows")
    svi = SVI(sharded, guide, optim.DistributedOptimizer(optim.Adam({"lr": 0.01})), Trace_ELBO())
    data = torch.ones(num_local, NUM_DIMS)
    before = forget_peak()
    backend.all_reduce = counting  # type: ignore[method-assign]
    try:
        for _ in range(num_steps):
            sent.clear()
            svi.step(data)
    finally:
        del backend.all_reduce
    rows = {name: param.shape[0] for name, param in pyro.get_param_store().named_parameters()}
    return {
        "rows": rows["AutoDelta.z"],
        "peak": status_bytes("VmHWM") - before,
        "bytes": sum(sent),
        "calls": len(sent),
    }
