"""How gradients are reduced: what must be the same on all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias, get_args

import torch

from distopt.backends import Backend, Json
from distopt.reduce.comm_hooks.adasum import Adasum
from distopt.reduce.comm_hooks.allreduce import Exchange, Half, Plain
from distopt.reduce.comm_hooks.power_sgd import PowerSgd
from distopt.rng import NoisePolicy

Compression: TypeAlias = Literal["none", "fp16", "bf16", "powersgd"]
ReduceOp: TypeAlias = Literal["average", "sum", "adasum"]


@dataclass(frozen=True)
class Settings:
    """How gradients of several ranks become one.

    Attributes:
        op: `average` over the active ranks, `sum`, or `adasum`.
        compression: What crosses: `none`, 16-bit `fp16` or `bf16`, or `powersgd` (low rank, with error feedback).
        power_sgd_rank: Rank of PowerSGD's approximation.
        bucket_mib: Largest buffer, in MiB.
        groups: Parameter names that travel together, or a number of groups; the others are packed by size.
        predivide: Gradients are divided by this before their sum and multiplied by it after, for `average`.
        sparse_as_dense: Whether sparse gradients are made dense before they cross.
        overlap: Whether buckets start while backward still runs.
        passes_per_step: Calls of the optimizer whose gradients are summed before one reduction.
        noise: Whether ranks draw noise of their own (`independent`) or all the same (`shared`).
        drift_every_steps: A checksum of the replicas rides along every so many steps; 0: never.
    """

    op: ReduceOp = "average"
    compression: Compression = "none"
    power_sgd_rank: int = 2
    bucket_mib: float = 25.0
    groups: Sequence[Sequence[str]] | int = ()
    predivide: float = 1.0
    sparse_as_dense: bool = False
    overlap: bool = False
    passes_per_step: int = 1
    noise: NoisePolicy = "independent"
    drift_every_steps: int = 0

    def __post_init__(self) -> None:
        for key, kind in (("op", ReduceOp), ("compression", Compression), ("noise", NoisePolicy)):
            if getattr(self, key) not in get_args(kind):
                raise ValueError(f"{key}={getattr(self, key)!r}: unknown. Known: {', '.join(get_args(kind))}.")
        for key in ("power_sgd_rank", "bucket_mib", "predivide", "passes_per_step"):
            value = getattr(self, key)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{key}={value!r}: expected a number above 0.")
        if self.drift_every_steps < 0:
            raise ValueError(f"drift_every_steps={self.drift_every_steps}: expected 0 (never) or more.")
        if self.predivide != 1.0 and self.op != "average":
            raise ValueError(f"gradient_predivide_factor={self.predivide} is for op='average', not {self.op!r}.")
        if self.op == "adasum" and self.compression != "none":
            raise ValueError(f"op='adasum' sends gradients as they are: compression={self.compression!r} cannot apply.")
        if self.overlap and self.passes_per_step > 1:
            raise ValueError("overlap=True reduces at each call: backward_passes_per_step must be 1.")
        if self.overlap and (self.op == "adasum" or self.compression == "powersgd"):
            raise ValueError("overlap=True is for sums; adasum and powersgd cross in several rounds after backward.")

    def describe(self) -> Json:
        """Returns what the ranks compare."""
        groups = self.groups if isinstance(self.groups, int) else [list(group) for group in self.groups]
        return asdict(self) | {"groups": groups}

    def make_exchange(self, backend: Backend) -> Exchange:
        """Returns the way gradients cross."""
        if self.op == "adasum":
            return Adasum(backend)
        if self.compression == "powersgd":
            return PowerSgd(backend, self.power_sgd_rank)
        if self.compression == "none":
            return Plain(backend)
        return Half(backend, torch.float16 if self.compression == "fp16" else torch.bfloat16)
