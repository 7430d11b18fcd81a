"""Which steps are captured follows from the configuration and the step's number."""

from typing import get_args

import pytest

from distopt.infer.capture.modes import CHECKED_STEPS, CaptureMode, StepMode, is_checked_late, mode_of_step


@pytest.mark.parametrize(
    ("capture", "checked", "unchecked"),
    [
        ("off", "eager", "eager"),
        ("graph", "graph", "graph"),
        ("auto", "eager", "graph"),
        ("compiled", "compiled", "compiled"),
    ],
)
def test_mode_of_a_step(capture, checked, unchecked):
    assert mode_of_step(capture, is_checked=True) == checked
    assert mode_of_step(capture, is_checked=False) == unchecked
    assert capture in get_args(CaptureMode) and {checked, unchecked} <= {*get_args(StepMode)}


def test_one_step_in_a_hundred_is_checked_all_along():
    assert [step for step in range(1, 301) if is_checked_late(step)] == [CHECKED_STEPS, 200, 300]
