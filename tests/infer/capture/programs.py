"""Programs of single functions, and how their results are compared with ATen's."""

import math

import torch

from distopt.infer.capture import program as programs
from distopt.infer.capture.recorder import Recorder

SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 3.4e38, 1e-30, 5e-324, 1e300, 0.1, -7.25]


def run_program(function, *tensors):
    """Records a function of tensors; returns what its program computes, and the program."""
    recorder = Recorder()
    recording = recorder.recording
    for tensor in tensors:
        recorder.add_input(tensor)
    recording.num_params = recording.num_inputs = len(tensors)
    recording.requires_grad = [False] * len(tensors)
    recorder.start()
    with recorder:
        result = function(*tensors)
    recording.grads = [recorder.slot_of(result), *[-1] * (len(tensors) - 1)]
    recorder.close()
    program = programs.build(recording, tensors, [])
    status, losses = program.run({str(i): tensor for i, tensor in enumerate(tensors)}, [])
    assert (status, losses) == (programs.RAN, [])
    computed = tensors[0].grad
    tensors[0].grad = None
    return computed, program


def assert_same_bits(a, b):
    """Asserts that two tensors are equal in every bit, but for which NaN it is."""
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    if a.is_floating_point():  # a NaN's payload depends on the order of operands, which ATen does not promise
        a, b = (torch.where(t.isnan(), torch.full_like(t, math.nan), t).contiguous() for t in (a, b))
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        a, b = a.view(bits), b.view(bits)
    assert torch.equal(a, b)
