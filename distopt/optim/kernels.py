"""Adam in one pass over memory, which with the right constants is also ClippedAdam, RMSprop and AdagradRMSProp.

The kernel computes, in one pass over memory,

    g <- g + weight_decay * p;  m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
    p <- p - lr / (1 - beta1^k) * m / (sqrt(v) / sqrt(1 - beta2^k) + eps)

Written with torch's `foreach` operations the same step takes ten passes, and for large parameters the time of a step is
that of its passes over memory.

On the CPU the kernel is compiled with distopt (`_bulk.cpp`). Torch has one, too, but it rounds an element otherwise in
the rest of a tensor that fills no vector register, so that an element's last bit follows from what lies beside it; and
it takes one step count for a whole tensor. Parameters are grouped by what has happened in a process. Where that differs
between ranks, or between a run and its resumption, their last bits must not.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from distopt.optim.packing import compiled_loops
from distopt.optim.trial import EXACT_DTYPES, are_close, example_gradients, example_tensors

# The kernel itself, or torch's on an accelerator. Torch's is private, so where a version has none, or a tensor is not
# what it takes, `is_fusable` says no and the caller computes the same with public operations.

_torch_kernel: Any = getattr(torch, "_fused_adam_", None)


DEVICE_TYPES = frozenset({"cuda"})
"""Where torch's kernel is known to be right, besides the CPU, which has the one of `_bulk`."""


def has_kernel(device: str) -> bool:
    """Returns whether there is a kernel for a type of device on which it was tried."""
    if device == "cpu":
        return compiled_loops() is not None
    return device in DEVICE_TYPES and _torch_kernel is not None


def is_fusable(tensors: Sequence[Tensor]) -> bool:
    """Returns whether the kernel takes `tensors`: dense, contiguous, of one dtype and device that it knows."""
    kinds = {(t.dtype, t.device, t.layout) for t in tensors}
    dtype, device, layout = next(iter(kinds))
    return (
        len(kinds) == 1
        and dtype in EXACT_DTYPES
        and has_kernel(device.type)
        and layout is torch.strided
        and all(map(Tensor.is_contiguous, tensors))
        and _kernel_is_right(dtype, device.type)
    )


@cache
def _kernel_is_right(dtype: torch.dtype, device: str) -> bool:
    """Returns whether the kernel steps as public operations do, with each kind of constants that is used here."""
    for hyper in (Hyper((0.9, 0.99), 1e-6, math.inf), Hyper((0.0, 0.9), 1.0, 0.8, weight_decay=0.1)):
        stepped = []
        for take in (_step_together, _step_foreach):
            pending = [PendingStep(p, p, {}, 0.125) for p in example_tensors(dtype, device)]
            for gradients in example_gradients(dtype, device):
                for each, gradient in zip(pending, gradients, strict=True):
                    each.grad = gradient
                    started(each.state, each.param)
                take(pending, hyper)
            stepped.append([t for x in pending for t in (x.param, x.state["exp_avg"], x.state["exp_avg_sq"])])
        if not are_close(*stepped):
            return False
    return True


def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    *,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """Runs the kernel in place; all tensors are at step number `step`, which may be infinite (no bias correction)."""
    if params[0].device.type == "cpu":
        hyper = AdamHyper(beta1, beta2, eps, weight_decay, maximize=maximize)
        pieces = Pieces(list(map(Tensor.numel, params)), [step] * len(params), [lr] * len(params))
        for i in compiled_adam_((params, grads, [] if means is grads else means, squares, []), pieces, hyper):
            _torch_adam_([params[i]], [grads[i]], [means[i]], [squares[i]], step, lr, hyper)
        return
    _torch_adam_(params, grads, means, squares, step, lr, AdamHyper(beta1, beta2, eps, weight_decay, maximize=maximize))


class AdamHyper(NamedTuple):
    """What tensors must have in common to be stepped by one call of the kernel; meanings are those of `torch.optim`.

    Attributes:
        is_decoupled: Whether the parameter decays by itself, as in AdamW.
        is_pyro: Whether `eps` is added before the correction of the root, as in ClippedAdam.
    """

    beta1: float
    beta2: float
    eps: float
    weight_decay: float = 0.0
    maximize: bool = False
    is_decoupled: bool = False
    is_pyro: bool = False


class Pieces(NamedTuple):
    """Parameters that are tensors of a step, or lie side by side in them, in order: elements, step number, rate."""

    numels: list[Any]
    steps: list[float]
    rates: list[float]


Tensors: TypeAlias = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
"""Parameters, gradients, running means, running means of the squares, and with AMSGrad the largest of these."""


