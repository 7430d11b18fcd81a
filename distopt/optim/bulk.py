"""Loops over many small tensors: compiled where that was possible when distopt was installed, else in Python."""

from __future__ import annotations

import logging
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

_address = Tensor.data_ptr
_gradient = attrgetter("grad")

logger = logging.getLogger("distopt.optim")


def _loaded() -> Any:
    """Returns the compiled loops, None where there are none or they were compiled for another torch."""
    try:
        from distopt.optim import _bulk
    except ImportError as error:
        logger.debug("loops over parameters run in Python: %s", error)
        return None
    if str(torch.__version__) != _bulk.TORCH:
        logger.debug("loops over parameters run in Python: they are compiled for torch %s", _bulk.TORCH)
        return None
    return _bulk


_compiled = _loaded()


def same(some: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    """Returns whether both hold the same objects, in one order."""
    if _compiled is not None:
        return _compiled.same(some, others)  # type: ignore[no-any-return]
    return len(some) == len(others) and all(map(is_, some, others))


def places(params: tuple[Tensor, ...]) -> Any:
    """Returns where in memory `params` lie, to be compared with what this returned for the same ones before."""
    found = NotImplemented if _compiled is None else _compiled.places(params)
    return list(map(_address, params)) if found is NotImplemented else found


def bump_versions(params: tuple[Tensor, ...]) -> None:
    """Lets autograd know that `params` were changed in place."""
    if _compiled is None or _compiled.bump(params) is NotImplemented:
        torch.autograd.graph.increment_version(params)


def has_dense_gradients(params: tuple[Tensor, ...]) -> bool:
    """Returns whether each of `params` has a gradient, strided and contiguous."""
    found = NotImplemented if _compiled is None else _compiled.dense(params)
    return all(map(_is_dense, map(_gradient, params))) if found is NotImplemented else found


def _is_dense(gradient: Tensor | None) -> bool:
    return gradient is not None and gradient.layout is torch.strided and gradient.is_contiguous()


def gather(params: tuple[Tensor, ...], home: Tensor, buffer: Tensor) -> bool | None:
    """Copies each parameter's `.grad` side by side into `buffer`, if that can be compiled.

    Args:
        params: exactly those whose memory `home` is made of, in order.
        home: shape (sum of numels,).
        buffer: shape, dtype and device of `home`.

    Returns:
        True when done; False when the parameters do not fill `home` any more; None when something is out of the
        ordinary (no gradient, a sparse one, another device), so that Python must see to it. Unless True, `buffer`
        holds anything.
    """
    found = NotImplemented if _compiled is None else _compiled.gather(params, home, buffer)
    return None if found is NotImplemented else found
