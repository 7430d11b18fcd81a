"""The Laplace approximation of a posterior whose data are on several ranks."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoMultivariateNormal
from pyro.ops.hessian import hessian

from distopt.backends import Backend


def laplace_approximation(
    guide: AutoLaplaceApproximation, *args: Any, backend: Backend, **kwargs: Any
) -> AutoMultivariateNormal:
    """Returns what `guide.laplace_approximation` does, from the rows of all ranks; a collective call.

    The loss is the mean over the ranks of theirs, as in training, and so is its Hessian.

    Args:
        guide: The guide, whose location is the same on all ranks.
        *args: Arguments of the model on this rank.
        backend: Link to the other ranks.
        **kwargs: Keyword arguments of the model.

    Returns:
        A guide with a multivariate normal distribution, the same on all ranks.

    Raises:
        RuntimeError: The Hessian is not positive definite, so that the location is no mode; the same on all ranks.

    Cost:
        One all-reduce of the Hessian.
    """
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    model_trace = poutine.trace(poutine.replay(guide.model, trace=guide_trace)).get_trace(*args, **kwargs)
    loss = guide_trace.log_prob_sum() - model_trace.log_prob_sum()
    precision = hessian(loss, guide.loc).detach().contiguous()
    backend.all_reduce(precision).wait()
    precision /= backend.world_size

    # As in Pyro's method from here on.
    covariance = precision.inverse()
    scale = covariance.diagonal().sqrt()
    scale_tril = torch.linalg.cholesky(covariance / scale[:, None] / scale[None, :])
    gaussian = AutoMultivariateNormal(guide.model)
    gaussian._setup_prototype(*args, **kwargs)
    for name, value in (("loc", guide.loc.detach()), ("scale", scale), ("scale_tril", scale_tril)):
        delattr(gaussian, name)
        gaussian.register_buffer(name, value)
    return gaussian