def compiled_adam_(tensors: Tensors, pieces: Pieces, hyper: AdamHyper) -> list[int]:
    """Takes a step on the CPU by the compiled kernel; what an element becomes does not depend on any other.

    Args:
        tensors: Changed in place but for the gradients; without means the gradient is the mean.
        pieces: The parameters in `tensors`.
        hyper: What all of them share.

    Returns:
        The positions of the tensors that it does not take, each a piece by itself: of a subclass, sparse, of 16 bits.
    """
    compiled = compiled_loops()
    if compiled is not None and compiled.adam(tensors, pieces[:], *hyper) is not NotImplemented:
        return []
    if len(tensors[0]) == 1 or compiled is None or len(pieces.numels) != len(tensors[0]):
        return list(range(len(tensors[0])))

    # One that is out of the ordinary must not decide how the others are rounded.
    refused = []
    for i in range(len(tensors[0])):
        single = tuple(each[i : i + 1] for each in tensors)
        if compiled_adam_(single, Pieces(*(each[i : i + 1] for each in pieces)), hyper):  # type: ignore[arg-type]
            refused.append(i)
    return refused


def _torch_adam_(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    step: float,
    lr: float,
    hyper: AdamHyper,
) -> None:
    number = torch.full((), step, dtype=torch.float32, device=params[0].device)
    _torch_kernel(
        params,
        grads,
        means,
        squares,
        [],
        [number] * len(params),
        lr=lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        weight_decay=hyper.weight_decay,
        eps=hyper.eps,
        amsgrad=False,
        maximize=hyper.maximize,
    )


def scaled_descent_(
    params: list[Tensor],
    grads: list[Tensor],
    squares: list[Tensor],
    *,
    lr: float,
    decay: float,
    eps: float,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    r"""Steps `params` by :math:`\mathrm{lr}\; g / (\sqrt v + \epsilon)`, with `v` the running mean of `g^2`.

    With `beta1 = 0` the mean is the gradient itself, whose memory serves for it: `grads` may be overwritten. At step
    infinity nothing is corrected for its bias.
    """
    adam_(
        params,
        grads,
        grads,
        squares,
        step=math.inf,
        lr=lr,
        beta1=0.0,
        beta2=decay,
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
    )


# Adam with clipped gradients over lists of tensors, each at its own step number and learning rate: what ClippedAdam and
# DCTAdam have in common.

_SMALL_NUMEL = 16_384  # up to here a call for each costs more than a pass over its memory


@dataclass(frozen=True)
class Hyper:
    """What tensors must have in common to be stepped together; meanings and names are those of `ClippedAdam`."""

    betas: tuple[float, float]
    eps: float
    clip_norm: float
    weight_decay: float = 0.0
    centered_variance: bool = False

    def of_kernel(self) -> AdamHyper:
        """Returns what the kernel is told, which neither clips nor centers."""
        beta1, beta2 = self.betas
        return AdamHyper(beta1, beta2, self.eps, self.weight_decay, is_pyro=True)


@dataclass(slots=True)
class PendingStep:
    """One tensor and what steps it; `state` holds `step`, the number of this step, `exp_avg` and `exp_avg_sq`."""

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    lr: float


def started(state: dict[str, Any], like: Tensor) -> dict[str, Any]:
    """Returns `state` at its next step; an empty one gets moments of the shape of `like`."""
    if not state:
        state.update(step=0, exp_avg=torch.zeros_like(like), exp_avg_sq=torch.zeros_like(like))
    state["step"] += 1
    return state


def step_all_(pending: Sequence[PendingStep], hyper: Hyper) -> None:
    """Takes the steps that are `pending`, in as few calls as possible; gradients may be overwritten."""
    grads = [x.grad for x in pending]
    if hyper.centered_variance or not is_fusable([*grads, *[x.param for x in pending]]):
        _step_foreach(pending, hyper)
        return

    _step_together(pending, hyper)


def _step_together(pending: Sequence[PendingStep], hyper: Hyper) -> None:
    """Steps by the kernel, on the CPU in one call, elsewhere in one for all tensors of one step count and rate."""
    _clip_([x.grad for x in pending], hyper.clip_norm)
    if pending[0].param.is_cpu:
        tensors: Tensors = (
            [x.param for x in pending],
            [x.grad for x in pending],
            [x.state["exp_avg"] for x in pending],
            [x.state["exp_avg_sq"] for x in pending],
            [],
        )
        pieces = Pieces([x.param.numel() for x in pending], [x.state["step"] for x in pending], [x.lr for x in pending])
        refused = compiled_adam_(tensors, pieces, hyper.of_kernel())
        if refused:
            _step_foreach([pending[i] for i in refused], hyper)
        return

    by_constants: dict[tuple[int, float], list[PendingStep]] = defaultdict(list)
    for x in pending:
        by_constants[int(x.state["step"]), x.lr].append(x)
    for (step, lr), same in by_constants.items():
        _step_fused(same, hyper, step, lr)


def _step_fused(pending: Sequence[PendingStep], hyper: Hyper, step: int, lr: float) -> None:
    """Takes one pass over memory for all tensors of one step count."""
    constants: dict[str, Any] = {
        "step": step,
        "lr": lr,
        "beta1": hyper.betas[0],
        "beta2": hyper.betas[1],
        # Pyro adds eps to sqrt(v), torch to sqrt(v) / sqrt(1 - beta2^k): the same if eps is divided by it too.
        "eps": hyper.eps / math.sqrt(1 - hyper.betas[1] ** step),
        "weight_decay": hyper.weight_decay,
    }
    means = [x.state["exp_avg"] for x in pending]
    squares = [x.state["exp_avg_sq"] for x in pending]
    adam_([x.param for x in pending], [x.grad for x in pending], means, squares, **constants)


def _clip_(grads: Sequence[Tensor], bound: float) -> None:
    """Clips each number, of big tensors in one pass over memory where a list takes two."""
    small = []
    for g in grads:
        if g.numel() > _SMALL_NUMEL:
            g.clamp_(-bound, bound)
        else:
            small.append(g)
    if small:
        torch._foreach_clamp_min_(small, -bound)
        torch._foreach_clamp_max_(small, bound)


def _step_foreach(pending: Sequence[PendingStep], hyper: Hyper) -> None:
    """Does the same by lists of tensors of any dtype, and with the variance of the gradient instead of its square."""
    beta1, beta2 = hyper.betas
    params = [x.param for x in pending]
    grads = [x.grad for x in pending]
    means = [x.state["exp_avg"] for x in pending]
    squares = [x.state["exp_avg_sq"] for x in pending]

    _clip_(grads, hyper.clip_norm)
    if hyper.weight_decay != 0:
        grads = list(torch._foreach_add(grads, params, alpha=hyper.weight_decay))
    torch._foreach_mul_(means, beta1)
    torch._foreach_add_(means, grads, alpha=1 - beta1)

    # The new mean is what the gradient deviates from, as in Pyro's ClippedAdam.
    deviations = list(torch._foreach_sub(grads, means)) if hyper.centered_variance else grads
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, deviations, deviations, 1 - beta2)

    scales = torch._foreach_sqrt(squares)
    torch._foreach_add_(scales, hyper.eps)
    sizes = [-x.lr * math.sqrt(1 - beta2 ** x.state["step"]) / (1 - beta1 ** x.state["step"]) for x in pending]
    torch._foreach_addcdiv_(params, means, scales, sizes)


