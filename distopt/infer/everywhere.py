"""Training code of others on all ranks: inside `everywhere()` whatever steps is distributed, whoever made it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import pyro.infer
import pyro.optim
from numpy.typing import ArrayLike
from pyro.infer.abstract_infer import TracePosterior
from pyro.optim.horovod import HorovodOptimizer
from torch import Tensor

from distopt.backends import current
from distopt.infer.capture.modes import CaptureMode, check_mode
from distopt.infer.capture.step_gradients import StepGradients
from distopt.infer.sharded_plate import Sharded, Weight, shard, share_plates
from distopt.infer.svi import SVI
from distopt.infer.torch_closures import averaging_closures
from distopt.optim.distributed import DistributedOptimizer
from distopt.optim.distributed.adoption import AdoptedOptimizer, adopt_, release_
from distopt.optim.distributed.pyro_hooks import begin_adopting, end_adopting
from distopt.optim.distributed.stepping import Loss
from distopt.optim.distributed.svi_step import LossAndParams

OnAdopt: TypeAlias = Callable[[pyro.infer.SVI | pyro.optim.optim.PyroOptim, Sequence[Any], Mapping[str, Any]], None]
FindPlates: TypeAlias = Callable[[pyro.infer.SVI, Sequence[Any], Mapping[str, Any]], Iterable[str]]


@contextmanager
def everywhere(
    plates: str | Iterable[str] = (),
    *,
    rows: Mapping[str, ArrayLike] | None = None,
    local: Mapping[str, int | tuple[str, int]] | None = None,
    replicated: Iterable[str] = (),
    weight: Weight = 1.0,
    find_plates: FindPlates | None = None,
    on_adopt: OnAdopt | None = None,
    torch_closures: bool = True,
    capture: CaptureMode = "off",
    **options: Any,
) -> Iterator[None]:
    """Makes every SVI and optimizer distributed that steps inside, also those that a library makes for itself.

    They are adopted when they first step. An optimizer or schedule stays the same object, of a class that is also its
    own, so that whoever keeps a reference to it may step the schedule, read the learning rate or pickle it. At the end
    all of them are plain again, with the state that they have reached. An SVI of Pyro's, or of a subclass whose `step`
    calls that of its parent, gives the mean loss over the ranks, and an error in one rank's model reaches all of them.
    A torch optimizer that is stepped with a closure averages the gradients and the loss of it.

    Each rank calls the library with its own rows. Where a library takes something else from its data than the terms of
    the loss (means to standardise by, initial values), that is each rank's own.

    Args:
        plates: Names of plates of the models inside that are split over the ranks, as for `shard`.
        rows: As for `shard`.
        local: As for `shard`.
        replicated: As for `shard`.
        weight: Factor of this rank's loss in the mean over the ranks, as for `SVI`; or a function that returns that of
            each step, where ranks read unequally many rows in some steps.
        find_plates: Called with each SVI before its first step, and the arguments and keyword arguments of that;
            returns names of further plates of this model that are split, whose parameters are the same on all ranks.
        on_adopt: Called with each SVI that was adopted, before its first step, and the arguments of that; with each
            optimizer that is stepped without an SVI.
        torch_closures: Whether torch optimizers that are stepped with a closure are averaged, too.
        capture: Which steps of Pyro's SVIs run from a recording, as for `SVI`; one of distopt's has a mode of its own.
            If steps of an SVI cannot be captured, they stay eager, and a warning says why, once on each rank.
        **options: Keyword arguments of `DistributedOptimizer` for the optimizers that are adopted.

    Raises:
        ValueError: `capture` is no mode.
        TypeError: Inside: a class takes its steps in another way, so that its ranks could not step together.
        LocalParameterError: Inside: as from `shard`.

    Cost:
        That of `DistributedOptimizer`, in each step inside. All ranks must make equally many.

    Example:
        >>> import torch
        >>> import pyro.distributions as dist
        >>> from pyro.optim import Adam
        >>> def fit(model, data):  # of a library
        ...     guide, optim = pyro.infer.autoguide.AutoDelta(model), Adam({"lr": 0.1})
        ...     svi = pyro.infer.SVI(model, guide, optim, pyro.infer.Trace_ELBO())
        ...     return [svi.step(data) for _ in range(3)]
        >>> def model(data):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("rows", len(data)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=data)
        >>> pyro.clear_param_store()
        >>> with everywhere(plates="rows"):
        ...     losses = fit(model, torch.ones(5))
    """
    check_mode(capture)
    names = (plates,) if isinstance(plates, str) else tuple(plates)
    sharding = {"rows": rows, "local": local, "replicated": tuple(replicated)}
    adoption = _Adoption(names, sharding, weight, find_plates, on_adopt, capture, options)
    begin_adopting(adoption)
    with ExitStack() as stack:
        stack.callback(adoption.undo)
        stack.callback(end_adopting, adoption)
        if torch_closures:
            stack.enter_context(averaging_closures(options.get("backend")))
        yield


class _Adoption:
    """What one `everywhere()` has adopted, and how.

    Args:
        plates: Names of plates that are split over the ranks.
        sharding: Further arguments of `shard`.
        weight: See `everywhere`.
        find_plates: See `everywhere`.
        on_adopt: See `everywhere`.
        capture: See `everywhere`.
        options: Of `DistributedOptimizer`.
    """

    def __init__(
        self,
        plates: tuple[str, ...],
        sharding: Mapping[str, Any],
        weight: Weight,
        find_plates: FindPlates | None,
        on_adopt: OnAdopt | None,
        capture: CaptureMode,
        options: Mapping[str, Any],
    ) -> None:
        self._plates = plates
        self._sharding = sharding
        self._weight = weight
        self._find_plates = find_plates
        self._on_adopt = on_adopt
        self._capture: CaptureMode = capture
        self._options = options
        self._optimizers: list[AdoptedOptimizer] = []
        self._svis: dict[int, tuple[pyro.infer.SVI, Any, Any]] = {}  # as they were, by id
        self._gradients: dict[int, _EagerIfRefused] = {}  # of SVIs whose steps are captured, by id

    def adopt_svi(self, svi: pyro.infer.SVI, args: Sequence[Any], kwargs: Mapping[str, Any]) -> LossAndParams | None:
        """Adopts an SVI that is about to step, unless it was before; returns what computes captured steps of it."""
        self._adopt_svi(svi, args, kwargs)
        return self._gradients.get(id(svi))

    def _adopt_svi(self, svi: pyro.infer.SVI, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Adopts an SVI, unless it was before; one of distopt keeps its plates and weight."""
        if id(svi) in self._svis or isinstance(svi.optim, HorovodOptimizer):
            return
        if isinstance(svi, SVI):
            if self._find_plates is not None:
                self._find_plates(svi, args, kwargs)  # which may refuse it
            if isinstance(svi.optim, DistributedOptimizer) and not self._missing_plates(svi):
                return
        if not isinstance(svi.optim, DistributedOptimizer):
            self._optimizers.append(adopt_(svi.optim, **self._options))

        self._svis[id(svi)] = (svi, svi.model, svi.guide)
        if isinstance(svi, SVI):
            self._add_plates(svi)
        else:
            if not isinstance(svi.model, Sharded):
                more = () if self._find_plates is None else tuple(self._find_plates(svi, args, kwargs))
                svi.model = shard(svi.model, self._plates, **self._sharding) if self._plates else svi.model
                svi.model = shard(svi.model, more, replicated=("*",)) if more else svi.model
            svi.model, svi.guide = share_plates(svi.model, svi.guide, self._weight)
            if self._capture != "off":
                self._gradients[id(svi)] = _EagerIfRefused(svi, self._capture)
        if self._on_adopt is not None:
            self._on_adopt(svi, args, kwargs)

    def _missing_plates(self, svi: SVI) -> list[str]:
        return [name for name in self._plates if name not in getattr(svi.model, "plates", {})]

    def _add_plates(self, svi: SVI) -> None:
        """Splits those of the plates that an SVI of distopt's was not given as split."""
        missing = self._missing_plates(svi)
        if missing and isinstance(svi.model, Sharded) and isinstance(svi.guide, Sharded):
            run, model = svi.model.args
            svi.model, svi.guide = share_plates(shard(model, missing, **self._sharding), svi.guide.args[1], run.weight)

    def adopt_optimizer(self, optim: pyro.optim.optim.PyroOptim) -> None:
        """Adopts an optimizer that is stepped without an SVI of Pyro's."""
        _refuse_other_svi()
        if self._plates:
            raise TypeError(
                f"everywhere(plates={self._plates!r}): a {type(optim).__name__} is stepped without an SVI, so there is "
                "no model whose plates could be split. Give shard(model, plates=...) to what computes its gradients, "
                "and leave out plates here."
            )
        self._optimizers.append(adopt_(optim, **self._options))
        if self._on_adopt is not None:
            self._on_adopt(optim, (), {})

    def undo(self) -> None:
        """Makes everything what it was before, with the state that it has reached."""
        for svi, model, guide in self._svis.values():
            svi.model = model
            svi.guide = guide
        for optim in self._optimizers:
            release_(optim)
        self._svis.clear()
        self._gradients.clear()
        self._optimizers.clear()


