"""What is restored is what is computed with: whatever names, wrappers and ties there are, or it is refused by name."""

from __future__ import annotations

import copy
import warnings

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from torch import nn

import distopt.optim
from distopt.backends.single import Single
from distopt.checkpoint import Checkpointer, CheckpointError
from distopt.checkpoint.param_store import canonical
from distopt.infer import SVI
from distopt.optim import DistributedOptimizer

X = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))


def optimizer_of(kind):
    if kind == "pyro":
        return pyro.optim.Adam({"lr": 0.05})
    optimizer = distopt.optim.Adam({"lr": 0.05})
    return DistributedOptimizer(optimizer, backend=Single()) if kind == "distributed" else optimizer


def train(folder, num_steps, make, *, state=None, optimizer="distributed", init=False):
    """Takes some steps of a new process; returns the losses.

    Args:
        folder: Of the checkpoints.
        num_steps: Steps to take after those that are done.
        make: Returns a model, and by name the modules that it is made of.
        state: Names under which modules are given to the checkpointer, by their name in `make`.
        optimizer: Which.
        init: Whether the model runs before the restore.
    """
    pyro.clear_param_store()
    torch.manual_seed(1)
    model, modules = make()
    chosen = optimizer_of(optimizer)
    svi = (SVI if optimizer == "distributed" else pyro.infer.SVI)(model, lambda x: None, chosen, Trace_ELBO())
    given = {name: modules[key] for key, name in (state or {}).items()}
    with Checkpointer(folder, {"optimizer": chosen, **given}, backend=Single()) as keeper:
        if init:
            Trace_ELBO().loss(model, lambda x: None, X)
        restored = keeper.restore()
        step = restored.step if restored else 0
        losses = [svi.step(X) for _ in range(num_steps)]
        keeper.save(step + num_steps)
        keeper.wait()
    return losses


def observe(mean, x):
    with pyro.plate("d", len(x)):
        pyro.sample("y", dist.Normal(mean.squeeze(-1), 1.0), obs=x.sum(-1))


def linear(wrap=lambda net: net, name="net"):
    def make():
        net = nn.Linear(2, 1)
        registered = wrap(net)

        def model(x):
            pyro.module(name, registered)
            observe(registered(x), x)

        return model, {"net": net, "registered": registered}

    return make


def tied_modules():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    head = nn.Linear(2, 1)

    def model(x):
        for name, module in (("a", first), ("b", second), ("head", head)):
            pyro.module(name, module)
        observe(head(second(first(x).tanh())), x)

    return model, {"a": first, "b": second, "head": head}


def tied_params(kind=torch.Tensor):
    def make():
        tensor = nn.Parameter(torch.full((2,), 0.1)) if kind is nn.Parameter else torch.full((2,), 0.1)

        def model(x):
            observe((x * pyro.param("w", tensor) + x * pyro.param("v", tensor).exp()).sum(-1, keepdim=True), x)

        return model, {}

    return make


def tied_pyro_module():
    class Net(PyroModule):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1)
            self.second.weight = self.first.weight

        def forward(self, x):
            observe(self.head(self.second(self.first(x).tanh())), x)

    net = Net()
    return net, {"net": net}


def plain_parameter():
    class Net(PyroModule):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((2, 1), 0.3))

        def forward(self, x):
            observe(x @ self.weight, x)

    net = Net()
    return net, {"net": net}


def compiled(net):
    return torch.compile(net, backend="eager")


KINDS = {
    "module": linear(),
    "compiled": linear(compiled),
    "tied modules": tied_modules,
    "tied params": tied_params(),
    "tied Parameters": tied_params(nn.Parameter),
    "tied in a PyroModule": tied_pyro_module,
    "parameter of a PyroModule": plain_parameter,
}


@pytest.mark.sampled(14)
@pytest.mark.parametrize("optimizer", ["distributed", "pyro"])
@pytest.mark.parametrize("init", [False, True], ids=["restored first", "run first"])
@pytest.mark.parametrize("given", [False, True], ids=["alone", "given"])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_takes_the_steps_of_an_undisturbed_one(kind, given, init, optimizer, tmp_path):
    make = KINDS[kind]
    state = {key: f"other {key}" for key in make()[1] if key != "registered"} if given else None
    arguments = {"state": state, "optimizer": optimizer, "init": init}
    whole = train(tmp_path / "whole", 8, make, **arguments)
    train(tmp_path / "halves", 4, make, **arguments)
    assert train(tmp_path / "halves", 4, make, **arguments) == whole[4:]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("init", [False, True], ids=["restored first", "run first"])
@pytest.mark.parametrize("optimizer", ["distributed", "pyro"])
@pytest.mark.parametrize("given", [{}, {"net": "net"}, {"registered": "net"}], ids=["alone", "net", "wrapped"])
@pytest.mark.parametrize("order", [1, pytest.param(-1, marks=pytest.mark.slow)])
def test_run_that_compiles_its_module_resumes_one_that_did_not_and_the_other_way_round(
    order, given, optimizer, init, tmp_path
):
    before, after = [linear(), linear(compiled)][::order]
    whole = train(tmp_path / "whole", 8, linear(), optimizer=optimizer)
    train(tmp_path / "halves", 4, before, state=given, optimizer=optimizer)
    assert train(tmp_path / "halves", 4, after, state=given, optimizer=optimizer, init=init) == whole[4:]


