"""One process of a host compiles, and all of them compute the same bits."""

import json
import os
import subprocess
import sys

import pytest

from distopt.infer.capture import inductor

_PROCESS = """
import json
from tests.infer.capture.test_compiled import train
losses, params, capture = train(6)
print(json.dumps([losses, {name: value.tolist() for name, value in params.items()}, capture.keys, capture.notice]))
"""


def test_without_a_lock_each_process_compiles_by_itself(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with inductor._lock("key"):
        (lock,) = tmp_path.glob("distopt-*.lock")
    monkeypatch.setattr(inductor.fcntl, "flock", refuse)  # as where a file system has none, or the file is another's
    entered = []
    with inductor._lock("key"):
        entered.append(lock)
    assert entered


def bits_of_a_process(cache: str) -> str:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
    command = [sys.executable, "-W", "ignore", "-c", _PROCESS]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(done.stdout)[3] is None
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_processes_compute_the_same_bits_whether_they_compile_or_find_what_was_compiled(tmp_path):
    compiled_here = bits_of_a_process(str(tmp_path / "a"))
    assert bits_of_a_process(str(tmp_path / "a")) == compiled_here  # found
    assert bits_of_a_process(str(tmp_path / "b")) == compiled_here  # compiled anew
