"""Steps of packed parameters that have not taken equally many steps.

Parameters that appear one after the other, as in a model that grows, are stepped in every call from then on, but each
has another step count, on which the bias correction of Adam depends; with `lrd` the rate differs, too. One call for
each would make a step of a thousand small parameters take twenty times as long as if all had come at once. All else
about them is elementwise, so they are packed as any others, and these two numbers become a factor for each element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distopt.optim.clipped_adam import ClippedAdam
from distopt.optim.kernels import AdamHyper, Pieces, compiled_adam_
from distopt.optim.one_pass_adam import OnePassAdam, OnePassAdamW, hyper_of
from distopt.optim.state import State, optimizer_state, state_of_one, with_optimizer_state
from distopt.optim.trial import EXACT_DTYPES

_ADAMS = frozenset({torch.optim.Adam, torch.optim.AdamW, ClippedAdam})
_STEPPED = frozenset({OnePassAdam, OnePassAdamW, ClippedAdam})  # what these are built as

# They count their steps and compute nothing with the count.
_COUNTING = frozenset({torch.optim.Adadelta, torch.optim.RMSprop, torch.optim.Rprop})
_OF_THE_USER = ("fused", "foreach", "capturable", "differentiable")


def staggers(constructor: Any, args: Mapping[str, Any], dtype: torch.dtype) -> bool:
    """Returns whether parameters may be packed though they have not taken equally many steps.

    In 16 bits they may not: an Adam of several operations rounds after each of them, and torch's kernel once.
    """
    if any(args.get(key) for key in _OF_THE_USER) or any(isinstance(value, Tensor) for value in args.values()):
        return False
    if constructor is torch.optim.Adagrad:
        return not args.get("lr_decay")
    return constructor in _COUNTING or (constructor in _ADAMS and dtype in EXACT_DTYPES)


@dataclass
class Stagger:
    """In what the members of a packed group differ.

    Attributes:
        num_steps: How many steps the group has taken, on the host.
        lags: Shape (number of members,), float64: how many steps fewer than the group each member has taken.
        rates: Shape (number of members,), float64: the learning rate of each; None where it is that of the group.
        numels: Shape (number of members,), int64: elements of each.
    """

    num_steps: float
    lags: Tensor
    rates: Tensor | None
    numels: Tensor

    @classmethod
    def of(cls, states: Sequence[State], numels: Sequence[int]) -> Stagger | None:
        """Returns in what states differ, each of one parameter; None where they are equal."""
        optimizers = [optimizer_state(state) for state in states]
        steps = [float(each["state"].get(0, {}).get("step", 0)) for each in optimizers]
        rates = [each["param_groups"][0].get("lr") for each in optimizers]
        differs = len(set(rates)) > 1
        if len(set(steps)) <= 1 and not differs:
            return None
        lags = max(steps) - torch.tensor(steps, dtype=torch.float64)
        by_member = torch.tensor(rates, dtype=torch.float64) if differs else None
        return cls(max(steps), lags, by_member, torch.tensor(list(numels)))

    def values_of(self, index: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the `step` of one member, if the group's `values` have one, of its type."""
        if "step" not in values:
            return {}
        step, lag = values["step"], self.lags[index].item()
        return {"step": step - lag if isinstance(step, Tensor) else type(step)(step - lag)}

    def hyper_of(self, index: int, hyper: dict[str, Any]) -> dict[str, Any]:
        """Returns the hyper-parameters of one member: those of the group where no member has a rate of its own."""
        return hyper if self.rates is None else hyper | {"lr": self.rates[index].item()}

    def state_of(self, index: int, state: State) -> State:
        """Returns the state dict of one member from one that has the group's step count and rate."""
        optimizer = optimizer_state(state)
        values = dict(optimizer["state"].get(0, {}))
        hyper = self.hyper_of(index, optimizer["param_groups"][0])
        return with_optimizer_state(state, state_of_one(hyper, values | self.values_of(index, values)))

    def expand(self, values: Sequence[float], like: Tensor) -> Tensor:
        """Returns a number for each element from one for each member, in the dtype and on the device of `like`."""
        of_members = torch.tensor(values, dtype=torch.float64).to(like.dtype).to(like.device, non_blocking=True)
        return of_members.repeat_interleave(self.numels.to(like.device), output_size=like.numel())


def staggered_step(optimizer: torch.optim.Optimizer, flat: Tensor, stagger: Stagger) -> Callable[[], None] | None:
    """Returns what steps the members of a group; None where the plain step of its optimizer does."""
    return partial(step_adam_, optimizer, flat, stagger) if type(optimizer) in _STEPPED else None


@torch.no_grad()
def step_adam_(optimizer: torch.optim.Optimizer, flat: Tensor, stagger: Stagger) -> None:
    r"""Takes a step of Adam, AdamW or ClippedAdam on members with separate step counts `k` and rates `lr`.

    .. math::
        \theta \leftarrow \theta - \frac{lr}{1 - \beta_1^k} \; m \; / \; (\sqrt{v / (1 - \beta_2^k)} + \epsilon)

    On the CPU each element becomes what it would become in a group of its parameter alone, bit for bit: when a group
    is joined, or a process resumes with groups of other members, the trajectory stays the same.

    Args:
        optimizer: Of the one parameter `flat`, which has taken a step.
        flat: The members side by side; its `.grad` may be overwritten.
        stagger: What differs between them.

    References:
        `torch.optim.Adam` and `pyro.optim.clipped_adam`, operation by operation. The latter adds `eps` to the root of
        `v` before the correction.
    """
    hyper = optimizer.param_groups[0]
    state = optimizer.state[flat]
    state["step"] += 1
    stagger.num_steps += 1
    rates = _decayed_rates(hyper, stagger)
    steps = (stagger.num_steps - stagger.lags).tolist()
    assert flat.grad is not None
    if isinstance(optimizer, ClippedAdam):
        flat.grad.clamp_(-hyper["clip_norm"], hyper["clip_norm"])

    if flat.is_cpu and not hyper.get("centered_variance"):
        largest = [state["max_exp_avg_sq"]] if hyper.get("amsgrad") else []
        tensors = ([flat], [flat.grad], [state["exp_avg"]], [state["exp_avg_sq"]], largest)
        if not compiled_adam_(tensors, Pieces(stagger.numels.tolist(), steps, rates), _kernel_hyper(optimizer)):
            return
    _step_by_operations(optimizer, flat, stagger, steps, rates)


def _kernel_hyper(optimizer: torch.optim.Optimizer) -> AdamHyper:
    hyper = optimizer.param_groups[0]
    if isinstance(optimizer, ClippedAdam):
        beta1, beta2 = hyper["betas"]
        return AdamHyper(beta1, beta2, hyper["eps"], hyper["weight_decay"], is_pyro=True)
    return hyper_of(hyper)


def _step_by_operations(
    optimizer: torch.optim.Optimizer, flat: Tensor, stagger: Stagger, steps: Sequence[float], rates: Sequence[float]
) -> None:
    """Takes the step by torch's operations, in the order and with the factors of the plain loops."""
    hyper = optimizer.param_groups[0]
    state = optimizer.state[flat]
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    beta1, beta2 = hyper["betas"]
    is_pyro = isinstance(optimizer, ClippedAdam)

    gradient = _prepared(flat, hyper, stagger, rates)
    if is_pyro:
        mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
    else:
        mean.lerp_(gradient, 1 - beta1)
    deviation = gradient - mean if hyper.get("centered_variance") else gradient
    square.mul_(beta2).addcmul_(deviation, deviation, value=1 - beta2)
    if hyper.get("amsgrad"):
        square = torch.maximum(state["max_exp_avg_sq"], square, out=state["max_exp_avg_sq"])

    # Factors from Python's powers, as in the loops: those of a tensor differ in the last bit.
    roots = [math.sqrt(1 - beta2**step) for step in steps]
    sizes = [
        (rate * root if is_pyro else rate) / (1 - beta1**step)
        for rate, root, step in zip(rates, roots, steps, strict=True)
    ]
    scale = square.sqrt()
    if not is_pyro:
        scale.div_(stagger.expand(roots, flat))
    flat.addcdiv_(stagger.expand(sizes, flat).mul_(mean), scale.add_(hyper["eps"]), value=-1)


def _decayed_rates(hyper: dict[str, Any], stagger: Stagger) -> list[float]:
    """Returns the rate of each member in this step; `lrd` decays it."""
    decay = hyper.get("lrd", 1.0)
    hyper["lr"] *= decay
    if stagger.rates is None:
        return [float(hyper["lr"])] * len(stagger.numels)
    rates: list[float] = stagger.rates.mul_(decay).tolist()
    return rates


def _prepared(flat: Tensor, hyper: Mapping[str, Any], stagger: Stagger, rates: Sequence[float]) -> Tensor:
    """Returns the gradient that the moments take in, with weight decay; AdamW decays `flat` itself."""
    assert flat.grad is not None
    gradient = flat.grad.neg() if hyper.get("maximize") else flat.grad
    decay = hyper["weight_decay"]
    if decay == 0:
        return gradient
    if hyper.get("decoupled_weight_decay"):
        flat.mul_(stagger.expand([1 - rate * decay for rate in rates], flat))
        return gradient
    return gradient.add(flat, alpha=decay)
