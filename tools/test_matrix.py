"""Runs the tests of the core with other releases of what distopt builds on: `make test-matrix`.

Each combination is a virtual environment over this one, in which other releases come first, so that only what differs
is installed; it is kept. With another torch a copy of the checkout is compiled for it. Another Python has an
environment of its own, with all that this one has. What cannot be installed here is said, and is no success; a Python
that is not here is said too, and left out. `ONLY="torch==2.14.1"` or `ONLY=python3.12` chooses the combinations that
have that in their names.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".venv" / "matrix"

# Pyro supports no other release of its own with torch 2. A torch brings what it needs, of CUDA too: 5 GB.
COMBINATIONS = (("pyro-ppl==1.9.1",), ("pyro-ppl==1.9.2",), ("torch==2.14.1",), ("torch==2.15.0",))
PYTHONS = ("3.12", "3.13")
EXTRAS = "dev,examples,tensorboard,prometheus,remote"  # what `make setup-dev` installs, but for MPI, Horovod and docs
TESTS = ("tests/optim", "tests/infer", "tests/checkpoint/test_param_store.py", "tests/train/test_loop.py")
# Horovod and MPI are built for this Python and this torch alone.
WITHOUT_ENGINES = ("-k", "not horovod and not mpi and not test_same_yaml_gives_the_same_posterior_on_any_workers")
INSTALLED = "installed"  # a file of an environment that is whole
PASSED = "passed"
NOT_HERE = "not tested"


def is_torch(packages: tuple[str, ...]) -> bool:
    """Returns whether a combination has another torch."""
    return any(package.startswith("torch==") for package in packages)


def make_environment(packages: tuple[str, ...]) -> Path | str:
    """Returns the Python of an environment with some packages over those of this one, or why there is none."""
    folder = FOLDER / "-".join(packages)
    python = folder / "bin" / "python"
    if (folder / INSTALLED).exists():
        return python
    venv.create(folder, with_pip=False, clear=True)
    (outer,) = (Path(sys.executable).parents[1] / "lib").glob("python*/site-packages")
    (inner,) = folder.glob("lib/python*/site-packages")

    # Before the others are seen, since pip would find what torch needs there, in the releases of another one.
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    options = [] if is_torch(packages) else ["--no-deps"]
    done = subprocess.run([*pip, *options, *packages], capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    (inner / "outer.pth").write_text(f"import site; site.addsitedir({str(outer)!r})\n")
    (folder / INSTALLED).touch()
    return python


def find_interpreter(version: str) -> Path | None:
    """Returns a Python of a version, such as 3.12, on PATH or among those of pyenv; None where there is none."""
    name = f"python{version}"
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    candidates = [Path(found)] if (found := shutil.which(name)) else []
    candidates += sorted(pyenv.glob(f"{version}.*/bin/{name}"), reverse=True)

    # pyenv has a command of that name on PATH also where no such Python is chosen; Debian's may lack ensurepip.
    test = f"import sys, ensurepip, venv; sys.exit('%d.%d' % sys.version_info[:2] != {version!r})"
    for candidate in candidates:
        if subprocess.run([candidate, "-c", test], capture_output=True).returncode == 0:
            return candidate
    return None


def make_python_environment(interpreter: Path, version: str) -> Path | str:
    """Returns the Python of an environment of another interpreter, with distopt compiled, or why there is none."""
    folder = FOLDER / f"python{version}"
    python = folder / "bin" / "python"
    if not (folder / INSTALLED).exists():
        subprocess.run([interpreter, "-m", "venv", "--clear", folder], check=True)

    # As the Makefile does it: setup.py needs torch to compile for. The checkout may be another one since the last time.
    source = copy_checkout(folder / "source")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    for arguments in (["torch", "setuptools>=77", "wheel"], ["--no-build-isolation", "-e", f"{source}[{EXTRAS}]"]):
        done = subprocess.run([*pip, *arguments], capture_output=True, text=True)
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    (folder / INSTALLED).touch()
    return python


def compile_for(python: Path) -> Path:
    """Returns a copy of the checkout that is installed, with its loops in C++, for the torch of an environment."""
    source = copy_checkout(python.parents[1] / "source")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "-e", str(source)], check=True)
    return source


def copy_checkout(source: Path) -> Path:
    """Makes a folder a copy of the files that git knows, and returns it."""
    shutil.rmtree(source, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in listed.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    return source


def try_packages(packages: tuple[str, ...], tests: list[str]) -> str:
    """Returns what came of the tests with other releases of packages."""
    python = make_environment(packages)
    if isinstance(python, str):
        return f"not installed: {python}"
    if is_torch(packages):
        return run_tests(python, compile_for(python), [*WITHOUT_ENGINES, *tests])
    return run_tests(python, ROOT, tests)


def try_python(version: str, tests: list[str]) -> str:
    """Returns what came of the tests with another Python."""
    interpreter = find_interpreter(version)
    if interpreter is None:
        return f"{NOT_HERE}: there is no python{version} on PATH or among the versions of pyenv"
    python = make_python_environment(interpreter, version)
    if isinstance(python, str):
        return f"not installed: {python}"
    return run_tests(python, python.parents[1] / "source", [*WITHOUT_ENGINES, *tests])


def run_tests(python: Path, folder: Path, tests: list[str]) -> str:
    """Runs tests in a folder and returns whether they passed."""
    # mpi4py, of which Lightning asks, looks for the Open MPI from PyPI in the environment that runs.
    library = ROOT / ".venv" / "lib" / "libmpi.so.40"
    environment = os.environ | ({"MPI4PY_LIBMPI": str(library)} if library.exists() else {})
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    status = subprocess.run(command, cwd=folder, env=environment).returncode
    return PASSED if status == 0 else f"failed with exit status {status}"


def main() -> int:
    """Tests every combination; the exit status is 1 where one fails or cannot be installed."""
    tests = sys.argv[1:] or [test for test in TESTS if (ROOT / test).exists()]
    combinations = {" ".join(packages): partial(try_packages, packages) for packages in COMBINATIONS}
    combinations |= {f"python{version}": partial(try_python, version) for version in PYTHONS}

    results = {}
    for name, attempt in combinations.items():
        if os.environ.get("ONLY", "") in name:
            print(f"== {name}", flush=True)
            results[name] = attempt(tests)

    for name, result in results.items():
        print(f"{name}: {result}")
    return int(any(not result.startswith((PASSED, NOT_HERE)) for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
