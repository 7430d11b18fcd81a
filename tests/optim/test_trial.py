"""What is chosen for speed computes what pyro.optim does: every optimizer, dtype, size, alignment and memory order."""

import pyro
import pyro.optim
import pytest
import torch

import distopt.optim
from distopt.optim import capabilities, trial
from distopt.optim.capabilities import switches

# Beyond one and several registers of a processor, which hold 4 to 64 elements.
SIZES = (1, 3, 8, 15, 16, 17, 33, 67, 1000)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

VARIANTS = [
    ("SGD", {"lr": 0.25}),
    ("SGD", {"lr": 0.25, "momentum": 0.9}),
    ("SGD", {"lr": 0.25, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.25, "momentum": 0.5, "dampening": 0.5, "maximize": True}),
    ("Adam", {"lr": 0.125}),
    ("Adam", {"lr": 0.125, "amsgrad": True, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.125}),
    ("AdamW", {"lr": 0.125, "amsgrad": True, "maximize": True}),
    ("Adagrad", {"lr": 0.125, "lr_decay": 0.1, "weight_decay": 0.1}),
    ("Adadelta", {"lr": 0.5}),
    ("Adamax", {"lr": 0.125, "weight_decay": 0.1}),
    ("ASGD", {"lr": 0.125, "weight_decay": 0.1}),
    ("NAdam", {"lr": 0.125}),
    ("RAdam", {"lr": 0.125}),
    ("RMSprop", {"lr": 0.0625}),
    ("RMSprop", {"lr": 0.0625, "weight_decay": 0.1, "maximize": True}),
    ("RMSprop", {"lr": 0.0625, "momentum": 0.5, "centered": True}),
    ("Rprop", {"lr": 0.0625}),
    ("ClippedAdam", {"lr": 0.125, "clip_norm": 0.5}),
    ("ClippedAdam", {"lr": 0.125, "lrd": 0.5, "weight_decay": 0.1}),
    ("ClippedAdam", {"lr": 0.125, "centered_variance": True}),
    ("AdagradRMSProp", {"eta": 0.5}),
    ("DCTAdam", {"lr": 0.125, "clip_norm": 0.5}),
]


def start(dtype: torch.dtype) -> list[torch.Tensor]:
    """Fills the store with parameters of all sizes, off any alignment and in other orders of memory among them."""
    pyro.clear_param_store()
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        values = torch.randn(2 * size + 3, generator=generator, dtype=torch.float64).to(dtype)
        pyro.param(f"{size} plain", values[:size].clone())
        pyro.param(f"{size} at an odd address", values[3 : 3 + size])
        pyro.param(f"{size} with gaps", values[: 2 * size : 2])
        pyro.param(f"{size} by columns", values[: 2 * size].clone().view(2, size).t())
    return [p for _, p in sorted(pyro.get_param_store().named_parameters())]


def run(module, name: str, args: dict, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Returns parameters and gradients after steps of which one leaves out half of the parameters."""
    params, optim = start(dtype), getattr(module, name)(args)
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        chosen = params[::2] if step == 2 else params
        for p in chosen:
            gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
            # In another order of memory than the parameter at every second step.
            p.grad = gradient.t().contiguous().t() if gradient.dim() == 2 and step % 2 else gradient
        optim(chosen)
    return [p.detach().clone() for p in params], [p.grad.clone() for p in params]


@pytest.mark.sampled(20)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "args"), VARIANTS, ids=str)
def test_step_is_that_of_pyro_for_every_dtype_size_alignment_and_memory_order(name, args, dtype):
    expected, gradients = run(pyro.optim, name, args, dtype)
    values, left = run(distopt.optim, name, args, dtype)
    # In 16 bits torch itself rounds once or twice by where in a register an element is.
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 3e-2, torch.bfloat16: 3e-2}[dtype]
    assert all(value.isfinite().all() for value in expected) or dtype is torch.float16
    torch.testing.assert_close(values, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(left, gradients, rtol=0.0, atol=0.0)


class Broken(torch.optim.SGD):
    """One whose quick loop leaves out what lies beyond 16 elements."""

    def step(self, closure=None):
        before = [p.clone() for group in self.param_groups for p in group["params"]]
        super().step(closure)
        if self.defaults["foreach"]:
            for p, value in zip(self.param_groups[0]["params"], before, strict=True):
                p[16:] = value[16:]


def test_switch_whose_loop_is_wrong_is_not_used(monkeypatch):
    monkeypatch.setattr(capabilities, "_FOREACH", frozenset({Broken, torch.optim.Adamax}))
    args = {"lr": 0.1, "momentum": 0.9}
    assert switches(Broken, args, torch.float32, "cpu", listed=True) == {}
    assert switches(torch.optim.Adamax, {"lr": 0.1}, torch.float32, "cpu", listed=True) == {"foreach": True}


def test_switch_that_this_release_does_not_know_is_not_used():
    assert not trial.computes_the_same(torch.optim.Adadelta, {}, {"fused": True}, torch.float32, "cpu")
    assert not trial.computes_the_same(
        torch.optim.Adam, {"lr": torch.tensor(0.1)}, {"fused": True}, torch.float32, "cpu"
    )


def test_trial_is_made_once_for_arguments_of_one_kind_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    trial._tried.cache_clear()
    for decay in (0.0, 0.1, 0.2, 0.3):
        assert trial.computes_the_same(
            torch.optim.SGD, {"lr": decay, "weight_decay": decay}, {"fused": True}, torch.float32, "cpu"
        )
    assert trial._tried.cache_info().misses == 2
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("switch", ["fused", "foreach"])
@pytest.mark.parametrize(
    ("name", "exact", "inexact"),
    [
        ("SGD", {"momentum": 0.5}, {"momentum": 0.9}),
        (
            "SGD",
            {"momentum": 0.5, "nesterov": True, "weight_decay": 1},
            {"momentum": 0.7, "nesterov": True, "weight_decay": 0.1},
        ),
        ("Adam", {"betas": (0.5, 0.75), "weight_decay": 0.25}, {"betas": (0.9, 0.999), "weight_decay": 0.1}),
        ("RMSprop", {"alpha": 0.5, "momentum": 0.5}, {"alpha": 0.99, "momentum": 0.9}),
        ("Adagrad", {"lr_decay": 0.5}, {"lr_decay": 0.1}),
    ],
    ids=str,
)
def test_what_is_learned_with_powers_of_two_holds_for_other_numbers(name, exact, inexact, switch, dtype):
    learned = []
    for args in (exact, inexact):
        trial._tried.cache_clear()
        learned.append(trial.computes_the_same(getattr(torch.optim, name), args, {switch: True}, dtype, "cpu"))
    assert learned[0] == learned[1]


class RoundsTheRest(torch.optim.Adamax):
    """A kernel that rounds the rest of a tensor, behind its last 8 elements, in another way."""

    def step(self, closure=None):
        super().step()
        if self.param_groups[0]["foreach"]:
            for p in self.param_groups[0]["params"]:
                rest = p.view(-1)[p.numel() // 8 * 8 :]
                rest.copy_(torch.nextafter(rest, torch.full_like(rest, torch.inf)))


def test_kernel_that_rounds_by_the_place_of_an_element_is_not_used():
    assert trial.computes_the_same(torch.optim.Adamax, {}, {"foreach": True}, torch.float32, "cpu")
    assert not trial.computes_the_same(RoundsTheRest, {}, {"foreach": True}, torch.float32, "cpu")
