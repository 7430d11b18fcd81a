"""Named points of the write protocol where a test can end the process or make a step fail.

`DISTOPT_FAILPOINT=after_prepare:rank1:kill` ends rank 1 with SIGKILL when it has announced its files. The second field
may be left out (any rank), the last is `kill`, `raise` or `hang`. Unset, a failpoint costs one dictionary look-up.
"""

from __future__ import annotations

import os
import signal
import threading

from distopt.launchers import FAILPOINT_VARIABLE

NAMES = (
    "after_snapshot",
    "after_agreement",
    "after_begin",
    "after_write",
    "after_prepare",
    "after_gather",
    "after_manifest",
    "after_publish",
    "after_acknowledge",
    "after_set_aside",
    "after_retention",
)
"""Every failpoint, in the order in which one save passes them; `after_set_aside` may also come before the commit."""


def failpoint(name: str, rank: int) -> None:
    """Does what `DISTOPT_FAILPOINT` asks for, if it names this point and this rank.

    Args:
        name: One of `NAMES`.
        rank: This rank.

    Raises:
        OSError: The environment asks for `raise`.
    """
    # Read each time: a test sets the variable between two saves of one process.
    wanted = os.environ.get(FAILPOINT_VARIABLE)
    if not wanted:
        return
    point, *ranks, action = wanted.split(":")
    if point not in NAMES:
        raise ValueError(f"{FAILPOINT_VARIABLE}={wanted}: there is no point {point!r}, known are {', '.join(NAMES)}")
    if point != name or (ranks and ranks != [f"rank{rank}"]):
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "hang":
        threading.Event().wait()
    elif action == "raise":
        raise OSError(5, f"failpoint {name}")
    else:
        raise ValueError(f"{FAILPOINT_VARIABLE}={wanted}: the action is {action!r}, known are kill, raise, hang")
