"""What starts with every rank imports little: each module that runs beside a worker, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distopt.launch import worker

MODULES = sorted(path.stem for path in Path(worker.__file__).parent.glob("[a-z]*.py"))
ALLOWED = {
    "distopt",
    "distopt.cgroups",
    "distopt.launchers",
    "distopt.worker_error",
    "distopt.launch",
    "distopt.launch.worker",
}


@pytest.mark.parametrize("module", MODULES)
def test_module_beside_a_worker_takes_the_standard_library_and_three_modules_of_distopt_alone(module):
    code = (
        f"import sys; before = set(sys.modules); import distopt.launch.worker.{module}\n"
        "loaded = set(sys.modules) - before\n"
        "print(*sorted(name for name in loaded if name.partition('.')[0] not in sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    others = set(done.stdout.split()) - ALLOWED
    assert {name for name in others if not name.startswith("distopt.launch.worker.")} == set()
