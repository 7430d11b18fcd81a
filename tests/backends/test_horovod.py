"""What Horovod's library needs besides the contract: names, bfloat16, and an end."""

from __future__ import annotations

import pytest
import torch

from distopt.backends import current
from distopt.backends.horovod import Horovod
from tests import workers

pytest.importorskip("horovod", reason="horovod is not installed (make setup-dev)")


def _run_names() -> tuple[list[str], list[str]]:
    backend = current()
    assert isinstance(backend, Horovod)
    like = torch.zeros(3)

    def started() -> list[str]:
        handles = [backend.all_reduce(like), backend.all_reduce(like), backend.all_reduce(torch.zeros(4))]
        names = [handle._pending._name for handle in handles]
        for handle in handles:
            handle.wait()
        return names

    return started(), started()


@pytest.mark.slow
def test_collectives_in_flight_have_names_apart_that_repeat_when_they_are_done():
    for first, second in workers.world("horovod", 2).run(_run_names):
        assert len(set(first)) == 3
        assert first == second  # so that Horovod's response cache works
        assert [name.rpartition(".")[2] for name in first] == ["0", "1", "0"]


def _run_bfloat16() -> None:
    backend = current()
    values = torch.tensor([1.0, 256.0, -0.0, float("inf")], dtype=torch.bfloat16)
    tensor = values.clone()
    backend.all_reduce(tensor).wait()
    assert tensor.dtype == torch.bfloat16
    torch.testing.assert_close(tensor, values * backend.world_size)
    if backend.rank:
        values.zero_()
    backend.broadcast(values, 0).wait()
    assert values.view(torch.int16).tolist() == backend.all_gather(values)[0].view(torch.int16).tolist()
    assert values[1] == 256.0 and torch.signbit(values[2]) and values[3].isinf()


def test_bfloat16_which_horovod_does_not_know_keeps_its_bits():
    workers.world("horovod", 2).run(_run_bfloat16)


def test_unknown_process_set_is_refused():
    import horovod.torch as hvd

    with pytest.raises(Exception, match=r"is not known to Horovod: give it to hvd.init\(process_sets="):
        Horovod(process_set=hvd.ProcessSet([0]))
