"""Mixed precision: a scaled loss takes the steps of the plain one, and an overflow skips a step."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, JitTrace_ELBO, RenyiELBO, ReweightedWakeSleep, Trace_ELBO, TraceTMC_ELBO

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


OBJECTIVES = [
    lambda: Trace_ELBO(num_particles=2),
    lambda: RenyiELBO(alpha=0.5, num_particles=4),
    lambda: ReweightedWakeSleep(num_particles=4),
    lambda: TraceTMC_ELBO(max_plate_nesting=1),
    JitTrace_ELBO,
]


@pytest.mark.filterwarnings("ignore")  # of torch's tracer
@pytest.mark.parametrize("make", OBJECTIVES, ids=["Trace", "Renyi", "RWS", "TMC", "Jit"])
def test_scaled_gradients_of_every_objective_are_those_of_the_plain_one_times_a_scale_that_may_change(make):
    def mixture(data):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", len(data)):
            kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc + kind, 1.0), obs=data)

    def gaussian(data):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", len(data)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=data)

    def guide(data):
        pyro.sample("loc", dist.Normal(pyro.param("mean", torch.tensor(0.3)), pyro.param("std", torch.tensor(0.7))))

    def gradients(scaler, scales):
        pyro.clear_param_store()
        elbo = make()
        objective = elbo if scaler is None else distopt.optim.ScaledELBO(elbo, scaler)
        model = mixture if isinstance(elbo, TraceTMC_ELBO) else gaussian
        for scale in scales:
            if scaler is not None:
                scaler.update(scale) if scaler._scale is not None else None
            pyro.set_rng_seed(0)
            for _, p in pyro.get_param_store().named_parameters():
                p.grad = None
            loss = objective.loss_and_grads(model, guide, DATA)
        return {name: p.grad / scale for name, p in pyro.get_param_store().named_parameters()}, loss

    scaled = gradients(torch.amp.GradScaler("cpu", init_scale=8.0), [8.0, 64.0])
    torch.testing.assert_close(scaled, gradients(None, [1.0, 1.0]))
