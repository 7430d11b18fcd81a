"""Checkpoints from and to the files that `pyro.get_param_store().save`, `PyroOptim.save` and `torch.save` write.

Such files are pickles. They are read by torch's restricted unpickler, which builds tensors, plain values and Pyro's
constraints, and nothing else; what asks for more is refused, never read in another way.
"""

from __future__ import annotations

import pickle
import uuid
import warnings
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distopt.checkpoint.columns import columns_of, tabulate
from distopt.checkpoint.commit import Attempt, write_checkpoint
from distopt.checkpoint.errors import CheckpointError
from distopt.checkpoint.manifest import Manifest
from distopt.checkpoint.param_store import built, described
from distopt.checkpoint.reader import known_manifests, read_manifest
from distopt.checkpoint.restore import REPLICATED, buffers_name, choose, load_replicated, rank_name
from distopt.checkpoint.snapshot import HostMemory, take_snapshot
from distopt.checkpoint.statefile import StateReader
from distopt.checkpoint.storage.base import Storage, open_storage
from distopt.checkpoint.storage.names import step_number
from distopt.constraints import known_constraints
from distopt.optim import PackedState
from distopt.rng import capture_rng_state

OPTIMIZER = "optimizer"
"""The name under which an imported optimizer is saved; a run with one optimizer takes it up under any name."""
_PATIENCE = timedelta(minutes=5)


def read_torch_file(path: str | Path) -> Any:
    """Returns what a file written by `torch.save` holds, on the CPU.

    Raises:
        CheckpointError: It holds something else than tensors, plain values and constraints; nothing of it is executed.
    """
    try:
        with torch.serialization.safe_globals(list(known_constraints())), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on other pickle protocols: the file is read, or refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{path}: not a file of tensors, numbers and constraints ({reason}).") from error


def load_state_dict(module: nn.Module, path: str | Path) -> None:
    """Loads a module's or guide's `state_dict` from a file, by the restricted unpickler.

    A guide creates its parameters at its first call: call it once before.

    Raises:
        CheckpointError: The file is something else, or of another module.
    """
    try:
        module.load_state_dict(read_torch_file(path))
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


# From Pyro's files.


def import_pyro(
    directory: str | Path,
    params: str | Path | None = None,
    optimizer: str | Path | None = None,
    *,
    modules: Mapping[str, str | Path] | None = None,
    step: int = 0,
) -> str:
    """Makes a checkpoint of Pyro's files, from which a run in that directory then resumes.

    Args:
        directory: Of the run's checkpoints.
        params: Written by `pyro.get_param_store().save`.
        optimizer: Written by the `save` of a `pyro.optim` optimizer.
        modules: `torch.save`d `state_dict`s of guides and other modules, by the name under which the run's
            `Checkpointer` has them; a run of a YAML has "guide" and "model".
        step: From which the run continues to count.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: A file is not what it should be.
        DirectoryInUseError: A job is running there.
    """
    modules = modules or {}
    sources = [str(path) for path in (params, optimizer, *modules.values()) if path is not None]
    if not sources:
        raise CheckpointError("nothing to import: name a file of parameters, of an optimizer or of a module.")
    step = step_number(step)
    replicated = _read_state(params, optimizer, modules)

    storage = open_storage(directory)
    with storage.lock():
        generation = max((each.generation for each in known_manifests(storage)), default=-1) + 1
        # Written as a run of one rank would, so that everything that reads checkpoints reads this one. Its generators
        # are those of this process: the files hold none.
        attempt = Attempt(step, uuid.uuid4().hex[:12], 0, 1, _PATIENCE)
        rank = {"rng": capture_rng_state(torch.device("cpu")), "optimizers": {}, "objects": {}}
        metadata = {"step": str(step), "attempt": attempt.id}
        memory = HostMemory()
        files = take_snapshot(replicated, memory, REPLICATED).files(REPLICATED, metadata)
        files |= take_snapshot(rank, memory, "rank").files(rank_name(0), metadata)

        about = {"imported_from": sources}
        write_checkpoint(
            storage, attempt, files, lambda records: Manifest(step, attempt.id, generation, 1, records, about=about)
        )
        return f"{storage.root}/{attempt.final_folder(storage)}"


def _read_state(
    params: str | Path | None, optimizer: str | Path | None, modules: Mapping[str, str | Path]
) -> dict[str, Any]:
    """Returns what the files hold as the replicated state of a run, see `RunState.capture`."""
    tables: list[dict[str, Any]] = []
    return {
        "params": tabulate({} if params is None else _read_params(params), tables),
        "tables": tables,
        "optimizers": {} if optimizer is None else {OPTIMIZER: columns_of(_read_optimizer(optimizer))},
        "modules": {name: _read_by_name(path, "torch.save(module.state_dict())") for name, path in modules.items()},
        "module_params": {},
        "objects": {},
    }


