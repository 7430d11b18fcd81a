"""A run with two checkpoints, to be damaged."""

from __future__ import annotations

import shutil

import pyro
import pytest
import torch

from distopt.backends.single import Single
from distopt.checkpoint import Checkpointer


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Two checkpoints of a module with buffers, of parameters large and small, and an optimizer."""
    root = tmp_path_factory.mktemp("template")
    with Checkpointer(root, {"norm": torch.nn.BatchNorm1d(3)}, backend=Single()) as checkpointer:
        for step in (1, 2):
            pyro.clear_param_store()
            torch.rand(1)  # so that the noise differs
            pyro.param("small", torch.full((3,), float(step)))
            pyro.param("large", torch.full((300, 70), float(step)), constraint=torch.distributions.constraints.positive)
            checkpointer.save(step)
            checkpointer.wait()
    return root


@pytest.fixture
def root(template, tmp_path):
    shutil.copytree(template, tmp_path / "run")
    return tmp_path / "run"
