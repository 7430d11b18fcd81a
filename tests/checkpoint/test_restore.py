"""Which checkpoint a run resumes from, and what of it each rank reads."""

from __future__ import annotations

import logging
from contextlib import ExitStack, closing

import pyro
import pyro.optim
import pytest
import torch

import distopt
from distopt.backends import current
from distopt.backends.single import Single
from distopt.checkpoint import (
    Checkpointer,
    CheckpointError,
    ConfigMismatchError,
)
from distopt.checkpoint.reader import candidates
from distopt.checkpoint.storage.base import open_storage
from distopt.optim import Adam, ClippedAdam, DistributedOptimizer
from tests import workers
from tests.checkpoint.damage import BEFORE, LAST, flip
from tests.checkpoint.runs import checkpointer, value


def test_restore_finds_by_step_and_path_and_says_what_there_is(tmp_path):
    with checkpointer(tmp_path / "a" / "checkpoints") as keeper:
        for step in (1, 2):
            value(step)
            keeper.save(step)
        keeper.wait()
        assert keeper.restore("never") is None
        assert keeper.restore(1).step == 1 and pyro.param("x")[0] == 1
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 7; there are \[1, 2\]"):
            keeper.restore(7)
    with checkpointer(tmp_path / "b") as keeper:
        assert keeper.restore() is None
        assert keeper.restore(tmp_path / "a").step == 2
        assert keeper.restore(str(tmp_path / "a" / "checkpoints" / "step-00000001")).step == 1
        with pytest.raises(CheckpointError, match="no checkpoint there"):
            keeper.restore(tmp_path / "nowhere")
        value(9)
        keeper.save(9)
    assert [one.step for one in candidates(open_storage(tmp_path / "b"))] == [9]


def test_optimizer_keeps_its_moments_and_takes_the_arguments_of_today_and_parameters_are_taken_alone(tmp_path):
    def step(optimizer):
        param = pyro.param("x", torch.zeros(4)).unconstrained()
        param.grad = torch.ones(4)
        optimizer([param])
        return optimizer.get_state()["x"]

    value(0)
    for optimizer in (Adam({"lr": 0.1}), pyro.optim.Adam({"lr": 0.1})):
        directory = tmp_path / type(optimizer).__module__
        saved = step(optimizer)
        with checkpointer(directory, {"optimizer": optimizer}) as keeper:
            keeper.save(7)
        for make in (Adam, pyro.optim.Adam):
            value(0)
            optimizer = make({"lr": 0.2})
            with checkpointer(directory, {"optimizer": optimizer}) as keeper:
                assert keeper.restore().changes == ("lr 0.1 -> 0.2 from step 8",)
                state = step(optimizer)
                assert state["param_groups"][0]["lr"] == 0.2 and state["state"][0]["step"] == 2

    value(0)
    optimizer = ClippedAdam({"lr": 0.1})
    with checkpointer(directory, {"optimizer": optimizer}) as keeper:
        with pytest.raises(CheckpointError, match=r"state of Adam, .* is ClippedAdam.*only=\['params'\]"):
            keeper.restore()
        with pytest.raises(ValueError, match="resume_only"):
            keeper.restore(only=["rng"])
        restored = keeper.restore(only=["params"])
        assert (restored.step, restored.only) == (7, ("params",))
        assert step(optimizer)["state"][0]["step"] == 1
        keeper.save(8)
    with checkpointer(directory, {"optimizer": ClippedAdam({"lr": 0.1})}) as keeper:
        assert keeper.restore(only=["params"]).only is None
    assert saved["state"][0]["step"] == 1


def test_checkpoint_of_another_configuration_is_refused_with_the_difference_unless_told_otherwise(tmp_path):
    config = {"seed": 1, "optim": {"name": "Adam", "args": {"lr": 0.1}}, "name": "a", "reduce": {"op": "average"}}
    value(1)
    with checkpointer(tmp_path, config=config) as keeper:
        keeper.save(1)
    changed = config | {"optim": {"name": "Adam", "args": {"lr": 0.2}}, "extra": 1}
    with checkpointer(tmp_path, config=changed) as keeper:
        with pytest.raises(ConfigMismatchError) as refused:
            keeper.restore()
        assert "optim.args.lr: 0.1 in the checkpoint, 0.2 now" in str(refused.value)
        assert "extra: absent in the checkpoint, 1 now" in str(refused.value)
        assert keeper.restore(any_config=True).step == 1
    changed = config | {"name": "b", "reduce": {"op": "sum"}, "optim": config["optim"] | {"name": "SGD"}}
    with checkpointer(tmp_path, config=changed) as keeper:
        with pytest.raises(ConfigMismatchError) as refused:
            keeper.restore()
        assert str(refused.value).splitlines()[1:-1] == [
            "  name: 'a' in the checkpoint, 'b' now",
            "  optim.name: 'Adam' in the checkpoint, 'SGD' now",
            "  reduce.op: 'average' in the checkpoint, 'sum' now",
        ]
    with checkpointer(tmp_path, config=changed, ignore_keys=("name", "optim.name", "reduce")) as keeper:
        assert keeper.restore().step == 1


