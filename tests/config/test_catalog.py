"""The names that a configuration may use are those of the installed libraries."""

from __future__ import annotations

import inspect
import typing

import pyro.infer
import torch

from distopt.config.catalog import ElboName, OptimizerName, SchedulerName
from distopt.optim.pytorch_optimizers import OPTIMIZERS, SCHEDULERS


def test_optimizers_are_all_that_distopt_makes_of_torch_and_pyro():
    assert set(typing.get_args(OptimizerName)) == set(OPTIMIZERS)


def test_schedulers_are_all_that_distopt_makes_of_torch_but_their_base():
    assert set(typing.get_args(SchedulerName)) == set(SCHEDULERS) - {torch.optim.lr_scheduler.LRScheduler.__name__}


def test_objectives_are_the_elbos_of_pyro():
    classes = [value for value in vars(pyro.infer).values() if inspect.isclass(value)]
    elbos = {each.__name__ for each in classes if issubclass(each, pyro.infer.ELBO) and "ELBO" in each.__name__}
    assert set(typing.get_args(ElboName)) == elbos - {"ELBO"}
