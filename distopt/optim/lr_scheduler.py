"""Learning-rate schedules of parameters that appear as training goes on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from distopt.optim.arguments import Args, args_for
from distopt.optim.optim import PyroOptim
from distopt.optim.state import State, copied, load_into


class PyroLRScheduler(PyroOptim):
    """A `PyroOptim` whose torch optimizers have a learning-rate scheduler; drop-in for `pyro.optim.PyroLRScheduler`.

    Args:
        scheduler_constructor: a class of `torch.optim.lr_scheduler`.
        optim_args: `"optimizer"`, a torch optimizer class; `"optim_args"`, its arguments (a dict or a callable, see
            `PyroOptim`); and the scheduler's own arguments. Not changed.
        clip_args: see `PyroOptim`.

    A parameter's schedule starts when it is first seen.

    Raises:
        ValueError: when `"optimizer"` or `"optim_args"` is missing.

    Example:
        >>> import pyro, torch
        >>> pyro.clear_param_store()
        >>> x = pyro.param("x", torch.zeros(1))
        >>> args = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1.0}, "gamma": 0.5}
        >>> optim = PyroLRScheduler(torch.optim.lr_scheduler.ExponentialLR, args)
        >>> for _ in range(3):
        ...     x.sum().backward()
        ...     optim([x])
        ...     x.grad = None
        ...     optim.step()
        >>> pyro.param("x").detach()
        tensor([-1.7500])
    """

    _scheduled: ClassVar[bool] = True

    def __init__(
        self,
        scheduler_constructor: Callable[..., Any],
        optim_args: Mapping[str, Any],
        clip_args: Args | None = None,
        **options: Any,
    ) -> None:
        kwargs = dict(optim_args) if isinstance(optim_args, Mapping) else {}
        for key, what in (("optimizer", "a torch optimizer class"), ("optim_args", "its arguments")):
            if key not in kwargs:
                raise ValueError(
                    f"{getattr(scheduler_constructor, '__name__', 'PyroLRScheduler')}: optim_args has no {key!r}, "
                    f"expected {what}. For example {{'optimizer': torch.optim.Adam, 'optim_args': {{'lr': 1e-3}}}}."
                )
        self.pt_scheduler_constructor = scheduler_constructor
        optimizer, optimizer_args = kwargs.pop("optimizer"), kwargs.pop("optim_args")
        self.kwargs = kwargs
        self._num_steps = 0
        super().__init__(optimizer, optimizer_args, clip_args, **options)

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Takes one step of the optimizer for each of `params`; the schedule goes on with `step` alone."""
        super().__call__(params, *args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Takes one step of every schedule.

        Args:
            *args: as the torch scheduler takes them, such as the `metrics` of `ReduceLROnPlateau`.
            **kwargs: likewise.
        """
        self._num_steps += 1
        for group in self._groups:
            group.handle.step(*args, **kwargs)
        for name, state in self._registry.waiting.items():
            self._registry.waiting[name] = self._advanced(name, state, args, kwargs)

    def _advanced(self, name: str, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> State:
        """Returns state that was loaded for a parameter not seen yet, its schedule one step further."""
        handle = self._construct([torch.zeros(1)], args_for("optim_args", self.pt_optim_args, name))
        groups = state["optimizer"]["param_groups"]
        load_into(handle, {"scheduler": state["scheduler"], "optimizer": {"state": {}, "param_groups": groups}})
        handle.optimizer._opt_called = True
        handle.step(*args, **kwargs)
        moments = state["optimizer"]["state"]
        return {
            "scheduler": copied(handle.state_dict()),
            "optimizer": {"state": moments, "param_groups": handle.optimizer.state_dict()["param_groups"]},
        }

    def _construct(self, params: list[Any], args: dict[str, Any]) -> Any:
        return composed(self.pt_scheduler_constructor, super()._construct(params, args), self.kwargs)

    def _birth(self) -> Hashable:
        return self._num_steps


# `SequentialLR` and `ChainedScheduler` from specifications: their inner schedulers are built per optimizer.


Spec: TypeAlias = tuple[Any, Mapping[str, Any]]
"""A scheduler class (or its name in `torch.optim.lr_scheduler`) and its arguments; any iterable form is a pair."""


def composed(constructor: Any, optimizer: torch.optim.Optimizer, kwargs: Mapping[str, Any]) -> Any:
    """Builds a scheduler around `optimizer`, its inner ones first when it has some.

    Args:
        constructor: a scheduler class.
        optimizer: what it schedules.
        kwargs: its arguments; `schedulers`, where it has them, is a list of `Spec`.
    """
    if "schedulers" not in kwargs:
        return constructor(optimizer, **kwargs)
    name = getattr(constructor, "__name__", "scheduler")
    inner = [_built(spec, optimizer, name) for spec in kwargs["schedulers"]]
    if not inner:
        raise ValueError(f"{name}: schedulers is empty, expected a list of (scheduler class, arguments).")
    rest = {k: v for k, v in kwargs.items() if k != "schedulers"}
    if constructor is torch.optim.lr_scheduler.ChainedScheduler:
        return constructor(inner, optimizer=optimizer, **rest)
    return constructor(optimizer, inner, **rest)


def _built(spec: Any, optimizer: torch.optim.Optimizer, outer: str) -> Any:
    if not isinstance(spec, Sequence) or isinstance(spec, str) or len(spec) != 2 or not isinstance(spec[1], Mapping):
        raise ValueError(
            f"{outer}: found {spec!r} among schedulers, expected a pair such as ('ConstantLR', {{'factor': 0.1}})."
        )
    constructor, kwargs = spec
    if isinstance(constructor, str):
        found = getattr(torch.optim.lr_scheduler, constructor, None)
        if found is None:
            raise ValueError(f"{outer}: torch.optim.lr_scheduler has no {constructor!r}.")
        constructor = found
    return composed(constructor, optimizer, kwargs)
