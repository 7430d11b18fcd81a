"""What is logged of steps is their mean, and time goes on where the last process left it."""

from __future__ import annotations

import json
import math

import pytest
import torch

from distopt.optim import Adam, StepInfo
from distopt.train.measurements import Measurements


def measured(measurements, losses, *, norm=None, optimizer=None, num_skipped=0):
    for loss in losses:
        info = StepInfo(loss=loss, num_active=1, gradient_norm=norm)
        measurements.add(info)
    return measurements.close(info, optimizer or Adam({"lr": 0.1}), num_skipped)


def test_elbo_is_the_mean_over_the_steps_since_the_last_row():
    measurements = Measurements(None, 0, 10)
    first = measured(measurements, [4.0, 2.0], norm=1.5, num_skipped=3)
    assert (first["elbo"], first["gradient_norm"], first["skipped_steps"]) == (-3.0, 1.5, 3)
    second = measured(measurements, [5.0])
    assert second["elbo"] == -5.0 and math.isnan(second["gradient_norm"])
    assert first["rows_per_s"] > 0 and second["train_s"] >= first["train_s"]


def test_learning_rate_is_the_largest_and_left_out_where_no_parameter_has_one():
    import pyro

    assert "lr" not in measured(Measurements(None, 0, 1), [1.0])
    pyro.param("a", torch.ones(1)).sum().backward()
    pyro.param("b", torch.ones(1)).sum().backward()
    optimizer = Adam(lambda name: {"lr": 0.1 if name == "a" else 0.3})
    optimizer([param for param in pyro.get_param_store()._params.values()])
    assert measured(Measurements(None, 0, 1), [1.0], optimizer=optimizer)["lr"] == 0.3


@pytest.mark.parametrize(("first_step", "before_s"), [(0, 0.0), (10, 100.0), (20, 100.0), (25, 250.0)])
def test_time_of_training_continues_from_the_row_that_the_run_resumes_from(first_step, before_s, tmp_path):
    rows = [{"step": 10, "train_s": 100.0}, {"step": 25, "train_s": 250.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seconds = measured(Measurements(tmp_path, first_step, 1), [1.0])["train_s"]
    assert before_s <= seconds < before_s + 60
