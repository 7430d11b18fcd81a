"""Steps that are recorded once and run from the recording."""

from distopt.infer.capture.captured_step import StepResult
from distopt.infer.capture.explain import CaptureReport, explain_capture
from distopt.infer.capture.rows import TensorRows
from distopt.infer.capture.step import StepCapture

__all__ = ["CaptureReport", "StepCapture", "StepResult", "TensorRows", "explain_capture"]
