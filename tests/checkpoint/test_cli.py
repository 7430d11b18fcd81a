"""The commands say what is in a checkpoint, whether it is whole, and in one line what is wrong with an argument."""

from __future__ import annotations

import os

import pyro
import pyro.optim
import torch

from distopt.backends.single import Single
from distopt.checkpoint import Checkpointer
from distopt.checkpoint.cli import check
from distopt.checkpoint.storage.base import open_storage
from tests.checkpoint.runs import checkpointer, command


def test_inspect_and_verify_tell_what_is_there_and_what_is_broken(tmp_path):
    pyro.param("weights", torch.zeros(200, 200))
    config = {"seed": 7}
    with Checkpointer(tmp_path, backend=Single(), config=config) as checkpointer:
        checkpointer.save(3, progress={"epoch": 1})
        checkpointer.save(4)
    seen = command("inspect", tmp_path, "--tensors").output
    for text in ("step 4, 1 rank(s)", "step 3", '{"epoch": 1}', "seed: 7", "replicated/params/weights/value: F32"):
        assert text in seen
    whole = command("verify", tmp_path)
    assert whole.exit_code == 0 and whole.output.count("whole") == 2
    path = tmp_path / "step-00000004" / "replicated.safetensors"
    os.truncate(path, 100)
    broken = command("verify", tmp_path)
    assert broken.exit_code == 1
    assert "BAD" in broken.output and "replicated.safetensors has 100 bytes, its manifest says" in broken.output
    missing = command("verify", tmp_path / "nowhere")
    assert missing.exit_code == 1 and "no checkpoint there" in missing.output


def test_inspect_lists_parameters_and_what_changed_in_the_config(tmp_path):
    pyro.clear_param_store()
    scale = pyro.param("scale", torch.ones(3), constraint=torch.distributions.constraints.positive).unconstrained()
    optimizer = pyro.optim.Adam({"lr": 0.1})
    scale.grad = torch.ones(3)
    optimizer([scale])
    for step, lr in ((1, 0.1), (2, 0.05)):
        config = {"seed": 7, "optim": {"lr": lr}}
        state = {"optimizer": optimizer}
        with Checkpointer(tmp_path, state, backend=Single(), config=config) as checkpointer:
            checkpointer.save(step)
            checkpointer.save(step + 10)
    seen = command("inspect", tmp_path, "--tensors").output
    assert "config: that of step 2" in seen and "seed: 7" in seen
    assert "config, changed since step 1:\n    optim.lr: 0.1 -> 0.05" in seen
    line = next(line for line in seen.splitlines() if line.startswith("    scale:"))
    assert "float32 [3]" in line and "step 1, lr 0.1, exp_avg, exp_avg_sq" in line and "real" not in line, line


def test_run_is_found_by_its_name_as_the_other_commands_find_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with checkpointer(tmp_path / "runs/mine/checkpoints") as keeper:
        keeper.save(1)
    for arguments in (
        ("inspect", "mine"),
        ("verify", "mine"),
        ("inspect", "runs/mine"),
        ("verify", tmp_path / "runs/mine"),
    ):
        seen = command(*arguments)
        assert (seen.exit_code, "mine/checkpoints/step-00000001" in seen.output) == (0, True), seen.output
    assert command("export", "mine", "params.pt").exit_code == 0
    (tmp_path / "mine").mkdir()  # a folder of that name comes first
    assert "no checkpoint there" in command("inspect", "mine").output


def test_checkpoint_that_its_run_deletes_while_it_is_verified_is_not_called_bad(tmp_path):
    with checkpointer(tmp_path) as keeper:
        keeper.save(1)
        keeper.save(2)
    lines = check(str(tmp_path))
    assert next(lines)[0].startswith("whole")
    storage = open_storage(tmp_path)
    storage.remove(storage.set_aside("step-00000001"))
    assert list(lines) == []


def test_commands_say_in_one_line_what_is_wrong_with_what_they_are_given(tmp_path):
    good = tmp_path / "good"
    with checkpointer(good) as keeper:
        keeper.save(1)
    (tmp_path / "text.txt").write_text("hello")
    files = {
        "lacks.pt": {"params": {"x": torch.zeros(2)}, "constraints": {}},
        "list.pt": {"params": [1], "constraints": {}},
        "number.pt": 3,
        "tensor.pt": {"x": torch.zeros(1)},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    to = ("--to", tmp_path / "run")
    for arguments, text in [
        (("inspect", tmp_path / "text.txt"), "text.txt: a file; a checkpoint is a folder"),
        (("verify", good / "step-00000001" / "manifest.json"), "manifest.json: a file; a checkpoint is a folder"),
        (("verify", good / "step-00000002"), "no checkpoint there"),
        (("inspect", "foo://bar"), "foo://bar: Protocol not known: foo"),
        (("export", good, tmp_path / "no" / "x.pt"), f"there is no folder {tmp_path / 'no'}"),
        (("import", tmp_path / "lacks.pt", *to), "lacks.pt: not written by `pyro.get_param_store().save`"),
        (("import", tmp_path / "list.pt", *to), "list.pt: not written by `pyro.get_param_store().save`"),
        (("import", tmp_path / "number.pt", *to), "number.pt: not written by `pyro.get_param_store().save`"),
        (
            ("import", "--optimizer", tmp_path / "tensor.pt", *to),
            "tensor.pt: not written by the save() of a pyro.optim",
        ),
        (("import", tmp_path / "text.txt", *to), "text.txt: not a file of tensors, numbers and constraints"),
        (("import", tmp_path / "lacks.pt", "--step", "-3", *to), "step -3: steps are whole numbers"),
    ]:
        result = command(*arguments)
        assert result.exit_code == 1, arguments
        assert text in result.output and result.output.count("\n") == 1, result.output
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("step-*"))
