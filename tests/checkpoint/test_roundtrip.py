"""What is saved comes back: parameters with every constraint, every optimizer and scheduler, modules, extras, noise."""

from __future__ import annotations

import math
import random
import warnings
from collections import Counter, OrderedDict

import numpy as np
import pyro
import pyro.distributions.constraints as constraints
import pytest
import safetensors.torch
import torch
from torch import nn

from distopt.backends.single import Single
from distopt.checkpoint import Checkpointer, CheckpointError, Retention, register_constraint
from distopt.checkpoint.columns import tabulate, untabulate
from distopt.checkpoint.errors import CorruptCheckpointError
from distopt.checkpoint.reader import candidates, read_manifest
from distopt.checkpoint.run_state import built, described
from distopt.checkpoint.snapshot import HostMemory, take_snapshot
from distopt.checkpoint.statefile import StateReader
from distopt.checkpoint.storage.base import open_storage
from distopt.constraints import _KNOWN
from tests.checkpoint.states import assert_equal, commit_state

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
    missing = {kind for name, kind in _KNOWN.items() if "test_roundtrip" not in kind.__module__} - tried
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


def test_state_of_every_known_type_when_saved_comes_back_equal(tmp_path):
    tensors = {
        str(dtype): torch.arange(12).reshape(3, 4).to(dtype)
        for dtype in (
            torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
            torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
            torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
        )
    }  # fmt: skip
    state = {
        "tensors": tensors,
        "large": {name: tensor.repeat(3000, 2) for name, tensor in tensors.items()},
        "transposed": torch.arange(40000.0).reshape(100, 400).T,
        "expanded": torch.ones(1, 1).expand(300, 300),
        "conjugate": torch.randn(5, dtype=torch.complex64).conj(),
        "negative": torch.randn(5, dtype=torch.complex64).conj().imag,
        "scalar": torch.tensor(3.5),
        "empty": [torch.empty(0), torch.empty(3, 0, 2, dtype=torch.float64)],
        "odd": (1, 2.5, None, True, "text", [], {}, (), -0.0, 10**30),
        "floats": [float("inf"), float("-inf"), 1e-320, 0.1 + 0.2],
        "keys": {0: "int", (1, 2): "tuple", "$t": "dollar", None: 1, 2.5: 3},
        "kinds": [Counter({3: 1}), OrderedDict([("b", 1), ("a", 2)]), {1, 2}, frozenset("ab"), b"\x00\xff", 1 + 2j],
        "of torch": [torch.float16, torch.device("cpu"), torch.Size([1, 2])],
        "of numpy": np.arange(6, dtype=np.int16).reshape(2, 3),
        "a/b": {"c": torch.zeros(20000)},
        "a": {"b/c": torch.ones(20000)},
        "unicode \u2603": torch.ones(20000),
    }
    storage, folder = commit_state(tmp_path, state)
    assert_equal(StateReader(storage, folder, read_manifest(storage, folder), "replicated").load(), state)


def test_lists_of_tensors_when_saved_come_back_whether_alike_or_not(tmp_path):
    def tensors(*shapes, dtype=torch.float32):
        return [torch.arange(math.prod(shape)).reshape(shape).to(dtype) for shape in shapes]

    state = {
        "first": torch.zeros(3),
        "alike": tensors(*[(2, 3)] * 9),
        "without dimensions": tensors(*[()] * 5),
        "empty": tensors(*[(0, 2)] * 5),
        "transposed": [torch.randn(3, 2).T for _ in range(5)],
        "negative": [torch.randn(3, dtype=torch.complex64).conj().imag for _ in range(5)],
        "complex": tensors(*[(2,)] * 5, dtype=torch.complex64),
        "large": tensors(*[(200, 200)] * 4),
        "shapes": tensors((2,), (3,), (2,), (2,), (2,)),
        "kinds": [*tensors((2,), (2,), (2,)), *tensors((2,), dtype=torch.float64)],
        "mixed": [*tensors((2,), (2,), (2,)), None, 1.5],
        "last": torch.ones(2),
    }
    storage, folder = commit_state(tmp_path, state)
    assert_equal(StateReader(storage, folder, read_manifest(storage, folder), "replicated").load(), state)


