"""Optimizers that average gradients over all workers before they step."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pyro.optim
import torch
from torch import Tensor, nn

from distopt.backends import Backend, BackendError, current
from distopt.config.reduce import ReduceOptions
from distopt.optim.arguments import args_for
from distopt.optim.clipping import global_norm
from distopt.optim.distributed.convert import as_ours, takes_metric
from distopt.optim.lr_scheduler import PyroLRScheduler
from distopt.optim.optim import PyroOptim, call_closure
from distopt.optim.packed_state import PackedState
from distopt.optim.packing import FlatGradients
from distopt.reduce import Brought, DisagreementError, DriftError, PeerError, Reduced, Reducer
from distopt.reduce.agreement import share_values_
from distopt.reduce.comm_hooks.power_sgd import PowerSgd
from distopt.reduce.drift import explain_nonfinite, is_finite
from distopt.reduce.messages import Control, Kind
from distopt.reduce.reducer import is_joining, joining
from distopt.rng import NoisePolicy

logger = logging.getLogger("distopt.optim")

# Every rank raises these by itself, so there is no rank to inform.
_RAISED_BY_ALL = (PeerError, DisagreementError, DriftError, BackendError)


@dataclass(frozen=True, slots=True)
class StepInfo:
    """What all ranks know after one call of a `DistributedOptimizer`; equal on all of them.

    Attributes:
        loss: Mean of the ranks' losses, over those that gave one; None when none did.
        stop: Whether any rank asked to stop.
        num_active: Number of ranks whose gradients went into the step; 0 after a call that only added its gradients to
            those of the next one (`backward_passes_per_step`).
        gradient_norm: 2-norm of the gradient that all ranks stepped by, before clipping, without that of parameters
            which belong to one rank alone; None unless it was asked for.
    """

    loss: float | None = None
    stop: bool = False
    num_active: int = 0
    gradient_norm: float | None = None


def _delegate(name: str, doc: str, *, writable: bool = False) -> Any:
    """Returns a property that is the wrapped optimizer's attribute `name`."""

    def read(optimizer: DistributedOptimizer) -> Any:
        return getattr(optimizer.optim, name)

    def write(optimizer: DistributedOptimizer, value: Any) -> None:
        setattr(optimizer.optim, name, value)

    return property(read, write if writable else None, doc=doc)


