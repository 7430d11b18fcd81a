"""Steps of Pyro's own SVI are captured inside `everywhere(capture=...)`, with the bits of eager ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from distopt.backends import current
from distopt.infer import everywhere, seed_all
from distopt.infer.capture.step_gradients import StepGradients
from tests.workers import world

DATA = torch.linspace(-1.0, 3.0, 24)

Trained = tuple[list[float], dict[str, list[float]], list[int]]


def local(x: Tensor) -> None:
    """A latent variable for each row, in a plate that says how many rows this rank has."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def reading(x: Tensor) -> None:
    """Reads a number out of a tensor, which a captured step cannot."""
    scale = 1.0 + abs(float(pyro.sample("loc", dist.Normal(0.0, 1.0)).item()))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(0.0, scale), obs=x)


def library(model: Callable[..., Any], weights: list[float], num_steps: int = 20) -> list[float]:
    """Steps an SVI that it makes itself, with a weight that changes after 13 steps."""
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    size = len(DATA) // current().world_size
    rows = DATA[size * current().rank :][:size]
    losses = []
    for step in range(num_steps):
        seed_all(7, step, current().rank, "independent")
        weights[:] = [1.2 if step > 12 else 1.0]
        losses.append(svi.step(rows))
    return losses


def _run_library(model: Callable[..., Any], capture: Any) -> tuple[Trained, list[int], list[str]]:
    pyro.clear_param_store()
    torch.manual_seed(0)
    weights = [1.0]
    made: list[StepGradients] = []

    def make(*args: Any) -> StepGradients:
        made.append(StepGradients(*args))
        return made[-1]

    with (
        warnings.catch_warnings(record=True) as caught,
        patch("distopt.infer.everywhere.StepGradients", make),
        everywhere("rows", weight=lambda: weights[0], capture=capture),
    ):
        warnings.simplefilter("always")
        losses = library(model, weights)
    params = {name: value.detach().reshape(-1).tolist() for name, value in sorted(pyro.get_param_store().items())}
    counts = [each.captured.num_captured for each in made if each.captured is not None]
    messages = [str(each.message) for each in caught if "capture=" in str(each.message)]
    return (losses, params, torch.get_rng_state().tolist()), counts, messages


@pytest.mark.sampled(1)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_captured_steps_of_pyros_svi_have_every_bit_of_eager_ones_also_when_the_weight_changes(
    num_workers: int,
) -> None:
    ranks = world("torch_dist", num_workers)
    eager = ranks.run(_run_library, local, "off")
    captured = ranks.run(_run_library, local, "graph")
    for (expected, no_counts, _), (actual, counts, messages) in zip(eager, captured, strict=True):
        assert actual == expected and no_counts == messages == []
        # Of 20 steps the first is eager, 2 and 3, 8 and 16 are recorded, and two of the other weight.
        assert len(counts) == 1 and 12 <= counts[0] <= 14
        assert len(set(actual[0])) == 20
    unweighted = ranks.run(_run_unweighted)
    assert [losses[:13] for losses in unweighted] == [losses[:13] for (losses, *_), *_ in eager]
    assert all(other[14] != each[0][0][14] for other, each in zip(unweighted, eager, strict=True))


def _run_unweighted() -> list[float]:
    pyro.clear_param_store()
    torch.manual_seed(0)
    with everywhere("rows", capture="graph"):
        return library(local, [1.0])


def test_model_that_cannot_be_captured_trains_eagerly_and_each_rank_says_why_once() -> None:
    ranks = world("torch_dist", 2)
    eager = ranks.run(_run_library, reading, "off")
    captured = ranks.run(_run_library, reading, "graph")
    for rank, ((expected, *_), (actual, counts, messages)) in enumerate(zip(eager, captured, strict=True)):
        assert actual == expected and counts == [0] and len(messages) == 1
        assert messages[0].startswith(
            f"capture='graph': steps of this SVI run eagerly on rank {rank}, since they cannot"
        )
        assert "test_everywhere_captured.py" in messages[0]


def test_unknown_mode_is_refused_before_anything_is_adopted() -> None:
    with pytest.raises(ValueError, match="capture='fast': must be one of"), everywhere(capture="fast"):  # type: ignore[arg-type]
        pass
