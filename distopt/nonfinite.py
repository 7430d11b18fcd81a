"""Whether numbers are finite, asked of gradients that ranks step by and of state that is saved."""

from __future__ import annotations

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Returns whether a tensor, dense or sparse, holds neither NaN nor infinity; one pass over it, and no copy.

    Example:
        >>> is_finite(torch.tensor([1.0, 3e38, 3e38])), is_finite(torch.tensor([0.0, float("nan")]))
        (True, False)
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    values = tensor._values() if tensor.is_sparse else tensor
    if values.dtype.itemsize == 1:  # fp8, which has no arithmetic
        values = values.float()
    # A finite sum has finite terms, and takes no copy as isfinite() does; the sum alone may overflow.
    return bool(torch.isfinite(values.sum()) or torch.isfinite(values).all())
