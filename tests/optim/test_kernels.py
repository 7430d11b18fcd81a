"""Torch's kernel against its formula, and RMSprop in one pass over memory against torch's, tensor by tensor."""

import pytest
import torch

from distopt.optim.kernels import (
    Hyper,
    OnePassRMSprop,
    PendingStep,
    adam_,
    is_fusable,
    scaled_descent_,
    started,
    step_all_,
)
from tests.optim.trajectories import steps_of

ARGS = [{"lr": 0.1, "weight_decay": 0.1}, {"lr": 0.1, "momentum": 0.5, "centered": True}]


@pytest.mark.parametrize("args", ARGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_equal_those_of_the_plain_loop(args, dtype):
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    expected = steps_of(torch.optim.RMSprop, args, dtype)
    torch.testing.assert_close(steps_of(OnePassRMSprop, args, dtype), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("step", [1, 7])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_kernel_takes_the_step_of_adam(step, weight_decay):
    lr, beta1, beta2, eps = 0.1, 0.9, 0.99, 1e-3
    p, g, m, v = (torch.rand(5, dtype=torch.float64) for _ in range(4))
    gradient = g + weight_decay * p
    mean = beta1 * m + (1 - beta1) * gradient
    square = beta2 * v + (1 - beta2) * gradient**2
    expected = p - lr / (1 - beta1**step) * mean / ((square / (1 - beta2**step)).sqrt() + eps)
    constants = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    adam_([p], [g], [m], [v], step=step, **constants)
    torch.testing.assert_close([p, m, v], [expected, mean, square])


def test_scaled_descent_is_the_gradient_over_its_root_mean_square():
    p, g, v = (torch.rand(5, dtype=torch.float64) for _ in range(3))
    square = 0.8 * v + 0.2 * g**2
    expected = p - 0.1 * g / (square.sqrt() + 1e-2)
    scaled_descent_([p], [g], [v], lr=0.1, decay=0.8, eps=1e-2)
    torch.testing.assert_close([p, v], [expected, square])


def test_tensors_are_fusable_if_they_are_all_of_one_kind():
    x = torch.zeros(2, 3)
    assert is_fusable([x, torch.zeros(5)])
    assert not is_fusable([x, x.double()])
    assert not is_fusable([x.t()])
    assert not is_fusable([x.to_sparse()])
    assert not is_fusable([torch.zeros(3, dtype=torch.complex64)])
    assert not is_fusable([torch.zeros(3, device="meta")])


def test_groups_of_which_one_has_momentum_are_each_stepped_once():
    def values(constructor):
        params = [torch.ones(3, requires_grad=True) for _ in range(2)]
        optim = constructor([{"params": params[:1]}, {"params": params[1:], "momentum": 0.5}], lr=0.1)
        for p in params:
            p.grad = torch.ones(3)
        optim.step()
        return [p.detach() for p in params]

    torch.testing.assert_close(values(OnePassRMSprop), values(torch.optim.RMSprop))


def test_steps_of_large_and_small_tensors_are_clipped_in_the_same_way():
    sizes, hyper = [5, 20_000], Hyper((0.9, 0.99), 1e-8, clip_norm=0.5)
    params = [torch.zeros(n) for n in sizes]
    states = [started({}, p) for p in params]
    step_all_([PendingStep(p, torch.full_like(p, 3.0), s, 0.1) for p, s in zip(params, states, strict=True)], hyper)
    assert [s["step"] for s in states] == [1, 1]
    for p, s in zip(params, states, strict=True):
        torch.testing.assert_close(s["exp_avg"], torch.full_like(p, 0.05))
        torch.testing.assert_close(p, torch.full_like(p, -0.1))
