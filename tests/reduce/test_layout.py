"""In which buffers gradients are reduced: the same on all ranks, and without an effect on the sums."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distopt.backends import current
from distopt.optim import (
    SGD,
    DistributedOptimizer,
    ReduceOptions,
)
from distopt.reduce.layout import AVERAGE_PREFIX, Bucket, Layout, ParamSpec
from distopt.reduce.messages import NUM_SLOTS
from tests.reduce.steps import Values, by_rank, random_values, step_with, store_values, unconstrained
from tests.workers import Ranks


def _run_buckets_groups_and_factors_change_nothing() -> Values:
    """Many buckets, groups by name, tensor and number, a factor before the sum: equal to the plain mean."""
    rank, size = current().rank, current().world_size
    options: list[dict[str, object]] = [
        {},
        {"bucket_mib": 0.0001},
        {"groups": [["p3", "p1"], ["p0"]]},
        {"groups": 2},
        {"gradient_predivide_factor": 4.0},
        {"overlap": True, "bucket_mib": 0.0001},
    ]
    values = []
    for option in options:
        pyro.clear_param_store()
        optim = DistributedOptimizer(SGD({"lr": 1.0}), reduce=ReduceOptions(**option))  # type: ignore[arg-type]
        for i in range(5):
            pyro.param(f"p{i}", torch.zeros(10 * i + 1))
        for step in range(3):
            touched = [i for i in range(5) if (i + step + rank) % 3]
            step_with(optim, {f"p{i}": by_rank(10 * step + i, 10 * i + 1)[rank] for i in touched}, loss=1.0)
        values.append(store_values())
    for other in values[1:]:
        for name, value in other.items():
            torch.testing.assert_close(torch.tensor(value), torch.tensor(values[0][name]))
    total = DistributedOptimizer(SGD({"lr": 1.0}), reduce=ReduceOptions(op="sum"))
    pyro.param("sum", torch.zeros(2))
    step_with(total, {"sum": torch.ones(2)})
    assert unconstrained("sum").eq(-size).all()
    return values[1]


def _run_kinds_of_tensors_mix() -> Values:
    """float64, 16 bits, complex, scalars and empty tensors in one model."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    kinds = {
        "double": torch.zeros(3, dtype=torch.float64),
        "half": torch.zeros(4, dtype=torch.bfloat16),
        "complex": torch.zeros(2, 2, dtype=torch.complex64),
        "scalar": torch.zeros(()),
        "empty": torch.zeros(0, 3),
        "single": torch.zeros(5, 1),
        "strided": torch.zeros(3, 4),
    }
    for name, value in kinds.items():
        pyro.param(name, value)
    for step in range(3):
        gradients = {
            name: torch.full_like(value, rank + 1)
            for name, value in kinds.items()
            if not (step == 1 and name == "single")
        }
        gradients["complex"] = torch.full_like(kinds["complex"], complex(rank + 1, -rank))
        gradients["strided"] = torch.full((4, 3), float(rank + 1)).t()
        step_with(optim, gradients)
    mean = (size + 1) / 2
    for name in kinds:
        steps = 2 if name == "single" else 3
        expected = complex(-3 * mean, 3 * (mean - 1)) if name == "complex" else -steps * mean
        assert unconstrained(name).eq(expected).all(), name
    return store_values()


BODIES = [
    _run_buckets_groups_and_factors_change_nothing,
    _run_kinds_of_tensors_mix,
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__.removeprefix("_run_"))
def test_buckets_on_every_backend(ranks: Ranks, body: Callable[[], Any]) -> None:
    ranks.run_alike(body)


def specs_of(**shapes: tuple[int, ...]) -> dict[str, ParamSpec]:
    return {name: ParamSpec(name, shape, torch.float32, "cpu", False, "") for name, shape in shapes.items()}


def layout_of(specs: dict[str, ParamSpec], **options: Any) -> Layout:
    params = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    return Layout(specs, params, **({"bucket_mib": 25.0, "control_device": torch.device("cpu")} | options))


def test_buckets_are_filled_in_order_of_names_up_to_their_size() -> None:
    specs = specs_of(c=(100,), a=(100,), b=(100,), d=(300,))
    layout = layout_of(specs, bucket_mib=800 / 2**20)
    assert layout.names == ("a", "b", "c", "d")
    assert [bucket.names for bucket in layout.buckets] == [("a", "b"), ("c",), ("d",)]
    assert layout.buckets[0].slots is not None and layout.slots.numel() == NUM_SLOTS + 4


