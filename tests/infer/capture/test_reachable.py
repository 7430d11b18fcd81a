"""Whatever a model reads, by any way: changed between two steps, the next step is the eager one all the same."""

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from distopt.infer.capture import StepCapture, assumptions, quick_tests
from tests.infer.capture import (  # noqa: F401  (each adds its cases)
    changes_of_containers,
    changes_of_handlers,
    changes_of_memory,
    changes_of_modules,
    changes_of_names,
)
from tests.infer.capture.changes import CHANGES
from tests.infer.capture.steps import EagerSteps, assert_same, run_steps

OPAQUE = "whose contents cannot be compared"
EAGER = {
    **dict.fromkeys(("attrgetter", "array_of_the_standard_library", "number_in_memory", "bytes_in_memory"), OPAQUE),
    **dict.fromkeys(("list_in_a_slice", "view_of_memory", "number_of_a_context", "number_of_a_thread", "flag"), OPAQUE),
    **dict.fromkeys(("generator", "iterator", "iterator_in_a_loop", "cycle", "counter"), OPAQUE),
    **dict.fromkeys(("iterator_of_an_object", "counter_in_a_dictionary", "stack"), "changes from step to step"),
    **dict.fromkeys(("generator_of_numpy", "generator_of_torch"), "draws random numbers of its own"),
    "generator_of_torch_with_a_branch": "draws random numbers of its own",
    "generator_of_python": "from step to step",
    "large_array": "an array of NumPy of more than 256 KiB",
    "applied_function": "changed by no operation",
    "applied_function_on_a_sample": "changed by no operation",
    "capsule_of_a_tensor": "another one each step",
    "hook_after_accumulation": "runs after its gradient is accumulated",
}
"""Changes whose models stay eager, and what is said of them."""


@pytest.mark.sampled(40)
@pytest.mark.parametrize("name", CHANGES)
def test_change_between_steps_is_seen_or_the_step_is_not_captured(name, monkeypatch):
    check_change(name, monkeypatch)


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", CHANGES)
def test_change_is_seen_by_python_alone(name, monkeypatch):
    for module in (assumptions, quick_tests):
        monkeypatch.setattr(module, "all_hold", None)
    check_change(name, monkeypatch)


def check_change(name, monkeypatch):
    """Asserts that steps before and after a change are the eager ones, and captured where they can be."""
    monkeypatch.setenv("DISTOPT_TEST_SCALE", "1.0")
    results = []
    for make in (EagerSteps, StepCapture):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model, change = CHANGES[name]()
        step = make(Trace_ELBO().loss_and_grads)
        guide = AutoNormal(model)
        results.append(run_steps(step, model, guide, (), 15, before_step=lambda i, change=change: i != 9 or change()))
    assert_same(*results)
    if name in EAGER:
        assert EAGER[name] in step.refusal
    else:
        assert step.refusal is None
        assert step.num_captured >= 5 + 2  # before the change and after it
