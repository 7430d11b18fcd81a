"""What a run consists of is sorted once, saved each in its way, and finds its state again by name."""

from __future__ import annotations

import logging
import random
import warnings

import numpy as np
import pyro
import pyro.distributions.constraints as constraints
import pyro.optim
import pytest
import torch
from torch import nn

import distopt.optim
from distopt.backends.single import Single
from distopt.checkpoint import Checkpointer, CheckpointError, register_constraint
from distopt.checkpoint.param_store import built, described
from distopt.checkpoint.pyro_files import export_optimizer, read_replicated
from distopt.checkpoint.reader import read_manifest
from distopt.checkpoint.run_state import RunState
from distopt.checkpoint.statefile import StateReader
from distopt.constraints import _KNOWN
from tests.checkpoint.states import assert_equal, commit_state


class Counter:
    def __init__(self, value=0):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def step(optimizer, *names):
    params = [pyro.param(name, torch.zeros(3)).unconstrained() for name in names]
    for number, param in enumerate(params):
        param.grad = torch.full((3,), number + 1.0)
    optimizer(params)


def test_objects_are_sorted_by_how_they_are_saved():
    optimizer, norm, counter, scaler = pyro.optim.Adam({}), nn.BatchNorm1d(2), Counter(), torch.amp.GradScaler("cpu")
    schedule = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([torch.zeros(1)], 0.1))
    state = RunState({"a": optimizer, "b": norm, "c": counter, "d": scaler, "e": schedule}, {"f": Counter()})
    assert state.optimizers == {"a": optimizer}
    assert state.modules == {"b": norm}
    assert state.objects == {"c": counter, "d": scaler, "e": schedule}
    assert [*state.per_rank] == ["f"]
    assert state.compression == {}


def test_distributed_optimizer_with_error_feedback_has_state_of_its_rank():
    plain = distopt.optim.DistributedOptimizer(distopt.optim.Adam({}))
    options = distopt.optim.ReduceOptions(compression="powersgd")
    compressed = distopt.optim.DistributedOptimizer(distopt.optim.Adam({}), reduce=options)
    state = RunState({"plain": plain, "compressed": compressed}, {})
    assert state.compression == {"compressed": compressed.rank_local_state}


@pytest.mark.parametrize(
    ("state", "per_rank", "kind", "message"),
    [
        (
            {"a": {}},
            {},
            TypeError,
            r"state\['a'\] is a dict; expected a PyroOptim, an nn.Module or an object with state_dict",
        ),
        (
            [Counter()],
            {},
            TypeError,
            r"state is a list; expected a mapping such as \{'optimizer': optimizer\}",
        ),
        ({}, Counter(), TypeError, "per_rank is a Counter; expected a mapping such as"),
        ({1: torch.nn.Linear(1, 1)}, {}, TypeError, "state has the name 1; expected a string"),
        ({"a": torch.nn.Linear}, {}, TypeError, r"state\['a'\] is the class Linear"),
        ({}, {"a": 3}, TypeError, r"per_rank\['a'\] is a int; expected an object with state_dict"),
        ({"a": torch.nn.Linear(1, 1)}, {"a": torch.nn.Linear(1, 1)}, ValueError, "a: in state and in per_rank"),
    ],
    ids=["no state", "list", "object per rank", "number for a name", "class", "no state per rank", "same name"],
)
def test_objects_that_cannot_be_saved_are_refused_at_once(state, per_rank, kind, message, tmp_path):
    with pytest.raises(kind, match=message):
        Checkpointer(tmp_path, state, per_rank=per_rank, backend=Single())
    assert list(tmp_path.iterdir()) == []


