from __future__ import annotations

import numpy as np
import pytest
import torch

from distopt.config import ConfigError
from distopt.train.task import Task, TaskError, TaskRows, load_task


class Whole:
    """Has all that a task needs."""

    def __init__(self, size: int = 3) -> None:
        self.size = size
        self.model = self.guide = lambda: None

    def rows(self) -> int:
        return self.size

    def batch(self, rows):
        return (rows,)

    def report(self, report) -> None:
        pass


class Half:
    """Lacks a guide."""

    model = batch = staticmethod(lambda: None)

    def rows(self) -> int:
        return 1


class Derived(Task):
    """Has what a task must have, and the defaults of the rest."""

    def __init__(self) -> None:
        self.model = self.guide = lambda: None

    def rows(self) -> int:
        return 5

    def batch(self, rows):
        return (rows,)

    def report(self, report) -> None:
        pass


class WithoutBatch(Task):
    """Lacks a method that `Task` requires."""

    model = guide = staticmethod(lambda: None)

    def rows(self) -> int:
        return 1

    def report(self, report) -> None:
        pass


class WithoutGuide(Derived):
    """Lacks an attribute that `Task` requires."""

    def __init__(self) -> None:
        self.model = lambda: None


class ShardedByName(Whole):
    """No subclass of `Task`, but it has the optional members."""

    sharded = True
    collected = 0

    def collect(self) -> None:
        type(self).collected += 1


class Broken:
    """Has a mistake in its constructor."""

    def __init__(self) -> None:
        len(3)  # type: ignore[arg-type]


def test_mistake_inside_the_constructor_is_shown_where_it_is_and_not_blamed_on_the_config() -> None:
    with pytest.raises(TypeError, match="has no len"):
        load_task(f"{__name__}:Broken", {})


def test_batch_that_is_no_tuple_is_refused_with_the_edit() -> None:
    task = Derived()
    task.batch = lambda rows: torch.zeros(len(rows))  # type: ignore[method-assign]
    with pytest.raises(TaskError, match=r"batch\(\) returned a Tensor, expected a tuple.*`return \(x,\)`"):
        TaskRows(task).read(np.arange(3))


def test_task_is_built_with_its_arguments() -> None:
    task = load_task(f"{__name__}:Whole", {"size": 7})
    assert isinstance(task, Task) and task.rows() == 7


@pytest.mark.parametrize("name", ["Whole", "Derived"])
def test_optional_members_have_defaults_with_and_without_the_base_class(name: str) -> None:
    task = load_task(f"{__name__}:{name}", {})
    task.collect()
    assert task.sharded is False


def test_members_of_a_class_without_the_base_class_are_used() -> None:
    task = load_task(f"{__name__}:ShardedByName", {})
    task.collect()
    assert task.sharded and ShardedByName.collected == 1
    assert task.model is task.guide
    assert task.batch(np.arange(2))[0].tolist() == [0, 1]
    assert task.collected == 1  # whatever else the user's object has, for who takes it from `load_run`
    with pytest.raises(AttributeError, match="colected"):
        task.colected  # noqa: B018


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("no_such_module:Task", {}, "No module named 'no_such_module'; check the spelling, that it is installed here"),
        (f"{__name__}:Hole", {}, r"has no Hole; did you mean Whole\?"),
        (f"{__name__}:Whole", {"sice": 3}, "task_args: Whole: got an unexpected keyword argument 'sice'"),
        (f"{__name__}:Half", {}, "lacks guide"),
        (f"{__name__}:WithoutBatch", {}, "lacks batch;"),
        (f"{__name__}:WithoutGuide", {}, "lacks guide;"),
    ],
)
def test_task_that_cannot_be_had_is_refused_with_the_reason(path: str, arguments: dict, message: str) -> None:
    with pytest.raises((ConfigError, TaskError), match=message):
        load_task(path, arguments)


class Columns(Derived):
    """Says what its batches are selected from."""

    def batch(self, rows):
        return (self.columns()[0][torch.from_numpy(rows)],)

    def columns(self):
        return (torch.arange(5),)


class OtherBatch(Columns):
    """Inherits columns, and selects otherwise."""

    def batch(self, rows):
        return (-torch.from_numpy(rows),)


class OtherColumns(OtherBatch):
    """Says again what its batches are selected from."""

    def columns(self):
        return (-torch.arange(5),)


@pytest.mark.parametrize(("task", "expected"), [(Columns, [3, 1]), (OtherBatch, [-3, -1]), (OtherColumns, [-3, -1])])
def test_columns_serve_only_the_batch_that_they_were_written_for(task, expected):
    assert TaskRows(task()).read(np.array([3, 1]))[0].tolist() == expected


def test_columns_of_an_object_that_is_no_task_serve_it_and_those_of_a_batch_set_on_the_object_do_not():
    adapted = load_task(f"{__name__}:Whole", {})
    adapted._task.columns = lambda: (10 * torch.arange(3),)
    assert TaskRows(adapted).read(np.array([2]))[0].tolist() == [20]
    task = Columns()
    task.batch = lambda rows: (7,)
    assert TaskRows(task).read(np.array([2])) == (7,)
