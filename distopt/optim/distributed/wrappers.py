"""The distributed optimizer with the arguments that users of other libraries know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.optim
from torch import Tensor

from distopt.backends import Backend
from distopt.config.reduce import ReduceOptions
from distopt.optim.distributed.optimizer import DistributedOptimizer
from distopt.rng import NoisePolicy


class DDPOptimizer(DistributedOptimizer):
    """`DistributedOptimizer` over `torch.distributed`, with the arguments that `DistributedDataParallel` users know.

    It runs over any backend, so a script that uses it needs no change under horovodrun or mpirun. What else can be
    chosen is in `ReduceOptions`: `DistributedOptimizer(optim, backend=..., reduce=ReduceOptions(...))`.

    Args:
        optim: The optimizer to wrap.
        process_group: A `torch.distributed` group, whose ranks alone take part; all ranks when None.
        bucket_cap_mb: Largest buffer in MiB.
        backend: As for `DistributedOptimizer`, unless `process_group` is given.
        noise: As for `DistributedOptimizer`.
    """

    def __init__(
        self,
        optim: pyro.optim.optim.PyroOptim,
        process_group: Any = None,
        *,
        bucket_cap_mb: float = 25.0,
        backend: Backend | None = None,
        noise: NoisePolicy = "independent",
    ) -> None:
        if process_group is not None:
            from distopt.backends.torch_dist import TorchDist

            backend = TorchDist.adopt(process_group)
        super().__init__(optim, backend=backend, reduce=ReduceOptions(bucket_mib=bucket_cap_mb), noise=noise)


class HorovodOptimizer(DistributedOptimizer, pyro.optim.HorovodOptimizer):  # type: ignore[misc]
    """`DistributedOptimizer` with the arguments of `horovod.torch.DistributedOptimizer`; used in place of Pyro's.

    It runs over any backend, so a script that uses it needs no change without Horovod. What else can be chosen is in
    `ReduceOptions`: `DistributedOptimizer(optim, backend=..., reduce=ReduceOptions(...))`.

    Args:
        optim: The optimizer to wrap.
        compression: `hvd.Compression.none` or `.fp16`, or a name that `ReduceOptions` takes.
        backward_passes_per_step: Calls of this optimizer (not of `backward`) that make one step.
        op: `hvd.Average`, `hvd.Sum` or `hvd.Adasum`, or a name.
        gradient_predivide_factor: Gradients are divided by it before the sum and multiplied by it afterwards.
        num_groups: A number of groups, as before Horovod had `groups`.
        groups: Parameters (names or tensors) that share a buffer, by group, or a number of groups.
        sparse_as_dense: Whether sparse gradients are made dense before they are sent.
        process_set: A Horovod process set, whose ranks alone take part; all ranks when None.
        backend: As for `DistributedOptimizer`, unless `process_set` is given.
        noise: As for `DistributedOptimizer`.
    """

    def __init__(
        self,
        optim: pyro.optim.optim.PyroOptim,
        *,
        compression: Any = "none",
        backward_passes_per_step: int = 1,
        op: Any = "average",
        gradient_predivide_factor: float = 1.0,
        num_groups: int = 0,
        groups: int | Sequence[Sequence[str | Tensor]] | None = None,
        sparse_as_dense: bool = False,
        process_set: Any = None,
        backend: Backend | None = None,
        noise: NoisePolicy = "independent",
    ) -> None:
        if process_set is not None:
            from distopt.backends.horovod import Horovod

            backend = Horovod(process_set=process_set)
        options = ReduceOptions(
            op=_op_name(op),
            compression=_compression_name(compression),
            groups=(num_groups or ()) if groups is None else _group_names(groups),
            gradient_predivide_factor=gradient_predivide_factor,
            sparse_as_dense=sparse_as_dense,
            backward_passes_per_step=backward_passes_per_step,
        )
        super().__init__(optim, backend=backend, reduce=options, noise=noise)


def _compression_name(compression: Any) -> Any:
    if isinstance(compression, str):
        return compression
    known = {"NoneCompressor": "none", "FP16Compressor": "fp16"}
    return known.get(getattr(compression, "__name__", ""), str(compression))


def _op_name(op: Any) -> Any:
    if isinstance(op, str):
        return op.lower()
    from distopt.backends.horovod import import_horovod

    hvd = import_horovod()
    return {hvd.Average: "average", hvd.Sum: "sum", hvd.Adasum: "adasum"}.get(op, str(op))


def _group_names(groups: int | Sequence[Sequence[str | Tensor]]) -> Any:
    """Returns groups with the names of the parameters for their tensors."""
    if isinstance(groups, int):
        return groups
    if isinstance(groups, str) or any(isinstance(group, str | Tensor) for group in groups):
        raise ValueError(
            f"groups={groups!r}: expected a number, or lists of names or tensors such as [['a', 'b'], ['c']]"
        )
    return [[_name_of(each) for each in group] for group in groups]


def _name_of(param: str | Tensor) -> str:
    name: str | None = param if isinstance(param, str) else pyro.get_param_store().param_name(param)
    if name is None:
        shape = tuple(param.shape) if isinstance(param, Tensor) else param
        raise ValueError(
            f"groups: a tensor of shape {shape} is no unconstrained parameter of Pyro's store yet; give the name"
        )
    return name