ALL_CONSTRAINTS = [
    constraints.real, constraints.positive, constraints.nonnegative, constraints.unit_interval, constraints.simplex,
    constraints.lower_cholesky, constraints.corr_cholesky, constraints.lower_triangular, constraints.positive_definite,
    constraints.positive_semidefinite, constraints.symmetric, constraints.square, constraints.real_vector,
    constraints.boolean, constraints.one_hot, constraints.nonnegative_integer, constraints.positive_integer,
    constraints.integer_interval(0, 5), constraints.interval(-1.0, 2.5), constraints.half_open_interval(0.0, 1.0),
    constraints.greater_than(3.0), constraints.greater_than_eq(-3), constraints.less_than(0.5),
    constraints.multinomial(4), constraints.greater_than(torch.tensor([0.1, 0.2], dtype=torch.float64)),
    constraints.MixtureSameFamilyConstraint(constraints.positive),
    constraints.independent(constraints.interval(0.0, torch.tensor(2.0)), 2),
    constraints.independent(constraints.independent(constraints.simplex, 1), 1),
    constraints.cat([constraints.positive, constraints.unit_interval], dim=-1, lengths=[2, 3]),
    constraints.stack([constraints.independent(constraints.real, 1), constraints.simplex], dim=-2),
    constraints.integer, constraints.sphere, constraints.corr_matrix, constraints.ordered_vector,
    constraints.positive_ordered_vector, constraints.softplus_positive, constraints.softplus_lower_cholesky,
    constraints.unit_lower_cholesky,
]  # fmt: skip


@pytest.mark.parametrize("constraint", ALL_CONSTRAINTS, ids=repr)
def test_constraint_when_saved_comes_back_of_the_same_class_with_the_same_arguments(constraint, tmp_path):
    description = described(constraint, "params/x")
    storage, folder = commit_state(tmp_path, description)
    loaded = built(StateReader(storage, folder, read_manifest(storage, folder), "replicated").load(), "x")
    assert_same_constraint(loaded, constraint)


def assert_same_constraint(one, other):
    assert type(one) is type(other)
    assert vars(one).keys() == vars(other).keys()
    for name, value in vars(other).items():
        mine = vars(one)[name]
        if isinstance(value, constraints.Constraint):
            assert_same_constraint(mine, value)
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], constraints.Constraint):
            for left, right in zip(mine, value, strict=True):
                assert_same_constraint(left, right)
        else:
            assert_equal(mine, value)


def test_every_constraint_class_of_torch_and_pyro_has_been_tried():
    tried = set()

    def visit(constraint):
        tried.add(type(constraint))
        for value in vars(constraint).values():
            for inner in value if isinstance(value, list) else [value]:
                if isinstance(inner, constraints.Constraint):
                    visit(inner)

    for constraint in ALL_CONSTRAINTS:
        visit(constraint)
    missing = {kind for name, kind in _KNOWN.items() if "test_run_state" not in kind.__module__} - tried
    assert {kind.__name__ for kind in missing} <= {"_IntegerLessThan"}


class Odd(constraints.Constraint):
    def __init__(self, order):
        self.order = order


def test_constraint_of_an_unknown_class_is_refused_at_save_time_and_known_once_registered(tmp_path):
    pyro.param("x", torch.ones(2))
    pyro.get_param_store()._constraints["x"] = Odd(3)
    with Checkpointer(tmp_path, backend=Single()) as checkpointer:
        with pytest.raises(
            CheckpointError, match=r"params/x: the constraint tests\.checkpoint.*Odd.*register_constraint"
        ):
            checkpointer.save(1)
        assert checkpointer.steps() == []
    register_constraint(Odd)
    try:
        assert_same_constraint(built(described(Odd(3), "x"), "x"), Odd(3))
    finally:
        del _KNOWN["Odd"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)

    def forward(self, x):
        return self.norm(self.first(x))


def test_modules_when_restored_have_their_buffers_and_parameters_in_the_tensors_they_had(tmp_path):
    def fill(net: Net) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pyro says that frozen parameters are not in its store
            pyro.module("net", net)
        net(torch.randn(8, 3))

    net = Net()
    fill(net)
    expected = {name: value.clone() for name, value in net.state_dict().items()}
    with Checkpointer(tmp_path, {"net": net}, backend=Single()) as checkpointer:
        checkpointer.save(1)
    pyro.clear_param_store()
    other = Net()
    before = dict(other.named_parameters())
    with Checkpointer(tmp_path, {"net": other}, backend=Single()) as checkpointer:
        checkpointer.restore()
    assert_equal(dict(other.state_dict()), expected)
    fill(other)
    assert all(
        pyro.get_param_store()._params[f"net$$${name}"] is before[name] for name in ("first.weight", "norm.bias")
    )