class _EagerIfRefused:
    """Computes the steps of an adopted SVI, captured where they can be; warns once why they are not.

    Args:
        svi: The SVI.
        capture: Which steps are to be captured.
    """

    def __init__(self, svi: pyro.infer.SVI, capture: CaptureMode) -> None:
        self._svi = svi
        self._capture = capture
        self._gradients = StepGradients(capture, svi.loss_and_grads)
        self._has_warned = False

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Loss, Sequence[Tensor]]:
        result = self._gradients(self._svi, args, kwargs)
        captured = self._gradients.captured
        if captured is not None and captured.refusal is not None and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"capture={self._capture!r}: steps of this SVI run eagerly on rank {current().rank}, since they cannot "
                f"be captured: {captured.refusal}",
                stacklevel=6,
            )
        return result


def _refuse_other_svi() -> None:
    """Refuses an inference algorithm with a step of its own, which may decide from one rank's loss not to step.

    Its step is the calling function: the frames in between are this module's and those of the hooks.
    """
    frame = sys._getframe(1)
    while frame is not None and str(frame.f_globals.get("__name__")).startswith("distopt."):
        frame = frame.f_back  # type: ignore[assignment]
    caller = frame.f_locals.get("self") if frame is not None else None
    if isinstance(caller, TracePosterior):
        kind = type(caller).__name__
        raise TypeError(
            f"{kind} is an inference algorithm with a step() of its own. everywhere() cannot share its decisions: a "
            "rank that skips a step because of its own loss would leave the others. Make it a subclass of "
            "pyro.infer.SVI whose step() calls super().step(), or use pyro.infer.SVI."
        )
