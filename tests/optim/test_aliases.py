"""Parameters that share memory with tensors that nothing will read are packed; those that may be read are not."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, autoguide

from distopt.optim import Adam
from distopt.optim.aliases import num_forgotten_aliases
from distopt.optim.groups import ListGroup, PackedGroup
from tests.optim.trajectories import groups


def model():
    pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.sample("y", dist.LogNormal(0.0, 1.0))


def test_parameters_of_an_autoguide_are_packed_though_its_first_trace_shares_their_memory():
    guide, optim = autoguide.AutoNormal(model), Adam({"lr": 0.1})
    SVI(model, guide, optim, Trace_ELBO()).step()
    assert [len(g.members) for g in groups(optim, PackedGroup)] == [4]
    assert not groups(optim, ListGroup)
    assert guide.locs.x_unconstrained in optim.optim_objs


@pytest.mark.parametrize(
    "kind", ["AutoDelta", "AutoDiagonalNormal", "AutoMultivariateNormal", "AutoLowRankMultivariateNormal"]
)
def test_parameters_of_other_autoguides_are_packed_too(kind):
    optim = Adam({"lr": 0.1})
    SVI(model, getattr(autoguide, kind)(model), optim, Trace_ELBO()).step()
    assert len(groups(optim, PackedGroup)) == 1
    assert not groups(optim, ListGroup)


def test_tensor_that_somebody_holds_is_not_counted():
    p = pyro.param("x", torch.zeros(3)).unconstrained()
    assert num_forgotten_aliases([p]) == [0]
    held = p.detach()
    assert num_forgotten_aliases([p]) == [0]
    elsewhere = {"anything": held}
    del held
    assert num_forgotten_aliases([p]) == [0]
    assert elsewhere


def test_value_in_a_trace_is_counted_until_somebody_else_holds_it():
    p = torch.nn.Parameter(torch.zeros(3))
    site = {"type": "sample", "name": "x", "fn": None, "value": p.detach()}
    assert num_forgotten_aliases([p]) == [1]
    held = site["value"]
    assert num_forgotten_aliases([p]) == [0]
    assert held is not None


def test_base_of_a_view_is_counted_while_only_the_view_holds_it():
    p = torch.zeros(4).view(2, 2)
    assert num_forgotten_aliases([p]) == [1]
    base = p._base
    assert num_forgotten_aliases([p]) == [0]
    assert base is not None


def test_parameter_that_a_user_sees_through_another_tensor_is_stepped_in_its_place():
    p = pyro.param("x", torch.zeros(3)).unconstrained()
    seen = p.detach()
    p.grad = torch.ones(3)
    optim = Adam({"lr": 0.1})
    optim([p])
    assert not groups(optim, PackedGroup)
    torch.testing.assert_close(seen, torch.full((3,), -0.1))
