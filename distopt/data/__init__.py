"""Which rows this worker reads next."""

from distopt.data.batches import GlobalBatches

__all__ = ["GlobalBatches"]
