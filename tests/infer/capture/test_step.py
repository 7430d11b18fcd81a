import pytest

from tests.infer.capture.cases import captured_cases
from tests.infer.capture.steps import compare

CASES = captured_cases()


@pytest.mark.parametrize("name", CASES)
def test_captured_steps_equal_eager_ones_in_every_bit(name):
    capture = compare(CASES[name])
    assert capture.refusal is None
    assert capture.num_captured >= 14 or (capture.num_captured >= 5 and "score" in name)


@pytest.mark.parametrize("name", CASES)
def test_captured_steps_add_to_gradients_that_are_there(name):
    capture = compare(CASES[name], 9, keep_grads=True)
    assert capture.refusal is None
