"""Arguments of the optimizer by parameter: dicts, callables of one or two names, and patterns of names."""

from functools import partial

import pyro
import pytest
import torch

from distopt.optim import ClippedAdam, by_name
from distopt.optim.arguments import args_for, check_args, num_arguments


def test_arguments_follow_patterns_of_names():
    args = by_name({"lr": 0.1}, {"AutoNormal.scales.*": {"lr": 0.5}, "*.b": {"clip_norm": 1.0}})
    optim = ClippedAdam(args)
    names = ["AutoNormal$$$locs.a", "AutoNormal$$$scales.a", "AutoNormal$$$scales.b"]
    params = [pyro.param(name, torch.zeros(2)).unconstrained() for name in names]
    for p in params:
        p.grad = torch.ones(2)
    optim(params)
    groups = {n: s["param_groups"][0] for n, s in optim.get_state().items()}
    assert [(groups[n]["lr"], groups[n]["clip_norm"]) for n in names] == [(0.1, 10.0), (0.5, 10.0), (0.5, 1.0)]


def test_names_are_those_of_named_parameters():
    name = "net$$$layer.weight"
    assert args_for("optim_args", lambda name: {"name": name}, name) == {"name": "net.layer.weight"}
    assert args_for("optim_args", lambda module, name: {"at": (module, name)}, name) == {"at": ("net", "layer.weight")}


def test_dict_is_copied_for_each_parameter():
    args = {"lr": 0.1}
    args_for("optim_args", args, "x")["lr"] = 7.0
    assert args == {"lr": 0.1}


def test_later_patterns_override_earlier_ones():
    args = by_name({"lr": 1.0, "eps": 0.1}, {"*": {"lr": 2.0}, "a.*": {"lr": 3.0}, "b.*": {"lr": 4.0}})
    assert args("a.x") == {"lr": 3.0, "eps": 0.1}
    assert args("c") == {"lr": 2.0, "eps": 0.1}


def test_what_is_no_dict_is_refused():
    with pytest.raises(TypeError, match=r"clip_args\('x'\) returned 0.5"):
        args_for("clip_args", lambda name: 0.5, "x")
    with pytest.raises(TypeError, match="clip_args is 0.5"):
        check_args("clip_args", 0.5)


def test_arguments_that_a_partial_has_bound_are_not_counted():
    assert num_arguments(partial(lambda scale, name: {}, 2.0)) == 1
