"""What is logged of steps is their mean, and time goes on where the last process left it."""

from __future__ import annotations

import json

import pytest

from distopt.train.measurements import Measurements


def measured(measurements, *steps):
    for values in steps:
        measurements.add(values)
        measurements.count_step()
    return measurements.close()


def test_values_are_means_over_the_steps_since_the_last_row_that_measured_them():
    measurements = Measurements(None, 0, 10)
    first = measured(measurements, {"elbo": -4.0, "gradient_norm": 1.5}, {"elbo": -2.0})
    assert (first["elbo"], first["gradient_norm"]) == (-3.0, 1.5)
    second = measured(measurements, {"elbo": -5.0})
    assert second["elbo"] == -5.0 and "gradient_norm" not in second
    assert first["rows_per_s"] > 0 and second["train_s"] >= first["train_s"]


def test_speed_is_of_rows_where_they_are_known_and_of_steps_where_not():
    assert set(measured(Measurements(None, 0, None), {})) == {"steps_per_s", "train_s"}
    assert set(measured(Measurements(None, 0, 5), {})) == {"rows_per_s", "train_s"}
    assert Measurements(None, 0, 5).close()["rows_per_s"] == 0  # no step was taken


@pytest.mark.parametrize(("first_step", "before_s"), [(0, 0.0), (10, 100.0), (20, 100.0), (25, 250.0)])
def test_time_of_training_continues_from_the_row_that_the_run_resumes_from(first_step, before_s, tmp_path):
    rows = [{"step": 10, "train_s": 100.0}, {"step": 25, "train_s": 250.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seconds = measured(Measurements(tmp_path, first_step, 1), {})["train_s"]
    assert before_s <= seconds < before_s + 60
