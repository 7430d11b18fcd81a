"""Optimizers made without torch's compiler: the same objects, and nothing of it is imported."""

import subprocess
import sys
from operator import attrgetter

import pyro.optim
import pytest
import torch

from distopt.optim import PyroOptim
from distopt.optim.construction import construct, load_plain_state, plain_state

SCRIPT = """
import copy, sys
import pyro, torch
from distopt.config import parse_config
from distopt.train.components import make_optimizer

for name in ("SGD", "Adam"):
    schedule = "{name: ExponentialLR, args: {gamma: 0.9}}"
    make_optimizer(parse_config(f"{{name: x, task: a:B, optim: {{name: {name}, scheduler: {schedule}}}}}"), None)
    assert "torch._dynamo" not in sys.modules, "a run's optimizer"

import pyro.distributions as dist
import distopt.optim
from distopt.infer import SVI

def model():
    a = pyro.param("a", torch.tensor(0.0))
    b = pyro.param("b", torch.zeros(3))
    pyro.sample("x", dist.Normal(a + b.sum(), 1.0), obs=torch.tensor(1.0))

args = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9}
for make in (
    lambda: distopt.optim.SGD({"lr": 0.1}),
    lambda: distopt.optim.Adam({"lr": 0.1}),
    lambda: distopt.optim.RMSprop({"lr": 0.1}),
    lambda: distopt.optim.ClippedAdam({"lr": 0.1}),
    lambda: distopt.optim.ExponentialLR(args),
):
    pyro.clear_param_store()
    optim = make()
    for _ in range(2):
        SVI(model, lambda: None, optim, pyro.infer.Trace_ELBO()).step()
        if hasattr(optim, "kwargs"):
            optim.step()
    state = copy.deepcopy(optim.get_state())
    optim = make()
    optim.set_state(state)
    SVI(model, lambda: None, optim, pyro.infer.Trace_ELBO()).step()
    assert "torch._dynamo" not in sys.modules, optim
"""


def test_training_and_resuming_import_no_compiler():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=300)


class Counting(torch.optim.SGD):
    """Has a method of its own, which is called."""

    num_groups = 0

    def add_param_group(self, param_group):
        self.num_groups += 1
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict):
        self.num_groups = -1
        super().load_state_dict(state_dict)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop, Counting])
def test_constructed_optimizer_is_what_its_class_makes(kind):
    param = torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [param], "lr": 0.5}, {"params": [torch.nn.Parameter(torch.ones(1))]}]
    ours, plain = construct(kind, groups, {"lr": 0.1}), kind(groups, lr=0.1)
    assert type(ours) is kind and vars(ours).keys() == vars(plain).keys()
    assert str(ours.state_dict()) == str(plain.state_dict()) == str(plain_state(plain))

    ours.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    assert [group["lr"] for group in ours.param_groups] == [0.5, 0.1, 0.1]
    if kind is Counting:
        assert ours.num_groups == 3


def test_hooks_and_overridden_methods_are_called_when_state_is_loaded():
    param = torch.nn.Parameter(torch.ones(2))
    seen = []
    for kind in (torch.optim.Adam, Counting):
        optimizer = construct(kind, [param], {"lr": 0.1})
        optimizer.register_load_state_dict_post_hook(lambda loaded: seen.append(type(loaded)))
        load_plain_state(optimizer, kind([param], lr=0.7).state_dict())
        assert optimizer.param_groups[0]["lr"] == 0.7
    assert seen == [torch.optim.Adam, Counting]
    assert optimizer.num_groups == -1


def test_error_of_a_constructor_is_its_own():
    with pytest.raises(ValueError, match="Invalid learning rate"):
        construct(torch.optim.Adam, [torch.nn.Parameter(torch.ones(1))], {"lr": -1.0})
    assert construct(lambda params, lr: (params, lr), [1], {"lr": 2}) == ([1], 2)


@pytest.mark.parametrize("module", ["adagrad_rmsprop.AdagradRMSProp", "clipped_adam.ClippedAdam", "dct_adam.DCTAdam"])
def test_pyros_own_optimizer_class_steps_as_in_pyro_and_all_parameters_at_once(module):
    given = attrgetter(module)(pyro.optim)
    after = []
    for kind in (pyro.optim.PyroOptim, PyroOptim):
        optim = kind(given, {} if "adagrad" in module else {"lr": 0.1})
        params = [torch.full((size,), 0.5, requires_grad=True) for size in (1, 3, 4)]
        generator = torch.Generator().manual_seed(0)
        for _ in range(6):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optim(params)
        after.append([p.detach() for p in params])
    torch.testing.assert_close(*after)
    assert optim.pt_optim_constructor is given
    assert len([*optim._groups]) == 1
