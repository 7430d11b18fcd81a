"""What a worker writes of its own error, and which errors a restart would meet again."""

import json
import os
import subprocess
import sys

import pytest

from distopt.backends import BackendError
from distopt.checkpoint.errors import CheckpointError, ConfigMismatchError, UnreadableCheckpointError
from distopt.config import ConfigError
from distopt.launchers import ERROR_FILE_VARIABLE
from distopt.reduce import PeerError
from distopt.train.task import TaskError
from distopt.worker_error import WorkerError, is_permanent, parse_error, read_error, record_error


def caused(error, cause):
    error.__cause__ = cause
    return error


def while_handling(error, handled):
    error.__context__ = handled
    return error


class EndpointConnectionError(Exception):
    """Derives from Exception alone, as botocore's of this name."""


class DistNetworkError(RuntimeError):
    """As torch.distributed's."""


@pytest.mark.parametrize(
    ("error", "in_first_step", "later"),
    [
        (ConfigError(["optim.args: lr is nan"]), True, True),
        (ConfigMismatchError("another configuration"), True, True),
        (caused(CheckpointError("resume"), ConfigMismatchError("another configuration")), True, True),
        (ModuleNotFoundError("No module named 'x'"), True, True),
        (SyntaxError("invalid syntax"), True, True),
        (ImportError("lib.so: cannot read file data: Input/output error"), False, False),
        (ImportError("lib.so: failed to map segment from shared object: Cannot allocate memory"), False, False),
        (caused(ConfigError(["task: importing it failed"]), ImportError("lib.so: Stale file handle")), False, False),
        (TypeError("unexpected keyword argument 'lrr'"), True, False),
        (TaskError("task: rows() returned 0"), True, False),
        (AssertionError(), True, False),
        (ValueError("NaN"), True, False),
        (OSError(5, "Input/output error"), False, False),
        (FileNotFoundError(2, "No such file"), False, False),
        (ConnectionResetError(), False, False),
        (TimeoutError(), False, False),
        (MemoryError(), False, False),
        (RuntimeError("CUDA error: unspecified launch failure"), False, False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), False, False),
        (BackendError("rank 1 failed first"), False, False),
        (PeerError("rank 1 of 2 failed"), False, False),
        (UnreadableCheckpointError("step-5"), False, False),
        (caused(ConfigError(["task: importing it failed"]), OSError(116, "Stale file handle")), False, False),
        (caused(ConfigError(["train.device: cuda"]), RuntimeError("CUDA error: out of memory")), False, False),
        (EndpointConnectionError("Could not connect to the endpoint URL"), False, False),
        (caused(TaskError("task: rows() failed"), EndpointConnectionError()), False, False),
        (DistNetworkError("The client socket has failed to connect"), False, False),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR"), False, False),
        (RuntimeError("Socket Timeout"), False, False),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), False, False),
        (RuntimeError("Expected all tensors to be on the same device, found cuda:0 and cpu"), True, False),
        (while_handling(ValueError("no rows"), ConnectionRefusedError()), False, False),
        (while_handling(ConnectionRefusedError(), ModuleNotFoundError("no faster reader")), False, False),
        (while_handling(ValueError("no rows"), ModuleNotFoundError("no faster reader")), True, False),
        (KeyboardInterrupt(), False, False),
        (SystemExit(3), False, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_is_permanent_if_a_restart_would_meet_it_again(error, in_first_step, later):
    assert is_permanent(error, in_first_step=True) is in_first_step
    assert is_permanent(error, in_first_step=False) is later


def test_the_first_error_is_recorded_with_its_place_and_read_again(tmp_path, monkeypatch):
    path = tmp_path / "error.json"
    monkeypatch.setenv(ERROR_FILE_VARIABLE, str(path))
    for text in ("a bad row\nmore", "a consequence"):
        try:
            raise ValueError(text)
        except ValueError as error:
            record_error(error, permanent=True, resumed_from=5)
    recorded = read_error(path)
    assert recorded is not None
    assert (recorded.text, recorded.permanent, recorded.resumed_from, recorded.from_peer) == (
        "ValueError: a bad row",
        True,
        5,
        False,
    )
    assert "test_worker_error.py:" in recorded.location


@pytest.mark.parametrize(
    ("error", "may_pass"),
    [
        (TimeoutError(), True),
        (OSError(5, "Input/output error"), True),
        (caused(TaskError("task: rows() failed"), EndpointConnectionError()), True),
        (while_handling(ValueError("no rows"), ConnectionRefusedError()), True),
        (FileNotFoundError(2, "No such file"), False),
        (ValueError("NaN"), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_of_a_connection_is_recorded_as_one_that_may_pass(error, may_pass, tmp_path, monkeypatch):
    monkeypatch.setenv(ERROR_FILE_VARIABLE, str(tmp_path / "error.json"))
    record_error(error)
    recorded = read_error(tmp_path / "error.json")
    assert recorded is not None and recorded.may_pass is may_pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"text": "of another version"}'])
def test_a_record_that_was_cut_or_is_of_another_version_is_none(text, tmp_path):
    (tmp_path / "error.json").write_text(text)
    assert read_error(tmp_path / "error.json") is None
    assert read_error(tmp_path / "missing.json") is None


def test_nothing_is_written_outside_of_a_launched_worker_nor_raised_where_it_cannot_be(tmp_path, monkeypatch):
    monkeypatch.delenv(ERROR_FILE_VARIABLE, raising=False)
    record_error(ValueError())
    monkeypatch.setenv(ERROR_FILE_VARIABLE, str(tmp_path / "no" / "folder"))
    record_error(ValueError())


@pytest.mark.parametrize(
    ("change", "repeats"),
    [
        ({}, True),
        ({"text": "ValueError: other"}, False),
        ({"location": "task.py:4 in batch"}, False),
        ({"resumed_from": 10}, False),
        ({"resumed_from": None}, False),
        ({"from_peer": True}, False),
        ({"text": "MemoryError"}, False),
        ({"may_pass": True}, False),
    ],
    ids=str,
)
def test_an_error_repeats_one_of_the_same_text_and_place_if_no_checkpoint_was_made_between(change, repeats):
    fields = {"text": "ValueError: no", "location": "task.py:3 in batch", "time": 1.0, "resumed_from": 5}
    before, again = parse_error(fields), parse_error({**fields, "time": 2.0, **change})
    assert isinstance(before, WorkerError) and isinstance(again, WorkerError)
    assert again.repeats(before) is repeats


def test_the_module_takes_the_standard_library_alone():
    libraries = ("torch", "pyro", "yaml", "pydantic")
    code = f"import sys, distopt.worker_error; print([m for m in {libraries} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []
