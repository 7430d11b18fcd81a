"""What a worker writes of the error that ends it, for its supervisor: the cause of a failed run, and whether it heals.

The supervisor sees how a process ends, and from outside a rank that raised looks like one that was only told. The
worker knows whether the error was its own or another rank's, when it was raised, and whether it would happen again.
Standard library only: the launcher reads this as well.
"""

from __future__ import annotations

import json
import os
import re
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distopt.launchers import ERROR_FILE_VARIABLE

MAX_TEXT = 500  # characters of an error's message


@dataclass(frozen=True)
class WorkerError:
    """The error that ended a worker.

    Attributes:
        text: The exception's type and the first line of its message.
        location: The last line of the user's code that it passed through, as `file:line in function`.
        time: When it was recorded, in seconds since the epoch, on the worker's host.
        from_peer: Whether it tells of another rank: of its error, or that it is gone.
        permanent: Whether a restart would end in the same way.
        resumed_from: The step of the checkpoint that the worker began from; None where that is not known.
        may_pass: Whether it is of a connection, a service or a disk, and may be gone after minutes.
    """

    text: str
    location: str
    time: float
    from_peer: bool = False
    permanent: bool = False
    resumed_from: int | None = None
    may_pass: bool = False

    @property
    def is_memory(self) -> bool:
        """Whether the worker ran out of memory."""
        return "MemoryError" in self.text or "out of memory" in self.text.lower()

    def repeats(self, other: WorkerError) -> bool:
        """Returns whether it is the error of an earlier attempt again, at the same place, with no checkpoint between.

        Of a script it is not known whether it has made progress, so its errors never are. Nor are those of a service
        that may be down for longer than a restart takes.
        """
        if self.from_peer or self.is_memory or self.may_pass or self.resumed_from is None:
            return False
        mine = (self.text, self.location, self.resumed_from)
        return mine == (other.text, other.location, other.resumed_from)


# Errors are told apart by the names of their classes and of those they derive from: nothing is imported for it. What
# may be gone when the same is tried again is of files and connections, of memory and devices, and of ranks that are
# lost. A run that has taken a step has shown that its configuration and its code work, so others are permanent only
# before that. In doubt an error may heal: one that does not comes again, and `repeats` tells.
_NEVER_HEALS = frozenset({"ConfigError", "ConfigMismatchError", "ImportError", "LauncherError", "SyntaxError"})
_MAY_HEAL = frozenset(
    {"MemoryError", "BackendError", "PeerError", "CheckpointError", "OutOfMemoryError", "AcceleratorError"}
)
_OF_DEVICES = re.compile(
    r"CUDA|cuDNN|cu(blas|solver|sparse|fft|rand)|HIP error|NCCL|out of memory|(can't|cannot) allocate memory", re.I
)
_ON_GPU = re.compile(r"cuda:\d+")  # the name of a device, in messages of mistakes too

# Clients of stores, databases and services have errors of their own, few of which derive from OSError; so do torch and
# Horovod for the connections between ranks, of which a script hears without distopt.
_OF_SERVICES = re.compile(
    r"Timeout|Connect|Network|Unavailable|HTTP|Throttl|OperationalError|RpcError|ClientError|ServerError|APICallError|"
    r"CommError|DistError|HorovodInternalError|BrokenExecutor"
)
_OF_CONNECTIONS = re.compile(
    r"connection (was )?(closed|reset|refused|lost)|timed out|(socket|wait) timeout|broken pipe|too many open files|"
    r"no space left|"
    r"DataLoader worker \(pid|shared memory",
    re.I,
)
_OF_LOADING = re.compile(r"input/output error|stale file handle|cannot allocate memory", re.I)  # also by `dlopen`
_OF_PATHS = frozenset({"FileNotFoundError", "PermissionError", "IsADirectoryError", "NotADirectoryError"})


