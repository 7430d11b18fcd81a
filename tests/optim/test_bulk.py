"""The compiled loops do what those in Python do, whatever they are given; and the optimizers do without them."""

import gc
import logging
import shutil
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import distopt.optim
from distopt.optim import packing
from distopt.optim.packing import Arena, GradientBuffer
from tests.optim.trajectories import OPTIMIZERS, SHAPES, Schedule, run

needs_compiled = pytest.mark.skipif(
    packing._compiled is None, reason="no compiler was there when distopt was installed"
)
quick = settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GRADIENTS = ["dense", "none", "sparse", "strided otherwise", "expanded", "inference"]


class Subclass(torch.nn.Parameter):
    pass


def parameter(shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


def give_gradient_(p, kind):
    g = torch.randn(p.shape).to(p.dtype)
    if kind == "none":
        p.grad = None
    elif kind == "sparse":
        p.grad = g.to_sparse() if p.dim() else None
    elif kind == "strided otherwise":
        p.grad = torch.stack([g, g], -1)[..., 0]
    elif kind == "expanded":
        p.grad = torch.ones((), dtype=p.dtype).expand(p.shape)
    elif kind == "inference":
        with torch.inference_mode():
            p.grad = g.clone()
    else:
        p.grad = g


def odd_parameter(kind):
    """Parameters that no group packs."""
    if kind == "fake":
        with FakeTensorMode():
            return torch.nn.Parameter(torch.zeros(3))
    made = {
        "complex": lambda: torch.zeros(3, dtype=torch.complex64),
        "empty": lambda: torch.zeros(0),
        "integers": lambda: torch.zeros(3, dtype=torch.int64),
        "meta": lambda: torch.zeros(3, device="meta"),
        "negative": lambda: torch._neg_view(torch.zeros(3)),
        "sparse": lambda: torch.zeros(3).to_sparse(),
        "subclass": lambda: Subclass(torch.zeros(3)),
        "transposed": lambda: torch.zeros(3, 2).t(),
    }[kind]()
    return made


ODD = ["complex", "empty", "fake", "integers", "meta", "negative", "sparse", "subclass", "transposed"]


def in_python(function, *args):
    """What `function` of `bulk` returns without the compiled loops, or the error it raises."""
    kept, packing._compiled = packing._compiled, None
    try:
        return outcome(function, *args)
    finally:
        packing._compiled = kept


def outcome(function, *args):
    try:
        return function(*args)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        return type(error)


@needs_compiled
@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=12),
    dtype=st.sampled_from(DTYPES),
    gradients=st.lists(st.sampled_from(["dense"] * 12 + GRADIENTS), min_size=12, max_size=12),
    moved=st.none() | st.integers(0, 11),
)
@quick
def test_gradients_are_gathered_as_python_gathers_them(shapes, dtype, gradients, moved):
    params = tuple(parameter(shape, dtype) for shape in shapes)
    arena = Arena(params)
    mine = torch.full_like(arena.flat, 7.0)
    in_blocks = GradientBuffer(arena)
    assert in_python(in_blocks._make_blocks)
    for p, kind in zip(params, gradients, strict=False):
        give_gradient_(p, kind)
    if moved is not None:
        with torch.no_grad():
            params[moved % len(params)].data = params[moved % len(params)].detach().clone()
    found = packing.gather(params, arena.flat, mine)
    if found is None:
        assert set(gradients[: len(params)]) != {"dense"}
        return
    assert found == (moved is None) == all(map(arena.holds, range(len(params))))
    theirs = in_python(in_blocks.gather_)
    assert (theirs is not None) is found
    if found:
        assert torch.equal(mine, theirs)


@needs_compiled
@given(
    shapes=st.lists(st.sampled_from(SHAPES), max_size=6),
    gradients=st.lists(st.sampled_from(["dense"] * 6 + GRADIENTS), min_size=6, max_size=6),
    odd=st.lists(st.sampled_from(ODD), max_size=2),
    order=st.randoms(use_true_random=False),
)
@quick
def test_whatever_the_tensors_are_the_answers_are_those_of_python(shapes, gradients, odd, order):
    params = [parameter(shape) for shape in shapes]
    for p, kind in zip(params, gradients, strict=False):
        give_gradient_(p, kind)
    params += [odd_parameter(kind) for kind in odd]
    order.shuffle(params)
    tensors = tuple(params)
    assert outcome(packing.has_dense_gradients, tensors) == in_python(packing.has_dense_gradients, tensors)
    for others in (tensors, tuple(params), tensors[1:], tensors[::-1], (*tensors[:-1], torch.zeros(3))):
        assert packing.same(tensors, others) is in_python(packing.same, tensors, others)
    versions = [p._version for p in params]
    raised = in_python(packing.bump_versions, tensors)
    grown = [p._version - v for p, v in zip(params, versions, strict=True)]
    versions = [p._version for p in params]
    assert outcome(packing.bump_versions, tensors) == raised
    assert [p._version - v for p, v in zip(params, versions, strict=True)] == grown
    buffer = torch.zeros(sum(p.numel() for p in params))
    if odd:
        assert not packing.gather(tensors, buffer, torch.zeros_like(buffer))


