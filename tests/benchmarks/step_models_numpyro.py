"""The models of bench_step, in NumPyro: each function returns (model, guide, batches, learning rate)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.initialization import init_to_median

from tests.benchmarks.step_models import (
    AT_BATS,
    HITS,
    NUM_BATCHES,
    NUM_FACTORS,
    NUM_LEVELS,
    PLATE_SHAPE,
    SCHOOLS,
    hierarchy_data,
    plate_data,
)

Workload = tuple[Any, Any, list[tuple[Any, ...]], float]


def _batches(task: Any, num_rows: int) -> list[tuple[Any, ...]]:
    from distopt.data import GlobalBatches

    batches = GlobalBatches(task.rows(), num_rows, 1)
    columns = [task.batch(batches.rows(i)) for i in range(NUM_BATCHES)]
    return [tuple(jnp.asarray(column.numpy()) for column in batch) for batch in columns]


def flights(num_rows: int = 8_192) -> Workload:
    """As `step_models.flights`."""
    from distopt.examples.flights import Flights

    task = Flights()
    shares = {name: jnp.asarray(share.numpy()) for name, share in task.shares.items()}
    levels = {name: len(values) for name, values in task.data.levels.items()}
    total = task.rows()

    def effects(name: str, prior_scale: float = 10.0) -> Any:
        tau = numpyro.sample(f"tau_{name}", dist.HalfNormal(prior_scale))
        with numpyro.plate(f"{name}s", levels[name.removesuffix("_spread")]):
            return numpyro.sample(name, dist.Normal(0.0, tau))

    def deviations(name: str, prior_scale: float = 10.0) -> Any:
        effect = effects(name, prior_scale)
        return effect - shares[name.removesuffix("_spread")] @ effect

    def model(carrier: Any, destination: Any, aircraft: Any, hour: Any, month: Any, delay: Any) -> None:
        loc = numpyro.sample("mu", dist.Normal(0.0, 20.0)) + deviations("carrier")[carrier]
        loc = loc + deviations("destination")[destination] + effects("aircraft")[aircraft]
        loc = loc + deviations("hour")[hour] + deviations("month")[month]
        sigma = numpyro.sample("sigma", dist.LogNormal(3.0, 1.0))
        spread = sigma * jnp.exp(deviations("hour_spread", 1.0)[hour])
        nu = numpyro.sample("nu", dist.Gamma(2.0, 0.1))
        with numpyro.handlers.scale(scale=total / len(delay)):
            numpyro.sample("delay", dist.StudentT(nu, loc, spread), obs=delay)

    guide = AutoNormal(model, init_loc_fn=init_to_median(num_samples=15))
    return model, guide, _batches(task, num_rows), 0.01


def flights_large() -> Workload:
    """As `step_models.flights_large`."""
    return flights(131_072)


def hierarchy() -> Workload:
    """As `step_models.hierarchy`."""
    levels, response = hierarchy_data()
    columns = [jnp.asarray(levels[:, i].astype("int32")) for i in range(NUM_FACTORS)]

    def model(response: Any, *columns: Any) -> None:
        loc = numpyro.sample("mu", dist.Normal(0.0, 10.0))
        for i in range(NUM_FACTORS):
            tau = numpyro.sample(f"tau_{i}", dist.HalfNormal(5.0))
            with numpyro.plate(f"levels_{i}", NUM_LEVELS):
                effect = numpyro.sample(f"effect_{i}", dist.Normal(0.0, tau))
            loc = loc + effect[columns[i]]
        sigma = numpyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with numpyro.plate("rows", len(response)):
            numpyro.sample("response", dist.Normal(loc, sigma), obs=response)

    return model, AutoNormal(model), [(jnp.asarray(response), *columns)] * NUM_BATCHES, 0.01


def plate() -> Workload:
    """As `step_models.plate`."""

    def model(x: Any) -> None:
        loc = numpyro.sample("loc", dist.Normal(jnp.zeros(PLATE_SHAPE[1]), 1.0).to_event(1))
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    return model, AutoNormal(model), [(jnp.asarray(plate_data()),)] * NUM_BATCHES, 0.01


def _layers(name: str, sizes: tuple[int, ...], key: Any) -> Any:
    """Returns a network of softplus layers whose weights are parameters, made as torch.nn.Linear makes them."""
    layers = []
    for i, (num_in, num_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        key, for_weight, for_bias = jax.random.split(key, 3)
        bound = num_in**-0.5
        weight = jax.random.uniform(for_weight, (num_in, num_out), minval=-bound, maxval=bound)
        bias = jax.random.uniform(for_bias, (num_out,), minval=-bound, maxval=bound)
        layers.append((numpyro.param(f"{name}.{i}.weight", weight), numpyro.param(f"{name}.{i}.bias", bias)))

    def network(x: Any) -> Any:
        for weight, bias in layers[:-1]:
            x = jax.nn.softplus(x @ weight + bias)
        weight, bias = layers[-1]
        return x @ weight + bias

    return network


def vae() -> Workload:
    """As `step_models.vae`."""
    from distopt.examples.vae import Autoencoder

    task = Autoencoder()
    total = task.rows()
    key = jax.random.PRNGKey(0)

    def model(x: Any) -> None:
        decoder = _layers("decoder", (2, 128, 64), key)
        with numpyro.handlers.scale(scale=total / len(x)), numpyro.plate("pictures", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            logits = decoder(z)
            numpyro.factor("x", (x * logits - jax.nn.softplus(logits)).sum(-1))

    def guide(x: Any) -> None:
        encoder = _layers("encoder", (64, 128, 4), key)
        with numpyro.handlers.scale(scale=total / len(x)), numpyro.plate("pictures", len(x)):
            loc, scale = jnp.split(encoder(x), 2, -1)
            numpyro.sample("z", dist.Normal(loc, jax.nn.softplus(scale)).to_event(1))

    return model, guide, _batches(task, 256), 0.003


def eight_schools() -> Workload:
    """As `step_models.eight_schools`."""

    def model(effects: Any, errors: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(25.0))
        with numpyro.plate("schools", len(effects)):
            theta = mu + tau * numpyro.sample("eta", dist.Normal(0.0, 1.0))
            numpyro.sample("effects", dist.Normal(theta, errors), obs=effects)

    return model, AutoNormal(model), [tuple(map(jnp.asarray, SCHOOLS))] * NUM_BATCHES, 0.01


def baseball() -> Workload:
    """As `step_models.baseball`."""

    def model(hits: Any) -> None:
        mean = numpyro.sample("m", dist.Uniform(0.0, 1.0))
        kappa = numpyro.sample("kappa", dist.Pareto(1.0, 1.5))
        with numpyro.plate("players", len(hits)):
            chance = numpyro.sample("phi", dist.Beta(mean * kappa, (1 - mean) * kappa))
            numpyro.sample("hits", dist.Binomial(AT_BATS, chance), obs=hits)

    return model, AutoNormal(model), [(jnp.asarray(HITS),)] * NUM_BATCHES, 0.01


WORKLOADS = {
    "flights": flights,
    "51 sites": hierarchy,
    "vae": vae,
    "plate": plate,
    "flights 131,072": flights_large,
    "eight schools": eight_schools,
    "baseball": baseball,
}
