from __future__ import annotations

import pyro
import pyro.infer
import pytest

from distopt.infer import SVI
from distopt.optim import Adam
from tests.infer.svi_runs import (
    data,
    fail_on_rank_1,
    guide,
    model,
    parameters,
    train,
    train_in_pyro,
    train_tail_adaptive,
)
from tests.workers import world


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("global_batch", [None, 7])
def test_ranks_with_unequal_rows_end_where_one_pyro_process_ends(global_batch: int | None, world_size: int) -> None:
    expected, expected_losses = train_in_pyro(global_batch, 60)
    for found, losses in world("torch_dist", world_size).run(train, global_batch, 60):
        assert found == pytest.approx(expected, rel=1e-9)
        assert losses == pytest.approx(expected_losses, rel=1e-9), "the loss is the mean over ranks"


def test_error_in_one_ranks_model_reaches_all_and_nobody_steps() -> None:
    first, second = world("torch_dist", 2).run(fail_on_rank_1)
    assert second == "ArithmeticError: the rows are rotten"
    assert "rank 1" in first and "the rows are rotten" in first


def test_init_makes_the_parameters_that_the_first_step_would_make_and_steps_none() -> None:
    svi = SVI(model, guide(), Adam({"lr": 0.05}), pyro.infer.Trace_ELBO())
    svi.init(data())
    assert parameters() == pytest.approx({"AutoDelta.z": 0.3, "AutoDelta.scale": 1.2})
    assert svi.optim.get_state() == {}
    svi.step(data())
    assert parameters().keys() == svi.optim.get_state().keys()


def test_objective_that_has_no_loss_trains_on_several_ranks() -> None:
    first, second = world("torch_dist", 2).run(train_tail_adaptive, 40)
    assert first == second
    assert first["loc"] == pytest.approx(2.0, abs=0.7), "it has gone from 0 to where the data are"


def test_optimizer_that_is_not_distributed_gives_pyros_svi() -> None:
    expected, expected_losses = train_in_pyro(7, 1)
    pyro.clear_param_store()
    from distopt.data import GlobalBatches

    svi = SVI(model, guide(), pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO())
    loss = svi.step(data()[GlobalBatches(11, 7, 3).rows(0)])
    assert [loss] == expected_losses and parameters() == expected
