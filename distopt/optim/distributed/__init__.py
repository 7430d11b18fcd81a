"""Optimizers that average gradients over all workers before they step."""

from distopt.config.reduce import ReduceOptions
from distopt.optim.distributed.multi import DistributedMultiOptimizer
from distopt.optim.distributed.optimizer import DistributedOptimizer
from distopt.optim.distributed.stepping import StepInfo
from distopt.optim.distributed.wrappers import DDPOptimizer, HorovodOptimizer

__all__ = [
    "DDPOptimizer",
    "DistributedMultiOptimizer",
    "DistributedOptimizer",
    "HorovodOptimizer",
    "ReduceOptions",
    "StepInfo",
]