class DistributedOptimizer(pyro.optim.PyroOptim):  # type: ignore[misc]
    """Steps by the gradients of all ranks; used in place of the `PyroOptim` that it wraps.

    Gradients are packed into one buffer, which is summed over the ranks by one all-reduce; the wrapped optimizer clips
    the average and steps by it, in the same way on all ranks. Parameters may appear on any rank at any step: they take
    the value of the lowest rank that has them and are created where they are missing. A parameter is stepped when any
    rank touched it; where a gradient is absent it counts as zero; the mean is over the ranks that are active. Where
    ranks start from different values, the gradients of the first step are computed from each rank's values, unless
    `synchronize` was called before; `distopt.infer.SVI` does.

    Parameters of sharded plates are stepped by their rank alone; `global_norm` is over those of all ranks together.

    It is a `pyro.optim.PyroOptim` because Pyro's SVI accepts nothing else, but runs none of its code: everything public
    is defined here. `optim`, `options`, `noise`, `backend`, `reducer` and `is_synchronized` say what it is made of;
    calling it, `step_with`, `zero_grad`, `synchronize`, `join`, `abort` and, over a scheduler, `step` are what a
    training loop calls; `get_state`, `set_state`, `save`, `load` and `rank_local_state` are its state. `nonfinite`,
    `scaler`, `num_skipped_steps`, `nonfinite_names`, `optim_objs` and `pt_...` are the wrapped optimizer's. Setting any
    other attribute is an error.

    Args:
        optim: The optimizer to wrap: of `distopt.optim` or `pyro.optim`, a scheduler too. State that it has loaded is
            kept.
        backend: Link to the other ranks; `distopt.backends.current()` at the first step when None.
        reduce: How gradients of several ranks become one; the same on all ranks.
        noise: `independent`: ranks whose random generators are in the same state at the first step, as they are after
            the same seed, draw different noise from then on, so that `W` ranks are `W` particles. `shared`: their
            generators are left as they are.

    Raises:
        PeerError: A rank has raised in its model; the same on all ranks, with its traceback.
        DisagreementError: Ranks differ in shape, dtype or constraint of a parameter, in options, or in their step.
        DriftError: Replicas differ.
        BackendError: A rank is gone or late; names it and where it was last seen. The world is not usable afterwards.

    Cost:
        In the steady state one all-reduce of the gradients and about 30 numbers plus one for each parameter.

    Example:
        >>> import pyro
        >>> from distopt.optim import Adam
        >>> pyro.clear_param_store()
        >>> x = pyro.param("x", torch.ones(2))
        >>> x.square().sum().backward()
        >>> optim = DistributedOptimizer(Adam({"lr": 0.5}))
        >>> optim.step_with([x.unconstrained()], loss=2.0)
        StepInfo(loss=2.0, stop=False, num_active=1, gradient_norm=None)
        >>> pyro.param("x").detach()
        tensor([0.5000, 0.5000])
    """

    def __init__(
        self,
        optim: pyro.optim.PyroOptim,
        *,
        backend: Backend | None = None,
        reduce: ReduceOptions = ReduceOptions(),  # noqa: B008  # frozen
        noise: NoisePolicy = "independent",
    ) -> None:
        if isinstance(optim, DistributedOptimizer):
            raise TypeError(f"{type(optim).__name__} is distributed already; give the optimizer that it wraps.")
        if not isinstance(reduce, ReduceOptions):
            raise TypeError(f"reduce={reduce!r}: expected ReduceOptions(...) of distopt.optim.")
        if noise not in get_args(NoisePolicy):
            raise ValueError(f"noise={noise!r} should be 'independent' or 'shared'.")
        self._optim = as_ours(optim)
        self._options = reduce
        self._noise = noise
        self._backend = backend
        self._reducer: Reducer | None = None
        self._accumulator = GradientAccumulator(reduce.backward_passes_per_step)
        self._losses: list[float] = []
        self._stop = False

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and not hasattr(type(self), name):
            known = [each for each in dir(type(self)) if not each.startswith("_")]
            near = difflib.get_close_matches(name, known, 1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}. {hint}")
        object.__setattr__(self, name, value)

    @property
    def optim(self) -> PyroOptim:
        """The wrapped optimizer, which is this rank's own."""
        return self._optim

    @property
    def options(self) -> ReduceOptions:
        """How gradients are reduced."""
        return self._options

    @property
    def noise(self) -> NoisePolicy:
        """Whether the ranks draw `independent` noise, or all the same."""
        return self._noise

    @property
    def backend(self) -> Backend:
        """The link to the other ranks."""
        return self.reducer.backend

    @property
    def reducer(self) -> Reducer:
        """What reduces the gradients; made when it is first needed, so that `init` may come after the optimizer."""
        if self._reducer is None:
            self._reducer = Reducer(self._backend or current(), self.options, self.noise, self.optim.get_state)
        return self._reducer

    @property
    def is_synchronized(self) -> bool:
        """Whether the ranks have agreed on parameters before, so that these are equal; always with one rank."""
        reducer = self.reducer
        return reducer.step > 0 or reducer.num_agreements > 0 or reducer.backend.world_size == 1

    # The wrapped optimizer's, by the names of pyro.optim and distopt.optim.

    nonfinite = _delegate(
        "nonfinite", "What to do with a gradient that is not finite: `step`, `skip` or `raise`.", writable=True
    )
    scaler = _delegate("scaler", "The scaler of a loss in mixed precision, None without.")
    num_skipped_steps = _delegate("num_skipped_steps", "How many steps were skipped, on all ranks together.")
    nonfinite_names = _delegate("nonfinite_names", "The parameters whose gradient was not finite at the last skip.")
    optim_objs = _delegate("optim_objs", "The torch optimizer (or scheduler) of each parameter.")
    pt_optim_constructor = _delegate("pt_optim_constructor", "The class of the torch optimizers.")
    pt_optim_args = _delegate("pt_optim_args", "Its arguments, or a callable that returns them.")
    pt_clip_args = _delegate("pt_clip_args", "The limits on gradients, or a callable that returns them.")

    # One step.

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Reduces the gradients of `params` with those of all ranks and takes one step; a collective call.

        Args:
            params: This rank's unconstrained parameter tensors; may differ between ranks.
            *args: Passed on to the torch optimizers' `step`; a closure is called once, before anything is read.
            **kwargs: Likewise.
        """
        self._call(params, args, kwargs)

    def step_with(
        self,
        params: Iterable[Tensor],
        *args: Any,
        loss: float | Tensor | None = None,
        step: int | None = None,
        stop: bool = False,
        measure_norm: bool = False,
        **kwargs: Any,
    ) -> StepInfo:
        """Does what a call does, and shares what a training loop needs to know; a collective call.

        Args:
            params: As for a call.
            *args: As for a call.
            loss: This rank's loss, whose mean over the ranks is returned.
            step: Number of the step in the caller's loop; a rank that has left out a step is reported then.
            stop: Whether this rank asks all ranks to stop, to save, or whatever the caller makes of it.
            measure_norm: Whether to compute the norm of the gradient, which takes one pass over it.
            **kwargs: As for a call.

        Cost:
            That of a call: all of it is sent with the gradients.
        """
        if loss is not None:
            self._losses.append(float(loss))
        self._stop |= stop
        return self._call(params, args, kwargs, step, measure_norm)

    def _call(
        self,
        params: Iterable[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        step: int | None = None,
        measure_norm: bool = False,
    ) -> StepInfo:
        args, kwargs = call_closure(args, kwargs)
        accumulated = self._accumulator.add(params)
        if accumulated is None:
            return StepInfo()
        if step is not None:
            self.reducer.step = step
        return self._reduce_and_step(accumulated, args, kwargs, measure_norm)

    def _reduce_and_step(
        self, params: Iterable[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], measure_norm: bool = False
    ) -> StepInfo:
        reducer = self.reducer
        reducer.backend.note(reducer.step, "reduce")
        gradients, message = reducer.look(params), self._message(Kind.GRADIENT)
        if gradients.own:
            try:
                announce_local(self.optim, gradients, message)
            except ValueError as error:
                self.abort(error)
                raise
        reduced = reducer.reduce(gradients, message)
        norm = reduced.norm() if measure_norm else None
        self._apply(reduced, args, kwargs)
        heard = reduced.heard
        return StepInfo(heard.value, heard.num_flags > 0, heard.num_active, norm)

    def zero_grad(self, params: Iterable[Tensor]) -> None:
        """Sets the gradient of each of `params` that has one to zero, as Pyro's SVI does after each step.

        It is done in place. Those of large parameters (32,768 elements and more) are dropped (None) instead, and count
        as zero until backward leaves new ones, which then need no sum.
        """
        self.reducer.cleared.clear(params)

    @property
    def step(self) -> Callable[..., None]:
        """Steps the wrapped scheduler, for `ReduceLROnPlateau` with its metric averaged over the ranks.

        Raises:
            AttributeError: The wrapped optimizer is no scheduler, so that `hasattr(optimizer, "step")` tells.

        Cost:
            One all-reduce of the first bucket when there is a metric or `join` is open, else none.
        """
        if not isinstance(self.optim, PyroLRScheduler):
            raise AttributeError(f"step() is for schedulers; this wraps a {self.optim.pt_optim_constructor.__name__}.")
        return self._step_scheduler

    def _step_scheduler(self, *args: Any, **kwargs: Any) -> None:
        metric = args[0] if args else kwargs.get("metrics")
        is_metric = (
            isinstance(metric, (int, float, Tensor)) and not isinstance(metric, bool) and takes_metric(self.optim)
        )
        if is_metric or is_joining(self.backend):
            value = float(metric) if is_metric and metric is not None else None
            heard = self.reducer.reduce(None, Control(self.reducer.step, Kind.SCHEDULE, value=value)).heard
            if is_metric:
                args, kwargs = (heard.value, *args[1:]), {k: v for k, v in kwargs.items() if k != "metrics"}
        self.optim.step(*args, **kwargs)

    # Taking part in other ways.

    @contextmanager
    def join(self) -> Iterator[None]:
        """Lets ranks with less data finish early: inside, a rank that is done takes part with zeros until all are.

        Every rank must open it, and call no other `DistributedOptimizer` inside. What a done rank steps by is the mean
        over the ranks still active, so replicas stay equal; calls of `step()` for a scheduler are followed too. Where
        `backward_passes_per_step` does not divide a rank's calls, the last ones make a step of their own.

        Example:
            >>> from distopt.optim import SGD
            >>> optim = DistributedOptimizer(SGD({"lr": 0.1}))
            >>> with optim.join():
            ...     for batch in []:
            ...         svi.step(batch)
        """
        with joining(self.backend, self.reducer):
            try:
                yield
            except Exception as error:
                self.abort(error)
                raise
            remaining = self._accumulator.take()
            if remaining:
                self._reduce_and_step(remaining, (), {})
            while self._follow():
                pass

    def abort(self, error: BaseException) -> None:
        """Tells all ranks in their next call that this one has failed, so that all raise this cause.

        The caller then raises `error` itself. Does nothing when the cause came from another rank, or the world is
        broken.
        """
        reducer = self.reducer
        if isinstance(error, _RAISED_BY_ALL) or reducer.backend.world_size == 1:
            return
        reducer.backend.note(reducer.step, "abort")
        try:
            reducer.abort(error, Control(reducer.step, Kind.ABORT))
        except RuntimeError as second:
            logger.warning("rank %d could not tell the others of its error: %s", reducer.backend.rank, second)

    def synchronize(self, params: Iterable[Tensor] | None = None, *, modules: Iterable[nn.Module] = ()) -> None:
        """Agrees on parameters before the first step, so that all ranks compute it from equal values.

        Args:
            params: Unconstrained tensors; all of the parameter store when None.
            modules: Their buffers (batch statistics, say) take rank 0's values, too.

        Cost:
            One round and one agreement; one broadcast for each dtype of the buffers.
        """
        reducer = self.reducer
        if params is None:
            params = [param for _, param in pyro.get_param_store().named_parameters()]
        reducer.reduce(reducer.look(list(params)), Control(reducer.step, Kind.AGREE))
        by_dtype: dict[tuple[torch.dtype, str], list[Tensor]] = {}
        for module in modules:
            for _, buffer in sorted(module.named_buffers()):
                by_dtype.setdefault((buffer.dtype, buffer.device.type), []).append(buffer)
        for (dtype, _), buffers in by_dtype.items():
            share_values_(reducer.backend, buffers, 0, dtype)

    # State.

    def get_state(self) -> dict[str, Any]:
        """Returns the wrapped optimizer's state by parameter name; the same on every rank."""
        return self.optim.get_state()

    def set_state(self, state_dict: Mapping[str, Any]) -> None:
        """Replaces the wrapped optimizer's state; every rank must call it."""
        self.optim.set_state(state_dict)

    def packed_state(self) -> PackedState:
        """As the wrapped optimizer's; the same on every rank."""
        return self.optim.packed_state()

    def set_packed_state(self, packed: PackedState) -> None:
        """As the wrapped optimizer's; every rank must call it."""
        self.optim.set_packed_state(packed)

    @property
    def rank_local_state(self) -> PowerSgd | None:
        """What holds state of this rank alone (`state_dict`, `load_state_dict`), to be saved; None if nothing."""
        return self.reducer.rank_local_state

    def save(self, filename: str | Path) -> None:
        """Writes the state on rank 0; does nothing on the others."""
        if self.reducer.backend.rank == 0:
            self.optim.save(filename)

    def load(self, filename: str | Path, map_location: Any = None) -> None:
        """Reads the state; every rank must call it."""
        self.optim.load(filename, map_location)

    # Inside.

    def _message(self, kind: Kind | None) -> Control:
        """Returns what this rank tells the others with its gradients; a loss and a wish to stop are told once."""
        losses, self._losses = self._losses, []
        stop, self._stop = self._stop, False
        value = sum(losses) / len(losses) if losses else None
        return Control(self.reducer.step, kind, flag=stop, value=value)

    def _follow(self) -> bool:
        """One round of a rank that has joined; False when no rank is active any more."""
        reducer = self.reducer
        reducer.backend.note(reducer.step, "join")
        reduced = reducer.reduce(None, self._message(None))
        if reduced.heard.num_active == 0:
            return False
        if reduced.heard.kind is Kind.SCHEDULE:
            value = reduced.heard.value
            self.optim.step(*(() if value is None else (value,)))
        elif reduced.heard.kind is Kind.GRADIENT:
            self._apply(reduced, (), {})
        return True

    def _apply(self, reduced: Reduced, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reducer, heard = self.reducer, reduced.heard
        reducer.backend.note(reducer.step, "optimizer")
        try:
            stepped = self.optim.clip_and_step(
                [FlatGradients(*part) for part in reduced.dense],
                reduced.loose,
                *args,
                total_norm=total_norm(self.optim, reduced),
                is_finite=not heard.num_nonfinite,
                **kwargs,
            )
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} {self._explain_nonfinite(reduced)}") from None
        if not stepped:
            logger.warning(self._explain_nonfinite(reduced))
            reducer.forget_errors()
        reducer.step += 1
        reducer.backend.note(reducer.step, "model")

    def _explain_nonfinite(self, reduced: Reduced) -> str:
        reducer = self.reducer
        return explain_nonfinite(reducer.backend, reducer.layout.names, reduced.brought, reducer.step)


