"""The distributed optimizer with the arguments that users of other libraries know."""

from __future__ import annotations

from typing import Any

import pyro.optim

from distopt.optim.distributed.optimizer import DistributedOptimizer


class DDPOptimizer(DistributedOptimizer):
    """`DistributedOptimizer` over `torch.distributed`, with the arguments that `DistributedDataParallel` users know.

    It runs over any backend, so a script that uses it needs no change under horovodrun or mpirun.

    Args:
        pyro_optim: The optimizer to wrap.
        process_group: A `torch.distributed` group, whose ranks alone take part; all ranks when None.
        bucket_cap_mb: Largest buffer in MiB.
        **options: As for `DistributedOptimizer`.
    """

    def __init__(
        self,
        pyro_optim: pyro.optim.PyroOptim,
        process_group: Any = None,
        *,
        bucket_cap_mb: float = 25.0,
        **options: Any,
    ) -> None:
        if process_group is not None:
            from distopt.backends.torch_dist import TorchDist

            options["backend"] = TorchDist.adopt(process_group)
        super().__init__(pyro_optim, bucket_mib=bucket_cap_mb, **options)


class HorovodOptimizer(DistributedOptimizer):
    """`DistributedOptimizer` with the arguments of `horovod.torch.DistributedOptimizer`; takes the place of Pyro's.

    It runs over any backend, so a script that uses it needs no change without Horovod.

    Args:
        pyro_optim: The optimizer to wrap.
        compression: `hvd.Compression.none` or `.fp16`, or a name that `DistributedOptimizer` takes.
        op: `hvd.Average`, `hvd.Sum` or `hvd.Adasum`, or a name.
        num_groups: A number of groups; `groups` is the newer word.
        process_set: A Horovod process set, whose ranks alone take part; all ranks when None.
        **options: As for `DistributedOptimizer`, whose words are Horovod's: `backward_passes_per_step` (here it counts
            calls of the optimizer, not of `backward`), `gradient_predivide_factor`, `groups`, `sparse_as_dense`.
    """

    def __init__(
        self,
        pyro_optim: pyro.optim.PyroOptim,
        *,
        compression: Any = "none",
        op: Any = "average",
        num_groups: int = 0,
        process_set: Any = None,
        **options: Any,
    ) -> None:
        if process_set is not None:
            from distopt.backends.horovod import Horovod

            options["backend"] = Horovod(process_set=process_set)
        if num_groups:
            options.setdefault("groups", num_groups)
        super().__init__(pyro_optim, compression=_compression_name(compression), op=_op_name(op), **options)


def _compression_name(compression: Any) -> str:
    known = {"NoneCompressor": "none", "FP16Compressor": "fp16"}
    return (
        compression
        if isinstance(compression, str)
        else known.get(getattr(compression, "__name__", ""), str(compression))
    )


def _op_name(op: Any) -> str:
    if isinstance(op, str):
        return op.lower()
    from distopt.backends.horovod import import_horovod

    hvd = import_horovod()
    return {hvd.Average: "average", hvd.Sum: "sum", hvd.Adasum: "adasum"}.get(op, str(op))
