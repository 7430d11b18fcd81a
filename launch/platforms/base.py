"""The contract that every platform fulfils."""

from __future__ import annotations

from typing import Protocol

from distopt.config import RunConfig

from ..plan import Plan


class Platform(Protocol):
    """One way to start workers. Rendering comes first and touches nothing; what was rendered is then submitted."""

    def problems(self, config: RunConfig) -> list[str]:
        """Returns what would keep this platform from starting the run, each with its mend; empty when all is well."""

    def plan(self, config: RunConfig) -> Plan:
        """Returns the commands and files that start the run."""
