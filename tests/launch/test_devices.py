"""GPUs and cores of a worker, read from trees as the driver and the kernel write them; no GPU is needed or opened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distopt.cgroups import available_cores
from distopt.config import parse_config
from distopt.launch.plan import env_of_workers
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
        ("0,-1,1", ["GPU-5d5ba0d6"]),
        ("2,2", []),
        ("1,GPU-8a1b2c3d", []),
        ("GPU-", []),  # of several
        ("1st", ["GPU-8a1b2c3d"]),
        ("MIG-cba663e8,MIG-cba663e8", []),
        ("MIG-cba663e8,MIG-c6d4f1ef", ["MIG-cba663e8", "MIG-c6d4f1ef"]),
        ("MIG-unlisted", ["MIG-unlisted"]),
    ],
)
def test_devices_are_those_that_cuda_numbers(chosen, expected, driver):
    environ = {} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen}
    seen = devices.visible(environ, driver, lambda: LISTING, driver / "dev")
    assert [device.uuid for device in seen] == expected


def test_instances_are_devices_and_know_their_gpu(driver):
    assert not devices.has_instances(driver)
    (driver / "capabilities/gpu1/mig/gi1/ci0").mkdir(parents=True)
    seen = devices.visible({}, driver, lambda: LISTING, driver / "dev")
    assert seen == [Device(name, "0000:0a:00.0", is_instance=True) for name in ("MIG-c6d4f1ef", "MIG-cba663e8")]
    given = [devices.device_env({}, seen, rank, 2) for rank in range(2)]
    assert given == [
        {"CUDA_VISIBLE_DEVICES": "MIG-c6d4f1ef", "DISTOPT_SINGLE_DEVICE": "1"},
        {"CUDA_VISIBLE_DEVICES": "MIG-cba663e8", "DISTOPT_SINGLE_DEVICE": "1"},
    ]
    # All train on the CPU as with whole GPUs, and not all but the last.
    assert [devices.device_env({}, seen, rank, 3) for rank in range(3)] == [{}] * 3


def test_whole_gpus_are_numbered_as_nvidia_smi_does_unless_the_user_says_otherwise(driver):
    seen = devices.gpus(driver, driver / "dev")
    assert len(seen) == 3
    assert devices.device_env({}, seen, 1, 2) == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert devices.device_env({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, seen, 1, 2) == {}
    assert devices.device_env({}, [], 0, 1) == {}


def test_gpus_of_the_machine_that_a_container_has_no_file_of_are_not_its_own(driver, tmp_path):
    dev = tmp_path / "dev"
    dev.mkdir()
    (dev / "nvidia2").touch()
    (dev / "nvidiactl").touch()
    (dev / "nvidia-uvm").touch()
    assert [device.uuid for device in devices.visible({}, driver, dev=dev)] == ["GPU-fe01aa22"]
    assert devices.visible({"CUDA_VISIBLE_DEVICES": "0"}, driver, dev=dev)[0].uuid == "GPU-fe01aa22"


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
        (0, 1, 2, LEFT | {4}, None),  # a cpuset that leaves the GPU's node one core of nine
        (1, 2, None, LEFT | {4}, None),
        (0, 1, 0, {40, 41}, None),  # of no node that is seen
    ],
)
def test_worker_is_bound_beside_its_gpu_or_to_its_share(local_rank, local_size, gpu, allowed, expected, kernel):
    device = None if gpu is None else Device("GPU-x", [*GPUS][gpu])
    assert devices.cpus_of_worker(local_rank, local_size, device, allowed, kernel) == expected


def device(number: int) -> Device:
    return Device([*GPUS.values()][number], [*GPUS][number])


@pytest.mark.parametrize(
    ("environ", "local_size", "seen", "expected"),
    [
        ({}, 1, [device(0)], (LEFT, 1, 8)),  # of 16 cores it may use 8
        ({}, 2, [device(0), device(2)], (LEFT, 1, 8)),
        ({}, 2, [device(0), device(0)], (LEFT, 2, 4)),  # both beside one node
        ({}, 2, [], (LEFT, 1, 8)),
        ({}, 4, [], (LEFT, 2, 4)),
        ({}, 3, [], (LEFT, 2, 4)),
        # Too few devices: workers train on the CPU, or each has been given one.
        ({}, 2, [device(0)], (None, 1, 8)),
        ({}, 4, [device(0), device(2)], (None, 1, 4)),
        ({"DISTOPT_BINDING": "cpu"}, 2, [device(2), device(2)], (LEFT, 1, 8)),
        ({"DISTOPT_BINDING": "none"}, 2, [device(0), device(2)], (None, 1, 8)),
        ({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, 2, [device(0), device(2)], (None, 1, 8)),
    ],
)
def test_first_worker_has_the_cores_and_threads_of_its_place(environ, local_size, seen, expected, kernel, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: LEFT | RIGHT)
    binding = devices.binding_of(environ, 0, local_size, seen, kernel)
    assert (binding.cpus, binding.num_sharing, binding.num_threads(16, local_size)) == expected
    assert binding.num_threads(1, local_size) == 1  # docker run --cpus 1


def test_worker_of_a_launcher_that_does_not_say_how_many_a_host_has_is_not_bound(kernel, monkeypatch):
    """srun gives its tasks a local rank alone, so that worker 1 would be the second of one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: LEFT | RIGHT)
    assert devices.binding_of({}, 1, 1, [], kernel) == devices.Binding()


def test_worker_that_the_kernel_does_not_let_be_bound_starts():
    before = os.sched_getaffinity(0)
    devices.bind({100_000})
    assert os.sched_getaffinity(0) == before


def test_workers_that_leave_gpus_alone_are_bound_without_regard_to_them():
    def binding(*overrides: str) -> str | None:
        return env_of_workers(parse_config("name: run\ntask: a:B\n", overrides)).get("DISTOPT_BINDING")

    assert binding() is None
    assert binding("train.device=cpu") == "cpu"
    assert binding("train.device=cpu", "launch.binding=none") == "none"


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
        f"devices.binding_of.__defaults__ = (Path({str(kernel)!r}),)\n"
        "status = supervisor.main(sys.argv[1:]); print(sorted(os.sched_getaffinity(0))); sys.exit(status)"
    )
    (tmp_path / "run/logs").mkdir(parents=True)
    worker = "import os, json; print(json.dumps([os.environ['OMP_NUM_THREADS'], sorted(os.sched_getaffinity(0))]))"
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run"), "--", sys.executable, "-c", worker],
        env={**clean, **variables, **environ}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "run/logs/rank-1.log").read_text().splitlines()
    threads = 1 if bound else max(1, available_cores() // 2)
    assert json.loads(log[-1]) == [str(threads), [cores[1]] if bound else cores]
    assert json.loads(done.stdout.splitlines()[-1]) == cores


@pytest.mark.parametrize(("cores", "expected"), [("1", 1), ("100000", available_cores()), (None, available_cores())])
def test_task_of_srun_has_a_thread_for_each_of_its_own_cores(cores, expected, tmp_path):
    """srun binds each task to cores of its own, which are not shared among the tasks once more."""
    (tmp_path / "run/logs").mkdir(parents=True)
    variables = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"}
    if cores is not None:
        variables["SLURM_CPUS_PER_TASK"] = cores
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    worker = "import os; print(os.environ['OMP_NUM_THREADS'])"
    command = [sys.executable, "-m", "distopt.launch.worker.supervisor", str(tmp_path / "run"), "--"]
    done = subprocess.run(
        [*command, sys.executable, "-c", worker],
        env={**clean, **variables}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/logs/rank-1.log").read_text().splitlines()[-1] == str(expected)
