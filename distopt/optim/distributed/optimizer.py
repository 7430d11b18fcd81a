"""The distributed optimizer: what it is to those who hold one. How it takes a step is in `stepping`."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self, get_args

import pyro.optim
import torch
from torch import Tensor, nn

from distopt.backends import Backend
from distopt.config.reduce import ReduceOptions
from distopt.optim.arguments import Args
from distopt.optim.capabilities import name_of
from distopt.optim.distributed.convert import from_pyro
from distopt.optim.distributed.stepping import Loss, StepInfo, Stepper
from distopt.optim.lr_scheduler import PyroLRScheduler
from distopt.optim.optim import PyroOptim
from distopt.optim.packed_state import PackedState
from distopt.optim.param_view import GradClips, OptimObjects
from distopt.reduce import CommHook, Reducer
from distopt.reduce.agreement import share_values_
from distopt.reduce.messages import RankMessage, RoundKind
from distopt.reduce.reducer import joining
from distopt.rng import NoisePolicy


def _delegate(name: str, doc: str, *, writable: bool = False) -> Any:
    """Returns a property that is the wrapped optimizer's attribute `name`."""

    def read(optimizer: DistributedOptimizer) -> Any:
        return getattr(optimizer.optim, name)

    def write(optimizer: DistributedOptimizer, value: Any) -> None:
        setattr(optimizer.optim, name, value)

    return property(read, write if writable else None, doc=doc)


