"""Which MPI Horovod was built for, read from its binary, since importing it takes seconds and could abort."""

from __future__ import annotations

import mmap
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

# The names under which the two families of MPI keep their library compatible.
_FAMILIES: tuple[tuple[bytes, Literal["Open MPI", "MPICH"]], ...] = (
    (b"\0libmpi.so.40\0", "Open MPI"),
    (b"\0libmpi.so.12\0", "MPICH"),
)

BUILD_HOROVOD = "tools/build_horovod.py"
Mpi = Literal["Open MPI", "MPICH", "none"]


def mpi_of_horovod() -> Mpi | None:
    """Returns the MPI that Horovod's library needs, `none` where it was built without, None without Horovod."""
    spec = find_spec("horovod")
    if spec is None or not spec.submodule_search_locations:
        return None
    for folder in spec.submodule_search_locations:
        for library in Path(folder, "torch").glob("mpi_lib_v2*.so"):
            with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as binary:
                return next((family for name, family in _FAMILIES if binary.find(name) >= 0), "none")
    return None
