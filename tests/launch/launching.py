"""One `distopt launch` as a process of its own, as a user starts it."""

from __future__ import annotations

import json
import os
import signal
import site
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

SCRIPT = Path(__file__).with_name("worker_script.py")
TIMEOUT_S = 120.0


def write_config(folder: Path, *script_args: str, name: str = "run", launch: str = "", more: str = "") -> Path:
    """Writes run.yaml, which runs worker_script.py twice."""
    path = folder / "run.yaml"
    path.write_text(
        f"name: {name}\nscript: {json.dumps(str(SCRIPT))}\nscript_args: {json.dumps(list(script_args))}\n{more}\n"
        f"launch: {{workers: 2, max_restarts: 0, grace_s: 20, {launch}}}\n"
    )
    return path


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = TIMEOUT_S) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"{what} did not come true within {timeout_s:g} s"
        time.sleep(0.05)


def mpich_environment(folder: Path) -> Path:
    """Returns the Python of a new environment over the packages of this one, whose mpirun is MPICH's, named Hydra."""
    venv.create(folder)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "outer.pth").write_text(
        "".join(f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages())
    )
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "mpich"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=200)
    if done.returncode:
        pytest.skip(f"MPICH cannot be installed here (pip install mpich): {done.stderr.strip().splitlines()[-1]}")
    return python


class Launched:
    """A running launcher. Workers are recognised by the run's folder in their environment, wherever they hang."""

    def __init__(
        self,
        folder: Path,
        *args: str,
        env: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
        python: str = sys.executable,
    ) -> None:
        self.folder = folder
        self.run_dir = folder / "runs" / "run"
        self._out = (folder / "out").open("w")
        self._err = (folder / "err").open("w")
        self.process = subprocess.Popen(
            [*prefix, python, "-m", "distopt.launch", "launch", "run.yaml", *args],
            cwd=folder, stdout=self._out, stderr=self._err, stdin=subprocess.DEVNULL,
            env={**os.environ, **(env or {}), "LAUNCH_TEST": str(folder)},
        )  # fmt: skip

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    def log(self, rank: int) -> str:
        path = self.run_dir / "logs" / f"rank-{rank}.log"
        return path.read_text() if path.exists() else ""

    def steps(self) -> int:
        """How many steps of training the run has logged."""
        path = self.run_dir / "metrics.jsonl"
        rows = path.read_text().splitlines() if path.exists() else []
        return max((json.loads(row)["step"] for row in rows if row.endswith("}")), default=0)

    def wait(self) -> int:
        try:
            return self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the launcher still runs\n{self.everything()}") from None

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def processes(self) -> list[psutil.Process]:
        """Everything that the run has started, the launcher included, orphans too."""
        pids = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("LAUNCH_TEST") == str(self.folder) or process.cwd() == str(self.folder)
                if ours and process.pid != os.getpid() and process.status() != "zombie":
                    pids.append(process)
            except psutil.Error:
                continue
        return pids

    def everything(self) -> str:
        """All that was printed and logged, for a failed test's message."""
        logs = [f"== {path.name}\n{path.read_text()}" for path in sorted(self.run_dir.glob("logs/*.log"))]
        return "\n".join([self.out, self.err, *logs])

    def workers(self) -> list[psutil.Process]:
        """The processes that run the script itself."""
        return [one for one in self.processes() if one.cmdline()[1:2] == [str(SCRIPT)]]

    def end(self) -> None:
        for process in self.processes():
            process.kill()
        self.process.wait(TIMEOUT_S)
        self._out.close()
        self._err.close()
