"""Mixed precision: a scaled loss takes the steps of the plain one, and an overflow skips a step."""

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

import distopt.optim
from tests.optim.test_inference import DATA, normal_guide, normal_model


def test_scaled_loss_and_scaler_take_the_steps_of_the_plain_loss():
    def values(scaler):
        pyro.clear_param_store()
        elbo = Trace_ELBO()
        optim = distopt.optim.Adam({"lr": 0.05}, scaler=scaler)
        loss = elbo if scaler is None else distopt.optim.ScaledELBO(elbo, scaler)
        svi = SVI(normal_model, normal_guide, optim, loss)
        pyro.set_rng_seed(3)
        losses = [svi.step(DATA) for _ in range(5)]
        return [p.detach().clone() for _, p in sorted(pyro.get_param_store().named_parameters())], losses

    scaled, losses = values(torch.amp.GradScaler("cpu", init_scale=1024.0))
    plain, expected = values(None)
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-5)
    assert losses == pytest.approx(expected, rel=1e-5)


def test_scaler_skips_an_overflowing_step_and_lowers_its_scale():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optim = distopt.optim.SGD({"lr": 1.0}, scaler=scaler)
    p = pyro.param("x", torch.zeros(2)).unconstrained()
    scaler.scale(p.sum() * float("inf")).backward()
    optim([p])
    assert optim.num_skipped_steps == 1
    assert scaler.get_scale() == 512.0
    assert torch.equal(p.detach(), torch.zeros(2))
    p.grad = None
    scaler.scale(p.sum()).backward()
    optim([p])
    torch.testing.assert_close(p.detach(), -torch.ones(2))
