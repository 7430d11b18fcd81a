"""The platforms: each renders a plan for a launcher or a cluster that is there.

`launch.platform` names one of those below, or a platform of the user's as `module:Name`; `Platform` has an example.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module

from distopt.config import ConfigError, RunConfig
from distopt.config.plugins import is_reference, load_subclass

from ..findings import Finding
from ..jobs import JobError
from ..plan import Plan
from .base import Platform

__all__ = ["PLATFORMS", "Platform", "findings_of", "load_platform", "plan_of"]

KEY = "launch.platform"

PLATFORMS: Mapping[str, str] = {
    "local": ".local:LocalPlatform",
    "torchrun": ".torchrun:TorchrunPlatform",
    "horovodrun": ".horovodrun:HorovodrunPlatform",
    "mpirun": ".mpirun:MpirunPlatform",
    "slurm": ".slurm.platform:SlurmPlatform",
    "kubernetes": ".kubernetes.platform:KubernetesPlatform",
}
"""What the plain names of `launch.platform` stand for; a module is imported when its platform is chosen."""


def load_platform(name: str) -> Platform:
    """Returns the platform that `launch.platform` names, one of `PLATFORMS` or `module:Name`.

    Raises:
        ConfigError: `module:Name` cannot be imported, or is no subclass of `Platform` with all that it requires.
    """
    if is_reference(name):
        return _load_users(name)
    module, _, class_name = PLATFORMS[name].partition(":")
    platform: Platform = getattr(import_module(module, __package__), class_name)()
    return platform


def _load_users(reference: str) -> Platform:
    # `python -m distopt.launch` and the workers search the current folder first, the script `distopt` does not.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    with _errors_of_users(reference, "loading it"):
        return load_subclass(reference, KEY, Platform)()


def findings_of(check: Callable[[RunConfig], Iterable[Finding]], config: RunConfig) -> list[Finding]:
    """Returns what `check`, `check_machine` or `check_hosts` of a platform finds.

    Raises:
        ConfigError: A platform of the user's failed, or returned something else.
    """
    name = check.__name__
    with _errors_of_users(config.launch.platform, name):
        findings = check(config)
        listed = list(findings) if isinstance(findings, Iterable) else [findings]
    _check_type(config, name, "an iterable of distopt.launch.findings.Finding", listed, Finding)
    return listed


def plan_of(platform: Platform, config: RunConfig) -> Plan:
    """Returns `platform.plan`.

    Raises:
        ConfigError: A platform of the user's failed, or returned something else.
    """
    with _errors_of_users(config.launch.platform, "plan"):
        plan = platform.plan(config)
    _check_type(config, "plan", "a distopt.launch.plan.Plan", [plan], Plan)
    return plan


def _check_type(config: RunConfig, method: str, expected: str, returned: Sequence[object], kind: type) -> None:
    for each in returned:
        if not isinstance(each, kind):
            raise ConfigError([f"{KEY}: {method}() of {config.launch.platform} returned {each!r}, expected {expected}"])


# An exception in code of the user's is shown as other mistakes are, in one line with its place in that code. One in a
# platform that ships is a defect of distopt, which is reported with its traceback.


@contextmanager
def _errors_of_users(name: str, action: str) -> Iterator[None]:
    try:
        yield
    except (ConfigError, JobError):
        raise
    except Exception as error:
        if not is_reference(name):
            raise
        what = traceback.format_exception_only(error)[-1].strip()
        raise ConfigError([f"{KEY}: {name}: {action} failed at {_where(error, name)}: {what}"]) from error


def _where(error: Exception, reference: str) -> str:
    """Returns file and line of the user's module that an error came from, or of what it called."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    module = sys.modules.get(reference.partition(":")[0])
    users = [frame for frame in frames if module is not None and frame.filename == module.__file__]
    frame = (users or frames)[-1]
    return f"{frame.filename}:{frame.lineno}"
