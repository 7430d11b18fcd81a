"""torchrun starts workers again after a death, every time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distopt.launch.worker.events import End, Reader
from tests.launch.launching import write_config

SCRIPT = Path(__file__).with_name("dying_script.py")


@pytest.mark.timeout(240)
def test_every_restart_succeeds_at_the_first_try(start, tmp_path):
    # With torch 2.13's store kept over restarts about half of them fail, and this test with three chances in four.
    deaths = 2
    write_config(tmp_path)
    run = start(f"script={SCRIPT}", f"script_args=['{deaths}']", f"launch.max_restarts={2 * deaths}")
    assert run.wait() == 0, run.err + run.log(0) + run.log(1)
    assert "all arrived: 2" in run.out
    events = Reader(run.run_dir, from_start=True).new()
    killed = [event for event in events if isinstance(event, End) and event.status == -9]
    assert sorted(event.attempt for event in killed) == list(range(deaths))
    assert run.err.count("was killed (SIGKILL)") == deaths
    plan = json.loads((run.run_dir / "launch.json").read_text())["plan"]
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in plan["commands"][0]
