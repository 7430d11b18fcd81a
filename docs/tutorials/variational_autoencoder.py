# %% [markdown]
# # A variational autoencoder
#
# Pictures of handwritten digits, 8 x 8 pixels each, are placed on a map of two dimensions. The guide is a neural network that computes the place of a
# picture from the picture (amortization). So there is no parameter per picture: the only parameters are those of two networks, equal on all workers.

# %%
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from sklearn.datasets import load_digits
from torch import nn

import distopt
from distopt.optim import Adam, DistributedOptimizer

worker = distopt.init()
pyro.set_rng_seed(0)  # the same first weights on every worker

pictures = torch.tensor(load_digits().data, dtype=torch.float32) / 16
order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))
held_out, pictures = pictures[order[:180]], pictures[order[180:]]


def network(num_inputs, num_outputs):
    return nn.Sequential(nn.Linear(num_inputs, 128), nn.Softplus(), nn.Linear(128, num_outputs))


encoder, decoder = network(64, 4), network(2, 64)

# %% [markdown]
# ## Model and guide
#
# The plate has the size of all pictures, as in every model that is trained by minibatches.


# %%
def model(x):
    pyro.module("decoder", decoder)
    with pyro.plate("pictures", len(pictures), subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ink = dist.Bernoulli(logits=decoder(z), validate_args=False)  # pixels are grey, not 0 or 1
        pyro.sample("x", ink.to_event(1), obs=x)


def guide(x):
    pyro.module("encoder", encoder)
    with pyro.plate("pictures", len(pictures), subsample_size=len(x)):
        loc, scale = encoder(x).chunk(2, dim=-1)
        pyro.sample("z", dist.Normal(loc, nn.functional.softplus(scale)).to_event(1))


# %% [markdown]
# ## Training
#
# Workers draw different noise, even though all were seeded alike: two workers with 128 pictures each estimate the gradient as well as one with 256.

# %%
svi = SVI(model, guide, DistributedOptimizer(Adam({"lr": 0.005})), Trace_ELBO())
batches = distopt.data.GlobalBatches(len(pictures), 256, seed=0, rank=worker.rank, world_size=worker.world_size)
for step in range(300):
    loss = svi.step(pictures[batches.rows(step)])
    if step % 100 == 99 and worker.rank == 0:
        print(f"step {step + 1}: ELBO {-loss / len(pictures):.1f} nats per picture")

# %% [markdown]
# ## Pictures that were not seen in training

# %%
with torch.no_grad():
    drawn = decoder(encoder(held_out)[:, :2]).sigmoid()
error = float((drawn - held_out).square().mean())
blank = float((pictures.mean(0) - held_out).square().mean())
print(f"mean squared error per pixel {error:.4f}; of the average picture {blank:.4f}")

# %%
if worker.rank == 0:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 10, figsize=(9, 2), layout="constrained")
    for column in range(10):
        axes[0, column].imshow(held_out[column].reshape(8, 8), cmap="gray_r")
        axes[1, column].imshow(drawn[column].reshape(8, 8), cmap="gray_r")
    for axis in axes.flat:
        axis.set_axis_off()

# %% [markdown]
# Above, pictures that were held out; below, what the networks make of them from two numbers each.
#
# ## Next
#
# The same model as a task of a YAML, with validation, checkpoints and a report: `distopt launch configs/vae.yaml`.
