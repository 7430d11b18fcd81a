"""Workers with unequal shards end where one Pyro process with all data ends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.infer.sharded_costs import NUM_DIMS, train
from tests.infer.sharded_runs import (
    clip_in_torch,
    clip_shard,
    disagree,
    normal_posterior,
    resume,
    skip_with_scaler,
    train_and_save,
    train_in_pyro,
    train_shard,
)
from tests.workers import world


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [("torch_dist", 1), ("torch_dist", 2), ("torch_dist", 3), ("torch_dist", 4), ("horovod", 2)],
)
@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
@pytest.mark.parametrize("case", ["normal", "mixture"])
def test_parameters_after_100_steps_are_those_of_one_pyro_process(
    case: str, optimizer: str, kind: str, world_size: int
) -> None:
    expected, expected_loss = train_in_pyro(case, optimizer, 100)
    for found, loss in world(kind, world_size).run(train_shard, case, optimizer, 100):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-9, err_msg=name)
        assert loss == pytest.approx(expected_loss, rel=1e-9)


def test_sum_over_ranks_scales_shared_and_local_gradients_alike() -> None:
    expected, _ = train_in_pyro("normal", "SGD", 100)
    for found, _ in world("torch_dist", 3).run(train_shard, "normal", "SGD, a third of its rate", 100, "sum"):
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-9, err_msg=name)


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
    for world_size in (1, 2, 3, 4):
        few = world("torch_dist", world_size).run(train, 1000, 2)  # also loads what a first step loads
        workers = world("torch_dist", world_size).run(train, num_rows, 2)
        assert sum(worker["rows"] for worker in workers) == num_rows
        if world_size == 1:
            alone = workers[0]["peak"]
            assert alone > 4 * num_rows * NUM_DIMS * 4  # values, gradients, Adam's two moments: the measure sees them
        for worker in workers:
            assert worker["peak"] == pytest.approx(alone / world_size, rel=0.15)
            assert worker["calls"] == 1
            assert worker["bytes"] == few[0]["bytes"] < 1000


def test_parameter_that_is_local_on_one_rank_alone_is_named_on_all() -> None:
    for told in world("torch_dist", 2).run(disagree, "kind"):
        assert "'z_loc' differs in kind: rank 0: local; rank 1: replicated" in told


def test_global_norm_is_over_the_parameters_of_all_ranks_as_torch_clips_those_of_one_process() -> None:
    expected = clip_in_torch(40)
    for found in world("torch_dist", 3).run(clip_shard, 40):
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def test_global_norm_of_a_callable_is_refused_where_ranks_cannot_tell_over_which_parameters_it_goes() -> None:
    for told in world("torch_dist", 2).run(disagree, "clip"):
        assert "gives global_norm for 'z_loc', a parameter of one rank alone" in told


def test_overflow_of_one_ranks_own_gradient_makes_all_skip_the_step_and_lower_their_scale() -> None:
    for rank, (scale, shared, own) in enumerate(world("torch_dist", 2).run(skip_with_scaler)):
        assert (scale, shared, own) == (4.0, -2.0, [-2.0] * (rank + 2))