def is_permanent(error: BaseException, *, in_first_step: bool) -> bool:
    """Returns whether a restart would end in the same error.

    Args:
        error: What has ended a worker.
        in_first_step: Whether the ranks had met and had taken no step since.

    Example:
        >>> is_permanent(TypeError("unexpected keyword argument"), in_first_step=True)
        True
        >>> is_permanent(ConnectionResetError(), in_first_step=True), is_permanent(ValueError(), in_first_step=False)
        (False, False)
    """
    causes, handled = _behind(error)
    if not isinstance(error, Exception) or any(map(_may_heal, handled)):
        return False
    for each in causes:  # a ConfigError of a file that could not be read may heal
        if _never_heals(each):
            return True
        if _may_heal(each):
            return False
    return in_first_step


def _names(error: BaseException) -> set[str]:
    return {base.__name__ for base in type(error).__mro__}


def _never_heals(error: BaseException) -> bool:
    names = _names(error)
    # A library on a network's disk that cannot be read at the moment is an ImportError, and no OSError, of the loader.
    return bool(names & _NEVER_HEALS) and not ("ImportError" in names and message_may_pass(str(error)))


def _may_heal(error: BaseException) -> bool:
    names = _names(error)
    if _never_heals(error):
        return False
    is_of_device = _OF_DEVICES.search(_ON_GPU.sub("", str(error))) is not None
    return bool(names & _MAY_HEAL) or "OSError" in names or is_of_device or _may_pass(error)


def message_may_pass(text: str) -> bool:
    """Returns whether an error's message tells of a connection, a disk or memory, which may be there later."""
    return _OF_CONNECTIONS.search(text) is not None or _OF_LOADING.search(text) is not None


def _may_pass(error: BaseException) -> bool:
    """Returns whether an error is of a connection, a service or a disk: it may be gone after minutes."""
    names = _names(error)
    if "OSError" in names:
        return not names & _OF_PATHS
    return any(map(_OF_SERVICES.search, names)) or message_may_pass(str(error))


def _behind(error: BaseException) -> tuple[list[BaseException], list[BaseException]]:
    """Returns what an error was raised from, from the first one to itself, and what else was being handled then."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None and cause not in causes:
        causes.append(cause)

    handled: list[BaseException] = []
    last = causes[-1]
    while not last.__suppress_context__ and last.__context__ is not None and last.__context__ not in handled:
        last = last.__context__
        handled.append(last)
    return causes[::-1], handled


def record_error(
    error: BaseException, *, from_peer: bool = False, permanent: bool = False, resumed_from: int | None = None
) -> None:
    """Writes the error that ends this worker where its supervisor reads it; the first one counts.

    Nothing is raised: a disk that is full must not hide the error.
    """
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if not path:
        return
    lines = str(error).splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__
    causes, handled = _behind(error)
    mine = WorkerError(
        text[:MAX_TEXT],
        _location(error),
        time.time(),
        from_peer,
        permanent,
        resumed_from,
        may_pass=any(map(_may_pass, [*causes, *handled])),
    )
    try:
        with open(path, "x", encoding="utf-8") as file:
            json.dump(asdict(mine), file)
    except OSError:
        return


def read_error(path: Path) -> WorkerError | None:
    """Returns what a worker has written; None where it has written nothing, or was killed over it."""
    try:
        return parse_error(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def parse_error(fields: Any) -> WorkerError | None:
    """Returns the error of these JSON values; None for those of another version."""
    try:
        return WorkerError(**fields)
    except TypeError:
        return None


def _location(error: BaseException) -> str:
    """Returns where the innermost frame of code is that belongs to no installed package; else the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if not _is_installed(frame.filename)]
    for frame in reversed(users or frames):
        return f"{frame.filename}:{frame.lineno} in {frame.name}"
    return ""


def _is_installed(filename: str) -> bool:
    package = str(Path(__file__).parent)
    return "site-packages" in filename or filename.startswith(("<", package))
