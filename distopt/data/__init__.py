"""Which rows this worker reads next, and how it reads them."""

from distopt.data.batches import GlobalBatches
from distopt.data.loading import Loader, ShardBatches, shard_batches, shard_rows
from distopt.data.sources import ArraySource, DatasetSource, JoinedSource, Source, SparseSource, TensorSource

__all__ = [
    "ArraySource",
    "DatasetSource",
    "GlobalBatches",
    "JoinedSource",
    "Loader",
    "ShardBatches",
    "Source",
    "SparseSource",
    "TensorSource",
    "shard_batches",
    "shard_rows",
]
