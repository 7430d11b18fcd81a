"""A loop that its body leaves by `break` ends as a run that is done, on all ranks after the same step."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pyro
import pytest
import torch

from distopt.backends.single import Single
from distopt.config import RunConfig
from distopt.optim import Adam, DistributedOptimizer
from distopt.reduce.errors import DisagreementError
from distopt.run_files import read_facts, read_metrics
from distopt.train import Session
from distopt.train.loop_end import LoopEnd
from tests.train.runs import BIN, environment


def session(folder: Path, optimizer: DistributedOptimizer) -> Session:
    keys = {"name": "demo", "run_dir": folder, "script": "demo.py", "log": {"every_steps": 100, "tensorboard": False}}
    return Session({"optimizer": optimizer}, num_steps=9, config=RunConfig.model_validate(keys))


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def take_step(optimizer: DistributedOptimizer) -> None:
    x = pyro.param("x", torch.zeros(2))
    (x - 1).square().sum().backward()
    optimizer([x.unconstrained()])


@pytest.mark.parametrize(("leaves_after_its_step", "last"), [(True, 4), (False, 3)])
def test_left_loop_is_done_with_a_checkpoint_of_the_last_step_taken(tmp_path, capsys, leaves_after_its_step, last):
    pyro.clear_param_store()
    optimizer = DistributedOptimizer(Adam({"lr": 0.1}))
    with session(tmp_path, optimizer) as opened:
        for step in opened.steps():
            if step == 3 and not leaves_after_its_step:
                break
            take_step(optimizer)
            opened.log(elbo=float(step))
            if step == 3:
                break
    assert kept(tmp_path) == [f"step-0000000{last}"] and (tmp_path / "report.html").exists()
    assert f"stopped early after step {last}: the script left its loop" in capsys.readouterr().out
    assert (read_facts(tmp_path)["outcome"], read_facts(tmp_path)["step"]) == ("done", last)
    assert [row["step"] for row in read_metrics(tmp_path)] == ([last] if leaves_after_its_step else [])

    with session(tmp_path, optimizer) as opened:  # the same command again asks the loop again
        assert next(opened.steps()) == last
    assert kept(tmp_path) == [f"step-0000000{last}"]


@pytest.mark.parametrize("data_first", [True, False])
def test_data_that_ends_before_the_steps_ends_the_run(tmp_path, data_first):
    pyro.clear_param_store()
    optimizer = DistributedOptimizer(Adam({"lr": 0.1}))
    with session(tmp_path, optimizer) as opened:
        for _ in zip("abc", opened.steps()) if data_first else zip(opened.steps(), "abc"):  # noqa: B905  # of two lengths
            take_step(optimizer)
    assert kept(tmp_path) == ["step-00000003"]


@pytest.mark.parametrize("leaves_after_its_step", [True, False])
def test_second_loop_of_a_session_goes_on_from_where_the_first_was_left(tmp_path, leaves_after_its_step):
    pyro.clear_param_store()
    optimizer = DistributedOptimizer(Adam({"lr": 0.1}))
    taken = []
    with session(tmp_path, optimizer) as opened:
        for last in (3, None):
            for step in opened.steps():
                if step == last and not leaves_after_its_step:
                    break
                take_step(optimizer)
                taken.append(step)
                if step == last:
                    break
    assert taken == [*range(9)] and optimizer.reducer.step == 9
    assert kept(tmp_path) == ["step-00000009"] and read_facts(tmp_path)["early_stop"] is None


def test_session_without_a_loop_saves_nothing_and_ends_no_process(tmp_path, capsys):
    with session(tmp_path, DistributedOptimizer(Adam({"lr": 0.1}))) as opened:
        assert opened.first_step == 0
    assert kept(tmp_path) == [] and "stopped" not in capsys.readouterr().out


def test_step_that_no_distributed_optimizer_takes_counts_when_its_body_leaves():
    end = LoopEnd(Single(), [torch.optim.SGD([torch.zeros(1)], lr=0.1)])
    with end.step():
        pass
    assert not end.is_in_step
    end.step().__enter__()
    assert end.is_in_step and end.leave() and end.is_left and not end.is_in_step


SCRIPT = """
import pyro, torch
import distopt
from distopt.optim import Adam, DistributedOptimizer

worker = distopt.init()
optimizer = DistributedOptimizer(Adam({"lr": 0.1}))
with distopt.train.Session({"optimizer": optimizer}) as session:
    for step in session.steps():
        if LEAVES_BEFORE and step == 4 and worker.rank == 1:
            break
        x = pyro.param("x", torch.zeros(2))
        (x - worker.rank).square().sum().backward()
        optimizer([x.unconstrained()])
        if step == 4 and worker.rank == 1:
            break
print(f"rank {worker.rank}: x {x.detach().mean():.4f}", file=open(f"rank-{worker.rank}.txt", "w"))
"""


def launch(folder: Path, *, leaves_before: bool) -> subprocess.CompletedProcess[str]:
    (folder / "fit.py").write_text(SCRIPT.replace("LEAVES_BEFORE", str(leaves_before)))
    keys = "{name: fit, script: fit.py, train: {num_steps: 50}, launch: {workers: 2, max_restarts: 0}}"
    (folder / "fit.yaml").write_text(keys)
    command = [str(BIN / "distopt"), "launch", "fit.yaml", "log.tensorboard=false"]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=170)


@pytest.mark.slow
def test_rank_that_leaves_its_loop_takes_the_others_with_it(tmp_path: Path) -> None:
    done = launch(tmp_path, leaves_before=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stopped early after step 5: the script left its loop" in done.stdout and kept(tmp_path / "runs/fit") == [
        "step-00000005"
    ]
    first, second = ((tmp_path / f"rank-{rank}.txt").read_text().partition(": ")[2] for rank in (0, 1))
    assert first == second
    assert read_facts(tmp_path / "runs/fit")["outcome"] == "done"


@pytest.mark.slow
def test_rank_that_leaves_before_a_step_that_another_takes_is_named_at_once(tmp_path: Path) -> None:
    done = launch(tmp_path, leaves_before=True)
    assert done.returncode == 1, done.stdout
    assert "rank 1 has left the loop before a step that another rank takes. Leave it by `break` after" in done.stderr


@pytest.mark.parametrize("others_left", [True, False])
def test_rank_that_leaves_before_its_step_asks_whether_the_others_take_it(monkeypatch, others_left):
    optimizer = DistributedOptimizer(Adam({"lr": 0.1}))

    def synchronize(*_: object) -> None:
        if not others_left:
            raise DisagreementError("different calls of the optimizer")

    monkeypatch.setattr(DistributedOptimizer, "synchronize", synchronize)
    backend = Single()
    backend.rank, backend.world_size = 1, 2  # the other one is what `synchronize` does
    end = LoopEnd(backend, [optimizer])
    end.step().__enter__()
    if others_left:
        assert not end.leave()
        return
    with pytest.raises(DisagreementError, match="rank 1 has left the loop before a step that another rank takes"):
        end.leave()
