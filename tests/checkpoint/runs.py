"""Checkpointers of one rank, and the commands."""

from __future__ import annotations

import pyro
import pyro.optim
import torch
from typer.testing import CliRunner

from distopt.backends.single import Single
from distopt.checkpoint import Checkpointer
from distopt.checkpoint.cli import app


def value(number, size=4):
    pyro.clear_param_store()
    pyro.param("x", torch.full((size,), float(number)))


def checkpointer(root, state=None, **settings):
    return Checkpointer(root, state, backend=Single(), **settings)


def fill(number):
    with torch.no_grad():
        pyro.param("x", torch.zeros(4)).unconstrained().fill_(number)


def command(*arguments):
    """Returns what a `distopt checkpoint` command printed, and its exit status."""
    return CliRunner().invoke(app, list(map(str, arguments)))
