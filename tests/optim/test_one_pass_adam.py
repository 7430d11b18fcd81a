"""Adam and AdamW by the compiled kernel: torch's steps, whatever tensors and options they are given."""

import copy

import pytest
import torch

from distopt.optim import packing
from distopt.optim.kernels import AdamHyper, Pieces, compiled_adam_
from distopt.optim.one_pass_adam import OnePassAdam, OnePassAdamW
from tests.optim.trajectories import steps_of

needs_compiled = pytest.mark.skipif(packing._compiled is None, reason="distopt is installed without its compiled loops")
ARGS = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True, "maximize": True},
    {"lr": 0.1, "betas": (0.0, 0.5), "eps": 0.1},
    {"lr": 0.1, "foreach": True},
    {"lr": torch.tensor(0.1)},
    {"lr": 0.1, "capturable": False, "differentiable": False, "fused": False},
]
PAIRS = [(OnePassAdam, torch.optim.Adam), (OnePassAdamW, torch.optim.AdamW)]


@pytest.mark.parametrize("args", ARGS, ids=str)
@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_steps_equal_those_of_torch(ours, torchs, args, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    expected = steps_of(torchs, args, dtype)
    torch.testing.assert_close(steps_of(ours, args, dtype), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
@pytest.mark.parametrize("wide", [False, True])
def test_state_is_that_of_torch_and_either_resumes_from_the_other(ours, torchs, wide):
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if wide else default)
    try:
        states = []
        for kind, other in ((ours, torchs), (torchs, ours)):
            p = torch.nn.Parameter(torch.linspace(-1, 1, 7))
            optimizer = kind([p], lr=0.1, amsgrad=True)
            for step in range(4):
                if step == 2:
                    optimizer, saved = other([p], lr=0.1, amsgrad=True), copy.deepcopy(optimizer.state_dict())
                    optimizer.load_state_dict(saved)
                p.grad = torch.linspace(1, -2, 7).sin() + step
                optimizer.step()
            states.append((p.detach(), optimizer.state_dict()))
        torch.testing.assert_close(*states)
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_closure_is_called_and_a_sparse_gradient_is_refused_as_in_torch(ours, torchs):
    p = torch.nn.Parameter(torch.ones(3))
    assert ours([p]).step(lambda: 5.0) == 5.0
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        ours([p]).step()


def test_tensors_out_of_the_ordinary_do_not_decide_how_the_others_are_stepped():
    def stepped(strange):
        params = [torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(3)]
        if strange:
            params[1] = torch.nn.Parameter(params[1].detach().t())
        optimizer = OnePassAdam(params, lr=0.1)
        for step in range(5):
            for p in params:
                gradient = torch.linspace(1, -2, 12).view(3, 4).sin() + step
                p.grad = gradient.t() if p.shape == (4, 3) else gradient
            optimizer.step()
        return params, optimizer

    (plain, _), (strange, optimizer) = stepped(False), stepped(True)
    assert torch.equal(plain[0], strange[0]) and torch.equal(plain[2], strange[2])
    torch.testing.assert_close(plain[1], strange[1].t())
    assert {state["step"].item() for state in optimizer.state.values()} == {5}


@needs_compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_pyro", [False, True])
def test_an_element_becomes_the_same_wherever_it_lies_and_however_many_threads_there_are(dtype, is_pyro):
    generator = torch.Generator().manual_seed(0)
    numels = [*range(40), 100_003]
    hyper = AdamHyper(0.9, 0.999, 1e-8, 0.1, is_pyro=is_pyro)
    tensors = [[torch.rand(n, generator=generator, dtype=dtype) for n in numels] for _ in range(5)]
    pieces = Pieces(numels, [float(1 + n % 9) for n in numels], [0.1 + n % 5 for n in numels])
    flat = [[torch.cat(each)] for each in tensors]
    threads = torch.get_num_threads()
    assert not compiled_adam_(tuple(flat), pieces, hyper)
    torch.set_num_threads(1)
    try:
        assert not compiled_adam_(tuple(tensors), pieces, hyper)
    finally:
        torch.set_num_threads(threads)
    for listed, [joined] in zip(tensors, flat, strict=True):
        assert torch.equal(torch.cat(listed), joined)


@needs_compiled
def test_kernel_refuses_what_does_not_fit_and_changes_nothing():
    def call(numels, size=4, dtype=torch.float32):
        tensors = tuple([torch.ones(4)] for _ in range(4))
        before = [t[0].clone() for t in tensors]
        pieces = (numels, [1.0] * len(numels), [0.1] * len(numels))
        with_largest = (*tensors, [torch.ones(size, dtype=dtype)])
        result = packing._compiled.adam(with_largest, pieces, 0.9, 0.99, 1e-8, 0.0, False, False, False)
        assert all(torch.equal(t[0], b) for t, b in zip(tensors, before, strict=True))
        return result

    for numels in ([3], [5], [2, 1], [2, 3], [-1, 5], []):
        assert call(numels) is NotImplemented
    assert call([4], size=5) is NotImplemented
    assert call([4], dtype=torch.float64) is NotImplemented
    with pytest.raises(TypeError):
        call(["four"])
    nan = tuple([torch.full((1,), torch.nan)] for _ in range(5))
    assert packing._compiled.adam(nan, ([1], [1.0], [0.1]), 0.9, 0.99, 1e-8, 0.0, False, False, False) is None
    assert nan[0][0].isnan().all() and nan[4][0].isnan().all()
