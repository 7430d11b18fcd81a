"""A real Kubernetes 1.20 on one machine: control plane and nodes in network namespaces, pods in containers.

Namespace 0 has etcd, the API server, the controller manager, the scheduler and a name server; each other one is a node
with containerd and a kubelet. `indexes.py` stands in for what a release with Indexed Jobs does.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.docker.engine import IMAGE, Engine
from tests.docker.pods import SUBNET, network

PAUSE = "localhost/pause:1"
SERVICES = "10.96.0.0/24"
PROGRAMS = ("etcd", "containerd", "ctr", "runc", "kubectl", "dnsmasq", "go", "rsync", "jq", "catatonit", "openssl")
PACKAGES = (
    "etcd-server containerd containernetworking-plugins runc kubernetes-client dnsmasq-base catatonit "
    "golang-go rsync jq golang-github-modern-go-reflect2-dev golang-github-json-iterator-go-dev"
)
CONTAINERD = """version = 2
root = "{folder}/root"
state = "{folder}/state"
[grpc]
  address = "{folder}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{folder}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
"""
KUBELET = {
    "apiVersion": "kubelet.config.k8s.io/v1beta1",
    "kind": "KubeletConfiguration",
    "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
    "authorization": {"mode": "AlwaysAllow"},
    "cgroupDriver": "cgroupfs",
    # The machine's own cgroups are left as they are.
    "cgroupsPerQOS": False,
    "enforceNodeAllocatable": [],
    "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "imagefs.available": "0%"},
    "failSwapOn": False,
    "imageGCHighThresholdPercent": 100,
    "makeIPTablesUtilChains": False,
    "oomScoreAdj": 0,
    "clusterDomain": "cluster.local",
    "clusterDNS": [f"{SUBNET}.1"],
}


def missing() -> str | None:
    """Says what this machine lacks."""
    if os.geteuid() != 0:
        return "needs root: run it with sudo"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"no {', '.join(absent)} here; apt-get install {PACKAGES}" if absent else None


def build() -> Path:
    """Returns the folder of Kubernetes' programs, built from Debian's source package the first time."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "distopt" / "kubernetes-1.20.2"
    subprocess.run([Path(__file__).with_name("build.sh"), folder], check=True, stdout=subprocess.DEVNULL, timeout=3600)
    return folder


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 300) -> None:
    """Asks again and again until the condition holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.3)


class Cluster:
    """A control plane and its nodes; `start` starts them, and leaving `running` ends all that they started.

    Args:
        engine: has the CPU image, which the nodes get.
        num_nodes: kubelets, each on a network of its own.
    """

    def __init__(self, engine: Engine, num_nodes: int) -> None:
        self.engine = engine
        self.num_nodes = num_nodes
        # A short path: the sockets of containerd's shims have at most 108 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="k8s-"))
        self.volume = self.folder / "volume"
        self.programs = build()
        self.kubeconfig = self.folder / "kubeconfig"
        self._hosts: list[str] = []
        self._daemons: list[subprocess.Popen[bytes]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[Cluster]:
        """Starts everything, and ends and removes it."""
        try:
            with network(1 + self.num_nodes) as self._hosts:
                try:
                    self._start_control_plane()
                    for number in range(1, 1 + self.num_nodes):
                        self._start_node(number)
                    wait_until(lambda: self.ready_nodes() == self.num_nodes, f"nodes ready\n{self.log_tails()}")
                    yield self
                finally:
                    self._end()
        finally:
            shutil.rmtree(self.folder)

    def inside(self, number: int, *args: str | Path) -> list[str]:
        """Returns a command line that runs `words` on a host; not `ip netns exec`, which hides /sys/fs/cgroup."""
        return ["nsenter", f"--net=/run/netns/{self._hosts[number]}", *map(str, args)]

    def kubectl(self, *args: str | Path, stdin: str | None = None, check: bool = True) -> str:
        """Runs kubectl and returns what it printed."""
        command = self.inside(0, "kubectl", f"--kubeconfig={self.kubeconfig}", *args)
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=180)
        if check and done.returncode:
            raise AssertionError(f"kubectl {' '.join(map(str, args))}: {done.stderr}")
        return done.stdout

    def get(self, *args: str) -> Any:
        """Returns an object, or a list's items."""
        answer = json.loads(self.kubectl("get", *args, "--output=json"))
        return answer.get("items", answer)

    def create(self, *objects: dict[str, Any]) -> None:
        """Creates objects; fields that 1.20 does not know are dropped, as its server does."""
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
        self.kubectl("create", "--validate=false", "--filename=-", stdin=text)

    def ready_nodes(self) -> int:
        """Returns how many kubelets say that they are ready."""
        nodes = json.loads(self.kubectl("get", "nodes", "--output=json", check=False) or '{"items": []}')["items"]
        return sum({"Ready": "True"}.items() <= _conditions(node).items() for node in nodes)

    def distopt(self, folder: Path, *args: str) -> tuple[list[str], dict[str, Any]]:
        """Returns the command line of `distopt WORDS` on the control plane's host, and options for its process."""
        env = {**os.environ, "KUBECONFIG": str(self.kubeconfig)}
        return self.inside(0, sys.executable, "-m", "distopt.launch", *args), {"cwd": folder, "env": env, "text": True}

    def kill(self, pod: dict[str, Any]) -> None:
        """Kills a pod's container, as the kernel would for want of memory."""
        (status,) = pod["status"]["containerStatuses"]
        number = int(pod["spec"]["nodeName"].removeprefix("node"))
        socket = self.folder / f"node{number}" / "containerd.sock"
        container = status["containerID"].removeprefix("containerd://")
        kill = ["ctr", f"--address={socket}", "--namespace=k8s.io", "tasks", "kill", "--signal=SIGKILL", container]
        subprocess.run(kill, check=True, capture_output=True, timeout=60)

    def log_tails(self) -> str:
        """Returns the end of every daemon's log."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in logs)

    def reload_names(self, lines: str) -> None:
        """Gives the cluster's name server other names."""
        (self.folder / "names").write_text(lines)
        self._names.send_signal(1)

    def _start(
        self, number: int, name: str, *args: str | Path, beside: subprocess.Popen[bytes] | None = None
    ) -> subprocess.Popen[bytes]:
        """Starts a daemon with a host name and mounts of its own, or with those of another daemon."""
        logs = self.folder / f"pods-{number}"
        for folder in (logs, Path("/var/log/pods")):  # a kubelet removes there what it does not know
            folder.mkdir(parents=True, exist_ok=True)
        prepare = 'hostname "$0" && mount --bind "$1" /var/log/pods && shift && exec "$@"'
        command: list[str | Path] = ["unshare", "--uts", "--mount", "sh", "-c", prepare, f"node{number}", logs]
        if beside is not None:
            command = ["nsenter", f"--uts=/proc/{beside.pid}/ns/uts", f"--mount=/proc/{beside.pid}/ns/mnt"]
        with (self.folder / f"{name}.log").open("wb") as log:
            inside = self.inside(number, *command, *args)
            started = subprocess.Popen(inside, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self._daemons.append(started)
        return started

    def _start_control_plane(self) -> None:
        address, folder, certificates = f"{SUBNET}.1", self.folder, self.folder / "certificates"
        certificates.mkdir()
        token, key = os.urandom(16).hex(), folder / "accounts.key"
        (folder / "tokens.csv").write_text(f"{token},admin,admin,system:masters\n")
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True, timeout=60)
        self.kubeconfig.write_text(_kubeconfig(address, token, certificates / "apiserver.crt"))
        local = "http://127.0.0.1"
        urls = [f"--{name}-client-urls={local}:2379" for name in ("listen", "advertise")]
        self._start(0, "etcd", "etcd", f"--data-dir={folder}/etcd", *urls, f"--listen-peer-urls={local}:2380")
        self._start(
            0, "apiserver", self.programs / "kube-apiserver", f"--etcd-servers={local}:2379",
            f"--bind-address={address}", f"--advertise-address={address}", f"--cert-dir={certificates}",
            f"--token-auth-file={folder}/tokens.csv", "--authorization-mode=Node,RBAC",
            f"--service-account-key-file={key}", f"--service-account-signing-key-file={key}", "--service-account-issuer=https://kubernetes",
            f"--service-cluster-ip-range={SERVICES}", "--disable-admission-plugins=ServiceAccount",
            "--kubelet-preferred-address-types=InternalIP",
        )  # fmt: skip
        ready = ("get", "--raw=/readyz")
        wait_until(lambda: self.kubectl(*ready, check=False) == "ok", f"API server\n{self.log_tails()}", timeout_s=120)
        for name in ("controller-manager", "scheduler"):
            flags = [f"--kubeconfig={self.kubeconfig}", "--leader-elect=false"]
            flags += ["--controllers=*,-serviceaccount-token"] if name == "controller-manager" else []
            self._start(0, name, self.programs / f"kube-{name}", *flags)
        (folder / "names").touch()
        (folder / "dnsmasq.conf").touch()
        self._names = self._start(
            0, "dnsmasq", "dnsmasq", "--keep-in-foreground", f"--conf-file={folder}/dnsmasq.conf", "--no-resolv",
            "--no-hosts", f"--addn-hosts={folder}/names", "--local=/cluster.local/", f"--listen-address={address}",
            "--bind-interfaces", "--pid-file=", "--user=root", "--log-facility=-",
        )  # fmt: skip

    def _start_node(self, number: int) -> None:
        address, folder = f"{SUBNET}.{number + 1}", self.folder / f"node{number}"
        (folder / "cni").mkdir(parents=True)
        pods = {"type": "host-local", "dataDir": f"{folder}/ipam", "subnet": f"10.79.{number}.0/24"}
        pods["routes"] = [{"dst": "0.0.0.0/0"}]
        bridge = {"type": "bridge", "bridge": "pods", "isGateway": True, "ipMasq": False, "ipam": pods}
        (folder / "cni" / "pods.conf").write_text(json.dumps({"cniVersion": "0.3.1", "name": "pods", **bridge}))
        (folder / "config.toml").write_text(CONTAINERD.format(folder=folder, pause=PAUSE))
        (folder / "resolv.conf").touch()
        (folder / "kubelet.yaml").write_text(json.dumps({**KUBELET, "resolvConf": f"{folder}/resolv.conf"}))
        for other in set(range(1 + self.num_nodes)) - {number}:
            route = ["ip", "-n", self._hosts[other], "route", "add", f"10.79.{number}.0/24", "via", address]
            subprocess.run(route, check=True, timeout=20)
        forward = self.inside(number, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        subprocess.run(forward, check=True, timeout=20)
        containerd = self._start(number, f"containerd-{number}", "containerd", f"--config={folder}/config.toml")
        ctr = ["ctr", f"--address={folder}/containerd.sock", "--namespace=k8s.io"]
        up = [*ctr, "version"]
        wait_until(
            lambda: not subprocess.run(up, capture_output=True).returncode, f"containerd\n{self.log_tails()}", 60
        )
        for archive in self._archives():
            subprocess.run([*ctr, "images", "import", archive], check=True, capture_output=True, timeout=600)
        socket = f"unix://{folder}/containerd.sock"
        self._start(
            number, f"kubelet-{number}", self.programs / "kubelet", f"--kubeconfig={self.kubeconfig}",
            f"--config={folder}/kubelet.yaml", f"--hostname-override=node{number}", f"--node-ip={address}",
            "--container-runtime=remote", f"--container-runtime-endpoint={socket}", f"--root-dir={folder}/kubelet",
            f"--cert-dir={folder}/certificates", beside=containerd,
        )  # fmt: skip

    def _archives(self) -> list[Path]:
        """Returns the images that a registry would have."""
        if not self.engine.has(PAUSE):
            container = self.engine.call("buildah", "from", "scratch").stdout.strip()
            self.engine.call("buildah", "copy", container, shutil.which("catatonit") or "", "/pause")
            self.engine.call("buildah", "config", "--entrypoint", '["/pause", "-P"]', container)
            self.engine.call("buildah", "commit", "--rm", container, PAUSE)
        archives = {PAUSE: self.folder / "pause.tar", IMAGE: self.folder / "image.tar"}
        for image, path in archives.items():
            if not path.exists():
                self.engine.call("podman", "save", "--quiet", f"--output={path}", image, timeout=600)
        return list(archives.values())

    def _end(self) -> None:
        """Has the pods removed by their kubelets, then ends the daemons, the last started first."""
        if self.ready_nodes():
            self.kubectl("delete", "jobs,pods", "--all", "--all-namespaces", "--grace-period=0", "--force", check=False)
            running = ["ctr", "--namespace=k8s.io", "tasks", "ls", "--quiet"]
            for number in range(1, 1 + self.num_nodes):
                asked = [*running[:1], f"--address={self.folder}/node{number}/containerd.sock", *running[1:]]
                with contextlib.suppress(AssertionError):
                    wait_until(lambda a=asked: not subprocess.check_output(a).strip(), "no container is left", 90)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(timeout=30)


def _conditions(node: dict[str, Any]) -> dict[str, str]:
    return {one["type"]: one["status"] for one in node["status"].get("conditions", ())}


def _kubeconfig(address: str, token: str, certificate: Path) -> str:
    named = {
        "clusters": [
            {"name": "c", "cluster": {"server": f"https://{address}:6443", "certificate-authority": str(certificate)}}
        ],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
    }
    return json.dumps({"apiVersion": "v1", "kind": "Config", "current-context": "x", **named})
