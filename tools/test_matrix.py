"""Runs the tests of the core with other releases of what distopt builds on: `make test-matrix`.

Each combination is a virtual environment over this one, in which other releases come first, so that only what differs
is installed; it is kept. With another torch a copy of the checkout is compiled for it. What cannot be installed here is
said, and is no success. `ONLY="torch==2.14.1"` chooses the combinations whose packages have that in them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".venv" / "matrix"

# Pyro supports no other release of its own with torch 2. A torch brings what it needs, of CUDA too: 5 GB.
COMBINATIONS = (("pyro-ppl==1.9.1",), ("pyro-ppl==1.9.2",), ("torch==2.14.1",), ("torch==2.15.0",))
TESTS = ("tests/optim", "tests/infer", "tests/checkpoint/test_param_store.py", "tests/train/test_loop.py")
INSTALLED = "installed"  # a file of an environment that is whole


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


def compile_for(python: Path) -> Path:
    """Returns a copy of the checkout whose loops in C++ are compiled for the torch of an environment."""
    source = python.parents[1] / "source"
    shutil.rmtree(source, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in listed.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    subprocess.run([python, "setup.py", "-q", "build_ext", "--inplace"], cwd=source, check=True)
    return source


def main() -> int:
    """Tests every combination; the exit status is 1 where one fails or cannot be installed."""
    tests = sys.argv[1:] or [test for test in TESTS if (ROOT / test).exists()]
    results = {}
    for packages in COMBINATIONS:
        name = " ".join(packages)
        if os.environ.get("ONLY", "") not in name:
            continue
        python = make_environment(packages)
        if isinstance(python, str):
            results[name] = f"not installed: {python}"
            continue
        print(f"== {name}", flush=True)
        folder = compile_for(python) if is_torch(packages) else ROOT
        status = subprocess.run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], cwd=folder).returncode
        results[name] = "passed" if status == 0 else f"failed with exit status {status}"

    for name, result in results.items():
        print(f"{name}: {result}")
    return int(any(result != "passed" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