# RMSprop, for which torch has no fused kernel: one pass over memory instead of one for each of its operations.


class OnePassRMSprop(torch.optim.RMSprop):
    """`torch.optim.RMSprop`, whose plain form (no momentum, not centered) is stepped by the fused kernel of Adam.

    Arguments and state are those of `torch.optim.RMSprop`.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step for every parameter that has a gradient; returns what `closure` returned."""
        if closure is not None or not all(map(_is_fusable_group, self.param_groups)):
            return super().step(closure)
        for group in self.param_groups:
            params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            states = [self.state[p] for p in params]
            for p, state in zip(params, states, strict=True):
                if not state:
                    state["step"] = torch.zeros(())
                    state["square_avg"] = torch.zeros_like(p)
                state["step"] += 1

            # The kernel writes what it steps by into the gradient, which is the user's.
            grads = [p.grad for p in params if p.grad is not None]
            if group["weight_decay"] or group["maximize"]:
                grads = [g.clone() for g in grads]
            scaled_descent_(
                params,
                grads,
                [s["square_avg"] for s in states],
                lr=group["lr"],
                decay=group["alpha"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                maximize=group["maximize"],
            )
        return None


def _is_fusable_group(group: dict[str, Any]) -> bool:
    """Returns whether the kernel computes the RMSprop of a torch parameter group and takes its tensors."""
    params = [p for p in group["params"] if p.grad is not None]
    return (
        group["momentum"] == 0
        and not group["centered"]
        and not group["capturable"]
        and not group["differentiable"]
        and not isinstance(group["lr"], Tensor)
        and 0.0 < group["alpha"] < 1.0
        and (not params or is_fusable(params + [p.grad for p in params]))
    )


# What Pyro's optimizers, which are built on these kernels, have in common: checks of their arguments, and the closure.


def check_at_least_zero(optimizer: str, **values: float) -> None:
    """Raises ValueError for what is no number, negative or NaN among `values`."""
    for name, value in values.items():
        if not _is_number(value) or not value >= 0.0:
            raise ValueError(f"{optimizer}: {name} is {value!r}, expected a number >= 0.")


def _is_number(value: object) -> bool:
    """Returns whether `value` is one number; a learning rate may be a tensor, as for torch's optimizers."""
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)


def adam_defaults(optimizer: str, *, lr: float, betas: tuple[float, float], **numbers: float) -> dict[str, Any]:
    """Returns the arguments of a kind of Adam as its parameter groups hold them.

    Raises:
        ValueError: A number is negative or NaN, or `betas` are not two decay rates in [0, 1).
    """
    check_at_least_zero(optimizer, lr=lr, **numbers)
    is_pair = isinstance(betas, tuple | list) and len(betas) == 2
    if not is_pair or not all(_is_number(beta) and 0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"{optimizer}: betas are {betas!r}, expected two numbers in [0, 1).")
    return {"lr": lr, "betas": betas, **numbers}


def rounds_each_operation(param_groups: Sequence[dict[str, Any]]) -> bool:
    """Returns whether there are parameters in 16 bits: what lists of tensors compute differs from Pyro by roundings."""
    dtypes = {p.dtype for group in param_groups for p in group["params"]}
    return not dtypes.isdisjoint((torch.bfloat16, torch.float16))


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """Returns what `closure` returns, called with gradients enabled; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
