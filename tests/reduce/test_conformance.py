"""One suite that every backend passes with 1, 2 and 4 ranks: agreement, buckets, options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from distopt.backends import init
from tests import workers
from tests.reduce.agreement_bodies import AGREEMENT, gradients_are_averaged
from tests.reduce.bucket_bodies import BUCKETS
from tests.reduce.option_bodies import OPTIONS
from tests.reduce.training_bodies import TRAINING, guide_that_grows_differently_trains

SIZES = (2, 4, 1)
BODIES = [*AGREEMENT, *TRAINING, *BUCKETS, *OPTIONS]
WORLDS = [(kind, size) for kind in ("torch_dist", "horovod", "mpi") for size in SIZES]
OTHER_STARTERS = [("horovod-mpi", 2), ("mpirun-horovod", 2)]


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world[0]}-{world[1]}")
def world(request: pytest.FixtureRequest) -> tuple[str, int]:
    """Tests of one world run one after the other, so that it starts once."""
    found: tuple[str, int] = request.param
    return found


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_every_backend_does_the_same(world: tuple[str, int], body: Callable[[], Any]) -> None:
    results = workers.world(*world).run(body, timeout_s=90)
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("started", OTHER_STARTERS, ids=lambda world: f"{world[0]}-{world[1]}")
def test_other_launchers_of_horovod_do_the_same(started: tuple[str, int]) -> None:
    for body in (gradients_are_averaged, guide_that_grows_differently_trains):
        results = workers.world(*started).run(body, timeout_s=90)
        assert all(result == results[0] for result in results)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_a_lone_process_does_the_same(body: Callable[[], Any]) -> None:
    backend = init("single")
    body()
    backend.close()
