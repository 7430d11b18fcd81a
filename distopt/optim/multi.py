"""Optimizers that differentiate the loss themselves, once or more often.

A `PyroOptim` is given parameters whose gradients are there already. These are given the loss, so that they can use its
second derivatives, and some return values that are differentiable themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import pyro.optim
import pyro.optim.multi as pyro_multi
import torch
from torch import Tensor

from distopt.optim.optim import PyroOptim

# One step of Newton's method on a batch of small independent problems. The Hessian of a batch of B variables of D
# dimensions has (B D)^2 elements, of which only the B blocks of D^2 on the diagonal are not zero. So row i of all
# blocks is the gradient of the i-th components' gradients, summed over the batch: D backward passes, whatever B is.

Reduce: TypeAlias = Callable[[Tensor], Tensor]
"""Combines a tensor with those of other workers and returns the result, of the same shape."""

_TINY = 1e-8  # least curvature that is divided by


def identity(tensor: Tensor) -> Tensor:
    """Returns `tensor`: there are no other workers."""
    return tensor


def newton_update(loss: Tensor, x: Tensor, trust_radius: float | None = None, reduce: Reduce = identity) -> Tensor:
    r"""Returns `x` after one step of Newton's method, differentiable.

    With gradient :math:`g` and Hessian :math:`H` of each variable,

    .. math::
        x' = x - (H + \lambda I)^{-1} g, \qquad
        \lambda = \max\left(\frac{\lVert g \rVert}{r} - \lambda_{\min}(H),\; 10^{-8}\right)

    The smallest eigenvalue of the system is then at least :math:`\lVert g \rVert / r`, which keeps the step within the
    radius :math:`r`. Without a radius :math:`\lambda = 0`. One-dimensional variables take :math:`g / \max(H, 10^{-8})`,
    clamped to :math:`\pm r`; a step that is NaN there is left out.

    Args:
        loss: Scalar, twice differentiable, a sum over the batch.
        x: Shape (..., D).
        trust_radius: :math:`r`, in units of `x`.
        reduce: Applied to gradient, shape (..., D), and Hessian, shape (..., D, D), before the system is solved.

    Returns:
        Shape (..., D); derivatives with respect to what `loss` depends on are kept, those through the old `x` are not.

    Raises:
        ValueError: When `loss` is no scalar or `x` has no dimension.

    References:
        Y. Yuan, A review of trust region algorithms for optimization, ICIAM 1999;
        B. Christianson, Reverse accumulation and attractive fixed points, Optimization Methods and Software 3.4, 1994.
    """
    if loss.shape != ():
        raise ValueError(f"Newton: the loss has shape {tuple(loss.shape)}, expected a scalar.")
    if x.dim() < 1:
        raise ValueError("Newton: a variable has shape (), expected (..., D); reshape it to (1,).")

    local = torch.autograd.grad(loss, [x], create_graph=True)[0]  # (..., D)
    size = x.shape[-1]
    rows = [torch.autograd.grad(local[..., i].sum(), [x], create_graph=True)[0] for i in range(size)]
    g, hessian = reduce(local), reduce(torch.stack(rows, dim=-1))  # (..., D), (..., D, D)

    if size == 1:
        step = g / hessian[..., 0].clamp(min=_TINY)
        step = torch.where(step.isnan(), torch.zeros_like(step), step)
        return x.detach() - (step if trust_radius is None else step.clamp(-trust_radius, trust_radius))

    if trust_radius is not None:
        smallest = torch.linalg.eigvalsh(hessian)[..., 0]  # (...)
        shift = (torch.linalg.vector_norm(g, dim=-1) / trust_radius - smallest).clamp(min=_TINY)
        hessian = hessian + shift[..., None, None] * torch.eye(size, dtype=x.dtype, device=x.device)
    solved: Tensor = torch.linalg.solve(hessian, g)
    return x.detach() - solved


# Each class is one of pyro.optim, too, so that `isinstance` in a script or in Pyro's library answers as it did, but it
# runs none of its code.


class MultiOptimizer(pyro_multi.MultiOptimizer):  # type: ignore[misc]
    """Base class of optimizers that are given a differentiable loss in place of gradients.

    Derived classes override `step`, or `get_step` when they can return differentiable values.

    Attributes:
        reduce: Combines a gradient (or Hessian) with those of other workers; the default returns it unchanged.
            A distributed run sets it to an average over ranks.
    """

    reduce: Reduce = staticmethod(identity)

    def step(self, loss: Tensor, params: Mapping[str, Tensor]) -> None:
        """Updates `params` in place and detached.

        Args:
            loss: Differentiable scalar; some optimizers differentiate it more than once.
            params: Unconstrained values by name, as in the parameter store.
        """
        updated = self.get_step(loss, params)
        with torch.no_grad():
            for name, value in params.items():
                value.copy_(updated[name].detach())

    def get_step(self, loss: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the updated values by name, differentiable; arguments as of `step`."""
        raise NotImplementedError(f"{type(self).__name__} cannot return differentiable values; call step().")


