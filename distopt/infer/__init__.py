"""What distribution changes in inference."""

from distopt.infer.capture import explain_capture
from distopt.infer.gathering import gather, gather_rows, read_local, write_local
from distopt.infer.sharded_plate import shard, sharded_plate
from distopt.infer.svi import SVI
from distopt.rng import NoisePolicy, noise_seed, seed_noise
from distopt.sharding import LocalParameterError

__all__ = [
    "SVI",
    "LocalParameterError",
    "NoisePolicy",
    "explain_capture",
    "gather",
    "gather_rows",
    "noise_seed",
    "read_local",
    "seed_noise",
    "shard",
    "sharded_plate",
    "write_local",
]