@pytest.mark.parametrize("seed", range(5))
def test_rows_of_every_kind_when_put_into_tables_come_back_in_their_order(seed, tmp_path):
    chance, keys = random.Random(seed), "abcd"
    kinds = [
        lambda: torch.randn(3), lambda: torch.tensor(1.0), lambda: torch.randn(70, 70), lambda: 1, lambda: 1.0,
        lambda: True, lambda: None, lambda: [torch.zeros(2)], lambda: {"x": [1, (2, 3)]},
    ]  # fmt: skip
    patterns = [[(key, chance.choice(kinds)) for key in chance.sample(keys, chance.randint(0, 4))] for _ in range(6)]
    rows = {f"row {index}": {key: make() for key, make in chance.choice(patterns)} for index in range(60)}
    rows |= {"no dict": torch.zeros(2), "nothing": None}
    tables = []
    storage, folder = commit_state(tmp_path, {"rows": tabulate(rows, tables), "tables": tables})
    state = StateReader(storage, folder, read_manifest(storage, folder), "replicated").load()
    assert_equal(untabulate(state["rows"], state["tables"]), rows)


@pytest.mark.parametrize("damage", ["too few", "too many", "no table", "no column"])
def test_tables_that_do_not_fit_their_rows_are_refused(damage):
    tables = []
    placed = tabulate({name: {"value": torch.zeros(2)} for name in "abc"}, tables)
    if damage == "too few":
        tables[0]["columns"]["value"].pop()
    elif damage == "too many":
        tables[0]["columns"]["value"].append(torch.zeros(2))
    elif damage == "no table":
        tables.clear()
    else:
        tables[0]["columns"].clear()
    with pytest.raises(CorruptCheckpointError, match="table of state"):
        untabulate(placed, tables)


def test_file_when_written_is_read_by_the_safetensors_library(tmp_path):
    state = {"big": torch.randn(200, 200), "small": torch.arange(5), "half": torch.randn(300, 300).half()}
    storage, folder = commit_state(tmp_path, state)
    loaded = safetensors.torch.load_file(tmp_path / folder / "replicated.safetensors")
    assert_equal(loaded["replicated/big"], state["big"])
    assert_equal(loaded["replicated/half"], state["half"])
    assert_equal(loaded["packed/I64"], state["small"])


def test_value_of_an_unknown_type_is_refused_with_its_place():
    with pytest.raises(CheckpointError, match="top/a/1: a builtins.function cannot be saved"):
        take_snapshot({"a": [1, lambda: 0]}, HostMemory(), "top")


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


def test_state_that_changes_after_save_returned_is_saved_as_it_was(tmp_path):
    value = pyro.param("x", torch.zeros(300_000)).unconstrained()
    with Checkpointer(tmp_path, keep=Retention(5), backend=Single()) as checkpointer:
        for step in range(1, 6):
            with torch.no_grad():
                value.fill_(step)
            checkpointer.save(step)
            with torch.no_grad():
                value.fill_(-1)
        checkpointer.wait()
        for step in checkpointer.steps():
            checkpointer.restore(step)
            assert_equal(pyro.param("x").detach(), torch.full((300_000,), float(step)))


def test_checkpoints_when_there_are_many_the_last_and_every_mth_stay(tmp_path):
    with Checkpointer(tmp_path, keep=Retention(2, every_steps=4), backend=Single()) as checkpointer:
        for step in range(1, 12):
            checkpointer.save(step)
    assert [one.step for one in candidates(open_storage(tmp_path))] == [11, 10, 8, 4]
    assert {path.name for path in tmp_path.iterdir()} == {".lock"} | {f"step-{step:08d}" for step in (4, 8, 10, 11)}
