"""The loop that a YAML config runs, its progress and its metrics."""

from distopt.train.loop import run
from distopt.train.report import Report
from distopt.train.task import Task, TaskError

__all__ = ["Report", "Task", "TaskError", "run"]
