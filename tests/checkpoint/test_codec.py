"""Nested state of every known type comes back equal; other types are refused with their path."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch

from distopt.checkpoint import CheckpointError
from distopt.checkpoint.reader import read_manifest
from distopt.checkpoint.snapshot import HostMemory, take_snapshot
from distopt.checkpoint.statefile import StateReader
from tests.checkpoint.states import assert_equal, commit_state


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


def test_value_of_an_unknown_type_is_refused_with_its_place():
    with pytest.raises(CheckpointError, match="top/a/1: a builtins.function cannot be saved"):
        take_snapshot({"a": [1, lambda: 0]}, HostMemory(), "top")
