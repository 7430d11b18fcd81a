"""What one worker can say to the others.

`init()` is the one line that makes a script distributed; `current()` is the backend that everything else uses.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Literal, TypeAlias

from distopt.backends.base import DEFAULT_TIMEOUT, Backend, BackendError, Handle, Json, Op
from distopt.backends.single import Single
from distopt.launchers import LauncherError, RankInfo, find_launcher, find_rank

__all__ = ["Backend", "BackendError", "BackendName", "Handle", "Json", "Op", "current", "init"]

BackendName: TypeAlias = Literal["auto", "single", "torch_dist", "horovod", "mpi"]

_NAMES = ("auto", "single", "torch_dist", "horovod", "mpi")
_current: Backend | None = None


def init(backend: str = "auto", *, timeout: timedelta = DEFAULT_TIMEOUT, world_size: int | None = None) -> Backend:
    """Joins the world that this process was started in, and returns the link to it.

    A second call returns the same backend; after its `close()` a new one can be made.

    Args:
        backend: `single`, `torch_dist`, `horovod` or `mpi`; `auto` finds out from the environment who started the
            process: torchrun, Kubernetes, srun: torch_dist; horovodrun: horovod; mpirun: horovod when it was built
            with MPI, else mpi; nobody: single, or what the script itself has initialised.
        timeout: For every wait that is not given its own.
        world_size: Refuses a world of any other size, None takes what comes.

    Raises:
        BackendError: A library is missing, the ranks did not meet, or the world has another size; says what to change.

    Cost:
        Collective: all ranks call it. A second or two, for connections and the first exchange.

    Example:
        >>> backend = init("single")
        >>> backend.rank, backend.world_size
        (0, 1)
        >>> init() is backend
        True
    """
    global _current
    if backend not in _NAMES:
        raise BackendError(f"backend={backend!r}: unknown. Known: {', '.join(_NAMES)}.")
    if _current is not None and not getattr(_current, "closed", False):
        if backend not in ("auto", _current.name):
            raise BackendError(
                f"init({backend!r}): this process already uses {_current.name}. Call close() on that backend first."
            )
    else:
        _current = _start(backend, timeout)
    if world_size is not None and _current.world_size != world_size:
        found = _current.world_size
        raise BackendError(
            f"{world_size} workers were asked for, this world has {found}. Start the script through its launcher "
            "(`distopt launch`, torchrun, horovodrun, mpirun), or ask for as many as there are."
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
    if _current is not None and not getattr(_current, "closed", False):
        return _current
    adopted = _adopt(DEFAULT_TIMEOUT)
    if adopted is None:
        rank_info = _find_rank()
        if rank_info is not None and rank_info.world_size > 1:
            raise BackendError(
                f"This process was started by {rank_info.launcher} as rank {rank_info.rank} of {rank_info.world_size}, "
                "but distopt.init() was never called. Call it once, before the first step."
            )
        adopted = Single()
    _current = adopted
    return _current


def _start(backend: str, timeout: timedelta) -> Backend:
    rank_info = _find_rank()
    if backend == "auto":
        adopted = _adopt(timeout)
        if adopted is not None:
            return adopted
        backend = _choose()
    if backend == "single":
        return Single(timeout=timeout)
    if backend == "horovod":
        from distopt.backends.horovod import Horovod

        return _whole(Horovod.start(timeout=timeout), rank_info)
    if backend == "mpi":
        from distopt.backends.mpi import Mpi

        return _whole(Mpi(timeout=timeout), rank_info)
    from distopt.backends.torch_dist import TorchDist

    if rank_info is None:
        raise BackendError(
            "init('torch_dist'): no launcher's variables are in the environment. Start the script by torchrun or "
            "`distopt launch`, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."
        )
    return TorchDist.start(rank_info, timeout=timeout)


def _whole(backend: Backend, rank_info: RankInfo | None) -> Backend:
    """Refuses a world that fell apart: processes whose MPI is not their launcher's each find themselves alone."""
    if rank_info is None or rank_info.world_size == backend.world_size:
        return backend
    found = backend.world_size
    backend.close()
    raise BackendError(
        f"{rank_info.launcher} started {rank_info.world_size} workers, but this one finds a world of {found} over "
        f"{backend.name}. Is that library built for the MPI whose mpirun or srun started it? Use that MPI's mpirun, or "
        "another backend."
    )


def _find_rank() -> RankInfo | None:
    """What the launcher tells this process; variables that make no sense are an error like any other of `init`."""
    try:
        return find_rank()
    except LauncherError as error:
        raise BackendError(str(error)) from error


def _choose() -> str:
    """The backend that the launcher's processes can use."""
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
