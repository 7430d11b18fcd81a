"""Trajectories equal those of pyro.optim, whatever appears, pauses, is clipped, saved or loaded on the way."""

import copy
import io
import os
import random

import pyro
import pyro.optim
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import distopt.optim
from tests.optim.trajectories import OPTIMIZERS, SHAPES, Schedule, assert_close, run, start

CLIPPED = ["Adam", "SGD", "RMSprop", "NAdam"]
SCHEDULERS = {
    "LambdaLR": {"lr_lambda": lambda t: 0.9**t},
    "MultiplicativeLR": {"lr_lambda": lambda t: 0.9},
    "StepLR": {"step_size": 2, "gamma": 0.5},
    "MultiStepLR": {"milestones": [1, 3], "gamma": 0.5},
    "ConstantLR": {"factor": 0.5, "total_iters": 2},
    "LinearLR": {"total_iters": 3},
    "ExponentialLR": {"gamma": 0.8},
    "PolynomialLR": {"total_iters": 8},
    "CosineAnnealingLR": {"T_max": 6},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "cycle_momentum": False},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 30},
}
# A thorough run: DISTOPT_EXAMPLES=1000 pytest tests/optim/test_conformance.py
NUM_EXAMPLES = int(os.environ.get("DISTOPT_EXAMPLES", "12"))
quick = settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def both(name, args, schedule, dtype=torch.float64, clip=None):
    """The two trajectories, and both states."""
    extra = () if clip is None else (clip,)
    theirs, their_state = run(lambda: getattr(pyro.optim, name)(args, *extra), schedule, dtype)
    ours, our_state = run(lambda: getattr(distopt.optim, name)(args, *extra), schedule, dtype)
    return ours, theirs, our_state, their_state


def plain(value):
    """State with tensors as nested lists, to be compared."""
    if isinstance(value, torch.Tensor):
        return value.double().tolist()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def assert_same(ours, theirs):
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)
    else:
        assert ours == theirs


schedules = st.builds(
    lambda calls, steps, seed: Schedule(calls, steps, seed=seed),
    st.lists(st.lists(st.integers(0, len(SHAPES) - 1), unique=True, max_size=len(SHAPES)), min_size=1, max_size=14),
    st.lists(st.booleans(), max_size=14),
    st.integers(0, 2**16),
)


@pytest.mark.parametrize("name", OPTIMIZERS)
@given(schedule=schedules)
@quick
def test_trajectory_and_state_equal_pyros_for_any_schedule(name, schedule):
    ours, theirs, our_state, their_state = both(name, OPTIMIZERS[name], schedule)
    assert_close(ours, theirs)
    assert_same(plain(our_state), plain(their_state))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trajectory_equals_pyros_in_lower_precision(name, dtype):
    ours, theirs, *_ = both(name, OPTIMIZERS[name], Schedule.random(3), dtype)
    assert_close(ours, theirs, dtype)


