"""URLs hold checkpoints, and the manifest is the commit."""

from __future__ import annotations

import pyro
import pytest
import torch

from distopt.checkpoint import CheckpointError, Retention
from distopt.checkpoint.reader import candidates
from distopt.checkpoint.storage.base import open_storage
from tests.checkpoint.runs import checkpointer, value


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_url_holds_checkpoints_and_the_manifest_is_the_commit(scheme, tmp_path, monkeypatch):
    url = f"{scheme}://{tmp_path}/run"
    with checkpointer(url, keep=Retention(2)) as keeper:
        for step in (1, 2, 3):
            value(step, 50_000)
            keeper.save(step)
        keeper.wait()
        monkeypatch.setenv("DISTOPT_FAILPOINT", "after_gather:raise")
        keeper.save(4)
        with pytest.raises(CheckpointError):
            keeper.wait()
        monkeypatch.delenv("DISTOPT_FAILPOINT")
        value(0)
        assert keeper.restore().step == 3
        assert torch.equal(pyro.param("x").detach(), torch.full((50_000,), 3.0))
        keeper.save(5)
        keeper.wait()
    with checkpointer(url) as keeper:
        assert keeper.restore(f"{url}/{candidates(open_storage(url))[-1].folder}").step == 3
        assert keeper.steps() == [3, 5]
