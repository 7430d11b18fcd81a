"""How far a run is, from what lies in its directory."""

from __future__ import annotations

import json

import pytest

from distopt.launch.progress import progress_of


def write(folder, rows, facts=None, *, cut="", checkpoints=()):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + cut)
    if facts is not None:
        (folder / "run.json").write_text(json.dumps(facts))
    for step in checkpoints:
        path = folder / f"checkpoints/step-{step:08d}"
        path.mkdir(parents=True)
        (path / "manifest.json").touch()


def test_time_left_follows_from_the_pace_of_the_last_steps(tmp_path):
    rows = [{"step": step, "elbo": -1.0, "rows_per_s": 5.0, "train_s": 0.5 * step} for step in (10, 20)]
    write(tmp_path, rows, {"num_steps": 100}, cut='{"step": 30, "el', checkpoints=[10])
    progress = progress_of(tmp_path)
    assert (progress.step, progress.left_s, progress.checkpoint) == (20, pytest.approx(40.0), 10)
    assert "step 20 of 100, ELBO -1, 5 rows/s, 40 s left, checkpoint of step 10" in str(progress)


def test_run_that_has_logged_nothing_has_no_progress_and_damage_is_left_out(tmp_path):
    assert progress_of(tmp_path) is None
    write(tmp_path, [])
    assert progress_of(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text('nonsense\n[1]\n{"step": 4, "elbo": null}\n')
    (tmp_path / "run.json").write_text("nonsense")
    progress = progress_of(tmp_path)
    assert (progress.step, progress.num_steps, progress.elbo, progress.left_s) == (4, None, None, None)
    assert str(progress) == "step 4"
