"""Optimizers of others made distributed where they are: the same object steps by the gradients of all ranks.

A library that makes its own optimizer keeps references to it: it steps the schedule, looks at the learning rate, asks
`isinstance`, pickles it. An optimizer put in its place would leave those references with one that never steps. So the
object itself changes: its class becomes one that is a `DistributedOptimizer` and still its own class, and what it held
is kept aside until it is released.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.optim

from distopt.optim.distributed.convert import copy_of, take_counts_
from distopt.optim.distributed.optimizer import DistributedOptimizer
from distopt.optim.optim import PyroOptim

_CLASSES: dict[type, type] = {}
_set_class = vars(object)["__class__"].__set__  # a DistributedOptimizer answers for the one that it wraps
_OF_ADOPTION = frozenset(("_optim", "_options", "_stepper", "_plain_class", "_plain_attributes"))


class AdoptedOptimizer(DistributedOptimizer):
    """A `DistributedOptimizer` that was another optimizer before and becomes it again when it is released."""

    _plain_class: Any
    _plain_attributes: dict[str, Any]

    def __setattr__(self, name: str, value: Any) -> None:
        # Whoever made it may keep whatever they like in it, as before.
        object.__setattr__(self, name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles and copies it as the plain optimizer that it was, with the state that it has now."""
        if issubclass(self._plain_class, PyroOptim):
            return _itself, (copy_of(self.optim),)
        plain = self._plain_class.__new__(self._plain_class)
        vars(plain).update(self._plain_attributes)
        _give_state(plain, self.optim)
        return _itself, (plain,)


def adopt_(optim: pyro.optim.PyroOptim, **options: Any) -> AdoptedOptimizer:
    """Makes an optimizer of `pyro.optim` or `distopt.optim` a `DistributedOptimizer`, in place, with its state.

    Args:
        optim: The optimizer. Its class must not change how steps are taken.
        **options: Keyword arguments of `DistributedOptimizer`.

    Returns:
        `optim` itself.

    Raises:
        TypeError: It is distributed already, or its class overrides a method that takes part in a step.
    """
    if isinstance(optim, DistributedOptimizer):
        raise TypeError(f"{type(optim).__name__} is distributed already.")
    made = DistributedOptimizer(copy_of(optim), **options)
    plain_class: Any = type(optim)
    attributes = dict(vars(optim))

    kept = {name: value for name, value in attributes.items() if not hasattr(AdoptedOptimizer, name)}
    vars(optim).clear()
    vars(optim).update(kept | vars(made), _plain_class=plain_class, _plain_attributes=attributes)
    if plain_class not in _CLASSES:
        _CLASSES[plain_class] = type(f"Distributed{plain_class.__name__}", (AdoptedOptimizer, plain_class), {})
    _set_class(optim, _CLASSES[plain_class])
    adopted: AdoptedOptimizer = optim
    return adopted


def release_(optim: AdoptedOptimizer) -> None:
    """Makes an adopted optimizer what it was before, with the state that it has now."""
    inner = optim.optim
    changed: Any = optim
    plain_class, attributes = optim._plain_class, optim._plain_attributes
    since = {name: value for name, value in vars(optim).items() if name not in _OF_ADOPTION}
    vars(changed).clear()
    _set_class(changed, plain_class)
    vars(changed).update(attributes | since)
    _give_state(changed, inner)


def _itself(plain: Any) -> Any:
    return plain


def _give_state(plain: pyro.optim.PyroOptim, inner: PyroOptim) -> None:
    """Hands the state of `inner` to a plain optimizer of the same arguments."""
    state = inner.get_state()
    if isinstance(plain, PyroOptim):
        plain.set_state(state)
        take_counts_(plain, inner)
        return

    # Pyro's own would load the state of a parameter when that is stepped next, and until then a step of the schedule
    # would pass it by. So what it makes in the first step of a parameter is made here.
    store = pyro.get_param_store()
    waiting = {}
    plain.optim_objs = {}
    plain.grad_clip = {}
    for name, each in state.items():
        if name not in store._params:
            waiting[name] = each
            continue
        param = store._params[name]
        plain.optim_objs[param] = plain._get_optim(param)
        plain.grad_clip[param] = plain._get_grad_clip(param)
        pyro.optim.optim._load_state_dict(plain.optim_objs[param], each)
    plain._state_waiting_to_be_consumed = waiting
