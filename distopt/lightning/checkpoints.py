"""A trainer's checkpoint as one of distopt: a folder at the path that Lightning gives, in which nothing is pickled.

Lightning's own file of a Pyro model lacks the parameter store, the optimizer of an SVI, and the parameters that a guide
makes at its first call; and its weights cannot be loaded before that call. So a resume has two moments. When training
starts: flags, counters and the seed. When an SVI is adopted, just before its first step, and all its parameters exist:
the store, optimizers, modules, and the rows of this rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from distopt.backends import Backend
from distopt.checkpoint import Checkpointer, CheckpointError, Retention
from distopt.checkpoint.codec import NoTensors, encode
from distopt.checkpoint.reader import check_files, read_manifest
from distopt.checkpoint.restore import REPLICATED, choose_on_all_ranks, load_replicated
from distopt.checkpoint.statefile import StateReader
from distopt.checkpoint.storage.base import open_storage
from distopt.optim.distributed import DistributedOptimizer
from distopt.optim.distributed.svi_step import preserving_buffers
from distopt.rng import generators_state, set_generators_state

_TRAINER = "trainer"
_MODULE = "module"
_OURS = "distopt"
_HYPERPARAMETERS = "hyper_parameters"  # as Lightning calls them
_PLAIN = (bool, int, float, str)
_KEEP = Retention(2)
_REPLACED = (
    "{path}: {count} optimizer(s) of SVIs had stopped stepping when this was saved, and others step the same "
    "parameters, as in a plan that makes a new optimizer in each epoch. Training cannot resume from it: the checkpoint "
    "does not tell which of them comes next. Make the optimizer once, in __init__, and change its learning rate by a "
    "scheduler. trainer.validate(plan, loader, ckpt_path=PATH) loads the parameters alone; a fit without ckpt_path "
    "then starts from them."
)


class Tree:
    """Nested plain values and tensors that a checkpoint holds beside optimizers and modules.

    Args:
        values: What is saved, or what was read.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)

    def state_dict(self) -> dict[str, Any]:
        """Returns the values."""
        return self.values

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes values."""
        self.values = dict(state)


def save_checkpoint(
    path: str | Path,
    step: int,
    tree: Mapping[str, Any],
    module: nn.Module,
    optimizers: Sequence[DistributedOptimizer],
    backend: Backend,
) -> None:
    """Writes a checkpoint into the folder `path`; a collective call, after which it is on the disk.

    Args:
        path: The folder, made if it is missing; what it holds is replaced.
        step: Batches done.
        tree: What Lightning wants to have kept, as plain values and tensors.
        module: The LightningModule.
        optimizers: Of the SVIs, in the order in which they first stepped.
        backend: Link to the other ranks.

    Raises:
        CheckpointError: A value of the tree is neither plain nor a tensor (names it), or nothing could be written.
    """
    state = {_TRAINER: Tree(tree), _MODULE: module} | _named(optimizers)
    with Checkpointer(path, state, keep=_KEEP, backend=backend, background=False) as checkpointer:
        checkpointer.save(step)
        checkpointer.wait()


def read_tree(path: str | Path, backend: Backend) -> tuple[dict[str, Any], str]:
    """Returns the tree of a checkpoint and its folder, and changes nothing; a collective call.

    Raises:
        CheckpointError: There is no such checkpoint that is whole, or it is of something else.
    """
    storage, tries = choose_on_all_ranks(backend, open_storage(path), str(path))
    problems = []
    for folder, _, problem in tries:
        tree: dict[str, Any] = {}
        try:
            manifest = read_manifest(storage, folder)
            check_files(storage, folder, manifest)
            tree = load_replicated(StateReader(storage, folder, manifest, REPLICATED))["objects"].get(_TRAINER, {})
            problem = problem or (
                "" if tree else f"{storage.root}/{folder}: this checkpoint is of no Lightning trainer."
            )
        except CheckpointError as error:
            problem = str(error)
        by_rank = backend.all_gather_json(problem)
        if not any(by_rank):
            return tree, f"{storage.root}/{folder}"
        problems += [each for each in by_rank if each][:1]
    raise CheckpointError("\n".join(problems))


def restore(
    path: str | Path,
    module: nn.Module,
    optimizers: Mapping[str, DistributedOptimizer],
    backend: Backend,
    *,
    only: Any = None,
) -> None:
    """Restores parameters, modules and optimizers of a checkpoint; a collective call.

    Args:
        path: The folder that `read_tree` returned.
        module: The LightningModule, whose parameters exist.
        optimizers: By the names under which they were saved; all others are left as they are.
        backend: Link to the other ranks.
        only: As for `Checkpointer.restore`.

    Raises:
        CheckpointError: As from `Checkpointer.restore`.
    """
    state = {_TRAINER: Tree({}), _MODULE: module, **optimizers}
    with Checkpointer(Path(path).parent, state, keep=_KEEP, backend=backend, background=False) as checkpointer:
        checkpointer.restore(str(path), only=only)


def _named(optimizers: Sequence[DistributedOptimizer]) -> dict[str, DistributedOptimizer]:
    return {f"svi-{number}": each for number, each in enumerate(optimizers)}


# What modules keep outside their state dicts.


def plain_attributes(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Returns public attributes of each module that are numbers or strings, such as counters of a training plan."""
    return {
        name: {key: value for key, value in vars(each).items() if key[:1] != "_" and isinstance(value, _PLAIN)}
        for name, each in module.named_modules()
    }


