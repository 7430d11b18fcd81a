"""This rank's gradients on their way into a reduction, and the reduced ones on their way out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pyro
import pytest
import torch
from pyro.infer.util import zero_grads
from torch import Tensor, nn

from distopt.backends import current
from distopt.optim import (
    SGD,
    Adam,
    DistributedOptimizer,
    ReduceOptions,
)
from distopt.optim.packing import FlatGradients
from distopt.reduce.gradients import (
    BucketReader,
    DroppedGradients,
    ReducedGradients,
    collect_gradients,
    move_out_of_buckets_,
)
from distopt.reduce.layout import AVERAGE_PREFIX, LARGE_NUMEL, Layout, ParamSpec
from distopt.reduce.messages import NUM_SLOTS, read_summary
from distopt.reduce.running_averages import RunningAverages
from distopt.sharding import LocalParameter, PlateShard, mark_local
from tests.reduce.steps import Values, unconstrained
from tests.workers import Ranks

Clear = Callable[[Iterable[Tensor]], None]


def _zero_in_place(params: Iterable[Tensor]) -> None:
    for param in params:
        if param.grad is not None:
            param.grad.zero_()


def _train_while_others_have_new_parameters(optim: DistributedOptimizer, clear: Clear, shapes: dict[str, int]) -> None:
    """Six real backward passes; at step 3 the last rank, at step 4 rank 0 brings a new parameter."""
    rank, size = current().rank, current().world_size
    expected = dict.fromkeys(shapes, 0.0)
    for step in range(6):
        names = dict(shapes)
        if (step, rank) in ((3, size - 1), (4, 0)):
            names[f"late{step}"] = 10
        params = {name: pyro.param(name, torch.zeros(numel)).unconstrained() for name, numel in names.items()}
        loss = sum(param.sum() * ((rank + 1) * (step + 1)) for param in params.values())
        assert isinstance(loss, Tensor)
        loss.backward()  # type: ignore[no-untyped-call]
        optim(params.values())
        clear(params.values())
        for name in shapes:
            expected[name] -= (size + 1) / 2 * (step + 1)
            assert unconstrained(name).eq(expected[name]).all(), (name, step)
    assert unconstrained("late3").eq(-4.0).all()
    assert unconstrained("late4").eq(-5.0 / size).all()


def _run_gradients_survive_a_round_that_is_made_again() -> Values:
    """However they are cleared, in one bucket and in several large ones: the optimizer leaves views of its buckets."""
    shapes = {"bias": 7, "large": 40_000, "larger": 600_000, "last": 700_000}
    for clear_of in (lambda _: zero_grads, lambda _: _zero_in_place, lambda optim: optim.zero_grad):
        for bucket_mib in (25.0, 3.0):
            pyro.clear_param_store()
            optim = DistributedOptimizer(SGD({"lr": 1.0}), reduce=ReduceOptions(bucket_mib=bucket_mib))
            _train_while_others_have_new_parameters(optim, clear_of(optim), shapes)
            assert optim.reducer.layout.control_first == (bucket_mib == 3.0)
    return {"bias": unconstrained("bias").tolist()}


def _run_dropped_gradients_count_as_zero() -> Values:
    """A large parameter that `zero_grad` has cleared and backward does not reach is stepped by zeros, as Pyro does."""
    optim = DistributedOptimizer(Adam({"lr": 0.1}))
    params = {name: pyro.param(name, torch.zeros(40_000)).unconstrained() for name in ("always", "once", "never")}
    for step in range(3):
        (params["always"].sum() + (params["once"].sum() if step == 0 else 0.0)).backward()
        optim(params.values())
        optim.zero_grad(params.values())
    state = optim.get_state()
    assert state["always"]["state"][0]["step"] == state["once"]["state"][0]["step"] == 3
    assert "never" not in state or not state["never"]["state"]
    return {name: unconstrained(name)[:3].tolist() for name in params}


def _run_a_model_is_cast_between_steps() -> Values:
    """As `module.double()` and `module.bfloat16()` do: the parameters are the same objects, of another dtype."""
    values: Values = {}
    for dtype, num_cast in product((torch.float64, torch.bfloat16), (1, 2)):  # the last layer alone, or both
        results = []
        for make in (DistributedOptimizer, lambda optim: optim):
            pyro.clear_param_store()
            net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
            for param in net.parameters():
                nn.init.constant_(param, param.dim() - 1)
            pyro.module("net", net)
            optim = make(SGD({"lr": 0.03125, "momentum": 0.5}))
            for step in range(6):
                if step == 3:
                    net[2 - num_cast :].to(dtype)
                x = torch.ones(3) / 3  # equal on all ranks, so that their mean is each one's
                net.zero_grad()
                for layer in net:
                    x = layer(x.to(layer.weight.dtype))
                x.square().sum().backward()
                optim(list(net.parameters()))
            results.append({name: param.tolist() for name, param in net.named_parameters()})
            assert net[1].weight.dtype is dtype and (net[0].weight.dtype is dtype) == (num_cast == 2)
        assert results[0] == results[1]
        values[f"{dtype} {num_cast}"] = results[0]
    return values


BODIES = [
    _run_a_model_is_cast_between_steps,
    _run_gradients_survive_a_round_that_is_made_again,
    _run_dropped_gradients_count_as_zero,
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__.removeprefix("_run_"))
def test_gradients_on_every_backend(ranks: Ranks, body: Callable[[], Any]) -> None:
    ranks.run_alike(body)


def layout_of(*names: str, sparse: tuple[str, ...] = ()) -> Layout:
    """Returns the layout of parameters in Pyro's store, as an agreement builds it."""
    params = {name: pyro.param(name).unconstrained() for name in names}
    specs = {n: ParamSpec(n, tuple(p.shape), p.dtype, "cpu", n in sparse, "") for n, p in params.items()}
    return Layout(specs, params, bucket_mib=25.0, control_device=torch.device("cpu"))


