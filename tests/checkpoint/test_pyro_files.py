"""Pyro's own files come in and go out; what is in a pickle beside them does not."""

from __future__ import annotations

import os
import pickle

import pyro
import pyro.distributions as dist
import pyro.distributions.constraints as constraints
import pyro.optim
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from distopt.backends.single import Single
from distopt.checkpoint import Checkpointer, CheckpointError
from distopt.checkpoint.pyro_files import import_pyro, load_state_dict, read_torch_file
from tests.checkpoint.runs import command
from tests.checkpoint.states import assert_equal


@pytest.fixture
def files(tmp_path):
    """Pyro's two files, and the state that they hold."""
    optimizer = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9})
    pyro.param("scale", torch.ones(3), constraint=constraints.independent(constraints.interval(0.0, 5.0), 1))
    pyro.param("loc", torch.zeros(2))
    params = [value for _, value in pyro.get_param_store().named_parameters()]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer(params)
    optimizer.step()
    pyro.get_param_store().save(tmp_path / "params.pt")
    optimizer.save(tmp_path / "optim.pt")
    state = {name: value.detach().clone() for name, value in pyro.get_param_store().named_parameters()}
    return tmp_path, state, optimizer.get_state()


def test_files_of_pyro_when_imported_are_what_a_run_goes_on_from_and_come_out_again(files):
    root, params, state = files
    imported = command(
        "import", root / "params.pt", "--optimizer", root / "optim.pt", "--to", root / "run", "--step", "70"
    )
    assert imported.exit_code == 0, imported.output
    pyro.clear_param_store()
    optimizer = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9})
    with Checkpointer(root / "run", {"optimizer": optimizer}, backend=Single()) as checkpointer:
        assert checkpointer.restore().step == 70
        assert_equal({name: value.detach() for name, value in pyro.get_param_store().named_parameters()}, params)
        assert isinstance(
            pyro.get_param_store()._constraints["scale"].base_constraint, type(constraints.interval(0, 1))
        )
        checkpointer.save(71)
    assert command("export", root / "run", root / "again.pt").exit_code == 0
    assert command("export", root / "run", root / "optim-again.pt", "--what", "optimizer").exit_code == 0
    pyro.clear_param_store()
    pyro.get_param_store().load(root / "again.pt")  # Pyro's own reader
    assert_equal({name: value.detach() for name, value in pyro.get_param_store().named_parameters()}, params)
    assert_equal(torch.load(root / "optim-again.pt", weights_only=False), state)
    assert command("export", root / "run", root / "again.pt").exit_code == 1  # never over a file


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickle_that_runs_code_when_imported_is_refused_and_runs_nothing(tmp_path):
    canary = str(tmp_path / "canary")
    torch.save({"params": {"x": Canary(canary)}, "constraints": {}}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Canary(canary)))
    (tmp_path / "text.pt").write_text("hello")
    for name in ("evil.pt", "plain.pt", "text.pt"):
        result = command("import", tmp_path / name, "--to", tmp_path / "run")
        assert result.exit_code == 1 and name in result.output
    assert not os.path.exists(canary)
    torch.save({"a": 1}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not written by `pyro.get_param_store"):
        import_pyro(tmp_path / "run", tmp_path / "other.pt")
    assert read_torch_file(tmp_path / "other.pt") == {"a": 1}


def model():
    pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("s", dist.LogNormal(0.0, 1.0))


def guide_of(value):
    """A guide that has been called, all its parameters alike, with a buffer."""
    pyro.clear_param_store()
    guide = AutoNormal(model)
    guide()
    guide.register_buffer("seen", torch.tensor(int(value)))
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.fill_(value)
    return guide


def test_state_dict_of_a_guide_when_loaded_gives_the_same_guide(tmp_path):
    guide = guide_of(2)
    torch.save(guide.state_dict(), tmp_path / "guide.pt")
    other = guide_of(3)
    load_state_dict(other, tmp_path / "guide.pt")
    assert_equal(dict(other.state_dict()), dict(guide.state_dict()))
    with pytest.raises(CheckpointError, match="guide.pt"):
        load_state_dict(torch.nn.Linear(1, 1), tmp_path / "guide.pt")


def test_state_dict_of_a_guide_when_imported_is_what_a_run_goes_on_from_and_comes_out_again(tmp_path):
    guide = guide_of(2)
    expected = {key: value.clone() for key, value in guide.state_dict().items()}
    torch.save(guide.state_dict(), tmp_path / "guide.pt")
    imported = command("import", "--module", f"guide={tmp_path / 'guide.pt'}", "--to", tmp_path / "run", "--step", 9)
    assert imported.exit_code == 0, imported.output
    other = guide_of(3)
    with Checkpointer(tmp_path / "run", {"guide": other}, backend=Single()) as checkpointer:
        assert checkpointer.restore().step == 9
        assert_equal(dict(other.state_dict()), expected)
        other()
        assert torch.equal(pyro.param("AutoNormal.locs.z").detach(), torch.full((3,), 2.0))
        with torch.no_grad():
            other.locs.z_unconstrained.fill_(5.0)
        checkpointer.save(10)
    exported = command("export", tmp_path / "run", tmp_path / "again.pt", "--what", "module", "--name", "guide")
    assert exported.exit_code == 0, exported.output
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    expected["locs.z_unconstrained"].fill_(5.0)
    assert_equal({key: again[key] for key in expected}, expected)
    third = guide_of(4)
    assert third.load_state_dict(again).missing_keys == []
    unknown = command("export", tmp_path / "run", tmp_path / "more.pt", "--what", "module", "--name", "other")
    assert unknown.exit_code == 1 and "no module 'other'; it has ['guide']" in unknown.output
    assert command("import", "--module", "guide", "--to", tmp_path / "run").exit_code == 1
    assert command("import", "--to", tmp_path / "run").exit_code == 1
