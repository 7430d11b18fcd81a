"""The CPU image, built for real and run in containers: `make test-images`.

Two containers on a network of their own get the command, environment and security context of the Indexed Job's pods,
as the launcher renders them. What is not here: a kubelet and the Job controller; in their place the test starts and
kills pods.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distopt.config import load_config
from distopt.launch.platforms.kubernetes.manifests import manifests
from tests.docker import engine as engines
from tests.docker.engine import IMAGE, Engine
from tests.docker.pods import SUBNET, network, podman_run

ROOT = Path(__file__).parents[2]
USER = 1000

pytestmark = [
    pytest.mark.images,
    pytest.mark.timeout(3600),
    pytest.mark.skipif("DISTOPT_TEST_IMAGES" not in os.environ, reason="builds an image: make test-images"),
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    lacking = engines.missing()
    if lacking:
        pytest.fail(lacking, pytrace=False)  # it was asked for
    return Engine(engines.kept_folder())


@pytest.fixture(scope="module")
def image(engine: Engine) -> dict[str, Any]:
    engine.make_image()
    return engine.inspect(IMAGE)


@pytest.fixture
def root(engine: Engine, image: dict[str, Any]) -> Iterator[Path]:
    """The image's files."""
    folder = engine.call("podman", "image", "mount", IMAGE).stdout.strip()
    yield Path(folder)
    engine.call("podman", "image", "unmount", IMAGE)


def test_the_image_runs_without_privileges_under_an_init_with_labels_and_a_health_check(image: dict[str, Any]) -> None:
    config = image["Config"]
    assert (config["User"], config["Entrypoint"]) == ("1000:1000", ["tini", "--"])
    assert image["Healthcheck"]["Test"] == [
        "CMD",
        "python",
        "-m",
        "distopt.launch.worker.health_probe",
        "127.0.0.1",
        "8080",
    ]
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in image["Labels"].items()}
    assert {"title", "licenses", "version"} <= labels.keys()
    assert re.fullmatch(r"[0-9a-f]{40}", labels["revision"])


def test_nothing_of_the_build_is_left_in_the_image(root: Path) -> None:
    for unwanted in ("usr/bin/c++", "usr/bin/make", "src", "wheels", "dist"):
        assert not list(root.glob(f"{unwanted}*")), unwanted
    assert list((root / "var/lib/apt/lists").glob("*")) == []
    assert [path.name for path in (root / "var/cache/apt").rglob("*") if path.is_file()] in ([], ["lock"])
    for folder in ("root/.cache", "home/mpiuser/.cache", "tmp", "var/tmp"):
        assert list((root / folder).glob("*")) == [], folder
    assert list((root / "etc/ssh").glob("ssh_host_*")) == [], "host keys that every container would share"


def test_nothing_of_the_building_machine_is_in_the_image(engine: Engine, root: Path, image: dict[str, Any]) -> None:
    for name in ("hostname", "resolv.conf", "apt/sources.list", "pip.conf"):
        path = root / "etc" / name
        assert not path.exists() or path.read_text() == "", name
    history = json.dumps([image, json.loads(engine.call("podman", "history", "--format=json", IMAGE).stdout)])
    for host in engines.package_hosts():
        assert host not in history
    trusted = [*root.glob("etc/ssl/certs/*.crt"), *root.glob("usr/local/share/ca-certificates/**/*.crt")]
    trusted += root.glob("opt/venv/lib/python3*/site-packages/**/cacert.pem")
    assert trusted
    for certificate in engines.foreign_certificates():
        assert not [path for path in trusted if certificate in path.read_text()]


def test_torch_is_for_cpus_horovod_has_gloo_and_mpi_and_our_loops_are_compiled(
    engine: Engine, image: dict[str, Any]
) -> None:
    asked = (
        "import json, torch, torch.distributed as dist, horovod.torch as hvd; from distopt.optim import bulk;"
        "has = [dist.is_gloo_available(), hvd.gloo_built(), hvd.mpi_built(), bulk._compiled is not None];"
        "print(json.dumps([torch.version.cuda, *has]))"
    )
    run = engine.call(
        "podman", "run", "--rm", "--network=none", "--read-only", "--tmpfs=/tmp", IMAGE, "python", "-c", asked
    )
    assert json.loads(run.stdout.splitlines()[-1]) == [None, True, True, True, True]


