"""What distribution changes in inference."""

from distopt.infer.gathering import gather, gather_rows, read_local, write_local
from distopt.infer.noise import seed_noise
from distopt.infer.sharded import shard, sharded_plate
from distopt.infer.svi import SVI
from distopt.reduce.local import LocalParameterError
from distopt.reduce.noise import NoisePolicy, noise_seed

__all__ = [
    "SVI",
    "LocalParameterError",
    "NoisePolicy",
    "gather",
    "gather_rows",
    "noise_seed",
    "read_local",
    "seed_noise",
    "shard",
    "sharded_plate",
    "write_local",
]