def test_extras_when_saved_are_loaded_into_the_object_of_that_name(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler._lazy_init_scale_growth_tracker(torch.device("cpu"))
    with Checkpointer(tmp_path, {"scaler": scaler}, backend=Single()) as checkpointer:
        checkpointer.save(5, progress={"epoch": 2, "rows": [1, 2]})
        checkpointer.wait()
        scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0})
        restored = checkpointer.restore(5)
    assert scaler.state_dict()["scale"] == 64.0
    assert (restored.step, restored.progress) == (5, {"epoch": 2, "rows": [1, 2]})


def test_noise_when_restored_goes_on_with_the_same_numbers(tmp_path):
    def draw():
        return random.random(), np.random.randn(3).tolist(), torch.randn(3).tolist(), random.gauss(0, 1)

    draw()
    with Checkpointer(tmp_path, backend=Single()) as checkpointer:
        checkpointer.save(1)
        expected = draw()
        assert draw() != expected
        checkpointer.restore()
        assert draw() == expected


@pytest.mark.parametrize("package", [pyro.optim, distopt.optim], ids=["pyro", "distopt"])
def test_two_optimizers_of_different_parameters_get_back_their_own_state(package, tmp_path, caplog):
    def train(num_steps, resume):
        optimizers = {"slow": package.SGD({"lr": 0.1, "momentum": 0.5}), "fast": package.Adam({"lr": 0.5})}
        with Checkpointer(tmp_path, optimizers, backend=Single()) as checkpointer:
            restored = checkpointer.restore(resume)
            for _ in range(restored.step if restored else 0, num_steps):
                step(optimizers["slow"], "x", "y")
                step(optimizers["fast"], "z")
            checkpointer.save(num_steps)
        return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}

    whole = train(4, "never")
    pyro.clear_param_store()
    train(2, "never")
    assert [*read_replicated(tmp_path / "step-00000002")["optimizers"]] == ["slow", "fast"]
    pyro.clear_param_store()
    caplog.set_level(logging.WARNING)
    assert_equal(train(4, 2), whole)
    assert caplog.text == ""


def test_only_optimizer_finds_its_state_under_any_name(tmp_path, caplog):
    optimizer = distopt.optim.Adam({"lr": 0.1})
    step(optimizer, "x")
    expected = optimizer.get_state()
    with Checkpointer(tmp_path, {"adam": optimizer}, backend=Single()) as checkpointer:
        checkpointer.save(1)
    other = distopt.optim.Adam({"lr": 0.1})
    caplog.set_level(logging.WARNING)
    with Checkpointer(tmp_path, {"optimizer": other}, backend=Single()) as checkpointer:
        checkpointer.restore()
    assert_equal(other.get_state(), expected)
    assert caplog.text == ""
    assert export_optimizer(tmp_path, tmp_path / "adam.pt", "adam") == 1


def test_state_without_object_and_object_without_state_are_named_in_the_log(tmp_path, caplog):
    with Checkpointer(
        tmp_path,
        {"optimizer": distopt.optim.Adam({}), "old": Counter(3), "both": Counter(4)},
        per_rank={"old of rank": Counter()},
        backend=Single(),
    ) as checkpointer:
        checkpointer.save(1)
    both = Counter()
    caplog.set_level(logging.WARNING)
    with Checkpointer(
        tmp_path, {"both": both, "new": Counter()}, per_rank={"new of rank": Counter()}, backend=Single()
    ) as checkpointer:
        checkpointer.restore()
    assert both.value == 4
    assert [record.message for record in caplog.records] == [
        "ignoring state of optimizer in the checkpoint: no such object was passed to Checkpointer",
        "ignoring state of old in the checkpoint: no such object was passed to Checkpointer",
        "the checkpoint has no state of new, which starts from scratch",
        "ignoring state of old of rank in the checkpoint: no such object was passed to Checkpointer",
        "the checkpoint has no state of new of rank, which starts from scratch",
    ]


def test_pyros_optimizer_keeps_no_column_alive_by_a_view_of_it(tmp_path):
    names = [f"x{index}" for index in range(20)]
    optimizer = pyro.optim.Adam({"lr": 0.1})
    step(optimizer, *names)
    with Checkpointer(tmp_path, {"optimizer": optimizer}, backend=Single()) as checkpointer:
        checkpointer.save(1)
        resumed = pyro.optim.Adam({"lr": 0.1})
        checkpointer._state.optimizers["optimizer"] = resumed
        checkpointer.restore()
    step(resumed, *names)
    for state in resumed.get_state().values():
        for tensor in state["state"][0].values():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
