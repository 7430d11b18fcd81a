"""Every command where streams are closed, the locale is ASCII, or names have other letters: no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TASK = """
import pyro, torch
import pyro.distributions as dist

class Line:
    def __init__(self): self.x = torch.arange(20.0)
    def model(self, x):
        mean = pyro.param("mean", torch.tensor(0.0))
        with pyro.plate("rows", 20, subsample_size=len(x)): pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
    def guide(self, x): pass
    def rows(self): return 20
    def batch(self, rows): return (self.x[torch.as_tensor(rows)],)
    def report(self, run): pass
"""
RUN = """
name: line
run_dir: runs/\u00e9t\u00e9
task: aufg\u00e4be:Line
train: {num_steps: 4}
data: {global_batch: 10}
log: {every_steps: 2, tensorboard: false}
checkpoint: {every_steps: 2}
launch: {workers: 1, max_restarts: 0}
"""
SWEEP = "name: sweep\nrun: l\u00e4uf.yaml\ngrid: {seed: [1]}\n"

CONFIG, RUN_DIR = "l\u00e4uf.yaml", "runs/\u00e9t\u00e9"
QUICK = (
    ["--help"],
    ["status"],
    ["status", RUN_DIR, "--json"],
    ["logs", RUN_DIR, "--all-ranks"],
    ["launch", CONFIG, "--dry-run"],
    ["config", "show", CONFIG, "--explain"],
    ["config", "diff", CONFIG, RUN_DIR],
)
SLOW = (
    ["launch", CONFIG],
    ["train", CONFIG, "run_dir=runs/other"],
    ["report", RUN_DIR],
    ["compare", RUN_DIR, RUN_DIR],
    ["doctor", CONFIG],
    ["checkpoint", "inspect", RUN_DIR],
    ["sweep", "sw\u00e9ep.yaml"],
)
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
SURROUNDINGS = {
    "stdout closed, a locale of ASCII": (">&-", ASCII),
    "stderr closed, output in ASCII": ("2>&-", {"PYTHONIOENCODING": "ascii"}),
    "all closed": ("<&- >&- 2>&-", {}),
    "a full disk": ("> /dev/full", {}),
    "a locale of ASCII": ("", ASCII),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of letters beyond ASCII with a run that has ended."""
    path = tmp_path_factory.mktemp("surroundings") / "d\u00f6 \u00fc"
    path.mkdir()
    for name, text in (("aufg\u00e4be.py", TASK), (CONFIG, RUN), ("sw\u00e9ep.yaml", SWEEP)):
        (path / name).write_text(text, encoding="utf-8")
    # As a worker of its own, not by a launcher: what commands read is what such a run leaves, and a record.
    done = run(path, ["train", CONFIG], "", {})
    assert done.returncode == 0, done.stderr
    (path / RUN_DIR / "launch.json").write_text('{"pid": 1, "host": "h", "status": 0, "platform": "local"}')
    (path / RUN_DIR / "config.yaml").write_text(RUN, encoding="utf-8")
    (path / RUN_DIR / "logs").mkdir(exist_ok=True)
    (path / RUN_DIR / "logs/rank-0.log").write_text("h\u00e4llo\n", encoding="utf-8")
    return path


def run(folder: Path, command: list[str], redirections: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    argv = ["sh", "-c", f'exec "$0" -m distopt.launch "$@" {redirections}', sys.executable, *command]
    return subprocess.run(
        argv, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, stdin=subprocess.DEVNULL,
        capture_output=True, encoding="utf-8", errors="backslashreplace", timeout=240, check=False,
    )  # fmt: skip


def check(folder: Path, command: list[str], surroundings: str) -> None:
    done = run(folder, command, *SURROUNDINGS[surroundings])
    output = done.stdout + done.stderr
    assert "Traceback" not in output and done.returncode in (0, 1), (command, done.returncode, output)
    assert done.returncode == 0 or output.strip() or ">&-" in SURROUNDINGS[surroundings][0], command


@pytest.mark.parametrize("surroundings", [*SURROUNDINGS][:2])
@pytest.mark.parametrize("command", QUICK, ids=" ".join)
def test_command_that_answers_at_once_works(command, surroundings, folder):
    check(folder, command, surroundings)


def test_full_disk_is_named(folder):
    done = run(folder, ["config", "show", CONFIG], *SURROUNDINGS["a full disk"])
    assert (done.returncode, done.stderr) == (1, "distopt: the output cannot be written: No space left on device\n")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("command", [*QUICK, *SLOW], ids=" ".join)
def test_every_command_works(command, surroundings, folder):
    check(folder, command, surroundings)