def test_groups_of_names_share_a_bucket_whatever_their_size() -> None:
    specs = specs_of(a=(100,), b=(100,), c=(100,), d=(100,))
    layout = layout_of(specs, bucket_mib=400 / 2**20, groups=(("d", "a"),))
    assert [bucket.names for bucket in layout.buckets] == [("a", "d"), ("b",), ("c",)]
    assert [bucket.names for bucket in layout_of(specs, groups=2).buckets] == [("a", "b"), ("c", "d")]


def test_control_slots_are_in_the_first_bucket_whose_sums_are_exact() -> None:
    specs = specs_of(b=(3,)) | {"a": ParamSpec("a", (3,), torch.bfloat16, "cpu", False, "")}
    assert [bucket.names for bucket in layout_of(specs).buckets] == [("b",), ("a",)]
    alone = layout_of(specs, carries_control=False)
    assert [bucket.names for bucket in alone.buckets] == [(), ("a",), ("b",)]
    assert alone.buckets[0].slots is alone.slots


def test_control_slots_of_a_large_model_come_first_and_alone() -> None:
    layout = layout_of(specs_of(a=(800_000,), b=(800_000,)), bucket_mib=4.0)
    assert layout.control_first and [bucket.names for bucket in layout.buckets] == [(), ("a",), ("b",)]
    assert not layout_of(specs_of(a=(800_000,), b=(800_000,))).control_first  # one bucket


@pytest.mark.parametrize("shapes", [[(3,), (2,), (0,)], [(4, 2), (1, 2)], [(2, 3), (), (0, 5), (7,)], [(40_000,)]])
@pytest.mark.parametrize("complete", [True, False])
def test_filled_bucket_holds_the_scaled_gradients_side_by_side(shapes: list[tuple[int, ...]], complete: bool) -> None:
    layout = layout_of(
        {f"p{i}": ParamSpec(f"p{i}", shape, torch.float64, "cpu", False, "") for i, shape in enumerate(shapes)}
    )
    gradients: list[Tensor | None] = [random_values(i, *shape, dtype=torch.float64) for i, shape in enumerate(shapes)]
    if not complete:
        gradients[0] = None
    (bucket,) = layout.buckets
    bucket.buffer.fill_(float("nan"))
    bucket.fill_(gradients, 0.25, complete=complete)
    flat = [torch.zeros(shape) if g is None else 0.25 * g for shape, g in zip(shapes, gradients, strict=True)]
    torch.testing.assert_close(bucket.flat, torch.cat([each.double().reshape(-1) for each in flat]), rtol=0, atol=0)
    bucket.fill_(None, 0.25)
    assert bucket.buffer.eq(0).all()


def test_complex_gradients_are_pairs_of_real_numbers_in_their_bucket() -> None:
    layout = layout_of({"z": ParamSpec("z", (2, 2), torch.complex64, "cpu", False, "")})
    (bucket,) = layout.buckets
    assert (bucket.flat.dtype, bucket.flat.numel()) == (torch.float32, 8)
    gradient = torch.complex(random_values(1, 2, 2), random_values(2, 2, 2))
    bucket.fill_([gradient], 1.0, complete=True)
    assert torch.equal(bucket.views[0], gradient)
    assert torch.equal(bucket.flat.view(2, 2, 2), torch.view_as_real(gradient))


def test_layout_is_the_same_in_whatever_order_parameters_have_come() -> None:
    names = ["b", f"{AVERAGE_PREFIX}x", "a", f"{AVERAGE_PREFIX}", "z", "__a", "a$$$b", f"{AVERAGE_PREFIX[:-1]}"]
    layouts = [layout_of(specs_of(**dict.fromkeys(order, (2,)))) for order in (names, names[::-1], sorted(names))]
    assert {layout.names for layout in layouts} == {tuple(sorted(names))}
    for layout in layouts:
        assert [layout.names[index] for index in layout.averages] == [AVERAGE_PREFIX, f"{AVERAGE_PREFIX}x"]
        assert [layout.index[id(param)] for param in layout.params] == list(range(len(names)))
        assert all(map(layout.has_name, names))
        assert not any(map(layout.has_name, ("", "c", "zz", "__")))


