"""Modules in checkpoints: their parameters outside Pyro's store, their buffers, and modules that nobody has named."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from distopt.backends.base import Backend
from distopt.checkpoint.chunks import chunk_digest
from distopt.checkpoint.errors import CheckpointError
from distopt.checkpoint.param_store import canonical
from distopt.checkpoint.statefile import bytes_of
from distopt.reduce.agreement import share_values_


class RegisteredModules:
    """The modules that own parameters of Pyro's store, with buffers, and were not given to the checkpointer.

    A model that calls `pyro.module("net", net)` is computed with the buffers of `net`, too, which Pyro's store does not
    hold. A checkpoint without them would restart batch statistics from their first values.

    Args:
        given: The run's modules by name.
    """

    def __init__(self, given: Mapping[str, nn.Module]) -> None:
        self._given = given
        self._params: frozenset[int] = frozenset()
        self._modules: dict[str, nn.Module] = {}

    def find(self) -> dict[str, nn.Module]:
        """Returns them by the name under which Pyro knows them; looks again only if the store has other tensors.

        Cost:
            Some tens of milliseconds whenever parameters were added: all objects of the process are looked at.
        """
        stored = {id(value): name for name, value in pyro.get_param_store().named_parameters()}
        if self._params != stored.keys():
            self._params = frozenset(stored)
            self._modules = _owners(stored, self._given)
        return self._modules


def _owners(stored: Mapping[int, str], given: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Returns the outermost modules that own stored parameters and have buffers, by name."""
    known = {id(inner) for module in given.values() for inner in module.modules()}
    covered = {id(each) for module in given.values() for each in module.parameters()}
    # By type, since isinstance() would wake objects that pretend to be of another class until they are needed.
    modules = [each for each in gc.get_objects() if issubclass(type(each), nn.Module) and id(each) not in known]
    owned: dict[int, tuple[nn.Module, list[str]]] = {}
    for module in modules:
        names = [stored[id(each)] for each in module.parameters() if id(each) in stored and id(each) not in covered]
        if names:
            owned[id(module)] = (module, sorted(names))
    inner = {id(each) for module, _ in owned.values() for each in module.modules() if each is not module}
    roots = [(names, module) for key, (module, names) in owned.items() if key not in inner and _buffers(module)]

    by_name: dict[str, nn.Module] = {}
    for names, module in sorted(roots, key=lambda root: root[0]):
        name = names[0].partition("$$$")[0]
        while name in by_name or name in given:
            name += "'"
        by_name[name] = module
    return by_name


def _buffers(module: nn.Module) -> list[str]:
    """Returns the keys of a module's state that are no parameters: buffers and extra state."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return [name for name in module.state_dict(keep_vars=True) if name not in parameters]


def align_buffers_(modules: Mapping[str, nn.Module], backend: Backend) -> None:
    """Makes the buffers of all ranks equal: floating ones by their mean, all others by rank 0's; collective.

    Batch statistics are moving averages of what each rank has read. The mean of the ranks' averages is the moving
    average over all of it, whenever it is taken, so that it does not matter at which steps a run saves.

    Args:
        modules: By name; buffers that a rank lacks, or has in another shape, stay as they are.
        backend: Link to the other ranks.

    Cost:
        One `all_gather_json`, and one all-reduce or broadcast for each buffer that differs.
    """
    if backend.world_size == 1:
        return
    buffers = {f"{key}.{name}": each for key, module in modules.items() for name, each in module.named_buffers()}
    described = {name: [str(each.dtype), [*each.shape], _digest(each)] for name, each in buffers.items()}
    by_rank = backend.all_gather_json(described)
    for name in sorted(set.intersection(*(set(each) for each in by_rank))):
        alike = all(each[name][:2] == by_rank[0][name][:2] for each in by_rank)
        if not alike or all(each[name] == by_rank[0][name] for each in by_rank):
            continue

        buffer = buffers[name].detach()
        if not buffer.is_floating_point():
            share_values_(backend, [buffer], owner=0)
            continue
        total = buffer.to(torch.float64 if buffer.dtype == torch.float64 else torch.float32, copy=True).contiguous()
        backend.all_reduce(total).wait()
        buffer.copy_(total / backend.world_size)


def _digest(tensor: Tensor) -> str:
    return chunk_digest([bytes_of(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8))])


def capture_modules(modules: Mapping[str, nn.Module]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Splits the modules' `state_dict`s in three, each by module and key.

    Returns:
        The parameters that are not in Pyro's store; buffers and extra state, apart since batch statistics differ
        between ranks; and of each parameter in the store its name there.
    """
    # A parameter that is in Pyro's store is saved there. Its name in the store cannot be told from its name in the
    # module (`pyro.module("line", net)`, `PyroModule`, autoguides each make another), so it is found by identity.
    stored = {id(value): name for name, value in pyro.get_param_store().named_parameters()}
    outside: dict[str, Any] = {}
    buffers: dict[str, Any] = {}
    names: dict[str, Any] = {}
    for prefix, module in modules.items():
        parameters = dict(module.named_parameters(remove_duplicate=False))
        state = module.state_dict(keep_vars=True)
        outside[prefix] = {
            name: value for name, value in state.items() if name in parameters and id(parameters[name]) not in stored
        }
        buffers[prefix] = {name: value for name, value in state.items() if name not in parameters}
        names[prefix] = {
            name: stored[id(value)] for name, value in parameters.items() if name in state and id(value) in stored
        }
    return outside, buffers, names


def check_modules(saved: Mapping[str, Any], buffers: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> None:
    """Refuses a checkpoint that lacks buffers of this run's modules, which would start from their first values.

    Args:
        saved: The replicated state: `modules` and `module_params`.
        buffers: The saved buffers.
        modules: The run's modules by name.

    Raises:
        CheckpointError: Naming them.
    """
    for prefix, module in modules.items():
        known = {**saved["modules"].get(prefix, {}), **buffers.get(prefix, {})}
        names = {canonical(name) for name in known}
        missing = [name for name in _buffers(module) if canonical(name) not in names]
        if missing:
            raise CheckpointError(
                f"module {prefix!r} has {', '.join(missing[:5])}, which the checkpoint lacks: was it saved without the "
                "module, or by another model? Buffers would start from their first values. Give the module the name "
                f"that it had ({', '.join(map(repr, saved['modules'])) or 'no module was saved'}); or restore(only="
                "['params']) (checkpoint.resume_only=[params]) takes the parameters alone."
            )


def apply_modules(saved: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> None:
    """Loads what `capture_modules` returned (one of its first two results) into the modules.

    Raises:
        CheckpointError: A module is not given, or has not the tensors that were saved.
    """
    for prefix, state in saved.items():
        if prefix not in modules:
            raise CheckpointError(
                f"the checkpoint has a module {prefix!r}; pass it to Checkpointer in state, which has {[*modules]}. "
                "One that the model registers with pyro.module is known once the model has run: svi.init(...)."
            )
        names = {canonical(name): name for name in modules[prefix].state_dict(keep_vars=True)}
        renamed = {names.get(canonical(name), name): value for name, value in state.items()}
        try:
            unexpected = modules[prefix].load_state_dict(renamed, strict=False).unexpected_keys
        except RuntimeError as error:
            raise CheckpointError(f"module {prefix!r}: {error}") from error
        if unexpected:
            raise CheckpointError(
                f"module {prefix!r} has no {', '.join(unexpected)}, which the checkpoint has. Is it another model, or "
                "does it create them on first use? Then call it once before restoring."
            )
