"""Packed parameters stay the user's own tensors, and the compiled loops over them do what those in Python do."""

import copy
import gc
import io
import logging
import shutil
import sys

import numpy as np
import pyro
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import distopt.optim
from distopt.optim import packing
from distopt.optim.groups import ListGroup, PackedGroup
from distopt.optim.packing import Arena, FlatGradients, GradientBuffer, Segments
from tests.optim.trajectories import OPTIMIZERS, SHAPES, Schedule, groups, run, stepped

needs_compiled = pytest.mark.skipif(
    packing._compiled is None,
    reason="the compiled loops are not built (needs a C++ compiler; `python setup.py build_ext --inplace`)",
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
    gathered = packing.gather(params, arena.flat, mine)
    if gathered is None:
        assert set(gradients[: len(params)]) != {"dense"}
        return
    assert gathered == (moved is None) == all(map(arena.holds, range(len(params))))
    theirs = in_python(in_blocks.gather_)
    assert (theirs is not None) is gathered
    if gathered:
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
def test_addresses_change_when_and_only_when_a_parameter_is_moved():
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
    for function in (compiled.addresses, compiled.bump, compiled.dense):
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
        packing._compiled.addresses((*params, None))
        packing._compiled.gather((1,), arena.flat, buffer)

    call()
    before, blocks = counts(), sys.getallocatedblocks()
    for _ in range(1000):
        call()
    assert max(abs(a - b) for a, b in zip(counts(), before, strict=True)) < 100
    assert sys.getallocatedblocks() - blocks < 500


@needs_compiled
@pytest.mark.parametrize("name", ["Adam", "AdagradRMSProp", "ClippedAdam", "DCTAdam", "RMSprop", "SGD", "Adagrad"])
def test_trajectories_are_the_same_without_the_compiled_loops(name, monkeypatch):
    """The same bits but for kinds of Adam, for which there is a kernel among the loops."""
    tolerance = {"rtol": 0, "atol": 0} if name in ("SGD", "Adagrad") else {"rtol": 1e-5, "atol": 1e-6}
    for seed in range(8):
        schedule = Schedule.random(seed, num_calls=16)
        compiled, _ = run(lambda: getattr(distopt.optim, name)(OPTIMIZERS[name]), schedule, torch.float32)
        with monkeypatch.context() as patch:
            patch.setattr(packing, "_compiled", None)
            python, _ = run(lambda: getattr(distopt.optim, name)(OPTIMIZERS[name]), schedule, torch.float32)
        torch.testing.assert_close(compiled, python, **tolerance)


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


@pytest.mark.usefixtures("loops")
def test_saving_or_copying_one_parameter_takes_its_own_bytes_alone():
    params = [pyro.param(f"x{i}", torch.zeros(10)).unconstrained() for i in range(1000)]
    stepped(params)
    assert params[5].untyped_storage().nbytes() == 40
    file = io.BytesIO()
    torch.save(params[5].data, file)
    assert file.tell() < 3_000
    other = copy.deepcopy(params[5])
    with torch.no_grad():
        other.add_(1.0)
    assert not torch.equal(other, params[5])


@pytest.mark.usefixtures("loops")
def test_in_place_changes_by_the_user_are_seen():
    linear = torch.nn.Linear(3, 2)
    pyro.module("net", linear)
    params = list(linear.parameters())
    optim = stepped(params)
    linear.load_state_dict({"weight": torch.zeros(2, 3), "bias": torch.full((2,), 5.0)})
    stepped(params, optim)
    torch.testing.assert_close(linear.weight.detach(), torch.full((2, 3), -0.1))
    torch.testing.assert_close(linear.bias.detach(), torch.full((2,), 4.9))


@pytest.mark.usefixtures("loops")
def test_memory_that_others_see_is_not_moved(tmp_path):
    file = tmp_path / "memory"
    file.write_bytes(bytes(12))
    array = np.zeros(3, dtype=np.float32)
    base = torch.zeros(4)
    shared = torch.zeros(3).share_memory_()
    mapped = torch.from_file(str(file), shared=True, size=3)
    owned = [base[:2], shared, mapped, torch.from_numpy(array), torch.from_numpy(array)]
    held, viewed = torch.zeros(3), torch.zeros(3)
    alias = held.view(3, 1)
    owned += [held, viewed.view(1, 3)]
    params = [pyro.param(f"x{i}", t).unconstrained() for i, t in enumerate(owned)]
    del owned, mapped
    optim = stepped(params)
    assert not groups(optim, PackedGroup)
    assert len(groups(optim, ListGroup)) == 1
    torch.testing.assert_close(base, torch.tensor([-0.1, -0.1, 0.0, 0.0]))
    assert shared.is_shared()
    np.testing.assert_allclose(np.frombuffer(file.read_bytes(), np.float32), -0.1, rtol=1e-5)
    torch.testing.assert_close(alias, torch.full((3, 1), -0.1))
    torch.testing.assert_close(viewed, torch.full((3,), -0.1))
    torch.testing.assert_close(params[3].detach(), params[4].detach(), rtol=0, atol=0)


@pytest.mark.usefixtures("loops")
def test_backward_through_a_stepped_parameter_raises_as_with_torch():
    p = pyro.param("x", torch.ones(3)).unconstrained()
    loss = (p * p).sum()
    optim = stepped([p])
    stepped([p], optim)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("shapes", [[(3,), (5,)], [(2, 3), (4, 3)], [(), ()], [(2,), (2, 1), ()], [(0,), (3,)], []])
def test_segments_hold_tensors_side_by_side_whatever_their_strides(shapes):
    tensors = [torch.randn(shape[::-1]).permute(tuple(range(len(shape) - 1, -1, -1))) for shape in shapes]
    flat = torch.full((sum(t.numel() for t in tensors),), 7.0)
    segments = Segments(flat, shapes)
    segments.copy_(tensors)
    expected = torch.cat([t.reshape(-1) for t in tensors]) if tensors else torch.zeros(0)
    assert torch.equal(flat, expected)
    assert all(torch.equal(view, t) for view, t in zip(segments.views, tensors, strict=True))
    for view in segments.views:
        view.zero_()
    assert not flat.any()


def test_offsets_are_where_each_gradient_starts_and_the_last_one_ends():
    params = tuple(torch.zeros(shape) for shape in [(2, 3), (), (4,)])
    assert FlatGradients(("a", "b", "c"), params, torch.zeros(11)).offsets() == [0, 6, 7, 11]


def test_gradients_that_were_gathered_are_written_back_in_place():
    params = tuple(parameter(shape) for shape in SHAPES)
    gradients = GradientBuffer(Arena(params))
    for p in params:
        p.grad = torch.randn(p.shape)
    before = [p.grad for p in params]
    gradients.gather_().mul_(2.0)
    expected = [2.0 * g for g in before]
    gradients.write_back()
    assert all(p.grad is g for p, g in zip(params, before, strict=True))
    torch.testing.assert_close(before, expected)
