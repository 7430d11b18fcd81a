"""Processes that are forked, as in a notebook: what they have trained comes back to the process that forked them."""

from __future__ import annotations

import io
from typing import Any

import torch
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from distopt.checkpoint.param_store import apply_params, capture_params

_STORE = "distopt_param_store"


class ForkingLauncher(_MultiProcessingLauncher):  # type: ignore[misc]
    """Lightning's launcher, which returns weights and metrics of rank 0, and returns Pyro's parameter store too."""

    def get_extra_results(self, trainer: Any) -> dict[str, Any]:
        """Returns what rank 0 hands back: Lightning's metrics, and the unconstrained parameters."""
        extra: dict[str, Any] = super().get_extra_results(trainer)
        params = capture_params()
        values = io.BytesIO()  # as bytes, as Lightning sends tensors: shared memory would end with the process
        torch.save({name: entry.pop("value").detach().cpu() for name, entry in params.items()}, values)
        return extra | {_STORE: (params, values.getvalue())}

    def update_main_process_results(self, trainer: Any, extra: dict[str, Any]) -> None:
        """Takes up what `get_extra_results` returned."""
        super().update_main_process_results(trainer, extra)
        params, values = extra[_STORE]
        tensors = torch.load(io.BytesIO(values), weights_only=True)
        saved = {name: entry | {"value": tensors[name]} for name, entry in params.items()}
        apply_params(saved, {})
