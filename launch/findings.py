"""What checks and `distopt doctor` report: one type for both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """One thing that was examined.

    Checks before a launch return only what is wrong, `distopt doctor` also what is well.

    Attributes:
        subject: Where it is: a key of the YAML, a host, a package.
        message: What was found, and where that is not obvious what was expected.
        fix: The edit or command that fixes it; empty where nothing is to be done.
        severity: A `failure` keeps a run from working, a `warning` may.

    Example:
        >>> print(Finding("launch.port", "80 is in use", "set launch.port=null"))
        launch.port: 80 is in use; set launch.port=null
    """

    subject: str
    message: str
    fix: str = ""
    severity: Severity = "failure"

    def __str__(self) -> str:
        separator = "\n  " if "\n" in self.message else "; "
        return separator.join(filter(None, [f"{self.subject}: {self.message}", self.fix]))


def failures(findings: Iterable[Finding]) -> list[Finding]:
    """Returns those that keep a run from working."""
    return [finding for finding in findings if finding.severity == "failure"]
