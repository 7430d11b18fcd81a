"""AdagradRMSProp as a torch optimizer, against Pyro's class, tensor by tensor."""

import pyro.optim.adagrad_rmsprop
import pytest
import torch

from distopt.optim.adagrad_rmsprop import AdagradRMSProp
from tests.optim.trajectories import steps_of

ARGS = [{"eta": 0.5, "t": 0.2}]


@pytest.mark.parametrize("args", ARGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_equal_those_of_the_plain_loop(args, dtype):
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    ours, theirs = (
        steps_of(constructor, args, dtype)
        for constructor in (AdagradRMSProp, pyro.optim.adagrad_rmsprop.AdagradRMSProp)
    )
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_adagrad_rmsprop_state_can_be_shared_between_processes():
    p = torch.ones(3, requires_grad=True)
    optim = AdagradRMSProp([p])
    optim.share_memory()
    assert optim.state[p]["sum"].is_shared()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"t": 0.0}, "t is 0"),
        ({"eta": -1.0}, "eta is -1"),
    ],
)
def test_arguments_out_of_range_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        AdagradRMSProp([torch.zeros(1)], **args)
