"""Who starts the processes makes no difference, and what fails on one rank is the error of all."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch

from tests.lightning.plans import NUM_ROWS, SviPlan, X, fit, loader, trainer
from tests.workers import ROOT, free_port

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning warns of much that is meant here
BINARIES = Path(sys.executable).parent
SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import distopt, pyro, torch
distopt.init() if sys.argv[2] == "init first" else None
from tests.lightning.plans import *
import distopt.lightning

ERRORS = {
    "validation": ArithmeticError("the rows are rotten"),
    "exit": SystemExit(3),
    "interrupt": KeyboardInterrupt("by hand"),
}

class Failing(SviPlan):
    def training_step(self, batch, batch_idx):
        if self.case == "step" and self.global_rank == 1 and self.global_step == 2:
            raise ArithmeticError("the rows are rotten")
        super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        if self.global_rank == 1 and self.case in ERRORS:
            raise ERRORS[self.case]

pyro.set_rng_seed(3)
how, case = sys.argv[1:3]
plan = Failing()
plan.case = case
strategy = DistoptStrategy(start_method="fork") if how == "fork" else "distopt"
trainer = pl.Trainer(strategy=strategy, devices=int(sys.argv[3]), max_epochs=3, **QUIET)
fit(trainer, plan, loader(8), loader(8, shuffle=False))
plan._guide(X, torch.arange(NUM_ROWS))  # of which a forked process's parent knows nothing but the store
values = {name: float(value) for name, value in plan._guide.median(X, torch.arange(NUM_ROWS)).items()}
print(f"RESULT {trainer.global_rank} {json.dumps(values)}", flush=True)  # in one piece: unbuffered ranks interleave
"""


def run(tmp_path: Path, how: str, case: str = "", num_workers: int = 2) -> tuple[int, str]:
    script = tmp_path / "fit.py"
    script.write_text(SCRIPT)
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = [str(script), how, case, str(num_workers)]
    torchrun = [str(BINARIES / "torchrun"), f"--nproc-per-node={num_workers}", f"--master-port={free_port()}"]
    command = torchrun if how == "torchrun" else [sys.executable]
    process = subprocess.run(
        [*command, *argv], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=150
    )
    return process.returncode, process.stdout + process.stderr


def results(output: str) -> dict[int, dict[str, float]]:
    # Not at the start of a line: what another process has written may stand before it.
    return {int(rank): json.loads(values) for rank, values in re.findall(r"RESULT (\d+) (\{.*?\})", output)}


@pytest.fixture
def expected() -> dict[str, float]:
    """The values of one worker, which is this process."""
    pyro.set_rng_seed(3)
    plan = SviPlan()
    fit(trainer(1), plan, loader(8))
    return {name: float(value) for name, value in plan._guide.median(X, torch.arange(NUM_ROWS)).items()}


@pytest.mark.slow
def test_script_that_lightning_runs_again_for_each_worker_gives_the_numbers_of_one(
    tmp_path: Path, expected: dict[str, float]
) -> None:
    status, output = run(tmp_path, "python", "init first")
    assert status == 0, output
    assert results(output) == {rank: pytest.approx(expected, rel=1e-9) for rank in range(2)}, output


@pytest.mark.slow
def test_forked_processes_hand_their_parameters_back(tmp_path: Path, expected: dict[str, float]) -> None:
    status, output = run(tmp_path, "fork", "init first")
    assert status == 0, output
    assert results(output) == {0: pytest.approx(expected, rel=1e-9)}


@pytest.mark.slow
def test_torchrun_gives_the_numbers_of_one_worker(tmp_path: Path, expected: dict[str, float]) -> None:
    status, output = run(tmp_path, "torchrun", num_workers=3)
    assert status == 0, output
    assert results(output) == {rank: pytest.approx(expected, rel=1e-9) for rank in range(3)}


CAUSES = {
    "step": "ArithmeticError: the rows are rotten",
    "validation": "ArithmeticError: the rows are rotten",
    "exit": "SystemExit: 3",
    "interrupt": "KeyboardInterrupt: by hand",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["interrupt", *list(CAUSES)[:3]])
def test_error_or_interrupt_of_one_rank_outside_the_svi_reaches_the_others_with_its_cause(
    tmp_path: Path, case: str
) -> None:
    status, output = run(tmp_path, "torchrun", case)
    assert status != 0
    assert CAUSES[case] in output
    assert "Rank 0 of 2 stops because of it." in output, output
