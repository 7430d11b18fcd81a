"""Mixed precision: gradients of a scaled loss, and losses for `pyro.infer.SVI` that are scaled or computed in 16 bits.

In 16 bits small gradients round to zero. So the loss is multiplied by a scale before it is differentiated, and the
gradients are divided by it before they are used; `torch.amp.GradScaler` lowers the scale when a gradient overflows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.amp import GradScaler
from torch.overrides import TorchFunctionMode

# GradScaler wants one optimizer that owns the parameters. Here the parameters are spread over several, and what is
# unscaled is not `.grad` but packed buffers. So it is shown an optimizer of empty tensors whose gradients are those
# buffers, and whose step is all of ours.


class _Gradients(torch.optim.Optimizer):
    """What `GradScaler` needs to see of an optimizer: tensors with gradients, and a step."""

    def __init__(self, gradients: Sequence[Tensor], step: Callable[[], None]) -> None:
        holders = []
        for gradient in gradients:
            holder = torch.empty_like(gradient, layout=torch.strided)
            holder.grad = gradient
            holders.append(holder)
        super().__init__(holders, {})
        self._apply = step

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Steps the parameters that the gradients belong to."""
        self._apply()


def scaled_step(scaler: GradScaler, gradients: Sequence[Tensor], step: Callable[[], None]) -> bool:
    """Divides `gradients` by the scale, in place, calls `step` if all are finite, and updates the scale.

    Returns:
        Whether the step was taken.
    """
    taken = False

    def take() -> None:
        nonlocal taken
        step()
        taken = True

    view = _Gradients(gradients, take)
    scaler.unscale_(view)
    scaler.step(view)
    scaler.update()
    return taken


class _Autocast(Messenger):  # type: ignore[misc]
    """Runs a model or guide under `torch.autocast`."""

    def __init__(self, device_type: str, dtype: torch.dtype) -> None:
        super().__init__()
        self._autocast: Any = torch.autocast(device_type, dtype)

    def __enter__(self) -> Any:
        self._autocast.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        self._autocast.__exit__(*error)
        return super().__exit__(*error)


class WrappedELBO(ELBO):  # type: ignore[misc]
    """An ELBO that calls another one; subclasses say how its gradients are computed.

    Args:
        elbo: The ELBO that is wrapped.

    Attributes:
        elbo: As given.
    """

    def __init__(self, elbo: ELBO) -> None:
        super().__init__(num_particles=elbo.num_particles)
        self.elbo = elbo

    def _get_trace(self, *args: Any, **kwargs: Any) -> Any:
        return self.elbo._get_trace(*args, **kwargs)

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the loss of the wrapped ELBO: neither scaled nor in 16 bits."""
        return self.elbo.loss(model, guide, *args, **kwargs)


class AutocastELBO(WrappedELBO):
    """An ELBO that runs model and guide in 16 bits when it computes gradients, as `torch.autocast` does.

    Autocast computes products of matrices and convolutions in 16 bits. Parameters, densities, gradients and the
    optimizer keep their 32 bits, and so does `loss`, which makes the parameters of a guide.

    Args:
        elbo: The ELBO that is wrapped.
        device_type: Of the tensors, such as `cuda`.
        dtype: `torch.bfloat16`, or `torch.float16` together with `ScaledELBO`.

    Example:
        >>> from pyro.infer import Trace_ELBO
        >>> loss = AutocastELBO(Trace_ELBO(), "cpu", torch.bfloat16)
    """

    def __init__(self, elbo: ELBO, device_type: str, dtype: torch.dtype) -> None:
        super().__init__(elbo)
        self._device_type = device_type
        self._dtype = dtype

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the loss, and leaves gradients on the parameters."""
        wrapped = (_Autocast(self._device_type, self._dtype)(each) for each in (model, guide))
        return self.elbo.loss_and_grads(*wrapped, *args, **kwargs)


_BACKWARD: Any = Tensor.backward


class _ScaledBackward(TorchFunctionMode):
    """Begins every `backward()` with a gradient of `scale` in place of 1."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self._scale = scale

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is not _BACKWARD:
            return function(*args, **kwargs)
        loss, *more = args
        gradient = more.pop(0) if more else kwargs.pop("gradient", None)
        scaled = torch.full_like(loss, self._scale) if gradient is None else gradient * self._scale
        return function(loss, scaled, *more, **kwargs)


class ScaledELBO(WrappedELBO):
    """An ELBO whose gradients are multiplied by the scale of a `GradScaler`; the loss it returns is not.

    What is scaled is the gradient with which `backward()` begins, and not the densities of the model: objectives such
    as `RenyiELBO`, which are not linear in these, would be others. An ELBO of your own must call `backward()`, too.
    Give the same scaler to the optimizer, which divides the scale out again.

    Args:
        elbo: The ELBO that is wrapped.
        scaler: What holds the scale.

    Example:
        >>> from pyro.infer import Trace_ELBO
        >>> scaler = GradScaler("cpu", init_scale=8.0)
        >>> loss = ScaledELBO(Trace_ELBO(), scaler)
    """

    def __init__(self, elbo: ELBO, scaler: GradScaler) -> None:
        super().__init__(elbo)
        self.scaler = scaler

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the loss, and leaves scaled gradients on the parameters."""
        # GradScaler makes its scale when it first scales something; `get_scale` would return the initial number and
        # leave none to be updated.
        scale = float(self.scaler.scale(torch.ones((), device=self.scaler._device)))
        with _ScaledBackward(scale):
            return self.elbo.loss_and_grads(model, guide, *args, **kwargs)
