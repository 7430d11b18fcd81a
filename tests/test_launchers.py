"""Who started this process: each launcher alone, and each inside of each other one."""

from __future__ import annotations

import subprocess
import sys
from itertools import permutations

import pytest

from distopt.launchers import (
    LAUNCHERS,
    LauncherError,
    RankInfo,
    count_restarts,
    find_launcher,
    find_rank,
    find_rendezvous,
)


def torchrun(rank: int, size: int) -> dict[str, str]:
    variables = {"TORCHELASTIC_RUN_ID": "1", "RANK": f"{rank}", "WORLD_SIZE": f"{size}", "LOCAL_RANK": "1"}
    return variables | {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "29400"}


def horovodrun(rank: int, size: int) -> dict[str, str]:
    variables = {"HOROVOD_RANK": f"{rank}", "HOROVOD_SIZE": f"{size}", "HOROVOD_LOCAL_RANK": "1"}
    return variables | {"HOROVOD_LOCAL_SIZE": "2", "HOROVOD_CROSS_RANK": "1"}


def open_mpi(rank: int, size: int) -> dict[str, str]:
    variables = {"OMPI_COMM_WORLD_RANK": f"{rank}", "OMPI_COMM_WORLD_SIZE": f"{size}"}
    return variables | {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}


def mpich(rank: int, size: int) -> dict[str, str]:
    return {"PMI_RANK": f"{rank}", "PMI_SIZE": f"{size}", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def srun(rank: int, size: int) -> dict[str, str]:
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": f"{size}", "SLURM_STEP_NODELIST": "dn1"}
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": f"{size}", "SLURM_NODEID": "1", "SLURM_LOCALID": "1"}
    return job | step | {"SLURM_PROCID": f"{rank}"}


def pmi(rank: int, size: int) -> dict[str, str]:
    return {"PMI_RANK": f"{rank}", "PMI_SIZE": f"{size}"}


def pod(rank: int, size: int) -> dict[str, str]:
    return {"KUBERNETES_SERVICE_HOST": "10.0.0.1"} | exported(rank, size)


def exported(rank: int, size: int) -> dict[str, str]:
    return {"MASTER_ADDR": "h", "MASTER_PORT": "9", "RANK": f"{rank}", "WORLD_SIZE": f"{size}", "LOCAL_RANK": "1"}


def ray_train(rank: int, size: int) -> dict[str, str]:
    """What a worker of `TorchTrainer` has, seen with Ray 2.60."""
    return {"RAY_JOB_ID": "01000000", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "1"} | exported(rank, size)


def skypilot(rank: int, size: int) -> dict[str, str]:
    node = {"SKYPILOT_NODE_RANK": f"{rank}", "SKYPILOT_NUM_NODES": f"{size}", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    return node | {"SKYPILOT_NODE_IPS": "\n".join(f"10.0.0.{number}" for number in range(1, size + 1))}


ENVIRONMENTS = {
    "torchrun": torchrun,
    "horovodrun": horovodrun,
    "mpirun (Open MPI)": open_mpi,
    "mpirun (MPICH)": mpich,
    "Ray Train": ray_train,
    "srun": srun,
    "a PMI launcher": pmi,
    "Kubernetes": pod,
    "the environment": exported,
    "SkyPilot": skypilot,
}

# Which of two launchers started the process where the variables of both are set: what runs inside of what in practice.
INNER = {
    # One torchrun on each node is what the others start; its workers start none of them.
    "torchrun": {"horovodrun", "mpirun (Open MPI)", "mpirun (MPICH)", "srun", "a PMI launcher", "Kubernetes"},
    # horovodrun is the command of a batch job or a pod. (horovodrun --mpi sets no rank: mpirun does.)
    "horovodrun": {"mpirun (Open MPI)", "mpirun (MPICH)", "srun", "a PMI launcher", "Kubernetes"},
    # mpirun is the command of a batch job or a pod; in a Slurm job its daemons are tasks of srun, one on each node.
    "mpirun (Open MPI)": {"mpirun (MPICH)", "srun", "a PMI launcher", "Kubernetes"},
    "mpirun (MPICH)": {"srun", "Kubernetes"},
    # Slurm's nodes may be pods, and its plugins for PMI set the variables of PMI, too.
    "srun": {"a PMI launcher", "Kubernetes"},
    "a PMI launcher": {"Kubernetes"},
    # Ray's nodes may be tasks of srun or pods. A worker of Ray Train may start any launcher but those.
    "Ray Train": {"srun", "a PMI launcher", "Kubernetes"},
}
IN_RAY_TRAIN = ("torchrun", "horovodrun", "mpirun (Open MPI)", "mpirun (MPICH)")


def nestings() -> list[tuple[str, str]]:
    """Returns (outer, inner) of every two launchers."""
    pairs = [(outer, inner) for inner, outers in INNER.items() for outer in outers]
    pairs += [("Ray Train", inner) for inner in IN_RAY_TRAIN]
    # SkyPilot's command runs once on each node, and starts whatever it starts there.
    pairs += [("SkyPilot", inner) for inner in ENVIRONMENTS if inner != "SkyPilot"]
    # RANK, WORLD_SIZE and MASTER_ADDR may be exported around any launcher, and left over from another run.
    others = ENVIRONMENTS.keys() - {"the environment", "SkyPilot"}
    return sorted(pairs) + [("the environment", inner) for inner in sorted(others)]


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_each_launcher_is_recognised_by_its_variables(name):
    info = find_rank(ENVIRONMENTS[name](3, 4))
    local_rank = None if name in ("a PMI launcher", "SkyPilot") else 1
    assert info is not None
    assert (info.launcher, info.rank, info.world_size, info.local_rank) == (name, 3, 4, local_rank)


def test_every_launcher_of_the_table_has_an_example_and_every_pair_an_answer():
    names = {launcher.name for launcher in LAUNCHERS}
    assert names == set(ENVIRONMENTS)
    # Hydra's processes have the variables of PMI, so these two are one.
    known = {frozenset(pair) for pair in nestings()} | {frozenset(("a PMI launcher", "mpirun (MPICH)"))}
    assert known == {frozenset(pair) for pair in permutations(names, 2)}


@pytest.mark.parametrize(("outer", "inner"), nestings(), ids=lambda name: name)
def test_launcher_inside_of_another_is_the_one_that_counts(outer, inner):
    # An inner launcher overwrites the variables that it shares with the outer one.
    info = find_rank(ENVIRONMENTS[outer](0, 2) | ENVIRONMENTS[inner](1, 4))
    assert info is not None
    assert (info.launcher, info.rank, info.world_size) == (inner, 1, 4)


def test_mpirun_in_a_slurm_job_is_not_taken_for_the_srun_that_started_its_daemons():
    daemon = srun(1, 2)  # the second node's, and what all of its four ranks see
    for launcher in (open_mpi, mpich):
        ranks = [find_rank(daemon | launcher(rank, 8)) for rank in range(4, 8)]
        assert [info.rank for info in ranks if info is not None] == [4, 5, 6, 7]


def test_srun_with_a_pmi_plugin_is_srun():
    info = find_rank(srun(1, 4) | pmi(1, 4))
    assert info is not None and info.launcher == "srun"


def test_task_of_srun_knows_how_many_are_on_its_node():
    for node, expected in ((0, 2), (2, 2), (3, 1), (4, None)):
        environ = srun(1, 4) | {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": str(node)}
        info = find_rank(environ)
        assert info is not None and info.local_size == expected


def test_world_set_up_by_hand_in_an_interactive_shell_of_slurm_counts():
    shell = srun(0, 1)
    assert find_rank(shell) == RankInfo("srun", 0, 1, 1, None, 1)
    info = find_rank(shell | exported(1, 2))
    assert info is not None and (info.launcher, info.rank, info.world_size) == ("the environment", 1, 2)


def test_processes_of_skypilot_meet_at_its_first_node():
    info = find_rank(skypilot(1, 2))
    assert info == RankInfo("SkyPilot", 1, 2, None, None, 1)
    assert find_rendezvous(info, skypilot(1, 2)) == ("10.0.0.1", 29400)
    assert find_rendezvous(info, skypilot(1, 2) | {"MASTER_PORT": "5"}) == ("10.0.0.1", 5)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RAY_JOB_ID": "01000000", "RAY_RAYLET_PID": "5"},  # an actor or a task of Ray, or another trainer of it
        {"RANK": "1", "WORLD_SIZE": "4"},  # left over: no launcher sets them without an address or its own marker
        {"SLURM_JOB_ID": "5", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"},  # a batch script
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        {"MASTER_ADDR": "h", "WORLD_SIZE": "4"},
        {"MASTER_ADDR": "h", "WORLD_SIZE": "1", "RANK": ""},
        {"TORCHELASTIC_RUN_ID": "", "OMPI_COMM_WORLD_RANK": "", "OMPI_COMM_WORLD_SIZE": ""},
    ],
    ids=["empty", "actor of Ray", "left over", "batch script", "pod", "no rank", "cleared rank", "cleared markers"],
)
def test_process_that_no_launcher_started_has_no_rank(variables):
    assert find_launcher(variables) is None
    assert find_rank(variables) is None


@pytest.mark.parametrize("change", [{"RANK": "x"}, {"RANK": "4"}, {"RANK": "-1"}, {"RANK": ""}, {"RANK": "1" * 50}])
def test_variables_that_make_no_sense_are_an_error_that_shows_them(change):
    with pytest.raises(LauncherError, match=f"RANK='{change['RANK']}'"):
        find_rank(torchrun(3, 4) | change)


@pytest.mark.parametrize(
    "variables",
    [
        {"MASTER_ADDR": "h", "RANK": "", "WORLD_SIZE": "2"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "RANK": "", "WORLD_SIZE": "2"},
        {"OMPI_COMM_WORLD_RANK": "", "OMPI_COMM_WORLD_SIZE": "2"},
        {"SLURM_STEP_ID": "0", "SLURM_PROCID": "", "SLURM_STEP_NUM_TASKS": "2"},
    ],
    ids=["exported", "pod", "mpirun", "srun"],
)
def test_rank_of_several_that_is_set_to_nothing_is_an_error_that_says_what_to_set(variables):
    with pytest.raises(LauncherError, match=r"is set to nothing while \w+='2'\. Set \w+ to this process's rank"):
        find_rank(variables)


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": ""},
        {"RANK": "1", "WORLD_SIZE": "", "MASTER_ADDR": "h"},
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": ""},
        {"SLURM_PROCID": "3", "SLURM_STEP_ID": "", "SLURM_STEP_NUM_TASKS": "4"},
    ],
    ids=["address", "world size", "mpirun", "srun"],
)
def test_later_rank_beside_a_variable_that_is_set_to_nothing_is_no_run_of_its_own(variables):
    (cleared,) = [name for name, value in variables.items() if not value]
    with pytest.raises(LauncherError, match=cleared):
        find_rank(variables)


