"""What the launcher adds: `distopt launch --help`, its first line, and the time to a run's first step."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

SCRIPT = """
import pathlib, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
if dist.get_rank() == 0:
    pathlib.Path("first").write_text(repr(time.time()))
dist.destroy_process_group()
"""
ROUNDS = 5


def seconds(argv: list[str], folder: Path) -> float:
    """Returns how long a command takes to its first step, or to its end where it has none."""
    first = folder / "first"
    first.unlink(missing_ok=True)
    start = time.time()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(argv, cwd=folder, check=True, capture_output=True, env=env, timeout=120)
    return (float(first.read_text()) if first.exists() else time.time()) - start


def seconds_to_line(argv: list[str], folder: Path, text: str) -> float:
    """Returns how long a command takes to write a line with `text`; it is followed to its end."""
    start = time.time()
    with subprocess.Popen(argv, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if text in line:
                line_s = time.time() - start
        assert process.wait() == 0
    return line_s


def main() -> int:
    """Prints medians over a few rounds, the alternatives taken in turn; returns how many limits are exceeded."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "train.py").write_text(SCRIPT)
        (folder / "run.yaml").write_text("name: run\nscript: train.py\nlaunch: {workers: 2}\n")
        distopt = [sys.executable, "-m", "distopt.launch", "launch"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
        commands = {
            "help": [*distopt, "--help"],
            "python": [sys.executable, "-c", ""],
            "distopt": [*distopt, "run.yaml"],
            "torchrun": torchrun,
        }
        times: dict[str, list[float]] = {key: [] for key in commands}
        for argv in commands.values():
            seconds(argv, folder)  # from disk, once
        for _ in range(ROUNDS):
            for key, argv in commands.items():
                times[key].append(seconds(argv, folder))
            line = seconds_to_line(commands["distopt"], folder, "starting 2 workers")
            times.setdefault("line", []).append(line)
    middle = {key: median(values) for key, values in times.items()}
    added = middle["distopt"] - middle["torchrun"]
    print(
        f"distopt launch --help            {middle['help']:.3f} s (an empty Python {middle['python']:.3f} s); "
        f"required: under 0.3 s: {'met' if middle['help'] < 0.3 else 'NOT MET'}"
    )
    print(
        f"distopt launch, to its first line  {middle['line']:.3f} s ('starting 2 workers'); "
        f"required: under 0.5 s: {'met' if middle['line'] < 0.5 else 'NOT MET'}"
    )
    print(
        f"two workers, to the first step  distopt launch {middle['distopt']:.2f} s, torchrun {middle['torchrun']:.2f} s"
        f": {added:+.2f} s, ratio {middle['distopt'] / middle['torchrun']:.2f}; "
        f"required: under 1 s more: {'met' if added < 1 else 'NOT MET'}"
    )
    return (middle["help"] >= 0.3) + (middle["line"] >= 0.5) + (added >= 1)


if __name__ == "__main__":
    sys.exit(main())