class GradientAccumulator:
    """Adds up the gradients of several calls of the optimizer for one step.

    Args:
        num_calls: Calls that make one step.
    """

    def __init__(self, num_calls: int) -> None:
        self._num_calls = num_calls
        self._num_added = 0
        # By identity, since tensors compare by element; the parameter keeps its id from being given to another.
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, params: Iterable[Tensor]) -> Iterable[Tensor] | None:
        """Adds this call's gradients; returns the parameters of all calls with their sums in `.grad`, once complete."""
        if self._num_calls == 1:
            return params
        params = list(params)
        self._num_added += 1
        for param in params:
            if param.grad is not None:
                _, before = self._sums.get(id(param), (param, None))
                self._sums[id(param)] = (param, param.grad.clone() if before is None else before + param.grad)
        if self._num_added < self._num_calls:
            return None
        return {id(param): param for param in (*params, *self.take())}.values()

    def take(self) -> list[Tensor]:
        """Returns the parameters of the calls since the last step with their sums in `.grad`, and starts over."""
        sums, self._sums = self._sums, {}
        self._num_added = 0
        for param, gradient in sums.values():
            param.grad = gradient
        return [param for param, _ in sums.values()]


# What the ranks must know of gradients that one of them alone steps by: those of its sharded plates.


def announce_local(optim: PyroOptim, brought: Brought, message: Control) -> None:
    """Writes into `message` what decides how all ranks step: whether they are finite, and their norm where that clips.

    Raises:
        ValueError: `clip_args` is a callable and wants a global norm for some of them.
    """
    if optim.nonfinite != "step" or optim.scaler is not None:
        message.nonfinite = not all(is_finite(gradient) for _, _, gradient in brought.own)
    args = optim.pt_clip_args
    if not callable(args):
        if args.get("global_norm") is not None:
            message.own_square = brought.own_square()
        return
    for name, _, _ in brought.own:
        if args_for("clip_args", args, name).get("global_norm") is not None:
            raise ValueError(
                f"clip_args is a callable and gives global_norm for {name!r}, which is one rank's own, so the ranks "
                "cannot tell over which parameters the norm goes. Give clip_args={'global_norm': ...}, which is for "
                "all, or clip_norm for this one."
            )


def total_norm(optim: PyroOptim, reduced: Reduced) -> float | None:
    """Returns the norm over all parameters of all ranks, bit by bit the same on each; None where none has its own."""
    if not reduced.heard.own_square:
        return None
    shared = [part.buffer for part in reduced.dense]
    shared += [gradient for _, _, gradient in reduced.loose[: len(reduced.loose) - reduced.num_own]]
    total = math.sqrt(float(global_norm(shared)) ** 2 + reduced.heard.own_square)
    return total if optim.scaler is None else total / optim.scaler.get_scale()
