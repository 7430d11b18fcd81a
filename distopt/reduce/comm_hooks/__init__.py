"""Communication hooks: how the gradients of one bucket cross the network."""

from __future__ import annotations

import torch

from distopt.backends import Backend
from distopt.config.reduce import ReduceOptions
from distopt.reduce.comm_hooks.adasum import Adasum
from distopt.reduce.comm_hooks.allreduce import Exchange, Half, Plain
from distopt.reduce.comm_hooks.power_sgd import PowerSgd


def make_hook(options: ReduceOptions, backend: Backend) -> Exchange:
    """Returns the hook that `op` and `compression` name."""
    if options.op == "adasum":
        return Adasum(backend)
    if options.compression == "powersgd":
        return PowerSgd(backend, options.power_sgd_rank)
    if options.compression == "none":
        return Plain(backend)
    return Half(backend, torch.float16 if options.compression == "fp16" else torch.bfloat16)
