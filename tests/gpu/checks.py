"""Checks: small functions that a GPU is needed for, without pytest, since they run where little is installed."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

Figures = dict[str, Any]


class Skip(Exception):
    """A check that cannot be made here; the message says what is missing."""


@dataclass
class Result:
    """What became of one check.

    Attributes:
        suite: The suite that it belongs to.
        name: What it shows.
        status: `ok`, `failed`, `skipped` or `not run`.
        seconds: How long it took.
        detail: Why it was skipped or how it failed.
        figures: What it has measured.
    """

    suite: str
    name: str
    status: str
    seconds: float = 0.0
    detail: str = ""
    figures: Figures = field(default_factory=dict)

    def line(self) -> str:
        """Returns the result as one line of JSON."""
        return json.dumps(asdict(self))


class Suite:
    """An ordered list of checks, run in a process of its own.

    Args:
        name: The suite.
        limit_s: When it takes longer it is ended, and what has not run counts as not run.

    Example:
        >>> suite = Suite("arithmetic", 5)
        >>> @suite.check("one and one are two")
        ... def _(device):
        ...     assert torch.ones((), device=device) + 1 == 2
        >>> [result.status for result in suite.run(torch.device("cpu"))]
        ['ok']
    """

    def __init__(self, name: str, limit_s: float) -> None:
        self.name = name
        self.limit_s = limit_s
        self._checks: list[tuple[str, Callable[[torch.device], Figures | None]]] = []

    def check(self, name: str) -> Callable[[Callable[[torch.device], Figures | None]], Any]:
        """Adds a function of the device, which returns what it has measured, or raises."""

        def add(function: Callable[[torch.device], Figures | None]) -> Any:
            self._checks.append((name, function))
            return function

        return add

    def names(self) -> list[str]:
        """Returns what the checks show, in their order."""
        return [name for name, _ in self._checks]

    def run(self, device: torch.device) -> list[Result]:
        """Runs all checks; a failure of one is no end of the others."""
        return [self.run_one(name, device) for name in self.names()]

    def run_one(self, name: str, device: torch.device) -> Result:
        """Runs the check of that name."""
        function = dict(self._checks)[name]
        began = time.perf_counter()
        result = Result(self.name, name, "ok")
        try:
            result.figures = function(device) or {}
        except Skip as skip:
            result.status, result.detail = "skipped", str(skip)
        except Exception:
            result.status, result.detail = "failed", traceback.format_exc()[-3000:]
        result.seconds = time.perf_counter() - began
        return result


def need_cuda(device: torch.device, why: str) -> None:
    """Skips the check on another device than a GPU of CUDA."""
    if device.type != "cuda":
        raise Skip(f"no GPU: {why}")


def synchronize(device: torch.device) -> None:
    """Waits for all that was started on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(step: Callable[[], Any], device: torch.device, count: int = 30, warm: int = 5) -> float:
    """Returns the median time of a call in milliseconds, the device's work included."""
    for _ in range(warm):
        step()
    times = []
    for _ in range(count):
        synchronize(device)
        began = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return 1e3 * sorted(times)[count // 2]
