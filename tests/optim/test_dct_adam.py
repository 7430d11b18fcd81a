"""DCTAdam as a torch optimizer, against Pyro's class, tensor by tensor."""

import pyro.optim.dct_adam
import pytest
import torch

from distopt.optim.dct_adam import DCTAdam, from_frequency, to_frequency
from tests.optim.trajectories import steps_of

ARGS = [{"lr": 0.1, "clip_norm": 0.5}]


@pytest.mark.parametrize("args", ARGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_equal_those_of_the_plain_loop(args, dtype):
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    expected = steps_of(pyro.optim.dct_adam.DCTAdam, args, dtype)
    torch.testing.assert_close(steps_of(DCTAdam, args, dtype), expected, rtol=tolerance, atol=tolerance)


def test_time_series_are_stepped_in_the_frequency_domain_as_pyro_does():
    def mark(p):
        if p.dim():
            p._pyro_dct_dim = -p.dim()

    args = {"lr": 0.1}
    ours = steps_of(DCTAdam, args, torch.float64, mark)
    torch.testing.assert_close(
        ours, steps_of(pyro.optim.dct_adam.DCTAdam, args, torch.float64, mark), rtol=1e-12, atol=1e-12
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


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"lr": float("nan")}, "lr is nan"),
        ({"clip_norm": [10.0]}, r"DCTAdam: clip_norm is \[10\.0\], expected a number >= 0"),
        ({"betas": (0.9, 0.99, 0.999)}, r"betas are \(0\.9, 0\.99, 0\.999\), expected two numbers"),
    ],
)
def test_arguments_out_of_range_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        DCTAdam([torch.zeros(1)], **args)
