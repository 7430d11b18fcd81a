"""Pyro's own optimizers as torch optimizers: against Pyro's classes, tensor by tensor."""

import pyro.optim.adagrad_rmsprop
import pyro.optim.clipped_adam
import pyro.optim.dct_adam
import pytest
import torch

from distopt.optim.adagrad_rmsprop import AdagradRMSProp
from distopt.optim.clipped_adam import ClippedAdam
from distopt.optim.dct_adam import DCTAdam, from_frequency, to_frequency
from distopt.optim.kernels import OnePassRMSprop

PAIRS = {
    "adagrad_rmsprop": (AdagradRMSProp, pyro.optim.adagrad_rmsprop.AdagradRMSProp, {"eta": 0.5, "t": 0.2}),
    "clipped_adam": (ClippedAdam, pyro.optim.clipped_adam.ClippedAdam, {"lr": 0.1, "lrd": 0.9, "clip_norm": 0.5}),
    "clipped_adam centered": (
        ClippedAdam,
        pyro.optim.clipped_adam.ClippedAdam,
        {"lr": 0.1, "centered_variance": True, "weight_decay": 0.1},
    ),
    "dct_adam": (DCTAdam, pyro.optim.dct_adam.DCTAdam, {"lr": 0.1, "clip_norm": 0.5}),
    "rmsprop": (OnePassRMSprop, torch.optim.RMSprop, {"lr": 0.1, "weight_decay": 0.1}),
    "rmsprop with momentum": (OnePassRMSprop, torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.5, "centered": True}),
}
SHAPES = [(7,), (), (3, 5), (2, 1)]


def values(constructor, args, dtype, prepare=lambda p: None, steps=6, skip=True):
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in SHAPES]
    for p in params:
        prepare(p)
    optim = constructor(params, **args)
    for t in range(steps):
        for i, p in enumerate(params):
            gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
            p.grad = None if skip and (t + i) % 3 == 0 else gradient
        optim.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_equal_those_of_the_plain_loop(pair, dtype):
    ours, theirs, args = PAIRS[pair]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(values(ours, args, dtype), values(theirs, args, dtype), rtol=tolerance, atol=tolerance)


def test_time_series_are_stepped_in_the_frequency_domain_as_pyro_does():
    def mark(p):
        if p.dim():
            p._pyro_dct_dim = -p.dim()

    args = {"lr": 0.1}
    ours = values(DCTAdam, args, torch.float64, mark)
    torch.testing.assert_close(
        ours, values(pyro.optim.dct_adam.DCTAdam, args, torch.float64, mark), rtol=1e-12, atol=1e-12
    )


def test_subsampled_rows_alone_are_stepped_as_pyro_does():
    def values(constructor):
        p = torch.ones(6, 4, dtype=torch.float64, requires_grad=True)
        optim = constructor([p], lr=0.1, subsample_aware=True)
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            p._pyro_subsample = {-2: torch.randperm(6, generator=generator)[:3]}
            p.grad = torch.randn(6, 4, generator=generator, dtype=torch.float64)
            optim.step()
        return p.detach()

    torch.testing.assert_close(values(DCTAdam), values(pyro.optim.dct_adam.DCTAdam), rtol=1e-12, atol=1e-12)


def test_transform_is_the_transpose_of_its_inverse():
    for dim in (-1, -2):
        x, y = torch.randn(3, 7, 2, dtype=torch.float64), None
        forward = to_frequency(x, dim)
        y = torch.randn_like(forward)
        back = from_frequency(y, dim, x.size(dim))
        torch.testing.assert_close((forward * y).sum(), (x * back).sum())


def test_adagrad_rmsprop_state_can_be_shared_between_processes():
    p = torch.ones(3, requires_grad=True)
    optim = AdagradRMSProp([p])
    optim.share_memory()
    assert optim.state[p]["sum"].is_shared()


def test_complex_parameters_fall_back_to_the_general_form():
    p = torch.ones(3, dtype=torch.complex64, requires_grad=True)
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError):
        ClippedAdam([p]).step()  # as in Pyro: complex numbers cannot be clamped


@pytest.mark.parametrize(
    ("constructor", "args", "message"),
    [
        (ClippedAdam, {"lr": -1.0}, "lr is -1"),
        (ClippedAdam, {"betas": (0.9, 1.0)}, "betas"),
        (AdagradRMSProp, {"t": 0.0}, "t is 0"),
        (AdagradRMSProp, {"eta": -1.0}, "eta is -1"),
        (DCTAdam, {"lr": float("nan")}, "lr is nan"),
    ],
)
def test_arguments_out_of_range_are_refused(constructor, args, message):
    with pytest.raises(ValueError, match=message):
        constructor([torch.zeros(1)], **args)