def test_store_holds_the_tensors_of_the_modules_after_the_first_run(tmp_path):
    train(tmp_path, 2, tied_modules)
    modules = {}

    def make():
        model, made = tied_modules()
        modules.update(made)
        return model, made

    train(tmp_path, 1, make)
    stored = pyro.get_param_store()._params
    assert stored["a$$$weight"] is stored["b$$$weight"] is modules["a"].weight
    assert "setdefault" not in vars(pyro.get_param_store())  # nothing is waited for any more


@pytest.mark.parametrize("cleared", [False, True])
def test_only_what_was_restored_is_adopted_and_once(cleared, tmp_path):
    train(tmp_path, 1, tied_modules)
    checkpointer = Checkpointer(tmp_path, {"optimizer": optimizer_of("pyro")})
    pyro.clear_param_store()
    assert checkpointer.restore() is not None
    if cleared:  # another model begins
        pyro.clear_param_store()
    for name in ("a", "other"):
        first, second = nn.Linear(2, 2), nn.Linear(2 if name == "a" else 3, 2)
        pyro.module(name, first)
        before = {key: value.clone() for key, value in pyro.get_param_store()._params.items()}
        with warnings.catch_warnings(action="ignore"):
            pyro.module(name, second, update_module_params=True)  # as Pyro itself: the store's values win
        assert pyro.get_param_store()._params[f"{name}$$$weight"] is first.weight
        assert all(torch.equal(value, before[key]) for key, value in pyro.get_param_store()._params.items())
        assert second.weight.shape == first.weight.shape


def untied_modules():
    model, modules = tied_modules()
    modules["b"].weight = nn.Parameter(modules["a"].weight.detach().clone())
    return model, modules


@pytest.mark.parametrize("init", [False, True], ids=["restored first", "run first"])
def test_tied_names_that_are_two_tensors_here_are_refused(init, tmp_path):
    train(tmp_path, 2, tied_modules)
    with pytest.raises(CheckpointError, match="are one tensor in the checkpoint.*same nn.Parameter"):
        train(tmp_path, 1, untied_modules, init=init)


def test_two_tensors_that_are_tied_here_are_refused(tmp_path):
    train(tmp_path, 2, untied_modules)
    with pytest.raises(CheckpointError, match="one tensor here and two with different values"):
        train(tmp_path, 1, tied_modules, init=True)


def test_parameter_under_another_name_is_refused_with_both(tmp_path):
    train(tmp_path, 2, linear(name="encoder"))
    with pytest.raises(CheckpointError, match=r"lacks \(encoder\$\$\$bias, .*the checkpoint lacks \(net\$\$\$bias, "):
        train(tmp_path, 1, linear(), init=True)


def test_module_of_another_shape_is_refused_by_name(tmp_path):
    train(tmp_path, 2, linear())

    def wider():
        net = nn.Linear(2, 3)

        def model(x):
            pyro.module("net", net)
            observe(net(x).sum(-1, keepdim=True), x)

        return model, {"net": net}

    with pytest.raises(CheckpointError, match=r"net\$\$\$weight.*shape \(1, 2\) in the checkpoint.*\(3, 2\)"):
        train(tmp_path, 1, wider)


def normed(given=True):
    def make():
        net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, momentum=0.5), nn.Linear(3, 1))

        def model(x):
            pyro.module("net", net)
            net.eval() if len(x) == 1 else net.train()
            observe(net(x), x)

        return model, {"net": net}

    return make


def buffers_after(folder, num_steps, **arguments):
    made = {}

    def make():
        model, modules = normed()()
        made.update(modules)
        return model, modules

    train(folder, num_steps, make, **arguments)
    return copy.deepcopy(dict(made["net"].named_buffers()))


@pytest.mark.parametrize("state", [None, {"net": "net"}], ids=["registered", "given"])
def test_batch_statistics_of_a_registered_module_continue(state, tmp_path):
    whole = buffers_after(tmp_path / "whole", 8, state=state)
    buffers_after(tmp_path / "halves", 4, state=state)
    if state is None:
        with pytest.raises(CheckpointError, match="has a module 'net'; pass it to Checkpointer in state"):
            buffers_after(tmp_path / "halves", 4, state=state)
        model, modules = normed()()
        pyro.clear_param_store()
        model(X)
        with Checkpointer(tmp_path / "halves", backend=Single()) as keeper:
            assert keeper.restore().step == 4
        statistics = dict(modules["net"].named_buffers())
        assert statistics["1.num_batches_tracked"] == 4
        return
    resumed = buffers_after(tmp_path / "halves", 4, state=state)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_module_whose_buffers_are_not_in_the_checkpoint_is_refused_by_name(tmp_path):
    train(tmp_path, 2, linear())
    with pytest.raises(CheckpointError, match=r"module 'net' has 1\.running_mean, .*which the checkpoint lacks"):
        train(tmp_path, 1, normed(), state={"net": "net"})


def test_names_of_one_parameter_are_one_whatever_wraps_its_module():
    names = ["net$$$weight", "net$$$_orig_mod.weight", "net._orig_mod.weight", "net._fsdp_wrapped_module.weight"]
    assert {canonical(name) for name in names} == {"net.weight"}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
