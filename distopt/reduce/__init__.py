"""Gradients of many workers become one gradient: agreement on parameters, buckets, compression."""

from distopt.reduce.errors import DisagreementError, DriftError, PeerError
from distopt.reduce.messages import Brought, Part, Reduced
from distopt.reduce.options import Settings
from distopt.reduce.reducer import Reducer

__all__ = ["Brought", "DisagreementError", "DriftError", "Part", "PeerError", "Reduced", "Reducer", "Settings"]
