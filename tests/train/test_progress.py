from __future__ import annotations

import io

from rich.console import Console

from distopt.train.loggers import StepProgress, printer


def run(console: Console) -> None:
    with StepProgress(console, 100, 1000) as progress:
        for step in range(101, 201):
            progress.advance(step)
            if step % 50 == 0:
                progress.measured(step, elbo=-1_234_567.8, rows_per_s=98_765.4, steps_per_s=10.0)


def test_log_gets_a_line_for_each_measurement_and_no_control_characters() -> None:
    printed = io.StringIO()
    run(Console(file=printed, width=120))
    assert printed.getvalue().splitlines() == [
        "step 150 of 1,000  ELBO -1,234,568  98,765 rows/s  0:01:25 left",
        "step 200 of 1,000  ELBO -1,234,568  98,765 rows/s  0:01:20 left",
    ]


def test_terminal_gets_a_bar_with_step_elbo_rows_and_time_left() -> None:
    printed = io.StringIO()
    run(Console(file=printed, width=120, force_terminal=True))
    last = printed.getvalue().rpartition("\r")[2]
    assert "200/1000" in last and "ELBO -1,234,568  98,765 rows/s" in last and "left" in last


def test_lines_are_printed_where_there_is_a_console_as_they_are() -> None:
    printed = io.StringIO()
    printer(Console(file=printed, width=20))("a [path] that is longer than the console is wide")
    printer(None)("nothing")
    assert printed.getvalue() == "a [path] that is longer than the console is wide\n"
