"""Gradients are clipped as torch clips them."""

import math
from random import Random

import pyro
import pytest
import torch

import distopt.optim
from distopt.optim.clipping import (
    Clip,
    Gradients,
    clip_by_global_norm_,
    clip_by_norm_,
    clip_each_,
    clip_segments_,
    global_norm,
)


def test_global_norm_is_one_norm_over_all_parameters():
    shapes = [(3,), (2, 2), (50_000,)]
    params = [pyro.param(f"x{i}", torch.zeros(s)).unconstrained() for i, s in enumerate(shapes)]
    twins = [torch.zeros(s, requires_grad=True) for s in shapes]
    for p, q in zip(params, twins, strict=True):
        p.grad = torch.randn(p.shape)
        q.grad = p.grad.clone()
    torch.nn.utils.clip_grad_norm_(twins, 0.7)
    distopt.optim.SGD({"lr": 1.0}, {"global_norm": 0.7})(params)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(-p.detach(), q.grad, rtol=1e-5, atol=1e-8)


NUMELS = [3, 0, 1, 10]


def gradients(dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) * 10**i for i, n in enumerate(NUMELS)]


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 30.0, 1e9])
def test_each_segment_is_clipped_by_its_norm_as_torch_clips_a_parameter(max_norm):
    params = [torch.zeros_like(g, requires_grad=True) for g in gradients()]
    for p, g in zip(params, gradients(), strict=True):
        p.grad = g
        torch.nn.utils.clip_grad_norm_([p], max_norm)
    buffer = torch.cat(gradients())
    changed = clip_by_norm_(buffer, NUMELS, max_norm)
    torch.testing.assert_close(buffer, torch.cat([p.grad for p in params]))
    assert changed == (max_norm < 1e9)


@pytest.mark.parametrize("clip", [Clip(clip_norm=2.0), Clip(clip_value=0.3), Clip(clip_norm=2.0, clip_value=0.3)])
def test_segments_are_clipped_as_single_gradients_are(clip):
    each, buffer = gradients(), torch.cat(gradients())
    clip_each_(each, clip)
    assert clip_segments_(buffer, NUMELS, clip)
    torch.testing.assert_close(buffer, torch.cat(each))
    assert not clip_segments_(torch.zeros(0), [0], clip)
    assert not clip_segments_(torch.full((14,), 1e-3), NUMELS, clip)


def test_sparse_gradient_is_clipped_in_its_values():
    dense = torch.tensor([0.0, 3.0, 4.0])
    sparse = dense.to_sparse()
    clip_each_([sparse], Clip(clip_norm=1.0))
    torch.testing.assert_close(sparse.to_dense(), dense / 5.0, rtol=1e-5, atol=0)


@torch.sparse.check_sparse_tensor_invariants(enable=True)
def test_global_norm_counts_sparse_and_complex_gradients():
    sparse = torch.sparse_coo_tensor([[1, 1]], [1.0, 2.0], (4,))  # not coalesced: the element is 3
    assert global_norm([Gradients(sparse), Gradients(torch.tensor([0.0 + 4.0j]))]) == 5.0
    assert global_norm([]) == 0.0
    assert global_norm([Gradients(torch.full((2,), 1e200, dtype=torch.float64))]) == math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_order_neighbours_and_threads_change_no_bit_of_the_global_norm(dtype):
    numels = [*range(40), 1000, 65_536, 65_537, 200_003]
    generator = torch.Generator().manual_seed(3)
    each = [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for n in numels]
    expected = float(global_norm(map(Gradients, each)))
    wide = torch.cat(each).to(torch.complex128).abs().square()
    assert expected == pytest.approx(math.sqrt(math.fsum(wide.tolist())), rel=1e-15)
    random, threads = Random(0), torch.get_num_threads()
    for round_ in range(20):
        random.shuffle(each)
        cuts = sorted(random.sample(range(len(each) + 1), 4))
        pieces = [each[a:b] for a, b in zip([0, *cuts], [*cuts, len(each)], strict=True)]
        torch.set_num_threads(1 + round_ % 2)
        norm = global_norm(Gradients(torch.cat([each[0][:0], *p]), [g.numel() for g in p]) for p in pieces)
        torch.set_num_threads(threads)
        assert float(norm) == expected
    rows = torch.randn(60, 7, generator=generator).to(dtype)
    assert global_norm([Gradients(rows)]) == global_norm([Gradients(rows.t().contiguous().t())])


def test_gradients_are_scaled_by_the_norm_that_is_given_instead_of_their_own():
    g = [Gradients(torch.full((2,), 3.0)), Gradients(torch.full((2,), 4.0), [1, 1])]
    assert clip_by_global_norm_(g, 1.0, total=10.0)
    torch.testing.assert_close(torch.cat([each.values for each in g]), torch.tensor([0.3, 0.3, 0.4, 0.4]))
    assert not clip_by_global_norm_(g, 1.0, total=0.5)


@pytest.mark.parametrize(("args", "message"), [({"norm": 1.0}, "unknown key 'norm'"), ({"clip_value": -1.0}, ">= 0")])
def test_limits_that_mean_nothing_are_refused_with_the_name_of_the_parameter(args, message):
    with pytest.raises(ValueError, match=f"'x'.*{message}"):
        Clip.of(args, "x")
