"""Which recordings can be a CUDA graph: lists of operations are looked at, no GPU is needed. tests/gpu runs graphs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from distopt.infer.capture.cuda_graph import (
    CudaGraphProgram,
    NoGraphError,
    build_graph,
    graph_refusal,
    uses_gpu,
    without_waits,
)
from distopt.infer.capture.passes import shorten
from distopt.infer.capture.program import RAN
from distopt.infer.capture.recorded_step import record_step
from distopt.infer.capture.recording import Check, HostCall, Op, Recording, Slot, TensorInfo, aten
from tests.infer.capture.cases import captured_cases
from tests.infer.capture.steps import compare

CASES = captured_cases()
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def info(device, shape=(3,)):
    return TensorInfo(shape, torch.float32, torch.empty(shape).stride(), device)


def recording(second=GPU, out=GPU, **more):
    """Returns a step with a parameter on the GPU, in slot 0, which is multiplied by slot 1 and summed up in slot 3."""
    ops = [
        Op(aten.mul.Tensor, [Slot(0), Slot(1)], {}, [2], [0, 1], [], ""),
        Op(aten.sum.default, [Slot(2)], {}, [3], [2], [], "model.py:7"),
    ]
    infos = [info(GPU), info(second, () if second == CPU else (3,)), info(out), info(out, ())]
    values = {"num_params": 1, "num_inputs": 1, "requires_grad": [True], "grads": [2], "losses": [Slot(3)]} | more
    return Recording(ops=ops, infos=infos, alias=[0, 1, 2, 3], **values)


def test_step_on_the_gpu_alone_is_a_graph():
    step = recording()
    assert uses_gpu(step)
    assert graph_refusal(step) is None
    assert step.compared == {}


def test_step_on_the_cpu_uses_no_gpu():
    step = recording(CPU, CPU)
    assert not uses_gpu(step)


def test_number_made_in_the_step_is_part_of_a_graph_and_one_from_outside_is_compared_before_each_step():
    assert graph_refusal(recording(CPU, lifted={1: torch.tensor(2.0)})) is None
    outside = torch.tensor(2.0)
    step = recording(CPU, foreign={1: outside})
    assert graph_refusal(step) is None
    assert torch.equal(step.compared[1], outside)
    outside.fill_(3.0)
    assert not torch.equal(step.compared[1], outside)


def test_argument_on_the_cpu_large_tensors_there_and_those_that_the_step_writes_to_are_refused():
    assert "the CPU computes a part" in graph_refusal(recording(CPU))
    assert "the CPU computes a part" in graph_refusal(recording(CPU, foreign={1: torch.zeros(1000)}))
    step = recording(CPU, foreign={1: torch.tensor(0.0)})
    step.ops.append(Op(aten.add_.Tensor, [Slot(1), Slot(1)], {}, [1], [1], [1], ""))
    assert "the CPU computes a part" in graph_refusal(step)


def test_what_the_cpu_computes_is_refused_with_its_line():
    step = recording(foreign={1: torch.zeros(3)})
    step.infos[3] = info(CPU, ())
    assert "model.py:7" in graph_refusal(step)


def test_gradients_that_are_there_are_added_to_and_python_code_is_refused():
    assert "before the step" in graph_refusal(recording(with_grad=[0]))
    assert graph_refusal(recording(with_grad=[0], grads=[-1], accumulated={0: 2})) is None
    step = recording()
    step.ops.append(Op(HostCall("seed", lambda: None), [], {}, [], [], [], ""))
    assert "Python code runs within the step (seed)" in graph_refusal(step)


def test_loss_or_branch_on_the_cpu_is_refused():
    step = recording()
    step.infos.append(info(CPU, ()))
    step.alias.append(4)
    step.lifted[4] = torch.tensor(True)
    step.checks.append(Check(4, True, "model.py:9"))
    assert "lies on the CPU" in graph_refusal(step)


class OnCpu(CudaGraphProgram):
    """The program with a graph that computes when it is replayed: all but CUDA's own part runs without a GPU."""

    def _record_graph(self):
        self._num_graphs += 1
        self._graph = SimpleNamespace(replay=self._compute)
        self._addresses = self._present_addresses()


