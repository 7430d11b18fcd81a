"""The loop that a YAML configuration runs, and the contracts of what it runs: `Task` and `Logger`."""

from distopt.train.loggers import Logger, RunInfo
from distopt.train.loop import run
from distopt.train.report import Report
from distopt.train.task import Task, TaskError
from distopt.train.validation import Mean, Total

__all__ = ["Logger", "Mean", "Report", "RunInfo", "Task", "TaskError", "Total", "run"]
