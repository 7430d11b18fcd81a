"""Which names a function's bytecode reads, and how."""

import atexit
import contextlib
import cProfile
import gc
import io
import os
import pprint
import pstats
import queue
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from distopt.infer.capture import StepCapture
from distopt.infer.capture.watch import Watch, names_of
from tests.infer.capture.cases import DATA, hierarchy
from tests.infer.capture.steps import run_steps

SETTINGS = {"scale": 1.0}


class Reader:
    def __init__(self):
        self.rows = [1, 2]
        self.pair = (1, 2)

    def read(self):
        return len(self.rows) + self.pair.count(1) + SETTINGS["scale"]

    def read_by_name(self, name):
        return getattr(self, name)


def test_globals_and_attributes_are_named_and_lengths_are_told_from_contents():
    names = names_of(Reader.read.__code__)
    assert names.roots == {"len", "SETTINGS"}
    assert names.attributes == {"rows", "pair", "count"}
    assert "rows" not in names.used and {"pair", "SETTINGS"} <= names.used
    assert not names.computed


def test_attributes_under_computed_names_are_noted():
    assert names_of(Reader.read_by_name.__code__).computed


def test_functions_are_noted_with_arguments_that_are_no_plain_values_and_with_what_they_close_over():
    factor = 2.0
    reader = Reader()

    def scaled(each, number):
        return each.read() * factor * number

    with Watch() as watch:
        scaled(reader, 3.0)
    calls = {call.code.co_name: call for call in watch.calls()}
    assert calls["scaled"].args == {"each": reader}
    assert calls["scaled"].cells["factor"].cell_contents == 2.0
    assert calls["read"].args == {"self": reader}


def test_functions_of_one_definition_are_told_apart_by_their_cells_even_where_the_collector_does_not_look():
    def times(factor):
        return lambda number: number * factor

    functions = [times(2.0), times(2.0)]
    gc.freeze()
    try:
        with Watch() as watch:
            for each in functions:
                each(1.0)
    finally:
        gc.unfreeze()
    cells = [call.cells["factor"] for call in watch.calls()]
    assert list(map(id, cells)) == [id(each.__closure__[0]) for each in functions]


def test_generator_is_noted_when_it_ends_and_is_an_effect_when_it_is_left_unfinished():
    factor = 2.0

    def numbers():
        yield factor
        yield factor

    with Watch() as watch:
        list(numbers())
        next(numbers())
    assert [call.cells["factor"].cell_contents for call in watch.calls()] == [2.0]
    assert not watch.effects

    with Watch() as watch:
        unfinished = numbers()
        next(unfinished)
    assert "a generator that it leaves unfinished" in watch.effects[0]


def write_through_path(folder):
    with (folder / "log").open("a") as file:
        file.write("x")


def wait_in_a_thread(folder):
    thread = threading.Thread(target=folder.exists)
    thread.start()
    thread.join()


EFFECTS = {
    "open": lambda folder: (folder / "settings").read_text(),
    "open to write": write_through_path,
    "stat": lambda folder: folder.exists(),
    "stat of a string": lambda folder: os.path.exists(str(folder)),
    "write": lambda folder: LOG.write("x"),
    "write of pprint": lambda folder: pprint.pprint(1, LOG),
    "start_new_thread": wait_in_a_thread,
    "submit": lambda folder: POOL.submit(len, "x").result(),
    "notify": lambda folder: TASKS.put(1),
}
POOL = ThreadPoolExecutor(1)
TASKS = queue.Queue()
LOG = open(os.devnull, "w")  # noqa: SIM115 - as sys.stdout, it is open throughout
atexit.register(LOG.close)


@pytest.mark.parametrize("name", EFFECTS)
def test_files_and_threads_are_effects_through_the_standard_library_too(name, tmp_path):
    (tmp_path / "settings").write_text("1.0")
    POOL.submit(len, "x").result()  # its thread runs already
    with Watch() as watch:
        EFFECTS[name](tmp_path)
    assert watch.effects
    assert "test_watch.py" in watch.effects[0]


def test_what_libraries_ask_of_the_system_is_no_effect(tmp_path):
    text = io.StringIO()
    with Watch() as watch:
        pyro.util.torch_isnan(torch.ones(1))
        torch.save(torch.ones(1), tmp_path / "tensor")  # torch's own, through the standard library
        text.write("x")
        os.path.join(str(tmp_path), "name")
        with contextlib.nullcontext():
            repr(Reader())
    assert watch.effects == []


def test_profiler_goes_on_after_a_recorded_step():
    pyro.clear_param_store()
    capture = StepCapture(Trace_ELBO().loss_and_grads)
    profiler = cProfile.Profile()
    with profiler:
        run_steps(capture, hierarchy, AutoNormal(hierarchy), (DATA,), 6)
        after_the_steps()
    assert capture.num_captured == 3
    functions = {function: count for (_, _, function), (count, *_) in pstats.Stats(profiler).stats.items()}
    assert functions["after_the_steps"] == 1


def after_the_steps():
    pass


def test_steps_are_eager_under_a_profiler_that_cannot_take_up_again(monkeypatch):
    pyro.clear_param_store()
    capture = StepCapture(Trace_ELBO().loss_and_grads)
    guide = AutoNormal(hierarchy)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "getprofile", object)
        run_steps(capture, hierarchy, guide, (DATA,), 6)
        assert capture.num_recorded == 0
    run_steps(capture, hierarchy, guide, (DATA,), 6)
    assert capture.num_captured >= 2
