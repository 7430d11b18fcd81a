"""Takes a step and records it while it runs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
from pyro import poutine
from pyro.infer.util import torch_item
from torch import Tensor
from torch.utils._pytree import tree_leaves

from distopt.backends.world import observing_collectives
from distopt.infer.capture.callers import model_line
from distopt.infer.capture.generators import generator_states, set_generator_states
from distopt.infer.capture.recorder import Recorder, make_recorder
from distopt.infer.capture.recording import Recording, Slot
from distopt.infer.capture.value_reads import ValueReads
from distopt.rng import recording_host_calls


def _python_generators() -> dict[str, Any]:
    return {"python": random.getstate(), "numpy": np.random.get_state(legacy=True)}


def _same_generators(a: dict[str, Any], b: dict[str, Any]) -> bool:
    (name_a, keys_a, *rest_a), (name_b, keys_b, *rest_b) = a["numpy"], b["numpy"]
    return a["python"] == b["python"] and (name_a, rest_a) == (name_b, rest_b) and np.array_equal(keys_a, keys_b)


class NotFiniteError(Exception):
    """A recorded loss is not finite: an eager step has Pyro's validation to say why."""


class CollectiveCalledError(Exception):
    """A step has raised an error after it called a collective: only this rank would call that again."""


@dataclass(slots=True)
class RecordedStep:
    """A step that was taken and recorded.

    Attributes:
        recording: The list of its operations.
        losses: The loss of each component that the ELBO returned.
        params: All parameters that the store held before the step, in its order.
        used: Those that the step named, as Pyro's SVI collects them.
        undo_writes: Gives all other tensors that the step has written to the values that they had before.
        written: These tensors.
    """

    recording: Recording
    losses: list[float]
    params: list[Tensor]
    used: list[Tensor]
    undo_writes: Callable[[], None]
    written: Sequence[Tensor] = ()


def record_step(
    loss_and_grads: Callable[..., Any], model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> RecordedStep:
    """Takes a step, as `loss_and_grads(model, guide, *args, **kwargs)` does, and records it.

    Gradients are left in the parameters' `.grad`, as ever. One eager step must have been taken before, in which guides
    set themselves up and the ELBO finds out how deeply plates are nested.

    Raises:
        NotFiniteError: The loss is not finite.
        Exception: Whatever the model raised. In these two cases generators, gradients and tensors that the step had
            written to are as they were before.
        CollectiveCalledError: The model raised after it had called a collective; from that error. Nothing is put back.
    """
    before = dict(pyro.get_param_store()._params)
    params = list(before.values())

    recorder = make_recorder()
    _add_inputs(recorder, params, (args, kwargs))

    # The step is a true one, so nothing is put back unless the model raises an error: then the caller takes the step
    # again, eagerly, and the error that the user sees must be that step's.
    saved_grads = [(param, param.grad, None if param.grad is None else param.grad.clone()) for param in params]
    rng_states = generator_states()
    python_state = _python_generators()
    collectives: list[str] = []
    recorder.start()
    try:
        with (
            pyro.validation_enabled(False),
            recording_host_calls(recorder.host),
            noting_collectives(collectives),
            ValueReads(recorder),
            recorder,
            poutine.trace(param_only=True) as capture,
        ):
            loss = loss_and_grads(model, guide, *args, **kwargs)
        if not collectives and not all(map(_is_finite, loss if isinstance(loss, tuple) else (loss,))):
            raise NotFiniteError
    except BaseException as error:
        recorder.close()
        if collectives:
            raise CollectiveCalledError from error
        set_generator_states(rng_states)
        random.setstate(python_state["python"])
        np.random.set_state(python_state["numpy"])
        for param, grad, values in saved_grads:
            param.grad = grad if grad is None else grad.copy_(values)
        recorder.undo_writes()
        raise

    if collectives:
        recorder.refuse(collectives[0])
    if not _same_generators(python_state, _python_generators()):
        recorder.refuse("random numbers of Python's random or of NumPy are drawn")
    losses = _take_losses(recorder, loss)
    used = list(dict.fromkeys(site["value"].unconstrained() for site in capture.trace.nodes.values()))
    _take_params(recorder, before, used)
    recorder.close()
    written = [memory for memory, _ in recorder.undo.values()]
    return RecordedStep(recorder.recording, losses, params, used, recorder.undo_writes, written)


def noting_collectives(reasons: list[str]) -> AbstractContextManager[None]:
    """Adds, for each collective that is called meanwhile, why such a step stays eager: other ranks wait for it."""

    def note(what: str) -> None:
        line = model_line()
        reasons.append(f"a collective is called within the step, {what}" + (f", at {line}" if line else ""))

    return observing_collectives(note)


def _is_finite(loss: Any) -> bool:
    # Numbers are what the ELBO returns whatever it computes, such as the infinity of TraceTailAdaptive_ELBO.
    return not isinstance(loss, Tensor) or math.isfinite(torch_item(loss))


def _add_inputs(recorder: Recorder, params: list[Tensor], arguments: Any) -> None:
    """Adds slots of what the program will be given: parameters, then the gradients that they have, then arguments."""
    recording = recorder.recording
    for param in params:
        recorder.add_input(param)
    recording.num_params = len(params)
    recording.with_grad = [index for index, param in enumerate(params) if param.grad is not None]
    recorder.add_gradients([grad for param in params if (grad := param.grad) is not None])

    recorder.first_argument = len(recording.infos)
    for tensor in dict.fromkeys(leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)):
        recorder.add_input(tensor)
    recording.num_inputs = len(recording.infos)


def _take_losses(recorder: Recorder, loss: Any) -> list[float]:
    """Notes where the losses come from, and returns their values."""
    recording = recorder.recording
    recording.loss_type = type(loss) if isinstance(loss, tuple) else None
    values = []
    for each in loss if isinstance(loss, tuple) else [loss]:
        if isinstance(each, Tensor):
            slot = recorder.slot_of(each)
            if slot is None or each.numel() != 1:
                recorder.refuse("the loss is not computed from the recorded operations")
            else:
                recording.losses.append(Slot(slot))
        else:
            recording.losses.append(float(each))
        values.append(float(torch_item(each)))
    return values


def _take_params(recorder: Recorder, before: dict[str, Tensor], used_params: list[Tensor]) -> None:
    """Notes which parameters the step named, and where their gradients come from."""
    recording = recorder.recording
    after = pyro.get_param_store()._params
    if list(after) != list(before) or any(after[name] is not before[name] for name in before):
        recorder.refuse("the step itself creates or replaces parameters of the store", transient=True)
        return
    recording.requires_grad = [param.requires_grad for param in before.values()]
    left = {id(param) for param in used_params}
    seen: set[int] = set()
    for index, param in enumerate(before.values()):
        recording.grads.append(-1)
        if id(param) in seen:
            continue  # one parameter may have several names
        seen.add(id(param))
        if id(param) in left:
            recording.used_params.append(index)
            left.remove(id(param))
        if param.grad is not None:
            slot = recorder.slot_of(param.grad)
            if slot is None:
                recorder.refuse("a gradient is not computed from the recorded operations")
            else:
                recording.grads[index] = slot
    if left:
        recorder.refuse("the step names parameters that are not in the store")
