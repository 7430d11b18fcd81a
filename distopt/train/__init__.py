"""The loop that a YAML configuration runs, and the contracts of what it runs: `Task` and `Logger`."""

from distopt.train.explanation import explain_run
from distopt.train.loggers import Logger, RunInfo
from distopt.train.loop import run
from distopt.train.report import Report
from distopt.train.task import Task, TaskError

__all__ = ["Logger", "Report", "RunInfo", "Task", "TaskError", "explain_run", "run"]
