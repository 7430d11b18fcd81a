"""Compiled from _bulk.cpp; used through packing.py, which says what each does."""

from typing import Any

from torch import Tensor

TORCH: str

def same(some: tuple[Any, ...], others: tuple[Any, ...], /) -> bool: ...
def addresses(params: tuple[Tensor, ...], /) -> Any: ...
def bump(params: tuple[Tensor, ...], /) -> Any: ...
def dense(params: tuple[Tensor, ...], /) -> Any: ...
def gather(params: tuple[Tensor, ...], home: Tensor, buffer: Tensor, /) -> Any: ...
def adam(
    tensors: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]],
    numbers: tuple[list[float], list[float], list[float]],
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    is_decoupled: bool,
    is_pyro: bool,
    /,
) -> Any: ...
