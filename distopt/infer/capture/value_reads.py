"""What no operation of torch's dispatcher shows: values that Python reads, and memory that is handed out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from distopt.infer.capture.callers import is_elbo, is_warning
from distopt.infer.capture.recorder import Recorder

_READS = frozenset(
    {
        torch.Tensor.item,
        torch.Tensor.__float__,
        torch.Tensor.__int__,
        torch.Tensor.__index__,
        torch.Tensor.__complex__,
        torch.Tensor.__contains__,
        torch.Tensor.__repr__,
        torch.Tensor.__format__,
        torch.Tensor.__array__,
        torch.Tensor.__deepcopy__,
        torch.Tensor.__reduce_ex__,
        torch.Tensor.__dlpack__,
        torch.Tensor.numpy,
        torch.Tensor.tolist,
    }
)
"""Functions of a tensor that hand its values to Python."""

_MEMORY = frozenset(
    {torch.Tensor.data_ptr, torch.Tensor.untyped_storage, torch.Tensor.storage, torch.Tensor._typed_storage}
)
"""Functions that hand out the memory itself, through which code could read and write unseen."""

_SETTERS: tuple[Any, ...] = (torch.Tensor.data, torch.Tensor.grad)
_UNSEEN_WRITES = frozenset(
    {torch.Tensor.apply_, torch.Tensor.map_, torch.Tensor.map2_, *(each.__set__ for each in _SETTERS)}
)
"""Functions that change a tensor without an operation of the dispatcher."""


class ValueReads(TorchFunctionMode):
    """What does not reach the dispatcher: values that Python reads, above all the numbers that an ELBO sums up."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Reads by Pyro's ELBOs and warnings are harmless; all others are the model's.
        if function is torch.Tensor.item and is_elbo(sys._getframe(1)):
            # The ELBO sums Python floats, that is doubles: the same sum of tensors of one double each is as exact.
            tensor = args[0].detach()
            return tensor.double() if tensor.is_floating_point() else function(*args, **kwargs)
        if function in (torch.Tensor.__bool__, torch.Tensor.is_nonzero) and is_warning():
            return False

        if function in _READS:
            self._recorder.read(args[0], f".{function.__name__}()")
        elif function in _MEMORY:
            self._recorder.refuse(f".{function.__name__}() hands out a tensor's memory")
        elif function in _UNSEEN_WRITES:
            self._recorder.refuse(
                "a tensor is changed by no operation (.apply_(), .map_(), or .data or .grad assigned)"
            )
        elif function is torch.Tensor.backward:
            return _backward(self, *args, **kwargs)
        return function(*args, **kwargs)


def _backward(
    mode: ValueReads,
    tensor: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    # Modes are off within a function that they handle, but hooks and backward functions read values too.
    with mode:
        torch.autograd.backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)
