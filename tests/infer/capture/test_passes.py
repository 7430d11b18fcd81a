"""Each pass alone, and all but one, give the bits of an eager step; and each drops what it is there to drop."""

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from distopt.infer.capture import passes
from distopt.infer.capture.passes import PASSES, shorten
from distopt.infer.capture.recorded_step import record_step
from distopt.infer.capture.recording import Op, Recording, Slot, TensorInfo, aten
from tests.infer.capture.cases import DATA, Case, captured_cases, hierarchy
from tests.infer.capture.steps import compare

CASES = captured_cases()
MODELS = ["hierarchy", "LKJ", "TraceEnum, mixture", "writes in place", "network in training", "subsampled plate"]


@pytest.mark.sampled(12)
@pytest.mark.parametrize("chosen", [(), *((name,) for name in PASSES)], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_each_pass_alone_changes_no_bit(monkeypatch, model, chosen):
    monkeypatch.setattr(passes, "PASSES", {name: PASSES[name] for name in chosen})
    capture = compare(CASES[model], 6)
    assert capture.num_captured == 3


@pytest.mark.parametrize("left_out", PASSES)
def test_leaving_out_a_pass_changes_no_bit(monkeypatch, left_out):
    monkeypatch.setattr(passes, "PASSES", {name: PASSES[name] for name in PASSES if name != left_out})
    capture = compare(CASES["LKJ"], 6)
    assert capture.num_captured == 3


def test_passes_shorten_the_list_and_leave_the_recording_alone():
    elbo = Trace_ELBO()
    guide = AutoNormal(hierarchy)
    elbo.loss_and_grads(hierarchy, guide, DATA)
    for param in pyro.get_param_store()._params.values():
        param.grad = None
    recording = record_step(elbo.loss_and_grads, hierarchy, guide, (DATA,), {}).recording
    before = [op.describe() + str(op.args) for op in recording.ops]
    lengths = [len(shorten(recording, list(PASSES)[:count]).ops) for count in range(len(PASSES) + 1)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < 0.8 * lengths[0]
    assert [op.describe() + str(op.args) for op in recording.ops] == before


def test_one_number_in_many_elements_is_computed_once():
    def model(x):
        df = pyro.sample("df", pyro.distributions.Gamma(2.0, 0.1))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", pyro.distributions.StudentT(df, 0.0, 1.0), obs=x)

    guide = AutoNormal(model)
    elbo = Trace_ELBO()
    elbo.loss_and_grads(model, guide, DATA)
    recording = record_step(elbo.loss_and_grads, model, guide, (DATA,), {}).recording
    wide = [
        op for op in recording.ops if "gamma" in str(op.function) and recording.infos[op.outs[0]].shape == DATA.shape
    ]
    assert len(wide) == 4  # two of lgamma, and two of its derivative
    short = shorten(recording)
    narrow = [op for op in short.ops if "gamma" in str(op.function)]
    assert {short.infos[op.outs[0]].shape for op in narrow} == {()}
    compare(Case(Trace_ELBO, model, AutoNormal), 8)


def test_draws_whose_results_nobody_uses_stay():
    def model(x):
        pyro.sample("loc", pyro.distributions.Normal(0.0, 1.0))
        torch.randn(3)
        torch.rand(())

    elbo = Trace_ELBO()
    guide = AutoNormal(model)
    elbo.loss_and_grads(model, guide, DATA)
    recording = record_step(elbo.loss_and_grads, model, guide, (DATA,), {}).recording
    draws = [op.function for op in recording.ops if op.is_random]
    assert [op.function for op in shorten(recording).ops if op.is_random] == draws
    assert len(draws) == 3


def test_equal_constants_of_one_element_are_merged_whatever_their_strides():
    recording = Recording()
    numbers = [
        torch.tensor([2.0]).as_strided((1,), (0,)),
        torch.tensor([2.0]).as_strided((1,), (0,)),
        torch.tensor(3.0),
    ]
    for slot, tensor in enumerate(numbers):
        recording.infos.append(TensorInfo.of(tensor))
        recording.alias.append(slot)
        recording.lifted[slot] = tensor
    recording.ops = [Op(aten.neg.default, [Slot(slot)], {}, [slot], [slot], [], "") for slot in range(3)]
    passes.merge_equal(recording)
    assert [op.ins for op in recording.ops] == [[0], [2]]
