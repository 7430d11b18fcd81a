import copy

import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from distopt.infer.capture.recorded_step import record_step
from distopt.infer.capture.recording import Check, Recording, Slot, aten, difference, is_random, same_bits
from tests.infer.capture.cases import DATA, hierarchy


@pytest.fixture
def recording() -> Recording:
    elbo = Trace_ELBO()
    guide = AutoNormal(hierarchy)
    elbo.loss_and_grads(hierarchy, guide, DATA)
    return record_step(elbo.loss_and_grads, hierarchy, guide, (DATA,), {}).recording


def changed(recording, change):
    other = copy.copy(recording)
    other.ops = [copy.copy(op) for op in recording.ops]
    other.lifted = dict(recording.lifted)
    change(other)
    return difference(recording, other)


def test_recording_equals_itself(recording):
    assert changed(recording, lambda other: None) is None


def test_difference_names_operation_and_line(recording):
    def change(other):
        index = next(i for i, op in enumerate(other.ops) if op.function is aten.mul.Tensor)
        other.ops[index].function = aten.add.Tensor

    message = changed(recording, change)
    assert "aten.mul.Tensor at" in message
    assert "cases.py" in message or "test_recording.py" in message


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (0.0, -0.0), (True, 1), (1.0, 1.0000000000000002)])
def test_numbers_that_compute_otherwise_differ(recording, one, other):
    recording.ops[0].args = [Slot(0), one]

    def change(changed_recording):
        changed_recording.ops[0].args = [Slot(0), other]

    assert "other arguments from step to step" in changed(recording, change)


def test_missing_operation_differs(recording):
    assert "in one step only" in changed(recording, lambda other: other.ops.pop())


def test_constant_made_from_other_numbers_differs(recording):
    slot = next(slot for slot, tensor in recording.lifted.items() if tensor.numel())

    def change(other):
        other.lifted[slot] = torch.full_like(recording.lifted[slot], 123)

    assert "made from Python numbers differs" in changed(recording, change)


def test_answers_of_checks_are_not_compared(recording):
    recording.checks = [Check(3, True, "")]

    def change(other):
        other.checks = [Check(3, False, "")]

    assert changed(recording, change) is None


def test_random_operators_are_known_by_tag_or_generator():
    assert is_random(aten.normal_.default)
    assert is_random(aten.bernoulli.p)
    assert is_random(aten._standard_gamma.default)
    assert not is_random(aten.exp.default)


def test_same_bits_tells_zeros_apart_and_takes_any_layout():
    assert same_bits(torch.tensor([0.0, float("nan")]), torch.tensor([0.0, float("nan")]))
    assert not same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    assert not same_bits(torch.tensor(0.0), torch.tensor(0.0, dtype=torch.float64))
    assert same_bits(torch.ones(1).expand(3), torch.ones(3))
    assert same_bits(torch.ones(()).expand(1, 1), torch.ones(1, 1))
