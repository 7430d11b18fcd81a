"""Published models, untouched, trained on several workers end where one Pyro process with all data ends."""

from __future__ import annotations

import numpy as np
import pytest

from tests.infer.published import CASES, train_in_pyro, train_shard
from tests.workers import world


@pytest.mark.parametrize("case", CASES)
def test_published_model_trained_on_two_and_three_workers_has_the_parameters_of_one_pyro_process(case: str) -> None:
    expected, expected_loss = train_in_pyro(case, 40)
    for world_size in (2, 3):
        for found, loss, num_own in world("torch_dist", world_size).run(train_shard, case, 40):
            assert found.keys() == expected.keys()
            assert num_own > 0, "nothing was sharded"
            assert loss == pytest.approx(expected_loss, rel=1e-9)
            for name, value in expected.items():
                np.testing.assert_allclose(found[name], value.numpy(), rtol=1e-6, atol=1e-9, err_msg=name)
