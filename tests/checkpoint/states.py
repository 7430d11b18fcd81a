"""Nested state, written and compared."""

from __future__ import annotations

import math
from datetime import timedelta

import numpy as np
import torch

from distopt.checkpoint.commit import Attempt, write_checkpoint
from distopt.checkpoint.manifest import Manifest
from distopt.checkpoint.snapshot import HostMemory, take_snapshot
from distopt.checkpoint.storage.base import open_storage


def commit_state(root, state, step=1, attempt="0123456789ab"):
    """Writes `state` as the replicated state of a one-rank checkpoint; returns (storage, folder)."""
    storage = open_storage(root)
    files = take_snapshot(state, HostMemory(), "replicated").files("replicated", {"step": str(step)})
    one_try = Attempt(step, attempt, 0, 1, timedelta(seconds=10))
    write_checkpoint(storage, one_try, files, lambda records: Manifest(step, attempt, 0, 1, records))
    return storage, one_try.final_folder(storage)


def assert_equal(one, other):
    """Nested state is equal: types, keys in their order, tensors bit for bit."""
    assert type(one) is type(other), f"{type(one)} is not {type(other)}"
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        plain = [
            tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
            for tensor in (one, other)
        ]
        assert torch.equal(*plain)
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_equal(left, right)
    elif isinstance(one, float):
        assert math.copysign(1, one) == math.copysign(1, other)
        assert one == other
    else:
        assert one == other
