"""Published Pyro models, unchanged and by their own `train()`, on two and three workers: `make test-scvi`."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from distopt.backends import current
from tests.scvi.models import CASES, NUM_CELLS, Seen, cells, train, values
from tests.workers import world

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("scvi") is None, reason="scvi-tools is not installed: pip install scvi-tools"),
]
LIMIT_S = 800  # the first body of a worker imports scvi-tools, which changes the environment of a process


def on_all(num_workers: int, body: Any, *args: Any) -> list[Any]:
    return world("torch_dist", num_workers).run(body, *args, timeout_s=LIMIT_S)


def distances(actual: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """How far each value is from the expected one, in units of the largest element."""
    assert actual.keys() == expected.keys()
    return {
        name: float(np.abs(actual[name] - value).max(initial=0.0) / np.abs(value).max(initial=1e-3))
        for name, value in expected.items()
    }


def assert_near(actual: dict[str, Any], expected: dict[str, Any], roundings: dict[str, float] | None = None) -> None:
    """To 1e-5 of the largest, in float32, or to the roundings that are known of one process."""
    limits = {name: max(1e-5, rounding) for name, rounding in (roundings or {}).items()}
    far = {name: each for name, each in distances(actual, expected).items() if each > limits.get(name, 1e-5)}
    assert far == {}


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {name: value.tobytes() for name, value in actual.items()} == {
        name: value.tobytes() for name, value in expected.items()
    }


def _run_batches(name: str, num_epochs: int) -> tuple[dict[str, Any], list[list[str]], int]:
    import scvi

    import distopt.lightning  # noqa: F401  # makes the strategy known

    scvi.settings.seed = 0
    seen = Seen()
    model = CASES[name].make(cells())
    options = {"strategy": "distopt", "device": current().world_size, "callbacks": [seen]}
    train(model, CASES[name], num_epochs, **options)
    return values(model), seen.epochs, model.trainer.current_epoch


@pytest.mark.parametrize("num_workers", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_unchanged_model_reads_each_cell_once_and_ends_equal_on_all_workers(name: str, num_workers: int) -> None:
    results = on_all(num_workers, _run_batches, name, 4)
    for params, _, epoch in results:
        assert_same(params, results[0][0])
        assert epoch == 4 and len(params) >= 10

    # 131 = 4 * 32 + 3: a last batch of less than two cells for each worker is read whole by all.
    ((expected, whole, _),) = on_all(1, _run_batches, name, 4)
    for epoch in range(4):
        times = Counter(cell for _, epochs, _ in results for cell in epochs[epoch])
        once = Counter(whole[epoch])
        assert times.keys() == once.keys() and sum(once.values()) <= NUM_CELLS
        again = [cell for cell in times if times[cell] != once[cell]]
        assert all(times[cell] == num_workers for cell in again) and len(again) < 2 * num_workers
    if CASES[name].is_exact:
        for params, _, _ in results:
            assert_near(params, expected)


def _run_twice() -> list[dict[str, Any]]:
    import scvi

    import distopt.lightning  # noqa: F401  # makes the strategy known

    scvi.settings.seed = 0
    case = CASES["RegressionModel"]
    model, ends = case.make(cells()), []
    for _ in range(2):
        train(model, case, 2, strategy="distopt", device=current().world_size)
        ends.append({name: value.copy() for name, value in values(model).items()})
    return ends


def test_model_that_is_trained_twice_in_one_process_ends_as_on_one_worker_each_time() -> None:
    (expected,) = on_all(1, _run_twice)
    assert any((expected[0][name] != value).any() for name, value in expected[1].items())
    for ends in on_all(2, _run_twice):
        for actual, wanted in zip(ends, expected, strict=True):
            assert_near(actual, wanted)
