"""Steps that are recorded once and run from the recording."""

from distopt.infer.capture.step import StepCapture, StepResult

__all__ = ["StepCapture", "StepResult"]
