"""Hosts from a file, as Open MPI, MPICH and horovodrun write them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_LINE = re.compile(r"^(?P<host>[^\s:]+)(?::(?P<colon>\d+)|(?:\s+\S+)*?\s+slots=(?P<slots>\d+)(?:\s+\S+)*)?$")


def read_hostfile(path: Path) -> dict[str, int | None]:
    """Returns the hosts of a file with the number of slots of each, None where it is not said.

    A line is `name`, `name:4` or `name slots=4`; `#` starts a comment.

    Raises:
        ValueError: The file cannot be read, or a line is none of these.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"hostfile: {path} cannot be read: {error}") from None
    found: dict[str, int | None] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        match = _LINE.match(text)
        if text and match is None:
            raise ValueError(f"hostfile: {path}:{number}: found {text!r}, expected `name`, `name:4` or `name slots=4`")
        if match is not None:
            slots = match["colon"] or match["slots"]
            found[match["host"]] = int(slots) if slots else None
    if not found:
        raise ValueError(f"hostfile: {path} names no host")
    return found


def with_hosts(launch: dict[str, Any]) -> dict[str, Any]:
    """Returns the `launch` section with the hosts of its hostfile in place of it; refuses more processes than slots."""
    path = launch["hostfile"]
    if launch.get("hosts"):
        raise ValueError("hostfile: found hosts too; give one of them")
    hosts, workers = read_hostfile(Path(path)), launch.get("workers", 1)
    for host, slots in hosts.items():
        if slots is not None and isinstance(workers, int) and workers > slots and not launch.get("oversubscribe"):
            raise ValueError(
                f"workers: found {workers}, but {host} has {slots} slots in {path}; "
                f"set launch.workers={slots}, or launch.oversubscribe=true to let them share"
            )
    return {**launch, "hosts": list(hosts), "hostfile": None}
