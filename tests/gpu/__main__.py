"""Runs the checks that need a GPU: `make test-gpu`, or `python -m tests.gpu`.

Suites run in their order, the most valuable first, each in a process of its own with a time limit, so that one that
hangs costs itself only. The exit status is 0 when something ran and nothing failed, 1 after a failure, and 5 when
nothing could be run, as where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from tests.gpu.checks import Result, Suite

ROOT = Path(__file__).parents[2]
SUITES = ("optimizers", "worlds", "checkpoints", "steps", "launching", "compiled", "speed")
NOTHING_RAN = 5  # as pytest


def suite_of(name: str) -> Suite:
    """Returns the suite that the module of that name has."""
    suite: Suite = import_module(f"tests.gpu.{name}").SUITE
    return suite


def run_suite(name: str, device: torch.device) -> list[Result]:
    """Runs a suite in a process of its own, and ends it after its time."""
    suite = suite_of(name)
    command = [sys.executable, "-m", "tests.gpu", "--suite", name, "--device", str(device)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    late = threading.Timer(suite.limit_s, os.killpg, (process.pid, signal.SIGKILL))
    late.start()
    results = []
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            if line.startswith('{"suite"'):
                results.append(Result(**json.loads(line)))
                print(described(results[-1]), flush=True)
    status = process.wait()
    late.cancel()

    done = {result.name for result in results}
    why = f"the suite was ended after its {suite.limit_s:g} s" if status == -signal.SIGKILL else f"exit status {status}"
    missing = [Result(name, check, "not run", detail=why) for check in suite.names() if check not in done]
    for result in missing:
        print(described(result), flush=True)
    return results + missing


def described(result: Result) -> str:
    """Returns a result as a line of the table, and below it why it failed."""
    figures = "  ".join(f"{key} {_short(value)}" for key, value in result.figures.items())
    reason = result.detail if result.status == "skipped" else ""
    text = f"{result.status:8} {result.suite:12} {result.name:62} {result.seconds:6.1f} s  {figures}{reason}"
    if result.status in ("failed", "not run"):
        text += "\n" + "\n".join(f"           {line}" for line in result.detail.splitlines()[-12:])
    return text.rstrip()


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def machine(device: torch.device) -> dict[str, Any]:
    """Returns what the figures depend on."""
    is_cuda = device.type == "cuda"
    return {
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
        "device": torch.cuda.get_device_name(device) if is_cuda else f"CPU, {os.cpu_count()} cores",
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if is_cuda else None,  # type: ignore[no-untyped-call]
        "python": platform.python_version(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the arguments ask for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__, formatter_class=_Raw)
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"suites to run, of {', '.join(SUITES)}; all by default"
    )
    parser.add_argument("--device", help="cpu tries the checks themselves where there is no GPU; cuda by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all results")
    parser.add_argument("--suite", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if unknown := sorted(set(chosen.suites) - set(SUITES)):
        parser.error(f"no suite {unknown[0]!r}; there are {', '.join(SUITES)}")

    device = torch.device(chosen.device or "cuda")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    if chosen.suite:
        for name in suite_of(chosen.suite).names():
            print(suite_of(chosen.suite).run_one(name, device).line(), flush=True)
        return 0

    results: list[Result] = []
    began = time.monotonic()
    names = [name for name in SUITES if name in (chosen.suites or SUITES)]
    if device.type == "cuda" and not torch.cuda.is_available():
        for name in names:
            results += [Result(name, check, "skipped", detail="no GPU") for check in suite_of(name).names()]
        print("\n".join(map(described, results)))
        about = {"device": None, "torch": str(torch.__version__)}
    else:
        about = machine(device)
        print("  ".join(f"{key} {value}" for key, value in about.items() if value))
        for name in names:
            results += run_suite(name, device)

    counts = {status: sum(r.status == status for r in results) for status in ("ok", "failed", "not run", "skipped")}
    print(", ".join(f"{count} {status}" for status, count in counts.items()), f"in {time.monotonic() - began:.0f} s")
    if chosen.json is not None:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps({**about, "results": [json.loads(r.line()) for r in results]}, indent=1))
    if counts["failed"] or counts["not run"]:
        return 1
    return 0 if counts["ok"] else NOTHING_RAN


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Keeps the paragraphs of the description."""


if __name__ == "__main__":
    sys.exit(main())
