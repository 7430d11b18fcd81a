"""A day of somebody who forecasts sales: from a CSV to predictions and a comparison, by commands and in a notebook."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pytest

import distopt
from tests.train.runs import BIN, environment

HERE = Path(__file__).parent
FILES = ("sales.py", "sales.yaml", "sweep.yaml")


def sales(num_shops: int = 5, num_weeks: int = 240) -> pd.DataFrame:
    """Returns sales with a known trend, season and noise."""
    random = np.random.default_rng(1)
    week, shop = map(np.ravel, np.meshgrid(np.arange(num_weeks), np.arange(num_shops)))
    season = 0.7 * np.sin(2 * np.pi * week / 52)
    mean = 1.0 + shop + 0.5 * week / 52 + season
    values = {"week": week, "shop": shop, "sales": mean + 0.2 * random.standard_normal(len(week))}
    return pd.DataFrame(values).astype({"sales": "float32", "week": "int64"})


@pytest.mark.slow
@pytest.mark.timeout(400)  # it is a whole day: a run, a sweep of two, a comparison
def test_day_of_forecasting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line.strip() for name in FILES for line in (HERE / name).read_text().splitlines()]
    assert len([line for line in lines if line and not line.startswith(("#", '"""'))]) <= 60
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in FILES:
        shutil.copy(HERE / name, tmp_path)
    sales().to_csv("sales.csv", index=False)

    def command(*arguments: str) -> str:
        done = subprocess.run(
            [str(BIN / "distopt"), *arguments], env=environment(), capture_output=True, text=True, timeout=170
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    assert "starting 2 workers" in command("launch", "sales.yaml")
    swept = command("sweep", "sweep.yaml")
    assert "trial 1 (optim.args.lr=0.05) done: validation/mse" in swept and "sweep: runs/rates/sweep.html" in swept
    best, other = [trial["value"] for trial in json.loads(Path("runs/rates/sweep.json").read_text())["trials"]][::-1]
    assert best < other
    assert "sales\tdone" in command("status")
    assert "comparison: comparison.html" in command("compare", "sales", "rates-000")
    assert "optim.args.lr" in Path("comparison.html").read_text()

    pyro.clear_param_store()
    run = distopt.load_run("sales", checkpoint="best")
    slow = distopt.load_run("rates-000")
    assert run.metrics["validation/mse"].min() < slow.metrics["validation/mse"].min()
    assert float(run.posterior(sites=["trend"])["trend"][0.5]) == pytest.approx(0.5, abs=0.1)
    unseen = np.arange(run.task.num_train, run.task.num_train + 200)
    predicted = run.predictive(200, rows=unseen)["sales"]
    observed = run.task.all[2][unseen]
    low, high = np.quantile(predicted.numpy(), [0.05, 0.95], axis=0)
    covered = ((observed.numpy() > low) & (observed.numpy() < high)).mean()
    assert 0.7 < covered <= 1.0
