"""What doctor says of a machine's network, shared memory, NUMA nodes and GPUs."""

from __future__ import annotations

import pytest

from distopt.config import parse_config
from distopt.launch import hardware
from distopt.launch.worker import network
from distopt.launch.worker.devices import Device


@pytest.mark.parametrize(
    ("states", "message", "severity"),
    [
        ({}, "none; NCCL and gloo use sockets", "ok"),
        ({"mlx5_0": "4: ACTIVE", "mlx5_1": "1: DOWN"}, "mlx5_0 port 1", "ok"),
        ({"mlx5_0": "1: DOWN"}, "none of 1 ports is active", "warning"),
    ],
)
def test_infiniband_ports_that_are_active_are_named(states, message, severity, tmp_path):
    for device, state in states.items():
        (tmp_path / device / "ports/1").mkdir(parents=True)
        (tmp_path / device / "ports/1/state").write_text(f"{state}\n")
    finding = hardware.infiniband(tmp_path)
    assert (finding.message, finding.severity) == (message, severity)


def test_shared_memory_that_is_a_containers_default_is_a_warning(tmp_path, monkeypatch):
    assert hardware.shared_memory(tmp_path / "nosuch").severity == "warning"
    monkeypatch.setattr(hardware, "MIN_SHARED_GIB", 1e9)
    assert "--shm-size=8g" in hardware.shared_memory(tmp_path).fix


def run_config(*overrides: str):
    return parse_config("name: run\nscript: train.py\n", overrides)


def test_interface_is_the_one_that_the_hosts_know_this_machine_by():
    assert hardware.interface(run_config("launch.hosts=[localhost]")).message.startswith("lo 127.0.0.1, for gloo")
    assert hardware.interface(run_config("launch.interface=lo")).severity == "ok"
    assert "lo 127.0.0.1" in hardware.interface(None).message
    wrong = hardware.interface(run_config("launch.interface=ib9"))
    assert (wrong.severity, wrong.message.startswith("ib9 is none of this machine's: ")) == ("failure", True)


@pytest.mark.parametrize(
    ("environ", "severity", "expected"),
    [
        ({}, "ok", "NCCL_DEBUG=WARN; the rest"),
        ({"NCCL_DEBUG": "INFO", "HOME": "/root"}, "ok", "NCCL_DEBUG=INFO; the rest"),
        ({"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}, "warning", "NCCL takes a slower way"),
        ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}, "warning", "is waited for without end"),
    ],
)
def test_variables_of_libraries_are_shown_and_those_that_cost_are_warned_of(environ, severity, expected):
    finding = hardware.libraries(environ)
    assert finding.severity == severity and expected in finding.message
    assert all(f"{name}={value}" in finding.message for name, value in environ.items() if "NCCL" in name)
    assert finding.fix == ("" if severity == "ok" else finding.fix)


def test_devices_are_named_with_their_nodes_and_counted_against_the_workers(tmp_path):
    assert [*hardware.devices_of_workers(None, [])] == []
    folder = tmp_path / "bus/pci/devices/0000:07:00.0"
    folder.mkdir(parents=True)
    (folder / "numa_node").write_text("1\n")
    whole = [Device("GPU-a", "0000:07:00.0"), Device("GPU-b", "")]
    (finding,) = hardware.devices_of_workers(run_config("launch.workers=2"), whole, tmp_path)
    assert (finding.message, finding.severity) == ("2 GPUs: 0: GPU-a on node 1; 1: GPU-b", "ok")
    instances = [Device("MIG-a", "", is_instance=True)]
    (finding,) = hardware.devices_of_workers(run_config("launch.workers=2"), instances, tmp_path)
    assert finding.message == "1 instances of MIG, averaged over gloo: 0: MIG-a; 2 workers will train on the CPU"
    assert (finding.severity, finding.fix) == ("warning", "set launch.workers=1")


def test_numa_nodes_are_named(tmp_path):
    assert "one node" in hardware.numa(sys=tmp_path).message
    for node, cpus in enumerate(("0-3", "4-7")):
        (tmp_path / f"devices/system/node/node{node}").mkdir(parents=True)
        (tmp_path / f"devices/system/node/node{node}/cpulist").write_text(cpus)
    assert hardware.numa(sys=tmp_path).message.startswith("node 0 with 4 cores, node 1 with 4 cores; ")
    unbound = hardware.numa(run_config("launch.binding=none"), tmp_path)
    assert unbound.message.endswith("cores; workers are not bound, as launch.binding says")


ON_SLURM = ("launch.platform=slurm", "launch.workers=4", "launch.interface=ib9")


def test_machine_from_which_a_run_is_submitted_need_not_have_what_its_workers_do():
    assert hardware.interface(run_config(*ON_SLURM)).severity == "warning"
    (finding,) = hardware.devices_of_workers(run_config(*ON_SLURM), [Device("GPU-a", "")])
    assert (finding.message, finding.severity) == ("1 GPUs: 0: GPU-a", "ok")
    elsewhere = ("launch.platform=torchrun", "launch.hosts=[203.0.113.9]", "launch.workers=4")
    (finding,) = hardware.devices_of_workers(run_config(*elsewhere), [Device("GPU-a", "")])
    assert finding.severity == "ok"


def test_devices_are_those_that_the_run_shows_its_workers(monkeypatch):
    seen = []
    monkeypatch.setattr(hardware.devices, "visible", lambda environ: seen.append(environ) or [])
    [*hardware.examine_hardware(run_config("launch.env={CUDA_VISIBLE_DEVICES: '1'}"))]
    assert seen[0]["CUDA_VISIBLE_DEVICES"] == "1"


def test_defaults_are_of_the_libraries_that_are_shown():
    names = (*network.LIBRARY_DEFAULTS, *network.INTERFACE_VARIABLES)
    assert all(name.startswith(network.LIBRARY_PREFIXES) for name in names)
