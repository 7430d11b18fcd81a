"""What distribution changes in inference."""

from distopt.infer.capture import TensorRows, explain_capture
from distopt.infer.everywhere import everywhere
from distopt.infer.gathering import gather_local, gather_rows, read_local, write_local
from distopt.infer.predictive import predictive
from distopt.infer.sharded_plate import shard, sharded_plate
from distopt.infer.svi import SVI
from distopt.rng import NoisePolicy, rank_seed, seed_all
from distopt.sharding import LocalParameterError

__all__ = [
    "SVI",
    "LocalParameterError",
    "NoisePolicy",
    "TensorRows",
    "everywhere",
    "explain_capture",
    "gather_local",
    "gather_rows",
    "predictive",
    "rank_seed",
    "read_local",
    "seed_all",
    "shard",
    "sharded_plate",
    "write_local",
]
