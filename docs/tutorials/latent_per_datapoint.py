# %% [markdown]
# # A latent variable per datapoint
#
# A latent variable for each cell, user or time series makes as many parameters as there are data. They need not be exchanged: the worker that holds a
# datapoint is the only one that ever computes a gradient for its variable. A *sharded plate* says so.
#
# The model here is small enough that its posterior is known in closed form, so that this page can compare.

# %%
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import distopt
from distopt.infer import SVI, gather_local, sharded_plate
from distopt.optim import ClippedAdam, DistributedOptimizer

worker = distopt.init()
pyro.set_rng_seed(1)
cells = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) + 3.0

# %% [markdown]
# ## Which datapoints a worker holds
#
# Each worker reads its shard of the data and nothing else. Shards may differ in size; here `shard_rows` cuts the rows into equal pieces.

# %%
rows = distopt.data.shard_rows(len(cells), worker.rank, worker.world_size)
mine = cells[rows]
print(f"worker {worker.rank} of {worker.world_size} holds {len(mine):,} of {len(cells):,} cells")

# %% [markdown]
# ## The model
#
# `sharded_plate` is used like `pyro.plate`. Its size is the number of datapoints *here*. The density of what is inside counts as many times as there
# are workers, so that the mean over the workers is the density of all data; `mean`, outside, is common to all.


# %%
def model(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    with sharded_plate("cells", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


# %% [markdown]
# For a model that you cannot change there is `shard(model, plates="cells")`. Use `distopt.infer.SVI`, which tells the guide which plates are sharded.

# %%
svi = SVI(model, AutoNormal(model), DistributedOptimizer(ClippedAdam({"lr": 0.1, "lrd": 0.99})), Trace_ELBO())
for _step in range(600):
    loss = svi.step(mine)
print(f"ELBO {-loss:,.0f}")

# %% [markdown]
# ## What is where
#
# Parameters of the plate have one row for each of *this* worker's cells; those of `mean` are equal everywhere.

# %%
for name, value in pyro.get_param_store().items():
    print(f"{name}: {tuple(value.shape)}")

# %% [markdown]
# ## Reading results
#
# `gather_local` is collective: every worker asks for the same rows, and gets them, whoever holds them. Under a flat prior the posterior of `z` is half
# way between the cell and the mean of all cells, with variance one half.

# %%
found = gather_local("z", rows=[0, 9_999])
expected = (cells[[0, 9_999]] + cells.mean()) / 2
if worker.rank == 0:
    print("found   ", found["AutoNormal.locs.z"])
    print("expected", expected)
    print("scale   ", found["AutoNormal.scales.z"], "expected", 0.5**0.5)

# %% [markdown]
# ## Next
#
# - What cannot be split, and what to do then: [sharded latents](../sharded-latents.md).
# - Checkpoints hold these parameters by datapoint, so a run of four workers resumes on two: [resuming](../how-to/resume.md).
