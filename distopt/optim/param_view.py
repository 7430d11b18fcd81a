"""The torch optimizer of one parameter, as `pyro.optim` has one for each, seen through the group it is stepped in."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NoReturn

from torch import Tensor

from distopt.optim.groups import Group, ParamRecord, user_options
from distopt.optim.state import copied, is_scheduler, optimizer_of, state_of_one


def view_of(member: ParamRecord, group: Group) -> Any:
    """Returns the optimizer of one parameter, or its scheduler, as users of `pyro.optim` look at it.

    One that steps this parameter alone is torch's own. Others are views, made anew each time they are asked for:
    nothing is kept up to date between two uses.
    """
    if len(group.members) == 1 and member.alone:
        return group.handle
    return SchedulerView(member, group) if is_scheduler(group.handle) else OptimizerView(member, group)


# A user's loop reads and clears through `optim_objs`, between two steps and for one parameter. The torch optimizer of
# a packed group knows nothing of single parameters: its only one is the flat tensor. So a view answers for the one: it
# cuts the parameter's segment out of the flat state when it is asked, which costs a step nothing.
class OptimizerView:
    """The optimizer of one parameter: its gradient, its state and its state dict.

    Hyper-parameters are those of all parameters that are stepped together. `isinstance` answers as for the torch
    optimizer behind it.
    """

    def __init__(self, member: ParamRecord, group: Group) -> None:
        self._member = member
        self._group = group
        self._optimizer = optimizer_of(group.handle)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._optimizer)

    def __repr__(self) -> str:
        return f"{self._optimizer!r} of parameter {self._member.name!r}"

    @property
    def defaults(self) -> dict[str, Any]:
        """What a parameter group has that says nothing else."""
        return self._optimizer.defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Torch's parameter group, in a list: its hyper-parameters hold for all that are stepped together."""
        return [self._group.hyper_of(self._member)]

    @property
    def state(self) -> defaultdict[Tensor, dict[str, Any]]:
        """What torch keeps for the parameter, by parameter; tensors are the optimizer's memory."""
        values = self._group.values_of(self._member)
        return defaultdict(dict, {self._member.param: values} if values else {})

    def state_dict(self) -> dict[str, Any]:
        """Returns the state dict of this parameter alone; it shares no memory with the optimizer."""
        hyper = user_options(self._group.hyper_of(self._member), self._member.args, self._group.switches)
        return state_of_one(hyper, copied(self._group.values_of(self._member)))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the parameter's gradient, as torch does."""
        param = self._member.param
        if set_to_none or param.grad is None:
            param.grad = None
        else:
            param.grad = param.grad.detach().zero_()

    def load_state_dict(self, state_dict: dict[str, Any]) -> NoReturn:
        """Refuses: the state belongs to a group.

        Raises:
            TypeError: Always; the message says what to call.
        """
        raise TypeError(f"optim_objs: load the state of one parameter by set_state({{{self._member.name!r}: state}})")

    def step(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses: the parameter is stepped with its group.

        Raises:
            TypeError: Always; the message says what to call.
        """
        raise TypeError(f"optim_objs: step parameter {self._member.name!r} by calling the optimizer with [parameter]")


class SchedulerView:
    """The scheduler of one parameter: its optimizer is a view, everything else is torch's scheduler of the group."""

    def __init__(self, member: ParamRecord, group: Group) -> None:
        self._scheduler = group.handle
        self.optimizer = OptimizerView(member, group)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._scheduler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)
