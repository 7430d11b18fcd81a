"""Optimizers that differentiate the loss themselves, once or more often."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.optim
import torch
from torch import Tensor

from distopt.optim.newton import Reduce, identity, newton_update
from distopt.optim.optim import PyroOptim


class MultiOptimizer:
    """Base class of optimizers that are given a differentiable loss in place of gradients.

    Derived classes override `step`, or `get_step` when they can return differentiable values.

    Attributes:
        reduce: combines a gradient (or Hessian) with those of other workers; by itself it returns what it is given.
            A distributed run sets it to an average over ranks.
    """

    reduce: Reduce = staticmethod(identity)

    def step(self, loss: Tensor, params: Mapping[str, Tensor]) -> None:
        """Updates `params` in place and detached.

        Args:
            loss: differentiable scalar; some optimizers differentiate it more than once.
            params: unconstrained values by name, as in the parameter store.
        """
        updated = self.get_step(loss, params)
        with torch.no_grad():
            for name, value in params.items():
                value.copy_(updated[name].detach())

    def get_step(self, loss: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the updated values by name, differentiable; arguments as of `step`."""
        raise NotImplementedError(f"{type(self).__name__} cannot return differentiable values; call step().")


class PyroMultiOptimizer(MultiOptimizer):
    """A `PyroOptim` behind the interface of `MultiOptimizer`.

    Args:
        optim: of distopt or of Pyro; a distributed one averages the gradients itself.

    Raises:
        TypeError: when `optim` is no `PyroOptim`.

    Example:
        >>> x = torch.tensor([2.0], requires_grad=True)
        >>> PyroMultiOptimizer(PyroOptim(torch.optim.SGD, {"lr": 0.1})).step((x**2).sum(), {"x": x})
        >>> x.detach()
        tensor([1.6000])
    """

    def __init__(self, optim: pyro.optim.PyroOptim) -> None:
        if not isinstance(optim, pyro.optim.PyroOptim):
            raise TypeError(f"PyroMultiOptimizer: found a {type(optim).__name__}, expected a PyroOptim.")
        self.optim = optim

    def step(self, loss: Tensor, params: Mapping[str, Tensor]) -> None:
        """Differentiates `loss` once and steps `params` in place."""
        values = list(params.values())
        for value, gradient in zip(values, torch.autograd.grad(loss, values, create_graph=True), strict=True):
            value.grad = self.reduce(gradient)
        self.optim(values)


class TorchMultiOptimizer(PyroMultiOptimizer):
    """A torch optimizer behind the interface of `MultiOptimizer`.

    Args:
        optim_constructor: a `torch.optim.Optimizer` class.
        optim_args: its arguments.

    Example:
        >>> x = torch.tensor([2.0], requires_grad=True)
        >>> TorchMultiOptimizer(torch.optim.SGD, {"lr": 0.1}).step((x**2).sum(), {"x": x})
        >>> x.detach()
        tensor([1.6000])
    """

    def __init__(self, optim_constructor: Callable[..., Any], optim_args: Mapping[str, Any]) -> None:
        super().__init__(PyroOptim(optim_constructor, optim_args))


class MixedMultiOptimizer(MultiOptimizer):
    """Different optimizers for different parameters.

    Args:
        parts: pairs of parameter names and their optimizer, a `MultiOptimizer` or a `PyroOptim`.

    Raises:
        ValueError: when a name has two optimizers.

    Example:
        >>> x, y = torch.tensor([2.0], requires_grad=True), torch.tensor([[2.0]], requires_grad=True)
        >>> optim = MixedMultiOptimizer([(["x"], PyroOptim(torch.optim.SGD, {"lr": 0.1})), (["y"], Newton())])
        >>> optim.step((x**2).sum() + (y**2).sum(), {"x": x, "y": y})
        >>> x.item(), y.item()
        (1.600000023841858, 0.0)
    """

    def __init__(self, parts: Sequence[tuple[Sequence[str], MultiOptimizer | pyro.optim.PyroOptim]]) -> None:
        self.parts: list[tuple[Sequence[str], MultiOptimizer]] = []
        owners: dict[str, MultiOptimizer] = {}
        for names, optim in parts:
            multi = PyroMultiOptimizer(optim) if isinstance(optim, pyro.optim.PyroOptim) else optim
            for name in names:
                if name in owners:
                    raise ValueError(
                        f"parameter {name!r} has two optimizers, {type(owners[name]).__name__} and "
                        f"{type(multi).__name__}; name it in one part only."
                    )
                owners[name] = multi
            self.parts.append((names, multi))

    def step(self, loss: Tensor, params: Mapping[str, Tensor]) -> None:
        """Lets each part step its own parameters."""
        for names, optim in self.parts:
            optim.step(loss, {name: params[name] for name in names})

    def get_step(self, loss: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the updated values of all parts."""
        updated: dict[str, Tensor] = {}
        for names, optim in self.parts:
            updated.update(optim.get_step(loss, {name: params[name] for name in names}))
        return updated


class Newton(MultiOptimizer):
    """Newton's method on batches of low-dimensional variables, within a trust region where a radius is given.

    Args:
        trust_radii: radius of the trust region by parameter name; names that are missing have none.

    Parameters have shape (..., D), a batch of independent variables of D dimensions: the loss must be a sum in which
    no two of them meet.

    Example:
        >>> x = torch.tensor([[3.0, -1.0]], requires_grad=True)
        >>> Newton().step(((x - 1.0) ** 2).sum(), {"x": x})
        >>> x.detach()
        tensor([[1., 1.]])
    """

    def __init__(self, trust_radii: Mapping[str, float] | None = None) -> None:
        self.trust_radii = dict(trust_radii or {})

    def get_step(self, loss: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the updated values; gradient and Hessian go through `reduce` before the system is solved."""
        return {
            name: newton_update(loss, value, self.trust_radii.get(name), self.reduce) for name, value in params.items()
        }
