"""Which hook an option names."""

from __future__ import annotations

from distopt.backends import Backend
from distopt.config.plugins import is_reference, load_subclass
from distopt.config.reduce import ReduceOptions
from distopt.reduce.comm_hooks.adasum import Adasum
from distopt.reduce.comm_hooks.allreduce import AllReduce, BFloat16AllReduce, Float16AllReduce
from distopt.reduce.comm_hooks.base import CommHook
from distopt.reduce.comm_hooks.power_sgd import PowerSGD

HOOKS: dict[str, type[CommHook]] = {
    "none": AllReduce,
    "fp16": Float16AllReduce,
    "bf16": BFloat16AllReduce,
    "powersgd": PowerSGD,
    "adasum": Adasum,
}
"""By `ReduceOptions.op` where that is not a sum of gradients, else by `compression`."""


def make_hook(backend: Backend, options: ReduceOptions) -> CommHook:
    """Returns the hook that the options name.

    Raises:
        ConfigError: There is no module or class of the name `module:Name`, or it is no complete `CommHook`.
        ValueError: It cannot do what the options ask for.
    """
    name = options.op if options.op in HOOKS else options.compression
    hook = load_subclass(name, "reduce.compression", CommHook) if is_reference(name) else HOOKS[name]
    if options.overlap and not hook.can_overlap:
        raise ValueError(f"overlap=True needs a CommHook with can_overlap=True, which {name!r} is not.")
    return hook(backend, options)
