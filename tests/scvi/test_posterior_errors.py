"""An error of one rank while it draws samples of its cells is raised on all ranks, with its cause."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from distopt.backends import current
from distopt.reduce import DisagreementError, PeerError
from distopt.scvi.cells import NUMBER
from distopt.scvi.posterior import export_posterior, gather_cells, sample_posterior
from tests.workers import world


class Model:
    """What the functions ask of a model of scvi-tools, which CI does not have.

    Args:
        fails_at: "draw", "export" or "table": where it raises on rank 1; "" for nowhere.
    """

    def __init__(self, fails_at: str = "") -> None:
        self.fails_at = fails_at if current().rank == 1 else ""
        numbers = np.arange(3) + 3 * current().rank
        self.adata = SimpleNamespace(obs=pd.DataFrame({NUMBER: numbers}, index=[f"c{n}" for n in numbers]), obsm={})
        self.module = SimpleNamespace(list_obs_plate_vars={"name": "cells"})

    def sample_posterior(self, num_samples: int = 2) -> dict[str, Any]:
        """Values without cells."""
        if self.fails_at == "draw":
            raise ArithmeticError("a rotten draw")
        return {"means": {"loc": np.ones(num_samples)}}

    def export_posterior(self, adata: Any, num_samples: int = 2) -> None:
        """Sets a table of cells."""
        if self.fails_at == "export":
            raise ArithmeticError("a rotten export")
        self.sample_posterior(num_samples)
        if self.fails_at == "table":
            raise ArithmeticError("a rotten table")
        adata.obsm["q05"] = pd.DataFrame({"a": np.ones(3)}, index=adata.obs.index)


def _error(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ArithmeticError, PeerError, DisagreementError, ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def _run(directory: str) -> dict[str, str]:
    is_wrong = current().rank == 1
    file = Path(directory, "file")
    file.touch()
    errors = {"sample": _error(lambda: sample_posterior(Model("draw")))}
    errors["samples"] = _error(lambda: sample_posterior(Model(), num_samples=3 if is_wrong else 2))
    for fails_at in ("draw", "export", "table"):
        model = Model(fails_at)
        errors[fails_at] = _error(lambda model=model: export_posterior(model, model.adata))  # type: ignore[misc]
        assert "sample_posterior" not in vars(model)
    model = Model()
    folder = file if is_wrong else Path(directory, "tables")
    errors["folder"] = _error(lambda: export_posterior(model, model.adata, folder=folder))
    bare = SimpleNamespace(obs=pd.DataFrame(index=range(3)))
    errors["unsplit"] = _error(lambda: gather_cells(np.ones(3), bare if is_wrong else model.adata))

    together = export_posterior(model, model.adata)
    assert list(together["q05"].index) == [f"c{n}" for n in range(6)], "the ranks are still together"
    return errors


@pytest.mark.timeout(120)
def test_error_of_one_rank_is_raised_on_all_and_they_stay_together(tmp_path: Path) -> None:
    first, second = world("torch_dist", 2).run(_run, str(tmp_path))
    causes = {
        "sample": "ArithmeticError: a rotten draw",
        "draw": "ArithmeticError: a rotten draw",
        "export": "ArithmeticError: a rotten export",
        "table": "ArithmeticError: a rotten table",
    }
    for name, cause in causes.items():
        assert second[name] == cause
        assert first[name] == f"PeerError: rank 1 of 2 raised {cause}"
    for name in ("folder", "unsplit"):
        assert first[name] == f"PeerError: rank 1 of 2 raised {second[name]}"
    assert "call adata = distopt.scvi.split(adata)" in first["unsplit"]
    unlike = "loc of means is float64 [3] on rank 1, and float64 [2] on rank 0"
    assert unlike in first["samples"] and first["samples"] == second["samples"]
