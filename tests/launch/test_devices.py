"""GPUs and cores of a worker, read from trees as the driver and the kernel write them; no GPU is needed or opened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distopt.launch.worker import devices
from distopt.launch.worker.devices import Device

GPUS = {"0000:07:00.0": "GPU-5d5ba0d6", "0000:0a:00.0": "GPU-8a1b2c3d", "0000:87:00.0": "GPU-fe01aa22"}
# As nvidia-smi of driver 535 prints two instances of the second GPU.
LISTING = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-8a1b2c3d)
  MIG 3g.20gb     Device  0: (UUID: MIG-c6d4f1ef)
  MIG 3g.20gb     Device  1: (UUID: MIG-cba663e8)
GPU 2: NVIDIA A100-SXM4-40GB (UUID: GPU-fe01aa22)
"""


@pytest.fixture
def driver(tmp_path) -> Path:
    folder = tmp_path / "nvidia"
    for number, (pci, uuid) in enumerate(GPUS.items()):
        (folder / "gpus" / pci).mkdir(parents=True)
        (folder / "gpus" / pci / "information").write_text(
            f"Model: \t\t NVIDIA A100-SXM4-40GB\nIRQ:   \t\t 105\nGPU UUID: \t {uuid}\nBus Location: \t {pci}\n"
            f"Device Minor: \t {number}\nGPU Excluded:\t No\n"
        )
    return folder


@pytest.fixture
def kernel(tmp_path) -> Path:
    """Two sockets of eight cores; one GPU says nothing of its place."""
    folder = tmp_path / "sys"
    for node, cpus in enumerate(("0-3,8-11", "4-7,12-15")):
        (folder / f"devices/system/node/node{node}").mkdir(parents=True)
        (folder / f"devices/system/node/node{node}/cpulist").write_text(cpus + "\n")
    for pci, node in zip(GPUS, ("0", "-1", "1"), strict=True):
        (folder / "bus/pci/devices" / pci).mkdir(parents=True)
        (folder / "bus/pci/devices" / pci / "numa_node").write_text(node + "\n")
    return folder


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (None, [*GPUS.values()]),
        ("", []),
        ("2,0", ["GPU-fe01aa22", "GPU-5d5ba0d6"]),
        ("GPU-8a, 0", ["GPU-8a1b2c3d", "GPU-5d5ba0d6"]),
        ("1,7,0", ["GPU-8a1b2c3d"]),
        ("-1", []),
        ("MIG-cba663e8,MIG-c6d4f1ef", ["MIG-cba663e8", "MIG-c6d4f1ef"]),
        ("MIG-unlisted", ["MIG-unlisted"]),
    ],
)
def test_devices_are_those_that_cuda_numbers(chosen, expected, driver):
    environ = {} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen}
    seen = devices.visible(environ, driver, lambda: LISTING)
    assert [device.uuid for device in seen] == expected


def test_instances_are_devices_and_know_their_gpu(driver):
    assert not devices.has_instances(driver)
    (driver / "capabilities/gpu1/mig/gi1/ci0").mkdir(parents=True)
    seen = devices.visible({}, driver, lambda: LISTING)
    assert seen == [Device(name, "0000:0a:00.0", is_instance=True) for name in ("MIG-c6d4f1ef", "MIG-cba663e8")]
    given = [devices.device_env({}, seen, rank) for rank in range(3)]
    assert given == [
        {"CUDA_VISIBLE_DEVICES": "MIG-c6d4f1ef", "DISTOPT_SINGLE_DEVICE": "1"},
        {"CUDA_VISIBLE_DEVICES": "MIG-cba663e8", "DISTOPT_SINGLE_DEVICE": "1"},
        {},
    ]


def test_whole_gpus_are_numbered_as_nvidia_smi_does_unless_the_user_says_otherwise(driver):
    seen = devices.gpus(driver)
    assert devices.device_env({}, seen, 1) == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert devices.device_env({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, seen, 1) == {}
    assert devices.device_env({}, [], 0) == {}


def test_machine_without_a_driver_has_no_devices_and_asks_nobody(tmp_path):
    def ask() -> str:
        raise AssertionError("nvidia-smi takes seconds, and every rank would run it")

    assert devices.visible({}, tmp_path, ask) == []


LEFT, RIGHT = {0, 1, 2, 3, 8, 9, 10, 11}, {4, 5, 6, 7, 12, 13, 14, 15}


@pytest.mark.parametrize(
    ("local_rank", "local_size", "gpu", "allowed", "expected"),
    [
        (0, 1, 0, LEFT | RIGHT, LEFT),
        (0, 2, 2, LEFT | RIGHT, RIGHT),  # the GPU decides, not the rank
        (1, 2, 1, LEFT | RIGHT, None),  # a GPU that does not tell
        (0, 2, None, LEFT | RIGHT, LEFT),
        (1, 2, None, LEFT | RIGHT, RIGHT),
        (3, 4, None, LEFT | RIGHT, RIGHT),
        (1, 3, None, LEFT | RIGHT, LEFT),
        (0, 1, None, LEFT | RIGHT, None),  # alone, it may use all
        (0, 2, None, {0, 1, 4}, {0, 1}),
        (1, 2, None, LEFT, None),  # bound to one node already, as by srun
        (0, 2, 2, {0, 1}, None),
    ],
)
def test_worker_is_bound_beside_its_gpu_or_to_its_share(local_rank, local_size, gpu, allowed, expected, kernel):
    device = None if gpu is None else Device("GPU-x", [*GPUS][gpu])
    assert devices.cpus_of_worker(local_rank, local_size, device, allowed, kernel) == expected


def test_nodes_without_cores_are_none(kernel):
    (kernel / "devices/system/node/node2").mkdir()  # of memory alone, as those of CXL
    (kernel / "devices/system/node/node2/cpulist").write_text("\n")
    assert devices.numa_nodes(kernel) == {0: LEFT, 1: RIGHT}


@pytest.mark.parametrize(("environ", "bound"), [({}, True), ({"DISTOPT_BINDING": "none"}, False)])
def test_supervisor_binds_its_worker_and_not_itself(environ, bound, kernel, tmp_path):
    """A real supervisor over a tree in which each core of this machine is a node of its own."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core")
    for node in (0, 1):
        (kernel / f"devices/system/node/node{node}/cpulist").write_text(f"{cores[node]}\n")
    code = (
        "import os, sys; from pathlib import Path; from distopt.launch.worker import devices, supervisor\n"
        f"devices.cpus_of_worker.__defaults__ = (Path({str(kernel)!r}),)\n"
        "status = supervisor.main(sys.argv[1:]); print(sorted(os.sched_getaffinity(0))); sys.exit(status)"
    )
    (tmp_path / "run/logs").mkdir(parents=True)
    worker = "import os, json; print(json.dumps(sorted(os.sched_getaffinity(0))))"
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run"), "--", sys.executable, "-c", worker],
        env={**os.environ, **variables, **environ}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "run/logs/rank-1.log").read_text().splitlines()
    assert json.loads(log[-1]) == ([cores[1]] if bound else cores)
    assert json.loads(done.stdout.splitlines()[-1]) == cores
