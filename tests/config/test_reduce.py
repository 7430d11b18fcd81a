"""The options of a reduction: what is refused, in one line, in Python and in YAML."""

from __future__ import annotations

import re
from typing import Any

import pytest

from distopt.config import ConfigError, ReduceConfig, ReduceOptions, parse_config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"op": "avg"}, "op='avg' should be 'average', 'sum' or 'adasum'"),
        ({"bucket_mib": -1}, "bucket_mib=-1 should be greater than 0"),
        ({"bucket_mib": float("inf")}, "bucket_mib=inf should be a finite number"),
        ({"power_sgd_rank": 0}, "power_sgd_rank=0 should be greater than or equal to 1"),
        ({"drift_every_steps": -1}, "drift_every_steps=-1 should be greater than or equal to 0"),
        ({"backward_passes_per_step": 0}, "backward_passes_per_step=0 should be greater than or equal to 1"),
        ({"groups": "x"}, "groups: found 'x', expected a number of groups, or lists of names such as [[a, b], [c]]"),
        ({"groups": ["a"], "bucket_mib": 0}, "bucket_mib=0 should be greater than 0; groups: found ['a'], expected"),
        ({"overlap": 1}, "overlap=1 should be a valid boolean"),
        ({"bucket_mb": 8}, "bucket_mb: unknown option of ReduceOptions. Did you mean bucket_mib?"),
        (
            {"op": "sum", "gradient_predivide_factor": 2},
            "gradient_predivide_factor=2 needs op='average', found op='sum'",
        ),
        ({"op": "adasum", "compression": "fp16"}, "op='adasum' needs compression='none', found compression='fp16'"),
        ({"overlap": True, "backward_passes_per_step": 2}, "it needs backward_passes_per_step=1, found 2"),
        ({"overlap": True, "op": "adasum"}, "op='adasum' sends several messages"),
        ({"overlap": True, "compression": "powersgd"}, "compression='powersgd' sends several messages"),
    ],
)
def test_wrong_option_is_one_line_with_its_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        ReduceOptions(**options)
    assert "\n" not in str(raised.value)


def test_several_mistakes_are_all_reported() -> None:
    with pytest.raises(ValueError, match="op='avg' should be .*; bucket_mib=0 should be"):
        ReduceOptions(op="avg", bucket_mib=0)


def test_options_are_frozen_and_hashable_with_groups_as_lists() -> None:
    options = ReduceOptions(groups=[["a", "b"], ["c"]])
    assert options.groups == (("a", "b"), ("c",))
    assert hash(options) == hash(ReduceOptions(groups=(("a", "b"), ("c",))))
    with pytest.raises(ValueError, match="frozen"):
        options.op = "sum"  # type: ignore[misc]


def test_section_of_the_yaml_has_every_option_and_two_more() -> None:
    assert ReduceConfig.model_fields.keys() - ReduceOptions.model_fields.keys() == {"backend", "timeout_s"}
    config = parse_config("name: x\nscript: x.py\nreduce: {groups: [[a], [b, c]], op: sum, backend: mpi}")
    assert isinstance(config.reduce, ReduceOptions)
    assert (config.reduce.groups, config.reduce.op) == ((("a",), ("b", "c")), "sum")


@pytest.mark.parametrize(
    ("reduce", "message"),
    [
        ("op: avg", "reduce.op: found 'avg' (str), expected one of average, sum, adasum. Did you mean average?"),
        (
            "groups: [a]",
            "reduce.groups: found ['a'], expected a number of groups, or lists of names such as [[a, b], [c]]",
        ),
        ("overlap: true, op: adasum", "reduce: op='adasum' sends several messages"),
    ],
)
def test_wrong_option_in_the_yaml_is_reported_by_its_key(reduce: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_config(f"name: x\nscript: x.py\nreduce: {{{reduce}}}")


@pytest.mark.parametrize("key", ["train.num_steps", "checkpoint.every_steps"])
def test_checkpoint_amid_accumulated_gradients_is_refused(key: str) -> None:
    text = "name: x\nscript: x.py\nreduce: {backward_passes_per_step: 4}"
    assert parse_config(text, ["train.num_steps=8", "checkpoint.every_steps=4"]).reduce.backward_passes_per_step == 4
    with pytest.raises(ConfigError, match=f"{key} is 6, expected a multiple of reduce.backward_passes_per_step"):
        parse_config(text, ["train.num_steps=8", "checkpoint.every_steps=4", f"{key}=6"])
