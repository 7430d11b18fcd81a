"""Averages that a loss keeps in the parameter store, which must be those of all ranks as the parameters are.

Pyro's `TraceGraph_ELBO` keeps a decaying average of the cost below each site that asks for it, as a baseline. It puts a
new tensor into the store at each step, so a replica would have the average of its own rows, and the ranks would have to
agree on a new parameter again and again. Here the tensor that the ranks know stays in the store, and takes the mean of
the values that the ranks have computed.
"""

from __future__ import annotations

import pyro
import torch
from torch import Tensor

from distopt.backends import Backend
from distopt.reduce.layout import Layout


class RunningAverages:
    """The averages that this rank's loss has computed in the present step."""

    def __init__(self) -> None:
        self._computed: dict[str, Tensor] = {}

    def take(self, name: str, param: Tensor, layout: Layout) -> Tensor:
        """Notes the value that the loss has put into the store in place of `param`, and puts the tensor back.

        Args:
            name: Of an average.
            param: The tensor that the store had when the loss began.
            layout: What all ranks know.

        Returns:
            The tensor that is in the store now: the one of the layout, or `param` where that lacks it.
        """
        store = pyro.get_param_store()
        known = next((layout.params[index] for index in layout.averages if layout.names[index] == name), param)
        computed = store._params.get(name)
        if computed is None or computed is known or computed.shape != known.shape:
            return param

        self._computed[name] = computed.detach()
        for passed in (param, computed):
            store._param_to_name.pop(passed, None)
        store._params[name] = known
        store._param_to_name[known] = name
        return known

    @torch.no_grad()
    def share_(self, backend: Backend, layout: Layout, num_active: int, is_active: bool = True) -> None:
        """Gives the averages of the layout the mean of the ranks' values; one that is not finite stays as it was.

        Args:
            backend: Link to the other ranks.
            layout: What all ranks know.
            num_active: How many ranks have computed a loss.
            is_active: Whether this rank has, and not only taken part.

        Cost:
            One small all-reduce where the layout has such averages.
        """
        params = [layout.params[index] for index in layout.averages]
        if not params:
            return
        values = [self._computed.get(layout.names[index], layout.params[index]) for index in layout.averages]
        self._computed = {}

        if backend.world_size > 1:
            flat = torch.cat([value.reshape(-1) for value in values])
            if not is_active:
                flat.zero_()
            backend.all_reduce(flat).wait()
            values = list(torch.split(flat.div_(num_active), [param.numel() for param in params]))
        for param, value in zip(params, values, strict=True):
            if value.isfinite().all():
                param.copy_(value.view_as(param))
