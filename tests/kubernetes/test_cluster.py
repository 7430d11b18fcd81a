"""The launcher and the CPU image on a real control plane and two real kubelets: `make test-kubernetes`.

The release is 1.20, the newest whose source Debian has. It drops what it does not know, `completionMode: Indexed` among
it, so that `indexes.py` numbers and names a Job's pods. The operators of the other kinds are not here: their objects
are checked by the server against the published definitions, and stored.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docker import engine as engines
from tests.docker.engine import IMAGE, Engine
from tests.kubernetes import cluster as clusters
from tests.kubernetes.cluster import Cluster, wait_until
from tests.kubernetes.definitions import for_1_20
from tests.kubernetes.guide import ROOT, launches, objects
from tests.kubernetes.indexes import LABEL, Indexes

CRDS = ROOT.parent / "shared" / "crds"

NAMESPACE = "distopt"
APPLIED = ("Namespace/distopt", "NetworkPolicy/runs-only", "PersistentVolumeClaim/runs")
USER = 1000

pytestmark = [
    pytest.mark.kubernetes,
    pytest.mark.timeout(3600),
    pytest.mark.skipif("DISTOPT_TEST_KUBERNETES" not in os.environ, reason="builds a cluster: make test-kubernetes"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster with two nodes that has what the guide says to apply, and a volume for its claim."""
    lacking = engines.missing() or clusters.missing()
    if lacking:
        pytest.fail(lacking, pytrace=False)  # it was asked for
    engine = Engine(engines.kept_folder())
    engine.make_image()
    with Cluster(engine, num_nodes=2).running() as made:
        made.volume.mkdir()
        os.chown(made.volume, USER, USER)
        definitions = [for_1_20(path) for path in sorted(CRDS.glob("*.yaml"))]
        made.create(volume(made.volume), *[objects()[name] for name in APPLIED], *definitions)
        yield made


def volume(folder: Path) -> dict[str, Any]:
    """Stands for a storage class that knows ReadWriteMany: a folder, which both nodes have, being one machine."""
    claimed = {"namespace": NAMESPACE, "name": "runs"}
    size = {"capacity": {"storage": "20Gi"}, "accessModes": ["ReadWriteMany"]}
    spec = {**size, "hostPath": {"path": str(folder)}, "claimRef": claimed}
    return {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "runs"}, "spec": spec}


