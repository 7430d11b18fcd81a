"""The per-parameter optimizer that Pyro's inference algorithms call."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import pyro.optim
import torch
from torch import Tensor
from torch.amp import GradScaler

from distopt.optim.amp import scaled_step
from distopt.optim.arguments import Args, args_for, check_args, num_arguments
from distopt.optim.capabilities import check_arguments, check_constructor, drifts, packs, quicker, shares
from distopt.optim.clipping import Clip, clip_by_global_norm_
from distopt.optim.grouping import Grouping
from distopt.optim.groups import Member
from distopt.optim.packed_state import PackedState
from distopt.optim.packing import FlatGradients, has_dense_gradients
from distopt.optim.param_view import view_of
from distopt.optim.parameters import Roster
from distopt.optim.plan import FlatPlan, Plan, all_finite, nonfinite_names
from distopt.optim.state import State, check_state, check_state_dict, copied, frozen, is_scheduler, optimizer_of

_MAX_PLANS = 4  # calls of alternating kinds (wake and sleep, model and guide) that are remembered

logger = logging.getLogger("distopt.optim")


class Elsewhere(NamedTuple):
    """What this process must know of the gradients that other processes step by, beside the shared ones."""

    total_norm: float | None = None
    is_finite: bool = True


class PyroOptim(pyro.optim.PyroOptim):  # type: ignore[misc]
    """Manages parameters that appear, pause and vanish as training goes on; drop-in for `pyro.optim.PyroOptim`.

    Each parameter has the optimizer state it would have with a torch optimizer of its own. Parameters that have lived
    the same life (same arguments, same number of steps, same dtype and device) are stepped together.

    Args:
        optim_constructor: a `torch.optim.Optimizer` class, or a callable `(params, **args)` that returns an optimizer.
        optim_args: its keyword arguments; or a callable that returns them, given a parameter's name in the form of
            `nn.Module.named_parameters` (one argument) or module name and parameter name (two arguments).
        clip_args: `clip_norm`, `clip_value` (each parameter by itself) and `global_norm` (one norm over all parameters
            of a call), or a callable that returns them, given one or two arguments as above.
        nonfinite: what to do with a step whose gradient is NaN or infinite somewhere: "step" regardless, as
            `pyro.optim` does, "skip" the step for all parameters, or "raise" FloatingPointError.
        scaler: of a loss that is scaled for mixed precision (see `distopt.optim.amp.ScaledELBO`): divides the gradients
            by its scale, skips the step when one is not finite, and updates the scale.

    Attributes:
        nonfinite: as given.
        scaler: as given.
        num_skipped_steps: how many steps were skipped for a gradient that was not finite.
        nonfinite_names: the parameters that had such a gradient when last a step was skipped.

    Raises:
        ValueError: for an optimizer that needs a closure (LBFGS), or arguments that it does not take.

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
        check_constructor(optim_constructor)
        check_args("optim_args", optim_args)
        self.pt_clip_args: Args = {} if clip_args is None else clip_args
        check_args("clip_args", self.pt_clip_args)
        if nonfinite not in ("step", "skip", "raise"):
            raise ValueError(f"nonfinite is {nonfinite!r}, expected 'step', 'skip' or 'raise'.")
        self.pt_optim_constructor = optim_constructor
        self.pt_optim_args = optim_args
        if callable(optim_args):
            self.pt_optim_args_argc = num_arguments(optim_args)
        else:
            check_arguments(optim_args, "optim_args")
        self._clip = None if callable(self.pt_clip_args) else Clip.of(self.pt_clip_args, "*")
        self.nonfinite = nonfinite
        self.scaler = scaler
        self.num_skipped_steps = 0
        self.nonfinite_names: tuple[str, ...] = ()
        self._roster = Roster()
        self._groups = Grouping(optim_constructor, self._construct, self._scheduled)
        self._waiting: dict[str, State] = {}
        self._plans: list[Plan] = []
        self._flat_plans: list[FlatPlan] = []

    # -- one step ------------------------------------------------------------------------------------------------------

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Takes one step for each of `params` by its `.grad`; parameters without a gradient are left as they are.

        Args:
            params: unconstrained parameter tensors.
            *args: passed on to the torch optimizers' `step`; a closure is called once, before anything is stepped.
            **kwargs: likewise.
        """
        tensors = tuple(params)
        if args or kwargs:
            args, kwargs = _evaluated(args, kwargs)
        with torch.no_grad():
            plan, buffers = self._plan(tensors)
            self._apply(plan, buffers, args, kwargs, Elsewhere())

    def collect(self, params: Iterable[Tensor]) -> list[tuple[str, Tensor]]:
        """Returns (name, parameter) for each of `params`, sorted by name, each tensor once.

        Raises:
            ValueError: when two tensors have one name.
        """
        named: dict[str, Tensor] = {}
        tensors = list(params)
        for name, p in zip(self._roster.names(tensors), tensors, strict=True):
            if named.setdefault(name, p) is not p:
                raise ValueError(
                    f"two parameters are called {name!r}: one of shape {tuple(named[name].shape)} and one of shape "
                    f"{tuple(p.shape)}. Was it replaced in the parameter store while an old trace still holds it?"
                )
        return sorted(named.items(), key=itemgetter(0))

    def clip_and_step(
        self,
        dense: Sequence[FlatGradients],
        loose: Sequence[tuple[str, Tensor, Tensor]] = (),
        *args: Any,
        total_norm: float | None = None,
        is_finite: bool = True,
        **kwargs: Any,
    ) -> bool:
        """Clips gradients that are handed over instead of being read from `.grad`, and takes one step by them.

        Args:
            dense: Packed gradients; their buffers may be overwritten. The same `params` tuples each step are quick.
            loose: (name, parameter, gradient) of those that are not packed; gradients may be overwritten.
            *args: Passed on to the torch optimizers' `step`.
            total_norm: What `global_norm` takes for the norm of all gradients, where other processes step by more of
                them; the norm of those at hand when None.
            is_finite: Whether the gradients of other processes are finite. A step is skipped, or an error, in all
                processes at once.
            **kwargs: Passed on likewise.

        Returns:
            Whether the step was taken, and not skipped for a gradient that is not finite.

        Raises:
            FloatingPointError: A gradient is not finite and `nonfinite` is "raise"; nothing was stepped.
        """
        with torch.no_grad():
            plan = self._flat_plan(dense, loose)
            return self._apply(plan, plan.scattered(dense, loose), args, kwargs, Elsewhere(total_norm, is_finite))

    # -- state ---------------------------------------------------------------------------------------------------------

    def get_state(self) -> dict[str, State]:
        """Returns `{parameter name: torch state dict}`, as `pyro.optim` writes it; of a scheduler's both parts.

        State that was loaded and whose parameter has not come yet is in it, too. Nothing shares memory with the
        optimizer; tensors of parameters that are stepped together are parts of one copy (`clone` one to keep it alone).
        """
        store = pyro.get_param_store()
        result = copied(self._waiting)
        states = {id(m): state for g in self._groups for m, state in zip(g.members, g.states(), strict=True)}
        for m in self._roster:
            name = store.param_name(m.param) or m.name
            if name not in result or store._params.get(m.name) is m.param:
                result[name] = states[id(m)]
        return result  # type: ignore[no-any-return]

    def set_state(self, state_dict: Mapping[str, State]) -> None:
        """Replaces the state of the parameters in `state_dict`, of those already seen at once.

        State of parameters not seen yet waits for them. State dicts written by `pyro.optim` are accepted.

        Raises:
            ValueError: when a state is of another optimizer or shape; nothing is changed then.
        """
        check_state_dict(state_dict)
        in_store = pyro.get_param_store()._params  # a tensor that was replaced there is another parameter's life
        known = {m.name: m for m in self._roster if in_store.get(m.name, m.param) is m.param}
        live = [(known[name], state) for name, state in state_dict.items() if name in known]
        for m, state in live:
            self._check(m, state)
        self._waiting.update({name: copied(s) for name, s in state_dict.items() if name not in known})
        if live:
            self._groups.extract(m for m, _ in live)
            self._groups.place(live)
            self._forget_plans()

    def packed_state(self) -> PackedState:
        """Returns what `get_state` returns in columns, which is quicker to make, to copy and to write.

        Tensors may be the optimizer's memory, until its next step: copy what is needed longer, and write to none.

        Cost: calls in proportion to the groups of parameters that are stepped together, not to the parameters, while
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
        if not self._roster.is_in_store():
            return PackedState.from_states(self.get_state())  # names that only `get_state` can tell

        groups = [group.packed() for group in self._groups]
        seen = {m.name for m in self._roster} if self._waiting else ()
        waiting = {name: state for name, state in self._waiting.items() if name not in seen}
        return PackedState.merged([PackedState.from_states(waiting), *groups])

    def set_packed_state(self, packed: PackedState) -> None:
        """Does what `set_state` does with `packed.unpack()`; `packed` may be changed afterwards.

        Raises:
            ValueError: As `set_state`.
        """
        self.set_state(packed.unpack())

    def save(self, filename: str | Path) -> None:
        """Writes `get_state()` to the file `filename`; `pyro.optim` can read it."""
        with open(filename, "wb") as file:
            torch.save(self.get_state(), file)

    def load(self, filename: str | Path, map_location: Any = None) -> None:
        """Reads what `save` wrote, here or in `pyro.optim`, and hands it to `set_state`.

        Args:
            filename: the file; only tensors, numbers, strings and containers of them are read, no code is run.
            map_location: as in `torch.load`.
        """
        with open(filename, "rb") as file:
            self.set_state(torch.load(file, map_location=map_location, weights_only=True))

    @property
    def optim_objs(self) -> dict[Tensor, Any]:
        """The torch optimizer (or scheduler) of each parameter, as `pyro.optim` shows it.

        Parameters that are stepped together share its hyper-parameters; gradient, state and `state_dict` are those of
        the one parameter.
        """
        return {m.param: view_of(m, m.group) for m in self._roster if m.group is not None}

    # -- inside --------------------------------------------------------------------------------------------------------

    def _construct(self, params: list[Any], args: dict[str, Any]) -> Any:
        """Builds the torch optimizer of a group; overridden where a scheduler goes around it."""
        return quicker(self.pt_optim_constructor)(params, **args)

    def _birth(self) -> Hashable:
        """Returns what parameters that are first seen now have in common, beyond their arguments."""
        return None

    def _plan(self, tensors: tuple[Tensor, ...]) -> tuple[Plan, list[Tensor]]:
        """Returns the plan for a call with `tensors`, and the gradients of its packed groups."""
        for i, plan in enumerate(self._plans):
            if plan.fits(tensors):
                buffers = plan.gathered()
                if buffers is not None:
                    if i:
                        self._plans.insert(0, self._plans.pop(i))
                    return plan, buffers
        members = self._roster.known(tensors)
        if members is None:
            members = [self._member(name, p) for name, p in self.collect(tensors)]
            self._let_go(members)
        touched, missing = members, []
        if not has_dense_gradients(tensors):
            for m in members:
                if m.param.grad is not None and m.param.grad.layout is not torch.strided:
                    self._set_alone(m)
            touched = [m for m in members if m.param.grad is not None]
            missing = [m for m in members if m.param.grad is None]
        self._arrange(members, touched, missing)
        idle = [m for m in missing if drifts(m.args)]  # pyro.optim calls their optimizers, too
        plan = Plan(tensors, touched + idle, [m.param for m in missing])
        buffers = plan.gathered()
        if buffers is None:
            raise RuntimeError("distopt.optim: gradients changed while the step was being planned.")
        self._plans = [plan, *self._plans[: _MAX_PLANS - 1]]
        return plan, buffers

    def _flat_plan(self, dense: Sequence[FlatGradients], loose: Sequence[tuple[str, Tensor, Tensor]]) -> FlatPlan:
        for plan in self._flat_plans:
            if plan.is_for(dense, loose):
                return plan
        named = [pair for flat in dense for pair in zip(flat.names, flat.params, strict=True)]
        named += [(name, p) for name, p, _ in loose]
        members = [self._member(name, p) for name, p in named]
        self._let_go(members)
        for m, (_, _, gradient) in zip(members[len(members) - len(loose) :], loose, strict=True):
            if gradient.layout is not torch.strided:
                self._set_alone(m)
        self._arrange(members, members, [])
        plan = FlatPlan(dense, loose, members)
        self._flat_plans = [plan, *self._flat_plans[: _MAX_PLANS - 1]]
        return plan

    def _apply(
        self, plan: Plan, buffers: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], elsewhere: Elsewhere
    ) -> bool:
        """Unscales, clips and steps; returns False for a step that was skipped."""

        def step() -> None:
            self._step(plan, buffers, args, kwargs, elsewhere.total_norm)

        if self.scaler is not None:
            gradients = plan.gradients(buffers)
            if not elsewhere.is_finite:  # so that this scaler backs off as that of the other process does
                for gradient in gradients:
                    (gradient._values() if gradient.is_sparse else gradient).fill_(math.inf)
            if scaled_step(self.scaler, gradients, step):
                return True
        elif self.nonfinite == "step" or (elsewhere.is_finite and all_finite(plan.gradients(buffers))):
            step()
            return True
        self._refuse(nonfinite_names(plan, buffers))
        return False

    def _step(
        self,
        plan: Plan,
        buffers: list[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        total_norm: float | None,
    ) -> None:
        """Clips and steps."""
        if plan.clips or plan.norms:
            self._clip_(plan, buffers, total_norm)
        for group, buffer in zip(plan.packed, buffers, strict=True):
            group.step(buffer, *args, **kwargs)
        for listed, members in plan.listed:
            listed.step(members, *args, **kwargs)

    def _clip_(self, plan: Plan, buffers: list[Tensor], total_norm: float | None) -> None:
        """Clips in place; `.grad`, which packed groups have copied, follows only if an element changed."""
        changed = False
        if plan.clips:
            for group, buffer in zip(plan.packed, buffers, strict=True):
                changed |= group.clip_(buffer)
            for listed, members in plan.listed:
                listed.clip_(members)
        for norm in plan.norms:
            changed |= clip_by_global_norm_(plan.gradients(buffers, norm), norm, total_norm)
        if changed:
            plan.write_gradients()

    def _refuse(self, names: tuple[str, ...]) -> None:
        """Leaves out a step whose gradient is not finite, or raises."""
        of = f"the gradient of {', '.join(map(repr, names))}" if names else "a gradient of another process"
        if self.nonfinite == "raise":
            raise FloatingPointError(f"{of} is not finite; no parameter was stepped.")
        self.num_skipped_steps += 1
        self.nonfinite_names = names
        logger.warning("step skipped, %d so far: %s is not finite", self.num_skipped_steps, of)

    def _member(self, name: str, p: Tensor) -> Member:
        member = self._roster.get(p)
        if member is None:
            args = args_for("optim_args", self.pt_optim_args, name)
            check_arguments(args, f"optim_args of parameter {name!r}")
            clip = self._clip or Clip.of(args_for("clip_args", self.pt_clip_args, name), name)
            key = (_by_identity(args), clip, p.dtype, p.device, self._birth())
            alone = not shares(self.pt_optim_constructor, args) or p.is_complex() or not p.is_contiguous()
            member = Member(p, name, args, clip, key, alone, pyro.get_param_store().param_name(p) is not None)
            self._roster.add(member)
        return member

    def _let_go(self, members: Sequence[Member]) -> None:
        """Parts with those that the parameter store has let go and that are not among `members`."""
        for m in self._roster.left(members):
            [(_, state)] = self._groups.extract([m])
            self._roster.part(m, state)
            self._forget_plans()

    def _arrange(self, members: Sequence[Member], touched: Sequence[Member], missing: Sequence[Member]) -> None:
        """Sees to it that every one of `members` is in a group, and that no group is touched in half."""
        changed = False
        moved = [m for m in members if m.group is not None and m.group.has_lost(m)]
        if moved:
            self._groups.place(self._rekeyed(self._groups.extract(_mates(moved))))
            changed = True
        for part in (touched, missing):
            new = [m for m in part if m.group is None]
            if new:
                self._groups.place([(m, self._claimed(m)) for m in new])
                changed = True
        changed |= self._groups.part(touched)
        changed |= self._groups.unpack([m for m in missing if drifts(m.args)])
        if changed:
            self._forget_plans()

    def _claimed(self, m: Member) -> State | None:
        """Returns the state that waits for a parameter now seen first, or with which it once left."""
        state = self._waiting.get(m.name)
        if state is None:
            return self._roster.returned(m.param)
        self._check(m, state)
        return self._waiting.pop(m.name)

    def _rekeyed(self, placed: list[tuple[Member, State]]) -> list[tuple[Member, State]]:
        """Notes the new dtype, device and order of memory of parameters that were moved."""
        for m, _ in placed:
            args, clip, _, _, birth = m.key
            m.key = (args, clip, m.param.dtype, m.param.device, birth)
            m.alone |= not m.param.is_contiguous()
        return placed

    def _check(self, m: Member, state: State) -> None:
        handle = m.group.handle if m.group is not None else self._construct([torch.zeros(1)], m.args)
        hyper = set(optimizer_of(handle).param_groups[0])
        name = self.pt_optim_constructor.__name__
        check_state(m.name, state, m.param, hyper, is_scheduler(handle), name, packs(self.pt_optim_constructor))

    def _set_alone(self, m: Member) -> None:
        if not m.alone:
            placed = self._groups.extract([m]) if m.group is not None else []
            m.alone = True
            self._groups.place(placed)
            self._forget_plans()

    def _forget_plans(self) -> None:
        self._plans.clear()
        self._flat_plans.clear()


def _by_identity(args: Mapping[str, Any]) -> Hashable:
    """Stands for arguments such that two parameters with equal ones may share an optimizer; tensors by identity."""
    return tuple((k, ("tensor", id(v)) if isinstance(v, Tensor) else frozen(v)) for k, v in sorted(args.items()))


def _mates(moved: Sequence[Member]) -> list[Member]:
    """Returns all members of the packed groups that `moved` have left, and the moved ones."""
    from distopt.optim.groups import PackedGroup

    groups = {id(m.group): m.group for m in moved if isinstance(m.group, PackedGroup)}
    mates = [m for g in groups.values() for m in g.members]
    return mates + [m for m in moved if not isinstance(m.group, PackedGroup)]


def _evaluated(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Calls the closure among the arguments of a step, if there is one, and takes it out."""
    closure = args[0] if args else kwargs.pop("closure", None)
    if callable(closure):
        with torch.enable_grad():
            closure()
    return args[1:], kwargs
