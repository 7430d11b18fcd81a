"""A map of handwritten digits: a variational autoencoder, whose guide is a neural network.

Nothing is sharded here: the guide computes the latent variables of a picture from the picture (amortization), so the
only parameters are the two networks, which are replicated, and the ranks share each minibatch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from distopt.examples.ppca import read_digits
from distopt.train import Task

if TYPE_CHECKING:
    from distopt.train.report import Report


class Autoencoder(Task):
    """Each picture has a position `z` on a map, and a network computes how likely each pixel is to be inked there.

    ::

        z[i]     ~ Normal(0, 1)                        num_dims numbers
        x[i, p]  ~ Bernoulli(decoder(z[i])[p])         the ink of a pixel, between 0 and 1

    Args:
        num_dims: Dimensions of the map.
        num_hidden: Width of the networks' hidden layers.
        held_out: Fraction of the pictures that is kept out of training.
        seed: Seed of the networks' first weights and of the split, the same on every rank.

    Attributes:
        data: The pictures of the training set, (pictures, 64) float32 in [0, 1].
        held_out: The other pictures, likewise.

    References:
        Kingma and Welling, Auto-Encoding Variational Bayes, ICLR 2014.
    """

    def __init__(self, num_dims: int = 2, num_hidden: int = 128, held_out: float = 0.1, seed: int = 0) -> None:
        pictures = read_digits()
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(pictures)))
        num_held_out = round(held_out * len(pictures))
        self.held_out = pictures[order[:num_held_out]]
        self.data = pictures[order[num_held_out:]]
        self.num_dims = num_dims

        # A fork, so that the weights change nothing in the random numbers that the run draws.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = _network(64, num_hidden, 2 * num_dims)
            self.decoder = _network(num_dims, num_hidden, 64)

    def model(self, pictures: Tensor) -> None:
        """The model of a minibatch of (n, 64) pixels in [0, 1]."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("pictures", self.rows(), subsample=torch.arange(len(pictures))):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([self.num_dims]).to_event(1))
            ink = dist.Bernoulli(logits=self.decoder(z), validate_args=False)  # pixels are grey, not 0 or 1
            pyro.sample("x", ink.to_event(1), obs=pictures)

    def guide(self, pictures: Tensor) -> None:
        """The positions of the pictures on the map, with their uncertainty."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("pictures", self.rows(), subsample=torch.arange(len(pictures))):
            loc, scale = self.encoder(pictures).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, functional.softplus(scale)).to_event(1))

    def rows(self) -> int:
        """Returns the number of pictures in the training set."""
        return len(self.data)

    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Returns these pictures."""
        return (self.data[torch.from_numpy(rows)],)

    def columns(self) -> tuple[Tensor, ...]:
        """Returns all of them."""
        return (self.data,)

    def error(self) -> float:
        """Returns the mean squared error, per pixel, of held-out pictures drawn from their positions on the map."""
        return float((self.redrawn(self.held_out) - self.held_out).square().mean())

    def redrawn(self, pictures: Tensor) -> Tensor:
        """Returns pictures, (n, 64), drawn from the positions of the given ones on the map."""
        device = next(self.decoder.parameters()).device
        with torch.no_grad():
            position = self.encoder(pictures.to(device))[:, : self.num_dims]
            drawn: Tensor = self.decoder(position).sigmoid().cpu()
        return drawn

    def report(self, report: Report) -> None:
        """Adds held-out pictures beside what the networks make of them, and a comparison with principal components."""
        from matplotlib.figure import Figure
        from sklearn.decomposition import PCA

        plain = PCA(self.num_dims).fit(self.data.numpy())
        rebuilt = plain.inverse_transform(plain.transform(self.held_out.numpy()))
        pca = float(np.square(rebuilt - self.held_out.numpy()).mean())
        rows = [["this model", f"{self.error():.4f}"], ["sklearn's PCA", f"{pca:.4f}"]]
        report.table(f"{len(self.held_out)} held-out pictures from {self.num_dims} numbers each", ["", "error"], rows)

        drawn = self.redrawn(self.held_out[:12])
        figure = Figure(figsize=(9, 1.8))
        for column, pair in enumerate(zip(self.held_out[:12], drawn, strict=True)):
            for row, picture in enumerate(pair):
                axes = figure.add_subplot(2, 12, 12 * row + column + 1)
                axes.imshow(picture.reshape(8, 8), cmap="gray_r")
                axes.set_axis_off()
        report.figure(figure, "Held-out pictures, and below each the picture at its position on the map.")


def _network(num_inputs: int, num_hidden: int, num_outputs: int) -> nn.Sequential:
    """Returns a network with one hidden layer."""
    return nn.Sequential(nn.Linear(num_inputs, num_hidden), nn.Softplus(), nn.Linear(num_hidden, num_outputs))
