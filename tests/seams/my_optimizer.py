"""An optimizer: gradient descent with strides."""

import torch


class Strides(torch.optim.Optimizer):
    """param <- param - stride * lr * gradient; the keyword arguments come from `optim.args`."""

    def __init__(self, params, lr=0.1, stride=1.0):
        super().__init__(params, {"lr": lr, "stride": stride})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(group["stride"] * group["lr"] * param.grad)
