"""Code that a configuration names as `module:Name`: what such a name looks like, whether it is trusted, and its import.

A plain name stands for something that distopt, Pyro or torch ships; `mypackage.module:MyClass` stands for a class or
function of the user. Importing a module runs it, so a configuration with such a name is code. Two checks apply to every
key that accepts one, because all of them have the type `Reference`: a module of the standard library is refused
(`os:system`), and if the user's environment names packages in `DISTOPT_TRUSTED_TASKS`, all other packages are refused.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field

from distopt.config.base import ConfigError
from distopt.launchers import TRUSTED_VARIABLE

T = TypeVar("T")

REFERENCE_PATTERN = r"^[^\W\d_]\w*(\.[^\W\d]\w*)*:[^\W\d_]\w*$"  # letters of any language, as in Python


def trusted_packages() -> list[str]:
    """Returns the packages that the environment declares as trusted; an empty list trusts all."""
    return os.environ.get(TRUSTED_VARIABLE, "").replace(",", " ").split()


def _check_trusted(reference: str) -> str:
    """Returns `reference`, or raises a ValueError if its module must not be imported."""
    module = reference.partition(":")[0]
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(
            f"found {reference}, but {module} belongs to Python's standard library; name a class of your own"
        )

    trusted = trusted_packages()
    if trusted and not any(module == package or module.startswith(f"{package}.") for package in trusted):
        raise ValueError(
            f"found {reference}, but your {TRUSTED_VARIABLE} allows only code of {', '.join(trusted)}; "
            "add its package there if you trust it"
        )
    return reference


# The checks are in the type and not in a list of keys, so that a key that is added later cannot be left out of them.
Reference = Annotated[str, Field(pattern=REFERENCE_PATTERN), AfterValidator(_check_trusted)]
"""The type of a configuration key that holds `module:Name`."""


def is_reference(name: str) -> bool:
    """Returns whether `name` is `module:Name`, code of the user, and not the plain name of something shipped."""
    return ":" in name


def load_reference(reference: str, key: str) -> Callable[..., Any]:
    """Imports the class or function that `module:Name` stands for.

    Args:
        reference: The name; its module is imported if it is not yet.
        key: The configuration key that holds it, for errors.

    Raises:
        ConfigError: There is no such module, it has no such name, or that is neither a class nor a function. Errors
            that the module itself raises while it is imported are not caught: their traceback shows where they are.

    Example:
        >>> load_reference("torch.optim:SGD", "optim.name")
        <class 'torch.optim.sgd.SGD'>
        >>> load_reference("torch.optim:SDG", "optim.name")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        distopt.config.base.ConfigError: ... torch.optim has no SDG; did you mean SGD?
    """
    module_name, _, name = reference.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            fix = f"install {error.name} where the workers run"
        else:
            fix = "check the spelling, that it is installed here, or run the command from the folder that contains it"
        raise ConfigError([f"{key}: found {reference}, but importing {module_name} failed: {error}; {fix}"]) from error

    names = sorted(each for each, value in vars(module).items() if callable(value) and not each.startswith("_"))
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]}?" if near else f"it has: {', '.join(names[:20])}"
        raise ConfigError([f"{key}: found {reference}, but {module_name} has no {name}; {hint}"])

    value: Callable[..., Any] = getattr(module, name)
    if not callable(value):
        kind = type(value).__name__
        raise ConfigError([f"{key}: found {reference}, which is of type {kind}, expected a class or a function"])
    return value


def load_subclass(reference: str, key: str, base: type[T]) -> type[T]:
    """Imports the class that `module:Name` stands for, and checks that it fulfils a contract.

    Args:
        reference: The name.
        key: The configuration key that holds it, for errors.
        base: The contract, an abstract base class.

    Raises:
        ConfigError: As for `load_reference`; or it is no subclass of `base`, or lacks methods that `base` requires.
    """
    loaded = load_reference(reference, key)
    contract = f"{base.__module__.removesuffix('.base')}.{base.__qualname__}"
    if not (isinstance(loaded, type) and issubclass(loaded, base)):
        raise ConfigError([f"{key}: found {reference}, expected a subclass of {contract}"])
    missing = sorted(getattr(loaded, "__abstractmethods__", ()))
    if missing:
        raise ConfigError([f"{key}: {reference} lacks methods that {contract} requires: {', '.join(missing)}"])
    return loaded
