"""A world of one."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch

from distopt.backends.single import Single
from distopt.launchers import RankInfo


def test_every_collective_is_the_identity():
    backend = Single()
    tensor = torch.arange(3.0)
    for op in ("sum", "min", "max"):
        backend.all_reduce(tensor, op).wait()
    backend.broadcast(tensor).wait(timedelta(seconds=1))
    assert tensor.tolist() == [0, 1, 2]
    gathered = backend.all_gather(tensor)
    assert gathered.tolist() == [[0, 1, 2]] and gathered.data_ptr() != tensor.data_ptr()
    assert backend.all_gather_json({"a": (1, 2)}) == [{"a": (1, 2)}]
    backend.barrier()


def test_rank_to_send_to_is_refused():
    assert Single().send_recv(torch.zeros(1), None) is None
    with pytest.raises(ValueError, match="send_recv with rank 1: this world has one rank"):
        Single().send_recv(torch.zeros(1), 1)


def test_launcher_does_not_matter():
    backend = Single.start(RankInfo("torchrun", 3, 4), timeout=timedelta(seconds=7))
    assert (backend.rank, backend.world_size, backend.timeout) == (0, 1, timedelta(seconds=7))
