"""Arguments of the optimizer for each parameter: one dict for all, a callable, or patterns of names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from pyro.params.param_store import module_from_param_with_module_name, normalize_param_name, user_param_name

# What pyro.optim calls optim_args and clip_args. A callable is asked once for each parameter, when it is first seen.
Args: TypeAlias = Mapping[str, Any] | Callable[..., Mapping[str, Any]]


def check_args(what: str, args: Any) -> None:
    """Raises TypeError unless `args` is a dict or a callable."""
    if not callable(args) and not isinstance(args, Mapping):
        raise TypeError(f"{what} is {args!r}, expected a dict, or a callable that returns one for a name.")


def num_arguments(function: Callable[..., Any]) -> int:
    """Returns how many arguments `function` declares; 1 for a builtin that tells nothing, such as `dict.get`."""
    try:
        return len(inspect.signature(function).parameters)
    except ValueError:
        return 1


def args_for(what: str, args: Args, name: str) -> dict[str, Any]:
    """Returns the arguments for parameter `name`.

    Args:
        what: "optim_args" or "clip_args", for the message.
        args: A dict; or a callable, given `name` as `nn.Module.named_parameters` has it (one argument), or module name
            and parameter name (two arguments).
        name: In the parameter store.
    """
    if not callable(args):
        return dict(args)
    if num_arguments(args) == 1:
        result = args(normalize_param_name(name))
    else:
        result = args(module_from_param_with_module_name(name), user_param_name(name))
    if not isinstance(result, Mapping):
        raise TypeError(f"{what}({name!r}) returned {result!r}, expected a dict of arguments.")
    return dict(result)


def by_name(default: Mapping[str, Any], patterns: Mapping[str, Mapping[str, Any]]) -> Callable[[str], dict[str, Any]]:
    """Returns `optim_args` (or `clip_args`) that depend on the parameter's name.

    Args:
        default: Arguments of every parameter.
        patterns: Further arguments by shell pattern (`*`, `?`, `[...]`) of the name, in the form of
            `nn.Module.named_parameters`. All that match apply, later ones over earlier ones.

    Example:
        >>> args = by_name({"lr": 1e-3}, {"*.bias": {"weight_decay": 0.0}, "AutoNormal.scales.*": {"lr": 1e-2}})
        >>> args("AutoNormal.scales.z")
        {'lr': 0.01}
    """

    def args_of(name: str) -> dict[str, Any]:
        args = dict(default)
        for pattern, more in patterns.items():
            if fnmatchcase(name, pattern):
                args.update(more)
        return args

    return args_of