@needs_compiled
@pytest.mark.parametrize("kind", ODD)
def test_odd_memory_is_neither_read_nor_written(kind):
    odd, p = odd_parameter(kind), parameter((3,))
    p.grad = torch.ones(3)
    for home, buffer in ((odd, torch.zeros(3)), (p, odd), (odd, odd)):
        assert not packing.gather((p,), home, buffer)


@needs_compiled
def test_places_change_when_and_only_when_a_parameter_is_moved():
    params = tuple(parameter(shape) for shape in SHAPES)
    before, before_in_python = packing.addresses(params), in_python(packing.addresses, params)
    assert packing.addresses(params) == before
    params[3].data = params[3].detach().clone()
    assert packing.addresses(params) != before
    assert in_python(packing.addresses, params) != before_in_python


@needs_compiled
def test_arguments_of_other_types_are_left_to_python_or_refused():
    compiled, p = packing._compiled, parameter((3,))
    p.grad = torch.ones(3)
    for function in (compiled.places, compiled.bump, compiled.dense):
        for wrong in ([p], None, 1, (p, None), (p, 1), (p, "x")):
            assert function(wrong) is NotImplemented
    for args in ((), ((p,), p), ([p], p, p), ((p,), None, p), ((p,), p, 1), ((1,), p.detach(), torch.zeros(3))):
        assert compiled.gather(*args) is NotImplemented
    for args in ((), ((p,),), ([p], (p,)), (None, None)):
        assert compiled.same(*args) is NotImplemented


@needs_compiled
def test_no_reference_is_kept_or_lost():
    params = tuple(parameter((3,)) for _ in range(10))
    arena = Arena(params)
    buffer = torch.empty_like(arena.flat)
    for p in params:
        p.grad = torch.ones(3)
    held = [params, arena.flat, buffer, NotImplemented, None, True, False, *params]

    def counts():
        gc.collect()
        return [sys.getrefcount(x) for x in held] + [p.grad._use_count() for p in params]

    def call():
        packing.same(params, params)
        packing.addresses(params)
        packing.bump_versions(params)
        packing.has_dense_gradients(params)
        assert packing.gather(params, arena.flat, buffer)
        assert not packing.gather(params[1:], arena.flat, buffer)
        packing._compiled.places((*params, None))
        packing._compiled.gather((1,), arena.flat, buffer)

    call()
    before, blocks = counts(), sys.getallocatedblocks()
    for _ in range(1000):
        call()
    assert max(abs(a - b) for a, b in zip(counts(), before, strict=True)) < 100
    assert sys.getallocatedblocks() - blocks < 500


@needs_compiled
@pytest.mark.parametrize("name", ["Adam", "AdagradRMSProp", "ClippedAdam", "DCTAdam", "RMSprop", "SGD"])
def test_trajectories_are_the_same_bits_without_the_compiled_loops(name, monkeypatch):
    for seed in range(8):
        schedule = Schedule.random(seed, num_calls=16)
        compiled, _ = run(lambda: getattr(distopt.optim, name)(OPTIMIZERS[name]), schedule, torch.float32)
        with monkeypatch.context() as patch:
            patch.setattr(packing, "_compiled", None)
            python, _ = run(lambda: getattr(distopt.optim, name)(OPTIMIZERS[name]), schedule, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(compiled, python, strict=True))


def test_loops_are_compiled_where_a_compiler_is():
    assert packing._compiled is not None or shutil.which("g++") is None, "is this installed as the Makefile does it?"


@needs_compiled
def test_loops_compiled_for_another_torch_are_not_used(monkeypatch, caplog):
    monkeypatch.setattr(packing._compiled, "TORCH", "1.13.1")
    with caplog.at_level(logging.DEBUG, logger="distopt.optim"):
        assert packing._load_compiled() is None
    assert "compiled for torch 1.13.1" in caplog.text


def test_without_compiled_loops_python_is_used(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "distopt.optim._bulk", None)
    monkeypatch.delattr(distopt.optim, "_bulk", raising=False)
    with caplog.at_level(logging.DEBUG, logger="distopt.optim"):
        assert packing._load_compiled() is None
    assert "in Python" in caplog.text
