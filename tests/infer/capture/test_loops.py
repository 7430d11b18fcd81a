"""Operations that are computed in one loop have the bits of ATen's, in whatever order others come between them."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal

from distopt.infer.capture import loops
from distopt.infer.capture import program as programs
from distopt.infer.capture.loops import BLOCK_SIZE, Loop, lowered, with_loops
from distopt.infer.capture.passes import shorten
from distopt.infer.capture.recorder import Recorder
from tests.infer.capture.cases import Case
from tests.infer.capture.programs import SPECIAL, assert_same_bits, run_program
from tests.infer.capture.steps import compare

pytestmark = pytest.mark.skipif(programs.compiled is None, reason="the extension is not built")

DTYPES = [torch.float32, torch.float64]
SHAPES = [(2 * BLOCK_SIZE + 1,), (5000,), (300, 16), (9, 40, 8), (70_000,)]


def special_numbers(shape, dtype, seed):
    """Returns numbers of which one in four is special: NaN, an infinity, -0, denormal."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
    special = torch.tensor(SPECIAL, dtype=torch.float64)[torch.randint(len(SPECIAL), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.25, special, numbers).to(dtype)


BINARY = [
    *(torch.add, torch.sub, torch.mul, torch.div, torch.rsub),
    *(lambda x, y: y - x, lambda x, y: x / y * y),
]
UNARY = [
    *(torch.neg, torch.reciprocal, torch.square, lambda x: x**2, lambda x: x**1, lambda x: x * 0.3, lambda x: 2 - x),
    *(
        lambda x: x / 3,
        lambda x: 1.5 / x,
        lambda x: x + 1e-40,
        lambda x: x.clone(memory_format=torch.contiguous_format),
    ),
]
OTHERS = [torch.exp, torch.abs, lambda x: x - x.sum(), lambda x: x.flip(0), lambda x: x.clone().mul_(2.0)]


@pytest.mark.parametrize("num_threads", [1, 2])
@given(data=st.data(), shape=st.sampled_from(SHAPES), dtype=st.sampled_from(DTYPES))
@settings(max_examples=60, deadline=None)
def test_random_chains_equal_atens(num_threads, data, shape, dtype):
    tensors = [special_numbers(shape, dtype, seed) for seed in range(2)]
    operands = [
        special_numbers((), dtype, 3),
        special_numbers(shape[-1:], dtype, 4),
        special_numbers((1,) * len(shape), dtype, 5).expand(shape),
        special_numbers((*shape[:-1], 1), dtype, 6),
    ]
    kinds = data.draw(st.lists(st.sampled_from("bbbuuo"), min_size=3, max_size=14))
    plan = []
    for count, kind in enumerate(kinds):
        table = {"b": BINARY, "u": UNARY, "o": OTHERS}[kind]
        left = data.draw(st.integers(0, 1 + count))
        right = data.draw(st.integers(0, 1 + count) | st.integers(-len(operands), -1))
        plan.append((data.draw(st.sampled_from(table)), left, right if kind == "b" else None))

    def function(*given):
        values, small = [*given[:2]], given[2:]
        for operation, left, right in plan:
            if right is None:
                values.append(operation(values[left]))
            else:
                values.append(operation(values[left], values[right] if right >= 0 else small[right]))
        return torch.stack(values[2:])

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        computed, _ = run_program(function, *tensors, *operands)
        assert_same_bits(computed, function(*tensors, *operands))
    finally:
        torch.set_num_threads(before)


def recorded(function, *tensors):
    """Returns the recording of a function, of which the result is the gradient of the first argument."""
    recorder = Recorder()
    for tensor in tensors:
        recorder.add_input(tensor)
    recorder.recording.num_params = recorder.recording.num_inputs
    recorder.recording.requires_grad = [False] * len(tensors)
    recorder.start()
    with recorder:
        result = function(*tensors)
    recorder.recording.grads = [recorder.slot_of(result), *[-1] * (len(tensors) - 1)]
    recorder.close()
    return recorder.recording


def loops_of(function, *tensors):
    """Returns the number of operations, and of results that others read, of each loop."""
    items = with_loops(recorded(function, *tensors))
    return [(len(item.ops), len(item.outs)) for item in items if isinstance(item, Loop)]


X = torch.linspace(-1.0, 2.0, 5000)


def test_what_lies_between_sums_is_one_loop():
    assert loops_of(lambda x: ((x + 1) * x / 3 - x).sum(), X) == [(4, 1)]
    assert loops_of(lambda x: (x + 1).sum() + (x * 2).sum(), X) == []  # one operation is ATen's


def test_a_loop_computes_what_is_needed_and_the_rest_waits():
    def function(x):
        y = x * 2 + 1
        waits = (y - 3) * x
        return (-(y / x)).exp() * waits / 2

    # y, y / x and its negative for exp, of which y alone is read later; the others with what reads exp.
    assert loops_of(function, X) == [(4, 2), (4, 1)]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x[:2048] + 1) * 2,  # small
        lambda x: (x.to(torch.int64) + 1) * 2,
        lambda x: (x.half() + 1) * 2,
        lambda x: (x.view(50, 100).t() + 1) * 2,  # does not lie in rows
        lambda x: (x.view(50, 100) + x[:50, None]) + x[:50, None],  # a number for each row
        lambda x: (x.view(50, 100) + x[:100]) + x[:100],  # 100 divides no block
        lambda x: torch.add(torch.add(x, x, alpha=2), x, alpha=2),
    ],
)
def test_what_does_not_fit_is_left_to_aten(function):
    assert loops_of(function, X) == []
    computed, _ = run_program(function, X)
    assert_same_bits(computed, function(X))