def test_the_health_check_fails_while_the_run_s_endpoint_says_that_it_is_stalled(
    engine: Engine, image: dict[str, Any]
) -> None:
    serve = (
        "import sys; from datetime import timedelta\n"
        "from distopt.train.serve import StatusServer; from distopt.train.monitor import Status\n"
        "print('up', flush=True)\n"
        "for line in sys.stdin:\n"
        "    server = StatusServer(Status(), port=8080, stall=timedelta(seconds=float(line)))\n"
        "    print('serving', flush=True); sys.stdin.readline(); server.close(); print('closed', flush=True)"
    )
    command = ["podman", "run", "-i", "--rm", "--name=distopt-health", "--network=none", IMAGE, "python", "-c", serve]
    with subprocess.Popen(
        command, env=engine.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as container:
        assert container.stdin is not None
        assert container.stdout is not None

        def health(healthz: str) -> int:
            assert container.stdout is not None
            assert container.stdout.readline() == f"{healthz}\n"
            return engine.call("podman", "healthcheck", "run", "distopt-health", check=False).returncode

        try:
            assert health("up") == 0, "a container that serves nothing may be all right"
            for stall_s, expected in ((3600, 0), (0, 1)):
                print(stall_s, file=container.stdin, flush=True)
                assert health("serving") == expected
                print("close", file=container.stdin, flush=True)
                assert health("closed") == 0
        finally:
            engine.call("podman", "rm", "--force", "--time=0", "distopt-health")


class Job:
    """The pods of an Indexed Job and, in place of the Job's controller, what starts and ends them."""

    def __init__(self, engine: Engine, folder: Path, hosts: list[str], *overrides: str) -> None:
        platform = [
            "launch.platform=kubernetes",
            f"launch.nodes={len(hosts)}",
            "launch.workers=1",
            f"launch.kubernetes.image={IMAGE}",
            "launch.kubernetes.volumes=[{claim: runs, path: /runs}]",
            "run_dir=/runs/flights",
            "serve.port=8080",
            "serve.host=0.0.0.0",
        ]
        config = load_config(ROOT / "configs/flights.yaml", [*platform, *overrides])
        self.objects = manifests(config)
        self.manifest = self.objects[-1]
        self.engine, self.folder, self.hosts = engine, folder, hosts
        self.volume = folder / "volume"
        self.volume.mkdir(exist_ok=True)
        os.chown(self.volume, USER, USER)
        self.pods: dict[int, subprocess.Popen[bytes]] = {}
        self.starts = 0

    def start(self, index: int) -> None:
        self.engine.call("podman", "rm", "--force", "--time=0", "--ignore", f"flights-{index}")
        self.starts += 1
        command = podman_run(self.engine, self.objects, index, self.hosts, {"runs": self.volume})
        self.pods[index] = self.engine.start(*command, log=self.folder / f"pod-{index}-start-{self.starts}.log")

    def wait(self, timeout: float) -> list[int]:
        """Returns the exit status of each pod, starting those that fail again, as the controller does."""
        end = time.monotonic() + timeout
        return [pod.wait(timeout=max(1.0, end - time.monotonic())) for _, pod in sorted(self.pods.items())]

    def ask(self, index: int, path: str) -> str:
        """Returns what a pod answers over the network, as a kubelet or Prometheus asks; empty when it does not."""
        url = f"http://{SUBNET}.{index + 1}:8080{path}"
        script = f"from urllib.request import urlopen; print(urlopen({url!r}, timeout=5).read().decode(), end='')"
        inside = ["nsenter", f"--net=/run/netns/{self.hosts[1 - index]}", sys.executable, "-c", script]
        return subprocess.run(inside, capture_output=True, text=True, timeout=30).stdout

    def step(self, index: int) -> int:
        match = re.search(r"^distopt_step (\S+)", self.ask(index, "/metrics"), re.MULTILINE)
        return int(float(match[1])) if match else -1

    def checkpoints(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in self.volume.glob("flights/checkpoints/step-*"))

    def logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("*.log")))

    def remove(self) -> None:
        for index in range(len(self.hosts)):
            self.engine.call("podman", "rm", "--force", "--time=0", "--ignore", f"flights-{index}")


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    with network(2) as names:
        yield names


