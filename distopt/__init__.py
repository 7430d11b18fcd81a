"""distopt: distributed training for probabilistic models written in Pyro.

Importing this package is cheap: torch and pyro are imported when a name that needs them is first used, so that the
launcher starts at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distopt.backends import Backend, init
    from distopt.train import load_run

__all__ = ["Backend", "init", "load_run", "__version__"]

_HOME = {"Backend": "distopt.backends", "init": "distopt.backends", "load_run": "distopt.train"}
_PACKAGES = ("backends", "checkpoint", "config", "data", "infer", "optim", "reduce", "train")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # costs more than everything else here

        return version("distopt")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _PACKAGES:
        return import_module(f"distopt.{name}")
    raise AttributeError(f"module 'distopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PACKAGES])