def changed_attributes(module: nn.Module, before: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns those plain attributes that are not as before: an argument that nothing changes stays that of the run."""
    changed = {
        name: {
            key: value for key, value in values.items() if key != "training" and before.get(name, {}).get(key) != value
        }
        for name, values in plain_attributes(module).items()
    }
    return {name: values for name, values in changed.items() if values}


def set_attributes(module: nn.Module, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Sets attributes of modules by name."""
    modules = dict(module.named_modules())
    for name, values in saved.items():
        for key, value in values.items() if name in modules else ():
            setattr(modules[name], key, value)


def training_flags(module: nn.Module) -> dict[str, bool]:
    """Returns of each module whether it is in training mode."""
    return {name: each.training for name, each in module.named_modules()}


def set_training_flags(module: nn.Module, flags: Mapping[str, bool]) -> None:
    """Sets the mode of each module that was there when the flags were taken."""
    for name, each in module.named_modules():
        each.training = flags.get(name, each.training)


def without_weights(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns Lightning's checkpoint without weights, with plain values in place of a configuration of OmegaConf."""
    tree = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "hparams_type")}
    for name, value in checkpoint.get(_HYPERPARAMETERS, {}).items():
        try:
            encode(value, NoTensors(), (None, f"{_HYPERPARAMETERS}/{name}"))
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} Leave it out: self.save_hyperparameters(ignore=[{name!r}]) in the LightningModule."
            ) from None
    if "hparams_type" in checkpoint:
        from omegaconf import OmegaConf

        tree = {key: OmegaConf.to_container(each) if OmegaConf.is_config(each) else each for key, each in tree.items()}
    return tree


# What a trainer asks for.


