"""Running model and guide with another default device than the CPU, for code that names none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger

from distopt.optim.amp import WrappedELBO

# torch.set_default_device would make small tensors of distopt and torch on the device, too, which the host reads at
# once: so it holds while model and guide run, and no longer.


class OnDevice(Messenger):  # type: ignore[misc]
    """Makes a device the default one while it is entered, or while a function runs that it is called with.

    Args:
        device: Where `torch.zeros(3)` and the constants of `dist.Normal(0.0, 1.0)` are made.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __enter__(self) -> Any:
        self._device.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        self._device.__exit__(*error)
        return super().__exit__(*error)


class DeviceELBO(WrappedELBO):
    """An ELBO whose model and guide make tensors on a device, unless they name another one.

    Args:
        elbo: The ELBO that is wrapped.
        device: Where `torch.zeros(3)` and the constants of `dist.Normal(0.0, 1.0)` are made.

    Example:
        >>> from pyro.infer import Trace_ELBO
        >>> loss = DeviceELBO(Trace_ELBO(), torch.device("cpu"))
    """

    def __init__(self, elbo: ELBO, device: torch.device) -> None:
        super().__init__(elbo)
        self._device = device

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the loss."""
        return self.elbo.loss(*self._wrapped(model, guide), *args, **kwargs)

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the loss, and leaves gradients on the parameters."""
        return self.elbo.loss_and_grads(*self._wrapped(model, guide), *args, **kwargs)

    def _wrapped(self, *callables: Callable[..., Any]) -> list[Any]:
        return [OnDevice(self._device)(each) for each in callables]
