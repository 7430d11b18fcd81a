"""What an optimizer was asked for, and saved state brought to what it is asked for now.

Torch keeps hyper-parameters in the state: loading it brings back the old learning rate, whatever the optimizer was made
with. So what was asked for is saved beside the state, and where it has changed since, the new value is put in.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyro.optim
import torch
from torch import Tensor

from distopt.optim.arguments import args_for
from distopt.optim.capabilities import name_of, without_partial
from distopt.optim.construction import construct
from distopt.optim.lr_scheduler import composed
from distopt.optim.state import State, copied, frozen, optimizer_state, state_dict_of, state_of_one

Settings: TypeAlias = dict[str, Any]
"""`optimizer`, a name; `args`, a list of [arguments, names of the parameters that have them (None: all)]; `scheduler`,
None or [name, arguments]; `clip`. Plain values alone."""

_UNSET = "default"


def settings_of(optim: pyro.optim.PyroOptim, names: Iterable[str]) -> Settings:
    """Returns what an optimizer was asked for.

    Args:
        optim: Of `distopt.optim` or `pyro.optim`.
        names: Of its parameters, whose arguments may differ.

    Example:
        >>> from distopt.optim import Adam
        >>> settings_of(Adam({"lr": 0.1}), ["x"])
        {'optimizer': 'Adam', 'args': [[{'lr': 0.1}, None]], 'scheduler': None, 'clip': {}}
    """
    by_args: dict[Any, list[Any]] = {}
    if callable(optim.pt_optim_args):
        for name in names:
            args = _plain(_args_of(optim, name))
            by_args.setdefault(frozen(args), [args, []])[1].append(name)
    else:
        by_args[None] = [_plain(_args_of(optim, "")), None]

    clip = optim.pt_clip_args
    return {
        "optimizer": name_of(optim.pt_optim_constructor),
        "args": list(by_args.values()),
        "scheduler": _schedule_of(optim),
        "clip": None if callable(clip) else _plain(clip or {}),
    }


def revise(
    states: Mapping[str, State],
    saved: Settings,
    optim: pyro.optim.PyroOptim,
    *,
    step: int,
    restarts: bool = False,
) -> tuple[dict[str, State], list[str]]:
    """Returns saved states as if their optimizer had been asked for what `optim` is asked for now, and what changed.

    Moments stay. Of the hyper-parameters only those change that were asked to: what an optimizer or a schedule has made
    of a value since (`lrd`, `gamma`) is kept where nothing else is asked for. A schedule counts on: a new one is where
    it would be had the run begun with it, and one that follows the loss keeps what it has seen.

    Args:
        states: By name of the parameter.
        saved: What `settings_of` returned when they were saved.
        optim: The optimizer that will load them.
        step: Steps of the schedule that parameters have done whose state has no schedule.
        restarts: Whether schedules start anew.

    Returns:
        The states, and a line for each change, such as `lr 0.02 -> 0.005`.
    """
    before = {name: args for args, names in saved["args"] for name in names or ()}
    default = next((args for args, names in saved["args"] if names is None), None)
    same_schedule = saved["scheduler"] == _schedule_of(optim) and not restarts
    cached: dict[Any, State] = {}
    changes: dict[str, list[str]] = {}
    revised = dict(states)

    for name, state in states.items():
        now = _args_of(optim, name)
        old = before.get(name, default)
        changed = {} if old is None else _changes(old, _plain(now))
        for key, (was, becomes) in changed.items():
            changes.setdefault(f"{key} {was} -> {becomes}", []).append(name)
        if not changed and same_schedule:
            continue

        # A thousand parameters mostly share what changes, so the schedule is replayed once for all of them.
        frame = _frame(state)
        equal = (frozen(frame), frozen(_plain(now)), frozen(old))
        if equal not in cached:
            cached[equal] = _Revision(optim, saved, old or {}, now, changed, step, restarts).of(frame)
        revised[name] = _with_moments(cached[equal], optimizer_state(state)["state"])
    return revised, _lines(changes, len(states), saved, optim)


def _lines(
    changes: Mapping[str, list[str]], num_params: int, saved: Settings, optim: pyro.optim.PyroOptim
) -> list[str]:
    lines = []
    for change, names in changes.items():
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        lines.append(change if len(names) == num_params else f"{change} of {len(names)} parameters ({shown})")

    schedules = [_schedule_text(each) for each in (saved["scheduler"], _schedule_of(optim))]
    if schedules[0] != schedules[1]:
        lines.append(f"schedule {schedules[0]} -> {schedules[1]}")
    now = settings_of(optim, ())["clip"]
    if saved["clip"] is not None and now is not None:
        lines += [f"{key} {old} -> {new}" for key, (old, new) in _changes(saved["clip"], now, unset="none").items()]
    return lines


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], unset: str = _UNSET) -> dict[str, tuple[Any, Any]]:
    """Returns, by key, the values that differ."""
    keys = dict.fromkeys([*old, *new])
    pairs = {key: (old.get(key, unset), new.get(key, unset)) for key in keys}
    return {key: pair for key, pair in pairs.items() if frozen(pair[0]) != frozen(pair[1])}


# A frame is a state dict without moments: hyper-parameters and schedule.


def _frame(state: State) -> State:
    frame: State = dict(optimizer_state(state)) | {"state": {}}
    return {"scheduler": state["scheduler"], "optimizer": frame} if "scheduler" in state else frame


def _with_moments(frame: State, moments: Any) -> State:
    fresh: State = copied(frame)
    optimizer_state(fresh)["state"] = moments
    return fresh


@dataclass(frozen=True)
class _Revision:
    """How the frame of one parameter, or of many with equal frames, becomes what is asked for now.

    Attributes:
        optim: The optimizer that will load it.
        saved: What the optimizer of the frame was asked for.
        old: The parameter's arguments then.
        now: Its arguments now.
        changed: The keys in which they differ.
        step: Steps of the schedule that are done where the frame has no schedule.
        restarts: Whether schedules start anew.
    """

    optim: pyro.optim.PyroOptim
    saved: Settings
    old: Mapping[str, Any]
    now: Mapping[str, Any]
    changed: Collection[str]
    step: int
    restarts: bool

    def of(self, frame: State) -> State:
        """Returns the revised frame."""
        schedule = _schedule_of(self.optim)
        handle = _construct(self.optim, self.now)
        asked = optimizer_state(state_dict_of(handle))["param_groups"][0]
        hyper = dict(optimizer_state(frame)["param_groups"][0])
        hyper.update({key: asked[key] for key in self.changed if key in asked and key != "lr"})

        if schedule is None:
            if self.saved["scheduler"] is not None:
                hyper = dict(asked)  # what a schedule has written into the group leaves with it
            elif "lr" in self.changed:
                hyper["lr"] = _scaled(hyper["lr"], self.old.get("lr"), asked["lr"])
            return state_of_one(hyper, {})

        if _follows_loss(handle):
            return self._follower(frame, handle, hyper)
        if self.saved["scheduler"] == schedule and "lr" not in self.changed and not self.restarts:
            return {"scheduler": frame["scheduler"], "optimizer": state_of_one(hyper, {})}
        return _replayed(handle, 0 if self.restarts else _steps_done(frame.get("scheduler"), self.step))

    def _follower(self, frame: State, handle: Any, hyper: dict[str, Any]) -> State:
        """Returns the frame of a schedule that follows the loss: it cannot be replayed, so it keeps what it saw."""
        name, args = _schedule_of(self.optim) or ("", {})
        before = self.saved["scheduler"]
        fresh = _frame(copied(state_dict_of(handle)))
        if before is None or before[0] != name or self.restarts:
            return fresh

        # Torch keeps an argument of a scheduler under its name, or, one for each parameter group, under its plural.
        schedule: State = dict(frame["scheduler"])
        differing = _changes(before[1], args)
        schedule.update({key: value for key, value in fresh["scheduler"].items() if key.rstrip("s") in differing})
        if "lr" in self.changed:
            asked = optimizer_state(fresh)["param_groups"][0]
            hyper["lr"] = _scaled(hyper["lr"], self.old.get("lr"), asked["lr"])
            schedule["_last_lr"] = [hyper["lr"]]
        return {"scheduler": schedule, "optimizer": state_of_one(hyper, {})}


def _replayed(handle: Any, num_steps: int) -> State:
    """Returns the frame of a new schedule after some steps."""
    # Torch warns of a schedule that is stepped before its optimizer, which here never steps.
    handle.optimizer._opt_called = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(num_steps):
            handle.step()
    return _frame(copied(state_dict_of(handle)))


def _scaled(current: Any, old: Any, new: Any) -> Any:
    """Returns a learning rate as it would be had it begun at `new` and not at `old`."""
    if isinstance(current, Tensor) or isinstance(new, Tensor) or not old or current == old:
        return new
    return new * (current / old)


def _steps_done(schedule: Mapping[str, Any] | None, step: int) -> int:
    """Returns how many steps a saved schedule has done; of one made of others, as many as its first."""
    if schedule is None:
        return step
    if "last_epoch" in schedule:
        return int(schedule["last_epoch"])
    inner = schedule.get("_schedulers") or [{}]
    return int(inner[0].get("last_epoch", step))


def _follows_loss(handle: Any) -> bool:
    """Returns whether `step` of a schedule takes the loss."""
    return "metrics" in inspect.signature(handle.step).parameters


def _construct(optim: pyro.optim.PyroOptim, args: Mapping[str, Any]) -> Any:
    """Returns the torch optimizer, or scheduler of one, of a placeholder."""
    constructor, _ = without_partial(optim.pt_optim_constructor)
    # Of two dimensions, since Muon refuses others.
    optimizer = construct(constructor, [torch.zeros(1, 1)], args)
    if _schedule_of(optim) is None:
        return optimizer
    return composed(optim.pt_scheduler_constructor, optimizer, optim.kwargs)


def _args_of(optim: pyro.optim.PyroOptim, name: str) -> dict[str, Any]:
    _, defaults = without_partial(optim.pt_optim_constructor)
    return {**defaults, **args_for("optim_args", optim.pt_optim_args, name)}


def _schedule_of(optim: pyro.optim.PyroOptim) -> list[Any] | None:
    """Returns name and arguments of the schedule, None without one."""
    # Both kinds of scheduler, Pyro's and distopt's, have this attribute, and no optimizer has.
    if not hasattr(optim, "pt_scheduler_constructor"):
        return None
    return [name_of(optim.pt_scheduler_constructor), _plain(optim.kwargs)]


def _schedule_text(schedule: list[Any] | None) -> str:
    if schedule is None:
        return "none"
    name, args = schedule
    return f"{name}({', '.join(f'{key}={value}' for key, value in args.items())})"


def _plain(value: Any) -> Any:
    """Returns a value as JSON has it; a function or class by its name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Callable):  # type: ignore[arg-type]
        return getattr(value, "__qualname__", type(value).__qualname__)
    return repr(value)
