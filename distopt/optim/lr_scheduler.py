"""Learning-rate schedules of parameters that appear during training.

A torch scheduler belongs to one optimizer and counts its own steps. Here it belongs to a group of parameters, so what
parameters must share to be grouped includes the number of scheduler steps before they were first seen.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import pyro.optim
import torch
from torch import Tensor

from distopt.optim.arguments import Args
from distopt.optim.capabilities import check_arguments, name_of
from distopt.optim.optim import PyroOptim
from distopt.optim.state import State, copied, load_into


class PyroLRScheduler(PyroOptim, pyro.optim.PyroLRScheduler):  # type: ignore[misc]
    """A `PyroOptim` whose torch optimizers have a learning-rate scheduler; drop-in for `pyro.optim.PyroLRScheduler`.

    Args:
        scheduler_constructor: A class of `torch.optim.lr_scheduler`.
        optim_args: `"optimizer"`, a torch optimizer class; `"optim_args"`, its arguments (a dict or a callable, see
            `PyroOptim`); and the scheduler's own arguments. Not changed.
        clip_args: See `PyroOptim`.

    A parameter's schedule starts when it is first seen.

    Attributes:
        num_steps: How many steps the schedule has taken.

    Raises:
        ValueError: When `"optimizer"` or `"optim_args"` is missing.

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
                    f"{name_of(scheduler_constructor)}: optim_args has no {key!r}, "
                    f"expected {what}. For example {{'optimizer': torch.optim.Adam, 'optim_args': {{'lr': 1e-3}}}}."
                )
        self.pt_scheduler_constructor = scheduler_constructor
        optimizer = kwargs.pop("optimizer")
        optimizer_args = kwargs.pop("optim_args")
        check_arguments(kwargs, name_of(scheduler_constructor))
        self.kwargs = kwargs
        self.num_steps: int = 0
        super().__init__(optimizer, optimizer_args, clip_args, **options)

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Takes one step of the optimizer for each of `params`; only `step` advances the schedule."""
        super().__call__(params, *args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Takes one step of every schedule.

        Args:
            *args: As the torch scheduler takes them, such as the `metrics` of `ReduceLROnPlateau`.
            **kwargs: Likewise.
        """
        self.num_steps += 1
        self._planner.settle()
        for group in self._groups:
            group.handle.optimizer._opt_called = True  # else torch warns where no parameter had a gradient yet
            group.handle.step(*args, **kwargs)

        # A parameter whose state was loaded and which the model has not reached yet does not stand still either: its
        # schedule began in the run that was saved. (pyro.optim leaves it behind.)
        for name, state in self._registry.waiting.items():
            self._registry.waiting[name] = self._advanced(name, state, args, kwargs)

    @property
    def metric_name(self) -> str | None:
        """What `step` calls the metric that its schedules follow, as that of `ReduceLROnPlateau`; None for others.

        The schedules themselves are asked. Before there is one, it is made on trial, unless its arguments depend on the
        name of a parameter that is not known yet: then no schedule would be stepped, and this is None.
        """
        for group in self._groups:
            return metric_name(group.handle)
        waiting = next(iter(self._registry.waiting.items()), None)
        if waiting is None and callable(self.pt_optim_args):
            return None
        name, state = waiting or ("", {})
        return metric_name(self._construct([_placeholder(state)], self._args_of(name)))

    def _advanced(self, name: str, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> State:
        """Returns state that was loaded for a parameter not seen yet, its schedule one step further.

        The schedule is stepped around an optimizer of one placeholder tensor, which has the parameter's
        hyper-parameters and none of its moments.
        """
        handle = self._construct([_placeholder(state)], self._args_of(name))
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
        return self.num_steps


def metric_name(schedule: Any) -> str | None:
    """Returns what `schedule.step` calls the metric that it must be given; None for a schedule that needs none.

    Example:
        >>> sgd = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> metric_name(torch.optim.lr_scheduler.ReduceLROnPlateau(sgd))
        'metrics'
        >>> metric_name(torch.optim.lr_scheduler.ConstantLR(sgd)) is None
        True
    """
    # A class of the user, or a function, may stand in front of torch's; so the object says it, by its signature.
    parameters = inspect.signature(schedule.step).parameters
    if "metrics" in parameters or isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
        return "metrics"
    first = next(iter(parameters.values()), None)
    is_given = first is not None and first.kind in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD)
    return first.name if first is not None and is_given and first.default is first.empty else None


def _placeholder(state: State) -> Tensor:
    """Returns a small tensor of as many dimensions as the parameter whose state it is, since some optimizers ask."""
    values = state["optimizer"]["state"].get(0, {}).values() if state else ()
    num_dims = max((value.dim() for value in values if isinstance(value, Tensor)), default=1)
    return torch.zeros([1] * max(num_dims, 1))


# `SequentialLR` and `ChainedScheduler` are made of schedulers of the same optimizer. That optimizer does not exist when
# a user writes them down, and there will be one for each group, so the inner ones are given as specifications.

Spec: TypeAlias = tuple[Any, Mapping[str, Any]]
"""A scheduler class (or its name in `torch.optim.lr_scheduler`) and its arguments; any iterable form is a pair."""


def composed(constructor: Any, optimizer: torch.optim.Optimizer, kwargs: Mapping[str, Any]) -> Any:
    """Builds a scheduler around `optimizer`, its inner ones first when it has some.

    Args:
        constructor: A scheduler class.
        optimizer: What it schedules.
        kwargs: Its arguments; `schedulers`, where it has them, is a list of `Spec`.
    """
    if "schedulers" not in kwargs:
        return constructor(optimizer, **kwargs)
    name = name_of(constructor)
    inner = [_built(spec, optimizer, name) for spec in kwargs["schedulers"]]
    if not inner:
        raise ValueError(f"{name}: schedulers is empty, expected a list of (scheduler class, arguments).")
    rest = {k: v for k, v in kwargs.items() if k != "schedulers"}
    if constructor is torch.optim.lr_scheduler.ChainedScheduler:
        return constructor(inner, optimizer=optimizer, **rest)
    return constructor(optimizer, inner, **rest)


def _built(spec: Any, optimizer: torch.optim.Optimizer, outer: str) -> Any:
    """Returns the scheduler that a `Spec` describes; `outer` is the name of the one that it is part of."""
    if not isinstance(spec, Sequence) or isinstance(spec, str) or len(spec) != 2 or not isinstance(spec[1], Mapping):
        raise ValueError(
            f"{outer}: found {spec!r} among schedulers, expected a pair such as ('ConstantLR', {{'factor': 0.1}})."
        )
    constructor, kwargs = spec
    if isinstance(constructor, str):
        scheduler_class = getattr(torch.optim.lr_scheduler, constructor, None)
        if scheduler_class is None:
            raise ValueError(f"{outer}: torch.optim.lr_scheduler has no {constructor!r}.")
        constructor = scheduler_class
    return composed(constructor, optimizer, kwargs)