def test_srun_meets_at_the_first_node_of_the_step():
    info = RankInfo("srun", 1, 4)
    variables = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "dn[3-5],gpu1"}
    assert find_rendezvous(info, variables) == ("dn3", 15000 + 7 * 16 + 2)
    assert find_rendezvous(info, variables | {"MASTER_ADDR": "h", "MASTER_PORT": "9"}) == ("h", 9)


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1", "9" * 40])
def test_port_that_is_none_is_an_error(port):
    with pytest.raises(LauncherError, match=f"MASTER_PORT='{port}': expected a port number from 1 to 65535"):
        find_rendezvous(RankInfo("srun", 1, 4), {"MASTER_ADDR": "h", "MASTER_PORT": port})


def test_address_that_is_missing_names_the_variables():
    with pytest.raises(LauncherError, match=r"rank 1 of 4, started by horovodrun: MASTER_ADDR and MASTER_PORT not set"):
        find_rendezvous(RankInfo("horovodrun", 1, 4), {"MASTER_ADDR": "", "MASTER_PORT": ""})


def test_import_takes_the_standard_library_alone():
    code = (
        "import sys; before = set(sys.modules); import distopt.launchers\n"
        "others = {name.partition('.')[0] for name in set(sys.modules) - before} - {'distopt'}\n"
        "print(sorted(others - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("value", ["", " ", "x", "-1", "1.5", "9" * 50, "\u00b2", "\u0661", "\udcff", "a b", ","])
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_any_value_of_any_variable_is_understood_or_an_error_of_the_launcher(name, value):
    whole = ENVIRONMENTS[name](1, 2)
    more = {"MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "TORCHELASTIC_RESTART_COUNT"}
    for variable in whole.keys() | more:
        changed = whole | {variable: value}
        assert count_restarts(changed) >= 0
        try:
            info = find_rank(changed)
            if info is not None:
                assert 0 <= info.rank < info.world_size
                find_rendezvous(info, changed)
        except LauncherError as error:
            assert len(str(error)) < 600
