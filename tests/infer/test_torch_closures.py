"""A torch optimizer that is stepped with a closure goes where it would go with the rows of all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distopt.backends import BackendError, current
from distopt.infer.torch_closures import averaging_closures
from distopt.reduce import DisagreementError
from tests.workers import world

X = torch.linspace(-1.0, 2.0, 10, dtype=torch.float64)
Y = 1.5 * X - 0.5 + 0.1 * torch.sin(9 * X)


def fit(x: Tensor, y: Tensor, kind: Any = torch.optim.Adam, num_steps: int = 4, **options: Any) -> list[float]:
    """Fits a line by the mean square; returns its parameters, and the losses."""
    slope = torch.zeros((), dtype=torch.float64, requires_grad=True)
    level = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = kind([slope, level], **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (slope * x + level - y).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(num_steps)]
    return [slope.item(), level.item(), *losses]


OPTIMIZERS = {
    "Adam": (torch.optim.Adam, {"lr": 0.1}),
    "LBFGS": (torch.optim.LBFGS, {"lr": 0.5, "max_iter": 3}),
}


def _run_fit(name: str) -> list[float]:
    half = slice(5) if current().rank == 0 else slice(5, 10)
    kind, options = OPTIMIZERS[name]
    with averaging_closures():
        return fit(X[half], Y[half], kind, **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_halves_of_the_rows_on_two_ranks_give_what_all_rows_give(name: str) -> None:
    kind, options = OPTIMIZERS[name]
    expected = fit(X, Y, kind, **options)
    assert world("torch_dist", 2).run(_run_fit, name) == [pytest.approx(expected, rel=1e-9)] * 2


def _run_edges() -> dict[str, Any]:
    backend = current()
    a = torch.full((2,), float(backend.rank), requires_grad=True)
    b = torch.zeros(3, requires_grad=True)
    unused = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([a, b, unused], lr=1.0)

    def closure() -> float:
        a.grad = torch.ones(2)
        if backend.rank == 1:
            b.grad = torch.full((3,), 4.0)
        return 1.0 + backend.rank

    with averaging_closures():
        loss = optimizer.step(closure)
        optimizer.step()  # without a closure nothing is exchanged
    unchanged = b.tolist()
    optimizer.step(lambda: 5.0 + backend.rank)  # outside, neither
    return {"a": a.tolist(), "b": unchanged, "unused": unused.grad, "loss": loss, "kind": type(loss).__name__}


def test_missing_gradients_count_as_zero_and_those_that_all_lack_stay_missing() -> None:
    first, second = world("torch_dist", 2).run(_run_edges)
    # From rank 0's values, one step within and one without the exchange, by the gradients of the first one.
    assert first == second | {"a": first["a"]} and first["a"] == second["a"] == [-3.0, -3.0]
    assert first["b"] == [-4.0] * 3 and first["unused"] is None and (first["loss"], first["kind"]) == (1.5, "float")


def _run_other_shapes() -> str:
    param = torch.zeros(2 + current().rank, requires_grad=True)
    try:
        with averaging_closures():
            torch.optim.SGD([param], lr=1.0).step(lambda: 1.0)
    except DisagreementError as error:
        return str(error)
    return "no error"


def _run_failing_closure() -> str:
    param = torch.zeros(2, requires_grad=True)

    def closure() -> float:
        if current().rank == 1:
            raise ArithmeticError("rotten rows")
        return 1.0

    try:
        with averaging_closures():
            torch.optim.SGD([param], lr=1.0).step(closure)
    except (ArithmeticError, BackendError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_parameters_of_other_shapes_and_errors_of_a_closure_are_told_on_both_ranks() -> None:
    ranks = world("torch_dist", 2)
    for rank, message in enumerate(ranks.run(_run_other_shapes)):
        assert message.startswith(f"rank {rank} of 2: a torch optimizer steps parameters of other shapes on rank 1")
    first, second = ranks.run(_run_failing_closure)
    ranks.close(kill=True)  # after a collective that one rank left out
    assert second == "ArithmeticError: rotten rows" and "rotten rows" in first and first.startswith("BackendError")


def test_alone_a_closure_is_called_as_it_is() -> None:
    expected = fit(X, Y, lr=0.1)
    with averaging_closures():
        assert fit(X, Y, lr=0.1) == expected