@pytest.mark.parametrize("wrap", [lambda optim: optim, distopt.optim.DistributedOptimizer], ids=["plain", "of all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "args"),
    [*((name, args) for name, args in OPTIMIZERS.items() if name != "Adafactor"),
     ("RMSprop", {"lr": 0.1, "alpha": 0.9, "momentum": 0.9, "centered": True}),
     ("ClippedAdam", {"lr": 0.05, "centered_variance": True})],
)  # fmt: skip
def test_parameters_in_16_bits_have_every_bit_of_pyros(name, args, dtype, wrap):
    """Torch rounds an element of a full vector register otherwise than one of the rest, so none may be moved."""

    def values(module, sizes, wrap=lambda optim: optim):
        pyro.clear_param_store()
        generator = torch.Generator().manual_seed(0)
        params = [
            pyro.param(f"p{i}", torch.randn(size, generator=generator).to(dtype)).unconstrained()
            for i, size in enumerate(sizes)
        ]
        optim = wrap(getattr(module, name)(dict(args)))
        for _ in range(8):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            optim(params)
        return torch.cat([p.detach() for p in params])

    for sizes in ([17, 33, 1, 64, 5], [1000, 3], [8] * 20):
        ours, theirs = values(distopt.optim, sizes, wrap), values(pyro.optim, sizes)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_optimizer_of_whole_matrices_is_given_each_by_itself():
    def values(module):
        pyro.clear_param_store()
        generator = torch.Generator().manual_seed(0)
        params = [pyro.param(f"x{i}", torch.ones(3, 2 + i % 2)).unconstrained() for i in range(4)]
        optim = module.Muon({"lr": 0.1, "momentum": 0.9})
        for t in range(5):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optim(params[: 2 + t])
        return [p.detach().clone() for p in params]

    assert_close(values(distopt.optim), values(pyro.optim), torch.float32)


@pytest.mark.parametrize("name", SCHEDULERS)
@given(schedule=schedules)
@settings(parent=quick, max_examples=max(NUM_EXAMPLES // 2, 1))
def test_scheduled_trajectory_equals_pyros(name, schedule):
    def args():
        return {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, **SCHEDULERS[name]}

    theirs, their_state = run(lambda: getattr(pyro.optim, name)(args()), schedule)
    ours, our_state = run(lambda: getattr(distopt.optim, name)(args()), schedule)
    assert_close(ours, theirs)
    if name != "CyclicLR":  # its state holds a bound method
        assert_same(plain(our_state), plain(their_state))


def test_plateau_reduces_when_pyros_does():
    def trajectory(module):
        (x,) = [pyro.param("x", torch.ones(2))]
        optim = module.ReduceLROnPlateau(
            {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1.0}, "factor": 0.1, "patience": 1}
        )
        values = []
        for metric in [3.0, 2.0, 2.0, 2.0, 2.0, 2.0]:
            x.unconstrained().grad = torch.ones(2)
            optim([x.unconstrained()])
            optim.step(metric)
            values.append(pyro.param("x").detach().clone())
        pyro.clear_param_store()
        return values

    assert_close(trajectory(distopt.optim), trajectory(pyro.optim), torch.float32)


@pytest.mark.parametrize("clip", [{"clip_norm": 0.5}, {"clip_value": 0.3}, {"clip_norm": 1.0, "clip_value": 0.2}])
@pytest.mark.parametrize("name", CLIPPED)
def test_clipped_trajectory_equals_pyros(name, clip):
    for seed in range(4):
        ours, theirs, *_ = both(name, OPTIMIZERS[name], Schedule.random(seed), clip=clip)
        assert_close(ours, theirs)


def one_argument(name):
    assert name.startswith("net.p"), name
    return {"lr": 0.01 if name == "net.p3" else 0.1}


def two_arguments(module, name):
    assert module == "net", module
    return {"lr": 0.01 if name in ("p1", "p2") else 0.1}


def clip_two_arguments(module, name):
    return {"clip_norm": 0.1} if name == "p2" else {}


@pytest.mark.parametrize("args", [one_argument, two_arguments])
@pytest.mark.parametrize("name", ["Adam", "SGD", "ClippedAdam"])
def test_arguments_by_callable_equal_pyros(name, args):
    clip = None if name == "ClippedAdam" else clip_two_arguments
    for seed in range(4):
        ours, theirs, *_ = both(name, args, Schedule.random(seed), clip=clip)
        assert_close(ours, theirs)


def handed_over(optim, make, tmp_path):
    """Saves `optim` and loads its file into a new optimizer."""
    file = tmp_path / "state.pt"
    optim.save(str(file))
    other = make()
    other.load(str(file))
    return other


@pytest.mark.parametrize("kind", [*OPTIMIZERS, "ExponentialLR", "OneCycleLR"])
@pytest.mark.parametrize("direction", ["pyro to distopt", "distopt to pyro", "distopt to distopt"])
def test_state_saved_in_the_middle_goes_on_in_either_module(kind, direction, tmp_path):
    def make(module):
        if kind in OPTIMIZERS:
            return getattr(module, kind)(OPTIMIZERS[kind])
        args = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, **SCHEDULERS[kind]}
        return getattr(module, kind)(args)

    modules = {"pyro": pyro.optim, "distopt": distopt.optim}
    first, second = (modules[m] for m in direction.split(" to "))
    for seed in range(3):
        schedule = Schedule.random(seed, save_at=6)
        # Where pyro.optim takes over, it is compared with itself interrupted likewise: torch rounds some state that it
        # loads, and a schedule that was loaded for a parameter not seen again yet stands still.
        again = (lambda o: handed_over(o, lambda: make(pyro.optim), tmp_path)) if second is pyro.optim else None
        expected, _ = run(lambda: make(pyro.optim), schedule, resume=again)
        values, _ = run(lambda: make(first), schedule, resume=lambda o: handed_over(o, lambda: make(second), tmp_path))
        assert_close(values, expected)


class Counting(torch.optim.Optimizer):
    """A user's optimizer, whose rate depends on how often it was called."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "num_calls": 0})

    def step(self, closure=None):
        for group in self.param_groups:
            group["num_calls"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    p.data -= group["lr"] / group["num_calls"] * p.grad


WITHOUT_GRADIENTS = {
    **{name: (name, args) for name, args in OPTIMIZERS.items()},
    "DCTAdam, lrd": ("DCTAdam", {"lr": 0.05, "lrd": 0.9}),
    "of the user": ("PyroOptim", Counting, {"lr": 0.1}),
    "of a function": ("PyroOptim", lambda params, **args: Counting(params, **args), {"lr": 0.1}),
    **{
        f"{name}, scheduled": ("ExponentialLR", {"optimizer": kind, "optim_args": args, "gamma": 0.8})
        for name, kind, args in (
            ("Adam", torch.optim.Adam, {"lr": 0.1}),
            ("ClippedAdam", pyro.optim.clipped_adam.ClippedAdam, {"lr": 0.1, "lrd": 0.9}),
            ("of the user", Counting, {"lr": 0.1}),
        )
    },
}


@pytest.mark.parametrize("wrap", [lambda optim: optim, distopt.optim.DistributedOptimizer], ids=["plain", "of all"])
@pytest.mark.parametrize("kind", WITHOUT_GRADIENTS)
def test_parameters_without_gradient_are_as_pyros_rates_counts_and_schedules_included(kind, wrap):
    name, *args = WITHOUT_GRADIENTS[kind]

    def values(module, seed, wrap=lambda optim: optim):
        params, r = start(), random.Random(seed)
        optim = wrap(getattr(module, name)(*copy.deepcopy(args)))  # pyro.optim takes keys out of a schedule's
        generator = torch.Generator().manual_seed(seed)
        for step in range(12):
            for p in params:
                gradient = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                p.grad = gradient if r.random() < 0.6 else None
            optim([p for i, p in enumerate(params) if i <= step and r.random() < 0.8])
            if isinstance(optim, pyro.optim.PyroLRScheduler) and step % 3 == 2:
                optim.step()
        return [p.detach().clone() for p in params], optim.get_state()

    for seed in range(3):
        (ours, our_state), (theirs, their_state) = values(distopt.optim, seed, wrap), values(pyro.optim, seed)
        assert_close(ours, theirs)
        assert_same(plain(our_state), plain(their_state))


def test_file_of_pyro_optim_is_read_without_running_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        distopt.optim.Adam({"lr": 0.1}).load(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_custom_optimizer_gets_each_parameter_as_pyro_gives_it():
    seen = []

    class Custom(torch.optim.Optimizer):
        def __init__(self, params, lr):
            params = list(params)
            seen.append([tuple(p.shape) for p in params])
            super().__init__(params, {"lr": lr})

        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.data -= group["lr"] * p.grad * p.grad.norm()  # not elementwise

    schedule = Schedule.random(1)
    theirs, _ = run(lambda: pyro.optim.PyroOptim(Custom, {"lr": 0.1}), schedule)
    expected = list(seen)
    seen.clear()
    ours, _ = run(lambda: distopt.optim.PyroOptim(Custom, {"lr": 0.1}), schedule)
    assert_close(ours, theirs)
    assert sorted(seen) == sorted(expected)


def test_torch_save_of_the_state_holds_no_more_than_pyros():
    def size(module):
        params = [pyro.param(f"x{i}", torch.zeros(10)).unconstrained() for i in range(100)]
        for p in params:
            p.grad = torch.ones(10)
        optim, file = module.Adam({"lr": 0.1}), io.BytesIO()
        optim(params)
        torch.save(optim.get_state(), file)
        return file.tell()

    assert size(distopt.optim) < size(pyro.optim)


def test_changing_a_state_that_was_read_changes_neither_the_optimizer_nor_its_neighbours():
    params = start()
    optim = distopt.optim.Adam({"lr": 0.1})
    for p in params:
        p.grad = torch.ones_like(p)
    optim(params)
    before, state = plain(optim.get_state()), optim.get_state()
    for value in state["net$$$p2"]["state"][0].values():
        value.add_(1.0)
    state["net$$$p2"]["param_groups"][0]["lr"] = 7.0
    assert_same(plain(optim.get_state()), before)
    del state["net$$$p2"], before["net$$$p2"]
    assert_same(plain(state), before)
