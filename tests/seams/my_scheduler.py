"""A learning-rate schedule: one change of the rate."""

import torch


class Drop(torch.optim.lr_scheduler.LRScheduler):
    """Multiplies the rate by `factor` from step `at` on; the keyword arguments come from `optim.scheduler.args`."""

    def __init__(self, optimizer, at, factor):
        self.at = at
        self.factor = factor
        super().__init__(optimizer)

    def get_lr(self):
        return [rate * (self.factor if self.last_epoch >= self.at else 1.0) for rate in self.base_lrs]
