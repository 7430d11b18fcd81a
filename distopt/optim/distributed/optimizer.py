"""Optimizers that average gradients over all workers before they step."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro.optim
import torch
from torch import Tensor, nn

from distopt.backends import Backend, BackendError, current
from distopt.optim.arguments import args_for
from distopt.optim.clipping import global_norm
from distopt.optim.distributed.convert import as_ours, names_of, takes_metric
from distopt.optim.lr_scheduler import PyroLRScheduler
from distopt.optim.optim import PyroOptim, _evaluated
from distopt.optim.packed_state import PackedState
from distopt.optim.packing import FlatGradients
from distopt.reduce import Brought, DisagreementError, DriftError, PeerError, Reduced, Reducer, Settings
from distopt.reduce.agreement import share_values_
from distopt.reduce.comm_hooks.power_sgd import PowerSgd
from distopt.reduce.drift import explain_nonfinite, is_finite
from distopt.reduce.messages import Control, Kind
from distopt.reduce.reducer import is_joining, joining
from distopt.rng import NoisePolicy

# Gradients of several calls of the optimizer, added up for one step.


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


logger = logging.getLogger("distopt.optim")

# Raised on every rank by itself, so there is nobody left to tell.
_SHARED = (PeerError, DisagreementError, DriftError, BackendError)


class DistributedOptimizer(PyroOptim):
    """Steps by the gradients of all ranks; takes the place of the `PyroOptim` it wraps.

    Gradients are packed into one buffer, which crosses in one all-reduce; the average is clipped and stepped by the
    wrapped optimizer, equally on all ranks. Parameters may appear on any rank at any step: they take the value of the
    lowest rank that has them and are created where they are missing. A parameter is stepped when any rank touched it;
    where a gradient is absent it counts as zero; the mean is over the ranks that are active. Where ranks start from
    different values, the gradients of the first step are those of each rank's own, unless `synchronize` was called
    before; `distopt.infer.SVI` does.

    Parameters of sharded plates are stepped by their rank alone; `global_norm` is over those of all ranks together.

    Args:
        pyro_optim: The optimizer to wrap: of `distopt.optim` or `pyro.optim`, a scheduler too. State it has loaded is
            kept.
        backend: Link to the other ranks; `distopt.backends.current()` at the first step when None.
        compression: `none`, `fp16`, `bf16` or `powersgd`.
        op: `average`, `sum` (as many times as large as the average as there are ranks, for parameters of sharded plates
            too) or `adasum` (which leaves those as `average` does).
        backward_passes_per_step: Calls whose gradients are added up before one reduction and step. Particles, or
            several `backward()` before one call, need nothing.
        bucket_mib: Largest buffer in MiB; larger models cross in several.
        overlap: Whether buffers start to cross while backward still runs. It must run equally often before each call.
        groups: Parameters (names or tensors) that cross together, by group, or a number of groups.
        gradient_predivide_factor: Gradients are divided by it before the sum, and multiplied after.
        sparse_as_dense: Whether sparse gradients are made dense before they cross.
        power_sgd_rank: Rank of PowerSGD's approximation.
        noise: `independent`: ranks that draw the same noise when they first meet here, as they do after the same seed,
            draw their own from then on, so `W` ranks are `W` particles. `shared`: their noise is left as it is.
        drift_every_steps: Every so many steps a checksum of parameters and optimizer state rides along; 0: never.

    Attributes:
        local_loss: Set it before a call, and its mean over the active ranks is in `mean_loss` after it.
        local_step: Set it before a call to the step of your own loop, and a rank that has left out one is found.
        local_flag: Set it before a call, and `any_flag` says after it whether any rank has (to stop, to save).
        num_active: Ranks whose gradients went into the last step.
        measure_norm: Set it before a call, and `gradient_norm` holds after it the 2-norm of the gradient that all ranks
            stepped by, before clipping; parameters of this rank alone are not in it.

    Raises:
        PeerError: A rank has raised in its model; the same on all ranks, with its traceback.
        DisagreementError: Ranks differ in shape, dtype or constraint of a parameter, in settings, or in their step.
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
        >>> optim([x.unconstrained()])
        >>> pyro.param("x").detach()
        tensor([0.5000, 0.5000])
    """

    def __init__(
        self,
        pyro_optim: pyro.optim.PyroOptim,
        *,
        backend: Backend | None = None,
        compression: str = "none",
        op: str = "average",
        backward_passes_per_step: int = 1,
        bucket_mib: float = 25.0,
        overlap: bool = False,
        groups: int | Sequence[Sequence[str | Tensor]] | None = None,
        gradient_predivide_factor: float = 1.0,
        sparse_as_dense: bool = False,
        power_sgd_rank: int = 2,
        noise: NoisePolicy = "independent",
        drift_every_steps: int = 0,
    ) -> None:
        if isinstance(pyro_optim, DistributedOptimizer):
            raise TypeError(f"{type(pyro_optim).__name__} is distributed already; give the optimizer that it wraps.")
        self.optim = as_ours(pyro_optim)
        self.settings = Settings(
            op=op,  # type: ignore[arg-type]  # checked there
            compression=compression,  # type: ignore[arg-type]
            power_sgd_rank=power_sgd_rank,
            bucket_mib=bucket_mib,
            groups=names_of(groups),
            predivide=gradient_predivide_factor,
            sparse_as_dense=sparse_as_dense,
            overlap=overlap,
            passes_per_step=backward_passes_per_step,
            noise=noise,
            drift_every_steps=drift_every_steps,
        )
        self.local_loss: float | None = None
        self.mean_loss: float | None = None
        self.local_step: int | None = None
        self.local_flag = self.any_flag = False
        self.num_active = 0
        self.measure_norm = False
        self.gradient_norm: float | None = None
        self._backend = backend
        self._made: Reducer | None = None
        self._passes = Passes(backward_passes_per_step)
        self._losses: list[float] = []

    def __getattr__(self, name: str) -> Any:
        # What is not said here is the wrapped optimizer's: pt_optim_args, nonfinite, num_skipped_steps …
        if name == "optim":
            raise AttributeError(name)
        return getattr(self.optim, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name in self.__dict__ or hasattr(type(self), name) or not hasattr(self.__dict__.get("optim"), name)
        object.__setattr__(self if own else self.optim, name, value)

    @property
    def backend(self) -> Backend:
        """The link to the other ranks."""
        return self.reducer.backend

    @property
    def reducer(self) -> Reducer:
        """What reduces the gradients; made when it is first needed, so that `init` may come after the optimizer."""
        if self._made is None:
            self._made = Reducer(self._backend or current(), self.settings, self.optim.get_state)
        return self._made

    @property
    def is_new(self) -> bool:
        """Whether the ranks have not agreed on any parameter yet, so that each may hold first values of its own."""
        reducer = self.reducer
        return reducer.step == 0 and reducer.num_agreements == 0 and reducer.backend.world_size > 1

    # One step.

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Reduces the gradients of `params` with those of all ranks and takes one step; a collective call.

        Args:
            params: This rank's unconstrained parameter tensors; may differ between ranks.
            *args: Passed on to the torch optimizers' `step`; a closure is called once, before anything is read.
            **kwargs: Likewise.
        """
        args, kwargs = _evaluated(args, kwargs)
        if self.local_loss is not None:
            self._losses.append(float(self.local_loss))
            self.local_loss = None
        gathered = self._passes.add(params)
        if gathered is not None:
            self._step_by(gathered, args, kwargs)

    def _step_by(
        self, params: Iterable[Tensor], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> None:
        reducer = self.reducer
        if self.local_step is not None:
            reducer.step, self.local_step = self.local_step, None
        reducer.backend.note(reducer.step, "reduce")
        brought, said = reducer.look(params), self._say(Kind.GRADIENT)
        if brought.own:
            try:
                tell_own(self.optim, brought, said)
            except ValueError as error:
                self.abort(error)
                raise
        reduced = reducer.reduce(brought, said)
        self._apply_reduced(reduced, args, kwargs or {})

    def zero_grad(self, params: Iterable[Tensor]) -> None:
        """Sets the gradient of each of `params` that has one to zero, as Pyro's SVI does after each step.

        It is done in place. Those of large parameters (32,768 elements and more) are dropped (None) instead, and count
        as zero until backward leaves new ones, which then need no sum.
        """
        self.reducer.cleared.clear(params)

    def collect(self, params: Iterable[Tensor]) -> list[tuple[str, Tensor]]:
        """As the wrapped optimizer's."""
        return self.optim.collect(params)

    def clip_and_step(
        self,
        dense: Sequence[FlatGradients],
        loose: Sequence[tuple[str, Tensor, Tensor]] = (),
        *args: Any,
        **kwargs: Any,
    ) -> bool:
        """Steps by gradients that are reduced already: the wrapped optimizer's, no collective."""
        return self.optim.clip_and_step(dense, loose, *args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Steps the wrapped scheduler, for `ReduceLROnPlateau` with its metric averaged over the ranks.

        Cost:
            One all-reduce of the first bucket when there is a metric or `join` is open, else none.
        """
        scheduler = self._scheduler()
        metric = args[0] if args else kwargs.get("metrics")
        is_metric = (
            isinstance(metric, (int, float, Tensor)) and not isinstance(metric, bool) and takes_metric(scheduler)
        )
        if is_metric or is_joining(self.backend):
            said = Control(
                self.reducer.step, Kind.SCHEDULE, value=float(metric) if is_metric and metric is not None else None
            )
            heard = self.reducer.reduce(None, said).heard
            if is_metric:
                args, kwargs = (heard.value, *args[1:]), {k: v for k, v in kwargs.items() if k != "metrics"}
        scheduler.step(*args, **kwargs)

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
            left = self._passes.take()
            if left:
                self._step_by(left)
            while self._follow():
                pass

    def abort(self, error: BaseException) -> None:
        """Tells all ranks in their next call that this one has failed, so that all raise this cause.

        The caller then raises `error` itself. Does nothing when the cause came from another rank, or the world is
        broken.
        """
        reducer = self.reducer
        if isinstance(error, _SHARED) or reducer.backend.world_size == 1:
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
        """As the wrapped optimizer's; the same on every rank."""
        return self.optim.get_state()

    def set_state(self, state_dict: Mapping[str, Any]) -> None:
        """As the wrapped optimizer's; every rank must call it."""
        self.optim.set_state(state_dict)

    def packed_state(self) -> PackedState:
        """As the wrapped optimizer's; the same on every rank."""
        return self.optim.packed_state()

    def set_packed_state(self, packed: PackedState) -> None:
        """As the wrapped optimizer's; every rank must call it."""
        self.optim.set_packed_state(packed)

    @property
    def of_rank(self) -> PowerSgd | None:
        """What has the state of this rank alone (`state_dict`, `load_state_dict`); None without lossy compression."""
        return self.reducer.of_rank

    def save(self, filename: str | Path) -> None:
        """Writes the state on rank 0; does nothing on the others."""
        if self.reducer.backend.rank == 0:
            self.optim.save(filename)

    def load(self, filename: str | Path, map_location: Any = None) -> None:
        """Reads the state; every rank must call it."""
        self.optim.load(filename, map_location)

    # Inside.

    def _say(self, kind: Kind | None) -> Control:
        losses = self._losses
        value = sum(losses) / len(losses) if losses else None
        self._losses = []
        return Control(self.reducer.step, kind, flag=self.local_flag, value=value)

    def _follow(self) -> bool:
        """One round of a rank that has joined; False when no rank is active any more."""
        reducer = self.reducer
        reducer.backend.note(reducer.step, "join")
        reduced = reducer.reduce(None, self._say(None))
        if reduced.heard.num_active == 0:
            return False
        if reduced.heard.kind is Kind.SCHEDULE:
            value = reduced.heard.value
            self._scheduler().step(*(() if value is None else (value,)))
        elif reduced.heard.kind is Kind.GRADIENT:
            self._apply_reduced(reduced, (), {})
        return True

    def _apply_reduced(self, reduced: Reduced, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reducer, heard = self.reducer, reduced.heard
        reducer.backend.note(reducer.step, "optimizer")
        self.mean_loss, self.any_flag, self.num_active = heard.value, heard.num_flags > 0, heard.num_active
        self.local_flag = False
        if self.measure_norm:
            self.gradient_norm = reduced.norm()
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
            raise FloatingPointError(f"{error} {self._tell_nonfinite(reduced)}") from None
        if not stepped:
            logger.warning(self._tell_nonfinite(reduced))
            reducer.forget_errors()
        reducer.step += 1
        reducer.backend.note(reducer.step, "model")

    def _tell_nonfinite(self, reduced: Reduced) -> str:
        reducer = self.reducer
        return explain_nonfinite(reducer.backend, reducer.layout.names, reduced.brought, reducer.step)

    def _scheduler(self) -> PyroLRScheduler:
        if not isinstance(self.optim, PyroLRScheduler):
            raise AttributeError(f"step() is for schedulers; this wraps a {type(self.optim).__name__}.")
        return self.optim


# What the ranks must know of gradients that one of them alone steps by: those of its sharded plates.


def tell_own(optim: PyroOptim, brought: Brought, said: Control) -> None:
    """Writes into `said` what decides how all ranks step: whether they are finite, and their norm where that clips.

    Raises:
        ValueError: `clip_args` is a callable and wants a global norm for some of them.
    """
    if optim.nonfinite != "step" or optim.scaler is not None:
        said.nonfinite = not all(is_finite(gradient) for _, _, gradient in brought.own)
    args = optim.pt_clip_args
    if not callable(args):
        if args.get("global_norm") is not None:
            said.own_square = brought.own_square()
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