class TrainerCheckpoints:
    """Saves and resumes for one strategy.

    Attributes:
        optimizers: Of the SVIs that have stepped, in that order.
        seed: Of the checkpoint that was loaded, None without one.
    """

    def __init__(self) -> None:
        self.optimizers: list[DistributedOptimizer] = []
        self._epoch = 0  # counted from the start of this process
        self._last_steps: dict[int, tuple[int, int]] = {}  # of each optimizer, by id: its steps, the epoch of the last
        self._has_warned = False
        self._flags: dict[str, bool] = {}
        self._attributes: dict[str, dict[str, Any]] = {}
        self._folder = ""  # of the checkpoint that training resumes from, until it has
        self._ours: dict[str, Any] = {}  # of that checkpoint
        self.seed: int | None = None

    def save(self, path: str | Path, checkpoint: Mapping[str, Any], seed: int, trainer: Any, backend: Backend) -> None:
        """Writes what Lightning and distopt know of a run; a collective call.

        Flags are those of the last epoch's first batch: validation, and callbacks that save a model, change them.
        """
        module = trainer.lightning_module
        flags = self._flags or training_flags(module)
        ours = {
            "seed": seed,
            "flags": flags,
            "attributes": changed_attributes(module, self._attributes),
            "steps": [each.reducer.step for each in self.optimizers],
            "replaced": self._replaced(),
        }
        if ours["replaced"] and not self._has_warned and backend.rank == 0:
            warnings.warn(_REPLACED.format(path=path, count=ours["replaced"]), stacklevel=2)
            self._has_warned = True
        step = int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)
        save_checkpoint(path, step, without_weights(checkpoint) | {_OURS: ours}, module, self.optimizers, backend)
        if trainer.training:
            set_training_flags(module, flags)

    def load(self, path: str | Path, backend: Backend) -> dict[str, Any]:
        """Returns what Lightning restores, and keeps the rest for when training starts; a collective call."""
        tree, self._folder = read_tree(path, backend)
        self._ours = tree.pop(_OURS)
        self.seed = int(self._ours["seed"])
        return tree | {"state_dict": {}}

    def load_weights(self, module: nn.Module, backend: Backend) -> None:
        """Restores parameters and modules, for validation, test or prediction; a collective call."""
        restore(self._folder, module, {}, backend, only=["params"])
        self._folder = ""

    def start(self, module: nn.Module, backend: Backend) -> None:
        """Restores flags and attributes as training starts, and all else if no SVI will step."""
        self._attributes = plain_attributes(module)
        self.start_epoch(module)
        if not self._folder:
            return
        if self._ours.get("replaced"):
            raise CheckpointError(_REPLACED.format(path=self._folder, count=self._ours["replaced"]))
        self._flags = self._ours["flags"]
        set_training_flags(module, self._flags)
        set_attributes(module, self._ours["attributes"])
        if not self._ours["steps"]:
            restore(self._folder, module, {}, backend)
            self._folder = ""

    def start_epoch(self, module: nn.Module) -> None:
        """Notes which modules are in training mode, before the first batch of an epoch."""
        self._flags = training_flags(module)
        self._note_steps()
        self._epoch += 1

    def _note_steps(self) -> None:
        """Notes in which epoch each optimizer stepped last."""
        for each in self.optimizers:
            num_steps = each.reducer.step
            if self._last_steps.get(id(each), (-1, 0))[0] != num_steps:
                self._last_steps[id(each)] = (num_steps, self._epoch)

    # The uninterrupted run would go on with one of them, or with a new one: nothing in a checkpoint tells which. That
    # an optimizer rests is no sign of it if no other one has its parameters, as in plans that train two networks.
    def _replaced(self) -> int:
        """Returns how many optimizers have stopped stepping while others step the same parameters."""
        self._note_steps()
        epochs = [self._last_steps[id(each)][1] for each in self.optimizers]
        names = [set(each.get_state()) for each in self.optimizers]
        newest = [each for each, epoch in zip(names, epochs, strict=True) if epoch == max(epochs)]
        return sum(
            epoch < max(epochs) and any(each & other for other in newest)
            for each, epoch in zip(names, epochs, strict=True)
        )

    def adopt(self, optimizer: DistributedOptimizer, run_model: Callable[[], None], module: nn.Module) -> None:
        """Notes an optimizer that is about to step for the first time, and restores it; a collective call.

        Args:
            optimizer: The optimizer.
            run_model: Runs model and guide once, so that their parameters exist.
            module: The LightningModule.
        """
        if any(each is optimizer for each in self.optimizers):
            return
        self.optimizers.append(optimizer)
        number = len(self.optimizers) - 1
        if not self._folder or number >= len(self._ours["steps"]):
            return

        backend = optimizer.backend
        state = generators_state(backend.device)
        with preserving_buffers():
            run_model()
        # The first one brings all but the other optimizers. It has stepped when they come, and must not go back.
        mine = {f"svi-{number}": optimizer}
        restore(self._folder, module, mine, backend, only=None if number == 0 else ["optimizer"])
        set_generators_state(state, backend.device)
        optimizer.reducer.step = self._ours["steps"][number]
        if number == len(self._ours["steps"]) - 1:
            self._folder = ""
