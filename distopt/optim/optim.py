"""The per-parameter optimizer that Pyro's inference algorithms call."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, ClassVar, Literal

import pyro.optim
import torch
from torch import Tensor
from torch.amp import GradScaler

from distopt.optim.adagrad_rmsprop import AdagradRMSProp as pt_AdagradRMSProp
from distopt.optim.amp import scaled_step
from distopt.optim.arguments import Args, args_for, check_args, num_arguments
from distopt.optim.capabilities import (
    check_arguments,
    check_built,
    check_constructor,
    ours,
    quicker,
    shares,
    without_partial,
)
from distopt.optim.clipped_adam import ClippedAdam as pt_ClippedAdam
from distopt.optim.clipping import Clip, cached_clip
from distopt.optim.construction import construct
from distopt.optim.copies import Copies
from distopt.optim.dct_adam import DCTAdam as pt_DCTAdam
from distopt.optim.grouping import Grouping
from distopt.optim.groups import ParamRecord
from distopt.optim.packed_state import PackedState
from distopt.optim.packing import FlatGradients
from distopt.optim.param_view import GradClips, OptimObjects
from distopt.optim.parameters import ParamRegistry
from distopt.optim.state import State, check_state_dict, copied, frozen, is_scheduler
from distopt.optim.step_plan import LooseGradients, Planner, StepPlan, all_finite

__all__ = ["PyroOptim", "call_closure", "is_scheduler", "pt_AdagradRMSProp", "pt_ClippedAdam", "pt_DCTAdam"]

logger = logging.getLogger("distopt.optim")


class PyroOptim(Copies, pyro.optim.optim.PyroOptim):  # type: ignore[misc]
    """Manages parameters that appear, pause and vanish during training; drop-in for `pyro.optim.PyroOptim`.

    Each parameter has the optimizer state that it would have with a torch optimizer for it alone. Parameters with equal
    arguments, step count, dtype and device are updated together as one flat tensor.

    Args:
        optim_constructor: A `torch.optim.Optimizer` class, yours or torch's; or a callable `(params, **args)` that
            returns an optimizer.
        optim_args: Its keyword arguments; or a callable that returns them, given a parameter's name in the form of
            `nn.Module.named_parameters` (one argument) or module name and parameter name (two arguments).
        clip_args: `clip_norm`, `clip_value` (each parameter separately) and `global_norm` (one norm over all parameters
            of a call), or a callable that returns them, given one or two arguments as above.
        nonfinite: What to do with a step whose gradient is NaN or infinite somewhere: "step" regardless, as
            `pyro.optim` does, "skip" the step for all parameters, or "raise" FloatingPointError.
        scaler: Of a loss that is scaled for mixed precision (see `distopt.optim.amp.ScaledELBO`): divides the gradients
            by its scale, skips the step when one is not finite, and updates the scale.

    Attributes:
        nonfinite: As given; may be set.
        scaler: As given; may be set.
        num_skipped_steps: How many steps were skipped because a gradient was not finite.
        nonfinite_names: The parameters that had such a gradient when a step was skipped last.

    Raises:
        ValueError: The optimizer needs a closure (LBFGS), or an argument is NaN.
        TypeError: An argument is of a type that cannot be meant.

    Example:
        >>> import pyro
        >>> pyro.clear_param_store()
        >>> x = pyro.param("x", torch.ones(2))
        >>> x.square().sum().backward()
        >>> optim = PyroOptim(torch.optim.SGD, {"lr": 0.25})
        >>> optim([x.unconstrained()])
        >>> pyro.param("x").detach()
        tensor([0.5000, 0.5000])
    """

    _scheduled: ClassVar[bool] = False

    def __init__(
        self,
        optim_constructor: Callable[..., Any],
        optim_args: Args,
        clip_args: Args | None = None,
        *,
        nonfinite: Literal["step", "skip", "raise"] = "step",
        scaler: GradScaler | None = None,
    ) -> None:
        # All of it is checked here: an error in the first step would come after the model has run, on every rank.
        check_constructor(optim_constructor)
        check_args("optim_args", optim_args)
        if not callable(optim_args):
            check_arguments(optim_args, "optim_args")
        self.pt_clip_args: Args = {} if clip_args is None else clip_args
        check_args("clip_args", self.pt_clip_args)

        # The names that begin with pt_ are those of pyro.optim, whose users read them.
        self.pt_optim_constructor = optim_constructor
        self.pt_optim_args = optim_args
        if callable(optim_args):
            self.pt_optim_args_argc: int = num_arguments(optim_args)
        self.nonfinite = nonfinite
        self.scaler = scaler
        self.num_skipped_steps: int = 0
        self.nonfinite_names: tuple[str, ...] = ()

        # What a functools.partial adds are arguments as any others: the class behind it may be one that packs.
        constructor, self._default_args = without_partial(optim_constructor)
        self._constructor = ours(constructor)
        if not callable(self.pt_clip_args):
            Clip.of(self.pt_clip_args, "*")
        self._start()

    def _start(self) -> None:
        self._registry = ParamRegistry()
        self._groups = Grouping(self._constructor, self._construct, self._scheduled)
        self._planner = Planner(self._registry, self._groups, self._record)

    @property
    def nonfinite(self) -> Literal["step", "skip", "raise"]:
        """What to do with a gradient that is not finite; may be set."""
        return self._nonfinite

    @nonfinite.setter
    def nonfinite(self, value: Literal["step", "skip", "raise"]) -> None:
        if value not in ("step", "skip", "raise"):
            raise ValueError(f"nonfinite is {value!r}, expected 'step', 'skip' or 'raise'.")
        self._nonfinite: Literal["step", "skip", "raise"] = value

    # -- one step ------------------------------------------------------------------------------------------------------

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Takes one step for each of `params` by its `.grad`; parameters without a gradient are left as they are.

        Args:
            params: Unconstrained parameter tensors.
            *args: Passed on to the torch optimizers' `step`; a closure is called once, before anything is stepped.
            **kwargs: Likewise.

        Raises:
            ValueError: Two tensors have one name; nothing was stepped.
            FloatingPointError: A gradient is not finite and `nonfinite` is "raise"; nothing was stepped.
        """
        tensors = tuple(params)
        if args or kwargs:
            args, kwargs = call_closure(args, kwargs)
        with torch.no_grad():
            self._planner.settle()
            plan, buffers = self._planner.plan_for(tensors)
            self._apply(plan, buffers, args, kwargs)

    def clip_and_step(
        self,
        dense: Sequence[FlatGradients],
        loose: LooseGradients = (),
        *args: Any,
        missing: Sequence[tuple[str, Tensor]] = (),
        total_norm: float | None = None,
        is_finite: bool = True,
        **kwargs: Any,
    ) -> bool:
        """Clips gradients that are handed over instead of being read from `.grad`, and takes one step by them.

        Args:
            dense: Packed gradients; their buffers may be overwritten. The same `params` tuples each step are quick.
            loose: (name, parameter, gradient) of those that are not packed; gradients may be overwritten.
            *args: Passed on to the torch optimizers' `step`.
            missing: (name, parameter) of those that were passed and have no gradient.
            total_norm: What `global_norm` takes for the norm of all gradients, where other processes step by more of
                them; the norm of those at hand when None.
            is_finite: Whether the gradients of other processes are finite. A step is skipped, or an error, in all
                processes at once.
            **kwargs: Passed on likewise.

        Returns:
            Whether the step was taken, and not skipped because a gradient is not finite.

        Raises:
            FloatingPointError: A gradient is not finite and `nonfinite` is "raise"; nothing was stepped.
        """
        with torch.no_grad():
            self._planner.settle()
            plan = self._planner.flat_plan_for(dense, loose, missing)
            return self._apply(plan, plan.scatter(dense, loose), args, kwargs, total_norm, is_finite)

    def _apply(
        self,
        plan: StepPlan,
        buffers: list[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        total_norm: float | None = None,
        is_finite: bool = True,
    ) -> bool:
        """Unscales, clips and steps; returns False for a step that was skipped."""

        def step() -> None:
            plan.clip_and_step(buffers, args, kwargs, total_norm)

        if self.scaler is not None:
            gradients = plan.gradients(buffers)
            if not is_finite:  # so that this scaler backs off as that of the other process does
                for gradient in gradients:
                    (gradient._values() if gradient.is_sparse else gradient).fill_(math.inf)
            if scaled_step(self.scaler, gradients, step):
                return True
        elif self.nonfinite == "step" or (is_finite and all_finite(plan.gradients(buffers))):
            step()
            return True
        self._refuse(plan.nonfinite_names(buffers))
        return False

    def _refuse(self, names: tuple[str, ...]) -> None:
        """Skips a step whose gradient is not finite, or raises."""
        # The names are looked for only now: that takes a separate pass over each parameter.
        which = f"the gradient of {', '.join(map(repr, names))}" if names else "a gradient of another process"
        if self.nonfinite == "raise":
            raise FloatingPointError(f"{which} is not finite; no parameter was stepped.")
        self.num_skipped_steps += 1
        self.nonfinite_names = names
        logger.warning("step skipped, %d so far: %s is not finite", self.num_skipped_steps, which)

    # -- state ---------------------------------------------------------------------------------------------------------

    def get_state(self) -> dict[str, State]:
        """Returns `{parameter name: torch state dict}`, as `pyro.optim` writes it; with a scheduler, of both.

        State that was loaded and whose parameter has not been seen yet is in it, too. Nothing shares memory with the
        optimizer; tensors of parameters that are stepped together are views of one copy (`clone` one to keep it alone).
        """
        self._planner.settle()
        states = {id(m): state for g in self._groups for m, state in zip(g.members, g.states(), strict=True)}
        present = {name: states[id(record)] for name, record in self._registry.by_state_name().items()}
        return {**copied(self._registry.waiting), **present}

    def set_state(self, state_dict: Mapping[str, State]) -> None:
        """Replaces the state of the parameters in `state_dict`, of those already seen at once.

        State of parameters not seen yet waits for them. State dicts written by `pyro.optim` are accepted.

        Raises:
            ValueError: A state is of another optimizer or shape; nothing is changed then.
        """
        check_state_dict(state_dict)
        self._planner.settle()
        known = self._registry.loadable()
        live = [(known[name], state) for name, state in state_dict.items() if name in known]
        for record, state in live:
            self._groups.check(record, state)

        # All states are checked by now, so that a wrong one among many changes nothing.
        self._registry.waiting.update({name: copied(s) for name, s in state_dict.items() if name not in known})
        if live:
            self._groups.extract(record for record, _ in live)
            self._groups.assign(live)
            self._planner.forget()

    def packed_state(self) -> PackedState:
        """Returns what `get_state` returns in columns, which is quicker to make, to copy and to write.

        Tensors may be the optimizer's memory, until its next step: copy what is needed longer, and write to none.

        Cost:
            Calls in proportion to the groups of parameters that are stepped together, not to the parameters, while
            those are packed and the parameter store holds them by name.

        Example:
            >>> import pyro
            >>> pyro.clear_param_store()
            >>> x = pyro.param("x", torch.ones(2))
            >>> x.sum().backward()
            >>> optim = PyroOptim(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})
            >>> optim([x.unconstrained()])
            >>> optim.packed_state().columns[0].columns
            {'momentum_buffer': tensor([1., 1.])}
        """
        self._planner.settle()
        if not self._registry.is_in_store():
            return PackedState.from_states(self.get_state())  # names that only `get_state` can tell

        waiting = self._registry.waiting
        if waiting:
            present = {record.name for record in self._registry}
            waiting = {name: state for name, state in waiting.items() if name not in present}
        return PackedState.merged([PackedState.from_states(waiting), *(group.packed() for group in self._groups)])

    def learning_rates(self) -> list[float]:
        """Returns the learning rates of the parameters seen so far, each once, ascending; none before the first step.

        Cost: grows with the groups of parameters that are stepped together; reads a rate that is a tensor.
        """
        self._planner.settle()
        return sorted({rate for group in self._groups for rate in group.learning_rates()})

    @property
    def optim_objs(self) -> OptimObjects:
        """The torch optimizer (or scheduler) of each parameter, as `pyro.optim` shows it.

        Hyper-parameters can be read and set, gradients cleared, state read. A parameter that is removed, by `del` or
        `clear`, begins anew at its next step, with the arguments that hold then.
        """
        return OptimObjects(self._registry, self._groups, self._planner.remove)

    @property
    def grad_clip(self) -> GradClips:
        """What clips the gradient of each parameter; limits that are removed are read anew from `pt_clip_args`."""
        return GradClips(self._registry, lambda records: self._planner.read_clips(records, self._clip_of))

    # -- what a scheduler overrides, and records of new parameters -----------------------------------------------------

    def _construct(self, params: list[Any], args: dict[str, Any]) -> Any:
        """Builds the torch optimizer of a group; overridden where a scheduler goes around it."""
        optimizer = construct(quicker(self._constructor), params, args)
        check_built(optimizer)
        return optimizer

    def _args_of(self, name: str) -> dict[str, Any]:
        """Returns the arguments of the torch optimizer of parameter `name`."""
        return {**self._default_args, **args_for("optim_args", self.pt_optim_args, name)}

    def _birth(self) -> Hashable:
        """Returns what parameters that are first seen now have in common, beyond their arguments."""
        return None

    def _clip_of(self, name: str) -> Clip:
        """Returns the limits of parameter `name`; one object for equal limits, by whose identity plans are made."""
        return cached_clip(Clip.of(args_for("clip_args", self.pt_clip_args, name), name))

    def _record(self, name: str, p: Tensor) -> ParamRecord:
        """Returns the record of a parameter that is seen for the first time."""
        args = self._args_of(name)
        check_arguments(args, f"optim_args of parameter {name!r}")
        clip = self._clip_of(name)
        key = (_args_key(args), clip, p.dtype, p.device, self._birth())
        alone = not shares(self._constructor, args) or p.is_complex() or not p.is_contiguous()
        return ParamRecord(p, name, args, clip, key, alone, pyro.get_param_store().param_name(p) is not None)


def __getattr__(name: str) -> Any:
    # `pyro.optim.optim` has these three functions as well, which are made of `PyroOptim`.
    if name in ("AdagradRMSProp", "ClippedAdam", "DCTAdam"):
        return getattr(import_module("distopt.optim.pytorch_optimizers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _args_key(args: Mapping[str, Any]) -> Hashable:
    """Returns what is equal for arguments of two parameters that may share an optimizer; tensors count by identity."""
    return tuple((k, ("tensor", id(v)) if isinstance(v, Tensor) else frozen(v)) for k, v in sorted(args.items()))


def call_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Calls the closure among the arguments of a step, if there is one, and returns the others.

    Torch's optimizers call it themselves. Here a step is that of several optimizers, and the closure evaluates the
    model for all of them.
    """
    closure = args[0] if args else kwargs.pop("closure", None)
    if callable(closure):
        with torch.enable_grad():
            closure()
    return args[1:], kwargs
