"""Builds and runs images without a Docker engine or a registry, with buildah, podman, runc and debootstrap.

What this machine needs to reach its packages (CA bundle, pip's settings, apt's source) is bound into the build's
containers and stays out of the images.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOOLS = ("buildah", "podman", "runc", "catatonit", "debootstrap", "ip")
BASE = "localhost/python:3.11-slim-bookworm"
# An image that is named here is tested as it is, in place of one that is built.
IMAGE = os.environ.get("DISTOPT_IMAGE", "localhost/distopt:cpu")
ROOT = Path(__file__).parents[2]
# As many files and processes as a container may have; more than this machine's own limits cannot be asked for.
CONTAINERS_CONF = """[containers]
cgroups = "enabled"
netns = "host"
default_ulimits = ["nofile=10000:10000", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
"""


def missing() -> str | None:
    """Says what this machine lacks to build and run images."""
    if os.geteuid() != 0:
        return "needs root: run it with sudo"
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    packages = "buildah podman runc catatonit debootstrap iproute2"
    return f"no {', '.join(absent)} here; apt-get install {packages}" if absent else None


def kept_folder() -> Path:
    """Returns where images are kept from one run of the tests to the next."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("DISTOPT_IMAGES", cache / "distopt" / "images"))


class Engine:
    """Images and containers kept in a folder of their own.

    Args:
        folder: where storage and settings go; images built there earlier are used as a cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        storage = folder / "storage.conf"
        storage.write_text(f'[storage]\ndriver = "overlay"\nrunroot = "{folder}/run"\ngraphroot = "{folder}/store"\n')
        settings = folder / "containers.conf"
        settings.write_text(CONTAINERS_CONF)
        (folder / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("PIP_")},
            "CONTAINERS_STORAGE_CONF": str(storage),
            "CONTAINERS_CONF": str(settings),
            "BUILDAH_ISOLATION": "chroot",
        }

    def call(self, *command: str | Path, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Runs a command against this storage and returns what it printed."""
        done = subprocess.run(
            [str(arg) for arg in command], capture_output=True, text=True, env=self.environment, timeout=timeout
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(map(str, command))}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def start(self, *command: str | Path, log: Path) -> subprocess.Popen[bytes]:
        """Starts a command against this storage, its output going to a file."""
        with log.open("wb") as out:
            return subprocess.Popen(
                [str(arg) for arg in command], env=self.environment, stdout=out, stderr=subprocess.STDOUT
            )

    def has(self, image: str) -> bool:
        """Tells whether an image is in storage."""
        return self.call("podman", "image", "exists", image, check=False).returncode == 0

    def inspect(self, image: str) -> dict[str, Any]:
        """Returns what is known of an image: its configuration, size and history."""
        result: dict[str, Any] = json.loads(self.call("podman", "image", "inspect", image).stdout)[0]
        return result

    def make_base(self) -> None:
        """Makes a stand-in for the official Python image from Debian's packages alone, with no host's name in it."""
        if self.has(BASE):
            return
        root = self.folder / "base"
        shutil.rmtree(root, ignore_errors=True)
        packages = "ca-certificates,python3,python3-dev,python3-pip,python3-venv"
        self.call("debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", root, mirror(), timeout=900)
        for name in ("hostname", "resolv.conf", "apt/sources.list"):
            (root / "etc" / name).write_text("")
        for folder in (
            "var/lib/apt/lists",
            "var/cache/apt",
            "var/log",
            "usr/share/doc",
            "usr/share/man",
            "usr/share/locale",
        ):
            shutil.rmtree(root / folder)
            (root / folder).mkdir()
        (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        container = self.call("buildah", "from", "scratch").stdout.strip()
        self.call("buildah", "copy", container, root, "/")
        self.call("buildah", "config", "--cmd", "python3", container)
        self.call("buildah", "commit", "--rm", container, BASE, timeout=300)
        shutil.rmtree(root)

    def make_image(self) -> None:
        """Builds the CPU image as a user would, `make image`, and prints its size and what the build took."""
        if "DISTOPT_IMAGE" in os.environ:
            return
        self.make_base()
        start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        command = ["make", "image", "BUILDER=buildah", "KIND=cpu", f"IMAGE={IMAGE}"]
        flags = f"BUILD_FLAGS={' '.join(self.build_flags())}"
        subprocess.run([*command, flags], cwd=ROOT, env=self.environment, check=True)
        seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        busy_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        size, of_base = (self.inspect(name)["Size"] / 1e9 for name in (IMAGE, BASE))
        print(f"\n{IMAGE}: {size:.2f} GB ({of_base:.2f} GB the base), built in {seconds:.0f} s, {busy_s:.0f} s of CPU")

    def build_flags(self) -> list[str]:
        """Returns the flags that let a build reach this machine's packages and leave nothing of it in the image."""
        apt, pip = self.folder / "sources.list", self.folder / "pip.conf"
        apt.write_text(f"deb {mirror()} bookworm main\n")
        settings = pip_settings()
        parser = configparser.ConfigParser(interpolation=None)
        parser["global"] = settings
        with pip.open("w") as file:
            parser.write(file)
        binds = {str(apt): "/etc/apt/sources.list", str(pip): "/etc/pip.conf"}
        if "cert" in settings:
            binds[settings["cert"]] = "/etc/ssl/certs/ca-certificates.crt"
        for local in re.findall(r"(?:file://)?(/\S+)", " ".join(v for k, v in settings.items() if k != "cert")):
            top = "/".join(local.split("/")[:3])
            binds[top] = top
        volumes = [f"--volume={source}:{target}:ro" for source, target in binds.items() if Path(source).exists()]
        return ["--isolation=chroot", "--network=host", "--layers", f"--build-arg=BASE={BASE}", *volumes]


def mirror() -> str:
    """Returns the mirror that this machine's apt uses."""
    policy = subprocess.run(["apt-cache", "policy", "base-files"], capture_output=True, text=True, check=True).stdout
    result = [url for url in re.findall(r"https?://\S+", policy) if "security" not in url]
    if not result:
        raise AssertionError("apt-cache policy base-files names no mirror; run apt-get update")
    return result[0]


def pip_settings() -> Mapping[str, str]:
    """Returns pip's settings on this machine, those of its environment last."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    result = sorted(re.findall(r"^(global|:env:)\.([\w-]+)='(.*)'$", listed.stdout, re.MULTILINE), reverse=True)
    return {key: value for _, key, value in result}


def foreign_certificates() -> list[str]:
    """Returns the certificates that this machine trusts and Debian does not: those of its proxies and mirrors."""
    settings = pip_settings()
    bundle = Path(settings.get("cert", "/etc/ssl/certs/ca-certificates.crt"))
    known = "".join(path.read_text() for path in Path("/usr/share/ca-certificates/mozilla").glob("*.crt"))
    blocks = re.findall(r"-----BEGIN CERTIFICATE-----\n(.*?)-----END", bundle.read_text(), re.DOTALL)
    return [block for block in blocks if block not in known]


def package_hosts() -> set[str]:
    """Returns the hosts that packages come from on this machine."""
    addresses = [mirror(), *pip_settings().values()]
    return set(re.findall(r"https?://(?:[^@/\s]*@)?([^/\s:]+)", " ".join(addresses)))
