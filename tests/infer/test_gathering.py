"""Posteriors of datapoints, by global index, from the ranks that hold them and from the files they wrote."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch

from distopt import backends
from distopt.infer.gathering import gather_local, gather_rows, read_local, write_local
from distopt.infer.sharded_plate import sharded_plate
from distopt.reduce import PeerError
from distopt.sharding import LocalParameterError
from tests.workers import world

SIZES = [3, 1, 4]
SCATTERED = [[7, 0, 3], [5], [1, 2, 6, 4]]


def _state_rows(rows: list[int] | None, indices: list[int]) -> None:
    """States parameters whose values tell which datapoint they are of: z = index, w = 10 index + column + 0.5."""
    index = torch.tensor(indices, dtype=torch.float64)
    with sharded_plate("cells", len(indices), rows=rows, replicated=["*"]):
        pyro.param("guide.locs.z", index.clone(), event_dim=0)
        columns = torch.arange(2, dtype=torch.float64)
        positive = torch.distributions.constraints.positive
        pyro.param("w", 10 * index[:, None] + columns + 0.5, constraint=positive, event_dim=1)


def _error(what: Any) -> str:
    try:
        what()
    except LocalParameterError as error:
        return str(error)
    return "no error"


def _run_gather(directory: str) -> dict[str, Any]:
    rank = backends.current().rank
    start = sum(SIZES[:rank])
    _state_rows(None, list(range(start, start + SIZES[rank])))
    gathered: dict[str, Any] = {
        "all": gather_local("z")["guide.locs.z"].tolist(),
        "some": gather_local("w", rows=[6, 2])["w"].tolist(),
        "unknown": _error(lambda: gather_local("q")),
        "beyond": _error(lambda: gather_local("z", rows=[3, 8])),
    }
    write_local(directory)
    pyro.clear_param_store()
    _state_rows(SCATTERED[rank], SCATTERED[rank])
    gathered["scattered"] = gather_local("w")["w"].tolist()
    doubled = 2 * torch.tensor(SCATTERED[rank])[None, :]
    gathered["values"] = gather_rows(doubled, "cells", rows=np.array([5, 1, 7]), dim=1).tolist()
    pyro.clear_param_store()
    _state_rows([0, 1, rank + 2], [0, 1, rank + 2])
    gathered["doubly"] = _error(lambda: gather_local("z", rows=[3, 0]))
    return gathered


def test_gathered_rows_are_those_asked_for_on_every_rank_and_files_hold_them(tmp_path: Path) -> None:
    (tmp_path / "local-00004-of-00005.safetensors").write_bytes(b"left by another world")
    for gathered in world("torch_dist", 3).run(_run_gather, str(tmp_path)):
        assert gathered["all"] == list(range(8))
        np.testing.assert_allclose(gathered["some"], [[60.5, 61.5], [20.5, 21.5]])
        assert "'q'" in gathered["unknown"] and "guide.locs.z, w" in gathered["unknown"]
        assert "rows 8 held by 0 of 3" in gathered["beyond"]
        np.testing.assert_allclose(gathered["scattered"], [[10 * n + 0.5, 10 * n + 1.5] for n in range(8)])
        assert gathered["values"] == [[10], [2], [14]]
        assert "rows 0 held by 3 of 3" in gathered["doubly"]
    assert len(list(tmp_path.iterdir())) == 3
    assert read_local(tmp_path, "guide.locs.z").tolist() == list(range(8))
    np.testing.assert_allclose(read_local(tmp_path, "w", rows=[7, 3, 0]), [[70.5, 71.5], [30.5, 31.5], [0.5, 1.5]])
    with pytest.raises(LocalParameterError, match="no file holds rows 9"):
        read_local(tmp_path, "w", rows=[1, 9])
    with pytest.raises(LocalParameterError, match="no parameter 'v'. It has: guide.locs.z, w"):
        read_local(tmp_path, "v")
    (tmp_path / "local-00001-of-00003.safetensors").unlink()
    with pytest.raises(LocalParameterError, match="found 2 files, written by 3 ranks; one file of each rank is needed"):
        read_local(tmp_path, "w")


# A mistake of one rank is an error of all: the others would wait for it.


def _run_mistakes(directory: str) -> tuple[dict[str, str], list[float]]:
    rank = backends.current().rank
    _state_rows(None, list(range(3 * rank, 3 * rank + 3)))
    is_wrong = rank == 1
    file = Path(directory, "file")
    file.touch()
    calls = {
        "name": lambda: gather_local("q" if is_wrong else "z"),
        "rows": lambda: gather_local("z", rows=["first"] if is_wrong else [0]),
        "other rows": lambda: gather_local("z", rows=[1] if is_wrong else [0]),
        "all rows": lambda: gather_local("z", rows=None if is_wrong else [0]),
        "plate": lambda: gather_rows(torch.zeros(3), "genes" if is_wrong else "cells"),
        "dim": lambda: gather_rows(torch.zeros(3, 2), "cells", dim=1 if is_wrong else 0),
        "shape": lambda: gather_rows(torch.zeros(3, 4 if is_wrong else 2), "cells"),
        "names": lambda: write_local(Path(directory, "local"), ["q" if is_wrong else "z"]),
        "folder": lambda: write_local(file if is_wrong else Path(directory, "local")),
    }
    errors = {}
    for name, call in calls.items():
        try:
            call()
        except (ValueError, PeerError, OSError) as error:
            errors[name] = f"{type(error).__name__}: {error}"
    return errors, gather_local("z", rows=[4, 1])["guide.locs.z"].tolist()


MISTAKES = {
    "name": "no local parameter is called 'q'",
    "rows": "first",
    "other rows": r"rank 1 gathers 1 rows \(\w+\) of plate 'cells'.*, and rank 0 1 rows",
    "all rows": r"rank 1 gathers all rows of plate 'cells', each torch.float64 \[\], and rank 0 1 rows",
    "plate": "no parameter belongs to a sharded plate 'genes'",
    "dim": "values of shape .* have 2 rows, but plate 'cells' has 3 datapoints",
    "shape": r"rank 1 gathers all rows of plate 'cells', each torch.float32 \[4\], and rank 0 .* \[2\]",
    "names": "no local parameter is called 'q'",
    "folder": "file",
}
SEEN_BY_ALL = {"other rows", "all rows", "shape"}


def test_mistake_of_one_rank_is_raised_on_all_and_they_stay_together(tmp_path: Path) -> None:
    (first, of_first), (second, of_second) = world("torch_dist", 2).run(_run_mistakes, str(tmp_path))
    assert of_first == of_second == [4.0, 1.0]
    assert first.keys() == second.keys() == MISTAKES.keys()
    for name, pattern in MISTAKES.items():
        assert re.search(pattern, first[name]) and re.search(pattern, second[name]), (first[name], second[name])
        from_peer = first[name].startswith("PeerError: rank 1 of 2 raised ")
        assert from_peer == (name not in SEEN_BY_ALL), first[name]
