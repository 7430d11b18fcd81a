"""Gradients of many workers become one gradient: agreement on parameters, buckets, compression."""

from distopt.config.reduce import ReduceOptions
from distopt.reduce.errors import DisagreementError, DriftError, PeerError
from distopt.reduce.messages import Brought, Part, Reduced
from distopt.reduce.reducer import Reducer

__all__ = ["Brought", "DisagreementError", "DriftError", "Part", "PeerError", "ReduceOptions", "Reduced", "Reducer"]
