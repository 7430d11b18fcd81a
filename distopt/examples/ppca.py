"""Which few directions explain handwritten digits? Probabilistic principal components, one latent vector per picture.

The data are the 1,797 pictures of 8 x 8 pixels in scikit-learn (from the UCI repository, CC BY 4.0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.infer.autoguide import AutoNormal, init_to_sample
from torch import Tensor

from distopt.infer import sharded_plate
from distopt.train import Task

if TYPE_CHECKING:
    from distopt.train.report import Report


class Components(Task):
    """Describes each picture by a few numbers: the model of Tipping and Bishop, with priors on all of its parameters.

    ::

        z[i]     ~ Normal(0, 1)                       num_components numbers of picture i
        x[i, p]  ~ Normal(mean[p] + z[i] . W[:, p], sigma)

    The pictures, and their z, are split over the ranks; `mean`, `W` and `sigma` are replicated. So a step sends as many
    numbers for a billion pictures as for a thousand.

    Args:
        num_components: Numbers per picture.
        seed: Seed of the first values of W, so that all ranks start from the same.

    Attributes:
        data: The pictures, (pictures, 64) float32 in [0, 1].

    References:
        Tipping and Bishop, Probabilistic Principal Component Analysis, JRSS B 61 (1999).
    """

    sharded = True

    def __init__(self, num_components: int = 6, seed: int = 0) -> None:
        self.data = read_digits()
        self.num_components = num_components
        self.guide = AutoNormal(self.model, init_loc_fn=_InitialValues(seed), init_scale=0.01)

    def model(self, rows: Tensor, pictures: Tensor) -> None:
        """The model of the pictures that this rank holds: their (n,) int64 global indices and (n, 64) pixels."""
        num_pixels = pictures.shape[1]
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0).expand([num_pixels]).to_event(1))
        weight = pyro.sample("W", dist.Normal(0.0, 1.0).expand([self.num_components, num_pixels]).to_event(2))
        sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 1.0))
        with sharded_plate("pictures", len(pictures), rows=rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([self.num_components]).to_event(1))
            pyro.sample("x", dist.Normal(mean + z @ weight, sigma).to_event(1), obs=pictures)

    def rows(self) -> int:
        """Returns the number of pictures."""
        return len(self.data)

    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Returns the arguments of `model` for these pictures."""
        index = torch.from_numpy(rows)
        return index, self.data[index]

    def explained(self) -> float:
        """Returns the fraction of the pictures' variance that lies in the directions of W, in [0, 1]."""
        # The rows of W are neither orthogonal nor ordered, so the space that they span is compared, by projection.
        weight = self.guide.median()["W"].cpu().double()
        basis = torch.linalg.qr(weight.T).Q
        centred = (self.data - self.data.mean(0)).double()
        return float((centred @ basis).square().sum() / centred.square().sum())

    def report(self, report: Report) -> None:
        """Adds the directions, and a comparison with plain principal components."""
        from matplotlib.figure import Figure
        from sklearn.decomposition import PCA

        plain = PCA(self.num_components).fit(self.data.numpy()).explained_variance_ratio_.sum()
        sigma = float(self.guide.median()["sigma"])
        rows = [["this model", f"{self.explained():.4f}", f"{sigma:.4f}"], ["sklearn's PCA", f"{plain:.4f}", ""]]
        note = "Explained: fraction of the variance of all pixels that lies in the directions of the components."
        report.table(f"{self.num_components} components", ["", "explained", "noise"], rows, note)

        figure = Figure(figsize=(9, 1.8))
        for column, direction in enumerate(self.guide.median()["W"].cpu(), start=1):
            axes = figure.add_subplot(1, self.num_components, column)
            axes.imshow(direction.reshape(8, 8), cmap="PuOr")
            axes.set_axis_off()
        report.figure(figure, "The directions: what one unit of each component adds to a picture.")


class _InitialValues:
    """First values: W at random but the same on every rank, all others fixed near the middle of their priors."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, site: dict[str, Any]) -> Tensor:
        # W = 0 is a saddle point: no component explains anything, and none has a gradient that tells it from another.
        if site["name"] != "W":
            return torch.full(site["fn"].shape(), 0.3 if site["name"] == "sigma" else 0.0)
        with pyro.poutine.block(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            start: Tensor = 0.1 * init_to_sample(site)
            return start


def read_digits() -> Tensor:
    """Returns the pictures, (1797, 64) float32 in [0, 1].

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the digits come with scikit-learn: pip install 'distopt[examples]'") from error
    return torch.from_numpy(load_digits().data.astype(np.float32) / 16.0)
