"""Lightning on all ranks of distopt: `Trainer(strategy="distopt", devices=W)` once this module is imported.

Example:
    >>> from lightning.pytorch.strategies import StrategyRegistry
    >>> "distopt" in StrategyRegistry
    True
"""

from lightning.pytorch.strategies import StrategyRegistry

from distopt.lightning.loaders import Split
from distopt.lightning.strategy import DistoptStrategy

__all__ = ["DistoptStrategy", "Split"]

if "distopt" not in StrategyRegistry:
    StrategyRegistry.register("distopt", DistoptStrategy, description="SVIs and optimizers on all ranks")
