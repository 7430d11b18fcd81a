"""A task of which one rank dies in a chosen way and place."""

from __future__ import annotations

import ctypes
import os
import resource
import signal

import torch

from distopt.backends import current
from tests.launch import order_task

DEATH_STEP = 6  # calls of `batch`, `model` or `guide`; some come before the first step


class Dying(order_task.Order):
    """As `Order`, until rank `who` dies.

    Args:
        how: "raise", "exit 0", "exit 3", "_exit 0", "_exit 7", "SIGKILL", "SIGSEGV", "abort", "memory" or
            "supervisor": that is killed, and takes its worker with it.
        where: "constructor", "model", "guide", "batch" or "report".
        who: The rank.
    """

    def __init__(self, how: str, where: str, who: int) -> None:
        super().__init__()
        self.how = how
        self.where = where
        self.who = who
        self.num_calls = 0
        self.reach("constructor", DEATH_STEP)

    def model(self, rows):
        self.reach("model")
        super().model(rows)

    def guide(self, rows):
        self.reach("guide")

    def batch(self, rows):
        self.reach("batch")
        return super().batch(rows)

    def report(self, run) -> None:
        self.reach("report", DEATH_STEP)

    def reach(self, where: str, num_calls: int = 1) -> None:
        if current().rank != self.who or where != self.where:
            return
        self.num_calls += num_calls
        if self.num_calls >= DEATH_STEP:
            die(self.how)


def die(how: str) -> None:
    action, _, argument = how.partition(" ")
    if action == "raise":
        raise ValueError("the culprit")
    if action == "exit":
        raise SystemExit(int(argument))
    if action == "_exit":
        os._exit(int(argument))
    if action == "supervisor":
        os.kill(os.getppid(), signal.SIGKILL)
        signal.pause()
    if action == "abort":
        os.abort()
    if action == "SIGSEGV":
        ctypes.string_at(0)
    if action == "memory":
        resource.setrlimit(resource.RLIMIT_AS, (1 << 34, 1 << 34))
        torch.ones(1 << 33)
    os.kill(os.getpid(), signal.Signals[action])