def wait_for(condition: Any, timeout: float = 300) -> None:
    """Asks again and again until the condition holds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"not so within {timeout:g} s"
        time.sleep(0.2)


def test_two_pods_train_flights_one_is_killed_and_the_run_resumes_to_its_report(
    engine: Engine, image: dict[str, Any], hosts: list[str], tmp_path: Path
) -> None:
    job = Job(engine, tmp_path, hosts, "train.num_steps=200", "checkpoint.every_steps=20", "log.every_steps=10")
    try:
        for index in (0, 1):
            job.start(index)
        wait_for(lambda: len(job.checkpoints()) > 0 and job.ask(1, "/readyz") == "ok\n")
        assert 0 < job.step(0) < 200
        engine.call("podman", "kill", "--signal=KILL", "flights-1")
        assert job.pods[1].wait(timeout=60) == 137
        saved = job.checkpoints()[-1]
        job.start(1)
        assert job.wait(timeout=300) == [0, 0], job.logs()
    finally:
        print(job.logs()[-4000:])
        job.remove()
    run = job.volume / "flights"
    assert job.checkpoints()[-1] == 200
    assert "flights" in (run / "report.html").read_text()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(10, 201, 10))
    assert re.search(rf"step[ -]0*{saved}\b", job.logs()), "the log says from where the run went on"


def test_sigterm_saves_within_the_grace_period_and_ends_the_pods_with_143(
    engine: Engine, image: dict[str, Any], hosts: list[str], tmp_path: Path
) -> None:
    job = Job(engine, tmp_path, hosts, "train.num_steps=1000000", "checkpoint.every_steps=null")
    grace_s = job.manifest["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    try:
        for index in (0, 1):
            job.start(index)
        wait_for(lambda: job.step(0) > 0)
        assert job.checkpoints() == []
        stopping = [
            engine.start("podman", "stop", f"--time={grace_s}", f"flights-{index}", log=tmp_path / f"stop-{index}.log")
            for index in (0, 1)
        ]
        assert job.wait(timeout=grace_s + 30) == [143, 143], job.logs()
        assert [each.wait(timeout=60) for each in stopping] == [0, 0]
    finally:
        job.remove()
    assert len(job.checkpoints()) == 1


def test_mpirun_reaches_the_other_pod_by_the_job_s_key_and_a_pod_with_another_key_is_refused(
    engine: Engine, image: dict[str, Any], hosts: list[str], tmp_path: Path
) -> None:
    ours, theirs = (key_pair(tmp_path / name) for name in ("ours", "theirs"))
    names = ["--add-host=mpi-0:10.78.0.1", "--add-host=mpi-1:10.78.0.2"]

    def start(index: int, keys: Path) -> None:
        security = ["--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
        command = [
            "podman",
            "run",
            "--detach",
            "--rm",
            f"--name=mpi-{index}",
            f"--hostname=mpi-{index}",
            *names,
            *security,
        ]
        command += [f"--network=ns:/run/netns/{hosts[index]}", f"--volume={keys}:/home/mpiuser/.ssh:ro"]
        engine.call(*command, IMAGE, "/usr/sbin/sshd", "-De")

    def from_first(*args: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return engine.call("podman", "exec", "mpi-0", *args, check=False, timeout=timeout)

    program = (
        "from mpi4py import MPI; import socket; world = MPI.COMM_WORLD;"
        "print(world.rank, socket.gethostname(), world.allreduce(world.rank + 1))"
    )
    try:
        start(0, ours)
        start(1, ours)
        wait_for(lambda: from_first("ssh", "mpi-1", "true").returncode == 0, timeout=30)
        done = from_first(
            "mpirun", "-n", "2", "--host", "mpi-0:1,mpi-1:1", "--bind-to", "none", "python", "-c", program
        )
        assert sorted(done.stdout.splitlines()) == ["0 mpi-0 3", "1 mpi-1 3"], done.stderr
        engine.call("podman", "rm", "--force", "--time=0", "mpi-1")
        start(1, theirs)
        refused = from_first("ssh", "-o", "ConnectionAttempts=30", "mpi-1", "true")
        assert refused.returncode == 255
        assert "Host key verification failed" in refused.stderr
    finally:
        engine.call("podman", "rm", "--force", "--time=0", "--ignore", "mpi-0", "mpi-1")


def key_pair(folder: Path) -> Path:
    """Writes what the MPI operator mounts from its Secret: owned by root, readable by the pod's group."""
    folder.mkdir()
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "521", "-N", "", "-f", folder / "id_rsa"], check=True)
    (folder / "authorized_keys").write_text((folder / "id_rsa.pub").read_text())
    for path in (folder, *folder.iterdir()):
        os.chown(path, 0, USER)
        path.chmod(0o750 if path.is_dir() else 0o440)
    return folder
