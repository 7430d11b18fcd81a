"""URLs hold checkpoints, and the manifest is the commit."""

from __future__ import annotations

import pyro
import pytest
import torch

from distopt.checkpoint import CheckpointError, Retention
from distopt.checkpoint.reader import candidates
from distopt.checkpoint.storage import remote
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


class _Stuttering:
    """A file that counts reads with others, and of which one gives nothing, as if a connection had been cut."""

    def __init__(self, file, reads, at):
        self._file, self._reads, self._at = file, reads, at

    def readinto(self, piece):
        self._reads.append(len(piece))
        return 0 if len(self._reads) == self._at else self._file.readinto(piece)

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_read_that_gives_nothing_before_the_end_is_made_again_and_proves_no_damage(tmp_path, monkeypatch):
    url = f"memory://{tmp_path}/stutter"
    with checkpointer(url) as keeper:
        for step in (1, 2):
            value(step, 50_000)
            keeper.save(step)
        keeper.wait()
    made = remote.RemoteReadStream.__init__

    def reads_of_a_restore(at):
        reads = []
        monkeypatch.setattr(
            remote.RemoteReadStream, "__init__", lambda self, file: made(self, _Stuttering(file, reads, at))
        )
        value(0)
        with checkpointer(url) as keeper:
            assert keeper.restore().step == 2
            assert torch.equal(pyro.param("x").detach(), torch.full((50_000,), 2.0))
            assert keeper.steps() == [1, 2]
        return len(reads)

    num_reads = reads_of_a_restore(at=0)
    assert num_reads >= 3
    for at in range(1, num_reads + 1):
        assert reads_of_a_restore(at) > num_reads  # it was made again
