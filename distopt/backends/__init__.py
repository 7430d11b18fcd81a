"""What one rank can say to the others.

`init()` is the one line that makes a script distributed; `current()` is the backend that everything else uses.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import timedelta
from importlib import import_module

from distopt.backends.base import DEFAULT_TIMEOUT, Backend, BackendError, Handle, Json, Op
from distopt.backends.single import Single
from distopt.config.base import ConfigError
from distopt.config.plugins import is_reference, load_subclass
from distopt.launchers import LauncherError, RankInfo, find_launcher, find_rank

__all__ = ["BACKENDS", "Backend", "BackendError", "Handle", "Json", "Op", "current", "init"]

BACKENDS: Mapping[str, str] = {
    "single": "distopt.backends.single:Single",
    "torch_dist": "distopt.backends.torch_dist:TorchDist",
    "horovod": "distopt.backends.horovod:Horovod",
    "mpi": "distopt.backends.mpi:Mpi",
}
"""The backends that have a name of their own; each is imported, with its library, when it is chosen."""

_current: Backend | None = None


def init(backend: str = "auto", *, timeout: timedelta = DEFAULT_TIMEOUT, world_size: int | None = None) -> Backend:
    """Joins the world that this process was started in, and returns the link to it.

    A second call returns the same backend; after its `close()` a new one can be made.

    Args:
        backend: `single`, `torch_dist`, `horovod` or `mpi`; or `module:Name`, a subclass of `Backend` of your own.
            `auto` takes what the script itself has initialised, else what the launcher's processes can use: torch_dist
            for torchrun, srun and Kubernetes; horovod for horovodrun; for mpirun horovod where it was built with MPI,
            else mpi; single for a process that was started by hand.
        timeout: For meeting the others, and for every wait that is not given its own.
        world_size: The number of ranks that the script needs; None accepts any.

    Raises:
        BackendError: A library is missing, the ranks did not meet, or the world has another size; says what to change.

    Cost:
        Collective: all ranks call it. It takes a second or two, for connections and the first collectives.

    Example:
        >>> backend = init("single")
        >>> backend.rank, backend.world_size
        (0, 1)
        >>> init() is backend
        True
    """
    global _current
    if not isinstance(timeout, timedelta):
        raise BackendError(f"init(timeout={timeout!r}): expected a datetime.timedelta, such as timedelta(seconds=60).")
    chosen = None if backend == "auto" else _load_backend(backend)
    if _current is None or _current.closed:
        _current = _start_auto(timeout) if chosen is None else chosen.start(_rank_info(), timeout=timeout)
    elif chosen is not None and not isinstance(_current, chosen):
        raise BackendError(
            f"init({backend!r}): this process already uses {_current.name}. Call close() on that backend first."
        )

    if world_size is not None and _current.world_size != world_size:
        raise BackendError(
            f"expected {world_size} workers, but this world has {_current.world_size}. Start {world_size} processes "
            "with a launcher (`distopt launch`, torchrun, horovodrun, mpirun), or change world_size."
        )
    return _current


def current() -> Backend:
    """Returns the backend of this process.

    The one that `init` made; else one over the `torch.distributed` or Horovod world that the script has initialised
    itself; else `single` when no launcher started the process.

    Raises:
        BackendError: A launcher started this process, and the script never called `distopt.init()`.
    """
    global _current
    if _current is not None and not _current.closed:
        return _current

    adopted = _adopt(DEFAULT_TIMEOUT)
    if adopted is None:
        rank_info = _rank_info()
        if rank_info is not None and rank_info.world_size > 1:
            raise BackendError(
                f"This process was started by {rank_info.launcher} as rank {rank_info.rank} of {rank_info.world_size}, "
                "but distopt.init() was never called. Call it once, before the first step."
            )
        adopted = Single()
    _current = adopted
    return _current


def _rank_info() -> RankInfo | None:
    """What the launcher told this process; variables that make no sense are an error like any other of `init`."""
    try:
        return find_rank()
    except LauncherError as error:
        raise BackendError(str(error)) from error


def _load_backend(name: str) -> type[Backend]:
    """The class that a name or `module:Name` stands for."""
    if name not in BACKENDS and not is_reference(name):
        raise BackendError(
            f"backend={name!r}: unknown. Known: auto, {', '.join(BACKENDS)}, or module:Name for a backend of your own."
        )
    if not is_reference(name):
        module, _, class_name = BACKENDS[name].partition(":")
        shipped: type[Backend] = getattr(import_module(module), class_name)
        return shipped

    try:
        return load_subclass(name, "backend", Backend)
    except ConfigError as error:
        raise BackendError(str(error)) from error


def _start_auto(timeout: timedelta) -> Backend:
    adopted = _adopt(timeout)
    if adopted is not None:
        return adopted
    return _load_backend(_choose_backend()).start(_rank_info(), timeout=timeout)


def _choose_backend() -> str:
    """The name of the backend that the launcher's processes can use."""
    launcher = find_launcher()
    if launcher is None:
        return "single"
    if launcher.backend != "mpi":
        return launcher.backend

    try:
        import horovod.torch as hvd
    except ImportError:
        return "mpi"
    return "horovod" if hvd.mpi_built() else "mpi"


def _adopt(timeout: timedelta) -> Backend | None:
    """A backend over what the script has initialised itself, if it has."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        from distopt.backends.torch_dist import TorchDist

        return TorchDist.adopt(timeout=timeout)

    hvd = sys.modules.get("horovod.torch")
    if hvd is not None and hvd.is_initialized():
        from distopt.backends.horovod import Horovod

        return Horovod(timeout=timeout)
    return None
