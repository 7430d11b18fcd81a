"""The loop that a YAML configuration runs, and the contracts of what it runs: `Task` and `Logger`."""

from distopt.train.explanation import explain_run
from distopt.train.loggers import Logger, RunInfo
from distopt.train.loop import run
from distopt.train.report import Report
from distopt.train.run_page import RESULT_ERRORS, compare_runs, write_report, write_sweep
from distopt.train.saved_run import SavedRun, load_run
from distopt.train.session import Session
from distopt.train.task import Task, TaskError
from distopt.train.validation import Mean, Total

__all__ = [
    "RESULT_ERRORS",
    "Logger",
    "Mean",
    "Report",
    "RunInfo",
    "SavedRun",
    "Session",
    "Task",
    "TaskError",
    "Total",
    "compare_runs",
    "explain_run",
    "load_run",
    "run",
    "write_report",
    "write_sweep",
]