def param_with_gradient(name: str, gradient: Tensor) -> Tensor:
    param = pyro.param(name, torch.zeros(gradient.shape, dtype=gradient.dtype)).unconstrained()
    param.grad = gradient
    return param


def test_gradients_of_all_known_parameters_are_complete() -> None:
    x, y = param_with_gradient("x", torch.ones(2)), param_with_gradient("y", torch.ones(3))
    local = collect_gradients({y, x}, layout_of("x", "y"), DroppedGradients(), RunningAverages())
    assert local.complete and local.addresses is not None and not local.changes
    assert [gradient is param.grad for gradient, param in zip(local.gradients, (x, y), strict=True)] == [True, True]


def test_parameters_that_are_new_replaced_or_without_gradient_are_told_apart() -> None:
    x, y = param_with_gradient("x", torch.ones(2)), param_with_gradient("y", torch.ones(3))
    layout = layout_of("x", "y")
    y.grad = None
    new = param_with_gradient("new", torch.ones(1))
    local = collect_gradients([x, y, new], layout, DroppedGradients(), RunningAverages())
    assert not local.complete and list(local.changes) == ["new"]
    assert local.gradients[0] is x.grad and local.gradients[1] is None

    pyro.get_param_store()["x"] = torch.full((2,), 5.0)
    replaced = param_with_gradient("x", torch.ones(2))
    local = collect_gradients([replaced, y], layout, DroppedGradients(), RunningAverages())
    assert list(local.changes) == ["x"]


def test_known_parameters_are_complete_beside_new_ones() -> None:
    x, y = param_with_gradient("x", torch.ones(2)), param_with_gradient("y", torch.ones(3))
    layout = layout_of("x", "y")
    new, other = param_with_gradient("new", torch.ones(1)), param_with_gradient("z", torch.ones(4))
    local = collect_gradients([new, y, other, x], layout, DroppedGradients(), RunningAverages())
    assert local.complete and local.addresses is not None
    assert [gradient is param.grad for gradient, param in zip(local.gradients, (x, y), strict=True)] == [True, True]
    assert {name: param for name, (param, _) in local.changes.items()} == {"new": new, "z": other}

    average = pyro.param(f"{AVERAGE_PREFIX}x", torch.zeros(1)).unconstrained()
    local = collect_gradients([x, average, y], layout, DroppedGradients(), RunningAverages())
    assert list(local.changes) == [f"{AVERAGE_PREFIX}x"] and local.complete


def test_parameter_that_is_given_twice_does_not_stand_for_one_that_is_not_given() -> None:
    x, y = param_with_gradient("x", torch.ones(2)), param_with_gradient("y", torch.ones(3))
    local = collect_gradients([x, x], layout_of("x", "y"), DroppedGradients(), RunningAverages())
    assert not local.complete
    assert local.gradients[0] is x.grad and local.gradients[1] is None
    assert y.grad is not None


def test_parameter_outside_of_the_store_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"a parameter of shape \(4,\) is not in Pyro's parameter store"):
        collect_gradients([torch.zeros(4, requires_grad=True)], layout_of(), DroppedGradients(), RunningAverages())


def test_sparse_parameter_whose_gradient_became_dense_is_a_change() -> None:
    table = param_with_gradient("table", torch.ones(4, 2).to_sparse(1))
    layout = layout_of("table", sparse=("table",))
    assert not collect_gradients([table], layout, DroppedGradients(), RunningAverages()).changes
    table.grad = torch.ones(4, 2)
    assert list(collect_gradients([table], layout, DroppedGradients(), RunningAverages()).changes) == ["table"]