class DistributedOptimizer(pyro.optim.optim.PyroOptim):  # type: ignore[misc]
    """Steps by the gradients of all ranks; used in place of the `PyroOptim` that it wraps.

    Gradients are packed into one buffer, which is summed over the ranks by one all-reduce; the wrapped optimizer clips
    the average and steps by it, in the same way on all ranks. Parameters may appear on any rank at any step: they take
    the value of the lowest rank that has them and are created where they are missing. A parameter is stepped when any
    rank touched it; where a gradient is absent it counts as zero; the mean is over the ranks that are active. Where
    ranks start from different values, the gradients of the first step are computed from each rank's values, unless
    `synchronize` was called before; `distopt.infer.SVI` does.

    Parameters of sharded plates are stepped by their rank alone; `global_norm` is over those of all ranks together.

    It is a `pyro.optim.PyroOptim` because Pyro's SVI accepts nothing else, but runs none of its code: everything public
    is defined here. `optim`, `options`, `backend`, `reducer` and `is_synchronized` say what it is made of; a training
    loop calls it, or `step_with`, and `zero_grad`, `synchronize`, `join`, `abort` and, over a scheduler, `step`. Its
    state is in `get_state`, `set_state`, `packed_state`, `set_packed_state`, `save`, `load` and `rank_local_state`.
    `nonfinite`, `scaler`, `num_skipped_steps`, `nonfinite_names`, `optim_objs`, `grad_clip` and `pt_...` are the
    wrapped optimizer's. Setting any other attribute is an error.

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
        In the steady state one all-reduce of the gradients and about 40 numbers plus one for each parameter.

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
        optim: pyro.optim.optim.PyroOptim,
        *,
        backend: Backend | None = None,
        reduce: ReduceOptions = ReduceOptions(),  # noqa: B008  # frozen
        noise: NoisePolicy = "independent",
    ) -> None:
        if isinstance(optim, DistributedOptimizer):
            raise TypeError(
                f"{type(optim).__name__} is already distributed; pass the optimizer that it wraps, its `optim`."
            )
        if not isinstance(reduce, ReduceOptions):
            raise TypeError(f"reduce={reduce!r}: expected ReduceOptions(...) of distopt.optim.")
        if noise not in get_args(NoisePolicy):
            raise ValueError(f"noise={noise!r} should be 'independent' or 'shared'.")
        if backend is not None and not isinstance(backend, Backend):
            raise TypeError(f"backend={backend!r}: expected what distopt.init() returns, such as init('torch_dist').")
        self._optim = from_pyro(optim)
        self._options = reduce
        self._stepper = Stepper(self._optim, backend, reduce, noise)

    def __setattr__(self, name: str, value: Any) -> None:
        # pyro.optim.PyroOptim has a `__dict__`, so `__slots__` would not refuse a misspelt name here; and a name that
        # is set and never read is a setting that silently does nothing.
        if not name.startswith("_") and not hasattr(type(self), name):
            known = [each for each in dir(type(self)) if not each.startswith("_")]
            near = difflib.get_close_matches(name, known, 1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}. {hint}")
        object.__setattr__(self, name, value)

    # A script asks `isinstance(optim, PyroLRScheduler)` to know whether to call `step()`. Whether this is one depends
    # on what it wraps, so it answers as that does; `type(optim)` and `isinstance` of the classes here are as ever.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._optim)

    @property
    def optim(self) -> PyroOptim:
        """The wrapped optimizer, which is this rank's own."""
        return self._optim

    @property
    def options(self) -> ReduceOptions:
        """How gradients are reduced."""
        return self._options

    @property
    def backend(self) -> Backend:
        """The link to the other ranks."""
        return self.reducer.backend

    @property
    def reducer(self) -> Reducer:
        """What reduces the gradients; made when it is first needed, so that `init` may come after the optimizer."""
        return self._stepper.reducer

    @property
    def is_synchronized(self) -> bool:
        """Whether the ranks have agreed on parameters before, so that these are equal; always with one rank."""
        reducer = self.reducer
        return reducer.step > 0 or reducer.num_agreements > 0 or reducer.backend.world_size == 1

    # The wrapped optimizer's, by the names of pyro.optim and distopt.optim. Each is named here, instead of forwarding
    # whatever is not found, so that `hasattr`, `dir` and a reader see what there is.

    nonfinite: Literal["step", "skip", "raise"] = _delegate(
        "nonfinite", "What to do with a gradient that is not finite: `step`, `skip` or `raise`.", writable=True
    )
    scaler: torch.amp.GradScaler | None = _delegate("scaler", "The scaler of a loss in mixed precision, None without.")
    num_skipped_steps: int = _delegate("num_skipped_steps", "How many steps were skipped, on all ranks together.")
    nonfinite_names: tuple[str, ...] = _delegate("nonfinite_names", "Parameters not finite at the last skip.")
    optim_objs: OptimObjects = _delegate("optim_objs", "The torch optimizer (or scheduler) of each parameter.")
    grad_clip: GradClips = _delegate("grad_clip", "What clips the gradient of each parameter.")
    pt_optim_constructor: Callable[..., Any] = _delegate("pt_optim_constructor", "The class of the torch optimizers.")
    pt_optim_args: Args = _delegate("pt_optim_args", "Its arguments, or a callable that returns them.")
    pt_clip_args: Args = _delegate("pt_clip_args", "The limits on gradients, or a callable that returns them.")

    # Copies step by the same ranks; what a pickle is read into finds its ranks as any other optimizer does.

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns an optimizer over a copy of the wrapped one, on the same ranks; every rank must make it.

        Raises:
            TypeError: Gradients of calls before wait for the rest of their step.
        """
        twin: Self = _rebuilt(type(self), copy.deepcopy(self._optim, memo), self._options, *self._stepper.links())
        memo[id(self)] = twin
        return twin

    def __reduce__(self) -> Any:
        """Returns what is pickled: the wrapped optimizer with its state, and the options.

        Raises:
            TypeError: It was given a backend, which is a link to other processes; or as for a copy.
        """
        backend, rng_policy = self._stepper.links()
        if backend is not None:
            raise TypeError("an optimizer that was given a backend cannot be pickled; save its state by get_state()")
        return _rebuilt, (type(self), self._optim, self._options, None, rng_policy)

    # One step.

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Reduces the gradients of `params` with those of all ranks and takes one step; a collective call.

        Args:
            params: This rank's unconstrained parameter tensors; may differ between ranks.
            *args: Passed on to the torch optimizers' `step`; a closure is called once, before anything is read.
            **kwargs: Likewise.
        """
        self._stepper.step(params, args, kwargs)

    def step_with(
        self,
        params: Iterable[Tensor],
        *args: Any,
        loss: Loss | None = None,
        step: int | None = None,
        stop: bool = False,
        measure_norm: bool = False,
        **kwargs: Any,
    ) -> StepInfo:
        """Does what a call does, and shares what a training loop needs to know; a collective call.

        Args:
            params: As for a call.
            *args: As for a call.
            loss: This rank's loss, whose mean over the ranks is returned; a tuple of an objective of several numbers.
            step: Number of the step in the caller's loop; a rank that has left out a step is reported then.
            stop: Whether this rank asks all ranks to stop, to save, or whatever the caller makes of it.
            measure_norm: Whether to compute the norm of the gradient, which takes one pass over it.
            **kwargs: As for a call.

        Cost:
            That of a call: all of it is sent with the gradients.
        """
        return self._stepper.step(params, args, kwargs, loss=loss, step=step, stop=stop, measure_norm=measure_norm)

    def zero_grad(self, params: Iterable[Tensor]) -> None:
        """Sets the gradient of each of `params` that has one to zero, as Pyro's SVI does after each step.

        It is done in place. Those of large parameters (32,768 elements and more) are dropped (None) instead, and count
        as zero until backward leaves new ones, which then need no sum.
        """
        self.reducer.zero_(params)

    @property
    def step(self) -> Callable[..., None]:
        """Steps the wrapped scheduler, for `ReduceLROnPlateau` with its metric averaged over the ranks.

        Raises:
            AttributeError: The wrapped optimizer is no scheduler, so that `hasattr(optimizer, "step")` tells.

        Cost:
            One all-reduce of the first bucket when there is a metric or `join` is open, else none.
        """
        if not isinstance(self.optim, PyroLRScheduler):
            raise AttributeError(f"step() is for schedulers; this wraps a {name_of(self.optim.pt_optim_constructor)}.")
        return self._stepper.step_scheduler

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
            except (Exception, SystemExit) as error:
                self.abort(error)
                raise
            self._stepper.follow()

    def abort(self, error: BaseException) -> None:
        """Tells all ranks in their next call that this one has failed, so that all raise this cause.

        The caller then raises `error` itself. Does nothing when the cause came from another rank, or the world is
        broken.
        """
        self._stepper.abort(error)

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
        reducer.reduce(reducer.collect_gradients(params), RankMessage(reducer.step, RoundKind.AGREE))

        # Buffers are no parameters, so no agreement covers them; ranks have the same modules and thus the same buffers.
        by_dtype: dict[tuple[torch.dtype, str], list[Tensor]] = {}
        for module in modules:
            for _, buffer in sorted(module.named_buffers()):
                by_dtype.setdefault((buffer.dtype, buffer.device.type), []).append(buffer)
        for buffers in by_dtype.values():
            share_values_(reducer.backend, buffers, owner=0)

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
    def rank_local_state(self) -> CommHook | None:
        """What holds state of this rank alone (`state_dict`, `load_state_dict`), to be saved; None if nothing."""
        return self.reducer.rank_local_state

    def save(self, filename: str | Path) -> None:
        """Writes the state on rank 0; does nothing on the others."""
        if self.reducer.backend.rank == 0:
            self.optim.save(filename)

    def load(self, filename: str | Path, map_location: Any = None) -> None:
        """Reads the state; every rank must call it."""
        self.optim.load(filename, map_location)


def _rebuilt(
    kind: Any, optim: PyroOptim, options: ReduceOptions, backend: Backend | None, rng_policy: NoisePolicy
) -> Any:
    """Returns a `DistributedOptimizer` or one derived from it, whatever the arguments of its constructor."""
    optimizer = kind.__new__(kind)
    vars(optimizer).update(_optim=optim, _options=options, _stepper=Stepper(optim, backend, options, rng_policy))
    return optimizer
