"""Gradients of many workers become one gradient: agreement on parameters, buckets, compression."""

from distopt.reduce.errors import DisagreementError, DriftError, PeerError
from distopt.reduce.reducer import Brought, Part, Reduced, Reducer
from distopt.reduce.settings import Settings

__all__ = ["Brought", "DisagreementError", "DriftError", "Part", "PeerError", "Reduced", "Reducer", "Settings"]