def test_run_when_all_checkpoints_are_bad_does_not_start_from_zero(root):
    for folder in (LAST, BEFORE):
        flip(root / folder / "replicated.json.gz")
    with Checkpointer(root, backend=Single()) as checkpointer:
        with pytest.raises(CheckpointError, match="none of the 2 checkpoints can be loaded"):
            checkpointer.restore()
        with pytest.raises(CheckpointError, match="none of the 1"):
            checkpointer.restore(2)


def _save_rank_state(directory, steps):
    backend = current()
    norm = torch.nn.BatchNorm1d(2)
    pyro.param("x", torch.arange(3.0))
    pyro.set_rng_seed(10 + backend.rank)
    with Checkpointer(directory, {"norm": norm}, background=backend.rank % 2 == 0) as keeper:
        for step in steps:
            norm(torch.randn(4, 2))
            keeper.save(step, progress={"step": step})
        keeper.wait()
    return norm.running_mean.tolist(), torch.rand(2).tolist()


def _restore_rank_state(directory):
    norm = torch.nn.BatchNorm1d(2)
    with Checkpointer(directory, {"norm": norm}) as keeper:
        restored = keeper.restore()
    return restored.step, restored.world_size, norm.running_mean.tolist(), torch.rand(2).tolist()


def test_run_on_other_numbers_of_ranks_goes_on_with_replicated_state_and_defined_noise(tmp_path, caplog):
    saved = workers.world("torch_dist", 2).run(_save_rank_state, str(tmp_path), [1, 2])
    same = workers.world("torch_dist", 2).run(_restore_rank_state, str(tmp_path))
    assert [(mean, drawn) for _, _, mean, drawn in same] == [tuple(rank) for rank in saved]
    assert saved[0][0] == saved[1][0]  # batch statistics of all ranks are the mean, from each save on
    norm = torch.nn.BatchNorm1d(2)
    caplog.set_level(logging.WARNING)
    with checkpointer(tmp_path, {"norm": norm}) as keeper:
        assert keeper.restore().world_size == 2
        assert (norm.running_mean.tolist(), torch.rand(2).tolist()) == saved[0]
        assert "resumed on 1 rank(s) from a checkpoint of 2" in caplog.text
        keeper.save(3)
    wider = workers.world("torch_dist", 2).run(_restore_rank_state, str(tmp_path))
    again = workers.world("torch_dist", 2).run(_restore_rank_state, str(tmp_path))
    assert wider == again
    assert wider[0][3] != wider[1][3]


# A parameter of each of these names appears at the step: before, at and after the ones at which the number of ranks
# changes.
BIRTHS = {"late": 0, "early": 0, "d": 4, "b": 5, "c": 6, "a": 10, "z": 11, "m": 14}
NUM_STEPS = 20
ROWS = torch.randn(12, NUM_STEPS, 7, generator=torch.Generator().manual_seed(2))


def _train_while_it_grows(directory, stop, optimizer=None):
    """Steps by the mean over the rows of all ranks, from the newest checkpoint on; returns the parameters."""
    backend = current()
    pyro.clear_param_store()
    distributed = optimizer is None
    if distributed:
        optimizer = DistributedOptimizer(Adam({"lr": 0.05}))
    rows = ROWS[backend.rank :: backend.world_size] if distributed else ROWS
    with ExitStack() as stack:
        keeper = stack.enter_context(Checkpointer(directory, {"optimizer": optimizer})) if distributed else None
        restored = keeper.restore() if keeper else None
        for step in range(restored.step if restored else 0, stop):
            params = []
            for index, (name, birth) in enumerate(BIRTHS.items()):
                if birth <= step:
                    params.append(pyro.param(name, torch.linspace(-1, 1, 1 + index % 7)).unconstrained())
                    params[-1].grad = (rows[:, step, : 1 + index % 7] * (1 + index) + params[-1].detach()).mean(0)
            optimizer(params)
        if keeper:
            keeper.save(stop)
    return {name: value.tolist() for name, value in sorted(pyro.get_param_store().items())}


@pytest.mark.parametrize(
    "lives",
    [
        [("torch_dist", 2, 5), ("torch_dist", 4, 10), ("torch_dist", 2, NUM_STEPS)],
        [("torch_dist", 4, 4), ("torch_dist", 1, 6), ("torch_dist", 2, 11), ("torch_dist", 4, NUM_STEPS)],
        pytest.param([("torch_dist", 2, 14), ("horovod", 4, 15), ("torch_dist", 2, NUM_STEPS)], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_run_whose_parameters_appear_resumes_on_other_numbers_of_ranks(lives, tmp_path):
    for kind, size, stop in lives:
        ranks = workers.world(kind, size).run(_train_while_it_grows, str(tmp_path), stop)
        assert all(values == ranks[0] for values in ranks), "replicas are equal in every bit"
    with closing(distopt.init("single")):
        expected = _train_while_it_grows("", NUM_STEPS, pyro.optim.Adam({"lr": 0.05}))
    assert ranks[0].keys() == expected.keys()
    for name, numbers in expected.items():
        assert ranks[0][name] == pytest.approx(numbers, rel=1e-6, abs=1e-6), name
