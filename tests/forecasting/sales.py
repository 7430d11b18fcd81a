"""Weekly sales by shop: a trend, a season and an effect of each shop, from a CSV."""

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal

import distopt
from distopt.train import Mean, Task


class Sales(Task):
    def __init__(self, csv, num_test=200):
        table = pd.read_csv(csv).sort_values("week")
        self.all = [torch.tensor(table[name].to_numpy()) for name in ("week", "shop", "sales")]
        self.num_train = len(table) - num_test
        self.num_shops = int(table["shop"].max()) + 1
        self.guide = AutoNormal(self.model)

    def model(self, week, shop, sales):
        trend = pyro.sample("trend", dist.Normal(0.0, 1.0))
        season = pyro.sample("season", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 1.0))
        with pyro.plate("shops", self.num_shops):
            level = pyro.sample("level", dist.Normal(0.0, 3.0))
        angle = 2 * torch.pi * week / 52
        mean = level[shop] + trend * week / 52 + season[0] * angle.sin() + season[1] * angle.cos()
        with pyro.plate("rows", self.num_train, subsample=torch.arange(len(week))):
            pyro.sample("sales", dist.Normal(mean, sigma), obs=sales)

    def rows(self):
        return self.num_train

    def batch(self, rows):
        return tuple(column[rows] for column in self.all)

    def validate(self):
        worker = distopt.backends.current()
        rows = self.num_train + distopt.data.shard_rows(200, worker.rank, worker.world_size)
        week, shop, sales = self.batch(rows)
        median, angle = self.guide.median(), 2 * torch.pi * week / 52
        season = median["season"][0] * angle.sin() + median["season"][1] * angle.cos()
        errors = median["level"][shop] + median["trend"] * week / 52 + season - sales
        return {"mse": Mean(float(errors.square().sum()), len(rows))}
