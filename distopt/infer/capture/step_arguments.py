"""A step's arguments: the key by which steps are told apart, and whether a step has changed what it was given."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from distopt.infer.capture.comparisons import is_plain
from distopt.infer.capture.recording import TensorInfo


def key_of(model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Returns a key of everything about the arguments but tensors' values, and the tensors, each once.

    Objects count by their identity, and what they hold is an assumption of the program. (None, reason) where an
    argument can be compared in neither way.
    """
    # Tensors are numbered, each object once: f(x, x) is another step than f(x, y), since x has one slot.
    leaves, structure = tree_flatten((args, kwargs))
    tensors: dict[Tensor, int] = {}
    components: list[Any] = [model, guide, structure]
    for leaf in leaves:
        if type(leaf) in (Tensor, torch.nn.Parameter) and not leaf.requires_grad and leaf.layout is torch.strided:
            index = tensors.setdefault(leaf, len(tensors))
            components.append((index, TensorInfo.of(leaf)))
        elif is_plain(leaf) and not isinstance(leaf, slice):
            # repr tells -0.0 from 0.0, which are equal.
            components.append((type(leaf), repr(leaf) if isinstance(leaf, float | complex) else leaf))
        elif is_object(leaf):
            components.append(_Same(leaf))
        else:
            return None, f"an argument is a {type(leaf).__name__}"

    try:
        key = tuple(components)
        hash(key)
    except TypeError:
        return None, f"the model is a {type(model).__name__} without a hash"
    return key, list(tensors)


def is_object(leaf: Any) -> bool:
    """Returns whether an argument has attributes that the model may read."""
    return not (isinstance(leaf, Tensor | np.ndarray | slice) or is_plain(leaf) or isinstance(leaf, float))


def tensors_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Returns the tensors among the arguments, each once."""
    return list(dict.fromkeys(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)))


def views(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments in other containers, with each tensor replaced by another one with the same memory."""
    leaves, structure = tree_flatten((args, kwargs))
    fresh: dict[int, Tensor] = {}
    replaced = [fresh.setdefault(id(x), x.detach()) if isinstance(x, Tensor) else x for x in leaves]
    viewed: tuple[tuple[Any, ...], dict[str, Any]] = tree_unflatten(replaced, structure)
    return viewed


class Given:
    """What arguments look like before a step, but for tensors' values.

    Args:
        args: The arguments.
        kwargs: Those that are named.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._arguments = args, kwargs
        self._before = self._describe()

    def _describe(self) -> tuple[Any, list[Any], list[Any]]:
        leaves, structure = tree_flatten(self._arguments)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        looks = [(TensorInfo.of(each), {name: id(value) for name, value in vars(each).items()}) for each in tensors]
        return structure, leaves, looks

    def has_changed(self) -> bool:
        """Returns whether a container holds something else now, or a tensor has another shape or other attributes."""
        (structure, leaves, looks), (new_structure, new_leaves, new_looks) = self._before, self._describe()
        if structure != new_structure or looks != new_looks:
            return True
        return any(one is not other for one, other in zip(leaves, new_leaves, strict=True))


class _Same:
    """Stands for an object in a key: equal only for the object itself, which is kept from being replaced by another."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)
