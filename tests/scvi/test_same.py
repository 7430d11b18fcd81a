"""Whatever a model took from the cells of its rank is found by name, wherever it keeps it."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from distopt.backends import current
from distopt.scvi import DifferentModelError, check_same
from tests.workers import world

NUM_CELLS = (3, 7)  # as large as values that are the same on both


class Inner(nn.Module):
    """A module within the module, with a buffer."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([1.0, value]))


class Module(nn.Module):
    """Keeps what may come from data in each way that models do.

    Args:
        changed: Which of its values depends on the rank.
    """

    def __init__(self, changed: str) -> None:
        super().__init__()
        by_rank = float(1 + current().rank)

        def value(name: str) -> float:
            return by_rank if name == changed else 7.0

        self.n_obs = NUM_CELLS[current().rank]
        self.per_cell = np.full((self.n_obs, 2), by_rank)
        self.inner = Inner(value("buffer"))
        self.number = value("number")
        self.text = f"{value('text')}"
        self.array = np.array([value("array"), np.nan])
        self.prior = {"mean": [1.0, np.float32(value("nested"))]}
        self.start = partial(max, value("partial"))
        self.frame = pd.DataFrame({"x": [value("frame")]})
        self.shape = torch.zeros(2 if value("shape") == 7.0 else int(by_rank) + 2)
        self.weight = nn.Parameter(torch.tensor(by_rank))


NAMES = {
    "buffer": "module.inner.scale",
    "number": "module.number",
    "text": "module.text",
    "array": "module.array",
    "nested": "module.prior['mean'][1]",
    "partial": "module.start.args[0]",
    "frame": "module.frame",
    "shape": "module.shape",
}


def model(changed: str, batches: list[str] | None = None) -> Any:
    registry = {"batch": {"state_registry": {"categorical_mapping": np.array(batches or ["a"], dtype=object)}}}
    return SimpleNamespace(
        module=Module(changed),
        adata=SimpleNamespace(obs=range(NUM_CELLS[current().rank])),
        adata_manager=SimpleNamespace(registry={"field_registries": registry}),
    )


def _run_check() -> dict[str, str]:
    check_same(model("nothing"))
    check_same(model("number"), ignore=["module.num*"])
    messages = {}
    for changed in NAMES:
        with pytest.raises(DifferentModelError) as raised:
            check_same(model(changed))
        messages[changed] = str(raised.value)
    with pytest.raises(DifferentModelError) as raised:
        check_same(model("nothing", [["a", "b"], ["b", "c"]][current().rank]))
    return messages | {"registry": str(raised.value)}


def test_each_value_that_differs_between_ranks_is_named_on_all_of_them() -> None:
    first, second = world("torch_dist", 2).run(_run_check)
    assert first == second
    for changed, name in NAMES.items():
        assert f"made it of its own cells: {name}. Give every rank all cells" in first[changed]
    assert "registry.batch.state_registry['categorical_mapping']. The ranks have registered other" in first["registry"]
