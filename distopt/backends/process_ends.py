"""Which processes share this machine, and whether they are still there."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def this_process() -> str:
    """Returns a name that no other process has, on any machine; empty where the system has no /proc."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):  # it shows the processes of another namespace
            return ""
        return f"{_pid_namespace()} {os.getpid()} {_started_at(os.getpid())}"
    except OSError:
        return ""


def has_ended(name: str) -> bool:
    """Returns whether the process of that name has ended, as far as it can be seen from here.

    Args:
        name: What `this_process` returned there. Of another machine or container nothing is known: False.
    """
    try:
        namespace, pid, started_at = name.rsplit(maxsplit=2)
        if namespace != _pid_namespace():
            return False
        os.kill(int(pid), 0)  # says that it is gone even where other processes are hidden in /proc
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        return False
    with suppress(OSError):
        return _started_at(int(pid)) != started_at
    return False


def namespaces() -> str:
    """Returns what processes have in common that see each other and share a network; empty without /proc."""
    try:
        return f"{_pid_namespace()} {os.readlink('/proc/self/ns/net')}"
    except OSError:
        return ""


def _pid_namespace() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _started_at(pid: int) -> str:
    """Returns the clock ticks from the start of the machine to that of a process; "ended" for one that has."""
    # The name, in brackets, may have spaces and brackets itself. See proc(5): the state is field 3, the start field 22.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return "ended" if fields[0] in "ZX" else fields[19]
