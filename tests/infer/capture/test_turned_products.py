"""Products with few columns are turned around where that keeps every bit, and are left alone elsewhere."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from distopt.infer.capture import program, turned_products
from distopt.infer.capture.recording import Op, Recording, Slot, TensorInfo, aten, same_bits
from distopt.infer.capture.step import StepCapture
from distopt.infer.capture.turned_products import turn_products
from tests.infer.capture.cases import Case
from tests.infer.capture.steps import compare

pytestmark = pytest.mark.skipif(program.compiled is None, reason="the extension is not built")

CPU = torch.device("cpu")


def product(rows, columns) -> Recording:
    """Returns the recording of one product of two arguments, whose sum is the loss."""
    out = TensorInfo((rows.shape[0], columns.shape[1]), rows.dtype, (columns.shape[1], 1), CPU)
    ops = [
        Op(aten.mm.default, [Slot(0), Slot(1)], {}, [2], [0, 1], [], "model.py:1"),
        Op(aten.sum.default, [Slot(2)], {}, [3], [2], [], "model.py:2"),
    ]
    infos = [TensorInfo.of(rows), TensorInfo.of(columns), out, TensorInfo((), rows.dtype, (), CPU)]
    return Recording(ops=ops, infos=infos, alias=[0, 1, 2, 3], num_inputs=2, losses=[Slot(3)])


def computed(recording, values) -> torch.Tensor:
    """Returns what a recording of operations computes for its slot 2."""
    values = dict(enumerate(values))
    for op in recording.ops[:-1]:
        args = [values[each.index] if isinstance(each, Slot) else each for each in op.args]
        values[op.outs[0]] = op.function(*args, **op.kwargs)
        assert TensorInfo.of(values[op.outs[0]]) == recording.infos[op.outs[0]]
    return values[2]


def matrix(num_rows, num_columns, *, transposed, dtype):
    """Returns random numbers, in rows or in columns."""
    shape = (num_columns, num_rows) if transposed else (num_rows, num_columns)
    numbers = torch.randn(shape, dtype=dtype)
    return numbers.t() if transposed else numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("shape", [(256, 128, 2), (128, 256, 2), (64, 1000, 3), (500, 70, 3), (300, 64, 4)], ids=str)
def test_turned_or_not_the_bits_are_those_of_the_product(shape, transposed, dtype):
    m, k, n = shape
    torch.manual_seed(m + n)
    for _ in range(5):
        rows = matrix(m, k, transposed=transposed[0], dtype=dtype)
        columns = matrix(k, n, transposed=transposed[1], dtype=dtype)
        turned = turn_products(product(rows, columns))
        assert same_bits(computed(turned, [rows, columns]), rows @ columns)


@pytest.mark.parametrize("shape", [(63, 128, 2), (128, 63, 2), (128, 128, 1), (128, 128, 4), (128, 128, 64)], ids=str)
def test_products_that_gain_nothing_stay(shape):
    m, k, n = shape
    recording = product(torch.ones(m, k), torch.ones(k, n))
    assert turn_products(recording).ops == recording.ops


def test_views_into_much_memory_are_not_tried():
    table = torch.empty_strided((256, 64), (1 << 20, 1), device="meta")
    few = torch.empty(64, 256, device="meta")
    for rows, columns in ((table, few[:, :2]), (few, table[:, :2])):
        recording = product(torch.ones(1, 1), torch.ones(1, 1))
        recording.infos[:3] = [
            TensorInfo.of(rows)._replace(device=CPU),
            TensorInfo.of(columns)._replace(device=CPU),
            TensorInfo((rows.shape[0], 2), torch.float32, (2, 1), CPU),
        ]
        assert turn_products(recording).ops == recording.ops


def test_a_product_whose_transpose_has_other_bits_stays(monkeypatch):
    monkeypatch.setattr(turned_products, "_has_same_bits", lambda *_: False)
    recording = product(torch.ones(128, 128), torch.ones(128, 2))
    assert turn_products(recording).ops == recording.ops


def network():
    """Returns a model whose products of gradients have two columns, and data for it."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(2, 128), nn.Softplus(), nn.Linear(128, 8))

    def model(data):
        pyro.module("layers", layers)
        with pyro.plate("rows", len(data)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(layers(z), 1.0).to_event(1), obs=data)

    model.layers = layers  # whose first values `compare` puts back
    return model, torch.randn(256, 8)


def test_steps_with_turned_products_have_the_bits_of_eager_ones():
    model, data = network()
    capture = compare(Case(Trace_ELBO, model, AutoNormal, (data,)), 12)
    (captured,) = [each for variant in capture._variants.values() for each in variant.captured]
    turned = turn_products(captured.short)
    products = [op for op in captured.short.ops if op.function is aten.mm.default]
    assert any(captured.short.infos[op.outs[0]].shape[1] == 2 for op in products)
    gain = any(turned_products._gains(op, captured.short) for op in products)
    assert (len(turned.ops) > len(captured.short.ops)) == gain
    assert capture.num_captured > 5


def test_a_program_does_not_run_with_another_number_of_threads():
    model, data = network()
    pyro.clear_param_store()
    guide = AutoNormal(model)
    capture = StepCapture(Trace_ELBO().loss_and_grads)
    num_threads = torch.get_num_threads()
    try:
        for number, num_captured in ((1, 2), (2, 2), (1, 3), (2, 3)):
            torch.set_num_threads(number)
            for _ in range(5 if number == 1 and num_captured == 2 else 1):
                _, params = capture(model, guide, data)
                pyro.infer.util.zero_grads(params)
            assert capture.num_captured == num_captured
    finally:
        torch.set_num_threads(num_threads)
