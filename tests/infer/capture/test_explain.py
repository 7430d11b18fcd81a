import math

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal

from distopt.infer import explain_capture
from tests.infer.capture.cases import DATA, hierarchy, mixture, mixture_guide


def test_report_of_a_step_that_is_captured_counts_operations_and_says_what_is_compared():
    guide = AutoNormal(hierarchy)
    before = torch.get_rng_state()
    report = explain_capture(hierarchy, guide, DATA)
    assert report.refusal is None
    assert report.num_recorded > report.num_operations > report.num_direct >= 0
    assert report.captured_s > 0 and report.eager_s > 0
    assert "Steps are captured" in str(report)
    assert torch.equal(before, torch.get_rng_state())
    assert all(param.grad is None for param in pyro.get_param_store()._params.values())


def test_report_names_lines_of_branches():
    report = explain_capture(mixture, mixture_guide(mixture), DATA, loss=TraceEnum_ELBO(max_plate_nesting=1))
    assert report.checks
    assert "A branch is checked at" in str(report)


def test_report_of_a_step_that_is_refused_names_the_line():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(loc, 1.0 + abs(x.mean().item())), obs=x.sum())

    report = explain_capture(model, AutoNormal(model), DATA)
    assert "test_explain.py:" in report.refusal
    assert math.isnan(report.captured_s)
    assert str(report).startswith("Steps are not captured: .item() reads a value")
