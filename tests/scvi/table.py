"""An AnnData as far as splitting needs one: CI has no anndata, which asks for an older pandas; slow tests have one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd


class Table:
    """Cells with their columns and counts, which drops categories that no chosen cell has, as anndata does.

    Args:
        obs: A row for each cell.
        x: (num_cells, num_genes) counts.
    """

    def __init__(self, obs: pd.DataFrame, x: np.ndarray | None = None) -> None:
        self.obs = obs
        self.x = np.zeros((len(obs), 2)) if x is None else x
        self.var_names = [f"gene {number}" for number in range(self.x.shape[1])]
        self.obsm: dict[str, Any] = {}

    @property
    def obs_names(self) -> pd.Index:
        return self.obs.index

    def __getitem__(self, positions: np.ndarray) -> Table:
        obs = self.obs.iloc[positions].copy()
        for name in obs.columns:
            if isinstance(obs[name].dtype, pd.CategoricalDtype):
                obs[name] = obs[name].cat.remove_unused_categories()
        return Table(obs, self.x[positions])

    def copy(self) -> Table:
        return Table(self.obs.copy(), self.x.copy())


def table(num_cells: int = 7) -> Table:
    """Cells whose batches, as strings, categories and numbers, are not the same in both halves."""
    obs = pd.DataFrame(
        {
            "batch": list("abbbbcc")[:num_cells],
            "kind": pd.Categorical(list("yyyyxxx")[:num_cells], categories=["y", "x"]),
            "run": [3, 3, 3, 3, 3, 3, 1][:num_cells],
            "depth": np.arange(num_cells) / 2,
        },
        index=[f"cell {number}" for number in (4, 2, 0, 6, 1, 5, 3)[:num_cells]],
    )
    return Table(obs, np.arange(2.0 * num_cells).reshape(num_cells, 2))
