"""What is known of the torch optimizers: which may be packed or listed, and which switches make them quick.

Nothing has to be known of an optimizer for it to work. For one that is in no table here, such as your own class, a
separate instance is made for each parameter, with exactly the arguments that you gave, as in `pyro.optim`.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from typing import Any

import pyro
import torch

from distopt.optim.adagrad_rmsprop import AdagradRMSProp
from distopt.optim.clipped_adam import ClippedAdam
from distopt.optim.dct_adam import DCTAdam
from distopt.optim.kernels import OnePassRMSprop, has_kernel
from distopt.optim.one_pass_adam import OnePassAdam, OnePassAdamW
from distopt.optim.trial import EXACT_DTYPES, computes_the_same

ELEMENTWISE: frozenset[Any] = frozenset(
    {
        AdagradRMSProp,
        ClippedAdam,
        torch.optim.ASGD,
        torch.optim.Adadelta,
        torch.optim.Adagrad,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.SGD,
    }
)
"""Optimizers that treat every element in the same way, so that one step on a packed tensor is a step on each parameter.

Subclasses are not meant: what they override may look at a parameter as a whole.
"""

# Which of torch's implementations is quickest. `fused` makes one pass over memory, where torch 2.13 has such a kernel
# and an element's last bit does not depend on its place (with momentum that of SGD fails there, on the CPU); `foreach`
# makes one call for each operation of a whole list. A packed group is a list of one tensor, for which `foreach` gains
# nothing.
_FUSED = frozenset({torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad})
_FOREACH = frozenset(
    {
        torch.optim.ASGD,
        torch.optim.Adadelta,
        torch.optim.Adamax,
        torch.optim.RAdam,
        torch.optim.Rprop,
    }
)
_QUICKER: dict[Any, Any] = {
    torch.optim.RMSprop: OnePassRMSprop,
    torch.optim.Adam: OnePassAdam,
    torch.optim.AdamW: OnePassAdamW,
}
_COMPILED = frozenset({torch.optim.Adam, torch.optim.AdamW})


_OF_PYRO: dict[Any, Any] = {
    pyro.optim.adagrad_rmsprop.AdagradRMSProp: AdagradRMSProp,
    pyro.optim.clipped_adam.ClippedAdam: ClippedAdam,
    pyro.optim.dct_adam.DCTAdam: DCTAdam,
}


def ours(constructor: Any) -> Any:
    """Returns our class of the same steps in place of one of Pyro's own optimizers, and others as they are."""
    return _OF_PYRO.get(constructor, constructor)


def without_partial(constructor: Any) -> tuple[Any, dict[str, Any]]:
    """Returns what a `functools.partial` calls and the keyword arguments that it adds; others with no arguments.

    Example:
        >>> without_partial(functools.partial(torch.optim.Adam, amsgrad=True))
        (<class 'torch.optim.adam.Adam'>, {'amsgrad': True})
    """
    if isinstance(constructor, functools.partial) and not constructor.args:
        return constructor.func, dict(constructor.keywords)
    return constructor, {}


def name_of(constructor: Any) -> str:
    """Returns what to call an optimizer's constructor in messages."""
    constructor, _ = without_partial(constructor)
    return getattr(constructor, "__name__", None) or repr(constructor)


def quicker(constructor: Any) -> Any:
    """Returns what computes the same as `constructor` in less time, given memory that it may overwrite."""
    return _QUICKER.get(constructor, constructor)


def packs(constructor: Any) -> bool:
    """Returns whether parameters may be packed into one tensor; state is then of the parameter's shape."""
    return constructor in ELEMENTWISE


def packs_exactly(param: torch.Tensor, args: Mapping[str, Any]) -> bool:
    """Returns whether a step changes an element of `param` to the same number wherever it lies in memory.

    Torch's loops on the CPU round 16-bit numbers differently in the rest of a tensor that fills no vector register, and
    its fused kernels, which the user may have asked for, do so for all.
    """
    return param.device.type != "cpu" or (param.dtype in EXACT_DTYPES and not args.get("fused"))


def shares(constructor: Any, args: Mapping[str, Any]) -> bool:
    """Returns whether several parameters may be given to one optimizer of this kind."""
    return (constructor in ELEMENTWISE or constructor is DCTAdam) and not args.get("differentiable")


def switches(
    constructor: Any, args: Mapping[str, Any], dtype: torch.dtype, device: str, listed: bool
) -> dict[str, Any]:
    """Returns further arguments that make the optimizer quick; none where the user has chosen.

    What they choose is tried against torch's plain loop before it is used, see `trial`.
    """
    if any(args.get(k) is not None for k in ("fused", "foreach")) or args.get("capturable"):
        return {}
    if dtype not in EXACT_DTYPES or (device == "cpu" and constructor in _COMPILED and has_kernel("cpu")):
        return {}

    candidates: list[dict[str, Any]] = []
    if constructor in _FUSED and (device == "cpu" or constructor is not torch.optim.Adagrad):
        candidates.append({"fused": True})
    if listed and constructor in _FOREACH | _FUSED:
        candidates.append({"foreach": True})
    return next((each for each in candidates if computes_the_same(constructor, args, each, dtype, device)), {})


def drifts(args: Mapping[str, Any]) -> bool:
    """Returns whether the optimizer changes its own hyper-parameters as it steps, as those of Pyro do for `lrd`."""
    return bool(args.get("lrd", 1.0) != 1.0)


def acts_without_gradient(constructor: Any, args: Mapping[str, Any]) -> bool:
    """Returns whether a step may change something for a parameter that has no gradient: its rate, or a user's count.

    `pyro.optim` calls the optimizer of each parameter that it is given. Torch's do nothing then.
    """
    return drifts(args) or not getattr(constructor, "__module__", "").startswith(("torch.optim", "distopt.optim"))


def check_arguments(args: Mapping[str, Any], where: str) -> None:
    """Raises ValueError when a number among the arguments of an optimizer or schedule is NaN, or a rate infinite."""
    for key, value in args.items():
        numbers = value if isinstance(value, list | tuple) else (value,)
        is_rate = key in ("lr", "gamma", "lrd")
        if any(isinstance(v, float) and (math.isnan(v) or is_rate and math.isinf(v)) for v in numbers):
            raise ValueError(f"{where}: {key} is {value!r}, expected a finite number.")


def check_constructor(constructor: Any) -> None:
    """Raises for optimizers that no per-parameter step can serve."""
    called, _ = without_partial(constructor)
    if inspect.isclass(called):
        _check_kind(called)
    if not callable(constructor):
        raise TypeError(f"optim_constructor is {constructor!r}, expected a torch.optim.Optimizer class.")


def check_built(optimizer: Any) -> None:
    """Raises for an optimizer that `check_constructor` could not see behind a function of the user's."""
    if not (hasattr(optimizer, "step") and hasattr(optimizer, "param_groups")):
        raise TypeError(f"optim_constructor returned {optimizer!r}, expected a torch.optim.Optimizer.")
    _check_kind(type(optimizer))


def _check_kind(kind: type) -> None:
    if issubclass(kind, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS needs a closure that it can call many times in one step, which an optimizer of `SVI` never has. "
            "Use Adam, or `torch.optim.LBFGS` directly on `pyro.get_param_store().named_parameters()`."
        )
