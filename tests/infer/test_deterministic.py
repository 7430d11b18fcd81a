"""Steps have the same bits each time they are taken, with several threads too."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from distopt.infer import SVI
from distopt.infer.deterministic import Deterministic

LEVELS = torch.arange(40_000) % 7 - 7 * (torch.arange(40_000) % 3 == 0)  # a third of them counted from the end


def gathering(x: Tensor) -> None:
    """Effects of seven levels in 40,000 rows: the gradient of an effect is a sum over its rows."""
    with pyro.plate("levels", 7):
        effects = pyro.sample("effects", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(effects[LEVELS], 1.0), obs=x)


def gradients_of_gathering(num_times: int, capture: str) -> list[Tensor]:
    """Returns the gradients of a step of `gathering` that is taken again and again with the same random numbers."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    x = torch.randn(len(LEVELS))
    svi = SVI(gathering, AutoNormal(gathering), pyro.optim.SGD({"lr": 0.0}), Trace_ELBO(), capture=capture)
    gradients = []
    svi.init(x)
    for _ in range(num_times):
        torch.manual_seed(1)
        svi._gradients(svi, (x,), {})
        params = [*pyro.get_param_store()._params.values()]
        gradients.append(torch.cat([param.grad.flatten() for param in params]))
        for param in params:
            param.grad = None
    if capture == "compiled":
        assert (svi.captured.refusal, svi.captured.notice) == (None, None)
    return gradients


@pytest.mark.timeout(900)
@pytest.mark.parametrize("capture", ["off", "graph", "compiled"])
def test_gradients_of_gathered_rows_have_the_same_bits_each_time_with_several_threads(capture):
    # Left to themselves torch and its compiler have the threads add to one number in whatever order they come.
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = gradients_of_gathering(40, capture)
    finally:
        torch.set_num_threads(threads)
    assert not torch.are_deterministic_algorithms_enabled()
    assert all(torch.equal(first, each) for each in others)


@pytest.mark.timeout(900)
def test_one_thread_adds_gathered_rows_within_the_compiled_loops():
    # Torch's own deterministic operation beside them takes as long as all of the rest.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.autograd.profiler.profile() as profile:
            first, *others = gradients_of_gathering(20, "compiled")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first, each) for each in others)
    called = [event.name for event in profile.function_events]
    assert called.count("aten::index_put_") < 10  # those of steps that were recorded


ROWS, LEVEL = torch.randn(100_000, 4), torch.randint(50, (100_000,))
OPERATIONS = {
    "gradient of vector[rows]": lambda: gradient(torch.randn(50), lambda each: (each[LEVEL] * ROWS[:, 0]).sum()),
    "gradient of matrix[rows]": lambda: gradient(torch.randn(50, 4), lambda each: (each[LEVEL] * ROWS).sum()),
    "gradient of take": lambda: gradient(torch.randn(50), lambda each: (torch.take(each, LEVEL) * ROWS[:, 0]).sum()),
    "put_": lambda: torch.zeros(50).put_(LEVEL, ROWS[:, 0], accumulate=True),
    "index_put_": lambda: torch.zeros(50, 4).index_put_((LEVEL,), ROWS, accumulate=True),
}


def gradient(value: Tensor, function) -> Tensor:
    leaf = value.requires_grad_()
    function(leaf).backward()
    return leaf.grad


@pytest.mark.parametrize("name", OPERATIONS)
def test_sums_of_rows_have_the_same_bits_each_time(name):
    results = set()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(20):
            with Deterministic():
                results.add(OPERATIONS[name]().numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    assert len(results) == 1


def test_settings_of_torch_are_put_back_after_an_error_too():
    def settings():
        return torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory

    before = settings()
    with pytest.raises(ValueError), Deterministic():
        assert settings() == (True, False)
        raise ValueError
    assert settings() == before == (False, True)


def test_what_the_user_has_set_stands():
    torch.use_deterministic_algorithms(True)
    try:
        with Deterministic():
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
