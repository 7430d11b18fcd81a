"""Runs the tests of the core with other releases of what distopt builds on: `make test-matrix`.

Each combination is a virtual environment over this one, in which other releases come first, so that only what differs
is installed. What cannot be installed here is said, and is no success.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".venv" / "matrix"

# Pyro supports no other release of its own with torch 2; other releases of torch need another build of the extension.
COMBINATIONS = (("pyro-ppl==1.9.1",), ("pyro-ppl==1.9.2",))
TESTS = ("tests/optim", "tests/infer", "tests/checkpoint/test_param_store.py", "tests/train/test_loop.py")


def make_environment(packages: tuple[str, ...]) -> Path | str:
    """Returns the Python of an environment with some packages over those of this one, or why there is none."""
    folder = FOLDER / "-".join(packages)
    venv.create(folder, with_pip=False, clear=True)
    python = folder / "bin" / "python"
    (outer,) = (Path(sys.executable).parents[1] / "lib").glob("python*/site-packages")
    (inner,) = folder.glob("lib/python*/site-packages")
    (inner / "outer.pth").write_text(f"import site; site.addsitedir({str(outer)!r})\n")

    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    options = ["--no-deps", "--ignore-installed"]
    done = subprocess.run([*pip, *options, *packages], capture_output=True, text=True)
    return python if done.returncode == 0 else (done.stderr.strip().splitlines() or ["pip failed"])[-1]


def main() -> int:
    """Tests every combination; the exit status is 1 where one fails or cannot be installed."""
    tests = sys.argv[1:] or [test for test in TESTS if (ROOT / test).exists()]
    results = {}
    for packages in COMBINATIONS:
        name = " ".join(packages)
        python = make_environment(packages)
        if isinstance(python, str):
            results[name] = f"not installed: {python}"
            continue
        print(f"== {name}", flush=True)
        pytest = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        status = subprocess.run([*pytest, *tests], cwd=ROOT).returncode
        results[name] = "passed" if status == 0 else f"failed with exit status {status}"

    for name, result in results.items():
        print(f"{name}: {result}")
    return int(any(result != "passed" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
