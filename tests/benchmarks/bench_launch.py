"""What the launcher adds: `distopt launch --help`, and a run's first output against torchrun's own, in one go."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

SCRIPT = "import torch.distributed as dist; dist.init_process_group('gloo'); dist.destroy_process_group()\n"
ROUNDS = 3


def seconds(argv: list[str], folder: Path) -> float:
    """Returns how long a command takes, its own errors raised."""
    start = time.perf_counter()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(argv, cwd=folder, check=True, capture_output=True, env=env, timeout=120)
    return time.perf_counter() - start


def main() -> None:
    """Prints medians over a few rounds, the alternatives taken in turn."""
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
        for _ in range(ROUNDS):
            for key, argv in commands.items():
                times[key].append(seconds(argv, folder))
    middle = {key: median(found) for key, found in times.items()}
    print(f"distopt launch --help {middle['help']:.3f} s (limit 0.3), an empty Python {middle['python']:.3f} s")
    added = middle["distopt"] - middle["torchrun"]
    print(
        f"two workers, start to end: torchrun {middle['torchrun']:.2f} s, distopt launch {middle['distopt']:.2f} s: "
        f"{added:+.2f} s (limit 1), ratio {middle['distopt'] / middle['torchrun']:.2f}"
    )


if __name__ == "__main__":
    main()