def _read_params(path: str | Path) -> dict[str, Any]:
    stored = read_torch_file(path)
    params = stored.get("params") if isinstance(stored, dict) else None
    constraints = stored.get("constraints") if isinstance(stored, dict) else None
    if not isinstance(params, dict) or not isinstance(constraints, dict) or params.keys() != constraints.keys():
        raise CheckpointError(f"{path}: not written by `pyro.get_param_store().save`.")
    return {
        name: {"value": value.detach(), "constraint": described(constraints[name], f"params/{name}")}
        for name, value in params.items()
    }


def _read_optimizer(path: str | Path) -> PackedState:
    states = _read_by_name(path, "the save() of a pyro.optim optimizer")
    try:
        if all(isinstance(state, dict) for state in states.values()):
            return PackedState.from_states(states)
    except (AttributeError, IndexError, KeyError, TypeError):  # of what only looks like the state of an optimizer
        pass
    raise CheckpointError(f"{path}: not written by the save() of a pyro.optim optimizer.")


def _read_by_name(path: str | Path, writer: str) -> dict[str, Any]:
    state = read_torch_file(path)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path}: not written by {writer}.")
    return dict(state)


# To Pyro's files.


def export_params(checkpoint: str | Path, path: str | Path) -> int:
    """Writes a checkpoint's parameters as `pyro.get_param_store().load` reads them; returns how many.

    Args:
        checkpoint: A checkpoint, or a directory of them, of which the newest is taken.
        path: The file to write.
    """
    saved = read_replicated(checkpoint)["params"]
    state: dict[str, dict[str, Any]] = {"params": {}, "constraints": {}}
    for name, entry in saved.items():
        state["params"][name] = entry["value"].requires_grad_(not entry.get("frozen", False))
        state["constraints"][name] = (
            built(entry["constraint"], f"params/{name}")
            if "constraint" in entry
            else torch.distributions.constraints.real
        )
    torch.save(state, path)
    return len(saved)


def export_optimizer(checkpoint: str | Path, path: str | Path, name: str | None = None) -> int:
    """Writes a checkpoint's optimizer state as `PyroOptim.load` reads it; returns of how many parameters.

    Args:
        checkpoint: A checkpoint, or a directory of them, of which the newest is taken.
        path: The file to write.
        name: Of the optimizer in the checkpoint; None for its only one.

    Raises:
        CheckpointError: The checkpoint has none, or not one of that name.
    """
    optimizers = read_replicated(checkpoint)["optimizers"]
    if not optimizers:
        raise CheckpointError(f"{checkpoint}: it was saved without an optimizer.")
    if name is None and len(optimizers) == 1:
        (name,) = optimizers
    if name not in optimizers:
        asked = f"no optimizer {name!r}" if name else "several optimizers; name one"
        raise CheckpointError(f"{checkpoint}: it has {asked}: {', '.join(optimizers)}.")
    torch.save(optimizers[name], path)
    return len(optimizers[name])


def export_module(checkpoint: str | Path, path: str | Path, name: str) -> int:
    """Writes a module's or guide's `state_dict` for `torch.load`, with rank 0's buffers; returns how many tensors.

    Args:
        checkpoint: A checkpoint, or a directory of them, of which the newest is taken.
        path: The file to write.
        name: Of the module in the checkpoint.

    Raises:
        CheckpointError: The checkpoint has no module of that name.
    """
    storage, folder, manifest = _newest(checkpoint)
    saved = load_replicated(StateReader(storage, folder, manifest, REPLICATED))
    if name not in saved["modules"]:
        raise CheckpointError(f"{storage.root}/{folder} has no module {name!r}; it has {[*saved['modules']]}.")

    # A module's state is in three places: parameters that Pyro does not know, parameters in Pyro's store, and buffers.
    state = dict(saved["modules"][name])
    for key, stored in saved["module_params"].get(name, {}).items():
        if stored not in saved["params"]:
            raise CheckpointError(
                f"{storage.root}/{folder}: {stored!r} is spread over the ranks, so no state_dict can hold it."
            )
        state[key] = saved["params"][stored]["value"]
    if f"{buffers_name(0)}.json.gz" in manifest.files:
        state |= StateReader(storage, folder, manifest, buffers_name(0)).load().get(name, {})
    torch.save(state, path)
    return len(state)


def read_replicated(checkpoint: str | Path) -> dict[str, Any]:
    """Returns the state that is equal on all ranks, checked, see `load_replicated`.

    Args:
        checkpoint: A checkpoint, or a directory of them, of which the newest is taken.
    """
    return load_replicated(StateReader(*_newest(checkpoint), REPLICATED))


def _newest(checkpoint: str | Path) -> tuple[Storage, str, Manifest]:
    storage, newest_first = choose(open_storage("."), str(checkpoint))
    folder = newest_first[0].folder
    return storage, folder, read_manifest(storage, folder)
