"""No path assumes the CPU, and the host waits for the device as seldom as these figures say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

# The device is compiled first, and all scenarios run before the first test: minutes on a busy machine.
pytestmark = pytest.mark.timeout(700)

# torch's own ASGD reads its step count from the device, and sends its rates there.
WAITS_OF_TORCH = {"ASGD": 4.0}

# On the CPU these take a kernel that no other device has, so their last bits differ.
OTHER_KERNELS = {"Adagrad", "NAdam", "RAdam", "ASGD", "ClippedAdam", "DCTAdam", "Adam, global norm"}


@pytest.fixture(scope="module")
def audit():
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler {compiler!r}: install one, or set CXX")
    command = [sys.executable, "-m", "tests.gpu.audit", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def cases(audit, scenario):
    """Returns the scenario's results by the name of the case."""
    return {key.removeprefix(f"{scenario}: "): each for key, each in audit.items() if key.startswith(f"{scenario}:")}


def test_no_optimizer_waits_for_the_device(audit):
    results = cases(audit, "optimizers")
    assert len(results) > 15
    for name, each in results.items():
        assert each["waits"] == WAITS_OF_TORCH.get(name, 0), (name, each["lines"])
        assert each["difference"] <= (2e-6 if name in OTHER_KERNELS else 0), name


def test_optimizers_step_packed_parameters_in_few_kernels(audit):
    # One group of four small parameters and one large parameter: not a kernel for each parameter and operation.
    results = cases(audit, "optimizers")
    assert results["Adam"]["operations"] == 4
    assert results["SGD"]["operations"] == 2


def test_a_distributed_step_waits_once_for_what_the_ranks_said(audit):
    results = cases(audit, "reductions")
    for name, each in results.items():
        expected = 2 if "drift" in name else 1
        assert each["waits"] == expected, (name, each["lines"])
    assert results["average, compared"]["difference"] == 0


def test_svi_adds_one_wait_to_those_of_pyro(audit):
    for name, each in cases(audit, "svi_steps").items():
        ours = {line: count for line, count in each["lines"].items() if " pyro/" not in line}
        assert list(ours) == [line for line in ours if "distopt/reduce/messages.py" in line], name
        assert sum(ours.values()) == 3, name  # in three steps


def test_a_checkpoint_moves_state_in_a_few_copies_and_back_to_the_device(audit):
    [each] = cases(audit, "checkpoints").values()
    assert each["waits"] <= 8, each["lines"]
    assert each["difference"] == 0
    assert each["on_device"]


def test_a_run_from_a_yaml_trains_on_the_device(audit):
    [each] = cases(audit, "yaml_run").values()
    assert each["status"] == 0
    assert each["report"]


def test_shipped_configurations_train_and_report_on_the_device(audit):
    results = cases(audit, "examples")
    assert results.keys() == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    for name, each in results.items():
        assert each["status"] == 0, name
        assert each["on_device"], name
        assert each["tables"] > 0, name


def test_device_memory_cannot_be_read_by_the_host():
    # Otherwise a path that assumes the CPU would go unnoticed.
    code = "import torch, ctypes; from tests.gpu.far_device import FAR; t = torch.ones(3, device=FAR); "
    code += "print(t.sum().item(), flush=True); ctypes.string_at(t.data_ptr(), 4)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "3.0"
    assert done.returncode < 0


def test_device_is_not_registered_in_the_process_of_the_other_tests():
    # Whatever asks torch for the accelerator would find it there, and other tests would run with it.
    assert "tests.gpu.far_device" not in sys.modules
    assert torch.accelerator.current_accelerator() is None or torch.cuda.is_available()
