"""State in columns is the state by name: for every optimizer, whatever its parameters have been through."""

import gc
import itertools
import sys

import pyro
import pyro.optim
import pytest
import torch

import distopt.optim
from distopt.optim import DistributedOptimizer, PackedState, StateColumns
from tests.optim.test_conformance import SCHEDULERS
from tests.optim.trajectories import OPTIMIZERS, Schedule, run, start

KINDS = [*OPTIMIZERS, *(f"{name} of Adam" for name in SCHEDULERS), "ExponentialLR of DCTAdam", "Adam in lists"]


def make(kind, module=distopt.optim):
    name, _, inner = kind.partition(" of ")
    if kind == "Adam in lists":
        return module.Adam({"lr": 0.05, "foreach": True})
    if not inner:
        return getattr(module, name)(OPTIMIZERS[name])
    return getattr(module, name)(
        {"optimizer": distopt.optim.pytorch_optimizers.OPTIMIZERS[inner], "optim_args": {"lr": 0.1}} | SCHEDULERS[name]
    )


def exact(value):
    """Nested state as what compares equal only where it is the same, type by type and bit by bit."""
    if isinstance(value, torch.Tensor):
        return ("tensor", value.dtype, str(value.device), tuple(value.shape), value.tolist())
    if isinstance(value, dict):
        return ("dict", {key: exact(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return (type(value), [exact(item) for item in value])
    if callable(value):
        return ("callable", getattr(value, "__name__", ""))
    return (type(value), value)


def assert_same_state(optim):
    """Compares the state in columns, unpacked, with the state by name, and the latter packed and unpacked again."""
    packed, states = optim.packed_state(), optim.get_state()
    names = list(packed.names())
    assert len(names) == len(set(names))
    assert exact(packed.unpack()) == exact(states)
    assert exact(PackedState.from_states(states).unpack()) == exact(states)
    return packed


@pytest.mark.sampled(15)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_columns_unpacked_equal_the_state_by_name_after_any_life(kind, dtype):
    for seed in range(6):
        r = torch.Generator().manual_seed(seed)
        params, optim = start(dtype), make(kind)
        for t in range(10):
            chosen = [p for p in params[: 3 + t] if torch.rand((), generator=r) < 0.7]
            for p in chosen:
                p.grad = torch.randn(p.shape, generator=r, dtype=torch.float64).to(dtype)
            optim(chosen)
            if hasattr(optim, "step") and t % 3 == 0:
                optim.step()
            assert_same_state(optim)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("kind", KINDS)
def test_run_resumed_from_columns_takes_the_same_steps_bit_by_bit(kind):
    def by_name(optim):
        other = make(kind)
        other.set_state(optim.get_state())
        return other

    def in_columns(optim):
        other = make(kind)
        other.set_packed_state(optim.packed_state())
        assert exact(other.packed_state().unpack()) == exact(other.get_state()) == exact(optim.get_state())
        return other

    for seed in range(4):
        schedule = Schedule.random(seed, save_at=6)
        (expected, state), (values, packed) = (
            run(lambda: make(kind), schedule, resume=r) for r in (by_name, in_columns)
        )
        assert all(torch.equal(a, b) for a, b in zip(expected, values, strict=True))
        assert exact(packed) == exact(state)


@pytest.mark.parametrize("kind", ["Adam", "SGD", "ClippedAdam", "ExponentialLR of Adam", "Adafactor", "RMSprop"])
def test_columns_replace_the_state_of_parameters_that_were_stepped_already(kind):
    params, optim = start(), make(kind)

    def step(value):
        for p in params:
            p.grad = torch.full_like(p, value)
        optim(params)

    step(1.0)
    packed = PackedState.from_states(optim.get_state())  # copies: the columns of the optimizer change as it steps
    before, values = exact(optim.get_state()), [p.detach().clone() for p in params]
    step(2.0)
    after = exact(optim.get_state())
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)
    optim.set_packed_state(packed)
    assert exact(optim.get_state()) == before
    step(2.0)
    assert exact(optim.get_state()) == after


def test_state_that_waits_for_its_parameter_is_in_the_columns():
    first, params = make("Adam"), start()
    for p in params:
        p.grad = torch.ones_like(p)
    first(params)
    states = first.get_state()
    second = make("Adam")
    second.set_state(states)
    second(params[:2])
    packed = assert_same_state(second)
    assert sorted(packed.names()) == sorted(states)
    assert not packed.alone


@pytest.mark.parametrize("clear", ["store", "one", "replaced", "tied"])
def test_names_follow_the_parameter_store_as_those_of_get_state_do(clear):
    params, optim = start(), make("Adam")
    for p in params:
        p.grad = torch.ones_like(p)
    optim(params)
    store = pyro.get_param_store()
    if clear == "store":
        pyro.clear_param_store()
    elif clear == "one":
        del store["net$$$p2"]
    elif clear == "replaced":
        store["net$$$p2"] = torch.zeros(2, 3, dtype=torch.float64)
        assert_same_state(optim)
        renewed = store.named_parameters()
        fresh = dict(renewed)["net$$$p2"]
        fresh.grad = torch.ones_like(fresh)
        optim([*params[:2], fresh])
    else:
        store["net$$$tied"] = store["net$$$p2"]
        store._params["net$$$tied"] = params[2]
    assert_same_state(optim)


def test_parameters_of_every_kind_are_in_it():
    pyro.clear_param_store()
    values = {
        "small": torch.ones(3),
        "scalar": torch.ones(()),
        "double": torch.ones(2, dtype=torch.float64),
        "large": torch.ones(40_000),
        "larger": torch.ones(200, 200),
        "complex": torch.ones(3, dtype=torch.complex64),
        "transposed": torch.ones(3, 4),
        "empty": torch.ones(0),
    }
    params = {name: pyro.param(name, value).unconstrained() for name, value in values.items()}
    with torch.no_grad():
        params["transposed"].data = torch.ones(4, 3).t()
    optim = make("Adam")
    for _ in range(2):
        for p in params.values():
            p.grad = torch.randn_like(p)
        optim(params.values())
    packed = assert_same_state(optim)
    assert {"complex", "transposed"} == set(packed.alone)


def test_large_parameters_and_packed_ones_are_not_copied():
    pyro.clear_param_store()
    params = [pyro.param(f"x{i}", torch.ones(n)).unconstrained() for i, n in enumerate([10, 20, 50_000, 60_000])]
    optim = make("Adam")
    for p in params:
        p.grad = torch.ones_like(p)
    optim(params)
    columns = optim.packed_state().columns
    assert sorted(c.names for c in columns) == [("x0", "x1"), ("x2",), ("x3",)]
    again = {c.names: c for c in optim.packed_state().columns}
    for each in columns:
        for key, column in each.columns.items():
            assert column.data_ptr() == again[each.names].columns[key].data_ptr()


@pytest.mark.parametrize("keep", [lambda name: name < "net$$$p4", lambda name: False, lambda name: True])
@pytest.mark.parametrize("kind", ["Adam", "ClippedAdam", "Adafactor", "StepLR of Adam"])
def test_selected_parameters_have_the_state_that_they_had_among_all(kind, keep):
    params, optim = start(), make(kind)
    for t in range(4):
        for p in params[: 5 + t]:
            p.grad = torch.ones_like(p)
        optim(params[: 5 + t])
    expected = {name: state for name, state in optim.get_state().items() if keep(name)}
    assert exact(optim.packed_state().select(keep).unpack()) == exact(expected)


@pytest.mark.parametrize("kind", ["Adam", "SGD", "ExponentialLR of Adam"])
def test_columns_hold_the_state_of_pyros_own_optimizers(kind):
    params, optim = start(), make(kind, pyro.optim)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optim(params)
    states = optim.get_state()
    packed = PackedState.from_states(states)
    assert exact(packed.unpack()) == exact(states)
    assert len(packed.columns) == 1


def test_states_that_differ_in_a_type_or_a_bit_share_nothing():
    def state(step, lr=0.1, betas=(0.9, 0.999), dtype=torch.float32, **values):
        values = {"step": step, "exp_avg": torch.ones(2, dtype=dtype), **values}
        return {"state": {0: values}, "param_groups": [{"lr": lr, "betas": betas, "params": [0]}]}

    states = {
        "a": state(1),
        "b": state(1.0),
        "c": state(True),
        "d": state(torch.tensor(1.0)),
        "e": state(torch.tensor(1.0, dtype=torch.float64)),
        "f": state(torch.tensor([1.0])),
        "g": state(1, betas=[0.9, 0.999]),
        "h": state(1, lr=0.0),
        "i": state(1, lr=-0.0),
        "j": state(1, dtype=torch.float64),
        "k": state(1, moment=None),
    }
    packed = PackedState.from_states(states)
    assert len(packed.columns) == len(states)
    assert exact(packed.unpack()) == exact(states)
    assert str(packed.unpack()["i"]["param_groups"][0]["lr"]) == "-0.0"
    twice = PackedState.from_states({**states, "again": state(1)})
    assert len(twice.columns) == len(states)


@pytest.mark.parametrize(
    "strange",
    [
        {"state": {0: {"x": torch.ones(2).to_sparse()}}, "param_groups": [{"lr": 1.0, "params": [0]}]},
        {"state": {0: {"x": [torch.ones(2)]}}, "param_groups": [{"lr": 1.0, "params": [0]}]},
        {"state": {0: {"x": torch.ones(2), "y": torch.ones(3)}}, "param_groups": [{"lr": 1.0, "params": [0]}]},
        {"state": {0: {"x": torch.ones(2)}}, "param_groups": [{"lr": torch.tensor(1.0), "params": [0]}]},
        {"state": {0: {}}, "param_groups": [{"lr": 1.0, "params": [0]}], "more": 1},
        {"state": {7: {"x": torch.ones(2)}}, "param_groups": [{"lr": 1.0, "params": [7]}]},
        {"state": {0: {"x": torch.nn.Parameter(torch.ones(2))}}, "param_groups": [{"lr": 1.0, "params": [0]}]},
    ],
)
def test_state_that_no_columns_can_hold_stays_alone_as_it_is(strange):
    packed = PackedState.from_states({"x": strange})
    assert packed.alone == {"x": strange}
    assert packed.unpack()["x"] is strange


def mixed_states():
    """States of one frame whose rows differ in all that decides whether they share columns."""

    def state(**values):
        return {"state": {0: values}, "param_groups": [{"lr": 0.1, "params": [0]}]}

    double = torch.ones(2, dtype=torch.float64)
    return {
        "a": state(step=torch.tensor(1.0), m=torch.ones(2)),
        "b": state(step=torch.tensor(1.0), m=torch.ones(3)),
        "c": state(step=torch.tensor(2.0), m=torch.zeros(2)),
        "d": state(step=torch.tensor(1.0), m=double),
        "e": state(step=torch.ones(1), m=torch.ones(2)),
        "f": state(step=torch.tensor(1.0), m=torch.ones(2).to_sparse()),
        "g": state(step=1.0, m=torch.ones(2)),
        "h": state(step=torch.tensor(1.0), m=torch.nn.Parameter(torch.ones(2))),
        "i": state(step=torch.tensor(1.0), m=torch.ones(2), v=torch.ones(3)),
        "j": state(step=torch.ones(2), m=torch.ones(2)),
        "k": state(m=torch.tensor(1.0)),
        "l": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "m": {"state": {0: {}, 1: {}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    }


def test_rows_looked_at_by_column_pack_as_those_described_one_by_one(monkeypatch):
    states = mixed_states()
    for size in (1, 2, 3):
        for names in itertools.combinations(states, size):
            chosen = {name: states[name] for name in names}
            quick = PackedState.from_states(chosen)
            with monkeypatch.context() as patch:
                patch.setattr("distopt.optim.packed_state._shapes_if_uniform", lambda rows: None)
                slow = PackedState.from_states(chosen)
            assert [each.names for each in quick.columns] == [each.names for each in slow.columns], names
            assert [each.shapes for each in quick.columns] == [each.shapes for each in slow.columns], names
            assert [exact(each.columns) for each in quick.columns] == [exact(each.columns) for each in slow.columns]
            assert quick.alone.keys() == slow.alone.keys(), names


def test_number_of_calls_does_not_grow_with_the_parameters():
    def calls(count):
        pyro.clear_param_store()
        params = [pyro.param(f"x{i}", torch.ones(3)).unconstrained() for i in range(count)]
        optim = make("Adam")
        for p in params:
            p.grad = torch.ones_like(p)
        optim(params)
        optim.packed_state()
        seen = 0

        def count_call(frame, event, argument):
            nonlocal seen
            seen += event in ("call", "c_call")

        gc.collect()
        gc.disable()  # finalizers of earlier tests are calls, too
        try:
            sys.setprofile(count_call)
            optim.packed_state()
            sys.setprofile(None)
        finally:
            gc.enable()
        return seen

    assert calls(1000) == calls(10)


def test_states_cut_from_columns_can_be_stepped_apart():
    columns = StateColumns(
        ("a", "b"),
        ((2,), ()),
        {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        {"exp_avg": torch.arange(3.0)},
    )
    first, second = columns.states()
    first["state"][0]["step"] += 1
    assert second["state"][0]["step"] == 3
    assert columns.shared["state"][0]["step"] == 3
    assert torch.equal(second["state"][0]["exp_avg"], torch.tensor(2.0))


def test_distributed_optimizer_hands_out_the_columns_of_the_one_it_wraps():
    params, optim = start(), make("Adam")
    distributed = DistributedOptimizer(optim)
    for p in params:
        p.grad = torch.ones_like(p)
    distributed(params)
    packed = distributed.packed_state()
    assert exact(packed.unpack()) == exact(optim.get_state())
    distributed.set_packed_state(packed)
    assert exact(optim.get_state()) == exact(packed.unpack())
