"""Steps that are recorded once and run from the recording."""

from distopt.infer.capture.explain import CaptureReport, explain_capture
from distopt.infer.capture.step import StepCapture, StepResult

__all__ = ["CaptureReport", "StepCapture", "StepResult", "explain_capture"]
