"""Gradients of many workers become one gradient: agreement on parameters, buckets, communication hooks."""

from distopt.config.reduce import ReduceOptions
from distopt.reduce.comm_hooks import CommHook
from distopt.reduce.errors import DisagreementError, DriftError, PeerError
from distopt.reduce.gradients import LocalGradients, ReducedGradients
from distopt.reduce.layout import Bucket
from distopt.reduce.messages import RoundSummary
from distopt.reduce.reducer import Reducer

__all__ = [
    "Bucket",
    "CommHook",
    "DisagreementError",
    "DriftError",
    "LocalGradients",
    "PeerError",
    "ReduceOptions",
    "ReducedGradients",
    "Reducer",
    "RoundSummary",
]
