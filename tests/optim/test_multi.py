"""Optimizers that differentiate the loss themselves, against Pyro's."""

import pyro.ops.newton
import pyro.optim
import pyro.optim.multi
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.ops.linalg import eig_3d

import distopt.optim.multi
from distopt.optim import Adam, MixedMultiOptimizer, Newton, PyroMultiOptimizer, TorchMultiOptimizer


def loss_of(x):
    """Convex in some regions; rows are independent."""
    weights = torch.linspace(0.5, 2.0, x.numel(), dtype=x.dtype).view(x.shape)
    rows = (x * weights).sum(-1)
    return (weights * (x - 0.3) ** 2).sum() + (rows.cos() + 0.1 * rows**4).sum()


def plain_newton(start, radius):
    """One step for each row, by the formula of `newton_update` and torch's Hessian."""
    rows = []
    for i, row in enumerate(start):

        def loss_of_row(x, i=i):
            return loss_of(torch.cat([start[:i], x[None], start[i + 1 :]]))

        g = torch.autograd.functional.jacobian(loss_of_row, row)
        hessian = torch.autograd.functional.hessian(loss_of_row, row)
        if len(row) == 1:
            step = g / hessian[0].clamp(min=1e-8)
            rows.append(row - (step if radius is None else step.clamp(-radius, radius)))
            continue
        shift = 0.0
        if radius is not None:
            shift = max(float(g.norm()) / radius - float(torch.linalg.eigvalsh(hessian)[0]), 1e-8)
        rows.append(row - torch.linalg.inv(hessian + shift * torch.eye(len(row), dtype=row.dtype)) @ g)
    return torch.stack(rows)


@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([None, 0.1, 1.0, 10.0]), st.integers(0, 1000))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_newton_steps_as_pyros(size, batch, radius, seed):
    start = torch.randn(batch, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    radii = {} if radius is None else {"x": radius}

    def updated(newton):
        x = start.clone().requires_grad_()
        return newton.get_step(loss_of(x), {"x": x})["x"].detach()

    ours = updated(Newton(radii))
    torch.testing.assert_close(ours, plain_newton(start, radius), rtol=1e-9, atol=1e-9)
    # Pyro's formula for the eigenvalues in 3 dimensions rounds by 1e-6 where two of them are close (eig_3d, "r > 1 -
    # 1e-6"). So Pyro steps by torch's eigenvalues, and by its own where these are right.
    errors = []

    def exact_eig_3d(hessian):
        exact = torch.linalg.eigvalsh(hessian).unbind(-1)
        errors.extend((a - b).abs().max().item() for a, b in zip(eig_3d(hessian), exact, strict=True))
        return exact

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyro.ops.newton, "eig_3d", exact_eig_3d)
        torch.testing.assert_close(ours, updated(pyro.optim.multi.Newton(radii)), rtol=1e-7, atol=1e-7)
    if max(errors, default=0.0) < 1e-9:
        torch.testing.assert_close(ours, updated(pyro.optim.multi.Newton(radii)), rtol=1e-7, atol=1e-7)


def test_newton_solves_a_quadratic_of_any_dimension_in_one_step():
    matrix = torch.randn(5, 5, dtype=torch.float64)
    matrix = matrix @ matrix.T + torch.eye(5)
    target = torch.randn(5, dtype=torch.float64)
    x = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    Newton().step(0.5 * (x - target) @ matrix @ (x - target), {"x": x})
    torch.testing.assert_close(x.detach(), target)


def test_newton_step_stays_within_its_trust_radius():
    x = torch.randn(50, 3, dtype=torch.float64, requires_grad=True)
    moved = Newton({"x": 0.2}).get_step(loss_of(x), {"x": x})["x"] - x
    assert moved.norm(dim=-1).max() <= 0.2 + 1e-9


def test_newton_reduces_gradient_and_hessian_before_it_solves():
    shapes = []

    def halve(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor / 2

    newton = Newton()
    newton.reduce = halve
    x = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    newton.step(((x - 1.0) ** 2).sum(), {"x": x})
    assert shapes == [(4, 2), (4, 2, 2)]
    torch.testing.assert_close(x.detach(), torch.ones(4, 2, dtype=torch.float64))


def test_newton_is_differentiable_with_respect_to_the_loss():
    target = torch.tensor([2.0], requires_grad=True)
    x = torch.zeros(1, requires_grad=True)
    (gradient,) = torch.autograd.grad(Newton().get_step(((x - target) ** 2).sum(), {"x": x})["x"].sum(), target)
    torch.testing.assert_close(gradient, torch.ones(1))


@pytest.mark.parametrize("kind", ["torch", "pyro", "mixed"])
def test_wrapped_optimizers_step_as_pyros(kind):
    def values(multi, module):
        pyro.clear_param_store()
        x = pyro.param("x", torch.ones(3)).unconstrained()
        y = pyro.param("y", torch.ones(2, 2)).unconstrained()
        adam = module.Adam({"lr": 0.1})
        optim = {
            "torch": lambda: multi.TorchMultiOptimizer(torch.optim.Adam, {"lr": 0.1}),
            "pyro": lambda: multi.PyroMultiOptimizer(adam),
            "mixed": lambda: multi.MixedMultiOptimizer([(["x"], adam), (["y"], multi.Newton({"y": 0.5}))]),
        }[kind]()
        for _ in range(4):
            loss = loss_of(x) + loss_of(y)
            optim.step(loss, {"x": x, "y": y})
        return [x.detach().clone(), y.detach().clone()]

    import distopt.optim
    import distopt.optim.multi

    torch.testing.assert_close(
        values(distopt.optim.multi, distopt.optim), values(pyro.optim.multi, pyro.optim), rtol=1e-5, atol=1e-5
    )


def test_a_name_with_two_optimizers_is_refused():
    with pytest.raises(ValueError, match="'x' has two optimizers"):
        MixedMultiOptimizer([(["x"], Adam({"lr": 0.1})), (["x", "y"], Newton())])


def test_what_is_no_pyro_optim_is_refused():
    with pytest.raises(TypeError, match="SGD"):
        PyroMultiOptimizer(torch.optim.SGD([torch.zeros(1)], lr=0.1))


def test_loss_that_is_no_scalar_is_refused():
    x = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="expected a scalar"):
        Newton().step(x * x, {"x": x})


def test_step_without_get_step_is_refused():
    with pytest.raises(NotImplementedError, match="step"):
        TorchMultiOptimizer(torch.optim.SGD, {"lr": 0.1}).get_step(torch.zeros(()), {})


@pytest.mark.parametrize("name", [name for name in vars(pyro.optim.multi) if name in vars(distopt.optim.multi)])
def test_each_class_is_one_of_pyros_too(name):
    ours, theirs = getattr(distopt.optim.multi, name), getattr(pyro.optim.multi, name)
    if isinstance(theirs, type) and theirs.__module__ == "pyro.optim.multi":
        assert issubclass(ours, theirs) and ours is not theirs
