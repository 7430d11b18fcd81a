"""Communication hooks: how the gradients of one bucket are combined over the ranks.

The hooks here are named in `HOOKS`; one of your own is a subclass of `CommHook` that `ReduceOptions.compression` (in
the YAML `reduce.compression`) names as `module:Name`.
"""

from distopt.reduce.comm_hooks.base import CommHook
from distopt.reduce.comm_hooks.registry import HOOKS, make_hook

__all__ = ["HOOKS", "CommHook", "make_hook"]