class Run:
    """The guide's `distopt launch` for one kind, on this cluster, with fewer steps."""

    def __init__(self, cluster: Cluster, folder: Path, name: str, *overrides: str, kind: str = "job") -> None:
        self.cluster, self.folder, self.name = cluster, folder, name
        started = [line for line in launches() if "--dry-run" not in line]
        guide = next(line for line in started if kind == "job" or f"kind={kind}" in line)
        _, command, config, *theirs = shlex.split(guide)
        ours = [f"name={name}", f"run_dir=/runs/{name}", f"launch.kubernetes.image={IMAGE}", "launch.workers=1"]
        ours += ["launch.kubernetes.memory=2Gi"]
        self.command = [command, str(ROOT / config), *theirs, *ours, *overrides]
        self.directory = cluster.volume / name
        self._launcher: subprocess.Popen[str] | None = None

    def bring(self, name: str, code: str) -> None:
        """Puts a module where the pods import it, and where the launcher looks at it."""
        for folder in (self.cluster.volume / "code", self.folder):
            folder.mkdir(exist_ok=True)
            (folder / name).write_text(code)

    def call(self, *args: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        command, options = self.cluster.distopt(self.folder, *args)
        return subprocess.run(command, capture_output=True, timeout=timeout, **options)

    def launch(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Runs `distopt launch` to its end."""
        return self.call(*self.command, *args)

    def start(self) -> None:
        """Starts `distopt launch`, which follows the run on all nodes: without indexes rank 0 may be on any."""
        command, options = self.cluster.distopt(self.folder, *self.command, "--all-ranks")
        with (self.folder / "launcher.log").open("w") as log:
            self._launcher = subprocess.Popen(command, stdout=log, stderr=log, **options)

    def wait(self, timeout: float = 600) -> int:
        assert self._launcher is not None
        return self._launcher.wait(timeout)

    def output(self) -> str:
        return (self.folder / "launcher.log").read_text()

    def phase(self) -> str:
        return self.call("status", self.name).stdout.split("\t")[1]

    def pods(self) -> list[dict[str, Any]]:
        return list(self.cluster.get("pods", f"--namespace={NAMESPACE}", f"--selector=distopt.run={self.name}"))

    def checkpoints(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in self.directory.glob("checkpoints/step-*"))

    def end(self) -> None:
        """Leaves nothing of the run on the cluster."""
        if self._launcher is not None and self._launcher.poll() is None:
            self._launcher.kill()
            self._launcher.wait(30)
        ours = [f"--namespace={NAMESPACE}", f"--selector=distopt.run={self.name}"]
        self.cluster.kubectl("delete", "job,service,pod", *ours)


@pytest.fixture
def run_of(cluster: Cluster, tmp_path: Path) -> Iterator[Any]:
    """Makes runs, and removes what they left on the cluster."""
    made: list[Run] = []

    def make(name: str, *overrides: str, kind: str = "job") -> Run:
        made.append(Run(cluster, tmp_path, name, *overrides, kind=kind))
        return made[-1]

    with Indexes(cluster, NAMESPACE):
        yield make
        for run in made:
            run.end()


def test_the_guide_s_claim_is_bound_and_its_namespace_and_policy_are_there(cluster: Cluster) -> None:
    claim = ["pvc", "runs", f"--namespace={NAMESPACE}"]
    wait_until(lambda: cluster.get(*claim)["status"]["phase"] == "Bound", "claim bound", 60)
    assert cluster.get("networkpolicy", "runs-only", f"--namespace={NAMESPACE}")["spec"]["policyTypes"] == ["Ingress"]


def test_pods_on_two_nodes_train_flights_one_is_killed_the_run_resumes_and_the_guide_s_reader_has_the_report(
    cluster: Cluster, run_of: Any
) -> None:
    run = run_of("flights", "train.num_steps=300", "checkpoint.every_steps=20", "log.every_steps=10")
    run.start()
    wait_until(lambda: run.checkpoints() or run._launcher.poll() is not None, "a checkpoint")
    assert run.phase() == "running", run.output() + cluster.kubectl("describe", "pods", "-n", NAMESPACE)
    first, second = sorted(run.pods(), key=lambda pod: pod["metadata"]["labels"][LABEL])
    assert first["spec"]["nodeName"] != second["spec"]["nodeName"]
    assert "agent: waiting for flights-0.flights:29400" in run.call("logs", "flights", "--rank", "1").stdout
    watching, options = cluster.distopt(run.folder, "logs", "flights", "--rank", "1", "--follow")
    followed = subprocess.Popen(watching, stdout=subprocess.PIPE, **options)
    cluster.kill(second)
    saved = run.checkpoints()[-1]
    assert run.wait() == 0, run.output()
    assert run.phase() == "done"
    assert run.checkpoints()[-1] == 300
    (again,) = [pod for pod in run.pods() if pod["metadata"]["name"] not in names([first, second])]
    before, resumed = (cluster.kubectl("logs", f"--namespace={NAMESPACE}", *names([pod])) for pod in (second, again))
    assert re.search(rf"step[ -]0*{saved}\b", resumed + run.output()), "the log says from where the run went on"
    assert followed.communicate(timeout=60)[0] == before + resumed
    steps = [json.loads(line)["step"] for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(10, 301, 10))
    assert read_by_guide(cluster, "flights/report.html") == (run.directory / "report.html").read_text()
    assert run.call("stop", "flights").returncode == 0
    wait_until(lambda: run.pods() == [], "nothing of the run is left on the cluster", 60)


def names(pods: list[dict[str, Any]]) -> list[str]:
    return [pod["metadata"]["name"] for pod in pods]


def read_by_guide(cluster: Cluster, path: str) -> str:
    """Returns a file of the volume as the guide says to read it: from its pod, by kubectl exec."""
    reader = json.loads(json.dumps(objects()["Pod/reader"]).replace("registry.example/distopt:cpu", IMAGE))
    cluster.create(reader)
    pod = [f"--namespace={NAMESPACE}", "reader"]
    try:
        cluster.kubectl("wait", "--for=condition=Ready", "--timeout=120s", pod[0], "pod/reader")
        return cluster.kubectl("exec", *pod, "--", "cat", f"/runs/{path}")
    finally:
        cluster.kubectl("delete", "pod", *pod, "--grace-period=1")


def test_stop_lets_pods_save_within_the_grace_period_and_end_with_143(cluster: Cluster, run_of: Any) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hub", "namespace": NAMESPACE}}
    cluster.create({**secret, "stringData": {"token": "it's secret"}})
    run = run_of(
        "stopped", "train.num_steps=1000000", "checkpoint.every_steps=null", "log.every_steps=5",
        "launch.kubernetes.secrets={HUB_TOKEN: {secret: hub, key: token}}",
    )  # fmt: skip
    assert run.launch("--detach").returncode == 0
    assert "`distopt stop runs/stopped` ends it and frees its name" in run.launch("--detach").stderr
    wait_until(lambda: (run.directory / "metrics.jsonl").exists(), "first steps")
    assert run.checkpoints() == []
    for pod in names(run.pods()):
        assert (
            cluster.kubectl("exec", f"--namespace={NAMESPACE}", pod, "--", "printenv", "HUB_TOKEN") == "it's secret\n"
        )
    watch = ["get", "pods", f"--namespace={NAMESPACE}", "--selector=distopt.run=stopped", "--watch"]
    watch += ['--output=jsonpath={.metadata.name} {.status.containerStatuses[*].state.terminated.exitCode}{"\\n"}']
    command = cluster.inside(0, "kubectl", f"--kubeconfig={cluster.kubeconfig}", *watch)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        stopped = run.call("stop", "stopped")
        left = run.pods()
        watching.terminate()
        seen, _ = watching.communicate(timeout=30)
    assert (stopped.stdout.split("\t")[0], names(left)) == ("stopped", []), stopped
    ended = dict(line.split() for line in seen.splitlines() if len(line.split()) == 2)
    assert sorted(ended.values()) == ["143", "143"], seen
    assert len(run.checkpoints()) == 1


def test_a_pod_that_needs_more_memory_than_it_may_have_is_named_with_the_reason(cluster: Cluster, run_of: Any) -> None:
    node = "launch.kubernetes.node_selector={kubernetes.io/hostname: node2}"
    run = run_of("small", "launch.nodes=1", "launch.max_restarts=0", "launch.kubernetes.memory=150Mi", node)
    done = run.launch()
    assert done.returncode == 1
    (pod,) = run.pods()
    expected = f"pod {pod['metadata']['name']} on node2 died first: out of memory (OOMKilled)"
    assert expected in done.stdout + done.stderr


CRASHING = """
import os
from distopt.examples.flights import Flights

class Crashing(Flights):
    def batch(self, rows):
        self.count = getattr(self, "count", 0) + 1
        if self.count > 5 and os.environ["RANK"] == "1":
            raise ValueError("boom")
        return super().batch(rows)
"""


def test_a_worker_that_fails_is_named_with_its_traceback_though_its_log_is_on_another_node(
    cluster: Cluster, run_of: Any
) -> None:
    run = run_of(
        "crashed", "launch.max_restarts=0", "task=crashing:Crashing", "launch.env={PYTHONPATH: /runs/code}",
    )  # fmt: skip
    run.bring("crashing.py", CRASHING)
    done = run.launch()
    assert done.returncode == 1
    assert re.search(r"pod crashed-\w+ on node\d died first: Error, exit status 1", done.stderr), done.stderr
    assert "ValueError: boom" in done.stderr
    assert run.phase() == "failed"


def test_a_run_waits_for_a_node_with_gpus_saying_so_and_saves_at_its_time_limit(cluster: Cluster, run_of: Any) -> None:
    run = run_of(
        "limited", "launch.nodes=1", "launch.kubernetes.gpus=1", "launch.kubernetes.time_limit_s=3600",
        "train.num_steps=1000000", "checkpoint.every_steps=null", "log.every_steps=5",
    )  # fmt: skip
    run.start()
    wait_until(
        lambda: "Insufficient nvidia.com/gpu" in run.call("status", "limited").stdout, "the scheduler's answer", 60
    )
    assert run.phase() == "pending"
    node = {"status": {"capacity": {"nvidia.com/gpu": "1"}, "allocatable": {"nvidia.com/gpu": "1"}}}
    cluster.kubectl("patch", "node", "node2", "--subresource=status", "--type=merge", f"--patch={json.dumps(node)}")
    wait_until(lambda: (run.directory / "metrics.jsonl").exists(), f"first steps\n{run.output()}")
    (pod,) = run.pods()
    assert pod["spec"]["nodeName"] == "node2"
    over = json.dumps({"spec": {"activeDeadlineSeconds": 1}})
    cluster.kubectl("patch", "job", "limited", f"--namespace={NAMESPACE}", f"--patch={over}")
    assert run.wait() == 1
    assert "longer than specified deadline" in run.output()
    wait_until(lambda: len(run.checkpoints()) == 1, "the last checkpoint", 60)


HANGING = """
import time
from pathlib import Path
from distopt.examples.flights import Flights

class Hanging(Flights):
    def batch(self, rows):
        self.count = getattr(self, "count", 0) + 1
        mark = Path("/runs/hung/hung-once")
        if self.count > 30 and not mark.exists():
            mark.touch()
            while True:
                time.sleep(1)
        return super().batch(rows)
"""


def test_a_pod_that_finishes_no_step_is_replaced_by_its_liveness_probe_and_the_run_resumes(
    cluster: Cluster, run_of: Any
) -> None:
    run = run_of(
        "hung", "launch.nodes=1", "task=hanging:Hanging", "launch.env={PYTHONPATH: /runs/code}", "train.num_steps=60",
        "checkpoint.every_steps=10", "serve.stall_s=30", "reduce.timeout_s=20", "launch.grace_s=5",
    )  # fmt: skip
    run.bring("hanging.py", HANGING)
    done = run.launch()
    assert done.returncode == 0, done.stderr
    assert (run.directory / "hung-once").exists()
    events = cluster.get("events", f"--namespace={NAMESPACE}")
    messages = [event["message"] for event in events if event["involvedObject"]["name"].startswith("hung-")]
    assert any(re.match("Liveness probe failed: step .* allowed 30 s", message) for message in messages), messages
    assert run.checkpoints()[-1] == 60
    assert len(run.pods()) == 2


@pytest.mark.parametrize("kind", ["jobset", "trainjob", "pytorchjob", "mpijob"])
def test_an_operator_s_object_is_stored_in_full_followed_and_deleted(cluster: Cluster, run_of: Any, kind: str) -> None:
    if not CRDS.is_dir():
        pytest.skip(f"{CRDS} is missing: the resource definitions of JobSet and Kubeflow, from their repositories")
    name = for_1_20(CRDS / f"{kind}.yaml")["metadata"]["name"]
    run = run_of(f"by-{kind}", kind=kind)
    done = run.launch("--detach")
    assert done.returncode == 0, done.stderr
    assert run.phase() == "pending"
    stored = cluster.get(name, f"by-{kind}", f"--namespace={NAMESPACE}")
    manifest = (run.folder / "runs" / f"by-{kind}" / "manifest.yaml").read_text()
    [sent] = [each for each in yaml.safe_load_all(manifest) if each["kind"] == stored["kind"]]  # and a ConfigMap
    assert list(absent(sent, stored)) == []
    refused = json.dumps({**stored, "spec": wrong(stored["spec"])})
    with pytest.raises(AssertionError, match="Invalid value|invalid type|ValidationError"):
        cluster.kubectl("replace", "--validate=false", "--filename=-", stdin=refused)
    assert run.call("stop", f"by-{kind}").stdout.startswith("stopped\tthere is no ")


def wrong(spec: dict[str, Any]) -> dict[str, Any]:
    """Returns a spec in which a number is a word."""
    text = re.sub(r'("(?:parallelism|numNodes|replicas)": )\d+', r'\1"two"', json.dumps(spec))
    assert '"two"' in text
    return dict(json.loads(text))


def absent(sent: Any, stored: Any, path: str = "") -> Iterator[str]:
    """Yields what was sent and is not in what was stored, defaults that the server added aside."""
    if isinstance(sent, dict) and isinstance(stored, dict):
        for key in sent:
            yield from absent(sent[key], stored.get(key), f"{path}.{key}")
    elif isinstance(sent, list) and isinstance(stored, list) and len(sent) == len(stored):
        for index, pair in enumerate(zip(sent, stored, strict=True)):
            yield from absent(*pair, f"{path}[{index}]")
    elif sent != stored:
        yield f"{path}: sent {sent!r}, stored {stored!r}"
