"""Steps that are taken and undone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from distopt.infer.capture.assumptions import Assumptions
from distopt.infer.capture.generators import generator_states, set_generator_states
from distopt.infer.capture.recorded_step import RecordedStep, record_step
from distopt.infer.capture.recording import difference
from distopt.infer.capture.step_arguments import views
from distopt.infer.capture.watch import Watch


class Rehearsal:
    """What a step changes, to be put back.

    Args:
        written: Tensors from outside that count besides gradients and generators.
    """

    def __init__(self, written: Sequence[Tensor] = ()) -> None:
        self._torch = generator_states()
        self._python = random.getstate()
        self._numpy = np.random.get_state()
        params = pyro.get_param_store()._params.values()
        self._grads = [(param, param.grad, None if param.grad is None else param.grad.clone()) for param in params]
        self._written = [(tensor, tensor.clone()) for tensor in written]

    def undo(self, undo_writes: Callable[[], None] | None = None) -> None:
        """Puts everything back; tensors that the step has written to by `undo_writes`."""
        set_generator_states(self._torch)
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        for param, grad, values in self._grads:
            param.grad = grad if grad is None else grad.copy_(values)
        if undo_writes is not None:
            undo_writes()
        with torch.no_grad():
            for tensor, values in self._written:
                tensor.copy_(values)


class RehearsalWithViews:
    """Takes a recorded step once more, with other tensors and containers in place of its arguments, and undoes it.

    A model that gets at an argument by another way too, or asks for its identity or attributes, takes another step
    then, and so does one that seeds Python's or NumPy's generator. Earlier steps cannot show that: the arguments were
    the very tensors that the user gave, as they must be where the step counts. It is for steps that were recorded twice
    and have changed nothing else that can be seen.

    Args:
        args: The arguments of the step.
        kwargs: Those that are named.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._before = Rehearsal()
        # Whoever looks after them must keep them: a model may have noted their ids, which other tensors could get.
        self.views = views(args, kwargs)

    def refusal(
        self, step: RecordedStep, assumptions: Assumptions, loss_and_grads: Callable[..., Any], model: Any, guide: Any
    ) -> str | None:
        """Returns why the step cannot be captured, None where it can. What the step has left stays.

        Args:
            step: The step as it was taken.
            assumptions: What it takes for granted.
            loss_and_grads: The method of the ELBO that took it.
            model: The model.
            guide: The guide.
        """
        if assumptions.refusal is not None:
            return assumptions.refusal
        reason = self._difference(step, loss_and_grads, model, guide)
        if reason is None and not assumptions():
            reason = f"{', '.join(assumptions.changed()[:3])} keeps something of the step's arguments"
        return reason

    def _difference(self, step: RecordedStep, loss_and_grads: Callable[..., Any], model: Any, guide: Any) -> str | None:
        args, kwargs = self.views
        after = Rehearsal(step.written)
        self._before.undo(step.undo_writes)
        # A step that seeds these generators, or sets them back, leaves them as it found them: not from another state.
        random.random()
        np.random.random_sample()
        try:
            with _without_hooks(step.params), Watch():
                again = record_step(loss_and_grads, model, guide, args, kwargs)
        except Exception as error:
            return f"the step asks which tensors its arguments are: others raise {type(error).__name__}: {error}"
        else:
            again.undo_writes()
            return again.recording.refusal or difference(step.recording, again.recording)
        finally:
            after.undo()


@contextmanager
def _without_hooks(params: Sequence[Tensor]) -> Iterator[None]:
    """Keeps hooks of accumulated gradients, such as those that begin to reduce them, from being called."""
    tables = [table for param in params if (table := param._post_accumulate_grad_hooks)]
    saved = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, hooks in zip(tables, saved, strict=True):
            table.update(hooks)
