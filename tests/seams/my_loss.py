"""An objective: the ELBO with a factor."""

from pyro import poutine
from pyro.infer import Trace_ELBO


class TemperedElbo(Trace_ELBO):
    """`factor` times the ELBO; the keyword arguments come from `train.loss_args`.

    Args:
        factor: The factor.
        **arguments: Those of `Trace_ELBO`, such as `num_particles`, which distopt passes.
    """

    def __init__(self, factor=1.0, **arguments):
        super().__init__(**arguments)
        self.factor = factor

    def loss(self, model, guide, *args, **kwargs):
        return super().loss(poutine.scale(model, self.factor), poutine.scale(guide, self.factor), *args, **kwargs)

    def loss_and_grads(self, model, guide, *args, **kwargs):
        model, guide = poutine.scale(model, self.factor), poutine.scale(guide, self.factor)
        return super().loss_and_grads(model, guide, *args, **kwargs)
