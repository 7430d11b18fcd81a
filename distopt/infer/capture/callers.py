"""Whose code makes a call: which line of the model's, an ELBO or a warning of Pyro's, a library."""

from __future__ import annotations

import sys
from types import FrameType

from distopt.infer.capture import watch

_LIBRARIES = (
    "torch.",
    "pyro.",
    "distopt.infer.",
    "distopt.backends.",
    "distopt.optim.amp",
    "distopt.rng",
    "contextlib",
    "functools",
)

# By remembered code object, whether it is a library's; by it and a line, that line's description.
_library_codes: dict[int, bool] = {}
_lines: dict[tuple[int, int], str] = {}


def is_library(frame: FrameType) -> bool:
    """Returns whether a frame runs code of torch, Pyro or this package rather than the user's."""
    answer = _library_codes.get(id(frame.f_code))
    if answer is None:
        name = frame.f_globals.get("__name__", "") + "."
        answer = name.startswith(_LIBRARIES) and not name.startswith("distopt.examples.")
        _library_codes[watch.remembered(frame.f_code)] = answer
    return answer


def model_line() -> str:
    """Returns file, line and function of the innermost frame that is the user's, "" where there is none."""
    frame: FrameType | None = sys._getframe(1)
    is_known = _library_codes.get  # each operation asks for its line, some 20 frames up
    while frame is not None and (is_known(id(frame.f_code)) or is_library(frame)):
        frame = frame.f_back
    if frame is None:
        return ""
    key = (id(frame.f_code), frame.f_lineno)  # `is_library` has remembered it
    line = _lines.get(key)
    if line is None:
        line = _lines[key] = f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"
    return line


def is_elbo(frame: FrameType | None) -> bool:
    """Returns whether a frame is of one of Pyro's ELBOs."""
    while frame is not None and frame.f_globals.get("__name__") == "distopt.optim.amp":
        frame = frame.f_back  # of the mode that scales what `backward()` begins with, through which all calls go
    return frame is not None and str(frame.f_globals.get("__name__", "")).startswith("pyro.infer.")


def is_warning() -> bool:
    """Returns whether pyro.util.warn_if_nan or warn_if_inf reads a value: nothing follows from it but a warning."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(4):
        if frame is None:
            return False
        if frame.f_globals.get("__name__") == "pyro.util" and frame.f_code.co_name.startswith("warn_if"):
            return True
        frame = frame.f_back
    return False