def test_rank_local_gradients_come_by_name_in_whatever_order_a_set_has_its_parameters() -> None:
    names = [f"z{index}" for index in range(5)]
    params = [param_with_gradient(name, torch.ones(2)) for name in names]
    for param in params:
        mark_local(param, LocalParameter(PlateShard("rows", num_shards=1), (2,), 0))
    for order in ([4, 2, 0, 1, 3], [0, 1, 2, 3, 4]):
        local = collect_gradients(
            [params[index] for index in order], layout_of(), DroppedGradients(), RunningAverages()
        )
        assert [name for name, _, _ in local.rank_local] == names


def test_rank_local_gradients_are_scaled_with_the_shared_ones() -> None:
    x = param_with_gradient("x", torch.ones(2))
    z = param_with_gradient("z", torch.tensor([3.0, 4.0]))
    mark_local(z, LocalParameter(PlateShard("rows", num_shards=4), (2,), 0))
    for num_summed, scale in ((1, 0.25), (4, 1.0)):
        z.grad = torch.tensor([3.0, 4.0])
        local = collect_gradients([x, z], layout_of("x"), DroppedGradients(), RunningAverages())
        local.num_summed = num_summed
        assert local.complete and [name for name, _, _ in local.rank_local] == ["z"]
        assert local.rank_local_square() == pytest.approx((5.0 * scale) ** 2)
        ((_, _, scaled),) = local.scale_rank_local_()
        torch.testing.assert_close(scaled, scale * torch.tensor([3.0, 4.0]))


def test_gradient_that_lies_in_a_bucket_is_moved_out_and_others_are_not() -> None:
    x, y = param_with_gradient("x", torch.ones(2)), param_with_gradient("y", torch.ones(2))
    layout = layout_of("x", "y")
    x.grad = layout.buckets[0].views[0]
    outside = y.grad
    local = collect_gradients([x, y], layout, DroppedGradients(), RunningAverages())
    move_out_of_buckets_(layout, local)
    assert x.grad is not None and x.grad.data_ptr() != layout.buckets[0].views[0].data_ptr()
    assert local.gradients[0] is x.grad and y.grad is outside


def test_bucket_reader_hands_out_the_same_tuples_for_the_same_pattern() -> None:
    for name, numel in (("a", 2), ("b", 3), ("c", 1)):
        param_with_gradient(name, torch.ones(numel))
    layout = layout_of("a", "b", "c")
    reader = BucketReader(layout)
    layout.buckets[0].flat.copy_(torch.arange(6.0))
    (whole,), _ = reader.read([2.0, 1.0, 1.0])
    assert whole.names == ("a", "b", "c") and whole.buffer is layout.buckets[0].flat
    assert reader.read([1.0, 1.0, 1.0])[0][0].params is whole.params

    (packed,), loose = reader.read([1.0, 0.0, 2.0])
    assert (packed.names, packed.buffer.tolist(), loose) == (("a", "c"), [0.0, 1.0, 5.0], [])
    assert reader.read([3.0, 0.0, 1.0])[0][0].params is packed.params


def test_norm_is_that_of_dense_loose_and_sparse_gradients_together() -> None:
    param = torch.zeros(2)
    indices = torch.tensor([[0, 0]])
    sparse = torch.sparse_coo_tensor(indices, torch.tensor([1.0, 1.0]), (2,), check_invariants=True)
    summary = read_summary(torch.zeros(NUM_SLOTS), 1)
    reduced = ReducedGradients(
        summary,
        dense=[FlatGradients(("a",), (param,), torch.tensor([2.0, 4.0]))],
        loose=[("b", param, sparse), ("c", param, torch.tensor([1.0 + 0.0j]))],
        rank_local=[("d", param, torch.tensor([100.0]))],
    )
    assert reduced.norm() == 5.0


def test_small_gradients_are_zeroed_in_place_and_large_ones_are_dropped() -> None:
    small, large = param_with_gradient("small", torch.ones(3)), param_with_gradient("large", torch.ones(LARGE_NUMEL))
    never = pyro.param("never", torch.zeros(LARGE_NUMEL)).unconstrained()
    before, dropped = small.grad, DroppedGradients()
    dropped.zero_([small, large, never])
    assert small.grad is before and small.grad is not None and small.grad.eq(0).all()
    assert large.grad is None
    dropped.restore([small, large, never])
    assert large.grad is not None and large.grad.eq(0).all() and never.grad is None
