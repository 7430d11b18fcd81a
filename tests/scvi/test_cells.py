"""Cells of all ranks are on exactly one of them, and a category has the same code everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

import distopt
from distopt.backends import current
from distopt.scvi import align_, cell_numbers, gather_cells, split
from distopt.scvi.posterior import _in_order_of
from tests.scvi.table import Table, table
from tests.workers import world


def categories(obs: pd.DataFrame) -> dict[str, list[Any]]:
    return {name: list(obs[name].cat.categories) for name in obs if hasattr(obs[name], "cat")}


def _run_split() -> dict[str, Any]:
    rank = current().rank
    everything = table()
    seen: dict[str, Any] = {}
    for name, rows in {
        "block": None,
        "positions": [[5, 0], [1, 2, 3, 4, 6]][rank],
        "names": [["cell 6"], ["cell 4", "cell 2", "cell 0", "cell 1", "cell 5", "cell 3"]][rank],
        "mask": np.arange(7) % 2 == rank,
    }.items():
        mine = split(everything, rows, columns=["run"])
        values = pd.DataFrame({"twice": 2 * mine.obs["depth"]}, index=mine.obs_names)
        gathered = gather_cells(values, mine)
        assert list(gathered.index) == list(everything.obs_names)
        assert gathered["twice"].tolist() == (2 * everything.obs["depth"]).tolist()
        np.testing.assert_array_equal(gather_cells(mine.x, mine), everything.x)
        seen[name] = (cell_numbers(mine).tolist(), categories(mine.obs), mine.obs["batch"].tolist())

    assert categories(everything.obs) == {"kind": ["y", "x"]}  # which is as before
    for message, rows in {"1 of 7 .* cell 1 is on 0": [[0], [2, 3, 4, 5, 6]][rank], "cell 0 is on 2": range(7)}.items():
        with pytest.raises(ValueError, match=message):
            split(everything, np.array(rows))
    return seen


def test_split_cells_have_the_categories_of_all_ranks_and_come_back_in_the_order_of_the_user() -> None:
    first, second = world("torch_dist", 2).run(_run_split)
    assert first["block"][0] == [0, 1, 2] and second["block"][0] == [3, 4, 5, 6]
    assert first["positions"][0] == [5, 0] and first["names"][0] == [3] and second["mask"][0] == [1, 3, 5]
    for name in first:
        assert first[name][1] == second[name][1] == {"batch": ["a", "b", "c"], "kind": ["y", "x"], "run": [1, 3]}
    assert first["block"][2] == ["a", "b", "b"] and second["block"][2] == ["b", "b", "c", "c"]


def _run_align() -> tuple[dict[str, list[Any]], list[int], list[str]]:
    rank = current().rank
    everything = table()
    mine = align_(everything[[np.arange(3), np.arange(3, 7)][rank]], columns=["run"])

    other_columns = Table(pd.DataFrame({"batch": ["a"], **({"tissue": ["x"]} if rank else {})}))
    ordered = Table(pd.DataFrame({"stage": pd.Categorical(["1"], categories=["1", "2"][: rank + 1], ordered=True)}))
    messages = []
    for wrong in (other_columns, ordered):
        with pytest.raises(ValueError) as raised:
            align_(wrong)
        messages.append(str(raised.value))
    return categories(mine.obs), cell_numbers(mine).tolist(), messages


def test_cells_that_each_rank_has_read_by_itself_get_the_categories_of_all() -> None:
    (first, numbers, messages), (second, others, _) = world("torch_dist", 2).run(_run_align)
    assert first == second == {"batch": ["a", "b", "c"], "kind": ["y", "x"], "run": [1, 3]}
    assert numbers == [0, 1, 2] and others == [3, 4, 5, 6]
    assert "other columns of categories in obs: tissue" in messages[0]
    assert "obs['stage']: its categories have an order" in messages[1]


def test_one_process_has_all_cells_and_what_was_not_split_is_refused() -> None:
    backend = distopt.init("single")
    mine = split(table(), backend=backend)
    assert cell_numbers(mine).tolist() == list(range(7))
    with pytest.raises(ValueError, match=r"call adata = distopt.scvi.split\(adata\)"):
        cell_numbers(table())
    with pytest.raises(ValueError, match="there is no cell 'cell 9'"):
        split(table(), ["cell 9"], backend=backend)
    with pytest.raises(ValueError, match="obs has no column 'plate'"):
        split(table(), columns=["plate"], backend=backend)
    for rows in ([0, 1, 2, 3, 4, 5, 7], [-1, 0, 1, 2, 3, 4, 5]):
        with pytest.raises(ValueError, match="found (7|-1), expected positions from 0 to 6"):
            split(table(), rows, backend=backend)
    with pytest.raises(ValueError, match="rank 0 of 1 has no cells"):
        split(table(), [], backend=backend)
    same_names = table()
    same_names.obs.index = ["cell"] * 7
    assert len(split(same_names, backend=backend).obs) == 7
    with pytest.raises(ValueError, match="several cells have one name"):
        split(same_names, ["cell"], backend=backend)
    backend.close()


def _run_missing() -> tuple[dict[str, list[Any]], list[Any]]:
    everything = table()
    everything.obs["note"] = ["a", "b", "a", "c", None, "c", np.nan]
    everything.obs["is_checked"] = np.array([True, np.nan, False, True, np.nan, np.nan, np.nan], dtype=object)
    everything.obs["first_half"] = ["x", "y", "x", np.nan, np.nan, np.nan, np.nan]
    mine = split(everything)

    aligned = align_(everything[[np.arange(3), np.arange(3, 7)][current().rank]])
    assert categories(aligned.obs) == categories(mine.obs)
    return categories(mine.obs), mine.obs["note"].astype(object).fillna("missing").tolist()


def test_columns_in_which_values_are_missing_have_the_categories_of_all_ranks() -> None:
    (first, notes), (second, others) = world("torch_dist", 2).run(_run_missing)
    assert first == second
    assert (first["note"], first["is_checked"], first["first_half"]) == (["a", "b", "c"], [False, True], ["x", "y"])
    assert notes == ["a", "b", "a"]
    assert others == ["c", "missing", "c", "missing"]


def test_tables_of_cells_are_put_in_the_order_of_the_users_cells_by_name() -> None:
    table_of_cells = pd.DataFrame({"x": [0, 1, 2]}, index=["a", "b", "c"])
    assert _in_order_of(pd.Index(["c", "a", "b"]), table_of_cells)["x"].tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match="1 of its 2 cells are on no rank, such as 'd'"):
        _in_order_of(pd.Index(["a", "d"]), table_of_cells)

    of_two_samples = table_of_cells.set_axis(["a", "a", "b"], axis=0)
    assert _in_order_of(pd.Index(["a", "a", "b"]), of_two_samples)["x"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="several cells have one name"):
        _in_order_of(pd.Index(["b", "a", "a"]), of_two_samples)
