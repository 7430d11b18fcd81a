"""The contract of loggers, and what each of distopt's leaves on disk or terminal."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.cells import cached_cell_len
from rich.console import Console

from distopt.launchers import METRICS_FILE
from distopt.run_files import read_metrics
from distopt.train import loggers
from distopt.train.loggers import JsonLinesLogger, Logger, Loggers, ProgressLogger, RunInfo, TensorBoardLogger, printer
from tests.small_disks import fill, small_disk


def run_info(folder: Path, first_step: int = 0, num_steps: int = 1000) -> RunInfo:
    return RunInfo("demo", folder, first_step, num_steps)


def write(folder: Path, first_step: int, steps: range, logger: Logger | None = None) -> None:
    with Loggers([logger or JsonLinesLogger()], run_info(folder, first_step)) as opened:
        for step in steps:
            opened.log(step, {"elbo": -100.0 / step, "rows_per_s": 5.0})


def test_resuming_from_an_earlier_step_leaves_each_step_once(tmp_path: Path) -> None:
    write(tmp_path, 0, range(10, 60, 10))
    write(tmp_path, 30, range(40, 80, 10))
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20, 30, 40, 50, 60, 70]


def test_new_run_in_a_used_folder_starts_from_nothing(tmp_path: Path) -> None:
    write(tmp_path, 0, range(10, 60, 10))
    write(tmp_path, 0, range(10, 30, 10))
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20]


def test_line_cut_off_by_a_crash_is_left_out_and_replaced(tmp_path: Path) -> None:
    write(tmp_path, 0, range(10, 40, 10))
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 40, "el')
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20, 30]
    write(tmp_path, 30, range(40, 60, 10))
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20, 30, 40, 50]


def test_damaged_lines_are_left_out_and_cost_no_good_row(tmp_path: Path) -> None:
    damaged = [b'{"step": 10}', b'{"step": 2', b"\xff\xfe", b"[]", b'{"elbo": 1}', b'{"step": 20}', b'{"step": 30}']
    (tmp_path / METRICS_FILE).write_bytes(b"\n".join(damaged) + b"\n")
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20, 30]
    write(tmp_path, 20, range(30, 50, 10))
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20, 30, 40]


def test_rows_are_kept_while_the_disk_is_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path / "disk", 64) as folder, Loggers([JsonLinesLogger()], run_info(folder)) as opened:
        opened.log(1, {"elbo": 1.0})
        filler = fill(folder)
        for step in range(2, 200):
            opened.log(step, {"elbo": 1.0})
        written = [row["step"] for row in read_metrics(folder)]
        assert 1 in written and 199 not in written
        filler.unlink()
        opened.log(200, {"elbo": 1.0})
        assert [row["step"] for row in read_metrics(folder)] == list(range(1, 201))
    assert capsys.readouterr().err == (
        f"distopt: {tmp_path}/disk/metrics.jsonl cannot be written: No space left on device; training continues\n"
    )


@pytest.mark.parametrize(
    ("logger", "name", "reason"),
    [(JsonLinesLogger, METRICS_FILE, "Is a directory"), (TensorBoardLogger, "tensorboard", "File exists")],
)
def test_file_that_cannot_be_written_is_told_with_its_path_and_training_goes_on(
    logger: type[Logger], name: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if logger is TensorBoardLogger:
        pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
        (tmp_path / name).touch()
    else:
        (tmp_path / name).mkdir()
    write(tmp_path, 0, range(10, 40, 10), logger())
    error = capsys.readouterr().err
    assert error == f"distopt: {tmp_path / name} cannot be written: {reason}; training continues\n"
    assert read_metrics(tmp_path) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_tensorboard_on_a_full_disk_is_told_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    with small_disk(tmp_path / "disk", 64) as folder:
        with Loggers([TensorBoardLogger()], run_info(folder)) as opened:
            fill(folder)
            for step in range(1, 2000):
                opened.log(step, {"elbo": 1.0, "rows_per_s": 2.0})
        with Loggers([TensorBoardLogger()], run_info(folder)) as opened:
            opened.log(1, {"elbo": 1.0})
    message = f"distopt: {tmp_path}/disk/tensorboard cannot be written: No space left on device; training continues\n"
    assert capsys.readouterr().err.count(message) == 2


def test_nan_and_infinity_are_null_since_json_has_neither(tmp_path: Path) -> None:
    with Loggers([JsonLinesLogger()], run_info(tmp_path)) as opened:
        opened.log(1, {"elbo": float("nan"), "norm": float("inf"), "rows": 2.0})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    (line,) = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "elbo": None, "norm": None, "rows": 2.0}


def test_tensorboard_reads_back_what_was_written_without_what_a_crash_undid(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, 0, range(10, 60, 10), TensorBoardLogger())
    write(tmp_path, 30, range(40, 80, 10), TensorBoardLogger())
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = {event.step: event.value for event in events.Scalars("elbo")}
    assert sorted(scalars) == [10, 20, 30, 40, 50, 60, 70]
    assert len(events.Scalars("elbo")) == 7

    write(tmp_path, 0, range(10, 30, 10), TensorBoardLogger())  # a new run in a used folder
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("elbo")] == [10, 20]
    assert scalars[50] == pytest.approx(-2.0)


def test_tensorboard_that_is_not_installed_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    write(tmp_path, 0, range(10, 30, 10), TensorBoardLogger())
    assert list(tmp_path.iterdir()) == []


class Recorder(Logger):
    """Notes its calls in a list that several share."""

    def __init__(self, name: str, calls: list[str], fails_in: str = "") -> None:
        self.name = name
        self.calls = calls
        self.fails_in = fails_in

    def note(self, method: str) -> None:
        self.calls.append(f"{self.name}.{method}")
        if method == self.fails_in:
            raise OSError(f"{self.name} failed in {method}")

    def start(self, run: RunInfo) -> None:
        self.note("start")

    def after_step(self, step: int) -> None:
        self.note(f"after_step {step}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.note(f"log {step} {values['elbo']}")

    def close(self) -> None:
        self.note("close")


def test_loggers_are_called_in_order_and_closed_in_reverse(tmp_path: Path) -> None:
    calls: list[str] = []
    with Loggers([Recorder("a", calls), Recorder("b", calls)], run_info(tmp_path)) as opened:
        opened.after_step(1)
        opened.log(1, {"elbo": -2.0})
    assert calls == [
        *("a.start", "b.start"),
        *("a.after_step 1", "b.after_step 1"),
        *("a.log 1 -2.0", "b.log 1 -2.0"),
        *("b.close", "a.close"),
    ]


@pytest.mark.parametrize(
    ("fails_in", "expected"),
    [
        ("start", ["a.start", "b.start", "a.close"]),
        ("log 1 0.0", ["a.start", "b.start", "a.log 1 0.0", "b.log 1 0.0", "b.close", "a.close"]),
        ("close", ["a.start", "b.start", "a.log 1 0.0", "b.log 1 0.0", "b.close", "a.close"]),
    ],
)
def test_logger_that_fails_ends_the_run_and_the_others_are_closed(
    fails_in: str, expected: list[str], tmp_path: Path
) -> None:
    calls: list[str] = []
    with (
        pytest.raises(OSError, match=f"b failed in {fails_in}"),
        Loggers([Recorder("a", calls), Recorder("b", calls, fails_in)], run_info(tmp_path)) as opened,
    ):
        opened.log(1, {"elbo": 0.0})
    assert calls == expected


def test_contract_without_any_override_does_nothing(tmp_path: Path) -> None:
    with Loggers([Logger()], run_info(tmp_path)) as opened:
        opened.after_step(1)
        opened.log(1, {})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that `ProgressLogger` reads, which a test may change."""
    seconds = [0.0]
    monkeypatch.setattr(loggers, "monotonic", lambda: seconds[0])
    return seconds