def test_memory_that_is_written_to_waits_for_nothing():
    def function(x):
        y = x + 1.0
        z = y * 2.0 - x
        y.mul_(3.0)
        return z / y - y

    computed, program = run_program(function, X)
    assert_same_bits(computed, function(X))
    assert program.num_loops == 0


def test_temporaries_are_used_again():
    def function(x):
        for _ in range(20):
            x = x * 0.5 + 1.0
        return x

    (loop,) = [item for item in with_loops(recorded(function, X)) if isinstance(item, Loop)]
    assert len(loop.ops) == 40
    assert lowered(loop, {}).num_temporaries == 1
    computed, _ = run_program(function, X)
    assert_same_bits(computed, function(X))


@pytest.mark.parametrize("period", [1, 8, 1024])
def test_rows_that_repeat_are_operands(period):
    x, row = torch.randn(30, 1024 // period, period), torch.randn(period)

    def function(x, row):
        return (x - row) * row + (row / (x + 2.0))

    computed, program = run_program(function, x, row)
    assert_same_bits(computed, function(x, row))
    assert program.num_loops == (1 if math.prod(x.shape) > 2048 else 0)


LIKELIHOODS = {
    "Normal": lambda loc, scale: dist.Normal(loc, scale),
    "StudentT": lambda loc, scale: dist.StudentT(4.0, loc, scale),
    "Laplace": lambda loc, scale: dist.Laplace(loc, scale),
    "LogNormal": lambda loc, scale: dist.LogNormal(loc, scale),
    "Gamma": lambda loc, scale: dist.Gamma(scale + 0.5, scale / (1 + loc**2)),
    "Poisson": lambda loc, scale: dist.Poisson(scale * loc.exp()),
    "NegativeBinomial": lambda loc, scale: dist.NegativeBinomial(scale + 1.0, logits=loc),
    "Bernoulli": lambda loc, scale: dist.Bernoulli(logits=loc / scale),
    "Beta": lambda loc, scale: dist.Beta(scale + loc.exp(), scale + 1.0),
}


def many_rows(name, *, local):
    """Returns a model of 700 rows of 8 columns, with latent variables for each of them or for columns alone."""

    def model(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(8), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros(()), 0.3))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 0.5).to_event(1)) if local else loc.expand(len(x), 8)
            pyro.sample("x", LIKELIHOODS[name](z, scale).to_event(1), obs=x)

    return model


