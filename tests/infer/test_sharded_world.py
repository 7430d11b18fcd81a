"""Workers with unequal shards end where one Pyro process with all data ends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.infer.sharded_costs import NUM_DIMS, train
from tests.infer.sharded_runs import disagree, normal_posterior, resume, train_and_save, train_in_pyro, train_shard
from tests.workers import world


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
@pytest.mark.parametrize("case", ["normal", "mixture"])
def test_parameters_after_100_steps_are_those_of_one_pyro_process(case: str, optimizer: str, world_size: int) -> None:
    expected, expected_loss = train_in_pyro(case, optimizer, 100)
    for found, loss in world("torch_dist", world_size).run(train_shard, case, optimizer, 100):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-9, err_msg=name)
        assert loss == pytest.approx(expected_loss, rel=1e-9)


def test_training_ends_at_the_closed_form_posterior() -> None:
    found, _ = world("torch_dist", 3).run(train_shard, "normal", "to the end", 700)[1]
    for name, value in normal_posterior().items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("case", ["normal", "mixture"])
def test_run_of_four_workers_goes_on_from_its_checkpoint_on_two_and_on_three(case: str, tmp_path: Path) -> None:
    expected, expected_loss = train_in_pyro(case, "Adam", 60)
    ways = [
        world("torch_dist", 4).run(train_and_save, case, str(tmp_path), 40, 20),
        world("torch_dist", 2).run(resume, case, str(tmp_path), 20),
        world("torch_dist", 3).run(resume, case, str(tmp_path), 20),
    ]
    for found, loss in (each for way in ways for each in way):
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-9, err_msg=name)
        assert loss == pytest.approx(expected_loss, rel=1e-9)


def test_memory_falls_with_the_number_of_workers_and_bytes_sent_do_not_grow_with_the_rows() -> None:
    num_rows = 1_000_000
    world("torch_dist", 1).run(train, 1000, 3)  # what is loaded at a first step is not counted
    (alone,) = world("torch_dist", 1).run(train, num_rows, 3)
    few = world("torch_dist", 2).run(train, 1000, 3)
    workers = world("torch_dist", 2).run(train, num_rows, 3)
    for worker in workers:
        assert worker["rows"] == num_rows / 2
        assert worker["peak"] == pytest.approx(alone["peak"] / 2, rel=0.15)
    assert alone["peak"] > 4 * num_rows * NUM_DIMS * 4  # values, gradients, Adam's two moments: the measure sees them
    assert few[0]["calls"] == workers[0]["calls"] == 1
    assert few[0]["bytes"] == workers[0]["bytes"] < 1000


def test_parameter_that_is_local_on_one_rank_alone_is_named_on_all() -> None:
    for told in world("torch_dist", 2).run(disagree, "kind"):
        assert "'z_loc' differs in kind: rank 0: local; rank 1: replicated" in told


def test_global_norm_over_parameters_of_single_ranks_is_refused() -> None:
    for told in world("torch_dist", 2).run(disagree, "clip"):
        assert "global_norm" in told and "'z_loc' is this rank's own" in told
