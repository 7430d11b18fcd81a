"""The flights model, aircraft split over workers, ends where one Pyro process with all flights ends."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from tests.infer.sharded_flights import Result, train_in_pyro, train_shard
from tests.workers import world

NUM_STEPS = 100


@cache
def expected() -> Result:
    """What Pyro finds."""
    return train_in_pyro(NUM_STEPS)


@pytest.mark.timeout(400)  # each rank reads the file of all flights
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_flights_with_aircraft_split_over_workers_give_the_parameters_of_one_pyro_process(world_size: int) -> None:
    alone = world_size == 1
    results = [train_shard(NUM_STEPS)] if alone else world("torch_dist", world_size).run(train_shard, NUM_STEPS)
    for found in results:
        for optimizer, (values, loss) in expected().items():
            assert found[optimizer][1] == pytest.approx(loss, rel=1e-9)
            assert found[optimizer][0].keys() == values.keys()
            for name, value in values.items():
                np.testing.assert_allclose(found[optimizer][0][name], value, rtol=1e-6, atol=1e-8, err_msg=name)
