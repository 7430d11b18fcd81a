"""Whether a quick implementation of an optimizer computes what its plain one does: both are tried, once in a process.

Torch's one-pass kernels have been wrong for single dtypes, sizes and arguments (SGD in 16 bits changes nothing from 16
elements on, torch 2.13). No list of such cases stays true from one release to the next. So before a kernel is used,
three steps of it are compared with three plain ones, in the dtype, on the device and with the arguments in question.

What an element becomes must not depend on where it lies, either: which parameters lie side by side, or are listed,
follows from what has happened in a process, and is not the same in a run and in its resumption.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from distopt.optim.construction import construct

# In 16 bits the plain loop rounds after each operation and a kernel once: a kernel that is right is still another
# trajectory than that of pyro.optim. So there only the plain loop will do, and no kernel is tried.
EXACT_DTYPES = frozenset({torch.float32, torch.float64})

# Sizes beyond one and several registers of a processor (4 to 64 elements), with and without a rest.
_SIZES = (1, 5, 16, 67, 256)
_NUM_STEPS = 3
_MAX_REST = 32  # elements of a vector register and its rest: 16 of 32 bits at most
_NUM_STEPS_TO_TELL = 8
_NUM_ROUNDINGS = 64  # what both may differ by after three steps, in units of the last place


def computes_the_same(
    constructor: Callable[..., torch.optim.Optimizer],
    args: Mapping[str, Any],
    switches: Mapping[str, Any],
    dtype: torch.dtype,
    device: str,
) -> bool:
    """Returns whether a torch optimizer with `switches` takes the steps that it takes in its plain loop.

    Args:
        constructor: A class of `torch.optim`.
        args: The user's arguments; which of them are zero decides which loop runs, so that is told apart.
        switches: `fused` or `foreach`.
        dtype: Of the parameters.
        device: Type of their device.

    Cost:
        A few milliseconds the first time.
    """
    if any(isinstance(value, Tensor) for value in args.values()):
        return False
    chosen = tuple(sorted((key, _Argument(value)) for key, value in args.items() if key != "lr"))
    return _tried(constructor, chosen, tuple(sorted(switches.items())), dtype, device)


class _Argument:
    """An argument that equals others of the same truth, and remembers one of them."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Argument) and bool(self.value) == bool(other.value)

    def __lt__(self, other: _Argument) -> bool:  # keys are sorted first, and differ
        return False

    def __hash__(self) -> int:
        return hash(bool(self.value))


@cache
def _tried(
    constructor: Callable[..., torch.optim.Optimizer],
    args: tuple[tuple[str, _Argument], ...],
    switches: tuple[tuple[str, Any], ...],
    dtype: torch.dtype,
    device: str,
) -> bool:
    values = {key: argument.value for key, argument in args}
    plain = values | {"lr": 0.125, "foreach": False} | ({"fused": False} if "fused" in dict(switches) else {})

    def steps(options: Mapping[str, Any]) -> list[Tensor]:
        params = example_tensors(dtype, device)
        optimizer = construct(constructor, params, options)
        for gradients in example_gradients(dtype, device):
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient
            _take_step(optimizer)
        state = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, Tensor)]
        return params + state

    try:
        quick = values | {"lr": 0.125} | dict(switches)
        return are_close(steps(quick), steps(plain)) and _is_position_independent(
            constructor, quick, plain, dtype, device
        )
    except (RuntimeError, TypeError, ValueError):  # this release does not have it, or not for these arguments
        return False


def _take_step(optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        inspect.unwrap(type(optimizer).step)(optimizer)


def _is_position_independent(
    constructor: Callable[..., torch.optim.Optimizer],
    quick: Mapping[str, Any],
    plain: Mapping[str, Any],
    dtype: torch.dtype,
    device: str,
) -> bool:
    """Returns whether a list of tensors is stepped to the same bits as these tensors packed into one.

    Packed ones are stepped by the same kernel; where a list is stepped by `foreach`, by the plain loop.
    """
    if quick.get("foreach") and device != "cpu":
        return True  # not known to be so: there a list without `foreach` takes a hundred times as long
    quick, plain = _inexact(quick), _inexact(plain)
    generator = torch.Generator().manual_seed(0)
    values, *gradients = (
        [torch.randn(size, generator=generator, dtype=dtype).to(device) for size in range(1, _MAX_REST)]
        for _ in range(1 + _NUM_STEPS_TO_TELL)
    )
    listed = [value.clone() for value in values]
    packed = torch.cat(values)
    of_listed = construct(constructor, listed, quick)
    of_packed = construct(constructor, [packed], plain if quick.get("foreach") else quick)
    for of_step in gradients:
        packed.grad = torch.cat(of_step)
        for p, gradient in zip(listed, of_step, strict=True):
            p.grad = gradient
        _take_step(of_listed)
        _take_step(of_packed)
    return torch.equal(torch.cat(listed), packed)


def _inexact(args: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arguments near `args` whose products have to be rounded.

    A product with a power of two is exact, so a fused multiplication and addition rounds it as two operations do. What
    is learned with a momentum of 0.5 is kept for one of 0.9.
    """
    return {key: _inexact_value(value) for key, value in args.items()}


def _inexact_value(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(map(_inexact_value, value))
    return value * 0.999 if isinstance(value, int | float) and not isinstance(value, bool) else value


def example_tensors(dtype: torch.dtype, device: str) -> list[Tensor]:
    """Returns tensors of several sizes with values of both signs, the same each time."""
    return [torch.linspace(-1.0, 1.5, size, dtype=dtype, device=device) for size in _SIZES]


def example_gradients(dtype: torch.dtype, device: str) -> list[list[Tensor]]:
    """Returns a gradient for each of `example_tensors` and each step."""
    return [[(2.0 * x + step).sin() for x in example_tensors(dtype, device)] for step in range(_NUM_STEPS)]


def are_close(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Returns whether tensors are equal up to a few roundings."""
    return len(some) == len(others) and all(
        torch.allclose(
            a, b, rtol=_NUM_ROUNDINGS * torch.finfo(a.dtype).eps, atol=_NUM_ROUNDINGS * torch.finfo(a.dtype).eps
        )
        for a, b in zip(some, others, strict=True)
    )
