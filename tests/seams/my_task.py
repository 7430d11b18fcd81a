"""A task whose posterior can be computed by hand: the location of points in the plane."""

import pyro
import pyro.distributions as dist
import torch

from distopt.train import Task


class Points(Task):
    """points[i] ~ Normal(loc, 1), fitted by maximum likelihood from loc = 0.

    The x of all points are positive; the y are -1 in the first half of the rows and +1 in the second.
    """

    def __init__(self, num_points: int = 8) -> None:
        half = torch.arange(num_points) < num_points // 2
        self.points = torch.stack([3.0 + torch.arange(num_points), torch.where(half, -1.0, 1.0)], dim=1)

    def model(self, points):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("rows", self.rows(), subsample=torch.arange(len(points))):
            pyro.sample("point", dist.Normal(loc, 1.0).to_event(1), obs=points)

    def guide(self, points):
        """Has nothing to guess: `loc` is a parameter."""

    def rows(self):
        return len(self.points)

    def batch(self, rows):
        return (self.points[torch.from_numpy(rows)],)

    def report(self, report):
        report.text("loc was fitted")
