"""Rows of datapoints that ranks saved are read by their global index, by whichever rank holds them then."""

from __future__ import annotations

import numpy as np
import pyro
import pytest
import torch

from distopt.backends import current
from distopt.checkpoint import CheckpointError
from distopt.checkpoint.sharded_params import capture_local, plate_sizes, shard_name
from distopt.sharding import LocalParameter, PlateShard, mark_local
from tests.checkpoint.runs import checkpointer
from tests.workers import world

# (6 datapoints, 2 numbers each), whose first number is the global index.
TABLE = torch.stack([torch.arange(6.0), 10 * torch.arange(6.0)], dim=1)


def hold(rows: list[int], *, explicit: bool, name: str = "z", dim: int = 0) -> torch.Tensor:
    """Makes a local parameter of some rows of the table, in their order."""
    index = np.array(rows, dtype=np.int64)
    values = TABLE[torch.from_numpy(index)]
    param = pyro.param(name, values if dim == 0 else values.T.contiguous())
    plate = PlateShard("rows", 2, size=len(rows), rows=index if explicit else None)
    mark_local(param, LocalParameter(plate, tuple(param.shape), dim))
    return param


def test_shard_and_plate_are_named_and_counted_by_rank():
    assert shard_name(3) == "shard-00003" and plate_sizes() == {}
    hold([4, 1], explicit=True)
    assert plate_sizes() == {"rows": 2}


def test_tensors_in_the_shape_of_the_parameter_are_saved_by_row_and_others_whole():
    param = hold([4, 1, 5], explicit=True, dim=1)
    entry = LocalParameter(PlateShard("rows", 2, size=3, rows=np.array([4, 1, 5])), (2, 3), 1)
    state = {"exp_avg": torch.ones(2, 3), "step": torch.tensor(7.0), "lrs": [0.1, torch.zeros(3)], "name": "adam"}
    captured = capture_local({"z": {"value": param.detach()}}, {"adam": {"z": state}, "other": {}}, {"z": entry})
    saved = captured["params"]["z"]
    assert saved["plate"] == "rows" and torch.equal(saved["value"]["@rows"], TABLE[[4, 1, 5]])
    adam = saved["optimizers"]["adam"]
    assert saved["optimizers"].keys() == {"adam"} and adam["exp_avg"]["@rows"].shape == (3, 2)
    assert adam["step"]["shape"] == [] and adam["step"]["@whole"].tolist() == [[7.0]]
    assert adam["lrs"][0] == 0.1 and adam["lrs"][1]["shape"] == [3] and adam["name"] == "adam"
    assert captured["rows"]["rows"].tolist() == [4, 1, 5]


def _run_save(directory: str, explicit: bool) -> None:
    rows = {True: ([5, 0, 3], [1, 4, 2]), False: ([0, 1], [2, 3, 4, 5])}[explicit][current().rank]
    hold(rows, explicit=explicit)
    hold(rows, explicit=explicit, name="across", dim=1)
    from distopt.checkpoint import Checkpointer

    with Checkpointer(directory, background=False) as keeper:
        keeper.save(1)


@pytest.mark.parametrize("explicit", [True, False], ids=["scattered", "in blocks"])
def test_one_rank_reads_the_rows_that_it_holds_now_in_its_order(explicit, tmp_path):
    world("torch_dist", 2).run(_run_save, str(tmp_path), explicit)
    for rows in ([0, 1, 2, 3, 4, 5], [3, 5, 1]):
        pyro.clear_param_store()
        names = {"z": hold(rows, explicit=True), "across": hold(rows, explicit=True, name="across", dim=1)}
        with torch.no_grad():
            for param in names.values():
                param.zero_()
        with checkpointer(tmp_path) as keeper:
            keeper.restore()
        assert torch.equal(pyro.param("z").detach(), TABLE[rows])
        assert torch.equal(pyro.param("across").detach(), TABLE[rows].T)


def test_rows_that_no_rank_saved_and_parameters_of_an_unknown_plate_are_refused(tmp_path):
    with checkpointer(tmp_path, background=False) as keeper:
        hold([0, 1, 2], explicit=True)
        keeper.save(1)
        pyro.clear_param_store()
        hold([2, 4, 5], explicit=True)
        with pytest.raises(CheckpointError, match=r"no rows \[4, 5\] of 'z' \(plate 'rows'\): 2 of the 3 datapoints"):
            keeper.restore()
        pyro.clear_param_store()
        with pytest.raises(CheckpointError, match=r"rows of the local parameter 'z', and this process does not know"):
            keeper.restore()