def show_progress(console: Console, clock: list[float]) -> None:
    with Loggers([ProgressLogger(console)], run_info(Path(), 100, 1000)) as opened:
        for step in range(101, 201):
            clock[0] += 0.1
            opened.after_step(step)
            if step % 50 == 0:
                opened.log(step, {"elbo": -1_234_567.8, "rows_per_s": 98_765.4})


def test_file_gets_a_line_for_each_measurement_and_no_control_characters(clock: list[float]) -> None:
    printed = io.StringIO()
    show_progress(Console(file=printed, width=30), clock)
    assert printed.getvalue().splitlines() == [
        "step 150 of 1,000  ELBO -1,234,568  98,765 rows/s  0:01:25 left",
        "step 200 of 1,000  ELBO -1,234,568  98,765 rows/s  0:01:20 left",
    ]


def test_lines_of_progress_leave_nothing_in_memory(clock: list[float]) -> None:
    """Not a width of each word, as when rich wraps them."""
    console = Console(file=io.StringIO(), width=120)
    with Loggers([ProgressLogger(console)], run_info(Path(), 0, 10_000)) as opened:
        opened.log(1, {"elbo": 1.0})
        before = cached_cell_len.cache_info().currsize
        for step in range(2, 100):
            opened.log(step, {"elbo": -1_000.0 * step, "rows_per_s": 7.0 * step})
        assert cached_cell_len.cache_info().currsize == before


def test_terminal_gets_a_bar_with_step_elbo_rows_and_time_left(clock: list[float]) -> None:
    printed = io.StringIO()
    show_progress(Console(file=printed, width=120, force_terminal=True), clock)
    last = printed.getvalue().rpartition("\r")[2]
    assert "200/1000" in last and "ELBO -1,234,568  98,765 rows/s" in last and "left" in last


def test_lines_are_printed_as_they_are_where_there_is_a_console() -> None:
    printed = io.StringIO()
    printer(Console(file=printed, width=20))("a [path] that is longer than the console is wide")
    printer(None)("nothing")
    assert printed.getvalue() == "a [path] that is longer than the console is wide\n"
