"""Rows of state in tables and columns come back as they were, and what does not fit together is refused."""

from __future__ import annotations

import random

import pytest
import torch

from distopt.checkpoint.columns import tabulate, untabulate
from distopt.checkpoint.errors import CorruptCheckpointError
from distopt.checkpoint.reader import read_manifest
from distopt.checkpoint.statefile import StateReader
from tests.checkpoint.states import assert_equal, commit_state


@pytest.mark.parametrize("seed", range(5))
def test_rows_of_every_kind_when_put_into_tables_come_back_in_their_order(seed, tmp_path):
    chance, keys = random.Random(seed), "abcd"
    kinds = [
        lambda: torch.randn(3), lambda: torch.tensor(1.0), lambda: torch.randn(70, 70), lambda: 1, lambda: 1.0,
        lambda: True, lambda: None, lambda: [torch.zeros(2)], lambda: {"x": [1, (2, 3)]},
    ]  # fmt: skip
    patterns = [[(key, chance.choice(kinds)) for key in chance.sample(keys, chance.randint(0, 4))] for _ in range(6)]
    rows = {f"row {index}": {key: make() for key, make in chance.choice(patterns)} for index in range(60)}
    rows |= {"no dict": torch.zeros(2), "nothing": None}
    tables = []
    storage, folder = commit_state(tmp_path, {"rows": tabulate(rows, tables), "tables": tables})
    state = StateReader(storage, folder, read_manifest(storage, folder), "replicated").load()
    assert_equal(untabulate(state["rows"], state["tables"]), rows)


@pytest.mark.parametrize("damage", ["too few", "too many", "no table", "no column"])
def test_tables_that_do_not_fit_their_rows_are_refused(damage):
    tables = []
    table = tabulate({name: {"value": torch.zeros(2)} for name in "abc"}, tables)
    if damage == "too few":
        tables[0]["columns"]["value"].pop()
    elif damage == "too many":
        tables[0]["columns"]["value"].append(torch.zeros(2))
    elif damage == "no table":
        tables.clear()
    else:
        tables[0]["columns"].clear()
    with pytest.raises(CorruptCheckpointError, match="table of state"):
        untabulate(table, tables)
