"""Gradients of several calls of the optimizer, added up for one step."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


class Passes:
    """Adds up gradients call by call.

    Args:
        num: Calls that make one step.
    """

    def __init__(self, num: int) -> None:
        self._num, self._seen = num, 0
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, params: Iterable[Tensor]) -> Iterable[Tensor] | None:
        """Adds this call's gradients; returns the parameters of all calls with their sums in `.grad`, once complete."""
        if self._num == 1:
            return params
        params = list(params)
        self._seen += 1
        for param in params:
            if param.grad is not None:
                _, before = self._kept.get(id(param), (param, None))
                self._kept[id(param)] = (param, param.grad.clone() if before is None else before + param.grad)
        if self._seen < self._num:
            return None
        summed = self.take()
        return {id(param): param for param in (*params, *summed)}.values()

    def take(self) -> list[Tensor]:
        """Returns the parameters of the calls since the last step with their sums in `.grad`, and begins anew."""
        self._seen, kept, self._kept = 0, self._kept, {}
        for param, gradient in kept.values():
            param.grad = gradient
        return [param for param, _ in kept.values()]
