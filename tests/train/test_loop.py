"""The loop in real runs: the same result on any workers, interruptions, and going on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from distopt.config import ConfigError
from distopt.infer import SVI
from distopt.infer.capture import compiled
from distopt.run_files import read_metrics
from distopt.train.monitor import STRAGGLER_RATIO, Status
from tests.control_groups import control_group
from tests.train.runs import (
    ROOT,
    command,
    config,
    environment,
    launch,
    launch_well,
    parameters,
    run_here,
    steps_logged,
)
from tests.train.tasks import Line


def assert_equal_bits(run_dir: Path, other: Path) -> None:
    actual, expected = parameters(run_dir), parameters(other)
    assert actual.keys() == expected.keys() and len(actual) > 0
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_same_yaml_gives_the_same_posterior_on_any_workers(tmp_path: Path) -> None:
    """A Delta guide draws no noise, so only the order of additions differs; nor do its particles."""
    path = config(tmp_path, task_args={"guide": "AutoDelta"}, train={"num_steps": 40})
    run_here(path, f"run_dir={tmp_path / 'one'}")
    overlap = ("reduce.overlap=true", "reduce.bucket_mib=1e-5", "train.num_particles=2", "reduce.drift_every_steps=7")
    launch_well(path, f"run_dir={tmp_path / 'gloo'}", *overlap)
    launch_well(path, f"run_dir={tmp_path / 'horovod'}", "reduce.backend=horovod")
    expected = parameters(tmp_path / "one")
    for name in ("gloo", "horovod"):
        actual = parameters(tmp_path / name)
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_save_that_failed_is_no_checkpoint_to_those_who_ask_for_its_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, float | None] = {}
    after_step = Status.after_step

    def note(status: Status, step: int) -> None:
        after_step(status, step)
        seen[step] = status.checkpoint_age_s()

    monkeypatch.setattr(Status, "after_step", note)
    monkeypatch.setenv("DISTOPT_FAILPOINT", "after_write:raise")
    with pytest.raises(AssertionError):  # it does not end well, since the last save has failed
        run_here(config(tmp_path, train={"num_steps": 24}, checkpoint={"every_steps": 8}))
    assert seen == dict.fromkeys(range(1, 25))


@pytest.mark.parametrize("url", [True, False])
def test_checkpoints_go_to_their_own_directory_and_are_found_there(
    url: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = "memory://loop/kept" if url else str(tmp_path / "kept")
    path = config(tmp_path, train={"num_steps": 4}, checkpoint={"every_steps": 2, "directory": directory})
    run_here(path)
    run_here(path, "train.num_steps=6")
    assert f"resuming from step 4 ({directory}/step-00000004" in capsys.readouterr().out.replace("\n", "")
    assert not (tmp_path / "run" / "checkpoints").exists() and (tmp_path / "kept").exists() is not url


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    output = launch_well(config(folder))
    assert "step 60 of 60" in output and "a line was found" in output
    return folder / "run"


def test_run_writes_metrics_and_a_page_that_needs_no_other_file(undisturbed: Path) -> None:
    assert steps_logged(undisturbed) == list(range(5, 61, 5))
    page = (undisturbed / "report.html").read_text()
    assert "data:image/svg+xml" in page and "a line was found" in page
    assert "http://" not in page and "https://" not in page


# Eager runs are killed, and compared in the same way, in tests/checkpoint/test_kills.py too.
@pytest.mark.slow
@pytest.mark.parametrize("capture", ["off", "graph"])
def test_worker_killed_once_is_restarted_and_the_result_is_the_same_to_the_bit(
    undisturbed: Path, tmp_path: Path, capture: str
) -> None:
    """Also when a thread reads the batches ahead, and is some steps before the others when all ends."""
    path = config(
        tmp_path,
        task_args={"kill_rank": 1, "kill_at": 40, "marker": str(tmp_path / "killed")},
        data={"global_batch": 100, "prefetch": 2},
        train={"num_steps": 60, "capture": capture},
    )
    output = launch_well(path)
    assert "not captured" not in output
    assert (tmp_path / "killed").exists(), "nobody was killed"
    assert "rank 1" in output and "SIGKILL" in output, output
    assert "resuming from step 30" in output, output
    assert steps_logged(tmp_path / "run") == list(range(5, 61, 5))
    assert_equal_bits(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_killed_run_resumes_with_captured_steps_and_again_without_them_to_the_same_bits(
    undisturbed: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "killed"
    path = config(
        tmp_path,
        task_args={"kill_rank": 1, "kill_at": 28, "marker": str(marker)},
        launch={"workers": 2, "max_restarts": 0},
    )
    for capture in ("off", "graph"):
        done = launch(path, f"train.capture={capture}")
        assert done.returncode != 0 and "SIGKILL" in done.stdout + done.stderr
        assert ("resuming from step" in done.stdout) is (capture == "graph")
        assert "not captured" not in done.stdout
        marker.unlink()
    marker.touch()
    assert "resuming from step" in launch_well(path, "train.capture=off")
    assert_equal_bits(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_run_may_change_between_captured_and_eager_steps_when_it_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path)
    run_here(path, "train.capture=off", f"run_dir={tmp_path / 'through'}")
    run_here(path, "train.capture=off", "train.num_steps=20")
    capsys.readouterr()
    run_here(path, "train.capture=graph", "train.num_steps=40")
    output = capsys.readouterr()
    assert "resuming from step 20" in output.out and "not captured" not in output.out + output.err
    run_here(path, "train.capture=off")
    assert "resuming from step 40" in capsys.readouterr().out
    assert_equal_bits(tmp_path / "run", tmp_path / "through")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_run_of_compiled_steps_that_is_killed_has_the_bits_of_one_that_is_not(tmp_path: Path) -> None:
    settings = {"data": {"global_batch": 100}, "train": {"num_steps": 60, "capture": "compiled"}}
    marker = tmp_path / "killed"
    for name in ("through", "run"):
        if name == "through":
            marker.touch()
        else:
            marker.unlink()
        path = config(tmp_path, task_args={"kill_rank": 1, "kill_at": 40, "marker": str(marker)}, **settings)
        output = launch_well(path, f"run_dir={tmp_path / name}")
        assert "not compiled" not in output
        assert ("SIGKILL" in output) is (name == "run")
    assert_equal_bits(tmp_path / "run", tmp_path / "through")


@pytest.mark.slow
@pytest.mark.parametrize(
    "train",
    [{"capture": "compiled"}, {"compile_from_step": 15}, {"compile_from_step": 30}],
    ids=["from the start", "from before the resume", "from after it"],
)
def test_run_of_compiled_steps_resumes_with_the_same_bits_and_says_when_they_are_compiled_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, train: dict[str, Any]
) -> None:
    # What is compiled runs as it stands: the compiler takes its time, and tests/infer/capture/test_compiled.py has it.
    monkeypatch.setattr(compiled, "_functions", {})
    monkeypatch.setattr(compiled, "_run_compiler", lambda graph, _examples: torch.no_grad()(graph))
    path = config(tmp_path, train={"num_steps": 40} | train)
    run_here(path, f"run_dir={tmp_path / 'through'}")
    run_here(path, "train.num_steps=21")
    capsys.readouterr()
    run_here(path)
    output = capsys.readouterr().out
    assert "resuming from step 21" in output and "not compiled" not in output
    assert_equal_bits(tmp_path / "run", tmp_path / "through")

    run_here(path, "train.num_steps=50", "train.capture=graph", "train.compile_from_step=null")
    assert "steps are not compiled as they were before the run resumed" in capsys.readouterr().out


def test_rows_that_captured_steps_select_give_the_same_bits(tmp_path: Path) -> None:
    path = config(tmp_path, train={"num_steps": 30})
    run_here(path, f"run_dir={tmp_path / 'eager'}")
    for capture in ("off", "graph"):
        folder = tmp_path / f"columns-{capture}"
        run_here(path, f"run_dir={folder}", "task=tests.train.tasks:LineOfColumns", f"train.capture={capture}")
        assert_equal_bits(folder, tmp_path / "eager")


def test_validation_samples_steps_and_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validated: list[bool] = []
    step_with = SVI.step_with

    def watched(svi: SVI, *args: Any, **kwargs: Any) -> Any:
        validated.append(is_validation_enabled())
        return step_with(svi, *args, **kwargs)

    monkeypatch.setattr(SVI, "step_with", watched)
    for name, value, expected in (
        ("always", "null", [True] * 105),
        ("sampled", "2", [step <= 2 or step == 100 for step in range(1, 106)]),
    ):
        validated.clear()
        path = config(tmp_path, train={"num_steps": 105}, checkpoint={"every_steps": None})
        run_here(path, f"run_dir={tmp_path / name}", f"train.check_steps={value}")
        assert validated == expected
    assert_equal_bits(tmp_path / "sampled", tmp_path / "always")


def test_columns_of_another_length_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config(tmp_path, task="tests.train.tasks:LineOfColumns", task_args={"more_on_rank_1": 1})
    run_here(path, "task_args.num_missing=1", status=1)
    assert "columns() have [999, 999] rows, expected 1,000 in each, as rows() says" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.alone
def test_straggler_is_named_while_the_run_goes_on_and_in_the_report_and_changes_no_bit(
    undisturbed: Path, tmp_path: Path
) -> None:
    # A fifth of a core where cores are idle, and a fifth of what a process gets where others keep them busy.
    fifth = {"cpu.cfs_period_us": "10000", "cpu.cfs_quota_us": "2000", "cpu.shares": "204"}
    with control_group("cpu", fifth, {"cpu.max": "2000 10000", "cpu.weight": "20"}) as group:
        path = config(tmp_path, task="tests.train.tasks:Straggling", task_args={"group": str(group)})
        output = launch_well(path)
    pattern = r"rank 1 on \S+ is a straggler: its work for a step takes [\d.e+]+ ms, ([\d.]+) times the median"
    (while_running,) = re.findall(rf"step \d+: {pattern}", output)
    (reported,) = re.findall(pattern.replace("rank", "Rank", 1), (tmp_path / "run/report.html").read_text())
    assert min(float(while_running), float(reported)) >= STRAGGLER_RATIO
    assert_equal_bits(tmp_path / "run", undisturbed)


@pytest.mark.parametrize(
    ("number", "status"), [pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGINT, 130)]
)
def test_signal_saves_ends_all_processes_and_the_same_command_goes_on(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    path = config(tmp_path)
    endless = "train.num_steps=1000000"
    run = subprocess.Popen(
        command(path, endless), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    run_dir = tmp_path / "run"
    try:
        deadline = time.monotonic() + 90
        while not steps_logged(run_dir) and run.poll() is None:
            assert time.monotonic() < deadline, "no step was logged in 90 s"
            time.sleep(0.1)
        started = psutil.Process(run.pid).children(recursive=True)
        assert len(started) >= 3, started
        asked = time.monotonic()
        os.kill(run.pid, number)
        output, _ = run.communicate(timeout=60)
        assert time.monotonic() - asked < 30
    finally:
        run.kill()
    assert run.returncode == status, output
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive, alive
    stopped = max(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))
    assert f"stopped after step {stopped:,}" in output, output
    if number == signal.SIGTERM:
        return  # from here on it is the same
    goal = f"train.num_steps={stopped + 20}"
    output = launch_well(path, goal)
    assert f"resuming from step {stopped:,}" in output, output
    launch_well(path, goal, f"run_dir={tmp_path / 'through'}")
    assert_equal_bits(run_dir, tmp_path / "through")


@pytest.mark.slow
def test_error_in_the_model_of_one_rank_is_told_with_its_cause(tmp_path: Path) -> None:
    done = launch(config(tmp_path, task_args={"fail_at": 8}), "launch.max_restarts=0")
    output = done.stdout + done.stderr
    assert done.returncode == 1, output
    assert "these rows are rotten" in output and "rank 1" in output, output


def test_run_that_is_done_takes_no_more_steps(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, run_dir=str(undisturbed))
    before = parameters(undisturbed)
    run_here(path)
    assert "all 60 steps were done before" in capsys.readouterr().out
    after = parameters(undisturbed)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_steps_of_gradients_that_are_not_finite_are_left_out_and_counted_where_the_config_says_so(
    tmp_path: Path,
) -> None:
    run_here(config(tmp_path, task_args={"nan_at": 10}, train={"num_steps": 10}))
    assert [row["skipped_steps"] for row in read_metrics(tmp_path / "run")] == [0, 1]
    assert all(value.isfinite().all() for value in parameters(tmp_path / "run").values())


def test_run_whose_steps_are_all_skipped_ends_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config(tmp_path, task_args={"nan_at": 10}, train={"num_steps": 10})
    run_here(path, "optim.max_skipped_in_row=1", status=1)
    assert "step 7: the last 1 steps were skipped, since gradients were not finite" in capsys.readouterr().err


def test_state_that_is_not_finite_is_never_the_last_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = config(tmp_path, task_args={"nan_at": 23}, train={"num_steps": 40})
    with pytest.raises(ValueError, match="nan"):  # by Pyro's validation, in the step after
        run_here(path, "optim.nonfinite=step")
    assert "step 20 was NOT saved" in caplog.text and "rank 0 of 1: parameter 'AutoNormal." in caplog.text
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-00000010"]


def test_run_without_matplotlib_ends_with_a_report_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run_here(config(tmp_path, train={"num_steps": 5}))
    assert "pip install matplotlib" in (tmp_path / "run/report.html").read_text()


def test_options_that_exclude_each_other_are_refused_before_a_worker_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="command line: reduce: op='adasum' sends several messages"):
        run_here(config(tmp_path), "reduce.overlap=true", "reduce.op=adasum")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.global_batch=1001", "data: global_batch is 1,001, but there are 1,000 rows"),
        ("train.loss_args={max_nesting: 1}", "train.loss_args: .*'max_nesting'"),
        ("run_dir=/dev/null/run", "run_dir: .*Not a directory"),
    ],
)
def test_values_that_only_the_worker_can_refuse_are_one_line_with_their_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    run_here(config(tmp_path), override, status=1)
    error = capsys.readouterr().err
    assert re.fullmatch(f"distopt: rank 0 of 1: {message}.*\n", error), error


def test_rows_that_differ_between_ranks_are_refused(tmp_path: Path) -> None:
    done = launch(config(tmp_path, task_args={"more_on_rank_1": 5}), "launch.max_restarts=0")
    assert done.returncode == 1
    assert "rows() is 1,000 on rank 0 and 1,005 on rank 1" in done.stderr, done.stdout + done.stderr


def test_config_code_and_versions_that_differ_between_ranks_are_refused(tmp_path: Path) -> None:
    for rank, code in enumerate(["", "import torch\n\ntorch.__version__ = '2.0'\n"]):
        (tmp_path / f"{rank}").mkdir()
        (tmp_path / f"{rank}/line.py").write_text(f"from tests.train.tasks import Line\n{code}")
        (tmp_path / f"{rank}/constants.py").write_text(f"PRIOR = {rank}\n")  # imported by nothing so far
    path = config(tmp_path, task="line:Line")
    train = f"{sys.executable} -m distopt.launch train {path} optim.args.lr=0.$((RANK + 1))"
    each = f"PYTHONPATH={tmp_path}/$RANK:{ROOT} {train}"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--local-addr=127.0.0.1"]
    done = subprocess.run(
        [sys.executable, *torchrun, "--no-python", "bash", "-c", each], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    difference = re.search("ranks have different configuration, code or versions:\n((  .*\n)+)", done.stderr)
    assert difference, done.stderr
    actual = [line.strip() for line in difference[1].splitlines()]
    assert actual[0] == "config.optim.args.lr: 0.1 on rank 0, 0.2 on rank 1"
    assert actual[1] == f"version.torch: '{torch.__version__}' on rank 0, '2.0' on rank 1"
    assert [line.partition(":")[0] for line in actual[2:]] == ["module constants", "module line"]


def test_parameters_are_made_from_no_more_rows_than_a_step_has(tmp_path: Path) -> None:
    sizes: list[int] = []
    batch = Line.batch

    def noting(task: Line, rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        sizes.append(len(rows))
        return batch(task, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Line, "batch", noting)
        run_here(config(tmp_path), "train.num_steps=2")
    assert sizes == [100, 100, 99, 100, 100], "made from the first, then compared with one row less"
