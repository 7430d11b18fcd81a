"""Each operation of the direct arithmetic against ATen's, for bits: NaN, infinities, -0, denormals, broadcasting."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.infer.capture import program as programs
from distopt.infer.capture.direct import MAX_ELEMENTS
from distopt.infer.capture.recorder import Recorder
from distopt.infer.capture.recording import TensorInfo
from tests.infer.capture.programs import SPECIAL, assert_same_bits, run_program

pytestmark = pytest.mark.skipif(
    programs.compiled is None,
    reason="the extension is not built (needs a C++ compiler; `python setup.py build_ext --inplace`)",
)

BINARY = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
}
WITH_NUMBER = {
    **{name: function for name, function in BINARY.items()},
    "rsub": lambda x, y: y - x,
    "rsub.Scalar": lambda x, y: torch.rsub(x, y),
    "add.Scalar": lambda x, y: torch.ops.aten.add.Scalar(x, y),
    "mul.Scalar": lambda x, y: torch.ops.aten.mul.Scalar(x, y),
    "div.Scalar": lambda x, y: torch.ops.aten.div.Scalar(x, y),
    "sub.Scalar": lambda x, y: torch.ops.aten.sub.Scalar(x, y),
}
UNARY = {
    "neg": lambda x: -x,
    "square": lambda x: x**2,
    "square.float": lambda x: x**2.0,
    "pow 1": lambda x: x**1,
    "reciprocal": lambda x: x.reciprocal(),
    "clone": lambda x: x.clone(memory_format=torch.contiguous_format),
    "to float32": lambda x: x.to(torch.float32, copy=True),
    "to float64": lambda x: x.to(torch.float64, copy=True),
}
SHAPES = [
    ((), ()),
    ((1,), (1,)),
    ((5,), (5,)),
    ((17,), ()),
    ((), (9,)),
    ((4, 1), (1, 3)),
    ((2, 3, 2), (3, 1)),
    ((1, 1), (6,)),
    ((9, 2), (9, 2)),
]


def tensor_of(draw, shape, dtype, layout):
    """Draws a tensor: contiguous, transposed, every second element of a larger one, or expanded."""
    size = math.prod(shape)
    values = draw(
        st.lists(st.sampled_from(SPECIAL) | st.floats(width=32, allow_nan=True), min_size=2 * size, max_size=2 * size)
    )
    flat = torch.tensor(values, dtype=torch.float64).to(dtype)
    if layout == "transposed" and len(shape) > 1:
        return flat[:size].reshape(shape[::-1]).permute(*reversed(range(len(shape))))
    if layout == "sliced" and shape:
        return flat.reshape(*shape[:-1], shape[-1] * 2)[..., ::2]
    if layout == "expanded" and shape:
        return flat[: size // shape[0]].reshape(1, *shape[1:]).expand(shape)
    return flat[:size].reshape(shape)


def run_directly(function, *tensors):
    """Returns what the program of a function computes, and how many of its operations are direct."""
    computed, program = run_program(function, *tensors)
    return computed, program.num_direct


layouts = st.sampled_from(["contiguous", "transposed", "sliced", "expanded"])
dtypes = st.sampled_from([torch.float32, torch.float64])


@pytest.mark.parametrize("name", BINARY)
@given(data=st.data(), shapes=st.sampled_from(SHAPES), dtype=dtypes, layout=st.tuples(layouts, layouts))
@settings(max_examples=12)
def test_binary_operations_equal_atens(name, data, shapes, dtype, layout):
    x, y = (tensor_of(data.draw, *each) for each in zip(shapes, (dtype, dtype), layout, strict=True))
    computed, num_direct = run_directly(BINARY[name], x, y)
    expected = BINARY[name](x, y)
    assert_same_bits(computed, expected)
    assert num_direct == TensorInfo.of(expected).has_default_strides


@pytest.mark.parametrize("name", WITH_NUMBER)
@given(
    data=st.data(),
    shape=st.sampled_from([shape for shape, _ in SHAPES]),
    dtype=dtypes,
    layout=layouts,
    number=st.sampled_from(SPECIAL) | st.floats() | st.integers(-(1 << 24), 1 << 24),
)
@settings(max_examples=12)
def test_operations_with_a_number_equal_atens(name, data, shape, dtype, layout, number):
    x = tensor_of(data.draw, shape, dtype, layout)
    computed, num_direct = run_directly(lambda x: WITH_NUMBER[name](x, number), x)
    expected = WITH_NUMBER[name](x, number)
    assert_same_bits(computed, expected)
    assert num_direct == TensorInfo.of(expected).has_default_strides


@pytest.mark.parametrize("name", UNARY)
@given(data=st.data(), shape=st.sampled_from([shape for shape, _ in SHAPES]), dtype=dtypes, layout=layouts)
@settings(max_examples=12)
def test_unary_operations_equal_atens(name, data, shape, dtype, layout):
    x = tensor_of(data.draw, shape, dtype, layout)
    computed, _ = run_directly(UNARY[name], x)
    assert_same_bits(computed, UNARY[name](x))


@given(data=st.data(), shapes=st.sampled_from(SHAPES), dtype=dtypes, layout=st.tuples(layouts, layouts))
@settings(max_examples=20)
def test_where_equals_atens(data, shapes, dtype, layout):
    x, y = (tensor_of(data.draw, *each) for each in zip(shapes, (dtype, dtype), layout, strict=True))
    condition = tensor_of(data.draw, shapes[0], dtype, layout[1]) > 0
    computed, num_direct = run_directly(lambda x, y, c: torch.where(c, x, y), x, y, condition)
    expected = torch.where(condition, x, y)
    assert_same_bits(computed, expected)
    assert num_direct == TensorInfo.of(expected).has_default_strides


@pytest.mark.parametrize("sum_of", [lambda x: x.sum(), lambda x: x.sum(-1), lambda x: x.sum([0, 1], keepdim=True)])
@given(value=st.sampled_from(SPECIAL) | st.floats(), dtype=dtypes)
@settings(max_examples=20)
def test_sum_of_one_element_equals_atens(sum_of, value, dtype):
    x = torch.tensor([[value]], dtype=dtype)
    computed, num_direct = run_directly(sum_of, x)
    assert_same_bits(computed, sum_of(x))
    assert num_direct == 1


@pytest.mark.parametrize("keepdim", [False, True])
@given(data=st.data(), shape=st.sampled_from([(2,), (1, 2), (7, 2), (3, 5, 2), (33, 2)]), dtype=dtypes, layout=layouts)
@settings(max_examples=20)
def test_sums_of_pairs_equal_atens(keepdim, data, shape, dtype, layout):
    x = tensor_of(data.draw, shape, dtype, layout)
    for dim in (-1, len(shape) - 1):
        computed, num_direct = run_directly(lambda x: x.sum(dim, keepdim=keepdim), x)  # noqa: B023
        assert_same_bits(computed, x.sum(dim, keepdim=keepdim))
        assert num_direct == x.is_contiguous()


def test_sums_of_threes_are_left_to_aten():
    for x in (torch.ones(4, 3), torch.ones(2, 4)):
        assert run_directly(lambda x: x.sum(-1), x)[1] == 0
        assert run_directly(lambda x: x.sum(0), x)[1] == 0


@pytest.mark.parametrize("source", [torch.bool, torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("target", [torch.float32, torch.float64])
def test_casts_equal_atens(source, target):
    values = [0, 1, -1, 3, 16_777_217, 9_007_199_254_740_993, -(2**62) - 1, 7]
    x = torch.tensor(values).to(source) if source != torch.float64 else torch.tensor(SPECIAL, dtype=source)
    computed, _ = run_directly(lambda x: x.to(target, copy=True), x)
    assert_same_bits(computed, x.to(target))


@given(data=st.data(), shapes=st.sampled_from(SHAPES), dtype=dtypes, layout=st.tuples(layouts, layouts))
@settings(max_examples=20)
def test_chains_with_views_of_results_equal_atens(data, shapes, dtype, layout):
    x, y = (tensor_of(data.draw, *each) for each in zip(shapes, (dtype, dtype), layout, strict=True))

    def chain(x, y):
        z = (x - y) * 0.5
        z = z.reshape(-1)[: max(1, z.numel() // 2)] / (y.reshape(-1)[:1] + 2)
        return z.expand(3, -1).t() * 2 + z[:, None].exp()

    computed, num_direct = run_directly(chain, x, y)
    assert_same_bits(computed, chain(x, y))
    assert num_direct >= 5


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.exp(),
        lambda x: x.sqrt(),  # vectorized square roots of some libraries are not rounded exactly
        lambda x: x.sum(),
        lambda x: torch.add(x, x, alpha=2),
        lambda x: x**3,
        lambda x: x.half() + 1,
        lambda x: x.expand(MAX_ELEMENTS, 2) + 1.0,
        lambda x: x.to(torch.int64) + 1,
    ],
)
def test_what_is_not_exact_or_not_small_is_left_to_aten(function):
    x = torch.tensor([0.5, 2.0])
    computed, num_direct = run_directly(function, x)
    assert_same_bits(computed, function(x))
    assert num_direct == 0


def test_results_that_are_written_to_are_left_to_aten():
    def function(x):
        y = x + 1.0
        y[0] = 5.0
        return y * 2.0

    x = torch.tensor([0.5, 2.0])
    for _ in range(2):
        computed, num_direct = run_directly(function, x)
        assert_same_bits(computed, function(x))
        assert num_direct == 1


@given(data=st.data(), dtype=dtypes, size=st.integers(1, 9), count=st.integers(1, 40))
@settings(max_examples=40)
def test_vectors_are_indexed_and_summed_at_indices_as_by_aten(data, dtype, size, count):
    table, values = (tensor_of(data.draw, (n,), dtype, "contiguous") for n in (size, count))
    index = torch.tensor(data.draw(st.lists(st.integers(-size, size - 1), min_size=count, max_size=count)))

    def indexed(table, values, index):
        return table[index] * values

    def summed(table, values, index):
        return table.index_put([index], values, accumulate=True)

    for function, expected_direct in ((indexed, 2), (summed, 1)):
        computed, num_direct = run_directly(function, table, values, index)
        assert_same_bits(computed, function(table, values, index))
        assert num_direct == expected_direct


def test_index_out_of_bounds_is_an_error():
    with pytest.raises(IndexError, match="index 3 is out of bounds for size 3"):
        recorded = torch.tensor([0, 2])
        table = torch.ones(3)
        recorder = Recorder()
        for tensor in (table, recorded):
            recorder.add_input(tensor)
        recorder.recording.num_params = recorder.recording.num_inputs = 2
        recorder.recording.requires_grad = [False, False]
        recorder.start()
        with recorder:
            result = table[recorded]
        recorder.recording.grads = [recorder.slot_of(result), -1]
        recorder.close()
        program = programs.build(recorder.recording, [table, recorded], [])
        recorded[1] = 3
        program.run({"table": table, "index": recorded}, [])
