"""Names outlive the parameter store; parameters leave with it, and resume when they come back."""

import pyro
import pytest
import torch

from distopt.optim import Adam
from distopt.optim.parameters import ParamRegistry
from tests.optim.trajectories import param


def test_names_are_kept_after_the_store_is_cleared():
    ps, optim = [param("a"), param("b")], Adam({"lr": 0.1})
    optim(ps)
    pyro.clear_param_store()
    assert set(optim.get_state()) == {"a", "b"}


def test_parameter_deleted_from_the_store_leaves_the_optimizer():
    optim = Adam({"lr": 0.1})
    optim([param("a"), param("b")])
    del pyro.get_param_store()["b"]
    optim([pyro.param("a").unconstrained()])
    assert set(optim.get_state()) == {"a"}


def test_parameter_replaced_in_the_store_starts_a_new_life():
    optim = Adam({"lr": 0.1})
    optim([param("a"), param("b")])
    pyro.get_param_store()["b"] = torch.ones(3)
    p = pyro.param("b").unconstrained()
    p.grad = torch.ones(3)
    optim([pyro.param("a").unconstrained(), p])
    steps = {name: int(s["state"][0]["step"]) for name, s in optim.get_state().items()}
    assert steps == {"a": 2, "b": 1}


def test_no_tensor_is_kept_alive_by_an_optimizer_whose_parameters_come_and_go():
    import gc
    import weakref

    optim, gone = Adam({"lr": 0.1}), []
    for i in range(20):
        p = param(f"x{i}")
        optim([p])
        gone.append(weakref.ref(p))
        pyro.clear_param_store()
    optim([param("last")])
    del p
    gc.collect()
    assert sum(r() is not None for r in gone) <= 1
    assert set(optim.get_state()) == {"last"}
    assert len(list(optim._groups)) == 1


def test_scoped_parameters_go_on_where_they_were():
    store, optim = pyro.get_param_store(), Adam({"lr": 0.1})
    with store.scope() as first:
        optim([param("a")])
    with store.scope() as second:
        optim([param("b")])
    for scope, name in ((first, "a"), (second, "b")):
        with store.scope(scope):
            optim([param(name)])
            assert optim.get_state()[name]["state"][0]["step"] == 2


def test_two_parameters_of_one_name_are_refused():
    old = param("a")
    pyro.get_param_store()["a"] = torch.ones(2)  # the store still knows the old tensor by this name
    with pytest.raises(ValueError, match=r"two parameters are called 'a'.*\(2,\)|\(3,\)"):
        Adam({"lr": 0.1})([old, pyro.param("a").unconstrained()])


def test_parameters_are_named_once_each_and_sorted():
    a, b = param("a"), param("b")
    assert ParamRegistry().named([b, a, b]) == [("a", a), ("b", b)]


def test_tensors_that_the_store_never_knew_keep_the_name_that_they_got():
    strangers = [torch.zeros(2, requires_grad=True) for _ in range(2)]
    optim = Adam({"lr": 0.1})
    for _ in range(2):
        for p in strangers:
            p.grad = torch.ones(2)
        optim(strangers)
    steps = {name: int(s["state"][0]["step"]) for name, s in optim.get_state().items()}
    assert steps == {"unnamed 1": 2, "unnamed 2": 2}


def test_state_of_a_parameter_that_left_goes_with_its_tensor():
    optim = Adam({"lr": 0.1})
    optim([param("a"), param("b")])
    kept = dict(pyro.get_param_store().named_parameters())
    del pyro.get_param_store()["a"], pyro.get_param_store()["b"]
    optim([param("c")])
    departed = optim._registry._departed
    assert set(departed) == {id(p) for p in kept.values()}
    del kept["a"]
    assert set(departed) == {id(kept["b"])}
    kept["b"].grad = torch.ones(3)
    optim([kept["b"]])
    steps = {name: int(s["state"][0]["step"]) for name, s in optim.get_state().items()}
    assert steps == {"c": 1, "unnamed 1": 2}
