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

from distopt.checkpoint.columns import share_groups, tabulate
from distopt.checkpoint.commit import Attempt, write_checkpoint
from distopt.checkpoint.errors import CheckpointError
from distopt.checkpoint.manifest import Manifest
from distopt.checkpoint.reader import candidates, read_manifest
from distopt.checkpoint.restore import REPLICATED, buffers_name, choose, load_replicated, rank_name
from distopt.checkpoint.run_state import built, described
from distopt.checkpoint.snapshot import HostMemory, take_snapshot
from distopt.checkpoint.statefile import StateReader
from distopt.checkpoint.storage.base import Storage, open_storage
from distopt.checkpoint.storage.names import step_number
from distopt.constraints import known_constraints
from distopt.rng import capture_rng_state


def read_torch_file(path: str | Path) -> Any:
    """Returns what a file written by `torch.save` holds, on the CPU.

    Raises:
        CheckpointError: when it holds anything beside tensors, plain values and constraints; nothing of it is executed.
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

    A guide makes its parameters at its first call: call it once before.

    Raises:
        CheckpointError: when the file is something else, or of another module.
    """
    try:
        module.load_state_dict(read_torch_file(path))
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def import_pyro(
    directory: str | Path,
    params: str | Path | None = None,
    optimizer: str | Path | None = None,
    *,
    modules: Mapping[str, str | Path] | None = None,
    step: int = 0,
) -> str:
    """Makes a checkpoint of Pyro's files, which a run in that directory then goes on from; returns its folder.

    Args:
        directory: of the run's checkpoints.
        params: written by `pyro.get_param_store().save`.
        optimizer: written by the `save` of a `pyro.optim` optimizer.
        modules: `torch.save`d `state_dict`s of guides and other modules, by the name under which the run's
            `Checkpointer` has them; a run of a YAML has "guide" and "model".
        step: that the run counts on from.

    Raises:
        CheckpointError: when a file is not what it should be.
        DirectoryInUseError: while a job runs there.
    """
    modules = modules or {}
    sources = [str(path) for path in (params, optimizer, *modules.values()) if path is not None]
    if not sources:
        raise CheckpointError("nothing to import: name a file of parameters, of an optimizer or of a module.")
    step = step_number(step)
    state = _imported(params, optimizer, modules)
    storage = open_storage(directory)
    with storage.lock():
        generation = max((one.manifest.generation for one in candidates(storage) if one.manifest), default=-1) + 1
        attempt = Attempt(step, uuid.uuid4().hex[:12], 0, 1, timedelta(minutes=5))
        memory, noise = HostMemory(), {"noise": capture_rng_state(torch.device("cpu")), "extras": {}}
        metadata = {"step": str(step), "attempt": attempt.id}
        files = take_snapshot(state, memory, REPLICATED).files(REPLICATED, metadata)
        files |= take_snapshot(noise, memory, "own").files(rank_name(0), metadata)
        about = {"imported_from": sources}
        write_checkpoint(
            storage, attempt, files, lambda records: Manifest(step, attempt.id, generation, 1, records, about=about)
        )
        return f"{storage.root}/{attempt.final_folder(storage)}"


def _imported(
    params: str | Path | None, optimizer: str | Path | None, modules: Mapping[str, str | Path]
) -> dict[str, Any]:
    """Returns the replicated state of a run, as `load_replicated` reads it, with what the files hold."""
    tables: list[dict[str, Any]] = []
    return {
        "params": tabulate({} if params is None else _params(params), tables),
        "optimizer": None if optimizer is None else share_groups(_of_optimizer(optimizer), tables),
        "tables": tables,
        "modules": {name: _by_name(path, "torch.save(module.state_dict())") for name, path in modules.items()},
        "module_params": {},
        "extras": {},
    }


def _params(path: str | Path) -> dict[str, Any]:
    stored = read_torch_file(path)
    parts: list[Any] = [stored.get("params"), stored.get("constraints")] if isinstance(stored, dict) else []
    if len(parts) != 2 or not all(isinstance(part, dict) for part in parts) or parts[0].keys() != parts[1].keys():
        raise CheckpointError(f"{path}: not written by `pyro.get_param_store().save`.")
    return {
        name: {
            "value": value.detach(),
            "constraint": described(stored["constraints"][name], f"params/{name}"),
        }
        for name, value in stored["params"].items()
    }


def _of_optimizer(path: str | Path) -> dict[str, Any]:
    states = _by_name(path, "the save() of a pyro.optim optimizer")
    if not all(isinstance(state, dict) for state in states.values()):
        raise CheckpointError(f"{path}: not written by the save() of a pyro.optim optimizer.")
    return states


def _by_name(path: str | Path, writer: str) -> dict[str, Any]:
    state = read_torch_file(path)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path}: not written by {writer}.")
    return dict(state)


def export_params(checkpoint: str | Path, path: str | Path) -> int:
    """Writes a checkpoint's parameters as `pyro.get_param_store().load` reads them; returns how many."""
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


def export_optimizer(checkpoint: str | Path, path: str | Path) -> int:
    """Writes a checkpoint's optimizer state as `PyroOptim.load` reads it; returns of how many parameters.

    Raises:
        CheckpointError: when the checkpoint has none.
    """
    state = read_replicated(checkpoint)["optimizer"]
    if state is None:
        raise CheckpointError(f"{checkpoint}: it was saved without an optimizer.")
    torch.save(state, path)
    return len(state)


def export_module(checkpoint: str | Path, path: str | Path, name: str) -> int:
    """Writes a module's or guide's `state_dict`, rank 0's buffers with it, for `torch.load`; returns how many tensors.

    Raises:
        CheckpointError: when the checkpoint has no module of that name.
    """
    storage, folder, manifest = _newest(checkpoint)
    saved = load_replicated(StateReader(storage, folder, manifest, REPLICATED))
    if name not in saved["modules"]:
        raise CheckpointError(f"{storage.root}/{folder} has no module {name!r}; it has {[*saved['modules']]}.")
    state = dict(saved["modules"][name])
    for key, stored in saved["module_params"].get(name, {}).items():
        if stored not in saved["params"]:
            raise CheckpointError(f"{storage.root}/{folder}: {stored!r} lies on its ranks, no state_dict holds it.")
        state[key] = saved["params"][stored]["value"]
    if f"{buffers_name(0)}.json.gz" in manifest.files:
        state |= StateReader(storage, folder, manifest, buffers_name(0)).load().get(name, {})
    torch.save(state, path)
    return len(state)


def read_replicated(checkpoint: str | Path) -> Mapping[str, Any]:
    """Returns the state that is alike on all ranks, of a checkpoint or of the newest one of a directory; checked."""
    return load_replicated(StateReader(*_newest(checkpoint), REPLICATED))


def _newest(checkpoint: str | Path) -> tuple[Storage, str, Manifest]:
    storage, found = choose(open_storage("."), str(checkpoint))
    return storage, found[0].folder, read_manifest(storage, found[0].folder)
