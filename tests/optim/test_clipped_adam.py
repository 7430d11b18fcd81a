"""ClippedAdam as a torch optimizer, against Pyro's class, tensor by tensor."""

import pyro.optim.clipped_adam
import pytest
import torch

from distopt.optim.clipped_adam import ClippedAdam
from tests.optim.trajectories import steps_of

ARGS = [
    {"lr": 0.1, "lrd": 0.9, "clip_norm": 0.5},
    {"lr": 0.1, "centered_variance": True, "weight_decay": 0.1},
]


@pytest.mark.parametrize("args", ARGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_equal_those_of_the_plain_loop(args, dtype):
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    ours, theirs = (
        steps_of(constructor, args, dtype) for constructor in (ClippedAdam, pyro.optim.clipped_adam.ClippedAdam)
    )
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_complex_parameters_fall_back_to_the_general_form():
    p = torch.ones(3, dtype=torch.complex64, requires_grad=True)
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError):
        ClippedAdam([p]).step()  # as in Pyro: complex numbers cannot be clamped


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"lr": -1.0}, "lr is -1"),
        ({"lr": "0.1"}, r"ClippedAdam: lr is '0\.1', expected a number >= 0"),
        ({"eps": None}, "eps is None"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0\.9, 1\.0\), expected two numbers"),
        ({"betas": 0.9}, r"betas are 0\.9"),
        ({"betas": ("0.9", 0.99)}, "betas are"),
    ],
)
def test_arguments_out_of_range_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        ClippedAdam([torch.zeros(1)], **args)
