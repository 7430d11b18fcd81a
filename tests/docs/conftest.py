"""Says at the end of a run how many blocks of README and docs ran."""

from __future__ import annotations

import sys


def pytest_terminal_summary(terminalreporter):
    blocks = sys.modules.get("tests.docs.blocks")
    if blocks is not None:
        terminalreporter.write_line(blocks.summary())