@pytest.mark.sampled(6)
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, lambda: Trace_ELBO(num_particles=2)])
@pytest.mark.parametrize("local", [False, True], ids=["columns", "rows"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_steps_of_models_with_many_rows_have_the_bits_of_eager_ones(name, local, elbo):
    torch.manual_seed(1)
    x = torch.randn(700, 8)
    if name in ("Poisson", "NegativeBinomial"):
        x = x.abs().round()
    elif name == "Bernoulli":
        x = (x > 0).float()
    elif name in ("LogNormal", "Gamma"):
        x = x.exp()
    elif name == "Beta":
        x = x.sigmoid()
    capture = compare(Case(elbo, many_rows(name, local=local), AutoNormal, (x,)), 9)
    assert capture.num_captured > 3
    (captured,) = [each for variant in capture._variants.values() for each in variant.captured]
    assert not local or captured.program.num_loops > 0


@pytest.mark.parametrize("num_elements", [500, 4096])
def test_a_result_has_the_strides_of_the_eager_one_in_dimensions_of_one_element(num_elements):
    left, row, w = torch.randn(1, num_elements), torch.randn(1, num_elements), torch.randn(num_elements, 1)

    def function(left, row, w):
        column = row.t() * w - 0.5
        return left @ (column * 1.5)

    computed, _ = run_program(function, left, row, w)
    assert_same_bits(computed, function(left, row, w))

    x = torch.randn(8, 1, 40, 40).to(memory_format=torch.channels_last)
    assert loops_of(lambda x: (x * 0.3 - 0.5) / 2.0, x.as_strided(x.shape, (1600, 1, 40, 1))) == []


def test_operands_of_another_shape_wait_too():
    x, y = torch.randn(4096), torch.randn(1, 4096)

    def function(x, y):
        return ((x * 2.0 + 1.0) + y) * y

    computed, program = run_program(function, x, y)
    assert_same_bits(computed, function(x, y))
    assert program.num_loops == 1


@pytest.mark.parametrize("num_elements", [3, 5, 13, 35, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multiples_that_are_added_are_left_to_aten(dtype, num_elements):
    x, c = torch.randn(num_elements, dtype=dtype), torch.randn((), dtype=dtype)

    def function(x, c):
        return torch.add(x, c.expand(x.shape) * 1.7, alpha=0.3) - torch.sub(c.expand(x.shape) * 1.1, x, alpha=0.7)

    recording = shorten(recorded(function, x, c))
    program = programs.build(recording, [x, c], [])
    assert program.run({"x": x, "c": c}, [])[0] == programs.RAN
    computed, x.grad = x.grad, None
    assert_same_bits(computed, function(x, c))


def test_what_waits_keeps_no_more_memory_than_one_operation_after_the_other():
    def function(x):
        total = x * 0.5
        for index in range(40):
            total = total + (x + float(index)).exp()
        return total

    recording = recorded(function, X)
    items = with_loops(recording)
    assert loops._peak(items, recording) <= 1.1 * loops._peak(recording.ops, recording)
    computed, _ = run_program(function, X)
    assert_same_bits(computed, function(X))


def test_peak_is_that_of_what_is_there_at_once():
    recording = recorded(lambda x: (x.exp() + x.exp()).sum() + x.exp().sum(), X)
    assert loops._peak(recording.ops, recording) == 3 * 4 * len(X)


@pytest.mark.parametrize("num_elements", [40_000, 70_001, 300_000])
def test_denormals_are_flushed_where_an_eager_loop_flushes_them(num_elements):
    x = torch.full((num_elements,), 1e-39)
    row = torch.rand(8)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    (x + x).sum()  # threads that exist before do not flush
    torch.set_flush_denormal(True)
    try:
        for function in (
            lambda x, _: (x * 0.5) * 1.5 + x,
            lambda x, row: (x[: len(x) // 8 * 8].view(-1, 8) * row) * 0.5,
        ):
            computed, _ = run_program(function, x, row)
            assert_same_bits(computed, function(x, row))
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(num_threads)
