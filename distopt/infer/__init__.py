"""What distribution changes in inference."""

from distopt.infer.gathering import gather, gather_rows, read_local, write_local
from distopt.infer.sharded import shard, sharded_plate
from distopt.reduce.local import LocalParameterError

__all__ = [
    "LocalParameterError",
    "gather",
    "gather_rows",
    "read_local",
    "shard",
    "sharded_plate",
    "write_local",
]