@pytest.mark.sampled(6)
@pytest.mark.parametrize("keep_grads", [False, True])
@pytest.mark.parametrize(
    "name",
    ["hierarchy", "subsampled plate", "TraceEnum, mixture", "TraceEnum, hidden Markov", "AutoLowRank"]
    + ["writes in place", "network in training"],
)
def test_program_leaves_losses_and_gradients_of_eager_steps(name, keep_grads, monkeypatch):
    monkeypatch.setattr("distopt.infer.capture.step.uses_gpu", lambda recording: True)
    monkeypatch.setattr("distopt.infer.capture.step.build_graph", OnCpu)
    capture = compare(CASES[name], 9, keep_grads=keep_grads)
    assert capture.refusal is None
    assert capture.num_captured >= 4


def functions(step):
    return {op.function for op in step.ops}


WAITING = {aten.index_put.default, aten._linalg_check_errors.default}
"""What waits for a GPU to look at values there, which CUDA refuses within a graph."""


@pytest.mark.parametrize("name", ["hierarchy", "TraceEnum, hidden Markov", "LKJ", "AutoLowRank", "AutoIAF"])
def test_errors_that_torch_would_wait_for_are_left_to_the_step_or_checked_with_its_losses(name):
    case = CASES[name]
    guide = case.guide(case.model)
    elbo = case.elbo()
    for _ in range(2):  # the first step makes the parameters
        step = record_step(elbo.loss_and_grads, case.model, guide, case.args, {})
    short = shorten(step.recording)
    assert WAITING & functions(short)
    assert not WAITING & functions(without_waits(short))


def test_index_that_the_step_has_not_read_with_keeps_its_check():
    step = recording()
    step.infos += [info(GPU), info(GPU)]
    step.alias += [4, 5]
    step.ops.append(Op(aten.index_put.default, [Slot(0), [Slot(4)], Slot(1), True], {}, [5], [0, 4, 1], [], ""))
    assert functions(without_waits(step)) == functions(step)


def test_factorization_that_fails_takes_the_step_back():
    matrix = torch.eye(3)
    infos = [info(CPU, (3, 3)), info(CPU, (3, 3)), TensorInfo((), torch.int32, (), CPU), info(CPU, ())]
    ops = [
        Op(aten.linalg_cholesky_ex.default, [Slot(0)], {}, [1, 2], [0], [], ""),
        Op(aten._linalg_check_errors.default, [Slot(2), "linalg.cholesky"], {"is_matrix": True}, [], [2], [], ""),
        Op(aten.sum.default, [Slot(1)], {}, [3], [1], [], ""),
    ]
    step = Recording(ops=ops, infos=infos, alias=[0, 1, 2, 3], num_inputs=1, losses=[Slot(3)])
    program = OnCpu(step, [], [matrix])
    assert program.run({}, [matrix]) == (RAN, [3.0])
    status, _ = program.run({}, [matrix - 2 * torch.eye(3)])
    assert status == len(step.checks)


@pytest.mark.parametrize("num_failures", [1, 2])
def test_graph_whose_recording_fails_is_tried_once_more(num_failures, monkeypatch):
    made = []

    def make(*arguments):
        made.append(arguments)
        if len(made) <= num_failures:
            raise RuntimeError(f"capture {len(made)} was invalidated")
        return "the program"

    monkeypatch.setattr("distopt.infer.capture.cuda_graph.CudaGraphProgram", make)
    if num_failures == 1:
        assert build_graph(recording(), [], []) == "the program"
    else:
        with pytest.raises(NoGraphError, match="capture 1 was invalidated"):
            build_graph(recording(), [], [])


def test_program_that_fails_where_eager_steps_do_not_is_given_up_with_its_reason(monkeypatch):
    class Failing(OnCpu):
        def _compute_step(self, args):
            raise RuntimeError("memory has moved")

    monkeypatch.setattr("distopt.infer.capture.step.uses_gpu", lambda recording: True)
    monkeypatch.setattr("distopt.infer.capture.step.build_graph", Failing)
    capture = compare(CASES["hierarchy"], 9)
    assert "fails where an eager one does not: RuntimeError: memory has moved" in capture.refusal