class PyroMultiOptimizer(MultiOptimizer, pyro_multi.PyroMultiOptimizer):  # type: ignore[misc]
    """A `PyroOptim` behind the interface of `MultiOptimizer`.

    Args:
        optim: Of distopt or of Pyro; a distributed one averages the gradients itself.

    Raises:
        TypeError: When `optim` is no `PyroOptim`.

    Example:
        >>> x = torch.tensor([2.0], requires_grad=True)
        >>> PyroMultiOptimizer(PyroOptim(torch.optim.SGD, {"lr": 0.1})).step((x**2).sum(), {"x": x})
        >>> x.detach()
        tensor([1.6000])
    """

    def __init__(self, optim: pyro.optim.optim.PyroOptim) -> None:
        if not isinstance(optim, pyro.optim.optim.PyroOptim):
            raise TypeError(f"PyroMultiOptimizer: found a {type(optim).__name__}, expected a PyroOptim.")
        self.optim = optim

    def step(self, loss: Tensor, params: Mapping[str, Tensor]) -> None:
        """Differentiates `loss` once and steps `params` in place."""
        values = list(params.values())
        for value, gradient in zip(values, torch.autograd.grad(loss, values, create_graph=True), strict=True):
            value.grad = self.reduce(gradient)
        self.optim(values)


class TorchMultiOptimizer(PyroMultiOptimizer, pyro_multi.TorchMultiOptimizer):  # type: ignore[misc]
    """A torch optimizer behind the interface of `MultiOptimizer`.

    Args:
        optim_constructor: A `torch.optim.Optimizer` class.
        optim_args: Its arguments.

    Example:
        >>> x = torch.tensor([2.0], requires_grad=True)
        >>> TorchMultiOptimizer(torch.optim.SGD, {"lr": 0.1}).step((x**2).sum(), {"x": x})
        >>> x.detach()
        tensor([1.6000])
    """

    def __init__(self, optim_constructor: Callable[..., Any], optim_args: Mapping[str, Any]) -> None:
        super().__init__(PyroOptim(optim_constructor, optim_args))


class MixedMultiOptimizer(MultiOptimizer, pyro_multi.MixedMultiOptimizer):  # type: ignore[misc]
    """Different optimizers for different parameters.

    Args:
        parts: Pairs of parameter names and their optimizer, a `MultiOptimizer` or a `PyroOptim`.

    Raises:
        ValueError: When a name has two optimizers.

    Example:
        >>> x, y = torch.tensor([2.0], requires_grad=True), torch.tensor([[2.0]], requires_grad=True)
        >>> optim = MixedMultiOptimizer([(["x"], PyroOptim(torch.optim.SGD, {"lr": 0.1})), (["y"], Newton())])
        >>> optim.step((x**2).sum() + (y**2).sum(), {"x": x, "y": y})
        >>> x.item(), y.item()
        (1.600000023841858, 0.0)
    """

    def __init__(self, parts: Sequence[tuple[Sequence[str], MultiOptimizer | pyro.optim.optim.PyroOptim]]) -> None:
        self.parts: list[tuple[Sequence[str], MultiOptimizer]] = []
        owners: dict[str, MultiOptimizer] = {}
        for names, optim in parts:
            multi = PyroMultiOptimizer(optim) if isinstance(optim, pyro.optim.optim.PyroOptim) else optim
            for name in names:
                if name in owners:
                    raise ValueError(
                        f"parameter {name!r} has two optimizers, {type(owners[name]).__name__} and "
                        f"{type(multi).__name__}; name it once only."
                    )
                owners[name] = multi
            self.parts.append((names, multi))

    def step(self, loss: Tensor, params: Mapping[str, Tensor]) -> None:
        """Lets each optimizer step its parameters."""
        for names, optim in self.parts:
            optim.step(loss, {name: params[name] for name in names})

    def get_step(self, loss: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the updated values of all parameters."""
        updated: dict[str, Tensor] = {}
        for names, optim in self.parts:
            updated.update(optim.get_step(loss, {name: params[name] for name in names}))
        return updated


class Newton(MultiOptimizer, pyro_multi.Newton):  # type: ignore[misc]
    """Newton's method on batches of low-dimensional variables, within a trust region where a radius is given.

    Args:
        trust_radii: Radius of the trust region by parameter name; names that are missing have none.

    Parameters have shape (..., D), a batch of independent variables of D dimensions: the loss must be a sum in which
    no two of them meet.

    Example:
        >>> x = torch.tensor([[3.0, -1.0]], requires_grad=True)
        >>> Newton().step(((x - 1.0) ** 2).sum(), {"x": x})
        >>> x.detach()
        tensor([[1., 1.]])
    """

    def __init__(self, trust_radii: Mapping[str, float] | None = None) -> None:
        self.trust_radii: dict[str, float] = dict(trust_radii or {})

    def get_step(self, loss: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the updated values; gradient and Hessian go through `reduce` before the system is solved."""
        return {
            name: newton_update(loss, value, self.trust_radii.get(name), self.reduce) for name, value in params.items()
        }
