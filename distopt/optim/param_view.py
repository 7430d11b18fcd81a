"""The torch optimizer of one parameter, as `pyro.optim` has one for each, seen through the group it is stepped in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, NoReturn

from torch import Tensor

from distopt.optim.clipping import clip_each_
from distopt.optim.grouping import Grouping
from distopt.optim.groups import Group, ParamRecord, user_options
from distopt.optim.parameters import ParamRegistry
from distopt.optim.state import copied, is_scheduler, optimizer_of, state_of_one


class _ByParameter(MutableMapping[Tensor, Any]):
    """What `pyro.optim` keeps in a dict by parameter; removing an entry does what it does there.

    Args:
        registry: The parameters that the optimizer has seen.
        remove: Called with the parameters whose entries are removed.
    """

    def __init__(self, registry: ParamRegistry, remove: Callable[[list[ParamRecord]], None]) -> None:
        self._registry = registry
        self._remove = remove

    def _record(self, param: Tensor) -> ParamRecord:
        record = self._registry.get(param)
        if record is None or record.group is None:
            raise KeyError(param)
        return record

    def __iter__(self) -> Iterator[Tensor]:
        return (record.param for record in self._registry if record.group is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __delitem__(self, param: Tensor) -> None:
        self._remove([self._record(param)])

    def popitem(self) -> tuple[Tensor, Any]:
        """Removes the newest parameter's entry and returns both, as a dict does.

        Raises:
            KeyError: There is none.
        """
        params = list(self)
        if not params:
            raise KeyError("popitem(): there is no parameter")
        return params[-1], self.pop(params[-1])

    def clear(self) -> None:
        """Removes all entries."""
        self._remove([self._record(param) for param in self])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({[self._record(param).name for param in self]})"


class OptimObjects(_ByParameter):
    """The torch optimizer (or scheduler) of each parameter; one that is removed begins anew at its next step."""

    def __init__(self, registry: ParamRegistry, groups: Grouping, remove: Callable[[list[ParamRecord]], None]) -> None:
        super().__init__(registry, remove)
        self._groups = groups

    def __getitem__(self, param: Tensor) -> Any:
        record = self._record(param)
        assert record.group is not None
        return view_of(record, record.group, self._groups)

    def __setitem__(self, param: Tensor, optimizer: Any) -> NoReturn:
        raise TypeError(
            "optim_objs: give a parameter other arguments by a callable optim_args, and state by set_state()"
        )


class GradClips(_ByParameter):
    """What clips the gradient of each parameter, None for no limit; limits that are removed are read anew."""

    def __getitem__(self, param: Tensor) -> Callable[[Tensor], None] | None:
        clip = self._record(param).clip
        if not clip.per_parameter:
            return None
        return lambda p: None if p.grad is None else clip_each_([p.grad], clip)

    def __setitem__(self, param: Tensor, clip: Any) -> NoReturn:
        raise TypeError("grad_clip: give limits for one parameter by a callable clip_args")


def view_of(member: ParamRecord, group: Group, groups: Grouping) -> Any:
    """Returns the optimizer of one parameter, or its scheduler, as users of `pyro.optim` look at it.

    One that steps this parameter alone is torch's own. Others are views, made anew each time they are asked for:
    nothing is kept up to date between two uses.
    """
    if len(group.members) == 1 and member.alone:
        return group.handle
    return SchedulerView(member, group, groups) if is_scheduler(group.handle) else OptimizerView(member, groups)


class _ReadOnly(dict[Any, Any]):
    """State of a parameter: its tensors are the optimizer's memory, but nothing can be added or replaced here."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("optim_objs: replace the state of one parameter by set_state({name: state})")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse


class _ReadOnlyByParameter(_ReadOnly):
    """As torch's: a parameter without state has an empty one."""

    def __missing__(self, key: Any) -> _ReadOnly:
        return _ReadOnly()


class HyperView(MutableMapping[str, Any]):
    """The hyper-parameters of one parameter, as a parameter group of torch; what is set holds for it alone."""

    def __init__(self, member: ParamRecord, groups: Grouping) -> None:
        self._member = member
        self._groups = groups

    def _values(self) -> dict[str, Any]:
        group = self._member.group
        if group is None:
            raise KeyError(f"parameter {self._member.name!r} is not in optim_objs any more")
        return {**group.hyper_of(self._member), **self._groups.edits_of(self._member), "params": [self._member.param]}

    def __getitem__(self, key: str) -> Any:
        return self._values()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "params":
            raise TypeError("optim_objs: the parameter of an optimizer cannot be replaced")
        self._groups.edit(self._member, key, value)

    def __delitem__(self, key: str) -> NoReturn:
        raise TypeError(f"optim_objs: {key!r} cannot be removed from the hyper-parameters; set it")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values())

    def __len__(self) -> int:
        return len(self._values())

    def __repr__(self) -> str:
        return repr(self._values())


# A user's loop reads and clears through `optim_objs`, between two steps and for one parameter. The torch optimizer of
# a packed group knows nothing of single parameters: its only one is the flat tensor. So a view answers for the one: it
# cuts the parameter's segment out of the flat state when it is asked, which costs a step nothing.
class OptimizerView:
    """The optimizer of one parameter: its gradient, its state and its state dict.

    Hyper-parameters that are set hold for this parameter alone, from the next step on; state is read. `isinstance`
    answers as for the torch optimizer behind it.
    """

    def __init__(self, member: ParamRecord, groups: Grouping) -> None:
        self._member = member
        self._groups = groups

    @property
    def _group(self) -> Group:
        if self._member.group is None:
            raise KeyError(f"parameter {self._member.name!r} is not in optim_objs any more")
        return self._member.group

    @property
    def _optimizer(self) -> Any:
        return optimizer_of(self._group.handle)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._optimizer)

    def __repr__(self) -> str:
        return f"{self._optimizer!r} of parameter {self._member.name!r}"

    @property
    def defaults(self) -> dict[str, Any]:
        """What a parameter group has that says nothing else."""
        defaults: dict[str, Any] = self._optimizer.defaults
        return defaults

    @property
    def param_groups(self) -> list[HyperView]:
        """The parameter's hyper-parameters, in a list as torch has them."""
        return [HyperView(self._member, self._groups)]

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """What torch keeps for the parameter, by parameter; tensors of its shape are the optimizer's memory."""
        values = self._group.values_of(self._member)
        return _ReadOnlyByParameter({self._member.param: _ReadOnly(values)} if values else {})

    def state_dict(self) -> dict[str, Any]:
        """Returns the state dict of this parameter alone; it shares no memory with the optimizer."""
        hyper = user_options(self._group.hyper_of(self._member), self._member.args, self._group.switches)
        hyper |= self._groups.edits_of(self._member)
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

    def __init__(self, member: ParamRecord, group: Group, groups: Grouping) -> None:
        vars(self).update(_scheduler=group.handle, optimizer=OptimizerView(member, groups))

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise TypeError(
            f"optim_objs: {name!r} cannot be set for the schedule of one parameter; set its state by set_state()"
        )

    def step(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses: the schedule is that of all parameters of the group.

        Raises:
            TypeError: Always; the message says what to call.
        """
        raise TypeError("optim_objs: step all schedules at once, by the step() of the optimizer itself")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses, as that of the optimizer does."""
        self.optimizer.load_state_dict(state_dict)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._scheduler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)
