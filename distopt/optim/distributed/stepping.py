"""How one step over all ranks is taken: gradients are added up, announced, reduced, and handed to the optimizer."""

from __future__ import annotations

import logging
import math
import operator
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
from torch import Tensor

from distopt.backends import Backend, BackendError, current
from distopt.config.reduce import ReduceOptions
from distopt.nonfinite import is_finite
from distopt.optim.arguments import args_for
from distopt.optim.lr_scheduler import PyroLRScheduler
from distopt.optim.optim import PyroOptim, call_closure
from distopt.reduce import DisagreementError, DriftError, LocalGradients, PeerError, ReducedGradients, Reducer
from distopt.reduce.drift import NonfiniteNames, explain_nonfinite
from distopt.reduce.messages import BASE, MAX_VALUES, NUM_RNG_DIGITS, RankMessage, RoundKind
from distopt.reduce.reducer import is_joining, nonfinite_names
from distopt.rng import NoisePolicy, generator_digest

Loss: TypeAlias = float | Tensor | tuple[float | Tensor, ...]
"""A loss in nats: one number, or several of an objective with more than one."""

logger = logging.getLogger("distopt.optim")

# Every rank raises these by itself, so there is no rank to inform.
_RAISED_BY_ALL = (PeerError, DisagreementError, DriftError, BackendError)


@dataclass(frozen=True, slots=True)
class StepInfo:
    """What all ranks know after one call of a `DistributedOptimizer`; equal on all of them.

    Attributes:
        loss: Mean of the ranks' losses, over those that gave one; None when none did. Of a loss of several numbers, as
            that of `ReweightedWakeSleep`, the first.
        stop: Whether any rank asked to stop.
        num_active: Number of ranks whose gradients went into the step; 0 after a call that only added its gradients to
            those of the next one (`backward_passes_per_step`).
        gradient_norm: 2-norm of the gradient that all ranks stepped by, before clipping, without that of parameters
            which belong to one rank alone; None unless it was asked for.
        losses: The mean of each number of the loss.
    """

    loss: float | None = None
    stop: bool = False
    num_active: int = 0
    gradient_norm: float | None = None
    losses: tuple[float, ...] = field(default=(), repr=False, compare=False)


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
        # Copies, since whoever calls the optimizer zeroes or replaces the gradients after each call.
        for param in params:
            if param.grad is not None:
                _, before = self._sums.get(id(param), (param, None))
                self._sums[id(param)] = (param, param.grad.clone() if before is None else before + param.grad)

        if self._num_added < self._num_calls:
            return None
        return {id(param): param for param in (*params, *self.take())}.values()

    @property
    def is_waiting(self) -> bool:
        """Whether there were calls since the last step."""
        return self._num_added > 0

    def take(self) -> list[Tensor]:
        """Returns the parameters of the calls since the last step with their sums in `.grad`, and starts over."""
        sums, self._sums = self._sums, {}
        self._num_added = 0
        for param, gradient in sums.values():
            param.grad = gradient
        return [param for param, _ in sums.values()]


