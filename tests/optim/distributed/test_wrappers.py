"""Optimizers with the arguments of Horovod and DDP; those over a group of the ranks, which average alone."""

from __future__ import annotations

from typing import Any

import pyro
import pytest
import torch
import torch.distributed as dist

import distopt
from distopt.backends import BackendError, current
from distopt.optim import SGD, DDPOptimizer, DistributedOptimizer, HorovodOptimizer, ReduceOptions
from tests import workers
from tests.reduce.steps import step_with, store_values, unconstrained


def _average_alone(optim: DistributedOptimizer, group: int) -> None:
    """Two steps in group 0 and three in group 1, each with a parameter that only its second rank brings."""
    rank = 2 * group + optim.backend.rank
    assert optim.backend.world_size == 2
    pyro.param("x", torch.full((2,), float(rank)))
    for step in range(2 + group):
        gradients = {"x": torch.full((2,), rank + 1.0)}
        if rank % 2:
            pyro.param(f"of_group{group}", torch.zeros(3))
            gradients[f"of_group{group}"] = torch.ones(3)
        step_with(optim, gradients)
        mean = (2 * group + 1 + 2 * group + 2) / 2
        assert unconstrained("x").eq(2 * group - (step + 1) * mean).all()
        assert unconstrained(f"of_group{group}").eq(-(step + 1) / 2).all()
    assert len(store_values()) == 2
    optim.backend.close()


def _run_process_groups_average_alone() -> None:
    """`DDPOptimizer(process_group=...)` on two groups of a world of four, then the whole world again."""
    rank = current().rank
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    with pytest.raises(BackendError, match=f"rank {rank} of 4 is not in the process group that it was given"):
        DDPOptimizer(SGD({"lr": 1.0}), process_group=groups[1 - rank // 2])
    for _ in range(2):  # the second world finds what the first has left in the store, which is closed by then
        pyro.clear_param_store()
        optim = DDPOptimizer(SGD({"lr": 1.0}), process_group=groups[rank // 2])
        optim.backend._heartbeat._read_failure()  # what its thread does twice a second
        assert optim.backend._heartbeat.failure is None
        _average_alone(optim, rank // 2)
    pyro.clear_param_store()
    whole = DDPOptimizer(SGD({"lr": 1.0}), bucket_cap_mb=1.0)
    pyro.param("x", torch.zeros(2))
    step_with(whole, {"x": torch.full((2,), rank + 1.0)})
    assert unconstrained("x").eq(-2.5).all()


def _run_process_sets_average_alone() -> None:
    """A script's own Horovod with process sets, whose world distopt adopts."""
    import horovod.torch as hvd

    sets = [hvd.ProcessSet([0, 1]), hvd.ProcessSet([2, 3])]
    hvd.init(process_sets=sets)
    rank = hvd.rank()
    with pytest.raises(BackendError, match=rf"rank {rank} of 4 is not in the process set \[{2 - rank // 2 * 2}, "):
        HorovodOptimizer(SGD({"lr": 1.0}), process_set=sets[1 - rank // 2])
    with pytest.raises(BackendError, match=r"not known to Horovod: give it to hvd.init\(process_sets"):
        HorovodOptimizer(SGD({"lr": 1.0}), process_set=hvd.ProcessSet([0, 3]))
    _average_alone(HorovodOptimizer(SGD({"lr": 1.0}), process_set=sets[rank // 2]), rank // 2)
    pyro.clear_param_store()
    whole = HorovodOptimizer(SGD({"lr": 1.0}), op=hvd.Sum, compression=hvd.Compression.none, num_groups=1)
    pyro.param("x", torch.zeros(2))
    step_with(whole, {"x": torch.full((2,), rank + 1.0)})
    assert unconstrained("x").eq(-10).all()
    print(f"rank {rank} has averaged", flush=True)
    distopt.backends.current().close()
    hvd.shutdown()


def test_process_groups_of_torch_average_alone() -> None:
    workers.world("torch_dist", 4).run(_run_process_groups_average_alone, timeout_s=90)


@pytest.mark.slow
def test_process_sets_of_horovod_average_alone() -> None:
    statuses, started = workers.run_script("horovod", 4, _run_process_sets_average_alone, timeout_s=120)
    assert statuses == [0], started.output()
    assert all(f"rank {rank} has averaged" in started.output() for rank in range(4))


def test_arguments_of_horovod_become_options() -> None:
    x = pyro.param("x", torch.zeros(2)).unconstrained()
    optim = HorovodOptimizer(SGD({"lr": 1.0}), op="Sum", compression="fp16", groups=[[x, "y"]], sparse_as_dense=True)
    assert optim.options == ReduceOptions(op="sum", compression="fp16", groups=[["x", "y"]], sparse_as_dense=True)
    assert HorovodOptimizer(SGD({"lr": 1.0}), num_groups=3).options.groups == 3
    average = HorovodOptimizer(SGD({"lr": 1.0}), backward_passes_per_step=2, gradient_predivide_factor=4.0)
    assert average.options == ReduceOptions(backward_passes_per_step=2, gradient_predivide_factor=4.0)
    with pytest.raises(ValueError, match="op='max' should be 'average', 'sum' or 'adasum'"):
        HorovodOptimizer(SGD({"lr": 1.0}), op="max")


def test_bucket_cap_of_ddp_is_the_size_of_buckets() -> None:
    assert DDPOptimizer(SGD({"lr": 1.0}), bucket_cap_mb=8.0).options == ReduceOptions(bucket_mib=8.0)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("x", "groups='x': expected a number, or lists of names or tensors"),
        (["x", "y"], "expected a number, or lists of names or tensors"),
        ([[torch.ones(3)]], r"groups: a tensor of shape \(3,\) is no unconstrained parameter of Pyro's store yet"),
    ],
)
def test_groups_that_name_no_parameters_are_refused(groups: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HorovodOptimizer(SGD({"lr": 1.0}), groups=groups)