def test_bucket_tells_addresses_that_it_holds_from_those_around_it() -> None:
    (bucket,) = layout_of(specs_of(a=(3,), b=(0,), c=(2, 2))).buckets
    first = bucket.flat.data_ptr()
    assert bucket.addresses == [first, -1, first + 12]
    assert bucket.may_hold([0, first + 12]) and bucket.may_hold([first])
    assert not bucket.may_hold([0, first - 4, first + 28])
    assert bucket.holds(bucket.addresses) and not bucket.holds([first + 4, -1, first + 12])


@given(
    numels=st.lists(st.tuples(st.integers(0, 9), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))),
    ends=st.lists(st.integers(0, 12), max_size=4),
    carries_control=st.booleans(),
    bucket_mib=st.sampled_from([25.0, 30 / 2**20]),
)
@settings(deadline=None)
def test_extended_layout_has_what_one_made_at_once_has_but_for_the_order(
    numels: list[tuple[int, torch.dtype]], ends: list[int], carries_control: bool, bucket_mib: float
) -> None:
    named = {f"p{i * 7919 % 101:03d}": kind for i, kind in enumerate(numels)}
    specs = {name: ParamSpec(name, (n,), dtype, "cpu", False, "") for name, (n, dtype) in named.items()}
    params = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    options: dict[str, Any] = {"carries_control": carries_control, "control_device": torch.device("cpu")}
    first = 1 + (ends[0] if ends else 0)
    layout = Layout(dict(islice(specs.items(), first)), params, bucket_mib=bucket_mib, **options)
    for end in sorted(ends):
        known = dict.fromkeys(layout.names)
        new = {name: specs[name] for name in islice(specs, end) if name not in known}
        extended = layout.extended({name: specs[name] for name in (*known, *new)}, params)
        if extended is None:
            assert not layout.names
            return
        assert extended.names == (*layout.names, *new)
        layout = extended

    assert layout.specs == tuple(map(specs.__getitem__, layout.names))
    assert all(layout.params[layout.index[id(params[name])]] is params[name] for name in layout.names)
    assert all(map(layout.has_name, layout.names)) and not layout.has_name("other")
    assert layout.slots.numel() == NUM_SLOTS + len(layout.names)
    assert sorted(index for bucket in layout.buckets for index in bucket.indices) == list(range(len(layout.names)))
    gradients = [random_values(i, spec.numel).to(spec.dtype) for i, spec in enumerate(layout.specs)]
    for bucket in layout.buckets:
        alone = Bucket(bucket.indices, bucket.specs, torch.device("cpu"))
        assert len({spec.dtype for spec in bucket.specs}) <= 1
        assert bucket.flat.nbytes <= bucket_mib * 2**20 or len(bucket.specs) == 1
        bucket.fill_(gradients, 0.5, complete=True)
        alone.fill_(gradients, 0.5, complete=True)
        assert torch.equal(bucket.flat, alone.flat)
        for attribute in ("names", "offsets", "max_numel", "is_large", "is_complex"):
            assert getattr(bucket, attribute) == getattr(alone, attribute)
        assert [view.shape for view in bucket.views] == [view.shape for view in alone.views]
        assert [address - bucket.flat.data_ptr() for address in bucket.addresses if address >= 0] == [
            address - alone.flat.data_ptr() for address in alone.addresses if address >= 0
        ]


def test_extended_layout_takes_over_sums_of_every_kind() -> None:
    dtypes = {"m": torch.float32, "n": torch.float64, "a": torch.complex64, "b": torch.float32, "z": torch.float32}
    specs = {name: ParamSpec(name, (2,), dtype, "cpu", False, "") for name, dtype in dtypes.items()}
    before = layout_of(dict(islice(specs.items(), 2)))
    params = {name: torch.zeros(2, dtype=dtype) for name, dtype in dtypes.items()}
    layout = before.extended(specs, params)
    assert layout is not None
    new = layout_of({name: specs[name] for name in ("a", "b", "z")})
    for each in (before, new):
        for bucket in each.buckets:
            for name, view in zip(bucket.names, bucket.views, strict=True):
                view.fill_(ord(name))
    layout.take_sums_([bucket.flat for bucket in before.buckets], new)
    sums = {name: view for bucket in layout.buckets for name, view in zip(bucket.names, bucket.views, strict=True)}
    assert all(torch.equal(sums[name], torch.full((2,), ord(name), dtype=dtypes[name])) for name in specs)
