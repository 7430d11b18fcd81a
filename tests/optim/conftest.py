import pyro
import pytest
import torch

from distopt.optim import packing


@pytest.fixture(autouse=True)
def fresh_param_store():
    """Each test starts and ends with an empty parameter store, one thread and a fixed seed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
    torch.set_num_threads(threads)


@pytest.fixture(params=["compiled", "python"])
def loops(request, monkeypatch):
    """Runs a test with the compiled loops over parameters and with those in Python."""
    if request.param == "python":
        monkeypatch.setattr(packing, "_compiled", None)
    elif packing._compiled is None:
        pytest.skip("the compiled loops are not built (needs a C++ compiler; `python setup.py build_ext --inplace`)")
