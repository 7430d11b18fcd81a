"""Workers with unequal shards end where one Pyro process with all data ends."""

from __future__ import annotations

import numpy as np
import pytest

from tests.infer.sharded_runs import normal_posterior, train_in_pyro, train_shard
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