class Stepper:
    """Takes the steps of a `DistributedOptimizer`, whose arguments it has.

    A rank is active (it brings gradients), has joined (it has no data left and follows the others), or has failed. In
    each of these states it takes part in the same reductions, one for each step, so that ranks never wait for a
    collective that another one leaves out. What a rank must tell the others is collected until then and sent with the
    gradients; what all ranks do next follows from the sums alone.
    """

    def __init__(
        self, optim: PyroOptim, backend: Backend | None, options: ReduceOptions, rng_policy: NoisePolicy
    ) -> None:
        from distopt.optim.distributed import pyro_hooks  # which needs the optimizer that this is made for

        pyro_hooks.install()
        self.optim = optim
        self._backend = backend
        self._options = options
        self._rng_policy: NoisePolicy = rng_policy
        self._reducer: Reducer | None = None
        self._accumulator = GradientAccumulator(options.backward_passes_per_step)
        self._losses: list[tuple[float, ...]] = []
        self._stop = False
        self._skipped_calls = 0
        self._has_warned = False
        self._has_explained = False

    @property
    def reducer(self) -> Reducer:
        """What reduces the gradients; made when it is first needed, so that `init` may come after the optimizer."""
        if self._reducer is None:
            self._reducer = Reducer(self._backend or current(), self._options, self._rng_policy, self.optim.get_state)
        return self._reducer

    def step(
        self,
        params: Iterable[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        loss: Loss | None = None,
        step: int | None = None,
        stop: bool = False,
        measure_norm: bool = False,
    ) -> StepInfo:
        """Adds this call's gradients to those before, and reduces and steps by them if the step is complete."""
        # Before anything is noted, so that a call that is refused leaves nothing to the next one.
        _check_call(params, loss, step, stop)
        args, kwargs = call_closure(args, kwargs)
        if loss is not None:
            self._losses.append(numbers_of(loss))
        self._stop |= bool(stop)
        backend = self.reducer.backend
        # A caller that numbers its steps needs no guess, and ranks with uneven data may make fewer calls.
        if step is None and backend.world_size > 1 and not is_joining(backend):
            self._skipped_calls += self.reducer.loop_counters.count_skipped()
        accumulated = self._accumulator.add(params)
        if accumulated is None:
            return StepInfo()
        # The caller's number is used in the step that it belongs to; the reducer counts on from it.
        if step is not None:
            self.reducer.step = operator.index(step)
        return self._reduce_and_step(accumulated, args, kwargs, measure_norm)

    def links(self) -> tuple[Backend | None, NoisePolicy]:
        """Returns the backend that was given and the policy of random numbers, for a copy.

        Raises:
            TypeError: Gradients of calls before wait for the rest of their step.
        """
        if self._accumulator.is_waiting:
            raise TypeError("an optimizer cannot be copied between the calls that make one step")
        return self._backend, self._rng_policy

    def follow(self) -> None:
        """Takes part in the others' steps until no rank has data any more; what is left here makes a step first."""
        remaining = self._accumulator.take()
        # Ranks with another number of calls make this step together: each with what it has left, or with zeros.
        if remaining:
            self._reduce_and_step(remaining, (), {})
        while self._follow_one():
            pass

    def step_scheduler(self, *args: Any, **kwargs: Any) -> None:
        """Steps the wrapped scheduler, with the mean of the ranks' metrics if it takes one."""
        assert isinstance(self.optim, PyroLRScheduler)
        name = self.optim.metric_name
        metric = args[0] if args else kwargs.get(name or "")
        value = None if name is None or metric is None else float(metric)
        if value is not None or is_joining(self.reducer.backend):
            message = self._message(RoundKind.SCHEDULE)
            message.values = () if value is None else (value,)
            means = self.reducer.reduce(None, message).summary.mean_values
            if value is not None:
                args = (*means, *args[1:])
                kwargs = {key: each for key, each in kwargs.items() if key != name}
        self.optim.step(*args, **kwargs)

    def abort(self, error: BaseException) -> None:
        """Tells all ranks in their next call that this one has failed."""
        reducer = self.reducer
        if isinstance(error, _RAISED_BY_ALL) or reducer.backend.world_size == 1:
            return
        reducer.backend.note(reducer.step, "abort")
        try:
            reducer.abort(error, reducer.step)
        except RuntimeError as second:
            logger.warning("rank %d could not tell the others of its error: %s", reducer.backend.rank, second)

    def _reduce_and_step(
        self, params: Iterable[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], measure_norm: bool = False
    ) -> StepInfo:
        reducer = self.reducer
        reducer.backend.note(reducer.step, "reduce")
        local, message = reducer.collect_gradients(params), self._message(RoundKind.GRADIENT)
        # This error is raised by what one rank holds, so the others learn of it instead of waiting.
        if local.rank_local:
            try:
                announce_rank_local(self.optim, local, message)
            except ValueError as error:
                self.abort(error)
                raise

        reduced = reducer.reduce(local, message)
        norm = reduced.norm() if measure_norm else None  # before the optimizer may overwrite the buckets
        self._apply(reduced, args, kwargs)
        summary = reduced.summary
        if message.rng and summary.same_rng:
            self._warn_of_equal_streams()
        losses = summary.mean_values
        loss = losses[0] if losses else None
        return StepInfo(loss, summary.num_stops > 0, summary.num_active, norm, losses)

    def _message(self, kind: RoundKind | None) -> RankMessage:
        """Returns what this rank tells the others in its next round."""
        step = self.reducer.step
        message = RankMessage(step, kind)
        if isinstance(self.optim, PyroLRScheduler):
            message.schedule_steps = self.optim.num_steps
        if kind is RoundKind.SCHEDULE:
            return message

        # Each loss and each wish to stop is told once.
        losses, self._losses = self._losses, []
        if len(losses) == 1:
            message.values = losses[0]
        else:
            message.values = tuple(sum(numbers) / len(losses) for numbers in zip(*losses, strict=True))
        message.stop = self._stop
        message.skipped_calls = self._skipped_calls
        self._stop = False
        self._skipped_calls = 0
        if kind is RoundKind.GRADIENT and self._rng_policy == "independent" and _compares_rng(step):
            message.rng = generator_digest() % BASE**NUM_RNG_DIGITS or 1
        return message

    def _warn_of_equal_streams(self) -> None:
        """Warns, once, that the ranks draw the same random numbers again, which more ranks then do not average."""
        if self._has_warned or self.reducer.backend.world_size == 1:
            return
        self._has_warned = True
        warnings.warn(
            f"step {self.reducer.step - 1}: the random generators of all ranks are in the same state: they draw the "
            "same noise, and their mean is no better than one rank's. Does the script seed them inside its loop? There "
            "write distopt.infer.seed_all(seed, step, distopt.init().rank); or give the optimizer noise='shared' if "
            "equal noise is meant.",
            stacklevel=2,
        )

    def _follow_one(self) -> bool:
        """Takes part in one round as a rank without data; returns whether any rank is still active."""
        reducer = self.reducer
        reducer.backend.note(reducer.step, "join")
        reduced = reducer.reduce(None, self._message(None))
        summary = reduced.summary
        if summary.num_active == 0:
            return False
        if summary.kind is RoundKind.SCHEDULE:
            assert isinstance(self.optim, PyroLRScheduler)
            self.optim.step(*summary.mean_values)
        elif summary.kind is RoundKind.GRADIENT:
            self._apply(reduced, (), {})
        return True

    def _apply(self, reduced: ReducedGradients, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Steps the wrapped optimizer by reduced gradients, in the same way on all ranks."""
        reducer = self.reducer
        reducer.backend.note(reducer.step, "optimizer")
        # Found before the step, which may clip them in the buckets. The mean loss is one number on all ranks.
        is_usual = self._has_explained or all(map(math.isfinite, reduced.summary.mean_values))
        nonfinite = None if is_usual else nonfinite_names(reducer, reduced.local)
        try:
            stepped = self.optim.clip_and_step(
                reduced.dense,
                [*reduced.loose, *reduced.rank_local],
                *args,
                missing=reduced.missing,
                total_norm=total_norm(self.optim, reduced),
                is_finite=not reduced.summary.num_nonfinite,
                **kwargs,
            )
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} {self._explain_nonfinite(reduced, nonfinite)}") from None

        # All ranks have skipped the step: each decided by the same sums. What compression would add to the next
        # gradient stems from one that is not finite.
        if not stepped:
            logger.warning(self._explain_nonfinite(reduced, nonfinite))
            reducer.forget_errors()
        elif nonfinite is not None:
            self._warn_of_nonfinite_loss(reduced, nonfinite)
        reducer.step += 1
        reducer.backend.note(reducer.step, "model")

    def _warn_of_nonfinite_loss(self, reduced: ReducedGradients, nonfinite: NonfiniteNames) -> None:
        """Warns, once, of a step that was taken all the same; all ranks do."""
        self._has_explained = True
        explained = self._explain_nonfinite(reduced, nonfinite)
        warnings.warn(
            f"step {self.reducer.step}: the mean loss of the ranks is {reduced.summary.mean_values[0]}. "
            f"{explained} The optimizer has stepped by them, as those of Pyro do; give it nonfinite='skip' or 'raise' "
            "to keep parameters finite.",
            stacklevel=2,
        )

    def _explain_nonfinite(self, reduced: ReducedGradients, nonfinite: NonfiniteNames | None) -> str:
        reducer = self.reducer
        return explain_nonfinite(reducer.backend, nonfinite or nonfinite_names(reducer, reduced.local), reducer.step)


def numbers_of(loss: Loss) -> tuple[float, ...]:
    """Returns the numbers of a loss.

    Raises:
        ValueError: There are more than the ranks can exchange.
    """
    numbers = tuple(map(float, loss)) if isinstance(loss, tuple) else (float(loss),)
    if len(numbers) > MAX_VALUES:
        raise ValueError(f"the loss has {len(numbers)} numbers; at most {MAX_VALUES} can be averaged over the ranks.")
    return numbers


def _compares_rng(step: int) -> bool:
    """Returns whether the ranks compare their generators: often at first, then every 64th step; never in the first.

    In the first step the ranks make them different, and a script that seeds in its loop does so again and again.
    """
    return step % 64 == 0 if step > 64 else step > 0 and step & (step - 1) == 0


def _check_call(params: object, loss: object, step: object, stop: object) -> None:
    """Raises TypeError or ValueError for arguments of a step that would be misread, or fail later and elsewhere."""
    is_list = type(params) in (list, tuple, set)
    if not is_list and (isinstance(params, Tensor | Mapping | str) or not isinstance(params, Iterable)):
        raise TypeError(f"params is a {type(params).__name__}, expected an iterable of tensors, such as [param].")
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise ValueError(f"loss has shape {tuple(loss.shape)}, expected one number.")
    if isinstance(loss, str):
        raise TypeError(f"loss is {loss!r}, expected a number.")
    is_number = step is None or (type(step) is int and step >= 0)
    if not is_number and (not isinstance(step, SupportsIndex) or operator.index(step) < 0):
        raise TypeError(f"step is {step!r}, expected the number of the step, an int that is not negative.")
    if not isinstance(stop, bool | np.bool_):
        raise TypeError(f"stop is {stop!r}, expected True or False.")


# What the ranks must know of gradients that one of them alone steps by: those of its sharded plates. Ranks step by the
# shared gradients in the same way only if they clip by the same norm and skip the same steps, so the squared norm of
# the rank-local gradients and whether they are finite are summed with the control slots.


def announce_rank_local(optim: PyroOptim, local: LocalGradients, message: RankMessage) -> None:
    """Writes into `message` what decides how all ranks step: whether they are finite, and their norm where that clips.

    Raises:
        ValueError: `clip_args` is a callable and wants a global norm for some of them.
    """
    if optim.nonfinite != "step" or optim.scaler is not None:
        message.nonfinite = not all(is_finite(gradient) for _, _, gradient in local.rank_local)

    args = optim.pt_clip_args
    if not callable(args):
        if args.get("global_norm") is not None:
            message.rank_local_square = local.rank_local_square()
        return
    for name, _, _ in local.rank_local:
        if args_for("clip_args", args, name).get("global_norm") is not None:
            raise ValueError(
                f"clip_args is a callable that gives global_norm for {name!r}, a parameter of one rank alone, so the "
                "ranks do not know which parameters the norm covers. Give clip_args={'global_norm': ...} for all "
                "parameters, or clip_norm for this one."
            )


def total_norm(optim: PyroOptim, reduced: ReducedGradients) -> float | None:
    """Returns the norm over all parameters of all ranks, the same bits on each; None where the optimizer knows it.

    It knows it where no parameter is of one rank alone, and where each gradient is clipped by itself before.
    """
    square = reduced.summary.rank_local_square
    args = optim.pt_clip_args
    has_norm = not callable(args) and args.get("global_norm") is not None
    is_first = not callable(args) and args.get("clip_norm") is None and args.get("clip_value") is None
    if not square and not (has_norm and is_first):
        return None
    norm = reduced.norm()
    total = math.sqrt(norm * norm + square)
    return total if optim.scaler is None else total / optim.scaler.get_scale()
