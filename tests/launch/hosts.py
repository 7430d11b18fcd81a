"""Several hosts on one machine: network namespaces with own names and addresses, a bridge between, sshd in each."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NETWORK = "10.88.0"
MADE_HERE = re.compile(r"distopt-test-(\d+)-")


def missing() -> str | None:
    """Returns what keeps this machine from emulating hosts, or None."""
    programs = [name for name in ("ip", "nsenter", "unshare", "ssh", "ssh-keygen") if shutil.which(name) is None]
    if programs or not Path("/usr/sbin/sshd").exists():
        return f"{', '.join(programs) or 'sshd'} is missing (Debian: iproute2, util-linux, openssh-server)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = namespace("probe")
    probe = subprocess.run(["ip", "netns", "add", name], capture_output=True, timeout=30)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=30)
    return None if probe.returncode == 0 else f"network namespaces cannot be made: {probe.stderr.decode().strip()}"


def namespace(name: str) -> str:
    """Returns what this process calls a network namespace; names are those of the whole machine."""
    return f"distopt-test-{os.getpid()}-{name}"


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, timeout=30)


class Hosts:
    """Hosts dh1 … dhN; number 1 is where the launcher runs."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.count = count
        self.names = [f"dh{number}" for number in range(1, count + 1)]
        self.addresses = [f"{NETWORK}.{number}" for number in range(1, count + 1)]
        self._switch = namespace("switch")
        self._sshds: list[subprocess.Popen] = []

    def __enter__(self) -> Hosts:
        _remove_namespaces()
        ip("netns", "add", self._switch)
        ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        ip("-n", self._switch, "link", "set", "br0", "up")
        lines = [f"{address} {name}" for name, address in zip(self.names, self.addresses, strict=True)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        (self.folder / "resolv.conf").touch()
        for name, address in zip(self.names, self.addresses, strict=True):
            inside = namespace(name)
            ip("netns", "add", inside)
            ip("-n", inside, "link", "set", "lo", "up")
            ip("link", "add", "veth0", "netns", inside, "type", "veth", "peer", "name", name, "netns", self._switch)
            ip("-n", self._switch, "link", "set", name, "master", "br0", "up")
            ip("-n", inside, "addr", "add", f"{address}/24", "dev", "veth0")
            ip("-n", inside, "link", "set", "veth0", "up")
            ip("-n", inside, "route", "add", "default", "via", f"{NETWORK}.254")
        self._start_ssh()
        return self

    def __exit__(self, *_: object) -> None:
        for sshd in self._sshds:
            sshd.kill()
            sshd.wait(30)
        _remove_namespaces()

    def run(self, number: int, *args: str) -> list[str]:
        """Returns a command line that runs `words` on a host. Not `ip netns exec`, which hides /sys/fs/cgroup."""
        # An empty resolv.conf: each look-up of a name server that cannot be reached would take many seconds.
        inside = 'hostname "$0"; for f in hosts resolv.conf; do mount --bind "$1/$f" /etc/$f; done; shift; exec "$@"'
        name = self.names[number - 1]
        enter = ["nsenter", f"--net=/run/netns/{namespace(name)}", "unshare", "--mount", "--uts"]
        return [*enter, "sh", "-c", inside, name, str(self.folder), *args]

    def link(self, number: int, state: str) -> None:
        """Takes a host's link `down` or `up`."""
        ip("-n", self._switch, "link", "set", self.names[number - 1], state)

    def reset_connections(self, number: int) -> None:
        """Ends the TCP connections of a host as a firewall does, with a reset, but for those of ssh."""
        others = "( sport != :22 and dport != :22 )"
        subprocess.run(
            [*self.run(number, "ss", "--tcp", "--kill", others)], check=True, timeout=30, capture_output=True
        )

    @contextmanager
    def odd_sshd(self, number: int, port: int, hidden: Path, *options: str) -> Iterator[None]:
        """Runs a second sshd on a host, whose sessions see an empty folder in place of `hidden`."""
        sshd = ["/usr/sbin/sshd", "-D", "-e", "-p", str(port), *options, "-f", str(self.folder / "sshd_config")]
        argv = self.run(number, "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(hidden), *sshd)
        with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as odd:
            try:
                assert odd.stderr is not None
                assert any(f"listening on 0.0.0.0 port {port}" in line for line in odd.stderr)
                yield
            finally:
                odd.kill()

    def _start_ssh(self) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)
        for key in ("user", "host", "other"):
            make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key)]
            subprocess.run(make, check=True, timeout=30)
        shutil.copy(self.folder / "user.pub", self.folder / "authorized_keys")
        settings = [
            "Port 22", f"HostKey {self.folder}/host", f"AuthorizedKeysFile {self.folder}/authorized_keys",
            "PermitRootLogin prohibit-password", "PasswordAuthentication no", "StrictModes no", "UsePAM no",
            "PrintMotd no", "PidFile none", "MaxStartups 100",
        ]  # fmt: skip
        (self.folder / "sshd_config").write_text("\n".join(settings) + "\n")
        known = [f"{name},{address}" for name, address in zip(self.names, self.addresses, strict=True)]
        for key in ("host", "other"):
            public = (self.folder / f"{key}.pub").read_text().rsplit(" ", 1)[0]
            (self.folder / f"known_{key}").write_text("".join(f"{names} {public}\n" for names in known))
        config = f"User root\nIdentityFile {self.folder}/user\nIdentitiesOnly yes\n"
        (self.folder / "ssh_config").write_text(config)
        daemon = ["/usr/sbin/sshd", "-D", "-e", "-f", str(self.folder / "sshd_config")]
        with (self.folder / "sshd.log").open("w") as log:
            for number in range(1, self.count + 1):
                self._sshds.append(subprocess.Popen(self.run(number, *daemon), stderr=log))
        end = time.monotonic() + 30
        while (self.folder / "sshd.log").read_text().count("listening on 0.0.0.0") < self.count:
            assert time.monotonic() < end, (self.folder / "sshd.log").read_text()
            time.sleep(0.05)


def _remove_namespaces() -> None:
    """Removes the namespaces of this process, and of those that were killed, with all that runs in them."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=30).stdout
    for name in (line.split()[0] for line in listed.splitlines() if line):
        made = MADE_HERE.match(name)
        if made is None or (int(made[1]) != os.getpid() and Path(f"/proc/{made[1]}").exists()):
            continue
        inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, timeout=30)
        for pid in inside.stdout.split():
            subprocess.run(["kill", "-9", pid], capture_output=True, timeout=30)
        subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=30)  # or another process was quicker
