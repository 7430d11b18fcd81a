from __future__ import annotations

import json
from pathlib import Path

import pytest

from distopt.train.loggers import FILE_NAME, Metrics, read_metrics


def write(folder: Path, first: int, steps: range, *, tensorboard: bool = False) -> None:
    metrics = Metrics(folder, first, tensorboard=tensorboard)
    for step in steps:
        metrics.write(step, elbo=-100.0 / step, rows_per_s=5.0)
    metrics.close()


def test_going_on_from_an_earlier_step_leaves_each_step_once(tmp_path: Path) -> None:
    write(tmp_path, 0, range(10, 60, 10))
    write(tmp_path, 30, range(40, 80, 10))
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20, 30, 40, 50, 60, 70]


def test_new_run_in_a_used_folder_begins_anew(tmp_path: Path) -> None:
    write(tmp_path, 0, range(10, 60, 10))
    write(tmp_path, 0, range(10, 30, 10))
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20]


def test_line_cut_off_by_a_crash_is_left_out_and_replaced(tmp_path: Path) -> None:
    write(tmp_path, 0, range(10, 40, 10))
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"step": 40, "el')
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20, 30]
    write(tmp_path, 30, range(40, 60, 10))
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20, 30, 40, 50]


def test_nan_and_infinity_are_null_since_json_has_neither(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, tensorboard=False)
    metrics.write(1, elbo=float("nan"), norm=float("inf"), rows=2.0)
    metrics.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    (line,) = (tmp_path / FILE_NAME).read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "elbo": None, "norm": None, "rows": 2.0}


def test_tensorboard_reads_back_what_was_written_without_what_a_crash_undid(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, 0, range(10, 60, 10), tensorboard=True)
    write(tmp_path, 30, range(40, 80, 10), tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {event.step: event.value for event in events.Scalars("elbo")}
    assert sorted(found) == [10, 20, 30, 40, 50, 60, 70]
    assert len(events.Scalars("elbo")) == 7

    write(tmp_path, 0, range(10, 30, 10), tensorboard=True)  # a new run in a used folder
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("elbo")] == [10, 20]
    assert found[50] == pytest.approx(-2.0)
