"""Gradients of many workers become one gradient: agreement on parameters, buckets, compression."""

from distopt.reduce.errors import DisagreementError, DriftError, PeerError
from distopt.reduce.parts import Brought, Part, Reduced
from distopt.reduce.reducer import Reducer
from distopt.reduce.settings import Settings

__all__ = ["Brought", "DisagreementError", "DriftError", "Part", "PeerError", "Reduced", "Reducer", "Settings"]
